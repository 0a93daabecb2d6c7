"""Metrics against scikit-learn, and AUPRO against its definition, threshold by threshold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from padim_ray.evaluation.metrics import (
    IMAGE_METRICS,
    PixelCounts,
    aupro,
    auroc,
    average_precision,
    best_f1,
    bootstrap,
    count_scores,
    image_metrics,
    pixel_metrics,
)
from padim_ray.scoring.anomaly_map import AnomalyMapper

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def labelled_scores(draw):
    """float32 scores of both classes, as in results, with many ties or none."""
    rng = np.random.default_rng(draw(SEEDS))
    count = draw(st.integers(2, 60))
    distinct = draw(st.sampled_from([1, 3, 20, 2**20]))
    is_defective = rng.random(count) < draw(st.floats(0, 1))
    is_defective[:2] = False, True
    scores = rng.integers(0, distinct, count) / np.float32(8) + is_defective * draw(st.floats(0, 2))
    return scores.astype(np.float32), is_defective


def random_maps(rng, count, side, region_share=0.1):
    """Smooth maps with higher values inside smooth masks; the first mask is empty."""
    values, shapes = (
        ndimage.gaussian_filter(rng.normal(size=(count, side, side)), (0, side / 16, side / 16))
        for _ in range(2)
    )
    masks = shapes > np.quantile(shapes, 1 - region_share)
    masks[0] = False
    maps = np.exp(values / values.std() + masks * rng.exponential(size=(count, 1, 1)))
    return maps.astype(np.float32), masks


def slow_aupro(maps, masks, limit):
    """Per-region overlap at every distinct value, from its definition."""
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(index, labels == label) for label in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        rates.append(flagged[~masks].mean())
        overlaps.append(np.mean([flagged[index][region].mean() for index, region in regions]))
    area = 0.0
    for i in range(1, len(rates)):
        if rates[i] > limit:
            share = (limit - rates[i - 1]) / (rates[i] - rates[i - 1])
            at_limit = overlaps[i - 1] + share * (overlaps[i] - overlaps[i - 1])
            area += (limit - rates[i - 1]) * (overlaps[i - 1] + at_limit) / 2
            break
        area += (rates[i] - rates[i - 1]) * (overlaps[i - 1] + overlaps[i]) / 2
    return area / limit


def sorted_aupro(maps, masks, limit):
    """The same for many values, by sorting."""
    weights = np.zeros(maps.shape)
    count = 0
    for index, mask in enumerate(masks):
        labels, regions = ndimage.label(mask, np.ones((3, 3)))
        for label in range(1, regions + 1):
            weights[index][labels == label] = 1 / (labels == label).sum()
        count += regions
    order = np.argsort(-maps, axis=None)
    rate = np.cumsum(~masks.ravel()[order]) / (~masks).sum()
    overlap = np.cumsum(weights.ravel()[order]) / count
    fine = np.linspace(0, limit, 100_001)
    return np.trapezoid(np.interp(fine, rate, overlap), fine) / limit


@given(labelled_scores())
def test_image_metrics_equal_scikit_learns(data):
    scores, is_defective = data
    _, negatives, positives = count_scores(scores, is_defective)
    assert auroc(negatives, positives) == pytest.approx(roc_auc_score(is_defective, scores))
    assert average_precision(negatives, positives) == pytest.approx(
        average_precision_score(is_defective, scores)
    )
    precision, recall, _ = precision_recall_curve(is_defective, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    assert best_f1(negatives, positives) == pytest.approx(f1.max())


@given(labelled_scores())
def test_the_best_f1_is_that_of_the_best_threshold(data):
    scores, is_defective = data
    thresholds = np.nextafter(np.unique(scores), np.float32(-1))  # just below each score
    metrics = [image_metrics(scores, is_defective, threshold) for threshold in thresholds]
    best = max(each["image_f1"] for each in metrics)
    assert metrics[0]["image_f1_best"] == pytest.approx(best)


@given(labelled_scores(), st.data())
def test_metrics_at_a_threshold_count_what_lies_above(data, drawn):
    scores, is_defective = data
    threshold = float(drawn.draw(st.sampled_from(list(scores))))
    flagged = scores > threshold
    true, false = (flagged & is_defective).sum(), (flagged & ~is_defective).sum()
    metrics = image_metrics(scores, is_defective, threshold)
    assert tuple(metrics) == IMAGE_METRICS
    assert metrics["false_alarm_rate"] == pytest.approx(false / (~is_defective).sum())
    assert metrics["miss_rate"] == pytest.approx(1 - true / is_defective.sum())
    assert metrics["image_f1"] == pytest.approx(2 * true / (true + false + is_defective.sum()))


def test_a_threshold_is_compared_in_the_scores_precision():
    scores = np.array([0.1, 0.1], np.float32)  # a little above a tenth
    assert image_metrics(scores, np.array([False, True]), 0.1)["miss_rate"] == 1


@given(SEEDS)
def test_leading_axes_are_independent(seed):
    counts = np.random.default_rng(seed).integers(0, 4, (2, 3, 2, 7))
    for metric in (auroc, average_precision, best_f1):
        batch = metric(*counts)
        assert batch.shape == (3, 2)
        for index in np.ndindex(3, 2):
            np.testing.assert_equal(batch[index], metric(counts[0][index], counts[1][index]))


@pytest.mark.parametrize("labels", [[], [True, True], [False, False]])
def test_without_both_classes_metrics_are_undefined(labels):
    labels = np.array(labels, bool)
    scores = np.arange(len(labels), dtype=np.float32)
    metrics = image_metrics(scores, labels, 0.0)
    intervals = bootstrap(scores, labels, 0.0, resamples=3)
    for metric in ("image_auroc", "image_aupr", "image_f1_best", "image_f1"):
        assert math.isnan(metrics[metric])
        assert np.isnan(intervals[metric]).all()
    assert math.isnan(metrics["false_alarm_rate"]) == (not (~labels).any())
    assert math.isnan(metrics["miss_rate"]) == (not labels.any())


def test_without_a_threshold_its_metrics_are_undefined():
    metrics = image_metrics(np.array([1.0, 2.0]), np.array([False, True]), None)
    assert [metric for metric, value in metrics.items() if math.isnan(value)] == [
        "image_f1",
        "false_alarm_rate",
        "miss_rate",
    ]


@settings(max_examples=25)
@given(SEEDS)
def test_pixel_metrics_from_histograms_are_close_to_exact(seed):
    maps, masks = random_maps(np.random.default_rng(seed), count=3, side=24)
    metrics = pixel_metrics(PixelCounts.of(maps, masks))
    assert metrics["pixel_auroc"] == pytest.approx(
        roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-4
    )
    assert metrics["pixel_aupro"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-3)


@given(SEEDS, st.floats(0.01, 1))
def test_aupro_of_distinct_values_is_exact(seed, limit):
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 6, 6)) < 0.3
    masks[0, 0, :2] = True, False
    maps = rng.integers(0, 9, masks.shape)
    counts = [np.bincount(maps[chosen], minlength=9) for chosen in (~masks, masks)]
    overlaps, regions = np.zeros(9), 0
    for map_, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += count
        for label in range(1, count + 1):
            inside = map_[labels == label]
            overlaps += np.bincount(inside, minlength=9) / len(inside)
    expected = slow_aupro(maps, masks, limit)
    assert aupro(counts[0], overlaps, regions, limit) == pytest.approx(expected)


def test_regions_touch_at_corners_but_never_across_images():
    masks = np.zeros((2, 4, 4), bool)
    masks[:, [0, 1], [0, 1]] = True
    assert PixelCounts.of(np.ones((2, 4, 4), np.float32), masks).regions == 2


def test_at_mvtecs_size_metrics_from_histograms_are_close_to_exact():
    rng = np.random.default_rng(0)
    # distances like a trunk's: chi-distributed in a narrow range, which spans few bins
    distances = np.sqrt(rng.chisquare(448, (24, 64, 64)))
    masks = np.zeros((24, 256, 256), bool)
    for mask in masks[8:]:
        top, left = rng.integers(0, 200, 2)
        height, width = rng.integers(4, 50, 2)
        mask[top : top + height, left : left + width] = True
    distances *= 1 + 0.05 * masks[:, 2::4, 2::4]
    maps = AnomalyMapper((64, 64), (256, 256)).maps(distances).astype(np.float32)
    counts = PixelCounts.of(maps, masks)
    metrics = pixel_metrics(counts)
    exact = roc_auc_score(masks.ravel(), maps.ravel())
    assert 0.9 < exact < 0.995
    assert metrics["pixel_auroc"] == pytest.approx(exact, abs=1e-4)
    assert metrics["pixel_aupro"] == pytest.approx(sorted_aupro(maps, masks, 0.3), abs=5e-4)


def test_pixels_without_a_region_have_no_metrics():
    maps = np.ones((2, 3, 3), np.float32)
    for counts in (
        PixelCounts.empty(),
        PixelCounts.of(maps, maps > 1),
        PixelCounts.of(maps, maps > 0),
    ):
        assert np.isnan(list(pixel_metrics(counts).values())).all()


@given(SEEDS, st.integers(0, 4))
def test_pixel_counts_of_parts_add_up_to_the_whole(seed, split):
    maps, masks = random_maps(np.random.default_rng(seed), count=4, side=16)
    whole = PixelCounts.of(maps, masks)
    parts = [PixelCounts.of(maps[part], masks[part]) for part in np.s_[:split, split:]]
    total = sum(parts, PixelCounts.empty())
    np.testing.assert_array_equal(total.negatives, whole.negatives)
    np.testing.assert_array_equal(total.positives, whole.positives)
    np.testing.assert_allclose(total.overlaps, whole.overlaps)
    assert total.regions == whole.regions
    assert whole.negatives.sum() + whole.positives.sum() == maps.size
    assert whole.overlaps.sum() == pytest.approx(whole.regions)


@given(SEEDS)
def test_pixel_counts_survive_being_stored(seed):
    counts = PixelCounts.of(*random_maps(np.random.default_rng(seed), count=2, side=16))
    for original in (counts, PixelCounts.empty()):
        stored = PixelCounts.from_bytes(original.to_bytes())
        for name in ("negatives", "positives", "overlaps"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(original, name))
            assert getattr(stored, name).dtype == getattr(original, name).dtype
        assert stored.regions == original.regions


def test_a_shards_pixel_counts_are_small():
    maps, masks = random_maps(np.random.default_rng(0), count=64, side=128)
    assert len(PixelCounts.of(maps, masks).to_bytes()) < 300_000


def test_intervals_equal_those_of_resampling_one_by_one():
    rng = np.random.default_rng(0)
    is_defective = np.arange(60) < 25
    scores = rng.normal(size=60).round(1) + is_defective  # with ties
    threshold = 0.7
    classes = scores[~is_defective], scores[is_defective]
    replicates = []
    for _ in range(4000):
        drawn = [rng.choice(values, len(values)) for values in classes]
        labels = np.repeat([False, True], [len(values) for values in drawn])
        replicates.append(list(image_metrics(np.concatenate(drawn), labels, threshold).values()))
    expected = np.quantile(replicates, [0.025, 0.975], axis=0).T
    intervals = bootstrap(scores, is_defective, threshold, resamples=4000)
    assert tuple(intervals) == IMAGE_METRICS
    np.testing.assert_allclose(list(intervals.values()), expected, atol=0.03)


def test_most_intervals_contain_the_true_auroc():
    rng = np.random.default_rng(0)
    truth = (1 + math.erf(math.sqrt(0.5))) / 2  # two unit Gaussians √2 apart: Φ(1)
    is_defective = np.arange(120) < 60
    hits = 0
    for seed in range(200):
        scores = rng.normal(size=120) + math.sqrt(2) * is_defective
        low, high = bootstrap(scores, is_defective, None, resamples=200, seed=seed)["image_auroc"]
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


@given(labelled_scores(), SEEDS)
def test_the_seed_determines_the_intervals(data, seed):
    first, second = (bootstrap(*data, 1.0, resamples=20, seed=seed) for _ in range(2))
    assert first == second


def test_chunks_of_many_images_give_correct_intervals():
    is_defective = np.arange(20_000) < 5_000
    scores = np.where(is_defective, np.linspace(2, 3, 20_000), np.linspace(0, 1, 20_000))
    threshold = float(np.quantile(scores[is_defective], 0.1))
    intervals = bootstrap(scores, is_defective, threshold, resamples=400)
    assert intervals["image_auroc"] == (1, 1)
    # the interval of a rate is binomial
    spread = 1.96 * math.sqrt(0.1 * 0.9 / 5_000)
    assert intervals["miss_rate"] == pytest.approx((0.1 - spread, 0.1 + spread), abs=0.002)
