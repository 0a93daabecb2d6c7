"""The report: one HTML page for a run, with everything in it."""

from padim_ray.report.page import write_report

__all__ = ["write_report"]
