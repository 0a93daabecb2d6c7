"""The first stage of all jobs: the table of images, and the images decoded."""

import logging

import pyarrow as pa
import ray.data

from padim_ray.fetch import Fetcher
from padim_ray.manifest import UriTemplate, group_counts, list_images, read_manifest, sort_images
from padim_ray.options import ImagesOptions, RunOptions
from padim_ray.pipeline.decode import FetchAndDecode
from padim_ray.pipeline.resources import Plan
from padim_ray.preprocessing import Preprocessing
from padim_ray.sources import hide_credentials
from padim_ray.storage import Location

log = logging.getLogger("padim_ray")


def check_images_option(options: ImagesOptions) -> None:
    """Raises: PadimError for a malformed template, before anything slow."""
    if options.images is not None:
        UriTemplate.parse(options.images, options.storage_options)


def read_images_table(options: ImagesOptions) -> pa.Table:
    """The manifest that the options name: listed, or read from Parquet."""
    if options.manifest is not None:
        manifest = read_manifest(Location.of(options.manifest, options.storage_options))
        manifest = sort_images(hide_credentials(manifest))
    else:
        assert options.images is not None
        manifest = list_images(UriTemplate.parse(options.images, options.storage_options))
    groups = len(group_counts(manifest))
    log.info("%d images listed in %d group%s", manifest.num_rows, groups, "s" * (groups != 1))
    return manifest


def fetcher(options: RunOptions) -> Fetcher:
    """What reads the images."""
    return Fetcher(options.storage_options or {}, options.max_image_bytes)


def decode_images(
    shards: list[pa.Table], preprocessing: Preprocessing, options: RunOptions, plan: Plan
) -> ray.data.Dataset:
    """The pipelines' first stage: one block per shard of the manifest."""
    # `from_arrow` would ask for each block's size by a task
    return ray.data.from_blocks(shards).map_batches(
        FetchAndDecode(preprocessing, fetcher(options), options.max_image_pixels),
        batch_size=None,
        batch_format="pyarrow",
        compute=plan.decoding_tasks(len(shards)),
        **plan.decode.options,
    )
