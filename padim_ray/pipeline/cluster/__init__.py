"""The Ray cluster: session, nodes, pools, devices, memory, recovery and metrics."""
