"""A detector's embeddings, statistics and distances: by threads of its own and by PyTorch's."""

import numpy as np
import pytest
import torch

from padim_ray.densities.gaussian.leave_one_out import NEGLIGIBLE_FROM
from padim_ray.features.embedder import as_images
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions

IMAGES = 43


@pytest.fixture
def detectors(weights):
    """The same model in one thread, and in three."""
    threads = torch.get_num_threads()
    options = ModelOptions(weights=weights, image_size=(64,), n_features=100)
    spec = new_spec(options, "float32")
    yield Detector(*spec, "cpu"), Detector(*spec, "cpu", threads=3)
    torch.set_num_threads(threads)


@pytest.fixture
def images():
    pixels = np.random.default_rng().integers(0, 256, (IMAGES, 64, 64, 3), np.uint8)
    return as_images(pixels)


def test_pixels_may_be_read_only_and_stay_as_they_are(detectors):
    pixels = np.random.default_rng().integers(0, 256, (9, 64, 64, 3), np.uint8)
    shared = np.frombuffer(content := pixels.tobytes(), np.uint8).reshape(pixels.shape)
    images = as_images(shared)
    assert images.data_ptr() == shared.ctypes.data
    for detector in detectors:
        levels = zip(
            detector.embed(images).levels, detector.embed(as_images(pixels)).levels, strict=True
        )
        assert all(torch.equal(level, other) for level, other in levels)
    assert content == pixels.tobytes()


def fitted(detector, images):
    return detector.add_(detector.empty_statistics(), detector.embed(images))


def test_threads_share_out_images_and_cells(detectors, images):
    one, three = detectors
    moments, others = fitted(one, images), fitted(three, images)
    for level, other in zip(one.embed(images).levels, three.embed(images).levels, strict=True):
        assert torch.equal(level, other)
    assert moments.count == others.count == IMAGES
    for blocks, other_blocks in zip(moments.scatters, others.scatters, strict=True):
        for block, other in zip(blocks, other_blocks, strict=True):
            torch.testing.assert_close(other, block, rtol=1e-5, atol=1e-5 * float(block.max()))


def test_embeddings_in_the_same_memory_again(weights, images):
    options = ModelOptions(weights=weights, image_size=(64,), n_features=100)
    spec = new_spec(options, "bfloat16")
    one, reusing = Detector(*spec, "cpu"), Detector(*spec, "cpu", reuse=True)
    places = set()
    for part in (images[:20], images, images[20:]):
        embeddings, expected = reusing.embed(part), one.embed(part)
        assert len(embeddings) == len(part)
        places.add(embeddings.levels[0].data_ptr())
        for level, other in zip(embeddings.levels, expected.levels, strict=True):
            assert torch.equal(level, other)
    assert len(places) == 2  # of all images, there are too many for the first's


@pytest.mark.parametrize("left_out_of", [None, IMAGES, NEGLIGIBLE_FROM])
def test_distances_of_threads(detectors, images, left_out_of):
    one, _ = detectors
    density = fit_density(one.spec, fitted(one, images))
    distances, others = (
        detector.detect(images, density, left_out_of=left_out_of).distances
        for detector in detectors
    )
    torch.testing.assert_close(others, distances, rtol=1e-5, atol=0)


def test_what_a_thread_raises_is_raised(detectors):
    with pytest.raises(RuntimeError):
        detectors[1].embed(torch.zeros(30, 4, 64, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_images_are_the_same_when_they_arrive_on_a_gpu_one_batch_after_the_other(weights, images):
    spec = new_spec(ModelOptions(weights=weights, image_size=(64,)), "float32")
    detector = Detector(*spec, "cuda", batch_size=8)
    there = detector.embed(images.to("cuda"))
    for _ in range(20):  # a copy that isn't waited for would differ now and then
        for level, other in zip(detector.embed(images).levels, there.levels, strict=True):
            assert torch.equal(level, other)
