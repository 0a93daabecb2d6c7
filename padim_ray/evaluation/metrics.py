"""Metrics of images and pixels, computed from counts per score.

A metric takes two arrays of counts, `negatives` and `positives`, both (…, bins). Bins ascend with
the score: for images they are the distinct scores, for pixels the bins of `scoring.histogram`.
Thresholds lie at the lower edges of bins: a bin and all above it are flagged. Leading axes are
batches. A metric is NaN if there are no negatives or no positives.
"""

import io
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage

from padim_ray.scoring.histogram import BINS, bin_indices
from padim_ray.scoring.threshold import is_flagged

IMAGE_METRICS = (
    "image_auroc",
    "image_aupr",
    "image_f1_best",
    "image_f1",
    "false_alarm_rate",
    "miss_rate",
)
PIXEL_METRICS = ("pixel_auroc", "pixel_aupro", "pixel_f1_best")
AUPRO_LIMIT = 0.3  # false-positive rate
LEVEL = 0.95  # of confidence intervals
_CHUNK = 2**17  # counts per class that the bootstrap holds at a time: 1 MiB
_EIGHT_CONNECTED = np.array(  # within each map, not across maps
    [np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]
)


def count_flagged(counts: np.ndarray) -> np.ndarray:
    """Flagged counts as the threshold falls bin by bin, from none to all.

    (…, bins) → (…, bins + 1) float64. For negatives these are the false positives, for positives
    the true positives; true over false positives is the ROC curve.
    """
    flagged = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1))
    flagged[..., 1:] = counts[..., ::-1]
    return flagged.cumsum(-1, out=flagged)


def auroc(negatives: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: (…, bins), (…, bins) → (…)."""
    false, true = count_flagged(negatives), count_flagged(positives)
    return _ratio(np.trapezoid(true, false), false[..., -1] * true[..., -1])


def average_precision(negatives: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as a step function: (…, bins), (…, bins) → (…).

    As scikit-learn's `average_precision_score`: linear interpolation would be too optimistic.
    """
    false, true = count_flagged(negatives), count_flagged(positives)
    precision = true / np.maximum(true + false, 1)
    area = (np.diff(true) * precision[..., 1:]).sum(-1)
    return _ratio(area, true[..., -1], defined=false[..., -1] > 0)


def best_f1(negatives: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The highest F1 over all thresholds: (…, bins), (…, bins) → (…)."""
    false, true = count_flagged(negatives), count_flagged(positives)
    total = true[..., -1:]
    f1 = _ratio(2 * true, true + false + total, defined=(false[..., -1:] > 0) & (total > 0))
    return f1.max(-1)


def aupro(
    negatives: np.ndarray, overlaps: np.ndarray, regions: int, limit: float = AUPRO_LIMIT
) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    A region's overlap is the share of its pixels that are flagged; PRO is the mean over all
    regions. The false-positive rate is taken over all normal pixels, also those of defective images
    (Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021).

    Args:
        negatives: normal pixels, (bins,).
        overlaps: (bins,), the sum over regions of the region's pixel counts divided by its area.
        regions: number of regions.
        limit: the false-positive rate at which the curve ends, by linear interpolation.
    """
    false = count_flagged(negatives)
    if not (regions and false[-1]):
        return float("nan")
    rate, overlap = false / false[-1], count_flagged(overlaps) / regions
    inside = rate <= limit
    rate_inside = np.append(rate[inside], limit)
    overlap_inside = np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float(np.trapezoid(overlap_inside, rate_inside) / limit)


def count_scores(
    scores: np.ndarray, is_defective: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the normal and defective images of each distinct score.

    Returns:
        The distinct scores, ascending, and both counts: three arrays of the same length.
    """
    values, bins = np.unique(scores, return_inverse=True)
    negatives, positives = (
        np.bincount(bins[chosen], minlength=len(values)) for chosen in (~is_defective, is_defective)
    )
    return values, negatives, positives


def image_metrics(
    scores: np.ndarray, is_defective: np.ndarray, threshold: float | None
) -> dict[str, float]:
    """`IMAGE_METRICS` of scores (n,) and labels (n,); images above the threshold are flagged.

    Without a threshold, the metrics that depend on it are NaN.
    """
    values, negatives, positives = count_scores(scores, is_defective)
    flagged = None if threshold is None else is_flagged(values, threshold)
    metrics = _image_metrics(negatives, positives, flagged)
    return {metric: float(value) for metric, value in metrics.items()}


def bootstrap(
    scores: np.ndarray,
    is_defective: np.ndarray,
    threshold: float | None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of all `IMAGE_METRICS`, resampling images within each class.

    If the images at hand are separated without an error, so are all resamples, and the interval has
    no width.

    Scores are merged into as few bins as the metrics can distinguish: normal scores with no
    defective one between them share a bin. Resamples are computed in chunks of a few MiB. So 1000
    resamples of 100,000 images take seconds, and less the better the classes are separated.

    Args:
        scores: (n,), of all images.
        is_defective: (n,) bool.
        threshold: as for `image_metrics`.
        resamples: number of resamples.
        seed: of the random number generator.
        level: the share of resamples within the interval.

    Returns:
        The interval's ends for each metric, NaN where the metric is undefined.
    """
    values, negatives, positives = count_scores(scores, is_defective)
    if not len(values):
        return dict.fromkeys(IMAGE_METRICS, (float("nan"), float("nan")))
    flagged = None if threshold is None else is_flagged(values, threshold)
    is_separate = (positives[1:] > 0) | (positives[:-1] > 0)
    if flagged is not None:
        is_separate |= flagged[1:] != flagged[:-1]
    starts = np.flatnonzero(np.append(True, is_separate))
    flagged = None if flagged is None else flagged[starts]
    negatives, positives = (np.add.reduceat(counts, starts) for counts in (negatives, positives))

    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(starts))
    chunks = [
        _image_metrics(_resample(negatives, size, rng), _resample(positives, size, rng), flagged)
        for size in np.diff([*range(0, resamples, chunk), resamples])
    ]
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {
        metric: np.quantile(np.concatenate([part[metric] for part in chunks]), tails)
        for metric in IMAGE_METRICS
    }
    return {metric: (float(low), float(high)) for metric, (low, high) in intervals.items()}


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """Sufficient counts for the pixel metrics of any number of anomaly maps; they add up.

    `negatives`, `positives`: normal and defective pixels, (BINS,) int64. `overlaps`: (BINS,)
    float64, see `aupro`. `regions`: 8-connected components of the masks.
    """

    negatives: np.ndarray
    positives: np.ndarray
    overlaps: np.ndarray
    regions: int

    @classmethod
    def of(cls, anomaly_maps: np.ndarray, masks: np.ndarray) -> Self:
        """Count the pixels of maps (n, h, w) float32; masks (n, h, w) bool are True in defects."""
        bins = bin_indices(anomaly_maps)
        labels, regions = ndimage.label(masks, _EIGHT_CONNECTED)
        areas = np.bincount(labels.ravel())
        defective = bins[masks]
        return cls(
            negatives=np.bincount(bins[~masks], minlength=BINS),
            positives=np.bincount(defective, minlength=BINS),
            overlaps=np.bincount(defective, 1 / areas[labels[masks]], minlength=BINS),
            regions=regions,
        )

    @classmethod
    def empty(cls) -> Self:
        """The counts of no maps."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), np.zeros(BINS), 0)

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.negatives + other.negatives,
            self.positives + other.positives,
            self.overlaps + other.overlaps,
            self.regions + other.regions,
        )

    def to_bytes(self) -> bytes:
        """The non-empty bins as a compressed npz."""
        bins = np.flatnonzero(self.negatives + self.positives)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            bins=bins.astype(np.uint16),
            negatives=self.negatives[bins],
            positives=self.positives[bins],
            overlaps=self.overlaps[bins],
            regions=self.regions,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Restore counts from `to_bytes`, exactly."""
        counts = cls.empty()
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            for name in ("negatives", "positives", "overlaps"):
                getattr(counts, name)[stored["bins"]] = stored[name]
            return cls(counts.negatives, counts.positives, counts.overlaps, int(stored["regions"]))


def pixel_metrics(pixels: PixelCounts) -> dict[str, float]:
    """`PIXEL_METRICS` over all counted pixels."""
    return {
        "pixel_auroc": float(auroc(pixels.negatives, pixels.positives)),
        "pixel_aupro": aupro(pixels.negatives, pixels.overlaps, pixels.regions),
        "pixel_f1_best": float(best_f1(pixels.negatives, pixels.positives)),
    }


def _image_metrics(
    negatives: np.ndarray, positives: np.ndarray, flagged: np.ndarray | None
) -> dict[str, np.ndarray]:
    """`IMAGE_METRICS` of counts (…, bins); `flagged` (bins,) bool: which exceed the threshold."""
    metrics = {
        "image_auroc": auroc(negatives, positives),
        "image_aupr": average_precision(negatives, positives),
        "image_f1_best": best_f1(negatives, positives),
    }
    normal, defective = negatives.sum(-1), positives.sum(-1)
    if flagged is None:
        unknown = np.full(normal.shape, np.nan)
        return metrics | dict.fromkeys(("image_f1", "false_alarm_rate", "miss_rate"), unknown)
    false, true = negatives @ flagged, positives @ flagged
    both = (normal > 0) & (defective > 0)
    return metrics | {
        "image_f1": _ratio(2 * true, true + false + defective, defined=both),
        "false_alarm_rate": _ratio(false, normal),
        "miss_rate": _ratio(defective - true, defective),
    }


def _resample(counts: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw all counted images with replacement, `size` times: (bins,) → (size, bins)."""
    images = np.repeat(np.arange(len(counts)), counts)  # with many bins, a multinomial is slower
    draws = (images[rng.integers(len(images), size=len(images))] for _ in range(size))
    return np.stack([np.bincount(drawn, minlength=len(counts)) for drawn in draws])


def _ratio(
    numerator: np.ndarray, denominator: np.ndarray, defined: np.ndarray | bool = True
) -> np.ndarray:
    """The ratio, NaN where `defined` is False or the denominator is 0."""
    nan = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nan, where=defined & (denominator > 0))
