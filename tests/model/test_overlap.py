from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.densities.gaussian import GaussianDensity, Regularization
from padim_ray.errors import ModelError
from padim_ray.model.overlap import check_compatible, describe_settings, unite
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions

NAMES = ["A@1", "B@4", "C@2"]
GROUPS = ["bolt", "nut"]


@pytest.fixture(scope="module")
def spec(weights):
    return new_spec(ModelOptions(weights=weights, image_size=64, n_features=20), "float32")[0]


def manifest(images):
    """A manifest of numbered images; the values say which were fitted, and the others failed."""
    rows = sorted((GROUPS[number % 2], f"s3://b/{number:03d}.png") for number in images)
    numbers = [int(uri[-7:-4]) for _, uri in rows]
    return pa.table(
        {
            "uri": pa.array([uri for _, uri in rows], pa.string()),
            "group": pa.array([group for group, _ in rows], pa.string()),
            "size": pa.array([1000 + number for number in numbers], pa.int64()),
            "version_tag": pa.array([f"tag {number}" for number in numbers], pa.string()),
            "status": pa.array(
                ["fitted" if images[number] else "failed" for number in numbers], pa.string()
            ),
            "error": pa.array(
                [None if images[number] else "fetch: gone" for number in numbers], pa.string()
            ),
        }
    )


@given(
    st.lists(st.dictionaries(st.integers(0, 9), st.booleans(), max_size=8), min_size=2, max_size=3)
)
def test_every_image_counts_once(models):
    united = unite(NAMES[: len(models)], list(map(manifest, models)), [{}] * len(models))
    fitted = {number for model in models for number, good in model.items() if good}
    failed = {number for model in models for number in model} - fitted
    assert united.manifest.drop_columns(["error"]).equals(
        manifest({n: n in fitted for n in fitted | failed}).drop_columns(["error"])
    )
    # images in the summed statistics of all groups that aren't left out, minus the repeated ones
    sums = Counter(
        f"s3://b/{number:03d}.png"
        for index, model in enumerate(models)
        for number, good in model.items()
        if good and (index, GROUPS[number % 2]) not in united.left_out
    )
    sums.subtract(united.repeated["uri"].to_pylist())
    assert +sums == Counter(f"s3://b/{number:03d}.png" for number in fitted)
    assert "status" not in united.repeated.column_names


def test_groups_that_other_models_have_are_left_out():
    first, second = {0: True, 2: True, 1: True}, {0: True, 2: True, 3: True, 1: True}
    united = unite(NAMES[:2], [manifest(first), manifest(second)], [{}, {}])
    # both models have all bolts (0, 2): the second model's are left out; it has more nuts
    assert united.left_out == {(1, "bolt"), (0, "nut")}
    assert united.repeated.num_rows == 0
    # the second model has bolts without names, which may be others: the first's are left out
    united = unite(NAMES[:2], [manifest(first), manifest(second)], [{}, {"bolt": 5}])
    assert united.left_out == {(0, "bolt"), (0, "nut")}
    united = unite(NAMES[:2], [manifest(first), manifest(second)], [{"bolt": 1}, {"bolt": 5}])
    assert united.left_out == {(0, "nut")}
    assert united.repeated["uri"].to_pylist() == ["s3://b/000.png", "s3://b/002.png"]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("size", 7, "size 1003 and 7"),
        ("version_tag", "other", "version_tag tag 3 and other"),
        ("version_tag", None, "version_tag tag 3 and None"),
        ("group", "washer", "group nut and washer"),
    ],
)
def test_an_image_that_isnt_the_same_in_both_is_named(column, value, told):
    first, second = manifest({1: True, 3: True}), manifest({3: True, 5: True})
    index = second.column_names.index(column)
    values = [value, *second[column].to_pylist()[1:]]
    changed = second.set_column(index, column, pa.array(values, second[column].type))
    with pytest.raises(ModelError, match=rf"1 image can't.*003\.png \({told}\) in A@1 and B@4"):
        unite(NAMES[:2], [first, changed], [{}, {}])


def test_images_without_size_and_version_tag_are_refused():
    bare = manifest({1: True, 3: True}).select(["uri", "group", "status", "error"])
    with pytest.raises(ModelError, match="2 images can't be merged"):
        unite(NAMES[:2], [bare, bare], [{}, {}])


def test_models_without_names_of_images_are_united(spec):
    nothing = manifest({})
    united = unite(NAMES[:2], [nothing, nothing], [{"bolt": 3}, {"bolt": 4}])
    assert (united.manifest.num_rows, united.repeated.num_rows) == (0, 0)
    assert not united.left_out


def test_all_that_is_incompatible_is_named_with_both_values(spec):
    layers = dict(spec.channels)
    layers["layer1"] = [*layers["layer1"][:-1], 63]
    for other, told in (
        (replace(spec, stride=8), r"stride \(16 there, 8 here\)"),
        (replace(spec, neighbourhood=1), r"neighbourhood \(3 there, 1 here\)"),
        (replace(spec, precision="bfloat16"), r"precision \(float32 there, bfloat16 here\)"),
        (replace(spec, channels=layers), rf"channels of layer1 \(.* {spec.channels['layer1'][-1]}"),
        (replace(spec, weights_sha256=64 * "a"), r"weights \(SHA-256 \w{12}… there, .* aaaaaa"),
        (
            replace(
                spec,
                preprocessing=replace(spec.preprocessing, resize=(128, 128), crop=(64, 64)),
            ),
            r"image size \(64×64 there, 128×128 here\), crop \(none there, 64×64 here\)",
        ),
    ):
        with pytest.raises(ModelError, match=f"B can't be merged with A, .*{told}"):
            check_compatible({"A": spec, "B": other})


def test_regularisation_and_smoothing_may_differ(spec):
    density = GaussianDensity(Regularization("paper"))
    other = replace(spec, density=density, sigma=2.0, weights="elsewhere")
    check_compatible({"A": spec, "B": other})
    assert describe_settings(spec) == {
        "density": "gaussian",
        "regularization": "shrink (shrinkage 0.1, ridge 0.01)",
        "sigma": "4",
        "score share": "0.01",
        "search": "0",
    }
    assert describe_settings(other)["regularization"] == "paper (epsilon 0.01)"
