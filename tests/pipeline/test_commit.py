"""Committed shards: rows, regions and p-values computed by hand, and reading parts back."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from padim_ray.errors import PadimError
from padim_ray.images.manifest import with_long_offsets
from padim_ray.images.preprocessing import Preprocessing
from padim_ray.images.shards import shard_table
from padim_ray.pipeline.stages.columns import column_array, fixed_size_column
from padim_ray.pipeline.stages.commit import WriteResults, read_committed
from padim_ray.pipeline.stages.output import DRAWN, Output, attempt_of, read_parquet
from padim_ray.scoring.anomaly_map import AnomalyMapper
from padim_ray.scoring.decision import Decision
from padim_ray.storage.location import Location

SIDE = 8
MAPPER = AnomalyMapper((SIDE, SIDE), (SIDE, SIDE), sigma=0)  # the map is the distances
VERSION = SimpleNamespace(
    number=3, spec=SimpleNamespace(mapper=MAPPER, preprocessing=Preprocessing((SIDE, SIDE)))
)
REFERENCE = np.array([1, 2, 2, 4], np.float32)
DECISIONS = {
    "bolt": Decision(5.0, 4.5, REFERENCE),
    "nut": Decision(None, None, np.empty(0, np.float32)),
}
GONE, BUSY = "fetch: not found", "fetch: the storage failed (tried for 9 s: 503)"


def output_in(directory, heatmaps="none", **settings):
    defaults = {"prefix": "s3://a", "top": 2, "staged_top": 1, "maps": False, "min_region_area": 0}
    root = directory if isinstance(directory, Location) else Location.of(str(directory))
    return Output(root=root, heatmaps=heatmaps, **{"run": "this"} | defaults | settings)


def staged_rows(output, number=7):
    """The distances that the shard's committed attempt has kept."""
    attempt = attempt_of(read_parquet(output.part(number)).schema)
    return read_parquet(output.staged(number, attempt))


def scored_shard(scores, *, number=7, group="bolt", error=GONE):
    """A shard as `ScoreImages` returns it; None is an image that failed with `error`."""
    count = len(scores)
    manifest = pa.table(
        {
            "uri": [f"s3://a/{group}/{row}.png" for row in range(count)],
            "fetch_uri": [f"s3://a/{group}/{row}.png?signed" for row in range(count)],
            "group": [group] * count,
            "camera": ["left"] * count,
        }
    )
    shard = shard_table(manifest, number, slice(0, count))
    failed = [score is None for score in scores]
    distances = np.ones((count, SIDE, SIDE), np.float32)
    for row, score in enumerate(scores):
        distances[row, 2:4, 5:7] = 0 if score is None else score
    columns = {
        "width": pa.array([None if gone else 2 * SIDE for gone in failed], pa.int32()),
        "height": pa.array([None if gone else SIDE for gone in failed], pa.int32()),
        "status": pa.array(["failed" if gone else "scored" for gone in failed]),
        "error": pa.array([error if gone else None for gone in failed], pa.string()),
        "score": pa.array(scores, pa.float32()),
        "distances": fixed_size_column(distances),
        "actor_id": pa.array(["abc"] * count),
        "loaded_groups": pa.array([[group], *[[]] * (count - 1)], pa.list_(pa.string())),
    }
    for name, column in columns.items():
        shard = shard.append_column(name, column)
    return shard


def test_a_part_has_verdicts_regions_and_p_values(tmp_path):
    output = output_in(tmp_path)
    (row,) = WriteResults(output, VERSION, DECISIONS)(scored_shard([2, 9, None, 5])).to_pylist()
    assert row["shard"] == 7 and dict(row["causes"]) == {GONE: 1}
    np.testing.assert_array_equal(
        np.frombuffer(row["scores"], np.float32), np.array([2, 9, np.nan, 5], np.float32)
    )
    assert (row["actor_id"], row["loaded_groups"]) == ("abc", ["bolt"])

    results = read_parquet(output.part(7))
    assert results.column_names == [
        *("uri", "group", "camera", "status", "error", "score", "p_value", "threshold"),
        *("is_anomalous", "regions", "heatmap_uri", "map_uri", "width", "height"),
        *("model_version", "scored_at"),
    ]
    rows = results.to_pydict()
    assert rows["uri"] == [f"s3://a/bolt/{row}.png" for row in range(4)]  # not the signed ones
    assert rows["score"] == [2, 9, None, 5]
    # there are four reference scores: three are at least 2, and none is at least 9 or 5
    assert rows["p_value"] == [(1 + 3) / 5, 1 / 5, None, 1 / 5]
    assert rows["threshold"] == [5, 5, None, 5]
    assert rows["is_anomalous"] == [False, True, None, False]  # 5 doesn't exceed 5
    # cells 2:4 × 5:7 of an image that is twice as wide as the map
    region = {"x": 10, "y": 2, "width": 4, "height": 2, "peak": 9.0, "area": 8}
    assert rows["regions"] == [[], [region], None, []]
    assert rows["heatmap_uri"] == rows["map_uri"] == [None] * 4
    assert rows["model_version"] == [3] * 4
    assert not (tmp_path / ".staging").exists()


def test_a_group_without_a_threshold_has_scores_only(tmp_path):
    output = output_in(tmp_path)
    WriteResults(output, VERSION, DECISIONS)(scored_shard([2, 900], group="nut"))
    rows = read_parquet(output.part(7)).to_pydict()
    assert rows["score"] == [2, 900]
    for name in ("p_value", "threshold", "is_anomalous", "regions"):
        assert rows[name] == [None, None]


@pytest.mark.parametrize(
    ("heatmaps", "rows"),
    [("all", [4, 1, 3, 0, 2]), ("top", [4, 1]), ("anomalous", [4, 1, 3])],
)
def test_distances_are_kept_for_images_that_may_get_a_heatmap(tmp_path, heatmaps, rows):
    output = output_in(tmp_path, heatmaps)
    WriteResults(output, VERSION, DECISIONS)(scored_shard([2, 9, None, 2.5, 20]))
    staged = staged_rows(output)
    assert staged["row"].to_pylist() == rows  # flagged ones and one more, the highest first
    distances = column_array(staged["distances"], np.float32, (SIDE, SIDE))
    assert distances[:2, 2, 5].tolist() == [20, 9]


def test_anomaly_maps_are_written_for_scored_images(tmp_path):
    output = output_in(tmp_path, maps=True)
    WriteResults(output, VERSION, DECISIONS)(scored_shard([2, None, 7]))
    uris = read_parquet(output.part(7))["map_uri"].to_pylist()
    assert uris == [f"{tmp_path}/maps/bolt/0.png.tiff", None, f"{tmp_path}/maps/bolt/2.png.tiff"]
    with Image.open(uris[2]) as image:
        anomaly_map = np.asarray(image)
    assert anomaly_map.dtype == np.float32
    assert anomaly_map[2:4, 5:7].tolist() == [[7, 7], [7, 7]] and anomaly_map.sum() == 60 + 28


def test_pixel_counts_are_kept_for_the_next_attempt(tmp_path):
    output = output_in(tmp_path)
    counts = {"pixels": [("good", b"\x01")], "unreadable_masks": [], "masks": 2}
    seen = []
    write = WriteResults(
        output, VERSION, DECISIONS, lambda shard, maps: seen.append(maps.shape) or counts
    )
    (row,) = write(scored_shard([2, 3])).to_pylist()
    assert seen == [(2, SIDE, SIDE)]
    assert {name: row[name] for name in counts} == counts
    (committed,) = read_committed(output, with_counts=True)
    assert committed.counts == counts


def test_a_shard_that_is_written_again_has_the_results_that_were_committed_first(place):
    """As when a task is cut off from Ray, is repeated elsewhere, and goes on later."""
    output = output_in(place, "all")
    counts = iter([{"masks": 1}, {"masks": 2}])
    write = WriteResults(output, VERSION, DECISIONS, lambda shard, maps: next(counts))
    (first,) = write(scored_shard([2, 9, 5])).to_pylist()
    content = output.part(7).read()
    (second,) = write(scored_shard([2, None, 5], error=BUSY)).to_pylist()
    assert output.part(7).read() == content
    assert second == first and dict(second["causes"]) == {} and second["masks"] == 1
    (committed,) = read_committed(output, with_counts=True)
    assert committed.counts == {"masks": 1}
    assert len(staged_rows(output)) == 3


def test_a_part_of_a_run_that_was_overwritten_is_not_taken_for_a_result(tmp_path):
    write = WriteResults(output_in(tmp_path, run="earlier"), VERSION, DECISIONS)
    write(scored_shard([2, 9]))
    with pytest.raises(PadimError, match=r"part-000007.parquet was written by a task of the run"):
        WriteResults(output_in(tmp_path), VERSION, DECISIONS)(scored_shard([3, 4]))
    (committed,) = read_committed(output_in(tmp_path), with_counts=True)
    assert not output_in(tmp_path).is_own(committed.attempt)
    assert output_in(tmp_path, run="earlier").is_own(committed.attempt)


def test_shards_that_are_mixed_or_incomplete_are_refused(tmp_path):
    write = WriteResults(output_in(tmp_path), VERSION, DECISIONS)
    shard, other = scored_shard([1, 2]), scored_shard([3, 4], number=8)
    with pytest.raises(RuntimeError, match="has only some of shard 7's rows"):
        write(shard.slice(0, 1))
    with pytest.raises(RuntimeError, match="has rows of shard 7 and of another"):
        write(pa.concat_tables([shard.slice(0, 1), other.slice(0, 1)]))


scores = st.lists(st.none() | st.floats(0, 2**20, width=32), min_size=1, max_size=9)


@given(st.dictionaries(st.integers(0, 10**7), scores, max_size=4), st.sampled_from([GONE, BUSY]))
def test_committed_shards_are_read_back(tmp_path_factory, shards, error):
    output = output_in(tmp_path_factory.mktemp("run"))
    write = WriteResults(output, VERSION, DECISIONS)
    for number, values in shards.items():
        for _ in range(2):  # Ray may run a task twice
            write(scored_shard(values, number=number, error=error))
    committed = {shard.number: shard for shard in read_committed(output, with_counts=False)}
    assert committed.keys() == shards.keys()
    for number, values in shards.items():
        shard, failed = committed[number], values.count(None)
        np.testing.assert_array_equal(shard.scores, np.array(values, np.float32))
        assert shard.errors == [error] * failed
        assert not shard.is_drawn and shard.counts == {}


def test_a_part_has_strings_with_ordinary_offsets(tmp_path):
    output, shard = output_in(tmp_path), with_long_offsets(scored_shard([2, 9]))
    assert pa.large_string() in shard.schema.types
    WriteResults(output, VERSION, DECISIONS)(shard)
    kinds = pq.read_schema(output.part(7).uri).types
    assert pa.large_string() not in kinds and pa.string() in kinds


def test_a_part_says_that_its_heatmaps_are_drawn(tmp_path):
    output = output_in(tmp_path)
    WriteResults(output, VERSION, DECISIONS)(scored_shard([2, 9]))
    results = read_parquet(output.part(7))
    metadata = results.schema.metadata | {DRAWN: b""}
    output.part(7).write_table(results.replace_schema_metadata(metadata))
    (committed,) = read_committed(output, with_counts=False)
    assert committed.is_drawn and committed.scores.tolist() == [2, 9]


def test_a_damaged_part_is_named(tmp_path):
    output = output_in(tmp_path)
    output.part(7).write(b"PAR1")
    with pytest.raises(PadimError, match=r"part-000007.parquet is damaged: .*; see --overwrite"):
        list(read_committed(output, with_counts=False))
    pq.write_table(pa.table({"uri": ["a"]}), output.part(7).uri)
    with pytest.raises(PadimError, match="is damaged"):
        list(read_committed(output, with_counts=False))
