"""The actor that scores images: trunk, distances, anomaly map."""

import logging
import operator
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from padim_ray.anomaly_map import image_scores
from padim_ray.artifact import ModelVersion
from padim_ray.embedder import Embedder, as_images
from padim_ray.errors import ImageError
from padim_ray.gaussian import Gaussian
from padim_ray.options import RunOptions
from padim_ray.pipeline.columns import column_array, fixed_size_column
from padim_ray.pipeline.device import Device
from padim_ray.pipeline.gaussians import GaussianCache
from padim_ray.pipeline.memory import prepare_memory
from padim_ray.pipeline.prometheus import stage
from padim_ray.pipeline.resources import Plan
from padim_ray.pipeline.run import decode_images

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
        compute=plan.actor_pool(len(shards)),
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
