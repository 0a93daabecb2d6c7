"""Forecast a job's time, traffic and memory by arithmetic, from what is known before it starts.

Every formula says why it holds. `tests/planning/test_forecast_of_jobs.py` compares those that need
no clock with real jobs. Sizes are in bytes, times in seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from padim_ray.features.embedder import CPU_BATCH, GPU_BATCH
from padim_ray.features.trunk import CPU_PASS, GPU_PASS
from padim_ray.features.trunks import find_trunk
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.planning.batches import (
    FAN_IN,
    MERGING_SPEED,
    embedding_bytes,
    embedding_numbers,
    groups_being_written,
    images_per_batch,
    images_per_shard,
    kept_groups,
    number_bytes,
)
from padim_ray.planning.resources import Plan, decoding_tasks
from padim_ray.planning.sums import SumCounts, count_sums
from padim_ray.runs.options.common import GROUP_MEMORY
from padim_ray.scoring.histogram import BINS

GIB = 2**30
PROCESS_BYTES = 650 * 2**20
"""Memory of a worker that has imported PyTorch and Ray Data, before it does anything (measured)."""
CUDA_CONTEXT_BYTES = 600 * 2**20
"""GPU memory of CUDA itself and of its libraries' kernels."""
ASSUMED_GPU_MEMORY = 16 * GIB
"""Used where neither the user nor a GPU of this machine says how much there is: the smallest GPU
that clouds rent out."""
DRIVER_PER_SHARD = 0.046
"""Seconds of one core that Ray and the driver take per shard. docs/scaling.md measures 35 to 46 ms.
"""
IN_FLIGHT = 2
"""Tasks that Ray Data sends an actor ahead, so that it needn't wait for input."""
ROW_BYTES = 40
"""Columns that decoding or scoring adds to a row, besides pixels or distances."""
ACTOR_COLUMNS_BYTES = 40
"""Columns of a scored row that name its actor and the groups that the actor loaded."""
RESULT_ROW_BYTES = 150
"""Maximum size of a row of results without the manifest's columns."""
RESULT_FILE_BYTES = 32 * 1024
"""Maximum size of what a Parquet file holds besides its rows."""


@dataclass(frozen=True)
class Archive:
    """The images that a job reads.

    Attributes:
        groups: number of images per group.
        bytes: total size of their files.
        manifest_bytes: size of their list as an Arrow table.
    """

    groups: Mapping[str, int]
    bytes: int
    manifest_bytes: int

    @property
    def images(self) -> int:
        return sum(self.groups.values())


@dataclass(frozen=True)
class Rates:
    """Speeds of single workers; None where unknown.

    Attributes:
        decode: images/s of one core.
        fit: images/s of one actor that adds images to statistics.
        score: images/s of one actor that scores.
        factorise: seconds of one core to fit a group's density; not counted if unknown.
        left_out: images/s that one actor calibrates with from their embeddings; not counted if
            unknown.
        source: where the rates come from, in words.
    """

    decode: float | None = None
    fit: float | None = None
    score: float | None = None
    factorise: float | None = None
    left_out: float | None = None
    source: str = ""


@dataclass(frozen=True)
class State:
    """Bytes of one group's statistics and density.

    Attributes:
        statistics: statistics in memory.
        density: fitted density in memory.
        stored_statistics: statistics in files.
        stored_density: density in files.
        merged: statistics in the precision in which they are merged, and each shard's pooled ones.
        shards: number of shards that they are cut into.
    """

    statistics: int
    density: int
    stored_statistics: int
    stored_density: int
    merged: int
    shards: int

    @classmethod
    def of(cls, spec: ModelSpec) -> "State":
        """Measure the density's own tensors, built on PyTorch's meta device without memory."""
        density, shards = spec.density, len(state_shards(spec))
        statistics = density.empty(spec.grid, "meta")
        fitted = density.empty_fitted(spec.grid, "meta")
        return cls(
            statistics=statistics.nbytes,
            density=fitted.nbytes,
            stored_statistics=_nbytes(statistics.packed()),
            stored_density=_nbytes(fitted.packed()),
            merged=statistics.double().nbytes + shards * density.pool(statistics).nbytes,
            shards=shards,
        )


def _nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    # scalars, such as the count, are stored in the file's header
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)


@dataclass(frozen=True)
class Forecast:
    """One job's forecast.

    Attributes:
        job: "fit" or "score".
        images: images of the archive.
        hours: duration; None if a rate is unknown.
        bound: the stage that sets the pace.
        read_bytes: bytes of images read from storage.
        reads: number of images read from storage.
        bytes_per_second: mean rate of these reads.
        object_store_bytes: bytes put into Ray's object store over the whole job.
        object_store_at_once: bytes that are there at the same time. If the nodes' object stores
            together are smaller, Ray spills to disk.
        state_bytes: statistics and densities written to storage (fit) or read from it (score).
        written_bytes: everything else that is written.
        actor_bytes: memory of an actor's process.
        device_bytes: GPU memory of an actor.
        driver_bytes: the driver's memory for the list of images and their outcomes.
        partial_sums: number of a fit's partial sums.
        merges: number of their merges.
    """

    job: str
    images: int
    hours: float | None
    bound: str
    read_bytes: int
    reads: int
    bytes_per_second: float | None
    object_store_bytes: int
    object_store_at_once: int
    state_bytes: int
    written_bytes: int
    actor_bytes: int
    device_bytes: int
    driver_bytes: int
    partial_sums: int = 0
    merges: int = 0


def forecast_fit(
    archive: Archive,
    spec: ModelSpec,
    plan: Plan,
    rates: Rates,
    calibration_images: int,
    round_images: int,
    embedding_memory: int,
) -> Forecast:
    """Forecast `fit`.

    Args:
        archive: the images.
        spec: of the model that is fitted.
        plan: how a cluster that doesn't grow is divided.
        rates: speeds of single workers.
        calibration_images: maximum number per group.
        round_images: images after which a round is committed.
        embedding_memory: bytes of embeddings that may be kept to calibrate with.
    """
    state, pixels = State.of(spec), image_bytes(spec)
    shard = images_per_shard(archive.images, spec.preprocessing)
    batch = images_per_batch(archive.images, plan.actors, spec, round_images)
    sums = count_sums(archive.groups, shard, batch, round_images)
    sample = {group: min(n, calibration_images) for group, n in archive.groups.items()}
    in_kept = kept_groups(archive.groups, spec, calibration_images, embedding_memory)
    kept = sum(sample[group] for group in in_kept)
    again = {group: n for group, n in sample.items() if group not in in_kept}
    read_again = sum(again.values())
    row = archive.manifest_bytes / archive.images
    groups = len(archive.groups)
    # a row is stored twice: in the manifest's block, and beside its decoded pixels
    summed = archive.images * (2 * (row + ROW_BYTES) + pixels) + sums.partials * state.statistics
    summed += 2 * kept * (row + embedding_bytes(spec))  # in two blocks
    scored = read_again * (
        3 * (row + ROW_BYTES) + ACTOR_COLUMNS_BYTES + pixels + distance_bytes(spec)
    )
    compute = None
    if rates.fit and rates.score:
        # CPU actors share their cores with merging, which counts as images here
        merging = (
            sums.partials * state.statistics / pixels / MERGING_SPEED if not plan.actor.gpus else 0
        )
        embedding = (archive.images + merging) / rates.fit + read_again / rates.score
        embedding += kept / rates.left_out if rates.left_out else 0
        finishing = groups * (rates.factorise or 0) / plan.fixed_decoders  # tasks of one core
        compute = embedding / plan.actors + finishing
    tasks = _shards(archive.groups, shard) + _shards(again, shard)
    seconds, bound = _pace(archive.images + read_again, compute, tasks, plan, rates)
    read = round(archive.bytes * (1 + read_again / archive.images))
    return Forecast(
        job="fit",
        images=archive.images,
        hours=seconds and seconds / 3600,
        bound=bound,
        read_bytes=read,
        reads=archive.images + read_again,
        bytes_per_second=seconds and read / seconds,
        object_store_bytes=round(summed + sums.merges * state.merged + scored),
        object_store_at_once=fit_objects_at_once(
            *(archive.groups, archive.manifest_bytes, spec, plan),
            *(round_images, kept * embedding_bytes(spec)),
        ),
        state_bytes=groups * (state.stored_statistics + state.stored_density),
        written_bytes=round(
            sums.saves * state.stored_statistics
            # listed.parquet and manifest.parquet
            + 2 * (archive.images * (row + ROW_BYTES) + RESULT_FILE_BYTES)
            + trunk_parameters(spec) * 4
            # calibrations: scores, and a histogram of the maps' values
            + 4 * sum(sample.values())
            + groups * (12 * BINS + 2 * RESULT_FILE_BYTES)
        ),
        actor_bytes=_process(spec, plan)
        + (0 if plan.actor.gpus else state.statistics)
        + 2 * state.statistics // state.shards,  # a serialised shard and its copy
        device_bytes=device_bytes(spec, state.statistics),  # calibration doesn't use the kernels
        driver_bytes=2 * archive.manifest_bytes + 4 * archive.images,
        partial_sums=sums.partials,
        merges=sums.merges,
    )


def forecast_score(archive: Archive, spec: ModelSpec, plan: Plan, rates: Rates) -> Forecast:
    """Forecast `score` without heatmaps, whose number depends on the scores.

    Args:
        archive: the images.
        spec: the model's.
        plan: how a cluster that doesn't grow is divided.
        rates: speeds of single workers.
    """
    state, pixels = State.of(spec), image_bytes(spec)
    shard = images_per_shard(archive.images, spec.preprocessing)
    row = archive.manifest_bytes / archive.images
    tasks = _shards(archive.groups, shard)
    per_image = 3 * (row + ROW_BYTES) + ACTOR_COLUMNS_BYTES + pixels + distance_bytes(spec)
    compute = archive.images / rates.score / plan.actors if rates.score else None
    seconds, bound = _pace(archive.images, compute, tasks, plan, rates)
    cached = cached_gaussians(len(archive.groups), state.density)
    return Forecast(
        job="score",
        images=archive.images,
        hours=seconds and seconds / 3600,
        bound=bound,
        read_bytes=archive.bytes,
        reads=archive.images,
        bytes_per_second=seconds and archive.bytes / seconds,
        object_store_bytes=round(archive.images * per_image),
        object_store_at_once=score_objects_at_once(
            archive.images, archive.manifest_bytes, spec, plan
        ),
        state_bytes=state.stored_density * state_loads(archive.groups, shard, plan.actors),
        written_bytes=round(
            archive.images * (row + RESULT_ROW_BYTES)
            + tasks * RESULT_FILE_BYTES
            + archive.images * (row + ROW_BYTES)  # listed.parquet
        ),
        actor_bytes=_process(spec, plan) + (0 if plan.actor.gpus else cached * state.density),
        device_bytes=device_bytes(
            spec, cached * state.density, kernels=spec.precision == "bfloat16"
        ),
        driver_bytes=2 * archive.manifest_bytes + 4 * archive.images,
    )


def fit_objects_at_once(
    groups: Mapping[str, int],
    manifest_bytes: int,
    spec: ModelSpec,
    plan: Plan,
    round_images: int,
    kept: int,
) -> int:
    """Bytes of a fit's objects that are there at the same time.

    On a cluster that grows it is a lower bound: the number of decoding tasks isn't known.

    Args:
        groups: number of images per group.
        manifest_bytes: size of their list.
        spec: of the model.
        plan: how the cluster is divided.
        round_images: images after which a round is committed.
        kept: bytes of embeddings that are kept.
    """
    images, pixels = sum(groups.values()), image_bytes(spec)
    shard = images_per_shard(images, spec.preprocessing)
    batch = images_per_batch(images, plan.actors, spec, round_images)
    sums = count_sums(groups, shard, batch, round_images)
    return round(
        manifest_bytes
        + kept
        + plan.actors * IN_FLIGHT * min(batch, images) * pixels
        + decoding_tasks(plan.decoders or 0) * min(shard, images) * pixels
        + _waiting(sums, len(groups), State.of(spec))
        + min(groups_being_written(spec), len(groups) - 1) * State.of(spec).merged
    )


def score_objects_at_once(images: int, manifest_bytes: int, spec: ModelSpec, plan: Plan) -> int:
    """The same of `score`."""
    shard = min(images_per_shard(images, spec.preprocessing), images)
    decoded = plan.actors * IN_FLIGHT + decoding_tasks(plan.decoders or 0)
    return (
        manifest_bytes
        + decoded * shard * image_bytes(spec)
        + plan.actors * shard * distance_bytes(spec)
    )


def state_loads(groups: Mapping[str, int], shard: int, actors: int) -> int:
    """How often groups' densities are read from storage, at most.

    Shards come group after group, and an actor keeps a density while it gets shards of its group.
    So a density is read at most once per actor and at most once per shard.
    """
    return sum(min(actors, -(-images // shard)) for images in groups.values())


def cached_gaussians(groups: int, size: int) -> int:
    """How many groups' densities of this size an actor holds."""
    return min(groups, max(1, GROUP_MEMORY // size))


def image_bytes(spec: ModelSpec) -> int:
    """Bytes of a decoded image: uint8 RGB of the model's input size."""
    return 3 * prod(spec.preprocessing.size)


def distance_bytes(spec: ModelSpec) -> int:
    """Bytes of a scored image's distances: one float32 per cell."""
    return 4 * spec.grid.cells[0]


def trunk_parameters(spec: ModelSpec) -> int:
    """Number of the trunk's weights."""
    return _trunk_parameters(spec.backbone, tuple(spec.channels))


@lru_cache
def _trunk_parameters(backbone: str, layers: tuple[str, ...]) -> int:
    return sum(parameter.numel() for parameter in find_trunk(backbone).build(layers).parameters())


def device_bytes(spec: ModelSpec, state: int, *, kernels: bool = False) -> int:
    """GPU memory of an actor: an estimate that isn't checked by measurement.

    Args:
        spec: the model's.
        state: bytes of statistics or densities on the GPU.
        kernels: scoring uses the fused kernels, which read features in place.
    """
    item = number_bytes(spec)
    height, width = spec.preprocessing.size
    # a layer's input, output and residual are alive together
    largest = find_trunk(spec.backbone).largest
    cells = (height // largest.stride) * (width // largest.stride)
    activations = GPU_PASS * 3 * item * largest.channels * cells
    # without the kernels there is a transposed copy, and two in float32
    features = GPU_BATCH * embedding_numbers(spec) * (item if kernels else 2 * item + 8)
    # distances at the image's size, and smoothed in two directions
    maps = GPU_BATCH * (distance_bytes(spec) + 3 * 4 * height * width)
    images = GPU_PASS * image_bytes(spec) * (3 + 4)  # three as bytes in transfer, one in float32
    return (
        CUDA_CONTEXT_BYTES
        + item * trunk_parameters(spec)
        + state
        + activations
        + features
        + maps
        + images
    )


def _process(spec: ModelSpec, plan: Plan) -> int:
    """Memory of an actor's process without statistics and densities.

    It holds imports, trunk, images and features. With a GPU, features are in the GPU's memory.
    """
    weights = number_bytes(spec) * trunk_parameters(spec)
    if plan.actor.gpus:
        return PROCESS_BYTES + weights + GPU_BATCH * image_bytes(spec)
    features = CPU_BATCH * (embedding_numbers(spec) * number_bytes(spec) + 2 * distance_bytes(spec))
    # a thread computes on CPU_PASS images together
    activations = plan.threads * CPU_PASS * image_bytes(spec) * 4 * 4
    return PROCESS_BYTES + weights + CPU_BATCH * image_bytes(spec) + features + activations


def _waiting(sums: SumCounts, groups: int, state: State) -> float:
    """Maximum bytes of sums that wait in the merge tree for others of their rank.

    Groups follow each other, so only one group's sums wait. Those of all ranks but the first are
    merged ones, and one more merge is running.
    """
    if not sums.partials:
        return 0
    per_group = sums.partials / groups
    ranks = 0
    while FAN_IN ** (ranks + 1) <= per_group:
        ranks += 1
    unmerged = min(per_group, FAN_IN)
    return unmerged * state.statistics + (ranks * (FAN_IN - 1) + 1) * state.merged


def _shards(groups: Mapping[str, int], shard: int) -> int:
    return sum(-(-images // shard) for images in groups.values())


def _pace(
    images: int, compute: float | None, tasks: int, plan: Plan, rates: Rates
) -> tuple[float | None, str]:
    """The job's seconds, and the name of the stage that sets the pace.

    Stages overlap, so the slowest sets the pace. On CPUs actors and decoding share the cores, so
    their times add up. Start-up, some 20 s, isn't counted.
    """
    decode = images / rates.decode / plan.fixed_decoders if rates.decode else None
    if compute is None or decode is None:
        return None, "unknown"
    stages = {"driver": tasks * DRIVER_PER_SHARD}
    if plan.actor.gpus:
        stages |= {"GPUs": compute, "decoding": decode}
    else:
        stages["CPUs"] = compute + decode
    bound = max(stages, key=stages.__getitem__)
    return stages[bound], bound
