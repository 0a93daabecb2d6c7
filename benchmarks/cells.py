"""`python -m benchmarks.cells`: accuracy by the size of cells, on real and drawn archives.

    python -m benchmarks.cells --weights trunk.pth --data DIR DIR …

Each DIR is a category in the layout of MVTec AD (train/good, test/DEFECT, ground_truth/DEFECT); the
ground truth is optional. Two archives are drawn besides: the demo's products with spots and
scratches of 2 to 40 pixels. All settings are computed from the same features, so that only cells,
regularisation, smoothing and score differ. Prints a Markdown table, and writes build/cells.json.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from demo.archive import GROUPS, photograph
from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.densities.gaussian.whitening import Gaussian
from padim_ray.densities.search import cells_around
from padim_ray.evaluation.metrics import PixelCounts, auroc, count_scores, pixel_metrics
from padim_ray.features.cells import average_cells, cell_grids
from padim_ray.features.embedder import as_images
from padim_ray.features.grid import Embeddings, PatchGrid
from padim_ray.features.trunk import Trunk
from padim_ray.features.trunks import choose_channels, find_trunk
from padim_ray.features.weights import read_weights
from padim_ray.images.decode import decode
from padim_ray.images.masks import decode_mask, fit_mask
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.resize import model_input
from padim_ray.scoring.anomaly_map import AnomalyMapper, image_scores

OUTPUT = Path("build/cells.json")
SIDE = 256  # pixels of the model's input
SEEN = Preprocessing((SIDE, SIDE))
BATCH = 32
SIZES = (2, 4, 8, 16, 40)  # pixels of a drawn defect
DRAWN = {"train": 200, "good": 100, "defective": 60}  # images of a drawn archive; the last per size
DESCRIBED_SHARES = (0.004, 0.01, 0.04, 0.16, 1)
FALSE_ALARMS = 0.05  # of the good test images, at which the recall of defects is taken
MAX_PIXELS = 2**28
T = TypeVar("T")


class Picture(NamedTuple):
    """A test image.

    Attributes:
        pixels: (SIDE, SIDE, 3) uint8.
        is_defective: whether it has a defect.
        mask: (SIDE, SIDE) bool, or None if the defect's place isn't known.
        kind: what its recall is reported under, such as the defect's size.
    """

    pixels: np.ndarray
    is_defective: bool
    mask: np.ndarray | None
    kind: str


class Setting(NamedTuple):
    """The settings that distances depend on."""

    stride: int
    neighbourhood: int
    shrinkage: float


@dataclass(frozen=True)
class Archive:
    """Good images to fit to, and images to test on; calls read or draw them."""

    name: str
    train: Callable[[], Iterable[np.ndarray]]
    test: Callable[[], Iterable[Picture]]


def read_archive(root: Path) -> Archive:
    """An archive in the layout of MVTec AD."""

    def test() -> Iterator[Picture]:
        for path in sorted(root.glob("test/*/*")):
            kind, mask = path.parent.name, np.zeros((SIDE, SIDE), bool)
            if kind == "good":
                yield Picture(read(path), False, mask, kind)
                continue
            file = root / "ground_truth" / kind / f"{path.stem}_mask.png"
            if file.exists():
                whole = decode_mask(file.read_bytes(), MAX_PIXELS)
                yield Picture(read(path), True, fit_mask(whole, SEEN), kind)
            else:
                yield Picture(read(path), True, None, kind)

    paths = sorted((root / "train/good").iterdir())
    return Archive(root.name, lambda: map(read, paths), test)


def read(path: Path) -> np.ndarray:
    return model_input(decode(path.read_bytes(), MAX_PIXELS), SEEN)


def draw_archive(name: str) -> Archive:
    """One of the demo's products, with defects of each of `SIZES`."""
    make = partial(photograph, GROUPS[name], SIDE)

    def good(first: int, count: int) -> Iterator[np.ndarray]:
        for index in range(first, first + count):
            image, _ = make(np.random.default_rng([1, index]))
            yield np.asarray(image.convert("RGB"))

    def test() -> Iterator[Picture]:
        nothing = np.zeros((SIDE, SIDE), bool)
        for pixels in good(DRAWN["train"], DRAWN["good"]):
            yield Picture(pixels, False, nothing, "good")
        for size in SIZES:
            for index in range(DRAWN["defective"]):
                rng = np.random.default_rng([2, size, index])
                image, _ = make(rng)
                pixels, mask = damage(np.asarray(image.convert("RGB")), size, rng)
                yield Picture(pixels, True, mask, f"{size} px")

    return Archive(f"drawn {name}", lambda: good(0, DRAWN["train"]), test)


def damage(pixels: np.ndarray, size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a spot or a scratch of `size` pixels in the middle part of an image; with its mask."""
    scale = 4  # drawn larger and reduced, for smooth edges
    cover = Image.new("L", (scale * SIDE, scale * SIDE))
    x, y = rng.uniform(0.2 * SIDE, 0.8 * SIDE, 2) * scale
    radius, canvas = scale * size / 2, ImageDraw.Draw(cover)
    if rng.random() < 0.5:
        squeeze = rng.uniform(0.6, 1)
        canvas.ellipse([x - radius, y - squeeze * radius, x + radius, y + squeeze * radius], 255)
    else:
        turn, width = rng.uniform(0, np.pi), max(scale, round(scale * size / 8))
        along = radius * np.array([np.cos(turn), np.sin(turn)])
        canvas.line([x - along[0], y - along[1], x + along[0], y + along[1]], 255, width)
    cover = cover.filter(ImageFilter.GaussianBlur(scale * 0.4))
    share = np.asarray(cover.reduce(scale), np.float32)[..., None] / 255
    mask = share[..., 0] > 0.25
    around = pixels[mask].mean(0) if mask.any() else pixels.mean((0, 1))
    step = rng.uniform(50, 90) * (1 if around.mean() < 110 else -1)
    return (pixels * (1 - share) + np.clip(around + step, 0, 255) * share).astype(np.uint8), mask


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, BATCH)):
        yield batch


class Features:
    """Embeds images with every size of cells from one pass through the trunk."""

    def __init__(self, backbone: str, weights: str, precision: str) -> None:
        trunk = find_trunk(backbone)
        channels = choose_channels(backbone, trunk.default_levels, "all", 0)
        state = read_weights(weights, backbone, list(channels))
        self.trunk = Trunk(backbone, channels, state, precision=precision)
        self._strides = [trunk.levels[level].stride for level in channels]
        self._channels = tuple(map(len, channels.values()))

    def grid(self, stride: int) -> PatchGrid:
        return PatchGrid(cell_grids((SIDE, SIDE), self._strides, stride), self._channels)

    @torch.inference_mode()
    def embed(
        self, pixels: list[np.ndarray], settings: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], Embeddings]]:
        """Embeddings for each stride and neighbourhood."""
        parts = [self.trunk(part) for part in as_images(np.stack(pixels)).split(4)]
        maps = [torch.cat(level) for level in zip(*parts, strict=True)]
        for stride, neighbourhood in settings:
            grid = self.grid(stride)
            yield (
                (stride, neighbourhood),
                grid.nest(average_cells(maps, grid.grids, neighbourhood)),
            )


@torch.inference_mode()
def measure(
    archive: Archive,
    features: Features,
    strides: list[int],
    neighbourhoods: list[int],
    shrinkages: list[float],
    sigmas: list[float],
    shares: list[float],
    searches: list[int],
    members: list[Setting],
    *,
    variants: bool,
) -> list[dict]:
    """Metrics of an archive for every setting, smoothing and score, and for pairs of members."""
    cells = list(product(strides, neighbourhoods))
    plain = GaussianDensity(Regularization())
    sums = {cell: plain.empty(features.grid(cell[0])) for cell in cells}
    for pixels in in_batches(archive.train()):
        for cell, embeddings in features.embed(pixels, cells):
            sums[cell] = sums[cell].add_(embeddings)
    fitted = {}
    for cell in cells:
        statistics = sums.pop(cell)
        pooled = plain.pool(statistics)
        for shrinkage in shrinkages:
            density = GaussianDensity(Regularization(shrinkage=shrinkage))
            fitted[Setting(*cell, shrinkage)] = density.fit(statistics, pooled)
    distances, searched = defaultdict(list), defaultdict(list)
    pictures = []
    for some in in_batches(archive.test()):
        pictures += [picture._replace(pixels=np.empty(0)) for picture in some]
        for cell, embeddings in features.embed([picture.pixels for picture in some], cells):
            grid = features.grid(cell[0])
            for shrinkage in shrinkages:
                setting = Setting(*cell, shrinkage)
                nested = plain.distances(fitted[setting], embeddings)
                distances[setting].append(grid.unnest(nested))
                for radius in filter(None, searches):
                    nested = search_everywhere(fitted[setting], embeddings, grid, radius)
                    searched[setting, radius].append(grid.unnest(nested))
    rows = []
    tests = {setting: torch.cat(parts) for setting, parts in distances.items()}
    after = {key: torch.cat(parts) for key, parts in searched.items()}
    for setting, found in tests.items():
        for sigma, share, radius in product(sigmas, shares, searches):
            maps, scores = maps_and_scores(found, sigma, share)
            if radius:  # it changes scores only
                _, scores = maps_and_scores(after[setting, radius], sigma, share)
            labels = {
                **setting._asdict(),
                **{"sigma": sigma, "score_share": share},
                "variant": f"search {radius}" if radius else "",
            }
            rows.append(evaluate(archive.name, labels, maps, scores, pictures))
    for setting, found in tests.items() if variants else ():
        alone = leave_one_out(archive, features, fitted, setting)
        for sigma, share in product(sigmas, shares):
            for variant, results in variants_of(found, alone, sigma, share).items():
                labels = {
                    **setting._asdict(),
                    **{"sigma": sigma, "score_share": share, "variant": variant},
                }
                rows.append(evaluate(archive.name, labels, *results, pictures))
    for one, other in pairwise(members):
        alone = [leave_one_out(archive, features, fitted, member) for member in (one, other)]
        for sigma, share in product(sigmas, shares):
            found = [
                standardised(tests[member], train, sigma, share)
                for member, train in zip((one, other), alone, strict=True)
            ]
            maps, scores = (sum(part) / 2 for part in zip(*found, strict=True))
            labels = {
                name: f"{a:g} + {b:g}"
                for name, a, b in zip(Setting._fields, one, other, strict=True)
            }
            labels |= {"sigma": sigma, "score_share": share, "variant": ""}
            rows.append(evaluate(archive.name, labels, maps, scores, pictures))
    return rows


def search_everywhere(
    fitted: Gaussian, embeddings: Embeddings, grid: PatchGrid, radius: int
) -> torch.Tensor:
    cells, images = torch.arange(grid.cells[0]), torch.arange(len(embeddings))
    cells, images = cells.repeat(len(images)), images.repeat_interleave(len(cells))
    around = cells_around(grid, radius)[cells]
    found = GaussianDensity(Regularization()).search(fitted, embeddings, images, cells, around)
    return found.view(len(embeddings), -1).T


def maps_and_scores(
    distances: torch.Tensor, sigma: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    maps = AnomalyMapper(tuple(distances.shape[1:]), (SIDE, SIDE), sigma).maps(distances)
    return maps, image_scores(distances, maps, share)


def leave_one_out(
    archive: Archive, features: Features, fitted: dict, member: Setting
) -> torch.Tensor:
    """Leave-one-out distances of the training images."""
    density, grid = GaussianDensity(Regularization(shrinkage=member[2])), features.grid(member[0])
    images = list(archive.train())
    parts = [
        density.distances(fitted[member], embeddings, left_out_of=len(images))
        for pixels in in_batches(images)
        for _, embeddings in features.embed(pixels, [member[:2]])
    ]
    return torch.cat([grid.unnest(part) for part in parts])


def standardised(
    test: torch.Tensor, train: torch.Tensor, sigma: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and scores in standard deviations above the mean of the training images', plus 10.

    So that they are positive, as histograms of pixels count them.
    """
    pairs = zip(
        maps_and_scores(test, sigma, share), maps_and_scores(train, sigma, share), strict=True
    )
    found, scores = (10 + (ours - theirs.mean()) / theirs.std() for ours, theirs in pairs)
    return found, scores


def variants_of(
    test: torch.Tensor, train: torch.Tensor, sigma: float, share: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Maps and scores of what was tried besides.

    Args:
        test: distances of test images, (n, H, W).
        train: leave-one-out distances of training images, (m, H, W).
        sigma: of the smoothing.
        share: of the cells in a score.
    """
    found = {}
    mean, spread = train.mean(0), train.std(0)
    for strength in (0.5, 1.0):
        level = strength * (mean - mean.mean())
        scale = (spread / spread.mean()) ** strength
        standard = ((test - level) / scale).clamp(min=0)
        found[f"cells standardised {strength:g}"] = maps_and_scores(standard, sigma, share)
    maps, _ = maps_and_scores(test, sigma, share)
    ours, theirs = describe_distances(test), describe_distances(train)
    offset = ours - theirs.mean(0)
    precision = torch.linalg.inv(theirs.T.cov())
    found["score of descriptors"] = maps, (offset @ precision * offset).sum(1).sqrt()
    return found


def describe_distances(distances: torch.Tensor) -> torch.Tensor:
    """Descriptors of images: logarithms of the means of several shares of the cells, (n, 5)."""
    cells = distances.flatten(1).double().sort(1, descending=True).values
    counts = [max(1, round(share * cells.shape[1])) for share in DESCRIBED_SHARES]
    return torch.stack([cells[:, :count].mean(1).log() for count in counts], 1)


def evaluate(
    name: str, labels: dict, maps: torch.Tensor, scores: torch.Tensor, pictures: list[Picture]
) -> dict:
    """Metrics of one archive's test images."""
    is_defective = np.array([picture.is_defective for picture in pictures])
    pixels = None
    if all(picture.mask is not None for picture in pictures):
        pixels = sum(
            (
                PixelCounts.of(one[None].numpy(), picture.mask[None])
                for one, picture in zip(maps, pictures, strict=True)
                if picture.mask is not None
            ),
            PixelCounts.empty(),
        )
    found = scores.numpy()
    _, negatives, positives = count_scores(found, is_defective)
    threshold = np.quantile(found[~is_defective], 1 - FALSE_ALARMS)
    kinds = defaultdict(list)
    for picture, value in zip(pictures, found, strict=True):
        if picture.is_defective:
            kinds[picture.kind].append(value > threshold)
    return {
        "archive": name,
        **labels,
        "image_auroc": float(auroc(negatives, positives)),
        **(pixel_metrics(pixels) if pixels else {}),
        "recall": {kind: float(np.mean(each)) for kind, each in kinds.items()},
    }


def to_markdown(rows: list[dict]) -> str:
    """One line per setting and archive."""
    kinds = [f"{size} px" for size in SIZES]
    lines = [
        "| archive | stride | neighbourhood | λ | σ | share | variant | image AUROC | pixel AUROC "
        f"| AUPRO | recall {' / '.join(kinds)} |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        pixel = [
            f"{row[name]:.3f}" if name in row else "" for name in ("pixel_auroc", "pixel_aupro")
        ]
        recall = " / ".join(f"{row['recall'][kind]:.2f}" for kind in kinds if kind in row["recall"])
        cells = [
            row["archive"],
            *(str(row[name]) for name in ("stride", "neighbourhood", "shrinkage", "sigma")),
            f"{row['score_share']:g}",
            row["variant"],
            f"{row['image_auroc']:.3f}",
            *pixel,
            recall,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    global SIDE, SEEN
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cells", description=__doc__)
    parser.add_argument("--weights", required=True, help="the trunk's weights, trained on ImageNet")
    parser.add_argument("--data", nargs="*", type=Path, default=[])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--strides", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--neighbourhoods", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--shrinkages", nargs="+", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--sigmas", nargs="+", type=float, default=[4])
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.02])
    parser.add_argument("--searches", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--members",
        nargs="*",
        default=[],
        metavar="STRIDE,NEIGHBOURHOOD",
        help="measure the mean of the standardised maps of each two neighbours, such as 8,1 16,3",
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="measure standardised cells, and scores from several descriptors of an image",
    )
    parser.add_argument("--side", type=int, default=SEEN.size[0], help="of the input, in pixels")
    parser.add_argument("--drawn", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    SIDE, SEEN = chosen.side, Preprocessing((chosen.side, chosen.side))
    features = Features(chosen.backbone, chosen.weights, chosen.precision)
    archives = [*map(read_archive, chosen.data), *map(draw_archive, chosen.drawn)]
    members = [Setting(*map(int, each.split(",")), chosen.shrinkages[0]) for each in chosen.members]
    rows: list[dict] = []
    for archive in archives:
        rows += measure(
            archive,
            features,
            chosen.strides,
            chosen.neighbourhoods,
            chosen.shrinkages,
            chosen.sigmas,
            chosen.shares,
            chosen.searches,
            members,
            variants=chosen.variants,
        )
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(rows, indent=1))
        print(to_markdown([row for row in rows if row["archive"] == archive.name]), flush=True)


if __name__ == "__main__":
    main()
