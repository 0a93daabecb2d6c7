"""Push a run's outcome to a Pushgateway, which keeps it when the run's cluster is gone.

A Ray node exports a gauge for 20 s after it was last set, and a cluster that was made for a job
ends with the job. Prometheus could miss both. Its Pushgateway exports what it was sent until that
is replaced.
"""

import logging
import os
from http.client import HTTPException

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

from padim_ray.redaction import redact
from padim_ray.runs.summary import Summary

log = logging.getLogger("padim_ray")
VARIABLE = "PADIM_RAY_PUSHGATEWAY"
"""Environment variable with the Pushgateway's address; unset or empty: nothing is pushed."""
TIMEOUT = 10.0  # seconds


def push_outcome(summary: Summary, model: str) -> None:
    """Replace the outcome that the Pushgateway has for this command and model.

    A push that fails is logged, because the run is complete all the same.

    Args:
        summary: of a run that is complete.
        model: its URI.
    """
    gateway = os.environ.get(VARIABLE)
    if not gateway:
        return
    registry = CollectorRegistry()
    for name, value, description in (
        ("timestamp_seconds", summary.finished_at.timestamp(), "When the last run was complete."),
        ("images", summary.listed, "Images of the last complete run."),
        ("failed_images", summary.failed, "Of them failed."),
        ("flagged_images", summary.flagged, "Of them called anomalous."),
        ("duration_seconds", summary.seconds, "Wall time of the run's last attempt."),
    ):
        Gauge(f"padim_last_success_{name}", description, registry=registry).set(value)
    key = {"command": summary.job, "model": redact(model)}
    try:
        push_to_gateway(gateway, "padim-ray", registry, grouping_key=key, timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as error:
        log.warning(
            "The Pushgateway %s (%s) can't be reached, so Prometheus won't know of this run: %s",
            *(redact(gateway), VARIABLE, redact(str(error))),
        )
