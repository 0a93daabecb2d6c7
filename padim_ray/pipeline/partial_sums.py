"""The actor that sums up images: trunk, moments of a batch."""

from collections import deque
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data._internal.execution.interfaces import RefBundle

from padim_ray import artifact
from padim_ray.embedder import Embedder, as_images
from padim_ray.errors import ImageError
from padim_ray.manifest import shard_rows, shard_table
from padim_ray.model import state_shards
from padim_ray.moments import Moments, empty_moments
from padim_ray.options import RoundOptions
from padim_ray.pipeline.batches import images_per_batch
from padim_ray.pipeline.columns import column_array
from padim_ray.pipeline.decode import images_per_shard
from padim_ray.pipeline.device import Device
from padim_ray.pipeline.memory import prepare_memory
from padim_ray.pipeline.merge import serialise
from padim_ray.pipeline.prometheus import stage
from padim_ray.pipeline.resources import Plan
from padim_ray.pipeline.run import decode_images
from padim_ray.pipeline.session import data_context
from padim_ray.spec import ModelSpec
from padim_ray.storage import Location


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
            compute=plan.actor_pool(len(shards), max_tasks_in_flight_per_actor=2),
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
        weights = artifact.load_trunk_weights(root, spec.weights_sha256)
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


def describe_sum(
    group: str, shard: int, count: int, state: pa.Buffer, failures: dict[str, str]
) -> pa.Table:
    """A row as `PartialSums` makes them."""
    return pa.table(
        {
            "group": pa.array([group], pa.string()),
            "shard": pa.array([shard], pa.int32()),
            "count": pa.array([count], pa.int64()),
            "failures": pa.array([list(failures.items())], pa.map_(pa.string(), pa.string())),
            "state": pa.LargeBinaryArray.from_buffers(  # without a copy
                pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, state.size])), state]
            ),
        }
    )
