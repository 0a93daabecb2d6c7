"""List the images that a job reads."""

import logging

import pyarrow as pa

from padim_ray.images.manifest import group_counts, read_manifest, sort_images
from padim_ray.images.sources import hide_credentials
from padim_ray.images.template import UriTemplate, list_images
from padim_ray.runs.options.common import ImagesOptions
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")


def check_images_option(options: ImagesOptions) -> None:
    """Raises: PadimError for a malformed URI template, before anything slow happens."""
    if options.images is not None:
        UriTemplate.parse(options.images, options.storage_options)


def read_images_table(options: ImagesOptions) -> pa.Table:
    """List the images of --images, or read the --manifest.

    Returns:
        A manifest (see `padim_ray.images.manifest`), sorted by group and uri, without credentials
        in its URIs.

    Raises:
        PadimError: if there are no images, or they can't be listed.
    """
    if options.manifest is not None:
        manifest = read_manifest(Location.of(options.manifest, options.storage_options))
        manifest = sort_images(hide_credentials(manifest))
    else:
        assert options.images is not None
        manifest = list_images(UriTemplate.parse(options.images, options.storage_options))
    groups = len(group_counts(manifest))
    log.info("%d images listed in %d group%s", manifest.num_rows, groups, "s" * (groups != 1))
    return manifest
