"""The seam: a density that is registered works like the others, from fit to leave-one-out."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from padim_ray import ModelError, PadimModel
from padim_ray.densities import DENSITIES, density_of_json
from padim_ray.densities.base import Density, Fitted, Statistics
from padim_ray.features.workers import ONE_BY_ONE
from padim_ray.model.version import open_named
from tests.model.test_padim_model import images


def cut(tensors, start, stop):
    """The coarsest cells [start, stop) and their descendants, as views."""
    coarsest = len(tensors[-1])
    return tuple(t[start * len(t) // coarsest : stop * len(t) // coarsest] for t in tensors)


@dataclass(frozen=True)
class Sums(Statistics):
    """Sums of embeddings: per level (P_ℓ, c_ℓ) float64."""

    count: int
    sums: tuple[torch.Tensor, ...]

    @property
    def named(self):
        return {f"sum.{level}": tensor for level, tensor in enumerate(self.sums)}

    def packed(self):
        return {"count": torch.tensor(self.count)} | self.named

    def cells(self, start, stop):
        return Sums(self.count, cut(self.sums, start, stop))

    def to(self, target):
        return Sums(self.count, tuple(tensor.to(target) for tensor in self.sums))

    def add_(self, embeddings, workers=ONE_BY_ONE):
        for total, patches in zip(self.sums, embeddings.patches(), strict=True):
            total += patches.double().sum(-1)
        return Sums(self.count + len(embeddings), self.sums)

    def double(self):
        return self

    def __add__(self, other):
        sums = (a + b for a, b in zip(self.sums, other.sums, strict=True))
        return Sums(self.count + other.count, tuple(sums))

    def __sub__(self, other):
        if other.count > self.count:
            raise ValueError(f"can't subtract {other.count} images from {self.count}")
        sums = (a - b for a, b in zip(self.sums, other.sums, strict=True))
        return Sums(self.count - other.count, tuple(sums))


@dataclass(frozen=True)
class Means(Fitted):
    """Means of embeddings: per level (P_ℓ, c_ℓ) float32."""

    means: tuple[torch.Tensor, ...]

    @property
    def named(self):
        return {f"mean.{level}": tensor for level, tensor in enumerate(self.means)}

    def packed(self):
        return {name: tensor.contiguous() for name, tensor in self.named.items()}

    def cells(self, start, stop):
        return Means(cut(self.means, start, stop))

    def to(self, target):
        return Means(tuple(tensor.to(target) for tensor in self.means))


@dataclass(frozen=True)
class Count:
    """The number of images; cells share nothing else."""

    count: int
    nbytes: int = 0

    def __add__(self, other):
        return self


@dataclass(frozen=True)
class NearestMean(Density[Sums, Means, Count]):
    """The smallest density: the Euclidean distance from the mean embedding of a cell."""

    kind: ClassVar[str] = "nearest_mean"
    statistics_kind: ClassVar[str] = "sums"

    @classmethod
    def of_options(cls, options):
        return cls()

    @classmethod
    def of_json(cls, value, where):
        if value:
            raise ModelError(f"{where} has no settings, but has {sorted(value)}")
        return cls()

    def to_json(self):
        return {"kind": self.kind}

    def describe(self):
        return {"density": self.kind}

    def empty(self, grid, device="cpu"):
        shapes = zip(grid.cells, grid.channels, strict=True)
        return Sums(
            0, tuple(torch.zeros(*shape, dtype=torch.float64, device=device) for shape in shapes)
        )

    def statistics(self, count, named):
        return Sums(count, tuple(named[f"sum.{level}"] for level in range(len(named))))

    def unpack_statistics(self, packed):
        named = {name: tensor for name, tensor in packed.items() if name != "count"}
        return self.statistics(int(packed["count"]), named)

    def state_bytes(self, grid):
        return sum(tensor.nbytes for tensor in self.empty(grid, "meta").sums)

    def pool(self, statistics):
        return Count(statistics.count)

    def fit(self, statistics, pooled):
        return Means(tuple((total / statistics.count).float() for total in statistics.sums))

    def empty_fitted(self, grid, device="cpu"):
        shapes = zip(grid.cells, grid.channels, strict=True)
        return Means(tuple(torch.empty(*shape, device=device) for shape in shapes))

    def unpack_fitted(self, packed):
        return Means(tuple(packed[f"mean.{level}"] for level in range(len(packed))))

    def join(self, parts):
        levels = zip(*(part.means for part in parts), strict=True)
        return Means(tuple(torch.cat(level) for level in levels))

    @torch.inference_mode()
    def distances(self, fitted, embeddings, *, left_out_of=None, workers=ONE_BY_ONE):
        squared = 0
        for mean, patches in zip(fitted.means, embeddings.patches(), strict=True):
            squares = (patches - mean[..., None]).square().sum(1)
            spread = len(fitted.means[0]) // len(mean)
            squared = squared + squares.repeat_interleave(spread, 0)
        # without image x, the mean of n is μ − (x − μ) / (n − 1)
        scale = 1 if left_out_of is None else left_out_of / (left_out_of - 1)
        return scale * squared.sqrt()


DENSITY = NearestMean
SETTINGS = {"density": "nearest_mean", "image_size": 64, "n_features": 20, "precision": "float32"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(DENSITIES, NearestMean.kind, __name__)


@pytest.fixture
def model(weights):
    model = PadimModel(weights=weights, **SETTINGS)
    model.update(images(0, 6))
    model.update(images(1, 5))
    return model


def test_distances_of_a_new_density_make_the_maps(model):
    train, test = torch.cat([images(0, 6), images(1, 5)]), images(2, 3)
    fitted, scored = (model._detector.embedder.trunk(part) for part in (train, test))
    squared = torch.zeros(3, 16, 16, device=fitted[0].device)
    for mean, level in zip((level.mean(0) for level in fitted), scored, strict=True):
        squares = (level - mean).square().sum(1)
        spread = 16 // squares.shape[1]
        squared += squares.repeat_interleave(spread, 1).repeat_interleave(spread, 2)
    expected = model.spec.mapper.maps(squared.sqrt())
    torch.testing.assert_close(model.score(test).maps, expected.cpu(), rtol=1e-4, atol=1e-5)


def test_a_new_density_is_saved_loaded_and_updated(model, weights, tmp_path):
    model.save(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model/versions/000001/groups/default").iterdir()}
    assert names == {
        "sums-00000-of-00001.safetensors",
        "nearest_mean-00000-of-00001.safetensors",
    }
    loaded = PadimModel.load(str(tmp_path / "model"))
    assert torch.equal(loaded.score(images(2, 3)).maps, model.score(images(2, 3)).maps)
    for each in (loaded, model):
        each.update(images(3, 4))
    torch.testing.assert_close(loaded.score(images(2, 3)).maps, model.score(images(2, 3)).maps)


def test_a_new_density_is_calibrated_by_leave_one_out(model, weights):
    train = torch.cat([images(0, 6), images(1, 5)])
    scores = model.calibrate(train)
    for left_out in (0, 10):
        other = PadimModel(weights=weights, **SETTINGS)
        other.update(torch.cat([train[:left_out], train[left_out + 1 :]]))
        expected = other.score(train[left_out : left_out + 1]).scores.item()
        assert scores[left_out].item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(model.calibration().scores, np.sort(scores.numpy()))


def test_settings_of_a_new_density_are_read_from_model_json(model, tmp_path):
    model.save(str(tmp_path / "model"))
    assert open_named(str(tmp_path / "model")).spec.density == NearestMean()
    with pytest.raises(ModelError, match=r"spec\.density has no settings"):
        density_of_json({"kind": "nearest_mean", "x": 1}, "spec.density")


def test_an_unknown_density_is_refused(weights):
    with pytest.raises(ModelError, match="Unknown density 'flow'; known are gaussian, shared"):
        PadimModel(weights=weights, density="flow")
