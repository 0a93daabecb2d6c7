import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import padim_ray
from padim_ray.model.spec import new_spec
from padim_ray.runs.options.model import ModelOptions
from reproduce import __main__ as command


@pytest.fixture
def data(tmp_path):
    image = tmp_path / "data/grid/test/bent/000.png"
    image.parent.mkdir(parents=True)
    image.touch()
    return tmp_path / "data"


@pytest.fixture
def jobs(monkeypatch, weights):
    """Stand-ins for the jobs, which record their options and write only metrics.json."""
    run = {}

    def evaluate(**options):
        run["evaluate"] = options
        metrics = {"image_auroc": {"value": 0.75}}
        Path(options["out"]).mkdir(parents=True, exist_ok=True)
        Path(options["out"], "metrics.json").write_text(
            json.dumps({"groups": {"grid": {"metrics": metrics}}})
        )

    spec, _ = new_spec(ModelOptions(weights=weights, n_features=100, crop=(224,)), "float32")
    monkeypatch.setattr(padim_ray, "fit", lambda **options: run.update(fit=options))
    monkeypatch.setattr(padim_ray, "evaluate", evaluate, raising=False)
    monkeypatch.setattr(command, "open_version", lambda root: SimpleNamespace(spec=spec))
    return run


def test_fits_evaluates_and_compares(data, tmp_path, jobs, weights, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--weights", weights, "--out", str(out), "--crop", "224"]
    command.main(arguments)
    assert jobs["fit"]["images"] == f"{data}/{{group}}/train/good/*"
    assert jobs["fit"]["model"] == jobs["evaluate"]["model"] == f"{out}/model"
    assert jobs["fit"]["weights"] == weights
    assert jobs["fit"]["crop"] == (224, 224)
    assert jobs["evaluate"]["images"] == f"{data}/{{group}}/test/{{defect}}/{{name}}.png"
    masks = f"{data}/{{group}}/ground_truth/{{defect}}/{{name}}_mask.png"
    assert jobs["evaluate"]["masks"] == masks
    text = (out / "comparison.md").read_text()
    settings = "resnet18, 100 features, 256×256, crop 224×224, regularization shrink"
    assert f"- **ours**: {settings}, trunk in float32, weights " in text
    assert "| grid | 0.750 | 0.857 | 0.942 | 0.898 | 0.957 | – |" in text
    assert "0.750" in capsys.readouterr().out


def test_an_existing_folder_is_refused_and_nothing_in_it_removed(data, tmp_path, jobs, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ["--data", str(data), "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert not jobs
    command.main([*arguments, "--overwrite"])
    assert jobs["evaluate"]["overwrite"] is True
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_without_images_is_refused(tmp_path, jobs, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert f"{tmp_path} has no images" in capsys.readouterr().err
    assert not jobs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "Thumbs.db"], "{name}.png"),
        (["1.JPG"], "{name}.*"),
    ],
)
def test_one_template_covers_all_images(data, names, expected):
    for name in names:
        (data / "grid/test/bent" / name).touch()
    assert command.image_name(data) == expected
