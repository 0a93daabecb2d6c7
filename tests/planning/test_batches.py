"""Sizes of shards, batches and partial sums."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.model.spec import new_spec
from padim_ray.planning.batches import (
    MAX_PARTIAL_BYTES,
    MAX_SHARD_IMAGES,
    MERGING_SPEED,
    MIN_PARTIAL_IMAGES,
    MIN_SHARD_IMAGES,
    PIXELS_PER_STATE,
    SHARD_BYTES,
    images_per_batch,
    images_per_partial,
    images_per_shard,
)
from padim_ray.runs.options.model import ModelOptions

images = st.integers(1, 10**8)
sides = st.sampled_from([32, 64, 256, 512, 2048, 8192])


def bytes_of(spec, images):
    """Bytes of the decoded images, and of their statistics."""
    height, width = spec.preprocessing.size
    return 3 * height * width * images, spec.density.state_bytes(spec.grid)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images,
    st.integers(1, 500),
    st.sampled_from([1, 100, "all"]),
    st.sampled_from([64, 256, 512]),
    st.integers(1, 50_000),
)
def test_partial_sums_are_worth_merging_and_share_the_work(
    weights, images, actors, n_features, size, round_images
):
    options = ModelOptions(weights=weights, n_features=n_features, image_size=(size,))
    spec, _ = new_spec(options, "float32")
    count = images_per_partial(images, actors, spec)
    pixels, state = bytes_of(spec, count)
    one = bytes_of(spec, 1)[0]
    assert count >= 1
    assert pixels <= MAX_PARTIAL_BYTES + one
    assert MERGING_SPEED * pixels >= min(state, MERGING_SPEED * MAX_PARTIAL_BYTES)
    if count * actors < images:  # several sums per actor: as many images in each as are allowed
        assert pixels >= PIXELS_PER_STATE * state or pixels + one >= MAX_PARTIAL_BYTES
    if images <= MIN_PARTIAL_IMAGES:
        assert MERGING_SPEED * (pixels - one) < state or (count - 1) * actors < images

    shard = images_per_shard(images, spec.preprocessing)
    batch = images_per_batch(images, actors, spec, round_images)
    assert 1 <= batch <= round_images
    assert batch % shard == 0 or batch == round_images < shard
    if batch + shard <= round_images:  # the round doesn't limit it: the next multiple of a shard
        assert batch - shard < count <= batch


@given(images, images, sides, sides)
def test_shards_are_bounded_and_grow_with_the_set(images, more, height, width):
    preprocessing = Preprocessing((height, width))
    shard = images_per_shard(images, preprocessing)
    image_bytes = 3 * height * width
    assert 1 <= shard <= MAX_SHARD_IMAGES
    assert shard == 1 or shard * image_bytes <= SHARD_BYTES
    assert shard >= MIN_SHARD_IMAGES or (shard + 1) * image_bytes > SHARD_BYTES
    assert images_per_shard(images + more, preprocessing) >= shard
