"""The images that a job was asked to read, as a manifest."""

import logging

import pyarrow as pa

from padim_ray.images.manifest import group_counts, read_manifest, sort_images
from padim_ray.images.sources import hide_credentials
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.runs.options.common import ImagesOptions
from padim_ray.storage.location import Location

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
