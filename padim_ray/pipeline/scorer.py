"""The actor that scores images: trunk, distances, anomaly map."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray.data
import torch

from padim_ray.anomaly_map import image_scores
from padim_ray.artifact import ModelVersion
from padim_ray.embedder import Embedder, as_images
from padim_ray.errors import ImageError
from padim_ray.gaussian import Gaussian
from padim_ray.options import JobOptions
from padim_ray.pipeline.columns import column_array, fixed_size_column
from padim_ray.pipeline.device import Device
from padim_ray.pipeline.gaussians import GaussianCache
from padim_ray.pipeline.memory import prepare_memory
from padim_ray.pipeline.prometheus import stage
from padim_ray.pipeline.resources import Plan
from padim_ray.pipeline.run import decode_images

GROUP_CACHE_BYTES = 2 * 2**30  # of Gaussians that an actor keeps loaded


def score_images(
    shards: list[pa.Table],
    version: ModelVersion,
    options: JobOptions,
    plan: Plan,
    *,
    leave_one_out: bool = False,
) -> ray.data.Dataset:
    """Shards of the manifest to rows as `ScoreImages` makes them: a block per shard."""
    groups = list(dict.fromkeys(shard["group"][0].as_py() for shard in shards))
    decoded = decode_images(shards, version.spec.preprocessing, options, plan)
    # with GPUs `map_batches` itself refuses whole blocks, as unbounded; a shard is bounded
    return decoded.map_batches_internal(
        ScoreImages,
        fn_constructor_args=[version, plan, options.batch_size, groups],
        fn_constructor_kwargs={"leave_one_out": leave_one_out},
        batch_size=None,
        batch_format="pyarrow",
        compute=plan.actor_pool(len(shards)),
        **plan.actor.options,
    )


class ScoreImages:
    """Decoded images in, `score` and patch `distances` out, instead of the pixels.

    With `leave_one_out`, the images must be training images, and have the scores of images that the
    model wasn't fitted to.
    """

    def __init__(
        self,
        version: ModelVersion,
        plan: Plan,
        batch_size: int | None,
        groups: Sequence[str],
        *,
        leave_one_out: bool = False,
    ) -> None:
        prepare_memory()
        self.version = version
        weights = version.load_trunk_weights()
        self.device = Device.of(plan)
        self.embedder = Embedder(version.spec, weights, self.device.name, batch_size, plan.threads)
        self.leave_one_out = leave_one_out
        self.gaussians = GaussianCache(self._load, groups, GROUP_CACHE_BYTES)

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
        }.items():
            shard = shard.append_column(name, column)
        return shard

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
