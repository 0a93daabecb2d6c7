"""The Ray Data graphs of the jobs: which stage feeds which, and whether tasks or actors run it.

fit    manifest ─ fetch and decode (tasks) ─ trunk and statistics (actors) ─ partial sums
score  manifest ─ fetch and decode (tasks) ─ detector (actors) ─ verdicts, Parquet (tasks)

`merging` consumes the partial sums, and `jobs` the results.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator
from itertools import pairwise

import pyarrow as pa
import ray
import ray.data
import torch

from padim_ray.images.shards import shard_rows, shard_table
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.pools import actor_pool, decoding_pool
from padim_ray.pipeline.cluster.ray_internals import block_refs, map_whole_blocks
from padim_ray.pipeline.cluster.session import data_context
from padim_ray.pipeline.stages.actors import PartialSums, ScoreImages
from padim_ray.pipeline.stages.decode import FetchAndDecode, fetcher
from padim_ray.planning.batches import images_per_batch, images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.options.common import RunOptions
from padim_ray.runs.options.fit import RoundOptions
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")

Stage = Callable[[pa.Table], pa.Table]


def partial_sums_of(
    manifest: pa.Table, spec: ModelSpec, root: Location, options: RoundOptions, plan: Plan
) -> Generator[list[ray.ObjectRef]]:
    """The graph of `fit`: yield references to blocks of partial sums, group after group.

    Blocks come in the manifest's order, so every run makes the same partial sums, and results are
    reproducible.

    Args:
        manifest: the images, sorted.
        spec: of the model that is fitted.
        root: of the model, which holds the trunk's weights.
        options: of the run.
        plan: how the cluster is divided.
    """
    with data_context(preserve_order=True):
        per_shard = images_per_shard(manifest.num_rows, spec.preprocessing)
        shards = [
            shard_table(manifest, *shard) for shard in enumerate(shard_rows(manifest, per_shard))
        ]
        decoded = _decoded(shards, spec, options, plan)
        summed = decoded.map_batches(
            PartialSums,
            fn_constructor_args=[root, spec, plan, options.batch_size],
            batch_size=images_per_batch(
                manifest.num_rows, plan.asked_actors, spec, options.round_images
            ),
            batch_format="pyarrow",
            compute=actor_pool(plan, len(shards), max_tasks_in_flight_per_actor=2),
            **plan.actor.options,
        )
        yield from block_refs(summed)


def scored_shards(
    shards: list[pa.Table],
    version: ModelVersion,
    options: RunOptions,
    plan: Plan,
    then: Stage | None = None,
    *,
    leave_one_out: bool = False,
) -> ray.data.Dataset:
    """The graph of scoring and of calibration: a data set with one block per shard.

    Args:
        shards: the manifest's shards, see `shard_table`.
        version: of the model.
        options: of the run.
        plan: how the cluster is divided.
        then: a stage that commits or counts each shard's scored rows, run by tasks.
        leave_one_out: see `ScoreImages`.
    """
    _warn_of_small_cache(version.spec, options)
    actors = min(plan.asked_actors, len(shards))
    next_groups = find_next_groups([shard["group"][0].as_py() for shard in shards], actors)
    decoded = _decoded(shards, version.spec, options, plan)
    scored = map_whole_blocks(
        decoded,
        ScoreImages,
        fn_constructor_args=[version, plan, options.batch_size, next_groups],
        fn_constructor_kwargs={
            "leave_one_out": leave_one_out,
            "group_memory": options.group_memory,
        },
        batch_format="pyarrow",
        compute=actor_pool(plan, len(shards)),
        **plan.actor.options,
    )
    if then is None:
        return scored
    return scored.map_batches(then, batch_size=None, batch_format="pyarrow", **plan.helper.options)


def _decoded(
    shards: list[pa.Table], spec: ModelSpec, options: RunOptions, plan: Plan
) -> ray.data.Dataset:
    """The first stage of both graphs: a data set with one block of decoded images per shard."""
    # `from_arrow` would start a task per block to learn its size
    return ray.data.from_blocks(shards).map_batches(
        FetchAndDecode(spec.preprocessing, fetcher(options), options.max_image_pixels),
        batch_size=None,
        batch_format="pyarrow",
        compute=decoding_pool(plan, len(shards)),
        **plan.decode.options,
    )


def find_next_groups(groups: list[str], actors: int) -> dict[str, str]:
    """For each group, the next one, if every actor is nearly certain to get a shard of it.

    Only some of the actors get a shard of a group that has fewer shards than there are actors; the
    others would load its density in vain.

    Args:
        groups: the group of each shard, in order.
        actors: number of actors.
    """
    shards = Counter(groups)
    return {group: after for group, after in pairwise(shards) if shards[after] >= actors}


def _warn_of_small_cache(spec: ModelSpec, options: RunOptions) -> None:
    size = spec.density.empty_fitted(spec.grid, torch.device("meta")).nbytes
    if size > options.group_memory:
        log.warning(
            "--group-memory is %d, and one group's density takes %d bytes: each actor holds one "
            "group at a time, and waits while the next is loaded",
            *(options.group_memory, size),
        )
