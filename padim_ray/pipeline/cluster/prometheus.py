"""Metrics of jobs for Prometheus, exported by Ray's nodes with `ray_` before each name.

The driver counts images when a shard or a round is committed. So an image counts once, even if Ray
repeats a task or a killed job is continued. (A shard with images that couldn't be fetched is scored
again when its run is continued, and counts again.) Seconds of stages are counted where they are
spent, repetitions included.

The number of labels is bounded: causes by `failures.KNOWN_CAUSES`, groups by `MAX_GROUPS`. A shard
costs a few calls, an image none. Recording without Ray does nothing.

Ray ships values every 10 s (`RAY_metrics_report_interval_ms`) and when a process exits normally; a
killed process loses its last seconds. Nodes keep counters for as long as they live, but drop a
gauge that wasn't set for two of these intervals. So a job sets its gauges repeatedly, and their
last values can be read for 20 s after its end. `padim_ray.runs.pushgateway` exports what must be
known for longer.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from padim_ray.redaction import redact
from padim_ray.runs.failures import bounded_cause

MAX_GROUPS = 100
"""Maximum number of group labels. The largest groups have their own; all others share `OTHERS`."""
OTHERS = "(other groups)"
SCORE_EDGES = tuple(2 ** (quarter / 4) for quarter in range(4, 41))
"""Upper ends of the score histogram's buckets, 2 to 1,024; a quantile's error is below a fifth."""
SHARD_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MAX_LABEL_LENGTH = 200
REFRESH_SECONDS = 5.0
_NAMES = {
    # name: kind, labels, description
    "padim_images_scored_total": ("Counter", "command group", "Images scored and written."),
    "padim_images_flagged_total": ("Counter", "command group", "Images called anomalous."),
    "padim_images_fitted_total": (
        *("Counter", "command"),
        "Images added to moments, or taken out (forget), in committed rounds.",
    ),
    "padim_images_failed_total": ("Counter", "command stage cause", "Images that failed."),
    "padim_score_bucket_total": (
        *("Counter", "command group le"),
        "Images with a score of at most le: a histogram.",
    ),
    "padim_flagged_ratio": ("Gauge", "command group", "Anomalous images / scored ones, this run."),
    "padim_run_listed_images": ("Gauge", "command", "Images of the run."),
    "padim_run_done_images": ("Gauge", "command", "Of them scored, fitted or failed."),
    "padim_run_failed_images": ("Gauge", "command", "Of them failed."),
    "padim_run_manifest_bytes": ("Gauge", "command", "The list of images in the driver's memory."),
    "padim_model_info": ("Gauge", "command model version", "1: what a run scores with, or makes."),
    "padim_stage_seconds_total": ("Counter", "stage", "Seconds that tasks and actors spent."),
    "padim_stage_images_total": ("Counter", "stage", "Images that they spent them on."),
    "padim_shard_seconds": ("Histogram", "stage", "Seconds of each call, of a shard or batch."),
}


@cache
def _metric(name: str) -> Any:
    """The `Counter`, `Gauge` or `Histogram` of this name."""
    from ray.util import metrics  # stages can be tested without Ray

    kind, labels, description = _NAMES[name]
    more = {"boundaries": list(SHARD_SECONDS)} if kind == "Histogram" else {}
    return getattr(metrics, kind)(name, description, tag_keys=tuple(labels.split()), **more)


def _count(name: str, number: float, **labels: str) -> None:
    if number > 0:  # Ray refuses 0
        _metric(name).inc(number, labels)


def label(text: str) -> str:
    """A label's value: Ray takes ASCII only."""
    return text.encode("ascii", "backslashreplace").decode()[:MAX_LABEL_LENGTH]


@contextmanager
def stage(name: str, images: int) -> Iterator[None]:
    """Count the block's seconds as a stage's work on these images, unless it raises."""
    started = time.perf_counter()
    yield
    count_stage(name, images, time.perf_counter() - started)


def count_stage(name: str, images: int, seconds: float) -> None:
    """Count seconds that a stage worked on these images; see `stage`."""
    _count("padim_stage_seconds_total", seconds, stage=name)
    _count("padim_stage_images_total", images, stage=name)
    _metric("padim_shard_seconds").observe(seconds, {"stage": name})


class JobMetrics:
    """A job's own metrics, recorded by its driver; gauges are exported inside the `with` block.

    Args:
        command: fit, update, forget, merge, score or evaluate.
        model: URI of the model.
        version: number of the version that is used or made.
        groups: number of images per group.
        manifest_bytes: size of their list in memory.
    """

    def __init__(
        self, command: str, model: str, version: int, groups: Mapping[str, int], manifest_bytes: int
    ) -> None:
        self.command, self.model, self.version = command, label(redact(model)), version
        self.images, self.manifest_bytes = sum(groups.values()), manifest_bytes
        largest = sorted(groups, key=lambda group: (-groups[group], group))
        few = len(groups) <= MAX_GROUPS
        self._named = frozenset(largest[: MAX_GROUPS if few else MAX_GROUPS - 1])
        self._scored: Counter[str] = Counter()
        self._flagged: Counter[str] = Counter()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "JobMetrics":
        self._set("padim_model_info", 1, model=self.model, version=str(self.version))
        self._set("padim_run_listed_images", self.images)
        self._set("padim_run_manifest_bytes", self.manifest_bytes)
        self.report_progress(0, 0)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._thread.join()

    def _set(self, name: str, value: float, **labels: str) -> None:
        labels["command"] = self.command
        self._gauges[name, tuple(labels.items())] = value
        _metric(name).set(value, labels)

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_SECONDS):
            for (name, labels), value in list(self._gauges.items()):
                _metric(name).set(value, dict(labels))

    def report_progress(self, done: int, failed: int) -> None:
        """Set the numbers of done and failed images; both include those of earlier attempts."""
        self._set("padim_run_done_images", done)
        self._set("padim_run_failed_images", failed)

    def count_scored(self, group: str, scores: np.ndarray, flagged: int) -> None:
        """Count a shard that was committed.

        Args:
            group: of its images.
            scores: (n,), NaN where an image failed.
            flagged: number of anomalous images.
        """
        group = label(group) if group in self._named else OTHERS
        labels = {"command": self.command, "group": group}
        scores = scores[np.isfinite(scores)]
        self._scored[group] += len(scores)
        self._flagged[group] += flagged
        _count("padim_images_scored_total", len(scores), **labels)
        _count("padim_images_flagged_total", flagged, **labels)
        # Ray's Histogram takes one call per image, and records the middle of its bucket
        below = np.searchsorted(np.sort(scores), SCORE_EDGES, side="right")
        for edge, count in zip(SCORE_EDGES, below.tolist(), strict=True):
            _count("padim_score_bucket_total", count, le=f"{edge:.6g}", **labels)
        _count("padim_score_bucket_total", len(scores), le="+Inf", **labels)
        if self._scored[group]:
            ratio = self._flagged[group] / self._scored[group]
            self._set("padim_flagged_ratio", ratio, group=group)

    def count_fitted(self, images: int) -> None:
        """Count the images in the moments of a round that was committed."""
        _count("padim_images_fitted_total", images, command=self.command)

    def count_failed(self, causes: Mapping[str, int]) -> None:
        """Count failed images by cause, as `failures.count_causes` returns them."""
        for cause, images in causes.items():
            stage, short = bounded_cause(cause)
            _count(
                *("padim_images_failed_total", images),
                command=self.command,
                stage=stage,
                cause=short,
            )
