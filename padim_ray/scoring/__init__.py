"""From distances to verdicts: anomaly maps, calibration, thresholds, regions, drift, heatmaps."""
