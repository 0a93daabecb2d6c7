"""The compare job: an archive scored by two models, and how far they agree, image by image."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import ImageError, PadimError
from padim_ray.evaluation.agreement import (
    Comparison,
    GroupComparison,
    Verdicts,
    measure_changes,
    order_by_change,
)
from padim_ray.images.decode_in_child import UprightImage, decode_all
from padim_ray.images.manifest import group_counts
from padim_ray.images.preprocessing import GreyRange
from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.images.sources import uris_to_fetch, without_sources
from padim_ray.model.readers import reading
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.pipeline.cluster.nodes import plan_for
from padim_ray.pipeline.cluster.recovery import until_done
from padim_ray.pipeline.cluster.session import data_context, ray_session, rows_of
from padim_ray.pipeline.graphs import scored_shards
from padim_ray.pipeline.jobs.score import continue_run, scoring_job, version_to_continue
from padim_ray.pipeline.stages.commit import read_committed
from padim_ray.pipeline.stages.decode import fetcher
from padim_ray.pipeline.stages.output import encode_image
from padim_ray.planning.batches import images_per_shard
from padim_ray.redaction import redact
from padim_ray.report.changes import write_changes
from padim_ray.runs import run_directory
from padim_ray.runs.job_record import JOB, LISTED, JobRecord, identify
from padim_ray.runs.listing import read_images_table
from padim_ray.runs.options.common import RunOptions, check_no_credentials, from_mapping
from padim_ray.runs.options.compare import CompareOptions
from padim_ray.runs.options.score import ScoreOptions
from padim_ray.runs.summary import timed
from padim_ray.scoring.heatmap import color_scale, common_prefix, draw_heatmap, output_name
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
RESULT, TABLE, PAGE = "compare.json", "compare.parquet", "compare.html"
SIDES = ("before", "after")
MODELS = ("models", "models_sha256")  # in a comparison's identity
BATCH_IMAGES = 16  # in memory at their full size


def compare(before: str, after: str, **options: Any) -> Comparison:
    """Score images with two models, and measure how far they agree.

    Args:
        before: a model, such as "s3://models/line7", or one of its versions, "s3://models/line7@3".
        after: the model to compare it with.
        options: the fields of `CompareOptions`, named as on the command line.

    Raises:
        PadimError: for a mistake in the options, a group that neither model knows, or an output
            directory that holds something else.
    """
    return run_compare(before, after, from_mapping(CompareOptions, options))


def run_compare(before: str, after: str, options: CompareOptions) -> Comparison:
    """Compare as `options` say; see `compare`."""
    started = datetime.now(UTC), time.monotonic()
    for name in (before, after):
        check_no_credentials("A model's name", name)
    with hidden_credentials(options.storage_options):
        root = Location.of(options.out, options.storage_options)
        with ExitStack() as stack:
            root = stack.enter_context(claimed(root, "compare")).root
            record = None if options.overwrite else JobRecord.read(root)
            begun_with = record.identity.get("models", (None, None)) if record else (None, None)
            names = [
                version_to_continue(name, begun, options.storage_options)
                for name, begun in zip((before, after), begun_with, strict=True)
            ]
            if record and names == begun_with and run_directory.is_complete(root):
                identity = identify(
                    options, **{key: record.identity[key] for key in ("job", *MODELS)}
                )
                continue_run(record, identity, options, read_images_table, root)
                log.info("%s is complete: nothing is left to do", root.uri)
                return _report(root, _read(root))
            versions = [open_named(name, options.storage_options) for name in names]
            names = [version.name for version in versions]
            if names[0] == names[1]:
                raise PadimError(f"compare takes two versions, but was given {names[0]} twice")
            for version in versions:
                stack.enter_context(reading(version, "compare"))
            hashes = [version.fingerprint() for version in versions]
            identity = identify(
                options, job="compare", **dict(zip(MODELS, (names, hashes), strict=True))
            )
            if options.overwrite:
                _clear(root)
            if record:
                record = continue_run(record, identity, options, read_images_table, root)
            else:
                run_directory.check_empty(root)
                record = JobRecord(identity, {}, read_images_table(options))
                common, _ = _common_images(record.images, versions)
                if not common.num_rows:
                    raise PadimError(f"No group of the images is in both {before} and {after}")
                record.write(root)
            return _Comparing(options, versions, root, record.images, *started).run()


def _clear(root: Location) -> None:
    names = (run_directory.COMPLETE, JOB, LISTED, RESULT, TABLE, PAGE, "heatmaps", *SIDES)
    for name in names:
        (root / name).remove_all()


def _read(root: Location) -> Comparison:
    try:
        return Comparison.from_json(json.loads((root / RESULT).read()))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise PadimError(f"{root.uri}/{RESULT} is missing or damaged: {error}") from error


def _report(root: Location, comparison: Comparison) -> Comparison:
    """Log the comparison, and return it."""
    log.info(
        "%d of %d images scored by both models: %d newly flagged, %d no longer flagged",
        *(comparison.total("compared"), comparison.total("listed")),
        *(comparison.total("newly_flagged"), comparison.total("no_longer_flagged")),
    )
    if lowest := comparison.lowest_rank_correlation:
        group, correlation = lowest
        log.info("Lowest rank correlation: %.4f in group %r", correlation, group)
    for name in (RESULT, TABLE, PAGE, *SIDES):
        log.info("%s: %s", name, (root / name).uri)
    return comparison


def _common_images(
    images: pa.Table, versions: Sequence[ModelVersion]
) -> tuple[pa.Table, dict[str, int]]:
    """Select the images of groups that both models have.

    Returns:
        These images, and the number of images of each other group.

    Raises:
        PadimError: for a group that neither model has.
    """
    counts = group_counts(images)
    first, second = (version.groups for version in versions)
    unknown = [group for group in counts if group not in first and group not in second]
    if unknown:
        raise PadimError(
            f"Neither {versions[0].name} nor {versions[1].name} has the group {unknown[0]!r}"
        )
    common = [group for group in counts if group in first and group in second]
    is_common = pc.is_in(images["group"], pa.array(common, pa.string()))
    return images.filter(is_common), {g: n for g, n in counts.items() if g not in common}


@dataclass
class _Comparing:
    """A comparison that is being made.

    Attributes:
        options: of the job.
        versions: both models' versions.
        root: directory of the results; it contains each model's scoring run.
        listed: all images.
        started_at: when the job started.
        started: the same on the monotonic clock.
        stages: seconds of each stage.
    """

    options: CompareOptions
    versions: Sequence[ModelVersion]
    root: Location
    listed: pa.Table
    started_at: datetime
    started: float
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def _grey_range(self) -> GreyRange | None:
        """The range in which images are drawn: the first model's."""
        return self.versions[0].spec.preprocessing.grey_range

    def run(self) -> Comparison:
        """Score with both models, compare, draw the most changed images and write the results."""
        images, left_out = _common_images(self.listed, self.versions)
        for group, count in left_out.items():
            log.warning("Only one model has the group %r: %d images are left out", group, count)
        with ray_session(self.options.address):
            verdicts = []
            for side, version in zip(SIDES, self.versions, strict=True):
                with timed(f"score {side}", self.stages):
                    verdicts.append(self._score(side, version, images))
            before, after = verdicts
            groups = {group: (before[group], after[group]) for group in group_counts(images)}
            table = _table(images, groups)
            shown = self._most_changed(table)
            with timed("draw heatmaps", self.stages):
                heatmaps = self._draw(images.take(pa.array(shown)), groups)
        (self.root / TABLE).write_table(table)
        comparison = Comparison(
            before=self.versions[0].name,
            after=self.versions[1].name,
            images=redact(self.options.images or self.options.manifest or ""),
            alpha=self.options.alpha,
            started_at=self.started_at.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            groups={group: GroupComparison.of(*both) for group, both in groups.items()},
            left_out=left_out,
            seconds=round(time.monotonic() - self.started, 1),
            stages=self.stages,
        )
        content = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (self.root / RESULT).write(content.encode())
        rows = table.take(pa.array(shown)).to_pylist()
        sources = (
            dict(zip(images["uri"].to_pylist(), uris_to_fetch(images), strict=True))
            if "fetch_uri" in images.column_names
            else {}
        )
        write_changes(
            self.root / PAGE,
            comparison,
            groups,
            [row | heatmaps.get(row["uri"], {}) for row in rows],
            storage_options=self.options.storage_options,
            sources=sources,
            grey_range=self._grey_range,
        )
        run_directory.complete(self.root)
        return _report(self.root, comparison)

    def _score(self, side: str, version: ModelVersion, images: pa.Table) -> dict[str, Verdicts]:
        """Score with one model, or continue that; return verdicts by group."""
        with scoring_job("score", self._options(side, version), lambda _: images) as job:
            if not job.is_complete:
                job.run()
            job.finish()
            scores = job.scores  # read all from the files: an earlier attempt may have made some
            for shard in read_committed(job.output, with_counts=False):
                scores.values[job.shards[shard.number]] = shard.scores
            return {group: Verdicts(values, d) for group, _, values, d in scores.groups()}

    def _options(self, side: str, version: ModelVersion) -> ScoreOptions:
        options = self.options
        shared = {each.name: getattr(options, each.name) for each in fields(RunOptions)}
        return ScoreOptions(
            **shared | {"overwrite": False},
            images=options.images,
            manifest=options.manifest,
            model=version.name,
            out=(self.root / side).uri,
            alpha=options.alpha,
            heatmaps="none",
            report_images=0,
        )

    def _most_changed(self, table: pa.Table) -> np.ndarray:
        """Rows of the images in the report, the most changed first."""
        was, is_ = (table[f"is_anomalous_{side}"].fill_null(False).to_numpy() for side in SIDES)
        changes = table["change"].to_numpy(zero_copy_only=False).astype(float)
        return order_by_change(changes, was != is_)[: self.options.report_images]

    def _draw(
        self, images: pa.Table, groups: Mapping[str, tuple[Verdicts, Verdicts]]
    ) -> dict[str, dict[str, Any]]:
        """Draw both models' heatmaps of some images, with one colour scale per group.

        Returns:
            Columns for the report by URI: `heatmap_before`, `heatmap_after`, `width`, `height`.
        """
        if not images.num_rows:
            return {}
        order = pc.sort_indices(images, [("group", "ascending"), ("uri", "ascending")])
        images = images.take(order)
        distances = [self._distances(images, version) for version in self.versions]
        uris = self.listed["uri"]
        extremes = pc.min_max(uris)
        prefix = common_prefix([extremes["min"].as_py(), extremes["max"].as_py()])
        fetch = fetcher(self.options)
        wanted = UprightImage(self.options.max_image_pixels, grey_range=self._grey_range)
        drawn: dict[str, dict[str, Any]] = {}
        for start in range(0, images.num_rows, BATCH_IMAGES):
            some = images.slice(start, BATCH_IMAGES)
            decoded = decode_all(fetch(uris_to_fetch(some)), wanted)
            for uri, group, image in zip(
                some["uri"].to_pylist(), some["group"].to_pylist(), decoded, strict=True
            ):
                if isinstance(image, ImageError):
                    continue  # deleted since it was scored
                columns: dict[str, Any] = {"width": image.width, "height": image.height}
                drawn[uri] = columns
                scale = _scale(groups[group])
                for side, version, by_uri in zip(SIDES, self.versions, distances, strict=True):
                    if uri not in by_uri:
                        continue
                    (anomaly_map,) = version.spec.mapper.maps(by_uri[uri][None])
                    preprocessing = version.spec.preprocessing
                    heatmap = draw_heatmap(image.pixels, anomaly_map, preprocessing, scale)
                    name = output_name(uri, prefix, ".png")
                    location = self.root / f"heatmaps/{side}/{name}"
                    location.write(encode_image(heatmap, "PNG"))
                    columns[f"heatmap_{side}"] = location.uri
        return drawn

    def _distances(self, images: pa.Table, version: ModelVersion) -> dict[str, np.ndarray]:
        """Measure some images' distances again; a run keeps only those of its highest images."""
        found: dict[str, np.ndarray] = {}
        until_done(
            lambda: found.update(self._measure(images, version)), progress=lambda: len(found)
        )
        return found

    def _measure(self, images: pa.Table, version: ModelVersion) -> Iterator[tuple[str, np.ndarray]]:
        """Yield URI and distances of the images that could be read."""
        per_shard = images_per_shard(images.num_rows, version.spec.preprocessing)
        shards = [shard_table(images, *shard) for shard in enumerate(shard_rows(images, per_shard))]
        plan = plan_for(self.options)
        with data_context(preserve_order=False):
            scored = scored_shards(shards, version, self.options, plan)
            with rows_of(scored.select_columns(["uri", "status", "distances"])) as rows:
                for row in rows:
                    if row["status"] == "scored":
                        patches = np.frombuffer(row["distances"], np.float32)
                        yield row["uri"], patches.reshape(version.spec.mapper.patches)


def _scale(both: tuple[Verdicts, Verdicts]) -> tuple[float, float]:
    """Both ends of the colour scale of a group's heatmaps, the same for both models."""
    scores = np.concatenate([verdicts.scores for verdicts in both])
    thresholds = [verdicts.threshold for verdicts in both if verdicts.threshold is not None]
    return color_scale(scores[np.isfinite(scores)], max(thresholds, default=None))


def _number(threshold: float | None) -> float:
    return np.nan if threshold is None else threshold


def _table(images: pa.Table, groups: Mapping[str, tuple[Verdicts, Verdicts]]) -> pa.Table:
    """The results: a row per image, with both models' verdicts."""
    table = without_sources(images)
    for index, side in enumerate(SIDES):
        verdicts = [both[index] for both in groups.values()]
        scores = np.concatenate([each.scores for each in verdicts])
        thresholds = np.concatenate(
            [np.full(len(each.scores), _number(each.threshold)) for each in verdicts]
        )
        flags = np.concatenate([each.flags for each in verdicts])
        p_values = np.concatenate([each.decision.p_values(each.scores) for each in verdicts])
        table = (
            table.append_column(f"score_{side}", pa.array(scores, mask=np.isnan(scores)))
            .append_column(f"threshold_{side}", pa.array(thresholds, mask=np.isnan(thresholds)))
            .append_column(
                f"is_anomalous_{side}",
                pa.array(flags, mask=np.isnan(scores) | np.isnan(thresholds)),
            )
            .append_column(f"p_value_{side}", pa.array(p_values, mask=np.isnan(p_values)))
        )
    changes = np.concatenate([measure_changes(*both) for both in groups.values()])
    return table.append_column("change", pa.array(changes, mask=np.isnan(changes)))
