"""A job from start to end: options, job record, run directory, failures, summary."""
