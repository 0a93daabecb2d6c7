"""The merge job: models fitted to different images, combined into one."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import PadimError
from padim_ray.images.manifest import group_counts
from padim_ray.model.layout import current_number
from padim_ray.model.overlap import Union, check_compatible, describe_settings, unite
from padim_ray.model.publish import save_trunk_weights
from padim_ray.model.readers import reading
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import ModelVersion, open_named
from padim_ray.pipeline.jobs.calibrate import Sample
from padim_ray.pipeline.jobs.make_version import nameless_images, with_outcomes
from padim_ray.pipeline.jobs.new_version import Job
from padim_ray.pipeline.jobs.on_version import sample_of
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.runs.job_record import identify
from padim_ray.runs.options.common import check_no_credentials, from_mapping
from padim_ray.runs.options.merge import MergeOptions
from padim_ray.runs.summary import Summary, warn
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
MAX_WHY_LENGTH = 900  # characters of a version's description in model.json


def merge(*models: str, **options: Any) -> Summary:
    """Merge models that were fitted separately, and publish the result as a version of `model`.

    The result equals a model that is fitted to all of their images. The models must have the same
    trunk, channels, preprocessing and precision; where regularisation or smoothing differ, the
    first model's settings are used. An image that is in several models must be the same in all, and
    still readable: it is subtracted until it counts once.

    Args:
        models: two or more, such as "s3://models/line7", or a version of one,
            "s3://models/line7@3".
        options: the fields of `MergeOptions`, named as on the command line.

    Raises:
        PadimError: if the models are incompatible, or an image in several of them can't be
            subtracted.
    """
    return run_merge(models, from_mapping(MergeOptions, options))


def run_merge(models: Sequence[str], options: MergeOptions) -> Summary:
    """Merge as `options` say; see `merge`."""
    with hidden_credentials(options.storage_options):
        for model in models:
            check_no_credentials("A model's name", model)
        root = Location.of(options.model, options.storage_options)
        with ExitStack() as stack:
            claim = stack.enter_context(claimed(root, "merge"))
            root = claim.root
            versions = [open_named(name, options.storage_options) for name in models]
            for version in versions:
                if version.root != root:  # `prune` can't claim this model meanwhile
                    stack.enter_context(reading(version, "merge"))
            names = [version.name for version in versions]
            if len(set(names)) < max(2, len(names)):
                raise PadimError(
                    f"merge takes two or more different models, but was given {_listed(names)}"
                )
            check_compatible(dict(zip(names, (version.spec for version in versions), strict=True)))
            samples = [sample_of(version) for version in versions]
            sample = Sample(max(each.calibration_images for each in samples), samples[0].seed)
            union = unite(
                names,
                [with_outcomes(version.load_manifest()) for version in versions],
                [nameless_images(version) for version in versions],
            )
            base = _base(root, versions, union)
            return _Merge(
                name="merge",
                options=options,
                root=root,
                claim=claim,
                sample=sample,
                identity=identify(
                    options,
                    job="merge",
                    models=names,
                    models_sha256=[version.fingerprint() for version in versions],
                    calibration_images=sample.calibration_images,
                    seed=sample.seed,
                ),
                why=_escaped(f"merged from {_listed(names)}"),
                base=base,
                calibrates=options.calibrate == "readable",
                union=union,
            ).run()


def _base(root: Location, versions: Sequence[ModelVersion], union: Union) -> BaseVersions:
    """Decide for each group whether it is merged, copied, or kept where it is."""
    base = BaseVersions(tuple(versions), subtract=True, left_out=union.left_out)
    settings = describe_settings(versions[0].spec)
    merged, copied = [], []
    for group in base.groups:
        first, *others = base.holders(group)
        if others or describe_settings(first.spec) != settings:
            merged.append(group)
        elif first.root != root:
            copied.append(group)
    return BaseVersions(base.versions, True, base.left_out, tuple(merged), tuple(copied))


@dataclass(kw_only=True)
class _Merge(Job):
    """A merge; `union` is the combined manifest, and the images that are in several models."""

    union: Union

    def list_images(self) -> pa.Table:
        """The images that are in several models, as often as they are to be subtracted."""
        self._log_overview()
        return self.union.repeated

    def is_done(self, images: pa.Table) -> bool:
        """Whether the current version is the result already."""
        base = self.base
        return not (images.num_rows or base.rewritten or base.copied) and {
            holder.number for group in base.groups for holder in base.holders(group)
        } == {current_number(self.root)}

    def prepare(self, settings: Mapping[str, Any]) -> ModelSpec:
        first = self.base.versions[0]
        save_trunk_weights(self.root, first.load_trunk_weights())
        return first.spec

    def kept(self, images: pa.Table) -> pa.Table:
        return self.union.manifest

    def _log_overview(self) -> None:
        """Log how groups and images are merged, and where the models differ."""
        base, repeated = self.base, self.union.repeated
        log.info(
            "%d groups of %d models: %d are merged, %d are copied, %d stay as they are",
            *(len(base.groups), len(base.versions), len(base.rewritten), len(base.copied)),
            len(base.groups) - len(base.rewritten) - len(base.copied),
        )
        current = current_number(self.root)
        here = [version.number for version in base.versions if version.root == self.root]
        if current and current not in here:
            log.warning(
                "%s has a version %d, whose images aren't merged; to include them, add it to the "
                "models",
                *(self.root.uri, current),
            )
        if repeated.num_rows:
            log.info(
                "%d images are in more than one model; they are read and subtracted to count once",
                repeated.num_rows,
            )
        first, *others = base.versions
        settings = describe_settings(first.spec)
        for version in others:
            for name, value in describe_settings(version.spec).items():
                if value != settings[name]:
                    log.warning(
                        "%s has %s %s; the merged model uses the first model's, %s",
                        *(version.name, name, value, settings[name]),
                    )
            if nameless := sum(nameless_images(version).values()):
                log.warning(
                    "%d images of %s were fitted as tensors, without names; if other models have "
                    "them as well, they count twice",
                    *(nameless, version.name),
                )

    def check_calibration(self, manifest: pa.Table) -> None:
        """Warn of groups whose thresholds rest on only some of the models' images."""
        merged = self.base.rewritten
        if not self.calibrates:
            if merged:
                log.warning(
                    "%d merged groups have no thresholds and no p-values, because of --calibrate "
                    "none: score with --threshold, or update the model",
                    len(merged),
                )
            return
        is_calibrated = pc.is_valid(manifest["leave_one_out_score"])
        calibrated = manifest.filter(is_calibrated).select(["uri", "group"])
        listed, of_models = group_counts(manifest), {}
        for version in self.base.versions:
            uris = version.load_manifest()["uri"]
            here = calibrated.filter(pc.is_in(calibrated["uri"], uris))
            of_models[version.name] = group_counts(here)
        sentences = []
        for group in merged:
            names = [version.name for version in self.base.holders(group)]
            seen = [name for name in names if of_models[name].get(group)]
            without = [name for name in names if name not in seen]
            if not listed.get(group):
                sentences.append(
                    f"Group {group!r} has no thresholds and no p-values: its images were fitted as "
                    "tensors and can't be read again"
                )
            elif seen and without:
                sentences.append(
                    f"Group {group!r} is calibrated without images of {_listed(without)}: its "
                    "thresholds and p-values hold for images like those of "
                    f"{_listed(seen)}"
                )
        warn(sentences)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _escaped(why: str) -> str:
    """Shorten a description to what model.json allows, and escape it for `str.format`."""
    why = "".join(c if c.isprintable() else "?" for c in why)
    short = why if len(why) <= MAX_WHY_LENGTH else why[: MAX_WHY_LENGTH - 1] + "…"
    return short.replace("{", "{{").replace("}", "}}")
