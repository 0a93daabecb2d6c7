"""The number of the version that a job makes."""

import pytest

from padim_ray.pipeline.jobs.new_version import number_to_make
from padim_ray.storage.location import Location

PUBLISHED, UNFINISHED, LEFT_OVER = ("model.json", "job.json"), ("job.json",), ("groups/bolt/x",)
ROUND = ("model.json", "rounds/000001.json")


@pytest.mark.parametrize(
    ("current", "versions", "continued", "new"),
    [
        (None, {}, 1, 1),
        (1, {1: PUBLISHED}, 2, 2),
        (1, {1: PUBLISHED, 2: UNFINISHED}, 2, 3),
        # an attempt that was begun afresh is continued, whatever an earlier one's tasks still write
        (1, {1: PUBLISHED, 2: LEFT_OVER, 3: UNFINISHED}, 3, 4),
        (1, {1: PUBLISHED, 2: LEFT_OVER}, 3, 3),
        (None, {1: LEFT_OVER}, 2, 2),
        # a later version was published, from Python: the unfinished one is abandoned
        (3, {1: PUBLISHED, 2: UNFINISHED, 3: PUBLISHED}, 4, 4),
        (1, {1: PUBLISHED, 2: PUBLISHED}, 3, 3),  # rolled back
        (1, {1: PUBLISHED, 2: ROUND}, 2, 3),  # killed before it became current
    ],
)
def test_an_unfinished_version_is_continued_and_a_new_one_has_a_number_of_its_own(
    tmp_path, current, versions, continued, new
):
    root = Location.of(str(tmp_path))
    for number, names in versions.items():
        for name in names:
            content = b'{"number": 1, "rows": 0, "groups": {}, "partial": null}'
            (root / f"versions/{number:06d}/{name}").write(content)
    if current:
        (root / "CURRENT").write(b"%06d\n" % current)
    assert number_to_make(root, afresh=False) == continued
    assert number_to_make(root, afresh=True) == new
