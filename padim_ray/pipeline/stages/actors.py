"""The actors, one per GPU or per eight cores: images to partial sums (fit), or to scores (score).

An actor keeps a trunk and a cache of densities, but no results: each call returns its own, because
Ray may repeat any call.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from padim_ray.densities.base import Fitted
from padim_ray.errors import ImageError
from padim_ray.features.embedder import as_images
from padim_ray.features.grid import Embeddings
from padim_ray.model.detector import Detector
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion, load_trunk_weights
from padim_ray.pipeline.cluster.device import Device
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.codec import partial_sum_row
from padim_ray.pipeline.merging.kept import kept_row
from padim_ray.pipeline.stages.columns import column_array, fixed_size_column
from padim_ray.pipeline.stages.density_cache import DensityCache
from padim_ray.planning.resources import Plan
from padim_ray.storage.location import Location


class PartialSums:
    """The actor of `fit`: decoded images in, partial sums out.

    Each group in a batch becomes one row per shard of cells, see `partial_sum_row`. The row of the
    first shard also has the failed images. Before them come the embeddings of the images whose
    column `keep` is true, see `kept_row`.

    Args:
        root: of the model, which holds the trunk's weights.
        spec: of the model that is fitted.
        plan: how the cluster is divided.
        batch_size: images per pass through the trunk; None: the device's default.
    """

    def __init__(self, root: Location, spec: ModelSpec, plan: Plan, batch_size: int | None) -> None:
        prepare_memory(keep_activations=True)
        weights = load_trunk_weights(root, spec.weights_sha256)
        self.device = Device.of(plan)
        self.detector = Detector(
            spec, weights, self.device.name, batch_size, plan.threads, reuse=True
        )

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        self.device.check()
        start = 0
        for _, run in groupby(images["group"].to_pylist()):
            length = len(list(run))
            yield from self._add_group(images.slice(start, length))
            start += length

    def _add_group(self, images: pa.Table) -> Iterator[pa.Table]:
        pairs = zip(images["uri"].to_pylist(), images["error"].to_pylist(), strict=True)
        failures = {uri: error for uri, error in pairs if error}
        group = images["group"][0].as_py()
        total = self.detector.empty_statistics()
        with stage("sum", images.num_rows):
            for rows, embeddings in self._embed(images, failures):
                total = self.detector.add_(total, embeddings)
                if kept := rows["keep"].to_numpy().nonzero()[0].tolist():
                    uris = rows["uri"].take(kept).to_pylist()
                    yield kept_row(group, uris, embeddings[torch.tensor(kept)])
        if not total.count:
            yield partial_sum_row(group, 0, None, failures)
            return
        for shard, run in enumerate(state_shards(self.detector.spec)):
            part = total.cells(*run).to("cpu")
            yield partial_sum_row(group, shard, part, failures if shard == 0 else {})

    def _embed(
        self, images: pa.Table, failures: dict[str, str]
    ) -> Iterator[tuple[pa.Table, Embeddings]]:
        """Yield batches of rows and embeddings; those not finite are added to `failures`."""
        parts: deque[pa.Table] = deque()
        for embeddings in self.detector.embed_each(self._batches(images, parts)):
            rows = parts.popleft()
            good = embeddings.are_finite().cpu()
            if not good.all():
                error = str(ImageError("embed", "NaN or infinite features"))
                bad = (~good).nonzero().flatten().tolist()
                failures.update({rows["uri"][row].as_py(): error for row in bad})
                rows, embeddings = rows.filter(pa.array(good.numpy())), embeddings[good]
            if len(embeddings):
                yield rows, embeddings

    def _batches(self, images: pa.Table, parts: deque[pa.Table]) -> Iterator[torch.Tensor]:
        """Yield batches of the decoded images; the rows of each are appended to `parts`."""
        size = self.detector.spec.preprocessing.size
        for start in range(0, images.num_rows, self.detector.batch_size):
            # slice before filtering: a filter copies, and so its copy is bounded by the step
            part = images.slice(start, self.detector.batch_size)
            if part["error"].null_count < part.num_rows:
                part = part.filter(pc.is_null(part["error"]))
            if part.num_rows:
                parts.append(part.select(["uri", "keep"]))
                yield as_images(column_array(part["image"], np.uint8, (*size, 3)))


class ScoreImages:
    """The actor of `score` and of calibration: replaces pixels by `score` and cells' `distances`.

    The column `actor_id` names the actor that scored a row. In a shard's first row, `loaded_groups`
    lists the groups that this actor began to load since its last call.

    Args:
        version: of the model.
        plan: how the cluster is divided.
        batch_size: images per pass through the trunk; None: the device's default.
        following: see `DensityCache`.
        leave_one_out: the images are training images, and get the scores that they would have if
            the model hadn't been fitted to them.
        group_memory: maximum bytes of densities in the cache.
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
        # leave-one-out distances need more memory than the trunk, but for few images
        prepare_memory(keep_activations=not leave_one_out)
        self.version = version
        weights = version.load_trunk_weights()
        self.device = Device.of(plan)
        self.detector = Detector(
            version.spec, weights, self.device.name, batch_size, plan.threads, reuse=True
        )
        self.leave_one_out = leave_one_out
        self.densities = DensityCache(self._load, following, group_memory)
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
            step = self.detector.batch_size
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

    def _score(self, pixels: np.ndarray, group: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n,) and distances (n, H_0, W_0), not finite where the features aren't."""
        embeddings = self.detector.embed(as_images(pixels))
        left_out_of = self.version.groups[group].images if self.leave_one_out else None
        found = self.detector.measure(embeddings, self.densities[group], left_out_of=left_out_of)
        return found.scores.cpu().numpy(), found.distances.cpu().numpy()

    def _loads(self, rows: int) -> dict[str, pa.Array]:
        """The columns `actor_id` and `loaded_groups`."""
        loaded, self.densities.started = self.densities.started, []
        return {
            "actor_id": pa.repeat(pa.scalar(self.actor, pa.string()), rows),
            "loaded_groups": pa.array([loaded, *[[]] * (rows - 1)], pa.list_(pa.string())),
        }

    def _load(self, group: str) -> Fitted:
        return self.detector.load(self.version.load_density(group))
