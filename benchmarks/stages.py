"""Trunk, moments, distances and maps, each alone, in one process: `python -m benchmarks.stages`."""

from collections.abc import Callable

import torch

from benchmarks.timing import Figure, cores, rates
from padim_ray.densities.gaussian.leave_one_out import NEGLIGIBLE_FROM
from padim_ray.features.grid import Embeddings
from padim_ray.features.trunk import Trunk
from padim_ray.features.weights import read_weights
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.spec import new_spec
from padim_ray.pipeline.cluster.memory import prepare_memory
from padim_ray.runs.options.model import ModelOptions
from padim_ray.scoring.anomaly_map import image_scores

BATCH = 128


def measure(weights: str, repeats: int) -> list[Figure]:
    """Images/s of resnet18 at 256×256."""
    work: dict[str, Callable[[], int]] = {}
    for precision in ("float32", "bfloat16"):
        detector, images = prepare(weights, "all", precision)
        work[f"{precision}, all channels"] = lambda e=detector, i=images: done(e.embed(i))
        trunk = detector.embedder.trunk
        work[f"{precision}, threads within operators"] = lambda t=trunk, i=images: within(t, i)
        modules = _modules(detector, weights)
        work[f"{precision}, by PyTorch's modules"] = lambda t=modules, i=images[:32]: within(t, i)
    figures = rates("trunk", work, repeats)
    for n_features in ("all", 100):
        figures += rates(
            f"{n_features} channels",
            stages(*prepare(weights, n_features, "bfloat16"), counts=(90, NEGLIGIBLE_FROM)),
            repeats,
        )
    return figures


def prepare(weights: str, n_features: str | int, precision: str) -> tuple[Detector, torch.Tensor]:
    """A detector, and a batch of images as in the jobs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ModelOptions(weights=weights, n_features=n_features)
    pixels = torch.randint(0, 256, (BATCH, 256, 256, 3), dtype=torch.uint8, device=device)
    detector = Detector(*new_spec(options, precision), device, threads=cores())
    return detector, pixels.permute(0, 3, 1, 2)


def _modules(detector: Detector, weights: str) -> Trunk:
    """The same trunk run by PyTorch's modules."""
    spec = detector.spec
    state = read_weights(weights, spec.backbone, list(spec.channels))
    precision, device = spec.precision, detector.device
    return Trunk(
        spec.backbone, spec.channels, state, precision=precision, device=device, fuse=False
    )


def stages(
    detector: Detector, images: torch.Tensor, counts: tuple[int, ...] = ()
) -> dict[str, Callable[[], int]]:
    """An actor's stages on a batch, by name; leave-one-out distances for each count of images."""
    spec = detector.spec
    embeddings = detector.embed(images)
    statistics = detector.add_(detector.empty_statistics(), embeddings)
    fitted = detector.load(fit_density(spec, statistics))
    distances = detector.measure(embeddings, fitted).distances

    def add() -> int:
        detector.add_(statistics, embeddings)
        return done(embeddings)

    def measure_distances(left_out_of: int | None = None) -> int:
        part = embeddings[:16] if left_out_of else embeddings
        spec.density.distances(fitted, part, left_out_of=left_out_of, workers=detector.workers)
        return done(part)

    def draw_maps() -> int:
        image_scores(distances, spec.mapper.maps(distances), spec.score_share)
        return done(embeddings)

    return {
        "trunk": lambda: done(detector.embed(images)),
        "moments": add,
        "distances": measure_distances,
        "map and score": draw_maps,
        **{
            f"leave-one-out of {count}": lambda count=count: measure_distances(count)
            for count in counts
        },
    }


def within(trunk: Callable[[torch.Tensor], list[torch.Tensor]], images: torch.Tensor) -> int:
    """Run one operator after the other, each on all cores."""
    torch.set_num_threads(cores())
    trunk(images)
    torch.set_num_threads(1)
    return len(images)


def done(embeddings: Embeddings) -> int:
    """Wait for the device and return the number of images."""
    if embeddings.levels[0].is_cuda:
        torch.cuda.synchronize()
    return len(embeddings)


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    from benchmarks.archive import random_trunk

    prepare_memory(keep_activations=True)
    with tempfile.TemporaryDirectory() as directory:
        for row in measure(random_trunk(Path(directory) / "trunk.pth"), repeats=5):
            print(f"{row['stage']:<16}{row['what']:<28}{row['median']:>8.0f} images/s")
