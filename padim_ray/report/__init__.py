"""Reports: a self-contained HTML page for a run or a comparison of two models."""

from padim_ray.report.page import MAX_FAILED, write_report

__all__ = ["MAX_FAILED", "write_report"]
