"""Every user mistake ends with one sentence and an exit code, before Ray starts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import padim_ray
from padim_ray.cli import main
from tests.model.test_padim_model import images


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    model = padim_ray.PadimModel(weights=weights, image_size=64, n_features=10)
    model.update(images(0, 4), group="bolt")
    path = tmp_path_factory.mktemp("models") / "bolt"
    model.save(str(path))
    return path


@pytest.fixture
def mistake(capsys, monkeypatch):
    """Run the command line, and return the sentence that it ends with."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))

    def run(*arguments, code=2):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (sentence,) = (line for line in error.splitlines() if line.startswith("Error: "))
        return sentence.removeprefix("Error: ")

    return run


def test_no_image_matched(mistake, archive, weights, tmp_path):
    sentence = mistake(
        *("fit", "--images", f"{archive}/{{group}}/train/good/*.bmp"),
        *("--model", tmp_path / "m", "--weights", weights),
        code=4,
    )
    assert sentence == (
        f"No image matched: nothing in {archive}/bolt/train/good and 1 more like it fits '*.bmp'."
    )


def test_nothing_fits_the_group(mistake, tmp_path, weights):
    (tmp_path / "archive").mkdir()
    sentence = mistake(
        *("fit", "--images", f"{tmp_path}/archive/{{group}}/*.png"),
        *("--model", tmp_path / "m", "--weights", weights),
        code=4,
    )
    assert sentence == f"No group matched: nothing in {tmp_path}/archive fits '{{group}}'."


def test_an_unknown_group(mistake, model, archive, tmp_path):
    sentence = mistake(
        *("score", "--images", f"{archive}/{{group}}/test/good/*"),
        *("--model", model, "--out", tmp_path / "out"),
    )
    assert sentence == f"The model at {model} has no group 'nut'; it has 'bolt'"
    assert not (tmp_path / "out").exists()


def test_another_format_version(mistake, model, archive, tmp_path):
    file = model / "versions/000001/model.json"
    content = file.read_text()
    file.write_text(json.dumps(json.loads(content) | {"format_version": 99}))
    sentence = mistake(
        *("score", "--images", f"{archive}/{{group}}/test/good/*"),
        *("--model", model, "--out", tmp_path / "out"),
    )
    file.write_text(content)
    assert sentence == (
        f"{file} has format version 99, and this padim-ray reads 1 to 4; use the padim-ray "
        "that fitted it, or fit again"
    )


def test_a_size_that_is_no_multiple_of_the_stride(mistake, archive, weights, tmp_path):
    sentence = mistake(
        *("fit", "--images", f"{archive}/{{group}}/train/good/*", "--image-size", 250),
        *("--model", tmp_path / "m", "--weights", weights),
    )
    assert sentence == (
        "The input size 250×250 is not a multiple of 16, the deepest layer's stride; instead of "
        "250 use 240 or 256"
    )


@pytest.mark.parametrize("job", ["fit", "score"])
def test_a_missing_bucket(job, mistake, model, weights, s3, tmp_path):
    options = {
        "fit": ("--model", tmp_path / "m", "--weights", weights),
        "score": ("--model", model, "--out", tmp_path / "out"),
    }
    sentence = mistake(
        *(job, "--images", "s3://nowhere/{group}/*.png", *options[job]),
        *("--storage-options", json.dumps(s3.options)),
    )
    assert sentence == "Can't list s3://nowhere: the bucket does not exist."


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials(wrong, mistake, weights, s3, tmp_path):
    options = s3.options | {wrong: "AKIA0000000000000000"}
    sentence = mistake(
        *("fit", "--images", "s3://archive/{group}/*.png", "--weights", weights),
        *("--model", tmp_path / "m", "--storage-options", json.dumps(options)),
    )
    assert sentence.startswith("Can't list s3://archive: the storage refuses these credentials (")
    assert s3.secret not in sentence


def test_an_unwritable_output(mistake, model, archive, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence = mistake(
        *("score", "--images", f"{archive}/{{group}}/test/good/0*.png"),
        *("--model", model, "--out", tmp_path / "file/out"),
    )
    assert sentence == f"Can't write {tmp_path}/file/out/.claims/000001.json: Not a directory."


def test_an_unwritable_model(mistake, archive, weights, s3):
    sentence = mistake(
        *("fit", "--images", f"{archive}/{{group}}/train/good/*", "--weights", weights),
        *("--model", "s3://nowhere/model", "--storage-options", json.dumps(s3.options)),
    )
    assert sentence == "Can't list s3://nowhere/model/.claims: the bucket does not exist."


def test_a_group_with_a_single_image(mistake, archive, weights, tmp_path):
    sentence = mistake(
        *("fit", "--images", f"{archive}/{{group}}/train/good/000.*", "--weights", weights),
        *("--model", tmp_path / "m"),
    )
    assert sentence == "Group 'bolt' has 1 readable image, and a fit needs at least 2"


def test_no_model(mistake, archive, tmp_path):
    sentence = mistake(
        *("score", "--images", f"{archive}/{{group}}/test/good/*"),
        *("--model", tmp_path / "none", "--out", tmp_path / "out"),
    )
    assert sentence == f"There is no model at {tmp_path}/none"


@pytest.fixture
def evaluate(mistake, model, archive, tmp_path):
    """Evaluate with these masks, and images named {defect}/{name}."""

    def run(masks, images=f"{archive}/{{group}}/test/{{defect}}/{{name}}.png"):
        return mistake(
            *("evaluate", "--images", images, "--masks", masks),
            *("--model", model, "--out", tmp_path / "out"),
        )

    return run


def test_images_without_a_defect_column(evaluate, archive):
    sentence = evaluate("x/{name}.png", f"{archive}/{{group}}/test/good/{{name}}.png")
    assert sentence.startswith("Nothing says which images are good: capture {defect} in --images")


def test_masks_that_capture_what_images_do_not(evaluate):
    assert evaluate("x/{part}.png") == "--masks captures {part}, which --images doesn't"


def test_masks_that_capture_nothing(evaluate):
    assert evaluate("x/*.png").startswith("--masks captures no name that would match a mask")


def test_masks_that_are_not_there(evaluate, tmp_path):
    masks = tmp_path / "masks"
    sentence = evaluate(f"{masks}/{{group}}/{{defect}}/{{name}}_mask.png")
    assert sentence == f"--masks: No group matched: nothing in {masks} fits '{{group}}'."


def test_masks_of_other_images(evaluate, tmp_path):
    (tmp_path / "other_mask.png").write_bytes(b"")
    sentence = evaluate(f"{tmp_path}/{{name}}_mask.png")
    assert sentence == (
        "--masks finds 1 masks, but none matches an image: an image and its mask must have the "
        "same name"
    )


def test_one_mask_for_several_images(evaluate, tmp_path):
    (tmp_path / "000_mask.png").write_bytes(b"")
    assert "the same mask for several images" in evaluate(f"{tmp_path}/{{name}}_mask.png")


def test_two_masks_for_one_image(evaluate, tmp_path):
    for suffix in ("png", "bmp"):
        (tmp_path / f"000.{suffix}").write_bytes(b"")
    sentence = evaluate(f"{tmp_path}/{{name}}.*")
    assert sentence.startswith("--masks finds two masks for one image: ")


def test_masks_for_a_manifest(mistake, model, tmp_path):
    sentence = mistake(
        *("evaluate", "--manifest", "m.parquet", "--masks", "x/{name}.png"),
        *("--model", model, "--out", tmp_path / "out"),
    )
    assert sentence.startswith("--masks needs --images; a manifest has a column 'mask_uri'")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "Nothing says which images are good"),
        ({"defect": ["good", None]}, "The manifest {} has an image without a defect"),
        ({"defect": [[1], [2]]}, "The manifest {} has a column 'defect' that is not string"),
        ({"defect": ["ok", "crack"]}, "No image has the defect 'good', which --normal says"),
        ({"defect": ["good", "x"], "mask_uri": [[1], [2]]}, "a column 'mask_uri' that is not"),
        ({"defect": ["good", "x"], "mask_uri": ["", "ftq://a/b"]}, "which no known file system"),
    ],
)
def test_labels_that_can_not_be_used(mistake, model, tmp_path, columns, message):
    location = tmp_path / "manifest.parquet"
    images = {"uri": ["/a.png", "/b.png"], "group": ["bolt", "bolt"]}
    pq.write_table(pa.table(images | columns), location)
    sentence = mistake(
        *("evaluate", "--manifest", location, "--model", model, "--out", tmp_path / "out")
    )
    assert message.format(location) in sentence


def test_a_report_of_nothing(mistake, tmp_path):
    assert f"{tmp_path}/none holds no finished run" in mistake("report", f"{tmp_path}/none")
