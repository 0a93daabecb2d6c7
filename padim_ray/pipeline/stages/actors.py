"""The actor that sums up images: trunk, moments of a batch."""

import logging
import operator
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray.data._internal.execution.interfaces import RefBundle

from padim_ray.densities.gaussian.moments import Moments, empty_moments
from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.errors import ImageError
from padim_ray.features.embedder import Embedder, as_images
from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion, load_trunk_weights
from padim_ray.pipeline.cluster.device import Device
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.cluster.pools import actor_pool
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.cluster.session import data_context
from padim_ray.pipeline.merging.codec import describe_sum, serialise
from padim_ray.pipeline.stages.columns import column_array, fixed_size_column
from padim_ray.pipeline.stages.decode import decode_images
from padim_ray.pipeline.stages.density_cache import GaussianCache
from padim_ray.planning.batches import images_per_batch, images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.options.common import RunOptions
from padim_ray.runs.options.fit import RoundOptions
from padim_ray.scoring.anomaly_map import image_scores
from padim_ray.storage.location import Location


def partial_sums(
    options: RoundOptions, plan: Plan, spec: ModelSpec, root: Location, manifest: pa.Table
) -> Iterator[RefBundle]:
    """Blocks of partial sums, group after group.

    In the manifest's order they are of the same images in every run: results repeat.
    """
    with data_context(preserve_order=True):
        per_shard = images_per_shard(manifest.num_rows, spec.preprocessing)
        shards = [
            shard_table(manifest, *shard) for shard in enumerate(shard_rows(manifest, per_shard))
        ]
        partials = decode_images(shards, spec.preprocessing, options, plan).map_batches(
            PartialSums,
            fn_constructor_args=[root, spec, plan, options.batch_size],
            batch_size=images_per_batch(
                manifest.num_rows, plan.asked_actors, spec, options.round_images
            ),
            batch_format="pyarrow",
            compute=actor_pool(plan, len(shards), max_tasks_in_flight_per_actor=2),
            **plan.actor.options,
        )
        yield from partials.iter_internal_ref_bundles()


class PartialSums:
    """Images in, partial sums out. Keeps nothing between calls: Ray may run any call twice.

    Rows out: `group`, `shard` (which run of cells), `count`, `state` (moments, float32, serialised)
    and `failures` (uri and error of images that failed; in shard 0's row only).
    """

    def __init__(self, root: Location, spec: ModelSpec, plan: Plan, batch_size: int | None) -> None:
        prepare_memory(keep_activations=True)
        weights = load_trunk_weights(root, spec.weights_sha256)
        self.device = Device.of(plan)
        self.embedder = Embedder(
            spec, weights, self.device.name, batch_size, plan.threads, reuse=True
        )

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        self.device.check()
        start = 0
        for _, run in groupby(images["group"].to_pylist()):
            length = len(list(run))
            yield from self._sum(images.slice(start, length))
            start += length

    def _sum(self, images: pa.Table) -> Iterator[pa.Table]:
        spec = self.embedder.spec
        pairs = zip(images["uri"].to_pylist(), images["error"].to_pylist(), strict=True)
        failures = {uri: error for uri, error in pairs if error}
        with stage("sum", images.num_rows):
            total = self._sum_up(images, failures)
        group = images["group"][0].as_py()
        if not total.count:
            yield describe_sum(group, 0, 0, pa.py_buffer(b""), failures)
            return
        for shard, (start, stop) in enumerate(state_shards(spec)):
            state = serialise(total.cells(start, stop).to("cpu"))
            yield describe_sum(group, shard, total.count, state, failures if shard == 0 else {})

    def _sum_up(self, images: pa.Table, failures: dict[str, str]) -> Moments:
        grid = self.embedder.spec.grid
        total = empty_moments(grid.cells, grid.channels, device=self.embedder.device)
        parts: deque[pa.Table] = deque()
        for embeddings in self.embedder.embed_each(self._batches(images, parts)):
            uris = parts.popleft()["uri"]
            good = embeddings.are_finite()
            if not good.all():
                error = str(ImageError("embed", "NaN or infinite features"))
                bad = (~good).nonzero().flatten().tolist()
                failures.update({uris[row].as_py(): error for row in bad})
                embeddings = embeddings[good]
            if len(embeddings):
                total = self.embedder.accumulate_(total, embeddings)
        return total

    def _batches(self, images: pa.Table, parts: deque[pa.Table]) -> Iterator[torch.Tensor]:
        """Images that were decoded, as many as are best summed up together; `parts`: of these."""
        for start in range(0, images.num_rows, self.embedder.together):
            # a filter copies, so not before the slice: memory is bounded by the step
            part = images.slice(start, self.embedder.together)
            if part["error"].null_count < part.num_rows:
                part = part.filter(pc.is_null(part["error"]))
            if part.num_rows:
                parts.append(part)
                size = self.embedder.spec.mapper.size
                yield as_images(column_array(part["image"], np.uint8, (*size, 3)))


log = logging.getLogger("padim_ray")


def score_images(
    shards: list[pa.Table],
    version: ModelVersion,
    options: RunOptions,
    plan: Plan,
    *,
    leave_one_out: bool = False,
) -> ray.data.Dataset:
    """Shards of the manifest to rows as `ScoreImages` makes them: a block per shard."""
    grid = version.spec.grid
    size = 4 * (grid.state_size + sum(map(operator.mul, grid.cells, grid.channels)))
    if size > options.group_memory:
        log.warning(
            "--group-memory is %d, and one group's Gaussians take %d bytes: actors hold one group "
            "at a time, and wait for the next",
            *(options.group_memory, size),
        )
    actors = min(plan.asked_actors, len(shards))
    following = following_groups([shard["group"][0].as_py() for shard in shards], actors)
    decoded = decode_images(shards, version.spec.preprocessing, options, plan)
    # with GPUs `map_batches` itself refuses whole blocks, as unbounded; a shard is bounded
    return decoded.map_batches_internal(
        ScoreImages,
        fn_constructor_args=[version, plan, options.batch_size, following],
        fn_constructor_kwargs={
            "leave_one_out": leave_one_out,
            "group_memory": options.group_memory,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=actor_pool(plan, len(shards)),
        **plan.actor.options,
    )


def following_groups(groups: list[str], actors: int) -> dict[str, str]:
    """What an actor is asked for after a group, where that is as good as certain.

    A group with fewer shards than there are actors is for some of them only: others would load it
    for nothing.

    Args:
        groups: of each shard, in their order.
    """
    shards = Counter(groups)
    return {now: after for now, after in pairwise(shards) if shards[after] >= actors}


class ScoreImages:
    """Decoded images in, `score` and patch `distances` out, instead of the pixels.

    `actor_id` is whose work it was, and `loaded_groups`, in a shard's first row, the groups that it
    began to load meanwhile. With `leave_one_out`, the images must be training images, and have the
    scores of images that the model wasn't fitted to.
    """

    def __init__(
        self,
        version: ModelVersion,
        plan: Plan,
        batch_size: int | None,
        following: Mapping[str, str],
        *,
        leave_one_out: bool = False,
        group_memory: int,
    ) -> None:
        # leave-one-out distances need more memory than the trunk, of a few images only
        prepare_memory(keep_activations=not leave_one_out)
        self.version = version
        weights = version.load_trunk_weights()
        self.device = Device.of(plan)
        self.embedder = Embedder(
            version.spec, weights, self.device.name, batch_size, plan.threads, reuse=True
        )
        self.leave_one_out = leave_one_out
        self.gaussians = GaussianCache(self._load, following, group_memory)
        self.actor = ray.get_runtime_context().get_actor_id()

    def __call__(self, shard: pa.Table) -> pa.Table:
        self.device.check()
        with stage("score", shard.num_rows):
            return self._score_shard(shard)

    def _score_shard(self, shard: pa.Table) -> pa.Table:
        size = self.version.spec.preprocessing.size
        pixels = column_array(shard["image"], np.uint8, (*size, 3))
        errors = shard["error"].to_pylist()
        scores = np.full(shard.num_rows, np.nan, np.float32)
        distances = np.zeros((shard.num_rows, *self.version.spec.mapper.patches), np.float32)
        if not all(errors):
            group = shard["group"][0].as_py()
            step = self.embedder.together
            for start in range(0, shard.num_rows, step):
                part = slice(start, start + step)
                scores[part], distances[part] = self._score(pixels[part], group)
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
            "distances": fixed_size_column(distances),
            **self._loads(shard.num_rows),
        }.items():
            shard = shard.append_column(name, column)
        return shard

    def _loads(self, rows: int) -> dict[str, pa.Array]:
        """The columns that tell of loading since the last time."""
        loaded, self.gaussians.started = self.gaussians.started, []
        return {
            "actor_id": pa.repeat(pa.scalar(self.actor, pa.string()), rows),
            "loaded_groups": pa.array([loaded, *[[]] * (rows - 1)], pa.list_(pa.string())),
        }

    def _load(self, group: str) -> Gaussian:
        return self.embedder.load(self.version.load_gaussian(group))

    @torch.inference_mode()
    def _score(self, pixels: np.ndarray, group: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n,) and distances (n, H_0, W_0); NaN or infinite where the features are."""
        embeddings = self.embedder.embed(as_images(pixels))
        left_out_of = self.version.groups[group].images if self.leave_one_out else None
        distances = self.embedder.distances(
            embeddings, self.gaussians[group], left_out_of=left_out_of
        )
        scores = image_scores(self.version.spec.mapper.maps(distances))
        return scores.cpu().numpy(), distances.cpu().numpy()
