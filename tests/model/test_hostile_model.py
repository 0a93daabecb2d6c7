"""A model's files as an attacker makes them are refused with a ModelError, using little memory."""

import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from padim_ray import ModelError
from padim_ray.images.manifest import restore_manifest
from padim_ray.model.version import open_version
from padim_ray.pipeline.jobs.on_version import sample_of
from padim_ray.runs.job_record import JobRecord
from padim_ray.scoring.histogram import bin_edges
from padim_ray.storage.location import Location
from tests.helpers.hostile import (
    BOLT,
    DESCRIPTION,
    FAILURES,
    GAUSSIAN,
    JOB,
    LISTED,
    MANIFEST,
    MOMENTS,
    ROUND,
    assert_refused,
    read_everything,
    replaced,
    save_small_model,
)

MAP = pa.map_(pa.string(), pa.string())


@pytest.fixture(scope="module")
def directory(weights, tmp_path_factory):
    return save_small_model(weights, tmp_path_factory.mktemp("models") / "model")


def test_the_undamaged_model_is_read(directory):
    read_everything(directory, trunk=True)


@pytest.mark.parametrize(
    "name",
    [
        *(DESCRIPTION, GAUSSIAN, MOMENTS, "trunks", f"{BOLT}/pixels.parquet"),
        *(MANIFEST, JOB, LISTED, ROUND, FAILURES),
    ],
)
def test_an_endless_file_is_not_read(directory, name):
    path = directory / name if name != "trunks" else next(directory.glob("trunks/*"))
    original = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(2**40)
    try:
        with pytest.raises(ModelError, match="has 1099511627776 bytes, and not at most"):
            read_everything(directory, trunk=True)
    finally:
        path.write_bytes(original)


OWN_FILES = [
    *("CURRENT", DESCRIPTION, GAUSSIAN, f"{BOLT}/calibration.parquet"),
    *(MANIFEST, JOB, LISTED, FAILURES, ROUND),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in OWN_FILES
        for kind in ("outside", "device", "directory", "pipe")
        if (name, kind) != (ROUND, "directory")  # that is no round
    ],
)
def test_only_the_models_own_files_are_read(directory, name, kind, tmp_path):
    path = directory / name
    away = tmp_path / "away"
    path.rename(away)
    try:
        match kind:
            case "outside":
                path.symlink_to(away)
            case "device":
                path.symlink_to("/dev/zero")
            case "directory":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
        with pytest.raises(ModelError, match=r"not a regular file|a link that leads out of"):
            read_everything(directory)
    finally:
        path.rmdir() if kind == "directory" else path.unlink()
        away.rename(path)


def test_a_link_to_the_whole_model_is_followed(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    read_everything(tmp_path / "link")


def change(name, edit):
    """A model's safetensors file with other tensors."""

    def edited(directory):
        tensors = safetensors.torch.load_file(directory / name)
        edit(tensors)
        return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})

    return edited


@pytest.mark.parametrize("name", [GAUSSIAN, MOMENTS])
@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("mean.1"), "1 tensors are missing"),
        (lambda t: t.clear(), "are missing"),
        (lambda t: t.update({"../x": torch.zeros(1)}), "1 are of something else"),
        (lambda t: t.update({"mean.3": torch.zeros(1)}), "1 are of something else"),
        (lambda t: t.update({"mean.0": t["mean.0"].half()}), "mean.0 is F16"),
        (lambda t: t.update({"mean.0": t["mean.0"].long()}), "mean.0 is I64"),
        (lambda t: t.update({"mean.0": t["mean.0"][1:]}), "mean.0 is F.. .3, "),
        (lambda t: t.update({"mean.0": t["mean.0"].T}), "mean.0 is F"),
        (lambda t: t.update({"mean.0": t["mean.0"][None]}), "mean.0 is F"),
        (lambda t: t["mean.0"].fill_(math.nan), "mean.0 has NaN or infinite values"),
        (lambda t: t["mean.2"][-1, -1:].fill_(math.inf), "mean.2 has NaN or infinite values"),
        (lambda t: t["mean.2"][-1, -1:].fill_(-math.inf), "mean.2 has NaN or infinite values"),
    ],
)
def test_tensors_that_the_spec_does_not_imply_are_refused(directory, name, edit, match):
    assert_refused(directory, name, change(name, edit)(directory), match)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_whitening_without_a_positive_diagonal_is_refused(directory, value):
    data = change(GAUSSIAN, lambda t: t["whitening.1.1"][3, 0].fill_(value))(directory)
    assert_refused(directory, GAUSSIAN, data, "whitening of level 1 has a diagonal that is not pos")


@pytest.mark.parametrize("count", [-1, 0, 5, 7, 2**62])
def test_moments_of_another_number_of_images_are_refused(directory, count):
    data = change(MOMENTS, lambda t: t["count"].fill_(count))(directory)
    assert_refused(directory, MOMENTS, data, "not of 6 images")


@pytest.mark.parametrize(
    "header",
    [
        {"mean.0": {"dtype": "F32", "shape": [2**60, 2**10], "data_offsets": [0, 8]}},
        {"mean.0": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}},
        {"mean.0": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"mean.0": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"mean.0": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"__metadata__": {"a": "b"}},
        {},
        [],
    ],
)
def test_a_header_that_lies_is_refused(directory, header):
    text = json.dumps(header).encode()
    assert_refused(directory, GAUSSIAN, struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_headers_length_that_lies_is_refused(directory, length):
    assert_refused(directory, GAUSSIAN, struct.pack("<Q", length) + b"{}" + bytes(100))


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}),
        lambda tensors: tensors.update({name: t.to(torch.int32) for name, t in tensors.items()}),
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update(other=torch.zeros(1)),
    ],
)
def test_another_trunk_is_refused(directory, edit):
    (path,) = directory.glob("trunks/*")
    name = str(path.relative_to(directory))
    assert_refused(directory, name, change(name, edit)(directory), trunk=True)


def parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


SCORES = np.arange(1, 7, dtype=np.float32)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"score": SCORES[::-1]}, "ascending"),
        ({"score": SCORES - 2}, "ascending"),
        ({"score": np.where(SCORES == 6, np.nan, SCORES).astype(np.float32)}, "ascending"),
        ({"score": np.where(SCORES == 6, np.inf, SCORES).astype(np.float32)}, "ascending"),
        ({"score": SCORES[:5]}, "5 rows, not 6 to 6"),
        ({"score": SCORES.repeat(2)}, "12 rows, not 6 to 6"),
        ({"score": SCORES.astype(float)}, "no column 'score' of type float"),
        ({"score": SCORES.astype(str)}, "no column 'score' of type float"),
        ({"score": pa.array([[1.0]] * 6)}, "no column 'score' of type float"),
        ({"score": pa.array([None, *SCORES[1:]], pa.float32())}, "'score' has nulls"),
        ({"scores": SCORES}, "no column 'score'"),
        ({"score": SCORES, "other": SCORES}, "other columns"),
        ({"score": pa.nulls(10**8, pa.float32())}, "100000000 rows"),
    ],
)
def test_impossible_leave_one_out_scores_are_refused(directory, tmp_path, columns, match):
    data = parquet(tmp_path / "x", columns)
    assert_refused(directory, f"{BOLT}/calibration.parquet", data, match)


EDGES = bin_edges()[[3, 900]]
PIXELS = 6 * 32 * 32


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (EDGES, [PIXELS, 1]),
        (EDGES, [PIXELS + 1, -1]),
        (EDGES, [2**62, 2**62]),
        (EDGES, [PIXELS, 0]),
        (EDGES[::-1], [PIXELS - 1, 1]),
        (EDGES[[0, 0]], [PIXELS - 1, 1]),
        (EDGES * np.float32(1.0001), [PIXELS - 1, 1]),
        ([np.nan, 1], [PIXELS - 1, 1]),
        ([-1, 1], [PIXELS - 1, 1]),
        ([1, np.inf], [PIXELS - 1, 1]),
        ([1, 2.0**20], [PIXELS - 1, 1]),
        ([], []),
        (bin_edges()[:-1].repeat(2), np.ones(2 * len(bin_edges()) - 2)),
    ],
)
def test_an_impossible_histogram_is_refused(directory, tmp_path, values, counts):
    columns = {"value": np.array(values, np.float32), "count": np.array(counts, np.int64)}
    data = parquet(tmp_path / "x", columns)
    assert_refused(directory, f"{BOLT}/pixels.parquet", data, "pixels.parquet")


@pytest.mark.parametrize(
    "columns",
    [
        {"uri": ["a"] * 7, "group": ["b"] * 7},
        {"uri": ["a", None], "group": ["b", "b"]},
        {"uri": [1], "group": ["b"]},
        {"uri": ["a"], "group": ["b"], "status": [1]},
        {"uri": ["a"], "group": ["b"], "size": ["many"]},
        {"group": ["b"]},
        {},
    ],
)
def test_a_manifest_that_is_not_the_models_is_refused(directory, tmp_path, columns):
    data = parquet(tmp_path / "x", columns)
    assert_refused(directory, MANIFEST, data, r"manifest-\w+\.parquet")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "Expecting value"),
        (b'"abc"', "it must be an object, not 'abc'"),
        (b"[1]", r"it must be an object, not \[1\]"),
        (b"{}", "'identity' is missing in it"),
        (b'{"identity": {}}', "'settings' is missing in it"),
        (b'{"identity": {}, "settings": {}, "x": 1}', "unknown field 'x'"),
        (b'{"identity": 1, "settings": {}}', "it.identity must be an object, not 1"),
        (b'{"identity": {}, "settings": []}', "it.settings must be an object"),
        (b'{"identity": {"seed": {"a": 1}}, "settings": {}}', "it.identity.seed can't be {'a': 1}"),
        (b'{"identity": {"seed": [[1]]}, "settings": {}}', r"it.identity.seed can't be \[\[1\]\]"),
        (b'{"identity": {}, "settings": {"precision": 3}}', "it.settings.precision can't be 3"),
        (b'{"identity": {}, "settings": {"images_per_shard": -1}}', "images_per_shard must be a"),
        (b"[" * 10**5, "nested too deeply"),
    ],
)
def test_an_impossible_job_record_is_refused(directory, content, match):
    assert_refused(directory, JOB, content, match)


@pytest.mark.parametrize("value", ["12", 1.5, True, None, [1], 10**30])
def test_only_whole_numbers_choose_the_images_that_calibrate(directory, value):
    content = json.loads((directory / JOB).read_text())
    content["identity"]["calibration_images"] = value
    version = open_version(Location(str(directory)))
    data, match = json.dumps(content).encode(), "job.json: identity.calibration_images must be a"
    with replaced(directory / JOB, data), pytest.raises(ModelError, match=match):
        sample_of(version)


def test_a_list_of_images_is_read_only_where_it_is_needed(directory):
    version = open_version(Location(str(directory)))
    with replaced(directory / LISTED, b"not Parquet"):
        assert sample_of(version).calibration_images == 6


@pytest.mark.parametrize(
    "columns",
    [{}, {"group": ["a"]}, {"uri": [1]}, {"uri": [None, "a"]}, {"uri": ["a"], "group": [1]}],
)
def test_a_list_of_other_columns_is_refused(directory, tmp_path, columns):
    assert_refused(directory, LISTED, parquet(tmp_path / "x", columns), "listed.parquet")


def dictionary(value, rows):
    """A column that stores a value once, however many rows have it."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [value])


URIS = pa.array(["a", "b"])
SMALL_FILES = {
    "one long text": {"uri": ["a" * 2**29]},
    "a text in many rows": {"uri": dictionary("s3://archive/line7/x.png" * 8, 4 * 10**6)},
    "a long text in many rows": {"uri": dictionary("a" * 10**6, 10_000)},
    "run lengths": {"uri": URIS, "x": pa.array([np.zeros(10**8, np.int8)] * 2)},
    "texts in lists": {"uri": URIS, "x": pa.array([["a" * 1000] * 10**5] * 2)},
    "texts in structs": {"uri": URIS, "x": pa.array([[{"y": "a" * 1000}] * 10**5] * 2)},
    "texts in maps": {"uri": URIS, "x": pa.array([[("k", "a" * 1000)] * 10**5] * 2, MAP)},
}
READ_IN_LITTLE_MEMORY = """
import resource, sys
from padim_ray.errors import ModelError
from padim_ray.runs.job_record import JobRecord
from padim_ray.storage.location import Location
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try:
    JobRecord.read(Location(sys.argv[1]))
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize("columns", SMALL_FILES.values(), ids=SMALL_FILES)
def test_a_small_file_that_expands_takes_little_memory(tmp_path, columns):
    JobRecord({}, {}, pa.table({"uri": ["a"]})).write(Location(str(tmp_path)))
    pq.write_table(
        pa.table(columns), tmp_path / "listed.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "listed.parquet").stat().st_size < 100_000
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, str(tmp_path)]
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "its columns have more than" in run.stdout


def test_columns_of_all_kinds_are_read_as_they_were_written(tmp_path):
    kinds = {
        "text": pa.array(["a", None, "b"]),
        "view": pa.array(["a", None, "b"], pa.string_view()),
        "large": pa.array(["a", None, "b"], pa.large_string()),
        "category": pa.array(["a", None, "a"]).dictionary_encode(),
        "list": pa.array([["a", "b"], None, []]),
        "struct": pa.array([{"a": "x", "b": 1}, None, {"a": None, "b": 2}]),
        "map": pa.array([[("k", "v")], None, []], MAP),
        "time": pa.array([10**15, None, 0], pa.timestamp("us")),
        "null": pa.nulls(3),
    }
    images = pa.table({"uri": ["a", "b", "c"], **kinds})
    JobRecord({}, {}, images).write(Location(str(tmp_path)))
    expected = restore_manifest(images)  # with long offsets, and URIs in one spelling
    assert JobRecord.read(Location(str(tmp_path))).images.equals(expected)
