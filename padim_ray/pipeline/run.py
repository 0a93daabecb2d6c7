"""What fit and score share: listing and decoding the images, and the `Summary` at the end."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from padim_ray.manifest import (
    UriTemplate,
    group_counts,
    list_images,
    read_manifest,
    split_shards,
)
from padim_ray.options import JobOptions
from padim_ray.pipeline.decode import FetchAndDecode, images_per_shard
from padim_ray.pipeline.resources import Plan
from padim_ray.preprocessing import Preprocessing
from padim_ray.storage import Location

log = logging.getLogger("padim_ray")


def check_images_option(options: JobOptions) -> None:
    """Raises: PadimError for a malformed template, before anything slow."""
    if options.images is not None:
        UriTemplate.parse(options.images, options.storage_options)


def read_images_table(options: JobOptions) -> pa.Table:
    """The manifest that the options name: listed, or read from Parquet."""
    if options.manifest is not None:
        manifest = read_manifest(Location.of(options.manifest, options.storage_options))
    else:
        assert options.images is not None
        manifest = list_images(UriTemplate.parse(options.images, options.storage_options))
    groups = len(group_counts(manifest))
    log.info("%d images listed in %d group%s", manifest.num_rows, groups, "s" * (groups != 1))
    return manifest


def decode_images(
    manifest: pa.Table, preprocessing: Preprocessing, options: JobOptions, plan: Plan
) -> tuple[ray.data.Dataset, int]:
    """The pipelines' first stage: one block per shard of the manifest, and their number."""
    workers = plan.decoders + plan.actors
    shards = split_shards(manifest, images_per_shard(manifest.num_rows, preprocessing, workers))
    decoded = ray.data.from_arrow(shards).map_batches(
        FetchAndDecode(preprocessing, options.storage_options or {}),
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=min(plan.decoders, len(shards))),
        num_cpus=plan.decode_cpus,
    )
    return decoded, len(shards)


@dataclass(frozen=True)
class Summary:
    """How a job went. `failures`: error of each failed image, by uri; `seconds`: wall time."""

    job: str
    listed: int
    failures: Mapping[str, str]
    groups: Mapping[str, int]
    seconds: float
    places: Mapping[str, str]
    within_max_failed: bool

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def done(self) -> int:
        return self.listed - self.failed

    @property
    def failed_by_cause(self) -> dict[str, int]:
        """Numbers of failed images by stage and cause, the most frequent first."""
        causes = Counter(error.partition(" (")[0] for error in self.failures.values())
        return dict(causes.most_common())

    def report(self) -> None:
        """Log the summary."""
        verb = {"fit": "fitted", "score": "scored"}[self.job]
        log.info(
            "%d images listed, %d %s, %d failed; %.1f images/s over all",
            self.listed,
            self.done,
            verb,
            self.failed,
            self.listed / self.seconds,
        )
        for cause, count in self.failed_by_cause.items():
            log.warning("%d failed: %s", count, cause)
        for name, place in self.places.items():
            log.info("%s: %s", name, place)
