"""From distances to decisions: anomaly maps, thresholds, regions, drift and heatmaps."""
