"""Update and forget, compared with a fit to the same images, on S3."""

import numpy as np
import pytest

import padim_ray
from padim_ray import ModelError
from padim_ray.model.history import prune, roll_back
from padim_ray.model.layout import current_number
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.end_to_end.line import Line, assert_same_model

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.parametrize("place", ["s3"], indirect=True),
]


@pytest.fixture
def line(place, archive, weights):
    """An archive of 16 bolts and 15 nuts, and a model of half of the bolts and all the nuts."""
    return Line(place, archive, weights)


def test_an_update_equals_fitting_to_all(line, caplog):
    bolts, nuts = line.files["bolt"], line.files["nut"]
    line.fit("updated", *bolts[:9], *nuts)
    line.put("washer", "broken.png", b"no image")
    for index, uri in enumerate(bolts[:5]):
        line.put("washer", f"{index}.png", Location.of(uri, line.root.options).read())
    washers = line.files["washer"]
    summary = line.change(padim_ray.update, "updated", *bolts, *nuts, *washers)
    assert (summary.listed, summary.done, summary.failed) == (7 + 6, 7 + 5, 1)
    assert summary.skipped == 9 + len(nuts)
    assert summary.sampled == summary.calibrated == 12 + 5  # bolts and washers
    line.fit("whole", *bolts, *nuts, *washers)
    root = line.model("updated")
    updated, whole = open_version(root), open_version(line.model("whole"))
    assert updated.number == 2
    assert_same_model(updated, whole, 1e-6)
    everything = (*bolts, *nuts, *washers[1:])
    np.testing.assert_allclose(
        line.scores("updated", *everything), line.scores("whole", *everything), rtol=1e-4
    )
    # the group without new images still has its old file
    assert updated.home("nut") == 1 and updated.home("bolt") == updated.home("washer") == 2
    assert not any("nut" in name for name in (root / "versions/000002").file_sizes())
    # without new images nothing happens, except a warning about a changed image
    Location.of(nuts[0], line.root.options).write(b"another image")
    again = line.change(padim_ray.update, "updated", *bolts, *nuts, *washers[1:])
    assert (again.listed, current_number(root)) == (0, 2)
    assert (
        f"1 of them have changed since then, such as {nuts[0]}; the model keeps their old content"
        in (caplog.text)
    )
    # pruning keeps the files that a kept version refers to, and old versions still work
    prune(root, keep=1)
    open_version(root).load_statistics("nut")
    with pytest.raises(ModelError, match="no version 1"):
        roll_back(root, 1)


def test_forgetting_equals_fitting_without(line):
    bolts, nuts = line.files["bolt"], line.files["nut"]
    line.fit("forgetful", *bolts, *nuts)
    summary = line.change(padim_ray.forget, "forgetful", *bolts[4:9])
    assert (summary.listed, summary.done) == (5, 5)
    line.fit("without", *bolts[:4], *bolts[9:], *nuts)
    forgetful, without = (open_version(line.model(name)) for name in ("forgetful", "without"))
    assert_same_model(forgetful, without, 1e-5)
    np.testing.assert_allclose(
        line.scores("forgetful", *bolts, *nuts), line.scores("without", *bolts, *nuts), rtol=1e-4
    )
    # adding the images again restores the model
    line.change(padim_ray.update, "forgetful", *bolts[4:9])
    assert_same_model(
        open_version(line.model("forgetful")), open_version(line.model("forgetful"), 1), 1e-5
    )


def test_images_that_cant_be_forgotten_are_named(line):
    bolts, nuts = line.files["bolt"], line.files["nut"]
    line.fit("kept", *bolts, *nuts)
    root = line.model("kept")
    with pytest.raises(ModelError, match="'bolt' would be left with 1 image, and a covariance"):
        line.change(padim_ray.forget, "kept", *bolts[1:])
    line.put("bolt", "new.png", Location.of(bolts[0], line.root.options).read())
    with pytest.raises(ModelError, match=r"None of the 1 listed images is in the model.*new\.png"):
        line.change(padim_ray.forget, "kept", line.files["bolt"][-1])
    Location.of(bolts[3], line.root.options).write(b"another image")
    with pytest.raises(ModelError, match=r"can't be taken out .* changed since it was listed"):
        line.change(padim_ray.forget, "kept", *bolts[:4])
    assert current_number(root) == 1
    # without the changed image it works, and nothing of the failed attempt is left
    line.change(padim_ray.forget, "kept", *bolts[:3], overwrite=True)
    assert open_version(root).groups["bolt"].images == 13


@pytest.mark.parametrize(
    ("where", "point"),
    [("model.rounds", "fit:round-committed"), ("model.publish", "fit:model-written")],
)
@pytest.mark.parametrize("job", [padim_ray.update, padim_ray.forget])
def test_a_killed_change_is_continued(line, monkeypatch, job, where, point):
    bolts, nuts = line.files["bolt"], line.files["nut"]
    before, after = (bolts[:9], bolts) if job is padim_ray.update else (bolts, bolts[:9])
    line.fit("model", *before, *nuts)
    root = line.model("model")

    def end(name):
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(f"padim_ray.{where}.kill_at", end)
    with pytest.raises(KeyboardInterrupt):
        line.change(job, "model", *bolts[9:])
    monkeypatch.undo()
    assert current_number(root) == 1
    summary = line.change(job, "model", *bolts[9:])
    assert (summary.listed, summary.before, summary.failed) == (7, 7, 0)
    assert current_number(root) == 2
    assert (root / "versions/000002/rounds").list_files() == []
    line.fit("other", *after, *nuts)
    assert_same_model(open_version(root), open_version(line.model("other")), 1e-5)
