import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from padim_ray.evaluation.curves import draw_curves
from padim_ray.evaluation.metrics import PixelCounts, image_metrics, pixel_metrics
from padim_ray.evaluation.tables import GroupOutcome

DEFECTS = ["good"] * 30 + ["crack"] * 20


@pytest.fixture
def outcome():
    rng = np.random.default_rng(0)
    maps = rng.gamma(4, size=(50, 8, 8)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[30:, 2:5, 2:5] = True
    maps += 2 * masks
    pixels = {
        "good": PixelCounts.of(maps[:30], masks[:30]),
        "crack": PixelCounts.of(maps[30:], masks[30:]),
    }
    return GroupOutcome(maps.max((1, 2)), DEFECTS, 11.0, pixels)


@pytest.fixture
def lines(monkeypatch):
    """The lines drawn: (panel, label) → x, y."""
    drawn = {}
    original = Axes.add_line

    def add_line(axes, line):
        drawn[axes.get_title(), line.get_label()] = line.get_data()
        return original(axes, line)

    monkeypatch.setattr(Axes, "add_line", add_line)
    return drawn


def test_the_picture_is_a_png_1200_pixels_wide(outcome):
    picture = Image.open(io.BytesIO(draw_curves("tile", outcome, "good")))
    assert (picture.format, picture.size) == ("PNG", (1200, 480))


def test_curves_enclose_the_areas_in_their_labels(outcome, lines):
    draw_curves("tile", outcome, "good")
    images = image_metrics(outcome.scores, np.arange(50) >= 30, outcome.threshold)
    pixels = pixel_metrics(outcome.pixels["good"] + outcome.pixels["crack"])
    x, y = lines["ROC", f"image: AUROC {images['image_auroc']:.3f}"]
    assert np.trapezoid(y, x) == pytest.approx(images["image_auroc"])
    x, y = lines["ROC", f"pixel: AUROC {pixels['pixel_auroc']:.3f}"]
    assert np.trapezoid(y, x) == pytest.approx(pixels["pixel_auroc"])
    x, y = lines["Precision-recall", f"image: AUPR {images['image_aupr']:.3f}"]
    assert (np.diff(x) * y[1:]).sum() == pytest.approx(images["image_aupr"])
    x, y = lines["Per-region overlap (PRO)", f"pixel: AUPRO {pixels['pixel_aupro']:.3f}"]
    fine = np.linspace(0, 0.3, 10_001)
    area = np.trapezoid(np.interp(fine, x, y), fine) / 0.3
    assert area == pytest.approx(pixels["pixel_aupro"], abs=1e-3)


def test_the_models_threshold_is_marked(outcome, lines):
    draw_curves("tile", outcome, "good")
    metrics = image_metrics(outcome.scores, np.arange(50) >= 30, outcome.threshold)
    (x,), (y,) = lines["ROC", "the model's threshold"]
    assert (x, y) == pytest.approx((metrics["false_alarm_rate"], 1 - metrics["miss_rate"]))
    (recall,), (precision,) = lines["Precision-recall", "the model's threshold"]
    assert recall == pytest.approx(1 - metrics["miss_rate"])
    f1 = 2 * recall * precision / (recall + precision)
    assert f1 == pytest.approx(metrics["image_f1"])


@pytest.mark.parametrize(
    "outcome",
    [
        GroupOutcome(np.array([]), []),
        GroupOutcome(np.array([1.0]), ["good"], 2.0),
        GroupOutcome(np.array([1.0]), ["crack"], 0.0),
    ],
)
def test_undefined_curves_are_not_drawn(outcome, lines):
    assert draw_curves("tile", outcome, "good")
    assert not lines


def test_without_masks_the_image_curves_are_drawn_alone(outcome, lines):
    draw_curves("tile", GroupOutcome(outcome.scores, DEFECTS), "good")
    assert {label.split(":")[0] for _, label in lines} == {"image"}


def test_a_name_is_not_parsed_as_a_formula(outcome):
    assert draw_curves("$\\frac{1$ \n" * 50, outcome, "good")
