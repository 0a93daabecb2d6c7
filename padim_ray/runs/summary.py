"""What a job tells at its end: counts, and each group's verdict."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from padim_ray import __version__
from padim_ray.errors import PadimError
from padim_ray.scoring.decision import Decision
from padim_ray.scoring.drift import measure_drift
from padim_ray.scoring.heatmap import color_scale
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
RUN = "run.json"
MOST_WARNINGS = 10  # of a kind, on the console
HISTOGRAM_BINS = 40
VERBS = {
    "fit": "fitted",
    "update": "added",
    "forget": "taken out",
    "merge": "taken out to count once",
}


@contextmanager
def timed(stage: str, stages: dict[str, float]) -> Iterator[None]:
    """Time a stage of a job, and log it."""
    started = time.monotonic()
    yield
    stages[stage] = round(time.monotonic() - started, 2)
    log.info("%s: %.0f s", stage, stages[stage])


def warn(sentences: Sequence[str], where: str = "") -> None:
    """Log what is to be known of groups, of the first ones at least.

    Args:
        where: all of it is.
    """
    for sentence in sentences[:MOST_WARNINGS]:
        log.warning("%s", sentence)
    if len(sentences) > MOST_WARNINGS:
        log.warning("… and %d more groups%s", len(sentences) - MOST_WARNINGS, where)


@dataclass(frozen=True)
class GroupVerdict:
    """How a group did in a scoring run; as it stands in run.json.

    `drift`: distance, critical distance, verdict and its meaning in words; None with too few images
    to tell. `histogram`: edges, and the numbers of this run's and of leave-one-out scores
    between them. `heatmap_scale`: distances of the colours' two ends. Both None if no image was
    scored. `loads`: how often its Gaussians were loaded in this attempt, `loading_actors` by how
    many actors.
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
    loads: int = 0
    loading_actors: int = 0

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

    `failed_by_cause`: numbers of failed images by stage and cause, the most frequent first.
    `groups`: listed images of each. `before`: images that an earlier attempt had done. `seconds`:
    wall time of this one, and `stages` what of it each took. `places`: what was written where.
    `verdicts`: of each group, after scoring. `skipped`: listed images that the model has already,
    which `listed` doesn't count. `sampled`: images that were to be read once more to calibrate the
    groups that changed, of which `calibrated` could be.
    """

    job: str
    listed: int
    failed_by_cause: Mapping[str, int]
    groups: Mapping[str, int]
    before: int
    seconds: float
    stages: Mapping[str, float]
    places: Mapping[str, str]
    verdicts: Mapping[str, GroupVerdict] = field(default_factory=dict)
    skipped: int = 0
    sampled: int = 0
    calibrated: int = 0

    @property
    def failed(self) -> int:
        return sum(self.failed_by_cause.values())

    @property
    def done(self) -> int:
        return self.listed - self.failed

    @property
    def flagged(self) -> int:
        """Anomalous images."""
        return sum(verdict.flagged for verdict in self.verdicts.values())

    @property
    def images_per_second(self) -> float:
        """Of this attempt, start-up and all."""
        return (self.listed - self.before) / self.seconds

    def report(self) -> None:
        """Log the summary."""
        verb = VERBS.get(self.job, "scored")
        log.info(
            "%d images listed, %d %s, %d failed; %.1f images/s over all",
            self.listed,
            self.done,
            verb,
            self.failed,
            self.images_per_second,
        )
        if self.skipped:
            log.info("%d more are in the model already", self.skipped)
        if self.sampled:
            log.info(
                "%d images were read once more to calibrate, which took %.0f s",
                *(self.calibrated, self.stages["calibrate"]),
            )
        if self.before:
            log.info("%d of them had been done before", self.before)
        for cause, count in self.failed_by_cause.items():
            log.warning("%d failed: %s", count, cause)
        if self.verdicts:
            log.info("%d images are anomalous", self.flagged)
            loads = [verdict.loads for verdict in self.verdicts.values()]
            log.info(
                "%d groups' Gaussians were loaded %d times, one group's %d times at the most",
                *(len(loads), sum(loads), max(loads)),
            )
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
        for sentences in (notes, changes):
            warn(sentences, " (see run.json)")
        for name, place in self.places.items():
            log.info("%s: %s", name, place)


def write_summary(root: Location, summary: Summary, settings: Mapping[str, Any]) -> None:
    """Write run.json: the summary, beside settings that explain it."""
    content = {
        "job": summary.job,
        "padim_ray": __version__,
        **settings,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "listed": summary.listed,
        "scored": summary.done,
        "failed": summary.failed,
        "flagged": summary.flagged,
        "failed_by_cause": summary.failed_by_cause,
        "scored_before": summary.before,
        "seconds": round(summary.seconds, 1),
        "stages": summary.stages,
        "images_per_second": round(summary.images_per_second, 1),
        "groups": {group: asdict(verdict) for group, verdict in summary.verdicts.items()},
    }
    data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (root / RUN).write(data.encode())


def read_summary(root: Location, places: Mapping[str, str]) -> Summary:
    """The summary of a run that is complete, from run.json.

    Raises:
        PadimError: if it is missing or damaged.
    """
    try:
        run = json.loads((root / RUN).read())
        verdicts = {group: GroupVerdict(**verdict) for group, verdict in run["groups"].items()}
        return Summary(
            job=run["job"],
            listed=run["listed"],
            failed_by_cause=run["failed_by_cause"],
            groups={group: verdict.listed for group, verdict in verdicts.items()},
            before=run["listed"],
            seconds=run["seconds"],
            stages={},
            places=places,
            verdicts=verdicts,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PadimError(f"{root.uri}/{RUN} is missing or damaged: {error}") from error
