import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import padim_ray
from padim_ray import cli
from padim_ray.errors import PadimError, TooManyFailed
from padim_ray.pipeline.jobs import evaluate, fit, score
from padim_ray.runs.options.common import JobOptions, from_mapping
from padim_ray.runs.options.compare import CompareOptions
from padim_ray.runs.options.evaluate import EvaluateOptions
from padim_ray.runs.options.fit import FitOptions, VersionOptions
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.options.score import ScoreOptions

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--images", "a/*.png", "--model", "m"]
SCORE = ["score", "--images", "a/*.png", "--model", "m", "--out", "o"]
SUMMARY = SimpleNamespace()
NESTED = {"anon": True, "a": {"b": [1]}}
SHARED = """
    --images --manifest --model --storage-options --address --max-failed --batch-size --actors
    --config --overwrite --max-image-pixels --max-image-bytes --group-memory
"""
SCORING = """
    --out --heatmaps --top --maps --alpha --threshold --pixel-alpha --min-region-area
    --report-images
"""
OPTIONS = {
    "fit": SHARED
    + """
    --backbone --weights --layers --image-size --crop --n-features --regularization --shrinkage
    --ridge --epsilon --seed --precision --sigma --calibration-images
    --round-images
""",
    "update": SHARED + "--round-images",
    "forget": SHARED + "--round-images",
    "merge": SHARED.replace("--images", "").replace("--manifest", "")
    + "--round-images --calibrate",
    "score": SHARED + SCORING,
    "evaluate": SHARED + SCORING + "--masks --normal",
    "compare": SHARED.replace("--model", "") + "--out --alpha --report-images",
}


def exit_code(command, *arguments):
    with pytest.raises(SystemExit) as exit_:
        command([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture
def parsed(monkeypatch):
    """Parse a command line; the options that its job would be run with."""
    jobs = []

    def run(options):
        jobs.append(options)
        return SUMMARY

    monkeypatch.setattr(fit, "run_fit", run)
    monkeypatch.setattr(score, "run_score", run)
    monkeypatch.setattr(evaluate, "run_evaluate", run)

    def parse(*arguments):
        assert exit_code(cli.main, *arguments) == 0
        return jobs.pop()

    return parse


@pytest.fixture
def mistake(capsys, monkeypatch):
    """Run a command line that is a mistake; the sentence that it ends with."""
    for module, name in ((fit, "run_fit"), (score, "run_score")):
        monkeypatch.setattr(module, name, lambda options: pytest.fail(f"ran with {options}"))

    def run(*arguments):
        assert exit_code(cli.main, *arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("Error: ") and output.err.count("\n") == 1
        return output.err.removeprefix("Error: ").strip()

    return run


@pytest.fixture
def config(tmp_path):
    """A function that writes a configuration, from text or a mapping, and names the file."""

    def write(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def mentioned(text):
    return {word.strip(",.│") for word in text.split() if word.startswith("--")}


@pytest.mark.parametrize("width", ["80", "200"])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_mentions_every_option(command, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    assert exit_code(cli.main, command, "--help") == 0
    assert set(OPTIONS[command].split()) <= mentioned(capsys.readouterr().out)


@pytest.mark.parametrize("script", OPTIONS)
def test_jobs_are_scripts_for_any_directory(script, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / f"jobs/{script}.py", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Usage: jobs/{script}.py" in done.stdout
    assert set(OPTIONS[script].split()) <= mentioned(done.stdout)
    assert done.stderr == ""


def test_a_script_takes_the_commands_options(monkeypatch, config):
    done = []
    monkeypatch.setattr(score, "run_score", lambda options: done.append(options) or SUMMARY)
    assert exit_code(lambda a: cli.job_main(cli.score, a), *SCORE[1:], "--top", 7) == 0
    arguments = ("--config", config("model: m\nout: o\nmanifest: x"))
    assert exit_code(lambda a: cli.job_main(cli.score, a), *arguments) == 0
    assert [(options.top, options.manifest) for options in done] == [(7, None), (100, "x")]


def test_defaults_are_the_designs(parsed):
    options = parsed(*FIT)
    assert options == FitOptions(images="a/*.png", model="m")
    assert (options.image_size, options.crop, options.n_features) == ((256, 256), None, None)
    assert (options.seed, options.regularization, options.precision) == (42, "shrink", "auto")
    assert parsed(*SCORE) == ScoreOptions(images="a/*.png", model="m", out="o")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--image-size 224", {"image_size": (224, 224)}),
        ("--image-size 256 192 --crop 224", {"image_size": (256, 192), "crop": (224, 224)}),
        ("--crop 128 64 --seed 3", {"crop": (128, 64), "seed": 3}),
        ("--layers layer1,layer3", {"layers": ("layer1", "layer3")}),
        ("--layers layer1 layer3", {"layers": ("layer1", "layer3")}),
        ("--layers layer2", {"layers": ("layer2",)}),
        ("--n-features all", {"n_features": "all"}),
        ("--n-features 100", {"n_features": 100}),
        ("--regularization paper --epsilon 0.02", {"regularization": "paper", "epsilon": 0.02}),
        ("--shrinkage .2 --ridge 0 --sigma 0", {"shrinkage": 0.2, "ridge": 0.0, "sigma": 0.0}),
        ("--precision bfloat16 --batch-size 8", {"precision": "bfloat16", "batch_size": 8}),
        ("--backbone wide_resnet50_2 --weights w.pth", {"backbone": "wide_resnet50_2"}),
        ("--max-failed 0.05 --address auto", {"max_failed": 0.05, "address": "auto"}),
        ('--storage-options {"anon":true,"a":{"b":[1]}}', {"storage_options": NESTED}),
    ],
)
def test_fit_is_parsed(parsed, arguments, expected):
    options = parsed(*FIT, *arguments.split())
    assert {name: getattr(options, name) for name in expected} == expected


def test_verdicts_are_parsed(parsed):
    options = parsed(*SCORE, "--alpha", ".05", "--threshold", "12", "--pixel-alpha", "0.01")
    assert (options.alpha, options.threshold, options.pixel_alpha) == (0.05, 12.0, 0.01)
    options = parsed(*SCORE, "--min-region-area", "30", "--report-images", "0")
    assert (options.min_region_area, options.report_images) == (30, 0)
    assert parsed(*FIT, "--calibration-images", "0").calibration_images == 0


def test_evaluate_is_parsed(parsed):
    options = parsed("evaluate", *SCORE[1:], "--masks", "m/{name}.png", "--normal", "ok")
    expected = {"images": "a/*.png", "model": "m", "out": "o", "normal": "ok"}
    assert options == EvaluateOptions(**expected, masks="m/{name}.png")


def test_score_is_parsed(parsed):
    options = parsed(*SCORE, "--heatmaps", "all", "--top", "3", "--maps", "--overwrite")
    assert (options.heatmaps, options.top, options.maps, options.overwrite) == (
        "all",
        3,
        True,
        True,
    )
    assert parsed("score", "--manifest", "x", "--model", "m", "--out", "o").manifest == "x"


@settings(max_examples=30)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_arrives_as_it_was_given(text):
    options = json.dumps({"secret": text})
    got = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(fit, "run_fit", lambda options: got.append(options) or SUMMARY)
        assert exit_code(cli.main, *FIT, f"--address={text}", "--storage-options", options) == 0
    assert (got[0].address, got[0].storage_options) == (text, {"secret": text})


@pytest.mark.parametrize("style", ["-", "_"])
def test_a_configuration_gives_the_options(parsed, config, style):
    content = {
        "images": "b/{group}/*.png",
        "model": "m",
        "image-size": [256, 192],
        "crop": 128,
        "layers": ["layer1", "layer2"],
        "n-features": "all",
        "max-failed": 0.5,
        "storage-options": {"client_kwargs": {"region_name": "x"}, "anon": True, "since": "2026"},
        "address": None,
    }
    path = config({name.replace("-", style): value for name, value in content.items()})
    expected = FitOptions(
        images="b/{group}/*.png",
        model="m",
        image_size=(256, 192),
        crop=128,
        layers=("layer1", "layer2"),
        n_features="all",
        max_failed=0.5,
        storage_options=content["storage-options"],
    )
    assert parsed("fit", "--config", path) == parsed("--config", path, "fit") == expected


def test_a_configuration_may_hold_json_and_flags(parsed, config):
    path = config(
        """{images: b, model: m, out: o, storage_options: '{"anon": true}', maps: true}"""
    )
    options = parsed("score", "--config", path)
    assert (options.storage_options, options.maps, options.overwrite) == (
        {"anon": True},
        True,
        False,
    )
    dated = config("{images: b, model: m, out: o, storage-options: {since: 2026-11-20}}")
    assert parsed("score", "--config", dated).storage_options == {"since": "2026-11-20"}


def test_the_command_line_wins_over_the_configuration(parsed, config):
    path = config(
        {"images": "b", "model": "n", "image_size": [64, 32], "storage_options": {"a": 1, "b": 2}}
    )
    options = parsed(*FIT, "--config", path, "--image-size", 128, "--storage-options", '{"c": 3}')
    assert (options.images, options.model) == ("a/*.png", "m")
    assert (options.image_size, options.storage_options) == ((128, 128), {"c": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("images: a\nmodel: m\nimagesize: 3", "imagesize"),
        ("images: a\nmodel: m\nout: o", "out"),  # score's
        ("images: a\nmodel: m\nseed: x", "seed"),
        ("images: a\nmodel: m\nimage_size: null", "--image-size takes one or two positive num"),
        ("images: [", "is not YAML: expected the node content"),
        ("images: a\n\tmodel: m", "is not YAML: found character"),
        ("- images", "must map options to values"),
        ("", "must map options to values"),
        (None, "can't be read: .*No such file"),
    ],
)
def test_unusable_configurations_are_refused(mistake, config, tmp_path, content, message):
    path = tmp_path / "none.yaml" if content is None else config(content)
    sentence = mistake("fit", "--config", path)
    assert re.search(message, sentence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FIT[:3], "--model"),
        (SCORE[:-2], "--out"),
        (["fit", "--model", "m"], "either --images or --manifest"),
        ([*FIT, "--manifest", "x"], "either --images or --manifest"),
        ([*FIT, "--imagesize", "3"], "--imagesize"),
        ([*FIT, "--out", "o"], "--out"),
        ([*FIT, "more"], "more"),
        (["fot"], "fot"),
        ([*FIT, "--image-size", "1", "2", "3"], "--image-size takes one or two positive numbers"),
        ([*FIT, "--image-size", "big"], "--image-size"),
        ([*FIT, "--crop", "0"], "--crop takes one or two positive numbers, not (0,)"),
        ([*FIT, "--n-features", "most"], "--n-features"),
        ([*FIT, "--precision", "float16"], "--precision"),
        ([*FIT, "--regularization", "none"], "--regularization"),
        ([*FIT, "--sigma", "-1"], "--sigma must not be negative, but is -1.0"),
        ([*FIT, "--batch-size", "0"], "--batch-size must be at least 1, but is 0"),
        ([*FIT, "--actors", "-2"], "--actors must be at least 1, but is -2"),
        ([*FIT, "--max-failed", "-1"], "--max-failed must not be negative"),
        ([*FIT, "--storage-options", "{anon: true}"], "--storage-options: must be JSON"),
        (
            [*FIT, "--storage-options", "[1]"],
            '--storage-options: must be a JSON object, such as {"',
        ),
        ([*SCORE, "--heatmaps", "some"], "--heatmaps"),
        ([*SCORE, "--top", "0"], "--top must be at least 1, but is 0"),
        ([*SCORE, "--alpha", "0"], "--alpha must be above 0 and below 1, but is 0.0"),
        ([*SCORE, "--alpha", "nan"], "--alpha must be above 0 and below 1, but is nan"),
        ([*SCORE, "--pixel-alpha", "1"], "--pixel-alpha must be above 0 and below 1, but is 1.0"),
        ([*SCORE, "--threshold", "inf"], "--threshold must be a finite number"),
        ([*SCORE, "--threshold", "-1"], "--threshold must not be negative"),
        ([*SCORE, "--min-region-area", "-1"], "--min-region-area must not be negative"),
        ([*SCORE, "--report-images", "-1"], "--report-images must not be negative"),
        ([*FIT, "--calibration-images", "-1"], "--calibration-images must not be negative"),
    ],
)
def test_mistakes_end_with_one_sentence(mistake, arguments, message):
    assert message in mistake(*arguments)


def test_a_mistake_that_a_job_finds_ends_with_its_sentence(capsys, monkeypatch):
    def run(options):
        raise padim_ray.ModelError("There is no model at m")

    monkeypatch.setattr(score, "run_score", run)
    assert exit_code(cli.main, *SCORE) == 2
    assert capsys.readouterr().err == "Error: There is no model at m\n"


@pytest.mark.parametrize("arguments", [FIT, SCORE])
def test_too_many_failed_images_have_their_own_exit_code(monkeypatch, capsys, arguments):
    def run(options):
        raise TooManyFailed("9 of the 10 images read so far failed")

    for module, name in ((fit, "run_fit"), (score, "run_score")):
        monkeypatch.setattr(module, name, run)
    assert exit_code(cli.main, *arguments) == 3
    assert capsys.readouterr().err == "Error: 9 of the 10 images read so far failed\n"


def test_a_defect_of_ours_has_a_traceback_without_secrets(monkeypatch, capsys):
    def run(options):
        raise ZeroDivisionError("https://ann:pa55word@host/x")

    monkeypatch.setattr(score, "run_score", run)
    assert exit_code(cli.main, *SCORE) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "https://***@host/x" in told and "pa55word" not in told


@pytest.mark.parametrize("option", ["images", "model", "out"])
def test_credentials_in_uris_are_refused(option, capsys):
    given = {"images": "a/*.png", "model": "m", "out": "o"} | {option: "https://ann:pa55@host/x"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert exit_code(cli.main, "score", *arguments) == 2
    told = capsys.readouterr().err
    assert f"--{option} holds credentials" in told and "pa55" not in told


def test_the_version_is_said(capsys):
    assert exit_code(cli.main, "--version") == 0
    assert capsys.readouterr().out.strip() == padim_ray.__version__


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            FitOptions,
            {"images": "a", "model": "m", "batch": 3},
            "Unknown option 'batch'; known are",
        ),
        (FitOptions, {"images": "a", "model": "m", "out": "o"}, "Unknown option 'out'"),
        (FitOptions, {"images": "a"}, "--model is needed"),
        (ScoreOptions, {"images": "a", "model": "m"}, "--out is needed"),
        (ScoreOptions, {"model": "m", "out": "o"}, "either --images or --manifest"),
        (
            ScoreOptions,
            {"images": "a", "model": "m", "out": "o", "heatmaps": "x"},
            "--heatmaps must",
        ),
        (FitOptions, {"images": "a", "model": "m", "image_size": None}, "--image-size takes"),
        (FitOptions, {"images": "a", "model": "m", "crop": (1, 2, 3)}, "--crop takes one or two"),
        (
            FitOptions,
            {"images": "a", "model": "m", "precision": "half"},
            "one of auto, float32, bf",
        ),
        (VersionOptions, {"images": "a", "model": "m@3"}, "--model m@3 names a version"),
        (MergeOptions, {"model": "s3://m/n@12"}, "leave @12 out"),
        (MergeOptions, {"model": "m", "calibrate": "all"}, "must be one of readable, none"),
        (CompareOptions, {"images": "a", "out": "o", "alpha": 1}, "--alpha must be above 0"),
        (CompareOptions, {"out": "o"}, "either --images or --manifest"),
        (ScoreOptions, {"images": "a", "model": "m", "out": "o", "group_memory": 0}, "at least 1"),
    ],
)
def test_mistakes_in_python_are_the_same_sentences(kind, options, message):
    with pytest.raises(PadimError, match=message):
        from_mapping(kind, options)


def test_python_takes_what_the_command_line_takes():
    options = {"images": "a", "model": "m", "image_size": 64, "layers": "layer1,layer2"}
    assert from_mapping(FitOptions, options) == FitOptions(
        images="a", model="m", image_size=(64, 64), layers=("layer1", "layer2")
    )


@pytest.mark.parametrize(
    ("max_failed", "most"), [(0, 0), (1, 1), (7, 7), (0.29, 29), (0.07, 7), (0.005, 0), (500, 100)]
)
def test_failures_are_allowed_up_to_a_number_or_a_share(max_failed, most):
    options = JobOptions(images="a", model="m", max_failed=max_failed)
    assert [options.allows(failed, 100) for failed in range(101)] == [
        failed <= most for failed in range(101)
    ]


@given(st.integers(1, 10**9), st.data())
def test_a_share_that_is_reached_exactly_is_allowed(listed, data):
    failed = data.draw(st.integers(0, listed - 1))
    options = JobOptions(images="a", model="m", max_failed=failed / listed)
    assert options.allows(failed, listed)
    assert not options.allows(failed + 1, listed)


def test_without_a_limit_any_number_may_fail():
    assert JobOptions(images="a", model="m").allows(100, 100)
