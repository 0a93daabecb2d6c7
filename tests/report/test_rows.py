from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from padim_ray.errors import PadimError
from padim_ray.report import rows as report_rows
from padim_ray.report.rows import Selection, captured_columns, select_rows
from padim_ray.storage.location import Location
from tests.report.run_directory import failed_row, results_table, scored_row, write_part


def random_rows(count: int, seed: int = 0, *, thresholds: bool = True) -> list[dict[str, Any]]:
    """Rows with many tied scores, with and without a threshold; every seventh has failed."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        uri = f"/images/{rng.integers(10**9)}-{index}.png"
        if index % 7 == 0:
            rows.append(failed_row(uri))
            continue
        threshold = [8.0, 2.0, None, 0.0][rng.integers(4)] if thresholds else None
        rows.append(scored_row(uri, float(rng.integers(1, 60)), threshold))
    return rows


def naive_selection(rows: list[dict[str, Any]], count: int) -> list[str]:
    """The URIs of the highest rows, by sorting all of them with pandas."""
    table = pd.DataFrame(rows)
    scored = table[table.status == "scored"]
    threshold = scored.threshold.where(scored.threshold > 0)
    ranked = scored.assign(ratio=(scored.score / threshold).fillna(-1))
    order = ["ratio", "score", "uri"]
    return ranked.sort_values(order, ascending=[False, False, True]).uri.tolist()[:count]


def uris(rows: list[dict[str, Any]]) -> list[str]:
    return [row["uri"] for row in rows]


@pytest.mark.parametrize("thresholds", [True, False])
@pytest.mark.parametrize("highest", [0, 1, 25, 5000])
def test_the_highest_rows_equal_those_of_a_naive_sort(
    tmp_path, monkeypatch, highest: int, thresholds: bool
):
    monkeypatch.setattr(report_rows, "BATCH_ROWS", 50)
    rows = random_rows(1000, thresholds=thresholds)
    for number in range(10):
        write_part(tmp_path, number, rows[100 * number : 100 * number + 100], row_group_size=70)
    selection = select_rows(Location.of(str(tmp_path)), highest=highest, failed=9)
    assert uris(selection.highest) == naive_selection(rows, highest)
    assert uris(selection.failed) == sorted(uris(rows[::7]))[:9]


def test_results_are_read_from_disk_and_from_s3(place: Location, tmp_path):
    rows = random_rows(60)
    for number in range(3):
        name = write_part(tmp_path / "local", number, rows[20 * number : 20 * number + 20])
        content = (tmp_path / "local/results" / name).read_bytes()
        (place / f"results/{name}").write(content)
    (place / "results/notes.txt").write(b"not results")
    assert uris(select_rows(place, highest=5, failed=3).highest) == naive_selection(rows, 5)


def test_only_the_named_parts_are_read(tmp_path):
    low, high = write_part(tmp_path, 0, [scored_row("/low", 1)]), "part-000001.parquet"
    write_part(tmp_path, 1, [scored_row("/high", 50)])
    root = Location.of(str(tmp_path))
    assert uris(select_rows(root, highest=2, failed=2, parts=[low]).highest) == ["/low"]
    assert uris(select_rows(root, highest=2, failed=2, parts=[high, low]).highest)[0] == "/high"
    assert select_rows(root, highest=2, failed=2, parts=[]).highest == []


def test_merging_in_any_order_gives_the_same_selection():
    rows = random_rows(300)
    table = results_table(rows)
    shares = []
    for start in range(0, 300, 100):
        share = Selection(20, 20)
        for batch in table.slice(start, 100).to_batches():
            share.add(batch)
        shares.append(share)
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        total = Selection(20, 20)
        for number in order:
            total.merge(shares[number])
        assert uris(total.highest) == naive_selection(rows, 20)


def test_a_large_file_is_read_as_a_stream(tmp_path, monkeypatch):
    count = 400_000
    table = pa.table(
        {
            "uri": [f"/images/with/a/rather/long/name/{index:09d}.png" for index in range(count)],
            "group": ["bolt"] * count,
            "status": ["scored"] * count,
            "score": np.random.default_rng(0).normal(size=count).astype(np.float32),
        }
    )
    (tmp_path / "results").mkdir()
    pq.write_table(table, tmp_path / "results/part-000000.parquet", row_group_size=20_000)
    size, highest = table.nbytes, float(np.max(table["score"].to_numpy()))
    del table
    before, held, kept = pa.total_allocated_bytes(), [], []
    add = Selection.add

    def watched_add(selection: Selection, batch: pa.RecordBatch) -> None:
        add(selection, batch)
        held.append(pa.total_allocated_bytes() - before)
        kept.append(len(selection.highest))

    monkeypatch.setattr(Selection, "add", watched_add)
    selection = select_rows(Location.of(str(tmp_path)), highest=10, failed=10)
    assert selection.highest[0]["score"] == highest
    assert len(held) > 50
    assert max(kept) == 10
    assert max(held) < size / 2


def test_columns_that_a_run_lacks_are_none(tmp_path):
    table = pa.table({"uri": ["/a"], "group": ["g"], "status": ["scored"], "score": [3.0]})
    (tmp_path / "results").mkdir()
    pq.write_table(table, tmp_path / "results/part-000000.parquet")
    (row,) = select_rows(Location.of(str(tmp_path)), highest=5, failed=5).highest
    assert row == {"uri": "/a", "group": "g", "status": "scored", "score": 3.0}


def test_all_columns_but_the_jobs_own_are_captured_ones(tmp_path):
    write_part(tmp_path, 0, [scored_row("/a", 1, camera="left", **{"odd name": "x"})])
    selection = select_rows(Location.of(str(tmp_path)), highest=5, failed=5)
    assert captured_columns(selection.highest) == ["defect", "camera", "odd name"]


def test_nan_scores_are_left_out(tmp_path):
    rows = [scored_row("/nan", float("nan")), scored_row("/inf", float("inf")), scored_row("/1", 1)]
    write_part(tmp_path, 0, rows)
    selection = select_rows(Location.of(str(tmp_path)), highest=5, failed=5)
    assert uris(selection.highest) == ["/inf", "/1"]


def test_a_missing_or_broken_part_is_reported_in_a_sentence(tmp_path: Path):
    root = Location.of(str(tmp_path))
    with pytest.raises(PadimError, match=r"part-000003\.parquet is missing"):
        select_rows(root, highest=1, failed=1, parts=["part-000003.parquet"])
    (tmp_path / "results").mkdir()
    (tmp_path / "results/part-000000.parquet").write_bytes(b"nonsense")
    with pytest.raises(PadimError, match="is not a results file"):
        select_rows(root, highest=1, failed=1)
