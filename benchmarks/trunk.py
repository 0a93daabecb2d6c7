"""Trunk, moments, distances and maps alone, in one process."""

from collections.abc import Callable

import torch

from benchmarks.timing import Figure, rates
from padim_ray.anomaly_map import image_scores
from padim_ray.gaussian import factorise, pool
from padim_ray.leave_one_out import NEGLIGIBLE_FROM, leave_one_out_squared_distances
from padim_ray.model import Embedder
from padim_ray.moments import empty_moments
from padim_ray.options import ModelOptions
from padim_ray.spec import new_spec

BATCH = 64


def measure(weights: str, repeats: int) -> list[Figure]:
    """Images/s of resnet18 at 256×256, batches of 64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8, device=device)
    trunks: dict[str, Callable[[], int]] = {}
    figures = []
    for precision in ("float32", "bfloat16"):
        options = ModelOptions(weights=weights)
        embedder = Embedder(*new_spec(options, precision), device)
        trunks[f"trunk {precision}"] = lambda embedder=embedder: done(embedder.trunk(images))
    figures += rates("trunk", trunks, repeats)
    for n_features in ("all", 100):
        options = ModelOptions(weights=weights, n_features=n_features)
        embedder = Embedder(*new_spec(options, "bfloat16"), device)
        figures += rates(f"{n_features} channels", stages(embedder, images), repeats)
    return figures


def stages(embedder: Embedder, images: torch.Tensor) -> dict[str, Callable[[], int]]:
    spec = embedder.spec
    embeddings = embedder.embed(images)
    patches = embeddings.patches()
    state = empty_moments(spec.grid.cells, spec.grid.channels, device=embedder.device)
    state = embedder.accumulate_(state, embeddings)
    rule = spec.regularization
    gaussian = factorise(state, rule.scale(state.count), rule.offset(pool(state)))
    distances = embedder.distances(embeddings, gaussian)
    return {
        "moments": lambda: done([embedder.accumulate_(state, embeddings).means[0]]),
        "distances": lambda: done([embedder.distances(embeddings, gaussian)]),
        **{
            f"leave-one-out of {count}": lambda count=count: done(
                [leave_one_out_squared_distances(gaussian, patches, count, rule)]
            )
            for count in (90, NEGLIGIBLE_FROM)
        },
        "map and score": lambda: done([image_scores(spec.mapper.maps(distances))]),
    }


def done(results: list[torch.Tensor]) -> int:
    """Wait for the device, and say how many images that were."""
    if results[0].is_cuda:
        torch.cuda.synchronize()
    return BATCH
