"""What a job tells at its end: counts, and each group's verdict."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from padim_ray.decision import Decision
from padim_ray.drift import measure_drift
from padim_ray.heatmap import color_scale

log = logging.getLogger("padim_ray")

MOST_WARNINGS = 10  # of a kind, on the console
HISTOGRAM_BINS = 40


@contextmanager
def timed(stage: str, stages: dict[str, float]) -> Iterator[None]:
    """Time a stage of a job, and log it."""
    started = time.monotonic()
    yield
    stages[stage] = round(time.monotonic() - started, 2)
    log.info("%s: %.0f s", stage, stages[stage])


@dataclass(frozen=True)
class GroupVerdict:
    """How a group did in a scoring run; as it stands in run.json.

    `drift`: distance, critical distance, verdict and its meaning in words; None with too few images
    to tell. `histogram`: edges, and the numbers of this run's and of leave-one-out scores
    between them. `heatmap_scale`: distances of the colours' two ends. Both None if no image was
    scored.
    """

    listed: int
    scored: int
    failed: int
    flagged: int
    threshold: float | None
    threshold_note: str | None
    pixel_threshold: float | None
    calibration_images: int
    drift: dict[str, Any] | None
    histogram: dict[str, list[float]] | None
    heatmap_scale: tuple[float, float] | None

    @classmethod
    def of(
        cls, group: str, scores: np.ndarray, decision: Decision, drifting: np.ndarray
    ) -> "GroupVerdict":
        """From a group's scores (n,), and those that drift is measured on; NaN: failed."""
        valid, drifting = (values[np.isfinite(values)] for values in (scores, drifting))
        reference = decision.reference
        measured = measure_drift(decision.p_values(drifting), len(reference))
        drift = measured and {
            **asdict(measured),
            "has_changed": measured.has_changed,
            "meaning": measured.meaning(group),
        }
        return cls(
            listed=len(scores),
            scored=len(valid),
            failed=len(scores) - len(valid),
            flagged=int(decision.flags(valid).sum()),
            threshold=decision.threshold,
            threshold_note=decision.note,
            pixel_threshold=decision.pixel_threshold,
            calibration_images=len(reference),
            drift=drift,
            histogram=_histogram(valid, reference) if len(valid) else None,
            heatmap_scale=color_scale(valid, decision.threshold) if len(valid) else None,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _histogram(scores: np.ndarray, reference: np.ndarray) -> dict[str, list[float]]:
    """On a logarithmic scale: defects score many times what good images do."""
    both = np.concatenate([scores, reference]).astype(float)
    low, high = max(both.min(), 1e-6), max(both.max(), 1e-6)
    edges = np.geomspace(low * 0.999, high * 1.001, HISTOGRAM_BINS + 1)
    return {
        "edges": edges.tolist(),
        "scores": np.histogram(scores, edges)[0].tolist(),
        "leave_one_out": np.histogram(reference, edges)[0].tolist(),
    }


@dataclass(frozen=True)
class Summary:
    """How a job went.

    `failures`: error of each failed image, by uri. `groups`: listed images of each. `seconds`: wall
    time, and `stages` what of it each took. `places`: what was written where. `verdicts`: of each
    group, after scoring.
    """

    job: str
    listed: int
    failures: Mapping[str, str]
    groups: Mapping[str, int]
    seconds: float
    stages: Mapping[str, float]
    places: Mapping[str, str]
    within_max_failed: bool
    verdicts: Mapping[str, GroupVerdict] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def done(self) -> int:
        return self.listed - self.failed

    @property
    def flagged(self) -> int:
        """Anomalous images."""
        return sum(verdict.flagged for verdict in self.verdicts.values())

    @property
    def failed_by_cause(self) -> dict[str, int]:
        """Numbers of failed images by stage and cause, the most frequent first."""
        causes = Counter(error.partition(" (")[0] for error in self.failures.values())
        return dict(causes.most_common())

    def report(self) -> None:
        """Log the summary."""
        verb = "fitted" if self.job == "fit" else "scored"
        log.info(
            "%d images listed, %d %s, %d failed; %.1f images/s over all",
            self.listed,
            self.done,
            verb,
            self.failed,
            self.listed / self.seconds,
        )
        for cause, count in self.failed_by_cause.items():
            log.warning("%d failed: %s", count, cause)
        if self.verdicts:
            log.info("%d images are anomalous", self.flagged)
        notes = [
            f"{group!r}: {verdict.threshold_note}"
            for group, verdict in self.verdicts.items()
            if verdict.threshold_note
        ]
        changes = [
            f"{verdict.drift['meaning']} (drift {verdict.drift['distance']:.2f})"
            for verdict in self.verdicts.values()
            if verdict.drift and verdict.drift["has_changed"]
        ]
        for warnings in (notes, changes):
            for warning in warnings[:MOST_WARNINGS]:
                log.warning("%s", warning)
            if len(warnings) > MOST_WARNINGS:
                log.warning("… and %d more groups (see run.json)", len(warnings) - MOST_WARNINGS)
        for name, place in self.places.items():
            log.info("%s: %s", name, place)
