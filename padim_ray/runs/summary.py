"""The summary of a job: counts, and each group's verdict. It is logged and stored in run.json."""

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
MAX_WARNINGS = 10  # logged per kind
HISTOGRAM_BINS = 40
VERBS = {
    "fit": "fitted",
    "update": "added",
    "forget": "removed",
    "merge": "subtracted as duplicates",
}


@contextmanager
def timed(stage: str, stages: dict[str, float]) -> Iterator[None]:
    """Measure the wall time of a stage into `stages`, in seconds, and log it."""
    started = time.monotonic()
    yield
    stages[stage] = round(time.monotonic() - started, 2)
    log.info("%s: %.0f s", stage, stages[stage])


def warn(sentences: Sequence[str], where: str = "") -> None:
    """Log warnings about groups, but no more than `MAX_WARNINGS`.

    Args:
        sentences: one per group.
        where: appended to the last line, which counts those left out.
    """
    for sentence in sentences[:MAX_WARNINGS]:
        log.warning("%s", sentence)
    if len(sentences) > MAX_WARNINGS:
        log.warning("… and %d more groups%s", len(sentences) - MAX_WARNINGS, where)


@dataclass(frozen=True)
class GroupVerdict:
    """One group's results in a scoring run, as stored in run.json.

    `listed`, `scored`, `failed`, `flagged`: numbers of images; flagged ones are anomalous.
    `threshold_note`: a sentence about the threshold, if it needs one.
    `drift`: see `padim_ray.scoring.drift`; None if there are too few images to measure it.
    `histogram`: bin edges, with the counts of this run's and of the leave-one-out scores.
    `heatmap_scale`: distances at the two ends of the colour scale. Both are None if no image was
    scored. `loads`: how often this attempt loaded the group's Gaussians; `loading_actors`: into how
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
        """Summarise one group.

        Args:
            scores: (n,) of the group's images; NaN where an image failed.
            drifting: (m,) those of the scores to measure drift on.
        """
        valid, drifting = (values[np.isfinite(values)] for values in (scores, drifting))
        reference = decision.reference
        measured = measure_drift(decision.p_values(drifting), len(reference))
        drift = None
        if measured:
            changed, meaning = measured.has_changed, measured.meaning(group)
            drift = {**asdict(measured), "has_changed": changed, "meaning": meaning}
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
    """Count scores in logarithmic bins, since defects score many times higher than good images."""
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
    """The outcome of a job.

    `listed`: images of the job. `failed_by_cause`: failed images by stage and cause, the most
    frequent first. `groups`: listed images by group. `before`: images done by earlier attempts.
    `seconds`: wall time of this attempt; `stages`: its parts. `places`: URIs of what was written.
    `verdicts`: by group, after scoring. `skipped`: images that are in the model already; `listed`
    excludes them. `sampled`: images chosen to calibrate the groups that changed; `calibrated`: how
    many of them could be read. `finished_at`: when the job was complete.
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
    finished_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def failed(self) -> int:
        return sum(self.failed_by_cause.values())

    @property
    def done(self) -> int:
        return self.listed - self.failed

    @property
    def flagged(self) -> int:
        """Number of anomalous images."""
        return sum(verdict.flagged for verdict in self.verdicts.values())

    @property
    def images_per_second(self) -> float:
        """Throughput of this attempt, including its start-up."""
        return (self.listed - self.before) / self.seconds

    def report(self) -> None:
        """Log the summary."""
        verb = VERBS.get(self.job, "scored")
        if self.listed:
            log.info(
                "%d images listed, %d %s, %d failed; %.1f images/s overall",
                self.listed,
                self.done,
                verb,
                self.failed,
                self.images_per_second,
            )
        else:  # of a job that works on statistics
            log.info("No image was added, subtracted or scored")
        if self.skipped:
            log.info("%d more images are in the model already", self.skipped)
        if self.sampled:
            log.info(
                "Calibrated with %d images in %.0f s",
                self.calibrated,
                self.stages["calibrate"],
            )
        if self.before:
            log.info("%d of the images were done by an earlier attempt", self.before)
        for cause, count in self.failed_by_cause.items():
            log.warning("%d failed: %s", count, cause)
        if self.verdicts:
            log.info("%d images are anomalous", self.flagged)
            loads = sum(verdict.loads for verdict in self.verdicts.values())
            log.info("Densities loaded %d times for %d groups", loads, len(self.verdicts))
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
    """Write the summary and the run's settings to run.json."""
    content = {
        "job": summary.job,
        "padim_ray": __version__,
        **settings,
        "finished_at": summary.finished_at.isoformat(timespec="seconds"),
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
    """Read the summary of a complete run from run.json.

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
            finished_at=datetime.fromisoformat(run["finished_at"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PadimError(f"{root.uri}/{RUN} is missing or damaged: {error}") from error
