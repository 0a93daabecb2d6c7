"""What a job will take: from what is known before it is begun, by arithmetic. No clock.

Every formula says why it is so; `tests/planning/test_forecast_of_jobs.py` holds those that need no
clock against jobs. All sizes are in bytes, all times in seconds.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from padim_ray.features.embedder import CPU_BATCH, GPU_BATCH
from padim_ray.features.trunk import CPU_PASS, GPU_PASS
from padim_ray.features.trunks import find_trunk
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.planning.batches import FAN_IN, WORTH, images_per_batch, images_per_shard
from padim_ray.planning.resources import Plan
from padim_ray.runs.options.common import GROUP_MEMORY
from padim_ray.scoring.histogram import BINS

GIB = 2**30
PROCESS = 650 * 2**20
"""Of a worker that has imported PyTorch and Ray Data, before it does anything (measured)."""
CUDA_CONTEXT = 600 * 2**20
"""Of a GPU's memory: CUDA's own, and its libraries' kernels."""
ASSUMED_GPU_MEMORY = 16 * GIB
"""Where neither the user nor a GPU here says how much there is: the least that clouds rent out."""
DRIVER_PER_SHARD = 0.046
"""Of one core, for each shard: Ray's and ours. docs/scaling.md measures 35 to 46 ms."""
IN_FLIGHT = 2
"""Tasks that Ray Data sends an actor ahead, so that it needn't wait for input."""
ROW = 40
"""Of a decoded or scored row, beside the manifest's columns and its pixels or distances."""
ACTOR = 40
"""Of a scored row besides: whose work it was, and what that loaded."""
RESULT_ROW, RESULT_FILE = 150, 32 * 1024
"""At most, of a row of results, beside the manifest's columns, and of a Parquet file around it."""
MERGED = -1  # rank of what a round has merged


@dataclass(frozen=True)
class Archive:
    """The images that are to be read.

    `groups`: images of each. `bytes`: of all files on storage. `manifest_bytes`: of their list, as
    an Arrow table.
    """

    groups: Mapping[str, int]
    bytes: int
    manifest_bytes: int

    @property
    def images(self) -> int:
        return sum(self.groups.values())


@dataclass(frozen=True)
class Rates:
    """Images/s of one core that decodes, and of one actor that sums up (fit) or scores.

    `factorise`: seconds of one core for a group's Gaussians; not counted where unknown (None).
    `source`: where they come from, in words.
    """

    decode: float | None = None
    fit: float | None = None
    score: float | None = None
    factorise: float | None = None
    source: str = ""


@dataclass(frozen=True)
class State:
    """Bytes of one group.

    Attributes:
        statistics: of the images, in memory.
        density: fitted, in memory.
        stored_statistics, stored_density: in files, packed.
        merged: statistics in the precision in which they are merged, and pooled ones with each
            shard.
        shards: the number of parts that they are cut into.
    """

    statistics: int
    density: int
    stored_statistics: int
    stored_density: int
    merged: int
    shards: int

    @classmethod
    def of(cls, spec: ModelSpec) -> "State":
        """As the density itself makes them, on PyTorch's meta device: without memory."""
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
    # a count is a number in the file's header, of no size that matters
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)


@dataclass(frozen=True)
class Sums:
    """What a fit sums up and merges: numbers of `partials`, of `merges` of up to `FAN_IN` of them,
    and of `saves` of an unfinished group's moments when a round is committed."""

    partials: int = 0
    merges: int = 0
    saves: int = 0


def count_sums(groups: Mapping[str, int], shard: int, batch: int, round_images: int) -> Sums:
    """Follow the images through the partial sums, the merge tree and the rounds.

    Args:
        groups: images of each, in the manifest's order.
        shard: images in each but a group's last.
        batch: see `images_per_batch`.
    """
    partials = merges = saves = rows = committed = 0
    waiting: Counter[int] = Counter()  # sums of each rank of the group at hand
    current: str | None = None

    def merge_what_is_left() -> int:
        left = waiting.total()
        waiting.clear()
        return int(left > 1)

    for group, images in _partial_sums(groups, shard, batch):
        partials += 1
        if group != current:
            merges += merge_what_is_left()
        if rows - committed >= round_images:
            committed = rows
            if waiting:
                merges, saves = merges + merge_what_is_left(), saves + 1
                waiting[MERGED] = 1  # until its group ends
        current, rows, rank = group, rows + images, 0
        waiting[0] += 1
        while waiting[rank] == FAN_IN:
            del waiting[rank]
            merges, rank = merges + 1, rank + 1
            waiting[rank] += 1
    return Sums(partials, merges + merge_what_is_left(), saves)


def _partial_sums(groups: Mapping[str, int], shard: int, batch: int) -> Iterator[tuple[str, int]]:
    """Group and images of each partial sum.

    A task has as many whole shards as hold a batch. The actor gets its rows batch by batch, and
    makes a sum of each group in one.
    """
    task: dict[str, int] = {}

    def cut() -> Iterator[tuple[str, int]]:
        start = 0
        for group, images in task.items():
            end = start + images
            while start < end:
                stop = min(end, (start // batch + 1) * batch)
                yield group, stop - start
                start = stop

    for group, images in groups.items():
        for first in range(0, images, shard):
            task[group] = task.get(group, 0) + min(shard, images - first)
            if sum(task.values()) >= batch:
                yield from cut()
                task.clear()
    yield from cut()


@dataclass(frozen=True)
class Forecast:
    """What one job takes.

    `hours`: None if a rate is unknown; `bound`: what sets the pace. `read_bytes`, `reads`: of
    images, from storage. `object_store_bytes`: put into Ray's object store over the whole job;
    `object_store_at_once`: of that, what should fit into all nodes' together, or it spills to disk.
    `state_bytes`: moments and Gaussians read (score) or written (fit) on storage. `written_bytes`:
    everything else that is written. `actor_bytes`: of an actor's process; `device_bytes`: of its
    GPU. `driver_bytes`: the list of images, and what is kept of each. `partial_sums`, `merges`: of
    a fit.
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
) -> Forecast:
    """What `fit` takes."""
    state, pixels = State.of(spec), image_bytes(spec)
    shard = images_per_shard(archive.images, spec.preprocessing)
    batch = images_per_batch(archive.images, plan.actors, spec, round_images)
    sums = count_sums(archive.groups, shard, batch, round_images)
    sample = sum(min(images, calibration_images) for images in archive.groups.values())
    row = archive.manifest_bytes / archive.images
    groups = len(archive.groups)
    # the list travels as blocks, and comes back beside each image's pixels
    summed = archive.images * (2 * (row + ROW) + pixels) + sums.partials * state.statistics
    scored = sample * (3 * (row + ROW) + ACTOR + pixels + distance_bytes(spec))
    at_once = (
        archive.manifest_bytes
        + plan.actors * IN_FLIGHT * batch * pixels
        + plan.decode_tasks * shard * pixels
        + _waiting(sums, groups, state)
    )
    compute = None
    if rates.fit and rates.score:
        # on the cores that merge, a sum takes as long as so many images
        merging = sums.partials * state.statistics / pixels / WORTH if not plan.actor.gpus else 0
        summing = (archive.images + merging) / rates.fit + sample / rates.score
        # by tasks of one core each
        finishing = groups * (rates.factorise or 0) / plan.decoders
        compute = summing / plan.actors + finishing
    tasks = _shards(archive.groups, shard) + _shards(
        {group: min(images, calibration_images) for group, images in archive.groups.items()}, shard
    )
    seconds, bound = _pace(archive.images + sample, compute, tasks, plan, rates)
    read = round(archive.bytes * (1 + sample / archive.images))
    return Forecast(
        job="fit",
        images=archive.images,
        hours=seconds and seconds / 3600,
        bound=bound,
        read_bytes=read,
        reads=archive.images + sample,
        bytes_per_second=seconds and read / seconds,
        object_store_bytes=round(summed + sums.merges * state.merged + scored),
        object_store_at_once=round(at_once),
        state_bytes=groups * (state.stored_statistics + state.stored_density),
        written_bytes=round(
            sums.saves * state.stored_statistics
            # listed.parquet and manifest.parquet
            + 2 * (archive.images * (row + ROW) + RESULT_FILE)
            + trunk_parameters(spec) * 4
            # calibrations: scores, and the histogram of their maps' values
            + 4 * sample
            + groups * (12 * BINS + 2 * RESULT_FILE)
        ),
        actor_bytes=_process(spec, plan)
        + (0 if plan.actor.gpus else state.statistics)
        + 2 * state.statistics // state.shards,  # what is serialised, and the copy of it
        device_bytes=device_bytes(spec, state.statistics),  # calibration has no kernels
        driver_bytes=2 * archive.manifest_bytes + 4 * archive.images,
        partial_sums=sums.partials,
        merges=sums.merges,
    )


def forecast_score(archive: Archive, spec: ModelSpec, plan: Plan, rates: Rates) -> Forecast:
    """What `score` takes, without heatmaps: these are of the images that are flagged."""
    state, pixels = State.of(spec), image_bytes(spec)
    shard = images_per_shard(archive.images, spec.preprocessing)
    row = archive.manifest_bytes / archive.images
    tasks = _shards(archive.groups, shard)
    per_image = 3 * (row + ROW) + ACTOR + pixels + distance_bytes(spec)
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
        object_store_at_once=round(
            archive.manifest_bytes
            + (plan.actors * IN_FLIGHT + plan.decode_tasks) * shard * pixels
            + plan.actors * shard * distance_bytes(spec)
        ),
        state_bytes=state.stored_density * state_loads(archive.groups, shard, plan.actors),
        written_bytes=round(
            archive.images * (row + RESULT_ROW)
            + tasks * RESULT_FILE
            + archive.images * (row + ROW)  # listed.parquet
        ),
        actor_bytes=_process(spec, plan) + (0 if plan.actor.gpus else cached * state.density),
        device_bytes=device_bytes(
            spec, cached * state.density, kernels=spec.precision == "bfloat16"
        ),
        driver_bytes=2 * archive.manifest_bytes + 4 * archive.images,
    )


def state_loads(groups: Mapping[str, int], shard: int, actors: int) -> int:
    """How often a group's Gaussians are read from storage.

    Shards come group after group, and an actor keeps a group for as long as it gets shards of it:
    so at most once per actor, and not more often than there are shards.
    """
    return sum(min(actors, -(-images // shard)) for images in groups.values())


def cached_gaussians(groups: int, size: int) -> int:
    """How many groups' Gaussians an actor holds."""
    return min(groups, max(1, GROUP_MEMORY // size))


def image_bytes(spec: ModelSpec) -> int:
    """Of a decoded image: uint8 RGB of the model's input size."""
    return 3 * prod(spec.preprocessing.size)


def distance_bytes(spec: ModelSpec) -> int:
    """Of a scored image: a float32 distance for each patch."""
    return 4 * spec.grid.cells[0]


def trunk_parameters(spec: ModelSpec) -> int:
    """Numbers in the trunk's weights."""
    return _trunk_parameters(spec.backbone, tuple(spec.channels))


@lru_cache
def _trunk_parameters(backbone: str, layers: tuple[str, ...]) -> int:
    return sum(parameter.numel() for parameter in find_trunk(backbone).build(layers).parameters())


def embedding_numbers(spec: ModelSpec) -> int:
    """Features of an image, each level's on its own grid."""
    return sum(p * c for p, c in zip(spec.grid.cells, spec.grid.channels, strict=True))


def device_bytes(spec: ModelSpec, state: int, *, kernels: bool = False) -> int:
    """Of a GPU's memory, with so many bytes of moments or Gaussians on it. Not measured.

    Args:
        kernels: features are read as they are (`kernels`), and not copied to other forms.
    """
    item = _item(spec)
    height, width = spec.preprocessing.size
    # input, output and residual of a layer at once
    largest = find_trunk(spec.backbone).largest
    cells = (height // largest.stride) * (width // largest.stride)
    activations = GPU_PASS * 3 * item * largest.channels * cells
    # else also transposed, in float32, and centred or multiplied
    features = GPU_BATCH * embedding_numbers(spec) * (item if kernels else 2 * item + 8)
    # distances brought to the image's size, and smoothed in two directions
    maps = GPU_BATCH * (distance_bytes(spec) + 3 * 4 * height * width)
    images = GPU_PASS * image_bytes(spec) * (3 + 4)  # under way as bytes, one in float32
    return (
        CUDA_CONTEXT
        + item * trunk_parameters(spec)
        + state
        + activations
        + features
        + maps
        + images
    )


def _item(spec: ModelSpec) -> int:
    return 2 if spec.precision == "bfloat16" else 4


def _process(spec: ModelSpec, plan: Plan) -> int:
    """An actor's process, without moments or Gaussians: imports, trunk, images and features.

    On a GPU the features are there, and the process holds the images only, on their way.
    """
    weights = _item(spec) * trunk_parameters(spec)
    if plan.actor.gpus:
        return PROCESS + weights + GPU_BATCH * image_bytes(spec)
    features = CPU_BATCH * (embedding_numbers(spec) * _item(spec) + 2 * distance_bytes(spec))
    # of the images that a thread computes on together
    activations = plan.threads * CPU_PASS * image_bytes(spec) * 4 * 4
    return PROCESS + weights + CPU_BATCH * image_bytes(spec) + features + activations


def _waiting(sums: Sums, groups: int, state: State) -> float:
    """Sums that wait for others of their rank, at the most, of one group: they follow each other.

    Of each rank but the first, they are merged ones; one merge more is under way.
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
    """Seconds, and what they are bound by.

    Stages overlap, so the slowest sets the pace; on CPUs actors and decoding share the cores, so
    their times add up. Start-up, some 20 s, isn't counted.
    """
    decode = images / rates.decode / plan.decoders if rates.decode else None
    if compute is None or decode is None:
        return None, "unknown"
    stages = {"driver": tasks * DRIVER_PER_SHARD}
    if plan.actor.gpus:
        stages |= {"GPUs": compute, "decoding": decode}
    else:
        stages["CPUs"] = compute + decode
    bound = max(stages, key=stages.__getitem__)
    return stages[bound], bound
