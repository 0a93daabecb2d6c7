"""The command line: options from wherever they are given, exit codes, errors as sentences."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import padim_ray
from padim_ray import PadimError, cli
from padim_ray.errors import ModelError, TooManyFailed
from padim_ray.pipeline.jobs import evaluate, fit, score
from padim_ray.runs.options.common import from_mapping
from padim_ray.runs.options.compare import CompareOptions
from padim_ray.runs.options.evaluate import EvaluateOptions
from padim_ray.runs.options.fit import FitOptions, VersionOptions
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.options.plan import PlanOptions
from padim_ray.runs.options.score import ScoreOptions

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--images", "a/*.png", "--model", "m"]
SCORE = ["score", "--images", "a/*.png", "--model", "m", "--out", "o"]
JOBS = {
    "fit": FitOptions,
    "update": VersionOptions,
    "forget": VersionOptions,
    "merge": MergeOptions,
    "score": ScoreOptions,
    "evaluate": EvaluateOptions,
    "compare": CompareOptions,
}
OTHERS = {"plan": PlanOptions, **dict.fromkeys(("report", "info", "rollback", "prune"))}


def exit_code(command, *arguments):
    with pytest.raises(SystemExit) as exit_:
        command([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module")
def parse():
    """Return the options that a command line would run its job with."""
    got = []

    def run(*arguments):
        assert exit_code(cli.main, *arguments) == 0
        return got.pop()

    with pytest.MonkeyPatch.context() as context:
        for module, name in ((fit, "run_fit"), (score, "run_score"), (evaluate, "run_evaluate")):
            context.setattr(module, name, got.append)
        yield run


@pytest.fixture
def run_score(monkeypatch, capsys):
    """Run `score` with a job that raises an error; return the exit code and stderr."""

    def run(error):
        def job(options):
            raise error

        monkeypatch.setattr(score, "run_score", job)
        return exit_code(cli.main, *SCORE), capsys.readouterr().err

    return run


@pytest.fixture
def mistake(capsys, monkeypatch):
    """Return the sentence that a mistaken command line ends with."""
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
    """Write a configuration file, from text or from a mapping."""

    def write(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def flags(kind):
    return {f"--{field.name.replace('_', '-')}" for field in fields(kind)} if kind else set()


@pytest.mark.parametrize(("command", "kind"), (JOBS | OTHERS).items())
def test_help_describes_every_option(command, kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert exit_code(cli.main, command, "--help") == 0
    shown = capsys.readouterr().out
    described = re.findall(r"^│ [* ]?\s*(--[\w-]+).*?[A-Z]\w+ ", shown, re.MULTILINE)
    assert flags(kind) | {"--config", "--storage-options"} <= set(described)


@pytest.mark.parametrize("command", JOBS)
def test_jobs_are_scripts_that_run_from_any_directory(command, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / f"jobs/{command}.py", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Usage: jobs/{command}.py" in done.stdout and "--storage-options" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["plan", "--help"]])
def test_help_imports_neither_torch_nor_ray(arguments):
    script = f"""
import sys
from padim_ray.cli import main
try:
    main({arguments})
finally:
    print({{"torch", "ray"}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "set()\n"


def test_the_version_is_printed(capsys):
    assert exit_code(cli.main, "--version") == 0
    assert capsys.readouterr().out.strip() == padim_ray.__version__


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
sizes = st.integers(1, 999)
pairs = st.lists(sizes, min_size=1, max_size=2)
shares = st.floats(0.001, 0.999)
FIT_VALUES = {
    "image_size": pairs,
    "crop": pairs,
    "layers": st.lists(st.sampled_from(["layer1", "layer2"]), min_size=1, max_size=2, unique=True),
    "n_features": st.integers(1, 99) | st.just("all"),
    "scaled_jpeg": st.just(True),
    "grey_range": st.lists(st.floats(0, 1e6), min_size=2, max_size=2, unique=True).map(sorted),
    "resize": st.just("letterbox"),
    "stride": sizes,
    "neighbourhood": sizes,
    "score_share": shares,
    "search": st.integers(0, 9),
    "search_maps": st.just(True),
    "precision": st.sampled_from(["float32", "bfloat16"]),
    "shrinkage": shares,
    "calibration_images": st.integers(0, 9),
    "round_images": sizes,
    "max_failed": shares,
    "gpus": st.integers(0, 9),
    "address": texts,
    "storage_options": st.dictionaries(texts, texts | st.booleans() | st.lists(sizes)),
}
SCORE_VALUES = {
    "alpha": shares,
    "threshold": shares,
    "heatmaps": st.sampled_from(["all", "none", "top"]),
    "report_images": st.integers(0, 9),
    "maps": st.just(True),
    "overwrite": st.just(True),
    "batch_size": sizes,
}


@settings(max_examples=25)
@given(
    st.sampled_from([(FIT, FitOptions, FIT_VALUES), (SCORE, ScoreOptions, SCORE_VALUES)]),
    st.sampled_from("-_"),
    st.data(),
)
def test_command_line_configuration_and_python_agree(tmp_path_factory, parse, job, style, data):
    (command, *needed), kind, values = job
    given_ = dict(zip([name[2:] for name in needed[::2]], needed[1::2], strict=True))
    chosen = data.draw(st.fixed_dictionaries({}, optional=values))
    expected = from_mapping(kind, given_ | chosen)

    arguments = []
    for name, value in chosen.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            arguments.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list):
            arguments += [flag, *value]
        else:
            arguments.append(flag if value is True else f"{flag}={value}")
    assert parse(command, *needed, *arguments) == expected

    path = tmp_path_factory.mktemp("config") / "config.yaml"
    content = {name.replace("_", style): value for name, value in (given_ | chosen).items()}
    path.write_text(yaml.safe_dump(content))
    assert parse(command, "--config", path) == parse("--config", path, command) == expected


def test_layers_may_be_separated_by_commas(parse):
    assert parse(*FIT, "--layers", "layer1,layer3").layers == ("layer1", "layer3")


def test_the_command_line_wins_over_the_configuration(parse, config):
    path = config(
        {"images": "b", "model": "n", "image_size": [64, 32], "storage_options": {"a": 1, "b": 2}}
    )
    options = parse(*FIT, "--config", path, "--image-size", 128, "--storage-options", '{"c": 3}')
    assert (options.images, options.model) == ("a/*.png", "m")
    assert (options.image_size, options.storage_options) == ((128, 128), {"c": 3})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("'{\"anon\": true}'", {"anon": True}),
        ("{since: 2026-11-20, a: {b: [1]}}", {"since": "2026-11-20", "a": {"b": [1]}}),
        ("null", None),
    ],
)
def test_a_configuration_writes_mappings_as_json_or_yaml(parse, config, written, expected):
    path = config(f"images: b\nmodel: m\nstorage_options: {written}")
    assert parse("fit", "--config", path).storage_options == expected


def test_a_script_takes_a_configuration(monkeypatch, config):
    done = []
    monkeypatch.setattr(score, "run_score", done.append)
    path = config("model: m\nout: o\nmanifest: x")
    assert exit_code(lambda a: cli.job_main(cli.score, a), "--config", path, "--top", 7) == 0
    assert done == [ScoreOptions(manifest="x", model="m", out="o", top=7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("images: a\nmodel: m\nimagesize: 3", "imagesize"),
        ("images: a\nmodel: m\nout: o", "out"),  # an option of score
        ("images: a\nmodel: m\nseed: x", "seed"),
        ("images: a\nmodel: m\nimage_size: null", "--image-size takes one or two positive num"),
        ("images: a\nmodel: m\nstorage_options: [1]", "storage_options in .* must map names"),
        ("images: [", "is not YAML: expected the node content"),
        ("images: a\n\tmodel: m", "is not YAML: found character"),
        ("images: \0", "is not YAML: it holds a character that YAML doesn't allow"),
        ("- images", "must map options to values"),
        ("", "must map options to values"),
        (None, "can't be read: .*No such file"),
    ],
)
def test_unusable_configurations_are_refused(mistake, config, tmp_path, content, message):
    path = tmp_path / "none.yaml" if content is None else config(content)
    assert re.search(message, mistake("fit", "--config", path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FIT[:3], "--model"),
        (["fit", "--model", "m"], "either --images or --manifest"),
        ([*FIT, "--imagesize", "3"], "--imagesize"),
        ([*FIT, "--out", "o"], "--out"),  # an option of score
        ([*FIT, "more"], "more"),
        (["fot"], "fot"),
        ([*FIT, "--image-size", "big"], "--image-size"),
        ([*FIT, "--crop", "0"], "--crop takes one or two positive numbers, not (0,)"),
        ([*FIT, "--precision", "float16"], "--precision"),
        ([*FIT, "--actors", "-2"], "--actors must be at least 1, but is -2"),
        ([*FIT, "--storage-options", "{anon: true}"], "--storage-options: must be JSON"),
        ([*FIT, "--storage-options", "[1]"], "must be a JSON object, such as {"),
        ([*SCORE, "--alpha", "nan"], "--alpha must be above 0 and below 1, but is nan"),
    ],
)
def test_mistakes_end_with_one_sentence(mistake, arguments, message):
    assert message in mistake(*arguments)


@pytest.mark.parametrize("option", ["images", "model", "out"])
def test_credentials_in_uris_are_refused(option, mistake):
    given_ = {"images": "a/*.png", "model": "m", "out": "o"} | {option: "https://ann:pa55@host/x"}
    sentence = mistake("score", *(f"--{name}={value}" for name, value in given_.items()))
    assert f"--{option} holds credentials" in sentence and "pa55" not in sentence


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("There is no model at m"), 2),
        (TooManyFailed("9 of the 10 images read so far failed"), 3),
    ],
)
def test_errors_of_a_job_end_with_their_sentence_and_exit_code(run_score, error, code):
    assert run_score(error) == (code, f"Error: {error}\n")


def test_a_bug_prints_a_traceback_without_secrets(run_score):
    code, printed = run_score(ZeroDivisionError("https://ann:pa55word@host/x"))
    assert code == 1
    assert "Traceback" in printed and "https://***@host/x" in printed and "pa55word" not in printed


def test_an_interrupted_job_says_how_to_continue(run_score):
    code, printed = run_score(KeyboardInterrupt())
    assert code == 130
    assert printed == f"Stopped by SIGINT: {cli.CONTINUE}\n"


def test_a_grey_range_may_begin_below_zero(parse):
    assert parse(*FIT, "--grey-range", "-500", "1e3").grey_range == (-500.0, 1000.0)


@pytest.mark.parametrize("grey_range", [(5, 5), (9, 1), (float("nan"), 1), (1,)])
def test_a_grey_range_ascends(grey_range):
    with pytest.raises(PadimError, match="--grey-range takes two ascending numbers"):
        FitOptions(images="x", model="m", grey_range=grey_range)
