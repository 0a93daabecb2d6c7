"""A model converted to another density, beside one that is fitted with it."""

import numpy as np
import pyarrow.parquet as pq
import pytest

import padim_ray
from padim_ray import PadimError
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location

pytestmark = pytest.mark.usefixtures("ray_cluster")

SMALL = {"image_size": 64, "n_features": 40, "precision": "float32"}


@pytest.fixture(scope="module")
def models(archive, weights, tmp_path_factory, ray_cluster):
    """A model of Gaussians per cell, and one of a shared Gaussian, of the same images."""
    root = tmp_path_factory.mktemp("models")
    for density in ("gaussian", "shared"):
        padim_ray.fit(
            images=f"{archive}/{{group}}/train/good/*",
            model=str(root / density),
            weights=weights,
            density=density,
            **SMALL,
        )
    return root


def scores(model, archive, out):
    padim_ray.score(images=f"{archive}/{{group}}/test/{{defect}}/*", model=str(model), out=str(out))
    table = pq.read_table(out / "results").sort_by("uri")
    return table["score"].to_numpy(), table["p_value"].to_numpy(), table["model_version"].to_numpy()


def test_a_converted_model_is_the_one_that_is_fitted(models, archive, tmp_path, caplog):
    summary = padim_ray.convert(str(models / "gaussian"), density="shared")
    assert summary.listed == 0
    assert "no thresholds and no p-values" in caplog.text
    version = open_version(Location.of(str(models / "gaussian")))
    assert version.number == 2
    assert version.spec.density.kind == "shared"
    assert [entry.calibrated for entry in version.groups.values()] == [0, 0]
    manifest = version.load_manifest()
    assert manifest["leave_one_out_score"].null_count == manifest.num_rows == 24 + 15
    converted, p_values, _ = scores(models / "gaussian", archive, tmp_path / "converted")
    fitted, _, _ = scores(models / "shared", archive, tmp_path / "fitted")
    np.testing.assert_allclose(converted, fitted, rtol=1e-5)
    assert np.isnan(p_values).all()

    again = padim_ray.convert(str(models / "gaussian"), density="shared")
    assert again.places["model"].endswith("(version 2)")

    # and back: what the statistics are is lost by neither
    padim_ray.convert(str(models / "gaussian"), density="gaussian", calibrate="readable")
    back = open_version(Location.of(str(models / "gaussian")))
    first = open_version(Location.of(str(models / "gaussian")), 1)
    assert back.number == 3 and back.spec == first.spec
    for group in back.groups:
        np.testing.assert_allclose(
            back.load_calibration(group).scores, first.load_calibration(group).scores, rtol=1e-5
        )


def test_a_shared_gaussian_is_calibrated_updated_and_finds_defects(models, archive, tmp_path):
    root = Location.of(str(models / "shared"))
    version = open_version(root)
    assert [version.groups[group].calibrated for group in ("bolt", "nut")] == [24, 15]
    values, p_values, _ = scores(models / "shared", archive, tmp_path / "out")
    table = pq.read_table(tmp_path / "out/results").sort_by("uri")
    is_good = np.array([defect == "good" for defect in table["defect"].to_pylist()])
    assert (p_values[~is_good] < 0.1).all()
    assert p_values[is_good].mean() > 0.2
    padim_ray.update(images=f"{archive}/{{group}}/test/good/*", model=root.uri)
    updated = open_version(root)
    assert updated.spec.density.kind == "shared"
    assert updated.groups["bolt"].images == 24 + 6
    padim_ray.forget(images=f"{archive}/{{group}}/test/good/*", model=root.uri)
    again, _, _ = scores(models / "shared", archive, tmp_path / "again")
    np.testing.assert_allclose(again, values, rtol=1e-4)


def test_an_unknown_density_is_a_sentence(models):
    with pytest.raises(PadimError, match="Unknown density 'svd'; known are gaussian, shared"):
        padim_ray.convert(str(models / "gaussian"), density="svd")
