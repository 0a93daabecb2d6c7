"""Ray itself: sessions, nodes, pools, recovery, devices, memory, metrics."""
