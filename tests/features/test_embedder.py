"""Embeddings of batches: by one thread and by several, in new memory and in reused memory."""

import numpy as np
import pytest
import torch

from padim_ray.features.embedder import Embedder, as_images
from padim_ray.features.grid import PatchGrid
from padim_ray.features.trunk import Trunk
from padim_ray.features.weights import read_weights
from padim_ray.features.workers import Workers

CHANNELS = {"layer1": range(0, 64, 4), "layer2": range(0, 128, 4)}
GRID = PatchGrid(((16, 16), (8, 8)), (16, 32))


@pytest.fixture(scope="module")
def state_dict(weights):
    return read_weights(weights, "resnet18", list(CHANNELS))


@pytest.fixture
def make_embedder(state_dict):
    """A function that makes embedders; PyTorch's number of threads is restored afterwards."""
    threads = torch.get_num_threads()

    def make(*, device="cpu", precision="float32", workers=None, pass_size=None, reuse=False):
        trunk = Trunk("resnet18", CHANNELS, state_dict, device=device, precision=precision)
        workers = Workers(workers)
        return Embedder(trunk, GRID, torch.device(device), pass_size, workers, reuse=reuse)

    yield make
    torch.set_num_threads(threads)


def random_pixels(count):
    return np.random.default_rng().integers(0, 256, (count, 64, 64, 3), np.uint8)


def assert_equal(embeddings, others):
    for level, other in zip(embeddings.levels, others.levels, strict=True):
        assert torch.equal(level, other)


def test_embeddings_are_the_trunks_features_in_nested_order(make_embedder):
    embedder, images = make_embedder(), as_images(random_pixels(9))
    assert_equal(embedder.embed(images), GRID.nest(embedder.trunk(images)))


def test_pixels_may_be_read_only_and_are_not_changed(make_embedder):
    pixels = random_pixels(9)
    shared = np.frombuffer(content := pixels.tobytes(), np.uint8).reshape(pixels.shape)
    images = as_images(shared)
    assert images.data_ptr() == shared.ctypes.data
    for workers in (None, 3):
        embedder = make_embedder(workers=workers)
        assert_equal(embedder.embed(images), embedder.embed(as_images(pixels)))
    assert content == pixels.tobytes()


def test_threads_give_the_same_embeddings(make_embedder):
    images = as_images(random_pixels(43))
    assert_equal(make_embedder().embed(images), make_embedder(workers=3).embed(images))


def test_batches_are_embedded_in_order(make_embedder):
    batches = [as_images(random_pixels(count)) for count in (3, 1, 12)]
    embedder = make_embedder()
    for batch, embeddings in zip(batches, embedder.embed_each(iter(batches)), strict=True):
        assert_equal(embeddings, embedder.embed(batch))


def test_reused_memory_holds_the_same_embeddings(make_embedder):
    images = as_images(random_pixels(43))
    one = make_embedder(precision="bfloat16")
    reusing = make_embedder(precision="bfloat16", reuse=True)
    places = set()
    for part in (images[:20], images, images[20:]):
        embeddings = reusing.embed(part)
        assert len(embeddings) == len(part)
        places.add(embeddings.levels[0].data_ptr())
        assert_equal(embeddings, one.embed(part))
    assert len(places) == 2  # the memory for the first 20 images is too small for all


def test_an_exception_in_a_thread_is_raised(make_embedder):
    with pytest.raises(RuntimeError):
        make_embedder(workers=3).embed(torch.zeros(30, 4, 64, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_images_uploaded_during_computation_give_the_same_embeddings(make_embedder):
    embedder, images = make_embedder(device="cuda", pass_size=8), as_images(random_pixels(43))
    expected = embedder.embed(images.to("cuda"))
    for _ in range(20):  # without waiting for the copy, some would differ
        assert_equal(embedder.embed(images), expected)
