"""How many images one partial sum is made of, and how many sums are merged at once."""

import math

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.model.spec import ModelSpec

WEIGHT = 10  # times a partial sum's bytes: its images', where there are enough
WORTH = 16  # this part of a partial sum's bytes in images takes as long as merging it
MIN_PARTIAL_IMAGES = 512  # unless there are fewer for an actor
FAN_IN = 4  # sums that one task merges
MAX_PARTIAL_BYTES = 2**30  # of the decoded images that one partial sum is made of


def images_per_batch(images: int, actors: int, spec: ModelSpec, round_images: int) -> int:
    """What Ray Data is to give an actor at once, at most `round_images`.

    A task gets as many whole shards as hold a batch; of what is left over in the last of them, the
    actor would make another partial sum. So batches are of whole shards.
    """
    shard = images_per_shard(images, spec.preprocessing)
    wanted = -(-images_per_partial(images, actors, spec) // shard) * shard
    return wanted if wanted <= round_images else round_images // shard * shard or round_images


def images_per_partial(images: int, actors: int, spec: ModelSpec) -> int:
    """How many images one partial sum is made of.

    So many that their bytes are a multiple of the sum's, up to a GiB of them; on small sets as few
    as share the work among the actors, but not so few that merging takes longer than summing up.
    """
    height, width = spec.preprocessing.size
    image_bytes = 3 * height * width
    as_heavy = spec.density.state_bytes(spec.grid) / image_bytes  # images, as one partial sum
    most = min(max(WEIGHT * as_heavy, MIN_PARTIAL_IMAGES), MAX_PARTIAL_BYTES / image_bytes)
    shared = max(images / actors, as_heavy / WORTH)
    return max(1, math.ceil(min(most, shared)))


SHARD_BYTES = 48 * 2**20  # of decoded pixels: well below the size at which Ray Data splits blocks
MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 128, 256
FAIR_SHARDS = 256


def images_per_shard(images: int, preprocessing: Preprocessing) -> int:
    """A shard's length: a bounded block of pixels, and on small sets enough shards to share out.

    It doesn't depend on the cluster: a run may be continued on another one.
    """
    height, width = preprocessing.size
    fair = max(-(-images // FAIR_SHARDS), MIN_SHARD_IMAGES)
    return max(1, min(fair, MAX_SHARD_IMAGES, SHARD_BYTES // (3 * height * width)))
