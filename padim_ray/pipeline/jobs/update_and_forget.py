"""The update and forget jobs: images added to a model's moments, or removed, exactly."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import ModelError
from padim_ray.images.manifest import group_counts
from padim_ray.images.sources import FETCHED
from padim_ray.model.spec import ModelSpec
from padim_ray.model.version import OUTCOMES, open_version
from padim_ray.pipeline.jobs.on_version import JobOnVersion, sample_of
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.pipeline.merging.reducer import check_count
from padim_ray.runs.job_record import identify
from padim_ray.runs.listing import check_images_option, read_images_table
from padim_ray.runs.options.common import EMBEDDING_MEMORY, from_mapping
from padim_ray.runs.options.fit import VersionOptions
from padim_ray.runs.summary import Summary
from padim_ray.storage.claim import claimed
from padim_ray.storage.credentials import hidden_credentials
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


def update(**options: Any) -> Summary:
    """Add good images to a model, and publish the result as its next version.

    The result equals a model that is fitted to all images together. Images that are in the model
    already are skipped.

    Args:
        options: the fields of `VersionOptions`, named as on the command line.

    Raises:
        PadimError: for a mistake in the options, or if a new group can't be fitted.
    """
    return run_update(from_mapping(VersionOptions, options))


def run_update(options: VersionOptions) -> Summary:
    """Update as `options` say; see `update`."""
    return _run(_Update, "update", options, "{} images added to version %d", subtract=False)


def forget(**options: Any) -> Summary:
    """Remove images from a model, and publish the result as its next version.

    The result equals a model that is fitted without them. The images must still be readable and
    unchanged.

    Args:
        options: the fields of `VersionOptions`, named as on the command line.

    Raises:
        PadimError: for a mistake in the options, if an image can't be read any more or has changed,
            or if a group would be left with fewer than two images.
    """
    return run_forget(from_mapping(VersionOptions, options))


def run_forget(options: VersionOptions) -> Summary:
    """Forget as `options` say; see `forget`."""
    return _run(_Forget, "forget", options, "{} images taken out of version %d", subtract=True)


def _run(
    kind: type["_Change"], name: str, options: VersionOptions, why: str, *, subtract: bool
) -> Summary:
    with hidden_credentials(options.storage_options):
        root = Location.of(options.model, options.storage_options)
        check_images_option(options)
        with claimed(root, name) as claim:
            root = claim.root
            version = open_version(root)
            sample = sample_of(version)
            identity = identify(
                options,
                job=name,
                model_version=version.number,
                model_sha256=version.fingerprint(),
                **asdict(sample),
            )
            return kind(
                name=name,
                options=options,
                root=root,
                claim=claim,
                sample=sample,
                embedding_memory=EMBEDDING_MEMORY,
                identity=identity,
                why=why % version.number,
                base=BaseVersions((version,), subtract=subtract),
            ).run()


@dataclass(kw_only=True)
class _Change(JobOnVersion):
    """A job that adds images to a version, or subtracts them."""

    options: VersionOptions

    def prepare(self, settings: Mapping[str, Any]) -> ModelSpec:
        return self.version.spec

    def kept(self, images: pa.Table) -> pa.Table:
        """All rows but those of the images at hand, some of which may have failed before."""
        return self.manifest.filter(pc.invert(_is_among(self.manifest, images)))


class _Update(_Change):
    def list_images(self) -> pa.Table:
        """The listed images that aren't in the model."""
        listed, manifest = read_images_table(self.options), self.manifest
        known = manifest.filter(pc.equal(manifest["status"], "fitted"))
        new = listed.filter(pc.invert(_is_among(listed, known)))
        if skipped := listed.num_rows - new.num_rows:
            log.info("%d of the listed images are in the model already", skipped)
            self.skipped = skipped
            _warn_of_changed(listed, known)
        for group, count in group_counts(new).items():
            if group not in self.version.groups:
                check_count(group, count)
        return new


class _Forget(_Change):
    def list_images(self) -> pa.Table:
        """The listed images that are in the model, as the model's manifest describes them."""
        listed, manifest = read_images_table(self.options), self.manifest
        known = manifest.filter(
            pc.and_(pc.equal(manifest["status"], "fitted"), _is_among(manifest, listed))
        )
        if not known.num_rows:
            raise ModelError(
                f"None of the {listed.num_rows} listed images is in the model, "
                f"such as {listed['uri'][0]}"
            )
        if unknown := listed.num_rows - known.num_rows:
            log.warning("%d of the listed images aren't in the model", unknown)
        for group, count in group_counts(known).items():
            left = self.version.groups[group].images - count
            if left < 2:
                raise ModelError(
                    f"Group {group!r} would be left with {left} image{'s' * (left != 1)}, and a "
                    "covariance needs at least 2"
                )
        return _with_sources(known.drop_columns(list(OUTCOMES)), listed)


def _warn_of_changed(listed: pa.Table, known: pa.Table) -> None:
    """Log how many images changed after the model was fitted to them."""
    columns = ["uri", "size", "version_tag"]
    if not set(columns) <= set(known.column_names):
        return  # a model that was fitted to tensors
    now = listed.select(columns).filter(_is_among(listed, known))
    then = known.take(pc.index_in(now["uri"], known["uri"]))
    differs = [pc.not_equal(now[name], then[name]) for name in columns[1:]]
    changed = now["uri"].filter(pc.or_kleene(*differs).fill_null(False))
    if len(changed):
        log.warning(
            "%d of them have changed since then, such as %s; the model keeps their old content",
            *(len(changed), pc.min(changed)),
        )


def _with_sources(images: pa.Table, listed: pa.Table) -> pa.Table:
    """A version's images with the URIs to fetch, which its manifest doesn't store."""
    rows = pc.index_in(images["uri"], listed["uri"])
    for name in FETCHED.values():
        if name in listed.column_names:
            images = images.append_column(name, listed[name].take(rows))
    return images


def _is_among(images: pa.Table, others: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(images["uri"], others["uri"])
