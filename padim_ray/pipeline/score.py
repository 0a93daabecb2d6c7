"""The score job: images → scores and verdicts in Parquet, heatmaps, raw maps, a report."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import TaskPoolStrategy

from padim_ray import __version__, artifact
from padim_ray.artifact import ModelVersion
from padim_ray.decision import Decision
from padim_ray.errors import PadimError
from padim_ray.heatmap import color_scale, common_prefix
from padim_ray.manifest import UriTemplate, group_counts
from padim_ray.options import ScoreOptions, from_mapping
from padim_ray.pipeline.decode import MAX_SHARD_IMAGES
from padim_ray.pipeline.resources import Plan, plan_resources
from padim_ray.pipeline.results import DrawHeatmaps, Output, WriteResults
from padim_ray.pipeline.run import fetcher, read_images_table
from padim_ray.pipeline.scorer import score_images
from padim_ray.pipeline.session import cluster_nodes, data_context, ray_session
from padim_ray.pipeline.summary import GroupVerdict, Summary, timed
from padim_ray.report import MOST_FAILED, write_report
from padim_ray.storage import Location

log = logging.getLogger("padim_ray")

LOADING_THREADS = 16  # calibrations are small files: they wait for the store


def score(**options: Any) -> Summary:
    """Score images with a fitted model.

    Args:
        options: the fields of `ScoreOptions`, named as on the command line:
            `padim_ray.score(images="new/{group}/*.png", model="models/line7", out="results/1")`.

    Raises:
        PadimError: for a mistake in the options, a group that the model doesn't know, or an output
            directory that already holds results.
    """
    return run_score(from_mapping(ScoreOptions, options))


def run_score(options: ScoreOptions) -> Summary:
    """Score as `options` say; see `score`."""
    job = ScoringJob.prepare(options, read_images_table)
    job.run()
    return job.finish("score")


@dataclass
class ScoringJob:
    """A scoring run: `prepare` finds the user's mistakes, `run` scores, `finish` sums it up.

    `scores`: of every row of the manifest, NaN until scored or where it failed. `shards`: the rows
    of each shard.
    """

    options: ScoreOptions
    version: ModelVersion
    manifest: pa.Table
    decisions: Mapping[str, Decision]
    output: Output
    started_at: datetime
    started: float
    scores: np.ndarray = field(init=False)
    shards: list[slice] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = np.full(self.manifest.num_rows, np.nan, np.float32)

    @classmethod
    def prepare(
        cls, options: ScoreOptions, read_manifest: Callable[[ScoreOptions], pa.Table]
    ) -> "ScoringJob":
        """Open the model, list the images, make room for the results.

        Raises:
            PadimError: for whatever can be known to go wrong before anything slow.
        """
        started = datetime.now(UTC), time.monotonic()
        version = artifact.open_version(Location.of(options.model, options.storage_options))
        version.load_trunk_weights()  # so that missing ones are a sentence, not a dead actor
        manifest = read_manifest(options)
        groups = list(group_counts(manifest))
        _check_groups(groups, version)

        def decide(group: str) -> Decision:
            calibration = version.load_calibration(group)
            return Decision.of(calibration, options.alpha, options.pixel_alpha, options.threshold)

        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            decisions = dict(zip(groups, pool.map(decide, groups), strict=True))
        output = Output(
            root=Location.of(options.out, options.storage_options),
            prefix=_prefix(options, manifest),
            heatmaps=options.heatmaps,
            top=options.top if options.heatmaps == "top" else options.report_images,
            staged_top=_most_of_the_highest(options.report_images, manifest.num_rows),
            maps=options.maps,
            min_region_area=options.min_region_area,
        )
        output.prepare(overwrite=options.overwrite)
        return cls(options, version, manifest, decisions, output, *started)

    def run(
        self,
        count_pixels: Callable[[pa.Table, np.ndarray], dict[str, Any]] | None = None,
        take: Callable[[slice, dict[str, Any]], None] = lambda rows, counts: None,
    ) -> None:
        """Score every image, write the results and draw the heatmaps.

        Args:
            count_pixels: see `WriteResults`.
            take: is given what that counted in each shard, with the shard's rows of the manifest.
        """
        with ray_session(self.options.address):
            plan = plan_resources(cluster_nodes(), self.options.actors)
            with timed("score", self.stages):
                self._score(plan, count_pixels, take)
            if self.options.heatmaps != "none":
                with timed("draw heatmaps", self.stages):
                    self._draw_heatmaps(plan)

    def _score(self, plan: Plan, count_pixels: Callable | None, take: Callable) -> None:
        done = 0
        with data_context(preserve_order=False):
            scored, self.shards = score_images(self.manifest, self.version, self.options, plan)
            written = scored.map_batches(
                WriteResults(self.output, self.version, self.decisions, count_pixels),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=plan.helper_cpus,
            )
            for row in written.iter_rows():
                where = self.shards[row.pop("shard")]
                self.scores[where] = np.frombuffer(row.pop("scores"), np.float32)
                self.failures.update(row.pop("failures"))
                take(where, row)
                done += where.stop - where.start
        if done != self.manifest.num_rows:
            raise RuntimeError(f"{self.manifest.num_rows} images listed, but {done} have a result")
        self.output.check_complete(len(self.shards))

    def _draw_heatmaps(self, plan: Plan) -> None:
        """Draw the heatmaps that are wanted, each group's on one colour scale."""
        tables = self._by_shard(self._wanted())
        if not tables:
            return
        spec = self.version.spec
        draw = DrawHeatmaps(
            self.output,
            spec.mapper,
            spec.preprocessing,
            {
                group: color_scale(scores[np.isfinite(scores)], decision.threshold)
                for group, _, scores, decision in self.groups()
                if np.isfinite(scores).any()
            },
            fetcher(self.options),
            self.options.max_image_pixels,
        )
        with data_context(preserve_order=False):
            drawn = ray.data.from_arrow(tables).map_batches(
                draw,
                batch_size=None,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=min(plan.decoders + plan.actors, len(tables))),
                num_cpus=plan.helper_cpus,
            )
            count = sum(row["drawn"] for row in drawn.iter_rows())
        log.info("%d heatmaps drawn", count)

    def _wanted(self) -> np.ndarray:
        """The manifest's rows that get a heatmap, ascending."""
        is_scored = np.isfinite(self.scores)
        if self.options.heatmaps == "all":
            return np.flatnonzero(is_scored)
        highest = self.highest(self.output.top)
        if self.options.heatmaps == "top":
            return np.sort(highest)
        flags = [decision.flags(scores) for _, _, scores, decision in self.groups()]
        return np.union1d(highest, np.flatnonzero(np.concatenate(flags)))

    def highest(self, count: int) -> np.ndarray:
        """The rows that exceed their threshold most, or come nearest to it, the highest first.

        Groups without a threshold come after those with one.
        """
        excess, unjudged = [], []
        for _, _, scores, decision in self.groups():
            excess.append(decision.excess(scores))
            unjudged.append(np.full(len(scores), decision.threshold is None))
        order = np.lexsort([-np.concatenate(excess), np.concatenate(unjudged)])
        return order[np.isfinite(self.scores[order])][:count]

    def groups(self) -> Iterator[tuple[str, slice, np.ndarray, Decision]]:
        """Every group's name, rows of the manifest, scores and decision, in the rows' order."""
        start = 0
        for group, count in group_counts(self.manifest).items():
            where = slice(start, start + count)
            yield group, where, self.scores[where], self.decisions[group]
            start += count

    def _by_shard(self, rows: np.ndarray) -> list[pa.Table]:
        """Tables of `group`, `shard` and `row` in it, one per shard that has any of these rows.

        Args:
            rows: of the manifest, ascending.
        """
        starts = np.array([where.start for where in self.shards])
        shards = np.searchsorted(starts, rows, side="right") - 1
        tables = []
        for here in np.split(rows, np.flatnonzero(np.diff(shards)) + 1) if len(rows) else []:
            shard = shards[np.searchsorted(rows, here[0])]
            columns = {
                "group": self.manifest["group"][int(starts[shard])],
                "shard": pa.scalar(int(shard)),
            }
            repeated = {name: pa.repeat(value, len(here)) for name, value in columns.items()}
            tables.append(pa.table({**repeated, "row": pa.array(here - starts[shard], pa.int32())}))
        return tables

    def finish(
        self,
        job: str,
        *,
        is_good: np.ndarray | None = None,
        places: Mapping[str, str] | None = None,
    ) -> Summary:
        """Write run.json and the report, remove what isn't needed any more, and say how it went.

        Args:
            job: "score" or "evaluate".
            is_good: the images that drift is measured on, where it is known that others are
                defective.
            places: what else was written where.
        """
        seconds = time.monotonic() - self.started
        verdicts = {
            group: GroupVerdict.of(
                group, scores, decision, scores if is_good is None else scores[is_good[where]]
            )
            for group, where, scores, decision in self.groups()
        }
        summary = Summary(
            job=job,
            listed=self.manifest.num_rows,
            failures=self.failures,
            groups=group_counts(self.manifest),
            seconds=seconds,
            stages=self.stages,
            places=self.output.places() | dict(places or {}),
            within_max_failed=self.options.allows(len(self.failures), self.manifest.num_rows),
            verdicts=verdicts,
        )
        content = self._description(summary)
        data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (self.output.root / "run.json").write(data.encode())
        self.output.remove_staging()
        summary.report()
        self._report()
        return summary

    def _report(self) -> None:
        wanted = self.highest(self.options.report_images)
        failed = np.flatnonzero(np.isnan(self.scores))[:MOST_FAILED]
        shards = self._by_shard(np.union1d(wanted, failed).astype(int))
        write_report(
            self.output.root,
            images=self.options.report_images,
            storage_options=self.options.storage_options,
            parts=[
                self.output.part(table["shard"][0].as_py()).uri.rpartition("/")[2]
                for table in shards
            ],
        )

    def _description(self, summary: Summary) -> dict[str, Any]:
        options = self.options
        return {
            "job": summary.job,
            "padim_ray": __version__,
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": options.images or options.manifest,
            "model": self.version.root.uri,
            "model_version": self.version.number,
            "alpha": options.alpha,
            "pixel_alpha": options.pixel_alpha,
            "threshold": options.threshold,
            "listed": summary.listed,
            "scored": summary.done,
            "failed": summary.failed,
            "flagged": summary.flagged,
            "failed_by_cause": summary.failed_by_cause,
            "seconds": round(summary.seconds, 1),
            "stages": summary.stages,
            "images_per_second": round(summary.listed / summary.seconds, 1),
            "heatmaps": options.heatmaps,
            "groups": {group: verdict.to_json() for group, verdict in summary.verdicts.items()},
        }


def _most_of_the_highest(highest: int, listed: int) -> int:
    """How many of a run's highest images a shard holds at the most, if they are spread by chance.

    Where they aren't they are mostly flagged, which is reason enough to be kept.
    """
    expected = highest * min(1, MAX_SHARD_IMAGES / listed)
    return int(expected + 5 * expected**0.5 + 1) if highest else 0


def _check_groups(groups: list[str], version: ModelVersion) -> None:
    unknown = sorted(set(groups) - set(version.groups))
    if unknown:
        known = ", ".join(map(repr, list(version.groups)[:10]))
        raise PadimError(
            f"The model at {version.root.uri} has no group {unknown[0]!r}"
            + (f", nor {len(unknown) - 1} others that the images name" * (len(unknown) > 1))
            + f"; it has {known}{' …' * (len(version.groups) > 10)}"
        )


def _prefix(options: ScoreOptions, manifest: pa.Table) -> str:
    """What all images' URIs begin with, and heatmaps' names leave out."""
    if options.images is not None:
        return UriTemplate.parse(options.images, options.storage_options).root.uri
    extremes = pc.min_max(manifest["uri"])
    return common_prefix([extremes["min"].as_py(), extremes["max"].as_py()])
