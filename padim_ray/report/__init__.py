"""The report: one HTML page for a run, with everything in it."""

from padim_ray.report.page import MOST_FAILED, write_report

__all__ = ["MOST_FAILED", "write_report"]
