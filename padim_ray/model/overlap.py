"""Whether models can be merged, and which images they have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import ModelError
from padim_ray.images.manifest import TEXT, sort_images
from padim_ray.model.spec import ModelSpec

SHOWN = 3  # images in an error message


def check_compatible(specs: Mapping[str, ModelSpec]) -> None:
    """Check that the statistics of all models are of the same features of the same pixels.

    Precision must be the same too: features in bfloat16 and float32 differ, so merged statistics
    would equal those of no single fit. The density's settings and the smoothing may differ.

    Args:
        specs: the models' specifications, by name.

    Raises:
        ModelError: if a model differs from the first; names all differences with both values.
    """
    (first, spec), *others = specs.items()
    for name, other in others:
        here, there = _features(spec, other), _features(other, spec)
        different = [
            f"{field} ({here.get(field, 'none')} there, {there.get(field, 'none')} here)"
            for field in here | there
            if here.get(field) != there.get(field)
        ]
        if different:
            raise ModelError(
                f"{name} can't be merged with {first}, which differs from it in "
                f"{', '.join(different)}; fit one of them again with the other's settings"
            )


def describe_settings(spec: ModelSpec) -> dict[str, str]:
    """The settings in which merged models may differ, in words."""
    return spec.density.describe() | {
        "sigma": f"{spec.sigma:g}",
        "score share": f"{spec.score_share:g}",
        "search": str(spec.search) + " with maps" * spec.search_maps,
    }


def _features(spec: ModelSpec, other: ModelSpec) -> dict[str, str]:
    """All settings that features depend on, in words that show how they differ from `other`'s."""
    seen = spec.preprocessing
    features = {
        "backbone": spec.backbone,
        "weights": f"SHA-256 {spec.weights_sha256[:12]}…",
        "layers": " ".join(spec.channels),
        "image size": _size(seen.resize),
        "crop": _size(seen.crop) if seen.crop else "none",
        "scaled JPEG": str(seen.scaled_jpeg),
        "resize": "letterbox" if seen.letterbox else "stretch",
        "grey range": "{:g} to {:g}".format(*seen.grey_range) if seen.grey_range else "none",
        "stride": str(spec.stride),
        "neighbourhood": str(spec.neighbourhood),
        "precision": spec.precision,
        "statistics": spec.density.statistics_kind,
    }
    for layer, kept in spec.channels.items():
        own = sorted(set(kept) - set(other.channels.get(layer, ())))
        among = f" with {own[0]} among them" if own else ""
        features[f"channels of {layer}"] = f"{len(kept)}{among}"
    return features


def _size(sides: tuple[int, int]) -> str:
    return "×".join(map(str, sides))


@dataclass(frozen=True)
class Union:
    """The images of several models together.

    Attributes:
        manifest: each image once, with its outcome.
        repeated: one row for each time that an image must be subtracted from the summed statistics,
            so that it counts once.
        left_out: (index of a model, group) whose statistics are not added, because other models
            have all of the group's images.
    """

    manifest: pa.Table
    repeated: pa.Table
    left_out: frozenset[tuple[int, str]]


def unite(
    names: Sequence[str], manifests: Sequence[pa.Table], nameless: Sequence[Mapping[str, int]]
) -> Union:
    """Unite the images of several models.

    Args:
        names: the models' names, for errors.
        manifests: the models' manifests, with `status`.
        nameless: per model, by group, the number of images in its statistics that its manifest
            doesn't list.

    Raises:
        ModelError: if an image is in two models and not known to be the same in both, by its group,
            size and version tag.
    """
    rows = pa.concat_tables(map(_with_tags, manifests), promote_options="permissive")
    model = np.repeat(np.arange(len(manifests)), [table.num_rows for table in manifests])
    is_fitted = pc.equal(rows["status"], "fitted").fill_null(False).to_numpy()
    image = _codes(rows["uri"])
    # for each image, the rows where it was fitted come first, in the models' order
    order = np.lexsort((model, ~is_fitted, image))
    is_first = np.diff(image[order], prepend=-1) != 0
    firsts = order[is_first]
    _check_same(names, rows, model, order, is_first, is_fitted)
    left_out = _left_out(rows, model, image, is_fitted, nameless)
    groups = rows["group"].to_pylist() if left_out else []
    counts = is_fitted.copy()
    if left_out:
        counts &= [(m, g) not in left_out for m, g in zip(model, groups, strict=True)]
    counted = order[counts[order]]
    repeated = counted[np.diff(image[counted], prepend=-1) == 0]
    outcomes = [n for n in ("status", "error", "leave_one_out_score") if n in rows.column_names]
    return Union(
        sort_images(rows.take(firsts)),
        sort_images(rows.take(repeated).drop_columns(outcomes)),
        frozenset(left_out),
    )


def _with_tags(manifest: pa.Table) -> pa.Table:
    for name, kind in {"size": pa.int64(), "version_tag": TEXT}.items():
        if name not in manifest.column_names:  # the model's images were given as tensors
            manifest = manifest.append_column(name, pa.nulls(manifest.num_rows, kind))
    return manifest


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)


def _check_same(
    names: Sequence[str],
    rows: pa.Table,
    model: np.ndarray,
    order: np.ndarray,
    is_first: np.ndarray,
    is_fitted: np.ndarray,
) -> None:
    """Compare each image that several models have with that of the first such model."""
    again = order[~is_first]
    before = order[is_first][is_first.cumsum()[~is_first] - 1]
    both = is_fitted[again]  # an image that failed in one model counts once anyway
    again, before = again[both], before[both]
    columns = ("group", "size", "version_tag")
    same = np.ones(len(again), bool)
    for name in columns:
        equal = pc.equal(rows[name].take(pa.array(again)), rows[name].take(pa.array(before)))
        same &= equal.fill_null(False).to_numpy()
    others = np.flatnonzero(~same)
    if not len(others):
        return
    shown = []
    for index in others[:SHOWN]:
        values = [
            f"{name} {rows[name][int(before[index])]} and {rows[name][int(again[index])]}"
            for name in columns
            if rows[name][int(before[index])].as_py() != rows[name][int(again[index])].as_py()
            or rows[name][int(again[index])].as_py() is None
        ]
        shown.append(
            f"{rows['uri'][int(again[index])]} ({', '.join(values)}) in "
            f"{names[model[before[index]]]} and {names[model[again[index]]]}"
        )
    raise ModelError(
        f"{len(others)} image{'s' * (len(others) != 1)} can't be merged, being in several models "
        f"but not known to be the same there: {'; '.join(shown)}{'; …' * (len(others) > SHOWN)}. "
        "Take them out of one with `forget`"
    )


def _left_out(
    rows: pa.Table,
    model: np.ndarray,
    image: np.ndarray,
    is_fitted: np.ndarray,
    nameless: Sequence[Mapping[str, int]],
) -> set[tuple[int, str]]:
    """Groups of models whose images the other models all have; later models are left out first."""
    times = np.bincount(image[is_fitted], minlength=image.max(initial=-1) + 1)
    if not (times > 1).any():
        return set()
    groups = rows["group"].combine_chunks().dictionary_encode()
    codes, left_out = groups.indices.to_numpy(zero_copy_only=False), set()
    for index in reversed(range(len(nameless))):
        mine = np.flatnonzero(is_fitted & (model == index))
        mine = mine[np.argsort(codes[mine], kind="stable")]
        for here in np.split(mine, np.flatnonzero(np.diff(codes[mine])) + 1):
            group = groups.dictionary[int(codes[here[0]])].as_py() if len(here) else None
            if group is None or nameless[index].get(group) or (times[image[here]] < 2).any():
                continue
            times[image[here]] -= 1
            left_out.add((index, group))
    return left_out
