"""A scoring run, from what earlier attempts committed to the report."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from padim_ray.images.fetch import is_unfetched
from padim_ray.images.manifest import group_counts
from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.images.sources import uris_to_fetch
from padim_ray.images.template import UriTemplate
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.pipeline.cluster.nodes import plan_for
from padim_ray.pipeline.cluster.pools import drawing_pool
from padim_ray.pipeline.cluster.prometheus import JobMetrics
from padim_ray.pipeline.cluster.recovery import until_done
from padim_ray.pipeline.cluster.session import data_context, rows_of
from padim_ray.pipeline.cluster.spilling import spilling
from padim_ray.pipeline.graphs import scored_shards
from padim_ray.pipeline.stages.commit import CommittedShard, WriteResults, read_committed
from padim_ray.pipeline.stages.decode import fetcher
from padim_ray.pipeline.stages.draw import DrawHeatmaps
from padim_ray.pipeline.stages.output import Output
from padim_ray.planning.batches import MAX_SHARD_IMAGES
from padim_ray.planning.forecast import score_objects_at_once
from padim_ray.planning.resources import Plan
from padim_ray.redaction import redact
from padim_ray.report import MAX_FAILED, write_report
from padim_ray.runs import run_directory
from padim_ray.runs.failures import Failures, count_causes
from padim_ray.runs.job_record import JobRecord
from padim_ray.runs.options.score import ScoringOptions
from padim_ray.runs.pushgateway import push_outcome
from padim_ray.runs.ranking import Scores
from padim_ray.runs.summary import GroupVerdict, Summary, read_summary, timed, write_summary
from padim_ray.scoring.decision import Decision
from padim_ray.scoring.heatmap import color_scale, common_prefix
from padim_ray.storage.claim import Claim
from padim_ray.storage.fail_points import kill_at
from padim_ray.storage.location import Location

PixelCounter = Callable[[pa.Table, np.ndarray], dict[str, Any]]
AddCounts = Callable[[slice, dict[str, Any]], None]
log = logging.getLogger("padim_ray")
LOADING_THREADS = 16  # reading small files is bound by the store's latency


@dataclass
class ScoringJob:
    """A scoring run: `run` scores what isn't scored yet, `finish` writes summary and report.

    Attributes:
        name: "score" or "evaluate".
        options: of the run.
        version_name: of the model's version, as `open_named` takes it.
        record: the job's record, with the images.
        root: directory of the run.
        claim: on `root`.
        started_at: when this attempt started.
        started: the same on the monotonic clock.
        retry_failed: beginnings of the errors of images that are scored again.
        opened: the model's version, if it is open already.
        done: numbers of the shards whose results are committed.
        drawn: numbers of the shards whose heatmaps are drawn.
        before: number of images that earlier attempts did.
        loads: number of times that a density was loaded, by group and actor.
        stages: seconds of each stage.
    """

    name: str
    options: ScoringOptions
    version_name: str
    record: JobRecord
    root: Location
    claim: Claim
    started_at: datetime
    started: float
    retry_failed: tuple[str, ...] = ()
    opened: ModelVersion | None = None
    done: set[int] = field(default_factory=set)
    drawn: set[int] = field(default_factory=set)
    before: int = 0
    loads: Counter[tuple[str, str]] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)

    @cached_property
    def version(self) -> ModelVersion:
        """The model's version. A complete run doesn't need it, so it may have been pruned."""
        return self.opened or open_named(self.version_name, self.options.storage_options)

    @cached_property
    def output(self) -> Output:
        """The run's files."""
        options = self.options
        return Output(
            root=self.root,
            prefix=_prefix(options, self.manifest),
            heatmaps=options.heatmaps,
            top=options.top if options.heatmaps == "top" else options.report_images,
            staged_top=_max_highest_per_shard(options.report_images, self.manifest.num_rows),
            maps=options.maps,
            min_region_area=options.min_region_area,
            run=self.record.settings.get("run", ""),
        )

    @cached_property
    def scores(self) -> Scores:
        """All images' scores."""
        return Scores(
            self.manifest,
            shard_rows(self.manifest, self.record.settings["images_per_shard"]),
            _decide(group_counts(self.manifest), self.version, self.options),
        )

    @cached_property
    def failures(self) -> Failures:
        """Counts failed images."""
        return Failures(self.options, self.manifest.num_rows)

    @cached_property
    def metrics(self) -> JobMetrics:
        """The job's metrics."""
        return JobMetrics(
            self.name,
            self.version.root.uri,
            self.version.number,
            group_counts(self.manifest),
            self.manifest.nbytes,
        )

    @property
    def manifest(self) -> pa.Table:
        """The images, sorted."""
        return self.record.images

    @property
    def shards(self) -> Sequence[slice]:
        """The manifest's rows of each shard."""
        return self.scores.shards

    @property
    def is_complete(self) -> bool:
        """Whether an earlier attempt has completed the run."""
        return run_directory.is_complete(self.root)

    def run(
        self,
        count_pixels: PixelCounter | None = None,
        add_counts: AddCounts = lambda rows, counts: None,
    ) -> None:
        """Score every image, write the results and draw the heatmaps, inside a Ray session.

        Args:
            count_pixels: counts an evaluation's pixels, see `WriteResults`.
            add_counts: called with each shard's rows of the manifest and its counts.

        Raises:
            TooManyFailed: as soon as more images failed than --max-failed allows.
        """
        with timed("continue", self.stages):
            self._read_committed(count_pixels is not None, add_counts)
        self.metrics.report_progress(self.failures.read, self.failures.count)

        def run_on_nodes(stage: Callable[[Plan], None]) -> Callable[[], None]:
            return lambda: stage(plan_for(self.options))

        with spilling(self._objects_at_once()):
            with timed("score", self.stages):
                until_done(
                    run_on_nodes(lambda plan: self._score(plan, count_pixels, add_counts)),
                    progress=lambda: len(self.done),
                )
            kill_at("score:results-complete")
            if self.options.heatmaps != "none":
                with timed("draw heatmaps", self.stages):
                    until_done(run_on_nodes(self._draw_heatmaps), progress=lambda: len(self.drawn))

    def _objects_at_once(self) -> int:
        """Bytes in the object stores at the same time."""
        manifest, plan = self.manifest, plan_for(self.options)
        return score_objects_at_once(manifest.num_rows, manifest.nbytes, self.version.spec, plan)

    def _read_committed(self, with_counts: bool, add_counts: AddCounts) -> None:
        """Record what earlier attempts did, except shards of which something is tried again.

        These are images and masks that couldn't be fetched, and images of `retry_failed`. The parts
        of these shards are deleted first: a task never replaces one.
        """
        again: list[Location] = []
        for shard in read_committed(self.output, with_counts=with_counts):
            if not self.output.is_own(shard.attempt) or self._is_tried_again(shard):
                again.append(self.output.part(shard.number))
                continue
            rows = self.shards[shard.number]
            self._record(shard.number, shard.scores, count_causes(shard.errors))
            add_counts(rows, shard.counts)
            if shard.is_drawn:
                self.drawn.add(shard.number)
            self.before += len(shard.scores)
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            list(pool.map(Location.remove, again))
        if self.before:
            log.info("%d of %d images are done already", self.before, self.manifest.num_rows)
        if len(self.done) < len(self.shards):
            # new scores may change which images get heatmaps; what to draw them from is gone only
            # if the run was complete, and then no other images of these shards can come to need one
            self.drawn -= self.output.staged_shards()

    def _is_tried_again(self, shard: CommittedShard) -> bool:
        unfetched = map(is_unfetched, [*shard.errors, *shard.mask_errors])
        return any(unfetched) or any(error.startswith(self.retry_failed) for error in shard.errors)

    def _record(self, shard: int, scores: np.ndarray, causes: Mapping[str, int]) -> None:
        """Record a shard that is committed."""
        self.scores.values[self.shards[shard]] = scores
        self.done.add(shard)
        self.failures.add(len(scores), causes)

    def _count(self, shard: int, scores: np.ndarray, causes: Mapping[str, int]) -> None:
        """Update the metrics with a shard that this attempt committed."""
        group = self.manifest["group"][self.shards[shard].start].as_py()
        flagged = int(self.scores.decisions[group].flags(scores).sum())
        self.metrics.count_scored(group, scores, flagged)
        self.metrics.count_failed(causes)

    def _score(self, plan: Plan, count_pixels: PixelCounter | None, add_counts: AddCounts) -> None:
        """Score and commit the shards that aren't done."""
        self.claim.check()
        left = [number for number in range(len(self.shards)) if number not in self.done]
        if not left:
            return
        with data_context(preserve_order=False):
            shards = [shard_table(self.manifest, n, self.shards[n]) for n in left]
            commit = WriteResults(self.output, self.version, self.scores.decisions, count_pixels)
            written = scored_shards(shards, self.version, self.options, plan, commit)
            with rows_of(written) as rows:
                for row in rows:
                    self.claim.check()
                    shard, scores = row.pop("shard"), np.frombuffer(row.pop("scores"), np.float32)
                    if shard in self.done:
                        raise RuntimeError(f"shard {shard} was scored twice")
                    causes = dict(row.pop("causes"))
                    self._count(shard, scores, causes)
                    self._record(shard, scores, causes)
                    self.metrics.report_progress(self.failures.read, self.failures.count)
                    actor = row.pop("actor_id")
                    self.loads.update((group, actor) for group in row.pop("loaded_groups"))
                    add_counts(self.shards[shard], row)
                    kill_at("score:part-written")
        if len(self.done) != len(self.shards):
            raise RuntimeError(f"{len(self.shards)} shards, but {len(self.done)} have results")
        self.output.check_complete(len(self.shards))

    def _draw_heatmaps(self, plan: Plan) -> None:
        """Draw the missing heatmaps, with one colour scale per group."""
        tables = [
            table
            for table in self.scores.by_shard(self.scores.wanted(self.options))
            if table["shard"][0].as_py() not in self.drawn
        ]
        if not tables:
            return
        spec = self.version.spec
        draw = DrawHeatmaps(
            self.output,
            spec.mapper,
            spec.preprocessing,
            {
                group: color_scale(scores[np.isfinite(scores)], decision.threshold)
                for group, _, scores, decision in self.scores.groups()
                if np.isfinite(scores).any()
            },
            fetcher(self.options),
            self.options.max_image_pixels,
        )
        with data_context(preserve_order=False):
            drawn = ray.data.from_blocks(tables).map_batches(
                draw,
                batch_size=None,
                batch_format="pyarrow",
                compute=drawing_pool(plan, len(tables)),
                **plan.helper.options,
            )
            count = 0
            with rows_of(drawn) as rows:
                for row in rows:
                    self.claim.check()
                    self.drawn.add(row["shard"])
                    count += row["drawn"]
        log.info("%d heatmaps drawn", count)

    def finish(
        self, *, is_good: np.ndarray | None = None, places: Mapping[str, str] | None = None
    ) -> Summary:
        """Write run.json and the report, and log the summary; a complete run only logs it again.

        Args:
            is_good: (n,) bool, the images on which drift is measured; None: all.
            places: URIs of further results by name.

        Raises:
            TooManyFailed: if images couldn't be fetched. The summary and the report are written,
                but the run isn't complete.
        """
        places = self.output.places() | dict(places or {})
        if self.is_complete:
            log.info("%s is complete: nothing is left to do", self.root.uri)
            run_directory.complete(self.root)  # a killed attempt may have left files
            summary = read_summary(self.root, places)
            summary.report()
            # a killed attempt may not have done so
            push_outcome(summary, self.record.identity["model"])
            return summary
        summary = self._summarise(is_good, places)
        write_summary(self.root, summary, self._settings())
        kill_at("score:run-json-written")
        summary.report()
        self._report()
        self.failures.check_fetched()
        run_directory.complete(self.root)
        push_outcome(summary, self.record.identity["model"])
        return summary

    def _summarise(self, is_good: np.ndarray | None, places: Mapping[str, str]) -> Summary:
        loads: Counter[str] = Counter()
        for (group, _), times in self.loads.items():
            loads[group] += times
        loading_actors = Counter(group for group, _ in self.loads)
        verdicts = {
            group: replace(
                GroupVerdict.of(
                    group, scores, decision, scores if is_good is None else scores[is_good[where]]
                ),
                loads=loads[group],
                loading_actors=loading_actors[group],
            )
            for group, where, scores, decision in self.scores.groups()
        }
        return Summary(
            job=self.name,
            listed=self.manifest.num_rows,
            failed_by_cause=dict(self.failures.causes.most_common()),
            groups=group_counts(self.manifest),
            before=self.before,
            seconds=time.monotonic() - self.started,
            stages=self.stages,
            places=places,
            verdicts=verdicts,
        )

    def _report(self) -> None:
        wanted = self.scores.highest(self.options.report_images)
        failed = np.flatnonzero(np.isnan(self.scores.values))[:MAX_FAILED]
        shards = self.scores.by_shard(np.union1d(wanted, failed).astype(int))
        shown = self.manifest.take(wanted)
        write_report(
            self.root,
            images=self.options.report_images,
            storage_options=self.options.storage_options,
            parts=[self.output.part(table["shard"][0].as_py()).name for table in shards],
            sources=dict(zip(shown["uri"].to_pylist(), uris_to_fetch(shown), strict=True)),
        )

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "images": redact(options.images or options.manifest or ""),
            "model": self.version.root.uri,
            "model_version": self.version.number,
            "alpha": options.alpha,
            "pixel_alpha": options.pixel_alpha,
            "threshold": options.threshold,
            "heatmaps": options.heatmaps,
            "grey_range": self.version.spec.preprocessing.grey_range,
            "is_complete": self.failures.is_complete,
        }


def _max_highest_per_shard(highest: int, listed: int) -> int:
    """Upper bound of the number of a run's highest images in one shard, if they spread by chance.

    If they cluster in a few shards, most of them are flagged, and flagged images are kept anyway.
    """
    expected = highest * min(1, MAX_SHARD_IMAGES / max(1, listed))
    return int(expected + 5 * expected**0.5 + 1) if highest else 0


def _decide(
    groups: Iterable[str], version: ModelVersion, options: ScoringOptions
) -> dict[str, Decision]:
    """Load the calibrations, and derive each group's decision."""

    def decide(group: str) -> Decision:
        calibration = version.load_calibration(group)
        return Decision.of(calibration, options.alpha, options.pixel_alpha, options.threshold)

    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        return dict(zip(groups, pool.map(decide, groups), strict=True))


def _prefix(options: ScoringOptions, manifest: pa.Table) -> str:
    """The common beginning of all images' URIs, which the names of heatmaps leave out."""
    if options.images is not None:
        return UriTemplate.parse(options.images, options.storage_options).root.uri
    if not manifest.num_rows:
        return ""
    extremes = pc.min_max(manifest["uri"])
    return common_prefix([extremes["min"].as_py(), extremes["max"].as_py()])
