"""How many images a partial sum is made of."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from padim_ray.model.spec import new_spec
from padim_ray.planning.batches import (
    MAX_PARTIAL_BYTES,
    MIN_PARTIAL_IMAGES,
    WEIGHT,
    WORTH,
    images_per_partial,
)
from padim_ray.runs.options.model import ModelOptions


def bytes_of(spec, images):
    height, width = spec.preprocessing.size
    return 3 * height * width * images, spec.density.state_bytes(spec.grid)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 10**8),
    st.integers(1, 500),
    st.sampled_from([1, 100, "all"]),
    st.sampled_from([64, 256, 512]),
)
def test_partial_sums_weigh_little_and_share_the_work(weights, images, actors, n_features, size):
    options = ModelOptions(weights=weights, n_features=n_features, image_size=(size,))
    spec, _ = new_spec(options, "float32")
    count = images_per_partial(images, actors, spec)
    pixels, state = bytes_of(spec, count)
    one = bytes_of(spec, 1)[0]
    assert count >= 1
    assert pixels <= MAX_PARTIAL_BYTES + one
    assert WORTH * pixels >= min(state, WORTH * MAX_PARTIAL_BYTES)  # worth merging
    if count * actors < images:  # more than one for each: as many images as are allowed
        assert pixels >= WEIGHT * state or pixels + one >= MAX_PARTIAL_BYTES
    if images <= MIN_PARTIAL_IMAGES:
        assert WORTH * (pixels - one) < state or (count - 1) * actors < images
