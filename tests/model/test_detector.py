"""The detector: trunk, density and anomaly map together, on one thread and on several."""

import pytest
import torch

from padim_ray.densities.gaussian.leave_one_out import NEGLIGIBLE_FROM
from padim_ray.model.detector import Detector, fit_density
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions
from tests.model.test_padim_model import images

COUNT = 43
PAPERS_CELLS = {"stride": 4, "neighbourhood": 1, "score_share": 0.0}  # levels of three grids


@pytest.fixture(scope="module", params=["gaussian", "shared"])
def spec_and_weights(request, weights):
    options = ModelOptions(
        weights=weights, image_size=(64,), n_features=60, density=request.param, **PAPERS_CELLS
    )
    return new_spec(options, "float32")


@pytest.fixture
def detectors(spec_and_weights):
    """The same detector on one thread, and on three."""
    threads = torch.get_num_threads()
    yield Detector(*spec_and_weights, "cpu"), Detector(*spec_and_weights, "cpu", threads=3)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def train():
    return images(0, COUNT)


def sum_statistics(detector, train):
    return detector.add_(detector.empty_statistics(), detector.embed(train))


def fit(detector, train):
    return detector.load(fit_density(detector.spec, sum_statistics(detector, train)))


def test_detecting_is_embedding_measuring_and_mapping(detectors, train):
    detector, test = detectors[0], images(1, 5)
    fitted = fit(detector, train)
    nested = detector.density.distances(fitted, detector.embed(test))
    distances = detector.spec.grid.unnest(nested)
    maps = detector.spec.mapper.maps(distances)
    found = detector.detect(test, fitted)
    assert torch.equal(found.distances, distances) and distances.shape == (5, 16, 16)
    assert torch.equal(found.maps, maps) and maps.shape == (5, 64, 64)
    assert torch.equal(found.scores, maps.flatten(1).amax(1))


def test_threads_give_the_same_statistics(detectors, train):
    one, three = (sum_statistics(detector, train) for detector in detectors)
    assert one.count == three.count == COUNT
    for name, tensor in one.named.items():
        atol = 1e-5 * float(tensor.abs().max())
        torch.testing.assert_close(three.named[name], tensor, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("left_out_of", [None, COUNT, NEGLIGIBLE_FROM])
def test_threads_give_the_same_distances(detectors, train, left_out_of):
    if left_out_of == NEGLIGIBLE_FROM and detectors[0].density.kind != "gaussian":
        pytest.skip("only a Gaussian per cell neglects an image's share in the regularisation")
    fitted = fit(detectors[0], train)
    one, three = (
        detector.detect(train, fitted, left_out_of=left_out_of).distances for detector in detectors
    )
    torch.testing.assert_close(three, one, rtol=1e-5, atol=0)


def test_left_out_images_are_further_away(detectors, train):
    fitted = fit(detectors[0], train)
    plain, left_out = (
        detectors[0].detect(train, fitted, left_out_of=left_out_of).distances.mean((1, 2))
        for left_out_of in (None, COUNT)
    )
    assert (left_out > plain).all()
