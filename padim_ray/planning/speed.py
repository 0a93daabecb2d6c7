"""How fast this machine is: fetching and decoding an archive's images, embedding, measuring."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from padim_ray.densities.base import Fitted, Statistics
from padim_ray.errors import ImageError
from padim_ray.features.embedder import as_images
from padim_ray.features.trunks import find_trunk
from padim_ray.features.weights import StateDict
from padim_ray.images.decode_in_child import Decoded, ModelInput, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.sources import uris_to_fetch
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.spec import ModelSpec

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
        spec: the model's.
        pixels: (n, H, W, 3) uint8, some images; with none, noise takes their place.
        device: to compute on.
        threads: see `Workers`.
    """
    before = torch.get_num_threads()
    try:
        return _measure(Detector(spec, random_weights(spec), device, None, threads), pixels)
    finally:
        torch.set_num_threads(before)


def _measure(detector: Detector, pixels: np.ndarray) -> ActorSpeed:
    spec, count = detector.spec, detector.batch_size
    if not len(pixels):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (8, *spec.preprocessing.size, 3), np.uint8)
    images = as_images(np.resize(pixels, (count, *pixels.shape[1:])))
    # copies of a few images have no covariance of full rank, and so no likely times
    images = (images.int() + torch.randint(-8, 9, images.shape)).clamp_(0, 255).byte()
    statistics = detector.empty_statistics()

    def add() -> int:
        nonlocal statistics
        statistics = detector.add_(statistics, detector.embed(images))
        return _finished(detector, count)

    fit = _rate(add)
    seconds, fitted = _fit(spec, statistics)
    loaded = detector.load(fitted)

    def score() -> int:
        detector.detect(images, loaded).scores.cpu()
        return _finished(detector, count)

    return ActorSpeed(fit, _rate(score), seconds)


def _fit(spec: ModelSpec, statistics: Statistics) -> tuple[float, Fitted]:
    """Seconds that fitting a group's density takes on one core, as its tasks do it; and it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    fitted = fit_density(spec, statistics.to("cpu"))
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return seconds, fitted


def _finished(detector: Detector, count: int) -> int:
    if detector.device.type == "cuda":
        torch.cuda.synchronize()
    return count


def random_weights(spec: ModelSpec) -> StateDict:
    """Weights of the trunk's shapes, under which features neither vanish nor explode."""
    weights = {}
    trunk = find_trunk(spec.backbone).build(list(spec.channels))
    for name, tensor in trunk.state_dict().items():
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
