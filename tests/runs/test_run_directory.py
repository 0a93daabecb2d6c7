from padim_ray.runs.run_directory import PART, list_parts


def test_only_whole_parts_are_listed_in_their_order(place):
    """A killed task may have left a file half-written beside them."""
    for number in (11, 2, 1_000_000):
        (place / PART.format(number)).write(b"")
    for name in (".0f3a.tmp.parquet", "part-000003.parquet.bak", "notes.txt"):
        (place / "results" / name).write(b"")
    names = [part.uri.rpartition("/")[2] for part in list_parts(place)]
    assert names == ["part-000002.parquet", "part-000011.parquet", "part-1000000.parquet"]
