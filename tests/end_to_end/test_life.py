"""Models merged and compared, versions rolled back and pruned, on S3."""

import json
import logging
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import padim_ray
from padim_ray import ModelError, PadimError, PadimModel, cli
from padim_ray.model.history import prune, roll_back
from padim_ray.model.layout import current_number, published_numbers
from padim_ray.model.version import open_version
from padim_ray.storage.location import Location
from tests.densities.test_moments import assert_close
from tests.end_to_end.line import Line, assert_same_model
from tests.model.test_padim_model import images

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def line(s3, archive, weights):
    """Two sites' models, both with bolts, two of which they share; and a model of all images."""
    bucket = Location.of(f"s3://bucket-{secrets.token_hex(4)}", s3.options)
    bucket.fs.mkdir(bucket.path)
    line = Line(bucket, archive, weights)
    for index, uri in enumerate(line.files["bolt"][:5]):
        line.put("washer", f"{index}.png", Location.of(uri, line.root.options).read())
    bolts, nuts, washers = (line.files[group] for group in ("bolt", "nut", "washer"))
    line.fit("hamburg", *bolts[:9], *nuts)
    line.fit("lyon", *bolts[7:], *washers)
    line.fit("all", *bolts, *nuts, *washers)
    return line


@pytest.fixture(scope="module")
def hamburg(line):
    """The summary of merging lyon's model into hamburg's, as its second version."""
    return merge(line, "hamburg", "hamburg", "lyon")


@pytest.fixture(scope="module")
def contested(line):
    """A model of four bolts."""
    line.fit("contested", *line.files["bolt"][:4])
    return line.model("contested")


def merge(line, name, *models, **options):
    return padim_ray.merge(
        *(line.model(model).uri for model in models),
        model=line.model(name).uri,
        storage_options=line.root.options,
        **options,
    )


def compare(line, before, after, name, uris, **options):
    return padim_ray.compare(
        line.model(before).uri,
        line.model(after).uri,
        manifest=line.manifest(f"compared-{name}", *uris),
        out=(line.root / f"comparisons/{name}").uri,
        storage_options=line.root.options,
        **options,
    )


def command(line, *arguments):
    """Run `padim-ray`, and return its exit code."""
    options = ["--storage-options", json.dumps(line.root.options)]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*map(str, arguments), *options])
    return exit_.value.code


def table(location):
    with location.as_local_file() as path:
        return pq.read_table(path)


def test_a_merged_model_equals_one_fitted_to_all_images(line, caplog):
    with caplog.at_level(logging.INFO, "padim_ray"):
        summary = merge(line, "merged", "hamburg@1", "lyon@1")
    assert (summary.listed, summary.done) == (2, 2)  # the images of both models
    assert (summary.sampled, summary.calibrated) == (12, 12)  # bolts; the other groups are copied
    assert "Calibrated with 12 images in" in caplog.text
    merged, fitted = (open_version(line.model(name)) for name in ("merged", "all"))
    assert_same_model(merged, fitted, 1e-6)
    hamburg = open_version(line.model("hamburg"))
    for copied, original in (
        (merged.statistics_file("nut", 0), hamburg.statistics_file("nut", 0)),
        (merged.density_file("nut", 0), hamburg.density_file("nut", 0)),
    ):
        assert copied.read() == original.read()
    everything = [uri for group in line.files.values() for uri in group]
    np.testing.assert_allclose(
        line.scores("merged", *everything), line.scores("all", *everything), rtol=1e-4
    )
    # the same command again does nothing
    caplog.clear()
    with caplog.at_level(logging.INFO, "padim_ray"):
        merge(line, "merged", "hamburg@1", "lyon@1")
    assert current_number(line.model("merged")) == 1
    assert "Nothing is left to do" in caplog.text


def test_merging_into_one_of_the_models_makes_its_next_version(line, hamburg, caplog):
    root = line.model("hamburg")
    assert hamburg.listed == 2
    version = open_version(root)
    assert version.number == 2
    assert_same_model(version, open_version(line.model("all")), 1e-6)
    # its own group keeps its file, the other model's group is copied
    homes = {group: version.home(group) for group in version.groups}
    assert homes == {"bolt": 2, "nut": 1, "washer": 2}
    assert not any("nut" in name for name in (root / "versions/000002").file_sizes())
    # merging again adds nothing, and reads no image
    assert merge(line, "hamburg", "hamburg", "lyon").listed == 0
    assert current_number(root) == 2
    assert "aren't merged" not in caplog.text
    # the current version's images are left out if it isn't named, with a warning
    merge(line, "hamburg", "hamburg@1", "lyon", calibrate="none")
    assert "has a version 2, whose images aren't merged" in caplog.text
    assert published_numbers(root) == [1, 2, 3]
    roll_back(root, 2)


@pytest.mark.parametrize(
    ("where", "point"),
    [("model.rounds", "fit:round-committed"), ("model.publish", "fit:model-written")],
)
def test_a_killed_merge_is_continued(line, monkeypatch, where, point):
    name = f"ended at {where}"

    def end(reached):
        if reached == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(f"padim_ray.{where}.kill_at", end)
    with pytest.raises(KeyboardInterrupt):
        merge(line, name, "hamburg@1", "lyon@1")
    monkeypatch.undo()
    assert current_number(line.model(name)) is None
    if where == "model.rounds":
        with pytest.raises(PadimError, match=r"unfinished merge with models .*hamburg@1 .*lyon@1"):
            merge(line, name, "all", "lyon@1")
    assert merge(line, name, "hamburg@1", "lyon@1").before == 2
    assert_same_model(open_version(line.model(name)), open_version(line.model("all")), 1e-6)


def test_models_from_python_are_merged_with_the_first_ones_settings(line, weights, caplog):
    options = {"weights": weights, "image_size": 64, "n_features": 20, "precision": "float32"}
    models = {
        "first": PadimModel(**options),
        "second": PadimModel(**options, regularization="paper", sigma=2),
        "both": PadimModel(**options),
    }
    for seed, (name, group) in enumerate(
        [("first", "bolt"), ("second", "bolt"), ("second", "nut")]
    ):
        for each in (name, "both"):
            models[each].update(images(seed, 6), group=group)
    for name, model in models.items():
        model.save(line.model(name).uri, line.root.options)
    merge(line, "settings", "first", "second")
    root = line.model("settings")
    merged, both = open_version(root), open_version(line.model("both"))
    assert merged.spec == both.spec
    loaded = PadimModel.load(root.uri, root.options)
    assert loaded.counts == {"bolt": 12, "nut": 6}
    for group in loaded.counts:
        assert_close(merged.load_statistics(group), both.load_statistics(group), 1e-6)
        np.testing.assert_allclose(
            loaded.score(images(9, 3), group=group).scores,
            models["both"].score(images(9, 3), group=group).scores,
            rtol=1e-4,
        )
    for told in (
        "second@1 has regularization paper (epsilon 0.01); the merged model uses the first model's",
        "second@1 has sigma 2; the merged model uses the first model's, 4",
        "12 images of ",
        "Group 'nut' has no thresholds and no p-values: its images were fitted as tensors",
    ):
        assert told in caplog.text


def test_models_that_cant_be_merged_are_named(line, weights):
    other = PadimModel(weights=weights, image_size=64, n_features=20, precision="float32")
    other.update(images(0, 4), group="bolt")
    other.save(line.model("other").uri, line.root.options)
    with pytest.raises(ModelError, match=r"other@1 can't be merged with .*channels of layer1 \("):
        merge(line, "refused", "hamburg@1", "other")
    for few in (["hamburg@1"], ["hamburg@1", "hamburg@1"]):
        with pytest.raises(PadimError, match="takes two or more different models"):
            merge(line, "refused", *few)
    with pytest.raises(ModelError, match="has no version 7; it has 1"):
        merge(line, "refused", "hamburg@7", "lyon@1")
    assert current_number(line.model("refused")) is None


def test_of_two_concurrent_changes_one_is_published_and_the_other_is_refused(
    line, contested, monkeypatch
):
    """The update waits just before it publishes, until the other jobs have been refused."""
    root, bolts = contested, line.files["bolt"]
    reached, go_on = threading.Event(), threading.Event()

    def wait(point):
        if point == "fit:version-written":
            reached.set()
            assert go_on.wait(300)

    monkeypatch.setattr("padim_ray.model.publish.kill_at", wait)
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(line.change, padim_ray.update, "contested", *bolts[:6])
        assert reached.wait(300)
        refusal = r"models/contested is being written by another update job: process \d+"
        for change in (
            lambda: line.change(padim_ray.forget, "contested", bolts[0]),
            lambda: merge(line, "contested", "contested", "lyon@1"),
            lambda: prune(root, 1),
        ):
            with pytest.raises(PadimError, match=refusal):
                change()
        assert current_number(root) == 1
        go_on.set()
        assert update.result().done == 2
    assert (current_number(root), open_version(root).groups["bolt"].images) == (2, 6)


def test_versions_are_listed_rolled_back_and_deleted(line, contested, capsys):
    root = contested
    # a second version, unless there is one
    line.change(padim_ray.update, "contested", *line.files["bolt"][:6])

    def told(*arguments):
        assert command(line, "info", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    info = told(root.uri)
    assert (info["current"], info["number"]) == (2, 2)
    assert [version["why"] for version in info["versions"]] == [
        "fitted to 4 images",
        "2 images added to version 1",
    ]
    assert info["groups"]["bolt"]["images"] == info["groups"]["bolt"]["calibrated"] == 6
    for earlier in (told(f"{root.uri}@1"), told(root.uri, "--version", "1")):
        assert (earlier["number"], earlier["groups"]["bolt"]["images"]) == (1, 4)
    assert command(line, "rollback", root.uri, 1) == 0
    assert current_number(root) == 1
    assert command(line, "prune", root.uri, "--keep", 5) == 0
    assert published_numbers(root) == [1, 2]
    assert command(line, "rollback", root.uri, 2) == 0
    assert command(line, "prune", root.uri, "--keep", 1) == 0
    assert (published_numbers(root), current_number(root)) == ([2], 2)
    open_version(root).load_statistics("bolt")
    assert command(line, "rollback", root.uri, 1) == 2
    assert "has no version 1; it has 2" in capsys.readouterr().err


def test_two_versions_are_compared(line, hamburg, archive, monkeypatch, capsys):
    bolts, nuts, washers = (line.files[group] for group in ("bolt", "nut", "washer"))
    spots = []
    for path in sorted((archive / "bolt/test/spot").glob("*.png")):
        spot = line.root / f"archive/bolt/spot-{path.name}"
        spot.write(path.read_bytes())
        spots.append(spot.uri)
    broken = line.root / "archive/nut/broken.jpg"
    broken.write(b"no image")
    uris = [*bolts, *spots, *nuts, broken.uri, *washers]
    out = line.root / "comparisons/versions"

    def run(**options):
        return compare(line, "hamburg@1", "hamburg@2", "versions", uris, **options)

    finished = []

    def end(point):
        if point == "score:run-json-written":
            finished.append(point)
            if len(finished) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("padim_ray.pipeline.jobs.scoring_run.kill_at", end)
    with pytest.raises(KeyboardInterrupt):
        run(report_images=8)
    monkeypatch.undo()
    before = (out / "before/run.json").read()
    with pytest.raises(PadimError, match=r"unfinished run with --alpha 0\.01, which is 0\.05"):
        run(report_images=8, alpha=0.05)
    comparison = run(report_images=8)
    assert (out / "before/run.json").read() == before  # not scored again
    assert json.loads(before)["model_version"] == 1
    # the figures follow from both runs' own results
    runs = [
        pd.concat(
            table(file).to_pandas() for file in (out / side / "results").list_files()
        ).set_index("uri")
        for side in ("before", "after")
    ]
    both = pd.merge(*runs, left_index=True, right_index=True, suffixes=("", "_after"))
    assert comparison.left_out == {"washer": 5}
    assert comparison.groups.keys() == {"bolt", "nut"}
    for group, figures in comparison.groups.items():
        of_group = both[both["group"] == group]
        scored = of_group.dropna(subset=["score", "score_after"])
        assert (figures.listed, figures.compared) == (len(of_group), len(scored))
        correlation = scored["score"].corr(scored["score_after"], "spearman")
        assert figures.rank_correlation == pytest.approx(correlation)
        was, now = (scored[name].astype(bool) for name in ("is_anomalous", "is_anomalous_after"))
        assert (figures.newly_flagged, figures.no_longer_flagged) == (
            int((now & ~was).sum()),
            int((was & ~now).sum()),
        )
    nut = comparison.groups["nut"]
    assert (nut.listed, nut.compared) == (len(nuts) + 1, len(nuts))
    assert nut.rank_correlation == pytest.approx(1) and nut.ratio_quantiles["0.5"] == 1
    rows = table(out / "compare.parquet").to_pandas().set_index("uri")
    assert set(rows.index) == set(both.index)
    for side, name in (("before", "score"), ("after", "score_after")):
        np.testing.assert_array_equal(rows[f"score_{side}"], both[name].loc[rows.index])
        heatmaps = (out / f"heatmaps/{side}/bolt").list_files()
        assert 0 < len(heatmaps) <= 8
    content = json.loads((out / "compare.json").read())
    assert content["compared"] == len(bolts) + len(spots) + len(nuts)
    page = (out / "compare.html").read().decode()
    assert "hamburg@1" in page and page.count('class="heat"') == 16
    # the same on the command line: the comparison is complete
    arguments = [f"{line.model('hamburg').uri}@{number}" for number in (1, 2)]
    arguments += ["--manifest", (line.root / "compared-versions.parquet").uri, "--out", out.uri]
    assert command(line, "compare", *arguments, "--report-images", 8) == 0
    assert (out / "before/run.json").read() == before
    assert command(line, "compare", arguments[0], arguments[0], *arguments[2:]) == 2
    assert "compare takes two versions, but was given" in capsys.readouterr().err
    with pytest.raises(PadimError, match="No group of the images is in both"):
        compare(line, "hamburg@1", "hamburg@2", "washers", washers)


def test_a_merge_works_without_images_that_only_the_other_site_can_read(line, caplog):
    """The last test of the module, since it removes images."""
    bolts, washers = line.files["bolt"], line.files["washer"]
    line.fit("there", *bolts[9:], *washers)
    for uri in (*bolts[9:], *washers):
        Location.of(uri, line.root.options).remove()
    summary = merge(line, "here", "hamburg@1", "there")
    here, whole = (open_version(line.model(name)) for name in ("here", "all"))
    for group in whole.groups:
        assert here.groups[group].images == whole.groups[group].images
    assert 0 < summary.calibrated < summary.sampled == 12
    assert here.groups["bolt"].calibrated == summary.calibrated
    assert here.groups["washer"].calibrated == 5  # copied with its model
    assert (
        "'bolt' is calibrated without images of" in caplog.text
        and "images like those of" in caplog.text
    )
    merge(line, "without", "hamburg@1", "there", calibrate="none")
    without = open_version(line.model("without"))
    assert {group: entry.calibrated for group, entry in without.groups.items()} == {
        "bolt": 0,
        "nut": 12,
        "washer": 5,
    }
    assert (
        "1 merged groups have no thresholds and no p-values, because of --calibrate none"
        in caplog.text
    )
    # an image of both models that can't be read can't be subtracted
    with pytest.raises(ModelError, match=r"2 images can't be taken out .*not found"):
        Location.of(bolts[7], line.root.options).remove()
        Location.of(bolts[8], line.root.options).remove()
        merge(line, "refused", "hamburg@1", "lyon@1")
    assert current_number(line.model("refused")) is None
