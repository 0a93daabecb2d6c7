"""The evaluate job: scoring of labelled images, and metrics of how well defects were found."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import PadimError
from padim_ray.evaluation import tables
from padim_ray.evaluation.curves import draw_curves
from padim_ray.evaluation.metrics import PixelCounts
from padim_ray.evaluation.tables import GroupOutcome, MaskCounts
from padim_ray.images.fetch import is_unfetched
from padim_ray.images.manifest import TEXT, canonical_uris, cast_column, check_stores
from padim_ray.images.sources import hide_credentials
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.pipeline.jobs.score import scoring_job
from padim_ray.pipeline.jobs.scoring_run import ScoringJob
from padim_ray.pipeline.stages.count import CountDefectivePixels
from padim_ray.pipeline.stages.decode import fetcher
from padim_ray.runs.listing import read_images_table
from padim_ray.runs.options.common import from_mapping
from padim_ray.runs.options.evaluate import EvaluateOptions
from padim_ray.runs.summary import Summary
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location, safe_segment

log = logging.getLogger("padim_ray")
MAX_CURVES = 100  # the first groups get curves; drawing takes half a second each


def evaluate(**options: Any) -> Summary:
    """Score images whose defects are known, and measure how well they were found.

    Args:
        options: the fields of `EvaluateOptions`, named as on the command line.

    Raises:
        PadimError: as for `score`, and if images have no labels or masks can't be matched.
    """
    return run_evaluate(from_mapping(EvaluateOptions, options))


def run_evaluate(options: EvaluateOptions) -> Summary:
    """Evaluate as `options` say; see `evaluate`."""
    with (
        hidden_credentials(options.storage_options),
        scoring_job("evaluate", options, read_labelled_images) as job,
    ):
        if not job.is_complete:
            _evaluate(job, options)
        return job.finish(
            is_good=pc.equal(job.manifest["defect"], options.normal).to_numpy(),
            places={
                name: (job.root / name).uri for name in ("metrics.md", "metrics.json", "curves")
            },
        )


def _evaluate(job: ScoringJob, options: EvaluateOptions) -> None:
    """Score the images, and write metrics and curves."""
    truth = _Truth(job.manifest, options.normal)
    count = None
    if "mask_uri" in job.manifest.column_names:
        count = CountDefectivePixels(
            options.normal,
            job.version.spec.preprocessing,
            fetcher(options),
            options.max_image_pixels,
        )
    job.run(count, truth.add)
    job.failures.unfetched_masks = sum(map(is_unfetched, truth.unreadable.values()))
    outcomes = truth.outcomes(job)
    results = tables.evaluate(outcomes, options.normal)
    root = job.root
    data = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (root / "metrics.json").write(data.encode())
    (root / "metrics.md").write(tables.to_markdown(results).encode())
    (root / "metrics.parquet").write_table(tables.to_table(results))
    for group, outcome in islice(outcomes.items(), MAX_CURVES):
        picture = draw_curves(group, outcome, options.normal)
        (root / f"curves/{safe_segment(group)}.png").write(picture)
    truth.report()


def read_labelled_images(options: EvaluateOptions) -> pa.Table:
    """List the images with a column `defect`, and with `mask_uri` if there are masks.

    Raises:
        PadimError: if an image has no defect, or masks can't be matched to images.
    """
    manifest = read_images_table(options)
    if "defect" not in manifest.column_names:
        raise PadimError(
            "Nothing says which images are good: capture {defect} in --images, as in "
            "'ROOT/{group}/test/{defect}/{name}.png', or give the manifest a column 'defect'"
        )
    if options.manifest is not None:
        location = Location.of(options.manifest, options.storage_options)
        for name in {"defect", "mask_uri"} & set(manifest.column_names):
            manifest = cast_column(manifest, name, TEXT, location)
        if "mask_uri" in manifest.column_names:
            check_stores(manifest["mask_uri"], location)
            manifest = hide_credentials(canonical_uris(manifest, "mask_uri"), "mask_uri")
    defects = manifest["defect"].unique().to_pylist()
    if None in defects:
        raise PadimError(f"The manifest {options.manifest} has an image without a defect")
    if options.normal not in defects:
        raise PadimError(
            f"No image has the defect {options.normal!r}, which --normal says marks good images; "
            f"the defects are {_some(list(map(repr, sorted(defects))))}"
        )
    if options.masks is None:
        return manifest
    template = UriTemplate.parse(options.masks, options.storage_options)
    if not template.names:
        raise PadimError("--masks captures no name that would match a mask to its image")
    for name in template.names:
        if name not in manifest.column_names:
            raise PadimError(f"--masks captures {{{name}}}, which --images doesn't")
    try:
        masks = list_images(template)
    except PadimError as error:
        raise PadimError(f"--masks: {error}") from error
    by_key: dict[tuple, str] = {}
    for key, uri in zip(_keys(masks, template.names), masks["uri"].to_pylist(), strict=True):
        if key in by_key:
            raise PadimError(f"--masks finds two masks for one image: {by_key[key]} and {uri}")
        by_key[key] = uri
    uris = [by_key.get(key) for key in _keys(manifest, template.names)]
    if not any(uris):
        raise PadimError(
            f"--masks finds {len(by_key)} masks, but none matches an image: an image and its mask "
            f"must have the same {', '.join(template.names)}"
        )
    if len(set(filter(None, uris))) < sum(uri is not None for uri in uris):
        raise PadimError(
            f"--masks finds the same mask for several images: let it capture more than "
            f"{', '.join(template.names)}, such as {{name}}"
        )
    return manifest.append_column("mask_uri", pa.array(uris, TEXT))


def _keys(table: pa.Table, names: Sequence[str]) -> list[tuple]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


@dataclass
class _Truth:
    """The images' labels, and the counts of pixels that accumulate while they are scored.

    Attributes:
        manifest: the images, with `defect` and perhaps `mask_uri`.
        normal: value of `defect` that marks a good image.
        pixels: counts by group and defect.
        masks: counts of masks by group.
        unreadable: errors of unreadable masks, by URI.
    """

    manifest: pa.Table
    normal: str
    pixels: dict[tuple[str, str], PixelCounts] = field(default_factory=dict)
    masks: dict[str, MaskCounts] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, rows: slice, counts: Mapping[str, Any]) -> None:
        """Add `CountDefectivePixels`' counts of one shard, which is `rows` of the manifest."""
        if not counts:
            return
        group = self.manifest["group"][rows.start].as_py()
        for defect, data in counts["pixels"]:
            before = self.pixels.get((group, defect), PixelCounts.empty())
            self.pixels[group, defect] = before + PixelCounts.from_bytes(data)
        self.unreadable.update(counts["unreadable_masks"])
        masks = self.masks.get(group, MaskCounts())
        self.masks[group] = replace(
            masks,
            masks=masks.masks + counts["masks"],
            empty_masks=masks.empty_masks + counts["empty_masks"],
            unreadable_masks=masks.unreadable_masks + len(counts["unreadable_masks"]),
        )

    def missing(self) -> pa.Table:
        """Defective images without a mask; none if the job has no masks at all."""
        if "mask_uri" not in self.manifest.column_names:
            return self.manifest.slice(0, 0)
        is_defective = pc.not_equal(self.manifest["defect"], self.normal)
        return self.manifest.filter(pc.and_(is_defective, pc.is_null(self.manifest["mask_uri"])))

    def outcomes(self, job: ScoringJob) -> dict[str, GroupOutcome]:
        """Every group's scores, labels and counts."""
        missing = Counter(self.missing()["group"].to_pylist())
        outcomes = {}
        for group, where, scores, decision in job.scores.groups():
            images = self.manifest.slice(where.start, where.stop - where.start)
            is_scored = np.isfinite(scores)
            defects = np.array(images["defect"].to_pylist(), object)
            outcomes[group] = GroupOutcome(
                scores=scores[is_scored],
                defects=defects[is_scored].tolist(),
                threshold=decision.threshold,
                pixels={d: count for (g, d), count in self.pixels.items() if g == group},
                masks=replace(self.masks.get(group, MaskCounts()), missing_masks=missing[group]),
                failed=int((~is_scored).sum()),
            )
        return outcomes

    def report(self) -> None:
        """Log missing, unreadable and empty masks."""
        missing = self.missing()["uri"].to_pylist()
        if missing:
            log.warning(
                "%d defective images have no mask and don't count in pixel metrics: %s",
                len(missing),
                _some(missing),
            )
        if self.unreadable:
            problems = [f"{uri} ({error})" for uri, error in self.unreadable.items()]
            log.warning("%d masks can't be read: %s", len(problems), _some(problems))
        empty = sum(counts.empty_masks for counts in self.masks.values())
        if empty:
            log.warning("%d masks of defective images are empty: all pixels count as good", empty)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
