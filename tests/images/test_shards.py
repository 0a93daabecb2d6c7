import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given
from hypothesis import strategies as st

from padim_ray.images.manifest import group_counts
from padim_ray.images.shards import sample_images, shard_rows, shard_table


@given(
    groups=st.dictionaries(st.text(max_size=3), st.integers(1, 40), min_size=1, max_size=5),
    images=st.integers(1, 30),
)
def test_shards_hold_every_row_once(groups, images):
    manifest = pa.table(
        {
            "group": [group for group in sorted(groups) for _ in range(groups[group])],
            "uri": [f"{row:03d}" for row in range(sum(groups.values()))],
        }
    )
    assert group_counts(manifest) == groups
    cut = shard_rows(manifest, images)
    shards = [shard_table(manifest, *shard) for shard in enumerate(cut)]
    for number, shard in enumerate(shards):
        assert shard["shard"].to_pylist() == [number] * shard.num_rows
        assert shard["shard_images"].to_pylist() == [shard.num_rows] * shard.num_rows
        assert 1 <= shard.num_rows <= images
        assert len(group_counts(shard)) == 1
    assert pa.concat_tables(shards).select(manifest.column_names) == manifest
    fewest = sum(-(-count // images) for count in groups.values())
    assert len(shards) == fewest


@given(
    groups=st.dictionaries(st.text(max_size=3), st.integers(2, 40), min_size=1, max_size=5),
    count=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_a_sample_has_at_most_count_images_of_each_group(groups, count, seed):
    names = sorted(groups)
    manifest = pa.table(
        {
            "group": [group for group in names for _ in range(groups[group])],
            "uri": [f"{row:03d}" for row in range(sum(groups.values()))],
        }
    )
    rows = sample_images(manifest, count, seed)
    assert (np.diff(rows) > 0).all()
    sample = manifest.take(rows)
    assert group_counts(sample) == {name: min(size, count) for name, size in groups.items()}
    np.testing.assert_array_equal(sample_images(manifest, count, seed), rows)
    # if an image is removed, another takes its place and the rest stay
    left = manifest.filter(pc.not_equal(manifest["uri"], sample["uri"][0]))
    kept = set(left.take(sample_images(left, count, seed))["uri"].to_pylist())
    assert set(sample["uri"].to_pylist()[1:]) <= kept


def test_another_seed_is_another_sample():
    manifest = pa.table({"group": ["a"] * 500, "uri": [f"{row:03d}" for row in range(500)]})
    samples = [set(sample_images(manifest, 250, seed)) for seed in range(4)]
    shared = [len(samples[0] & other) for other in samples[1:]]
    assert all(90 < number < 160 for number in shared)  # expected 125, standard deviation 5.6
