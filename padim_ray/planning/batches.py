"""Sizes of the units of work: images per shard, images per partial sum, sums per merge."""

import math
from collections.abc import Mapping

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.model.spec import ModelSpec

PIXELS_PER_STATE = 10
"""Bytes of pixels in a partial sum per byte of its statistics, on large sets."""
MERGING_SPEED = 16
"""Bytes of statistics that are merged in the time in which one byte of pixels is embedded."""
MIN_PARTIAL_IMAGES = 512
"""Lower bound of a partial sum's images, unless an actor's share is smaller."""
MAX_PARTIAL_BYTES = 2**30
"""Maximum bytes of decoded pixels in a partial sum."""
FAN_IN = 4
"""Sums that one task merges."""

WRITING_BYTES = 2**30
"""Maximum bytes of the merged statistics of groups that are being written."""

SHARD_BYTES = 48 * 2**20
"""Maximum bytes of decoded pixels in a shard. Ray Data splits larger blocks."""
MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 128, 256
EVEN_SHARDS = 256
"""Shards that are enough to balance the work of any cluster."""


def images_per_batch(images: int, actors: int, spec: ModelSpec, round_images: int) -> int:
    """How many images Ray Data gives to an actor per call of `fit`, at most `round_images`.

    A batch is a multiple of the shard's length. Ray Data's task for an actor holds as many whole
    shards as fill a batch; if a batch ended inside a shard, the rest would make a second, small
    partial sum.
    """
    shard = images_per_shard(images, spec.preprocessing)
    wanted = -(-images_per_partial(images, actors, spec) // shard) * shard
    return wanted if wanted <= round_images else round_images // shard * shard or round_images


def images_per_partial(images: int, actors: int, spec: ModelSpec) -> int:
    """How many images one partial sum should hold.

    On large sets the pixels are a multiple of the statistics' bytes, but at most 1 GiB. On small
    sets the images are divided among the actors, unless merging would then take longer than
    embedding.
    """
    height, width = spec.preprocessing.size
    image_bytes = 3 * height * width
    state_images = spec.density.state_bytes(spec.grid) / image_bytes  # the statistics' size
    most = min(
        max(PIXELS_PER_STATE * state_images, MIN_PARTIAL_IMAGES),
        MAX_PARTIAL_BYTES / image_bytes,
    )
    share = max(images / actors, state_images / MERGING_SPEED)
    return max(1, math.ceil(min(most, share)))


def images_per_shard(images: int, preprocessing: Preprocessing) -> int:
    """How many images one shard holds.

    A shard's decoded pixels are bounded, and a small set makes enough shards to balance the work.
    The length doesn't depend on the cluster, because a run may be continued on another one.
    """
    height, width = preprocessing.size
    even = max(-(-images // EVEN_SHARDS), MIN_SHARD_IMAGES)
    return max(1, min(even, MAX_SHARD_IMAGES, SHARD_BYTES // (3 * height * width)))


def groups_being_written(spec: ModelSpec) -> int:
    """How many finished groups may be being written while the next is summed up."""
    return WRITING_BYTES // spec.density.empty(spec.grid, "meta").double().nbytes


def kept_groups(
    groups: Mapping[str, int], spec: ModelSpec, calibration_images: int, memory: int
) -> set[str]:
    """The first groups whose calibration images' embeddings fit the memory together.

    Args:
        groups: number of images per group.
        spec: of the model.
        calibration_images: maximum number per group.
        memory: in bytes.
    """
    kept, left = set(), memory
    for group, images in groups.items():
        left -= min(images, calibration_images) * embedding_bytes(spec)
        if left < 0:
            break
        kept.add(group)
    return kept


def embedding_bytes(spec: ModelSpec) -> int:
    """Bytes of an image's features."""
    return embedding_numbers(spec) * number_bytes(spec)


def embedding_numbers(spec: ModelSpec) -> int:
    """Number of an image's features, with each level on its own grid."""
    return sum(p * c for p, c in zip(spec.grid.cells, spec.grid.channels, strict=True))


def number_bytes(spec: ModelSpec) -> int:
    """Bytes of a feature or of one of the trunk's weights."""
    return 2 if spec.precision == "bfloat16" else 4
