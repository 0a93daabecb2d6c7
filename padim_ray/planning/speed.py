"""Measure this machine: fetching, decoding, embedding and scoring an archive's images."""

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

MIN_SECONDS = 1.0  # of a measurement
SLOW_SECONDS = 5.0  # work that takes this long isn't repeated after a warm-up


@dataclass(frozen=True)
class Sampled:
    """A sample of images, fetched and decoded.

    Attributes:
        bytes: mean size of a file; None if none was fetched.
        pixels: the decoded images, (n, H, W, 3) uint8.
        failed: errors of the images that couldn't be read.
        fetch_rate: bytes/s of fetching them all concurrently; None if none was fetched.
        decode_rate: images/s of one core; None if none was decoded.
    """

    bytes: float | None
    pixels: np.ndarray
    failed: list[str]
    fetch_rate: float | None
    decode_rate: float | None


def read_sample(sample: pa.Table, wanted: ModelInput, fetch: Fetcher) -> Sampled:
    """Fetch and decode the images of some of a manifest's rows."""
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
    """Speeds of one actor, and of the task that fits a density.

    Attributes:
        fit: images/s that the actor adds to statistics.
        score: images/s that it scores.
        factorise: seconds of one core to fit a group's density.
        left_out: images/s that it calibrates with from their embeddings.
    """

    fit: float
    score: float
    factorise: float
    left_out: float


def measure_actor(
    spec: ModelSpec, pixels: np.ndarray, device: str, threads: int | None
) -> ActorSpeed:
    """Measure what an actor does with images. Times don't depend on weights, so these are random.

    Args:
        spec: the model's.
        pixels: some images, (n, H, W, 3) uint8; if there are none, noise takes their place.
        device: PyTorch's name of the device to compute on.
        threads: compute threads of the actor.
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
    # without noise, copies of a few images would have a singular covariance and untypical times
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

    embeddings = detector.embed(images)

    def leave_out() -> int:
        detector.measure(embeddings, loaded, left_out_of=count).scores.cpu()
        return _finished(detector, count)

    return ActorSpeed(fit, _rate(score), seconds, _rate(leave_out))


def _fit(spec: ModelSpec, statistics: Statistics) -> tuple[float, Fitted]:
    """Fit a density on one core, as the jobs' tasks do; return the seconds and the density."""
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
    """Random weights for the trunk, under which features neither vanish nor explode."""
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
    """Images/s of `work`, which returns the number of images; its first call is a warm-up."""
    started = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - started
    if seconds > SLOW_SECONDS:
        return count / seconds
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < MIN_SECONDS or not count:
        count += work()
    return count / seconds
