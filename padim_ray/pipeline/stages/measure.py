"""Tasks that measure training images' leave-one-out scores from kept embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import ray
import torch

from padim_ray.densities.base import Fitted
from padim_ray.model.detector import measure
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion
from padim_ray.pipeline.cluster.device import Device
from padim_ray.pipeline.cluster.memory import give_back_memory, prepare_memory
from padim_ray.pipeline.cluster.prometheus import stage
from padim_ray.pipeline.merging.kept import Kept, KeptEmbeddings
from padim_ray.planning.resources import Plan
from padim_ray.scoring.histogram import count_values

IMAGES_PER_TASK = 256
"""Each task loads the group's density, which takes as long as measuring some tens of images."""
IMAGES_AT_ONCE = 32
"""Their maps take memory."""


@dataclass(frozen=True)
class LeftOut:
    """Leave-one-out results of some images of a group.

    Attributes:
        uris: of the images.
        scores: (n,) float32.
        pixels: histogram of the values of their anomaly maps, (BINS,) int64.
    """

    uris: Sequence[str]
    scores: np.ndarray
    pixels: np.ndarray

    def __add__(self, other: "LeftOut") -> "LeftOut":
        """Join the results of other images of the group."""
        return LeftOut(
            [*self.uris, *other.uris],
            np.concatenate([self.scores, other.scores]),
            self.pixels + other.pixels,
        )


def start_measuring(
    group: str, kept: Sequence[Kept], version: ModelVersion, plan: Plan
) -> list[ray.ObjectRef]:
    """Start to measure images of a group by tasks, each of which returns a `LeftOut`.

    Args:
        group: the group's name.
        kept: the images' embeddings.
        version: the version that was fitted to them.
        plan: how the cluster is divided; the actors have ended.
    """
    share = plan.actor if plan.actor.gpus else plan.finish
    task = _measure_task.options(**share.options)
    return [
        task.remote(group, version, plan, [each.index for each in part], *[p.ref for p in part])
        for part in _parts(kept)
    ]


def _parts(kept: Sequence[Kept]) -> list[list[Kept]]:
    """Consecutive parts of at most `IMAGES_PER_TASK` images, or of a single element."""
    parts: list[list[Kept]] = []
    images = IMAGES_PER_TASK
    for each in kept:
        images += each.images
        if images > IMAGES_PER_TASK:
            parts.append([])
            images = each.images
        parts[-1].append(each)
    return parts


@ray.remote(max_retries=-1)
def _measure_task(
    group: str,
    version: ModelVersion,
    plan: Plan,
    indices: Sequence[int],
    *kept: Sequence[KeptEmbeddings],
) -> LeftOut:
    prepare_memory()
    device = Device.of(plan)
    device.check()
    images = [each[index] for each, index in zip(kept, indices, strict=True)]
    spec = version.spec
    with stage("calibrate", sum(len(each.uris) for each in images)):
        dtype = images[0].embeddings().levels[0].dtype
        fitted = spec.density.load(version.load_density(group), torch.device(device.name), dtype)
        count = version.groups[group].images
        found = reduce(add, (_measure(each, fitted, spec, count, device.name) for each in images))
    del fitted
    give_back_memory()
    return found


def _measure(
    kept: KeptEmbeddings, fitted: Fitted, spec: ModelSpec, count: int, device: str
) -> LeftOut:
    parts = []
    for start, embeddings in enumerate(kept.embeddings().split(IMAGES_AT_ONCE)):
        found = measure(spec, embeddings.to(device), fitted, left_out_of=count)
        uris = kept.uris[start * IMAGES_AT_ONCE :][: len(embeddings)]
        pixels = count_values(found.maps.cpu().numpy())
        parts.append(LeftOut(uris, found.scores.cpu().numpy(), pixels))
    return reduce(add, parts)
