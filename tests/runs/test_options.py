"""Options checked by their own constructors, as Python calls them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.errors import PadimError
from padim_ray.runs.options.common import JobOptions, from_mapping
from padim_ray.runs.options.compare import CompareOptions
from padim_ray.runs.options.evaluate import EvaluateOptions
from padim_ray.runs.options.fit import FitOptions, VersionOptions
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.options.model import ModelOptions
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.runs.options.score import ScoreOptions

NEEDED = {
    FitOptions: {"images": "a", "model": "m"},
    VersionOptions: {"images": "a", "model": "m"},
    MergeOptions: {"model": "m"},
    ScoreOptions: {"images": "a", "model": "m", "out": "o"},
    EvaluateOptions: {"images": "a", "model": "m", "out": "o"},
    CompareOptions: {"images": "a", "out": "o"},
    PlanOptions: {"images": "a"},
}


def test_defaults_are_the_documented_ones():
    options = FitOptions(**NEEDED[FitOptions])
    assert (options.image_size, options.crop, options.n_features) == ((256, 256), None, None)
    assert (options.seed, options.regularization, options.precision) == (42, "shrink", "auto")
    assert (options.calibration_images, options.round_images, options.gpus) == (2000, 20_000, None)
    assert ScoreOptions(**NEEDED[ScoreOptions]).report_images == 200
    assert CompareOptions(**NEEDED[CompareOptions]).report_images == 50
    assert PlanOptions(**NEEDED[PlanOptions]).gpus == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FitOptions, {"manifest": "b"}, "either --images or --manifest"),
        (FitOptions, {"image_size": None}, "--image-size takes one or two"),
        (FitOptions, {"crop": (1, 2, 3)}, "--crop takes one or two"),
        (FitOptions, {"precision": "half"}, "--precision must be one of auto, float32, bfloat16"),
        (FitOptions, {"sigma": -1}, "--sigma must not be negative, but is -1"),
        (FitOptions, {"ridge": float("inf")}, "--ridge must be a finite number"),
        (FitOptions, {"regularization": "none"}, "--regularization must be one of shrink, paper"),
        (FitOptions, {"calibration_images": -1}, "--calibration-images must not be negative"),
        (FitOptions, {"round_images": 0}, "--round-images must be at least 1, but is 0"),
        (FitOptions, {"max_image_pixels": 0}, "--max-image-pixels must be at least 1"),
        (FitOptions, {"model": ""}, "--model is empty"),
        (FitOptions, {"gpus": -1}, "--gpus must not be negative"),
        (VersionOptions, {"model": "m@3"}, "--model m@3 names a version"),
        (VersionOptions, {"max_failed": -1}, "--max-failed must not be negative"),
        (MergeOptions, {"model": "s3://m/n@12"}, "leave @12 out"),
        (MergeOptions, {"calibrate": "all"}, "--calibrate must be one of readable, none"),
        (ScoreOptions, {"heatmaps": "x"}, "--heatmaps must be one of anomalous, all, none, top"),
        (ScoreOptions, {"top": 0}, "--top must be at least 1"),
        (ScoreOptions, {"alpha": 1}, "--alpha must be above 0 and below 1, but is 1"),
        (ScoreOptions, {"pixel_alpha": 0}, "--pixel-alpha must be above 0 and below 1"),
        (ScoreOptions, {"threshold": float("nan")}, "--threshold must be a finite number"),
        (ScoreOptions, {"min_region_area": -1}, "--min-region-area must not be negative"),
        (ScoreOptions, {"group_memory": 0}, "--group-memory must be at least 1"),
        (EvaluateOptions, {"report_images": -1}, "--report-images must not be negative"),
        (
            EvaluateOptions,
            {"images": None, "manifest": "x", "masks": "y"},
            "--masks needs --images; a manifest has a column 'mask_uri'",
        ),
        (CompareOptions, {"alpha": 0}, "--alpha must be above 0"),
        (CompareOptions, {"report_images": -1}, "--report-images must not be negative"),
        (PlanOptions, {"images": None}, "either --images or --manifest"),
        (PlanOptions, {"max_image_bytes": 0}, "--max-image-bytes must be at least 1"),
        (PlanOptions, {"round_images": 0}, "--round-images must be at least 1"),
        (PlanOptions, {"calibration_images": -1}, "--calibration-images must not be negative"),
        (PlanOptions, {"sample": -1}, "--sample must not be negative"),
        (PlanOptions, {"precision": "half"}, "--precision must be one of"),
    ],
)
def test_mistakes_are_sentences(kind, options, message):
    kind(**NEEDED[kind])
    with pytest.raises(PadimError, match=message):
        kind(**NEEDED[kind] | options)


@pytest.mark.parametrize("name", ["batch", "out"])
def test_unknown_options_are_named(name):
    with pytest.raises(PadimError, match=f"Unknown option '{name}'; known are actors, address"):
        from_mapping(FitOptions, NEEDED[FitOptions] | {name: 1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "model") for kind in (FitOptions, VersionOptions, MergeOptions, ScoreOptions)),
        *((kind, "out") for kind in (ScoreOptions, EvaluateOptions, CompareOptions)),
    ],
)
def test_what_is_missing_is_named(kind, name):
    others = {key: value for key, value in NEEDED[kind].items() if key != name}
    with pytest.raises(PadimError, match=f"--{name} is needed"):
        from_mapping(kind, others)


def test_fits_model_options_are_those_of_the_library():
    settings = {"image_size": (64, 32), "layers": ("layer1",), "sigma": 2.0, "seed": 7}
    options = FitOptions(**NEEDED[FitOptions], **settings)
    assert options.model_options == ModelOptions(**settings)


@given(st.integers(1, 10**9), st.data())
def test_a_share_that_is_reached_exactly_is_allowed(listed, data):
    failed = data.draw(st.integers(0, listed - 1))
    options = JobOptions(images="a", model="m", max_failed=failed / listed)
    assert options.allows(failed, listed)
    assert not options.allows(failed + 1, listed)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_a_number_is_allowed_up_to_itself(limit, listed):
    options = JobOptions(images="a", model="m", max_failed=limit)
    assert options.allows(limit, listed) and not options.allows(limit + 1, listed)


@given(st.integers(0, 10**9))
def test_by_default_one_per_cent_is_allowed_or_ten(listed):
    options = JobOptions(images="a", model="m")
    most = max(10, listed // 100)
    assert options.allows(most, listed) and not options.allows(most + 1, listed)


def test_the_causes_to_retry_must_exist():
    ScoreOptions(**NEEDED[ScoreOptions], retry_failed=("fetch: not found", "decode"))
    with pytest.raises(PadimError, match="--retry-failed 'x' names no cause: begin with one of fe"):
        ScoreOptions(**NEEDED[ScoreOptions], retry_failed=("x",))
