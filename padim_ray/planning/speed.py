"""How fast this machine is: fetching and decoding an archive's images, embedding, measuring."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities.gaussian.moments import Moments, empty_moments
from padim_ray.densities.gaussian.regularization import pool
from padim_ray.densities.gaussian.whitening import factorise
from padim_ray.errors import ImageError
from padim_ray.features.embedder import Embedder, as_images
from padim_ray.features.trunks import resnet
from padim_ray.features.weights import StateDict
from padim_ray.images.decode_in_child import Decoded, ModelInput, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.sources import uris_to_fetch
from padim_ray.model.layout import state_shards
from padim_ray.model.spec import ModelSpec
from padim_ray.scoring.anomaly_map import image_scores

ENOUGH = 1.0  # seconds, to have measured something
SLOW = 5.0  # seconds: what takes as long isn't done once more to warm up


@dataclass(frozen=True)
class Sampled:
    """Images that were fetched and decoded.

    `bytes`: mean, of a file. `pixels` (n, H, W, 3) uint8. `failed`: error of each that couldn't be
    read. `fetch_rate`: bytes/s, all at once; `decode_rate`: images/s of one core. None: no image.
    """

    bytes: float | None
    pixels: np.ndarray
    failed: list[str]
    fetch_rate: float | None
    decode_rate: float | None


def read_sample(sample: pa.Table, wanted: ModelInput, fetch: Fetcher) -> Sampled:
    """Fetch and decode the images in some of a manifest's rows."""
    listed = [sample[name].to_pylist() for name in ("size", "version_tag")]
    started = time.perf_counter()
    contents = fetch(uris_to_fetch(sample), *listed) if sample.num_rows else []
    fetching = time.perf_counter() - started
    failed = [str(content) for content in contents if isinstance(content, ImageError)]
    fetched = [content for content in contents if isinstance(content, bytes)]
    images = list(decode_all(fetched, wanted))
    failed += [str(image) for image in images if isinstance(image, ImageError)]
    pixels = [image.pixels for image in images if isinstance(image, Decoded)]
    size = sum(map(len, fetched))
    return Sampled(
        bytes=size / len(fetched) if fetched else None,
        pixels=np.stack(pixels)
        if pixels
        else np.empty((0, *wanted.preprocessing.size, 3), np.uint8),
        failed=failed,
        fetch_rate=size / fetching if fetched else None,
        decode_rate=_rate(lambda: len(list(decode_all(fetched, wanted)))) if pixels else None,
    )


@dataclass(frozen=True)
class ActorSpeed:
    """Images/s that one actor sums up and scores; seconds of one core for a group's Gaussians."""

    fit: float
    score: float
    factorise: float


def measure_actor(
    spec: ModelSpec, pixels: np.ndarray, device: str, threads: int | None
) -> ActorSpeed:
    """Do what an actor does with images, with random weights: times don't depend on them.

    Args:
        pixels: (n, H, W, 3) uint8, some images; with none, noise takes their place.
        threads: see `Embedder`.
    """
    before = torch.get_num_threads()
    try:
        return _measure(Embedder(spec, random_weights(spec), device, None, threads), pixels)
    finally:
        torch.set_num_threads(before)


def _measure(embedder: Embedder, pixels: np.ndarray) -> ActorSpeed:
    spec, count = embedder.spec, embedder.together
    if not len(pixels):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (8, *spec.preprocessing.size, 3), np.uint8)
    images = as_images(np.resize(pixels, (count, *pixels.shape[1:])))
    # copies of a few images have no covariance of full rank, and so no likely times
    images = (images.int() + torch.randint(-8, 9, images.shape)).clamp_(0, 255).byte()
    state = empty_moments(spec.grid.cells, spec.grid.channels, device=embedder.device)

    def sum_up() -> int:
        nonlocal state
        state = embedder.accumulate_(state, embedder.embed(images))
        return _finished(embedder, count)

    fit = _rate(sum_up)
    seconds, whitened = _factorise(spec, state)
    gaussian = embedder.load(whitened)

    def score() -> int:
        distances = embedder.distances(embedder.embed(images), gaussian)
        image_scores(spec.mapper.maps(distances)).cpu()
        return _finished(embedder, count)

    return ActorSpeed(fit, _rate(score), seconds)


def _factorise(spec: ModelSpec, state: Moments):
    """Seconds for a group's Gaussians, on one core as its tasks do; and them."""
    from padim_ray.densities.gaussian.whitening import concatenate

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    local, rule = state.to("cpu"), spec.regularization
    offset = rule.offset(pool(local))
    parts = [
        factorise(local.cells(*run), rule.scale(local.count), offset) for run in state_shards(spec)
    ]
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return seconds, concatenate(parts)


def _finished(embedder: Embedder, count: int) -> int:
    if embedder.device.type == "cuda":
        torch.cuda.synchronize()
    return count


def random_weights(spec: ModelSpec) -> StateDict:
    """Weights of the trunk's shapes, under which features neither vanish nor explode."""
    weights = {}
    for name, tensor in resnet.build(spec.backbone, list(spec.channels)).state_dict().items():
        if tensor.ndim == 4:  # a convolution (He et al. 2015)
            weights[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "weight")):
            weights[name] = torch.ones(tensor.shape)
        else:
            weights[name] = torch.zeros(tensor.shape)
    return weights


def _rate(work: Callable[[], int]) -> float:
    """Images/s of something that says how many it did; what it does first isn't counted."""
    started = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - started
    if seconds > SLOW:
        return count / seconds
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < ENOUGH or not count:
        count += work()
    return count / seconds
