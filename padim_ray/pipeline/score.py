"""The score job: images → scores in Parquet, heatmaps, raw maps."""

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from padim_ray import artifact
from padim_ray.anomaly_map import image_scores
from padim_ray.artifact import ModelVersion
from padim_ray.errors import ImageError, PadimError
from padim_ray.gaussian import Gaussian
from padim_ray.heatmap import color_scale, common_prefix
from padim_ray.manifest import UriTemplate, group_counts
from padim_ray.model import Embedder, as_images
from padim_ray.options import ScoreOptions, from_mapping
from padim_ray.pipeline.columns import column_array, fixed_size_column
from padim_ray.pipeline.memory import return_freed_memory
from padim_ray.pipeline.resources import Plan, plan_resources
from padim_ray.pipeline.results import DrawHeatmaps, Output, WriteResults
from padim_ray.pipeline.run import Summary, decode_images, read_images_table
from padim_ray.pipeline.session import cluster_nodes, data_context, ray_session
from padim_ray.storage import Location

log = logging.getLogger("padim_ray")

SCORED_TOGETHER = 64  # images: enough for reading the Gaussians not to dominate
GROUP_CACHE_BYTES = 2 * 2**30  # of Gaussians that an actor keeps loaded


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
    started = time.monotonic()
    version = artifact.open_version(Location.of(options.model, options.storage_options))
    version.load_trunk_weights()  # so that missing ones are a sentence, not a dead actor
    manifest = read_images_table(options)
    _check_groups(group_counts(manifest), version)
    output = Output(
        root=Location.of(options.out, options.storage_options),
        prefix=_prefix(options, manifest),
        heatmaps=options.heatmaps,
        top=options.top,
        maps=options.maps,
    )
    output.prepare(overwrite=options.overwrite)
    with ray_session(options.address):
        plan = plan_resources(cluster_nodes(), options.actors)
        embedding = time.monotonic()
        scored = _score_images(options, plan, version, manifest, output)
        log.info("%d images scored in %.0f s", scored.images, time.monotonic() - embedding)
        scale = scored.draw_heatmaps(options, plan, version, output)
    seconds = time.monotonic() - started
    summary = Summary(
        job="score",
        listed=manifest.num_rows,
        failures=scored.failures,
        groups=group_counts(manifest),
        seconds=seconds,
        places=output.places(),
        within_max_failed=options.allows(len(scored.failures), manifest.num_rows),
    )
    if scored.images != manifest.num_rows:
        raise RuntimeError(f"{manifest.num_rows} images listed, but {scored.images} have a result")
    output.check_complete(len(scored.scores))
    _write_run(output, options, version, summary, scale)
    output.remove_staging()
    summary.report()
    return summary


def _check_groups(groups: Mapping[str, int], version: ModelVersion) -> None:
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


@dataclass
class _Scored:
    """What the driver keeps of a run: numbers per shard, not rows."""

    scores: dict[int, np.ndarray]
    failures: dict[str, str]

    @property
    def images(self) -> int:
        """Images that have a row in the results."""
        return sum(map(len, self.scores.values()))

    def draw_heatmaps(
        self, options: ScoreOptions, plan: Plan, version: ModelVersion, output: Output
    ) -> tuple[float, float] | None:
        """Draw the heatmaps that are wanted, on one colour scale, and return the scale."""
        everything = np.concatenate(list(self.scores.values()))
        valid = everything[np.isfinite(everything)]
        if options.heatmaps == "none" or not len(valid):
            return None
        started = time.monotonic()
        scale = color_scale(valid)
        wanted = self._wanted(options.top if options.heatmaps == "top" else len(everything))
        tables = [
            pa.table({"shard": [shard] * len(rows), "row": rows}) for shard, rows in wanted.items()
        ]
        with data_context(preserve_order=False):
            drawn = ray.data.from_arrow(tables).map_batches(
                DrawHeatmaps(
                    output,
                    version.spec.mapper,
                    version.spec.preprocessing,
                    scale,
                    options.storage_options or {},
                ),
                batch_size=None,
                batch_format="pyarrow",
                compute=TaskPoolStrategy(size=min(plan.decoders + plan.actors, len(tables))),
                num_cpus=plan.helper_cpus,
            )
            count = sum(row["drawn"] for row in drawn.iter_rows())
        log.info("%d heatmaps drawn in %.0f s", count, time.monotonic() - started)
        return scale

    def _wanted(self, count: int) -> dict[int, list[int]]:
        """The rows with the highest scores, by shard."""
        shards = np.concatenate([np.full(len(s), shard) for shard, s in self.scores.items()])
        rows = np.concatenate([np.arange(len(s)) for s in self.scores.values()])
        scores = np.concatenate(list(self.scores.values()))
        best = np.argsort(-scores, kind="stable")[:count]  # NaN, of failed images, come last
        wanted: dict[int, list[int]] = {}
        for index in best[np.isfinite(scores[best])]:
            wanted.setdefault(int(shards[index]), []).append(int(rows[index]))
        return {shard: sorted(indices) for shard, indices in wanted.items()}


def _score_images(
    options: ScoreOptions, plan: Plan, version: ModelVersion, manifest: pa.Table, output: Output
) -> _Scored:
    with data_context(preserve_order=False):
        decoded, shards = decode_images(manifest, version.spec.preprocessing, options, plan)
        written = decoded.map_batches(
            ScoreImages,
            fn_constructor_args=[
                version,
                plan,
                options.batch_size or plan.batch_size,
                output.needs_distances,
            ],
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(plan.actors, shards)),
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
        ).map_batches(
            WriteResults(output, version.number, version.spec.mapper),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=plan.helper_cpus,
        )
        scored = _Scored({}, {})
        for row in written.iter_rows():
            scored.scores[row["shard"]] = np.frombuffer(row["scores"], np.float32)
            scored.failures.update(row["failures"])
    return scored


class ScoreImages:
    """Decoded images in, their scores out: adds `score`, and `distances` if they are wanted."""

    def __init__(
        self, version: ModelVersion, plan: Plan, batch_size: int, needs_distances: bool
    ) -> None:
        torch.set_num_threads(plan.threads)
        return_freed_memory()
        self.version = version
        self.embedder = Embedder(version.spec, version.load_trunk_weights(), plan.device)
        self.batch_size = batch_size
        self.needs_distances = needs_distances
        self.loaded: OrderedDict[str, Gaussian] = OrderedDict()

    def __call__(self, shard: pa.Table) -> pa.Table:
        size = self.version.spec.preprocessing.size
        pixels = column_array(shard["image"], np.uint8, (*size, 3))
        errors = shard["error"].to_pylist()
        scores = np.full(shard.num_rows, np.nan, np.float32)
        distances = np.zeros((shard.num_rows, *self.version.spec.mapper.patches), np.float32)
        if not all(errors):
            gaussian = self._gaussian(shard["group"][0].as_py())
            step = max(SCORED_TOGETHER, self.batch_size)
            for start in range(0, shard.num_rows, step):
                part = slice(start, start + step)
                scores[part], distances[part] = self._score(pixels[part], gaussian)
        for row, score in enumerate(scores):
            if errors[row]:
                scores[row] = np.nan
            elif not np.isfinite(score):
                errors[row] = str(ImageError("embed", "NaN or infinite features"))
        shard = shard.drop_columns(["image", "status", "error"])
        for name, column in {
            "status": pa.array(["failed" if error else "scored" for error in errors]),
            "error": pa.array(errors, pa.string()),
            "score": pa.array(scores, mask=~np.isfinite(scores)),
        }.items():
            shard = shard.append_column(name, column)
        if self.needs_distances:
            shard = shard.append_column("distances", fixed_size_column(distances))
        return shard

    @torch.inference_mode()
    def _score(self, pixels: np.ndarray, gaussian: Gaussian) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n,) and distances (n, H_0, W_0); NaN or infinite where the features are."""
        patches = self.embedder.embed(as_images(pixels), self.batch_size)
        distances = self.embedder.distances(patches, gaussian)
        scores = image_scores(self.version.spec.mapper.maps(distances))
        return scores.cpu().numpy(), distances.cpu().numpy()

    def _gaussian(self, group: str) -> Gaussian:
        """Load a group's Gaussians, or take them from the bounded cache of those used last."""
        if group not in self.loaded:
            # room is made before loading; all groups are of one size
            while self.loaded and self._size() * (len(self.loaded) + 1) > GROUP_CACHE_BYTES:
                self.loaded.popitem(last=False)
            self.loaded[group] = self.version.load_gaussian(group).to(self.embedder.device)
        self.loaded.move_to_end(group)
        return self.loaded[group]

    def _size(self) -> int:
        return next(iter(self.loaded.values())).nbytes


def _write_run(
    output: Output,
    options: ScoreOptions,
    version: ModelVersion,
    summary: Summary,
    scale: tuple[float, float] | None,
) -> None:
    content = {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": options.images or options.manifest,
        "model": version.root.uri,
        "model_version": version.number,
        "heatmaps": options.heatmaps,
        "heatmap_scale": scale,
        "listed": summary.listed,
        "scored": summary.done,
        "failed": summary.failed,
        "failed_by_cause": summary.failed_by_cause,
        "groups": dict(summary.groups),
        "seconds": round(summary.seconds, 1),
        "images_per_second": round(summary.listed / summary.seconds, 1),
    }
    (output.root / "run.json").write(json.dumps(content, indent=1, ensure_ascii=False).encode())
