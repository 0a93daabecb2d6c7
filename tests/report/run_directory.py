"""Directories as `score` and `evaluate` leave them, with small drawn images, to report on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from padim_ray.images.preprocessing import Preprocessing
from padim_ray.scoring.heatmap import draw_heatmap
from padim_ray.storage.location import safe_segment

AWKWARD_NAMES = [
    "<script>alert(1)</script>.png",
    "\"quotes\" & 'more'.png",
    "Größe 钢板 🔩.png",
    "a%2Fb #1?.png",
    "</script><!--.png",
    "rtl \u202egnp.exe.png",
]

REGION = pa.struct(
    [
        *((name, pa.int32()) for name in ("x", "y", "width", "height")),
        ("peak", pa.float32()),
        ("area", pa.int64()),
    ]
)
COLUMNS = {
    "uri": pa.string(),
    "group": pa.string(),
    "defect": pa.string(),
    "size": pa.int64(),
    "version_tag": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "score": pa.float32(),
    "p_value": pa.float64(),
    "threshold": pa.float64(),
    "is_anomalous": pa.bool_(),
    "regions": pa.list_(REGION),
    "heatmap_uri": pa.string(),
    "map_uri": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "model_version": pa.int32(),
}


def scored_row(uri: str, score: float, threshold: float | None = 10.0, **others: Any) -> dict:
    return {
        "uri": uri,
        "group": "bolt",
        "status": "scored",
        "score": score,
        "threshold": threshold,
        "is_anomalous": None if threshold is None else score > threshold,
        "p_value": float(np.exp(-score / threshold)) if threshold else None,
        "width": 96,
        "height": 72,
        **others,
    }


def failed_row(uri: str, error: str = "decode: empty file", **others: Any) -> dict:
    return {"uri": uri, "group": "bolt", "status": "failed", "error": error, **others}


def results_table(rows: Sequence[dict]) -> pa.Table:
    """A table as `score` writes it; other keys of the rows are captured columns."""
    captured = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    schema = {**COLUMNS, **dict.fromkeys(captured, pa.string())}
    return pa.table(
        {name: pa.array([row.get(name) for row in rows], kind) for name, kind in schema.items()}
    )


def write_part(root: Path, number: int, rows: Sequence[dict], row_group_size: int = 1000) -> str:
    """Write rows to a results file, and return its name."""
    path = root / f"results/part-{number:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(results_table(rows), path, row_group_size=row_group_size)
    return path.name


def group_summary(scored: int = 100, **others: Any) -> dict[str, Any]:
    """A group's entry in run.json."""
    return {
        "listed": scored,
        "scored": scored,
        "failed": 0,
        "flagged": 0,
        "threshold": 10.0,
        "threshold_note": None,
        "pixel_threshold": 8.0,
        "calibration_images": 200,
        "drift": drift(changed=False),
        "histogram": histogram(),
        "heatmap_scale": [6.2, 31.0],
        **others,
    }


def drift(*, changed: bool) -> dict[str, Any]:
    meaning = (
        "bolt's images have changed since the model was fitted: refit it"
        if changed
        else "bolt's images are like those that the model was fitted to"
    )
    return {
        "distance": 0.31 if changed else 0.05,
        "critical": 0.12,
        "higher": changed,
        "has_changed": changed,
        "meaning": meaning,
    }


def histogram(seed: int = 0, defective: int = 12, shift: float = 1) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    edges = np.geomspace(1, 100, 81)
    scores = np.r_[rng.lognormal(1.8, 0.18, 2000) * shift, rng.lognormal(3, 0.4, defective)]
    training = rng.lognormal(1.8, 0.17, 200)
    return {
        "edges": edges.tolist(),
        "scores": np.histogram(scores, edges)[0].tolist(),
        "leave_one_out": np.histogram(training, edges)[0].tolist(),
    }


def write_run(root: Path, groups: dict[str, dict] | None = None, **others: Any) -> None:
    """Write run.json, with the groups' counts added up."""
    groups = {"bolt": group_summary()} if groups is None else groups
    counts = {
        name: sum(group[name] for group in groups.values())
        for name in ("listed", "scored", "failed", "flagged")
    }
    run = {
        "job": "score",
        "padim_ray": "0.1.0",
        "started_at": "2026-11-20T05:12:03+00:00",
        "finished_at": "2026-11-20T05:47:41+00:00",
        "images": "s3://archive/{group}/2026-11-20/{defect}/*.png",
        "model": "s3://models/line7",
        "model_version": 3,
        "alpha": 0.01,
        "threshold": None,
        **counts,
        "failed_by_cause": {"decode: empty file": counts["failed"]} if counts["failed"] else {},
        "seconds": 2138.0,
        "images_per_second": counts["listed"] / 2138,
        "heatmaps": "anomalous",
        "groups": groups,
        **others,
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "run.json").write_text(json.dumps(run))


def draw_picture(path: Path, size: tuple[int, int] = (96, 72), *, seed: int = 0) -> Image.Image:
    """Draw a plate with holes and a scratch, and write it to `path`."""
    rng = np.random.default_rng(seed)
    width, height = size
    grain = rng.normal(150, 6, (height, width, 1)) * [1.0, 0.98, 0.94]
    image = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for x in (0.15, 0.5, 0.85):
        for y in (0.2, 0.8):
            radius = 0.05 * width
            center = x * width, y * height
            pen.ellipse(
                [center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius],
                fill=(40, 44, 48),
            )
    start = rng.uniform(0.25, 0.6, 2) * size
    end = start + rng.uniform(0.05, 0.2, 2) * size
    pen.line([*start, *end], fill=(225, 220, 210), width=max(1, width // 60))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def noisy_picture(path: Path, side: int = 800, *, seed: int = 0) -> None:
    """Write noise, which compresses worst."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path, compress_level=0)


def draw_heat(root: Path, name: str, image: Image.Image, seed: int = 0) -> str:
    """Write a heatmap of the image below `root`, and return its URI."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256] / 256
    left, top = rng.uniform(0.3, 0.7, 2)
    distances = 4 + 30 * np.exp(-((x - left) ** 2 + (y - top) ** 2) / 0.01)
    preprocessing = Preprocessing((256, 256))
    heatmap = draw_heatmap(np.asarray(image), distances, preprocessing, (6.2, 31.0))
    path = root / "heatmaps" / f"{safe_segment(name)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    heatmap.save(path)
    return str(path)


def region(x: int, y: int, width: int, height: int, peak: float = 20.0) -> dict[str, Any]:
    area = width * height // 2
    return {"x": x, "y": y, "width": width, "height": height, "peak": peak, "area": area}


def write_metrics(root: Path, groups: Sequence[str], *, curves: bool = True) -> None:
    """Write metrics.json and curves as `evaluate` does."""
    names = ["image_auroc", "image_aupr", "image_f1_best", "image_f1", "false_alarm_rate"]
    names += ["miss_rate", "pixel_auroc", "pixel_aupro", "pixel_f1_best"]
    rng = np.random.default_rng(0)
    evaluated = {}
    for group in groups:
        values = {name: float(rng.uniform(0.8, 1)) for name in names}
        metrics = {
            name: {"value": value, "low": value - 0.05, "high": min(1, value + 0.03)}
            for name, value in values.items()
        }
        metrics["pixel_aupro"]["value"] = None
        defect = {"images": 7, "metrics": {"image_auroc": {"value": values["image_auroc"]}}}
        evaluated[group] = {
            "images": 30,
            "normal": 16,
            "defective": 14,
            "metrics": metrics,
            "defects": {"crack": defect, "scratch": defect},
        }
        if curves:
            path = root / "curves" / f"{safe_segment(group)}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (900, 300), "white").save(path)
    average = dict.fromkeys(names, 0.93)
    content = {"normal": "good", "aupro_limit": 0.3, "average": average, "groups": evaluated}
    (root / "metrics.json").write_text(json.dumps(content))
