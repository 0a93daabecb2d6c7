"""Forecasts of jobs, and how jobs divide a cluster and their work. No Ray."""
