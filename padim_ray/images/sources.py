"""Where images are fetched from, if their URIs hold credentials: beside the URIs that are told.

A manifest's `uri` and `mask_uri` go into results, errors and names of files. Where they are
presigned or hold a password, those columns have *** for it, and `fetch_uri` and `fetch_mask_uri`
hold what to fetch, in memory and never in a file.
"""

from collections.abc import Sequence
from typing import Literal, overload

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import PadimError
from padim_ray.redaction import redact

FETCHED = {"uri": "fetch_uri", "mask_uri": "fetch_mask_uri"}


def hide_credentials(manifest: pa.Table, name: str = "uri") -> pa.Table:
    """A manifest without credentials in the column `name`; if it had any, with one more column.

    Raises:
        PadimError: if images' URIs differ in their credentials only.
    """
    uris = manifest[name]
    if not pc.any(pc.match_substring_regex(uris, "://.*[@=]")).as_py():
        return manifest
    told = pa.array([uri and redact(uri) for uri in uris.to_pylist()], pa.string())
    if told.equals(uris.combine_chunks()):
        return manifest
    if name == "uri" and pc.count_distinct(told).as_py() < len(told):
        raise PadimError(
            "The manifest names images whose URIs differ only in what looks like credentials, "
            f"such as {told[0].as_py()}"
        )
    index = manifest.column_names.index(name)
    return manifest.set_column(index, name, told).append_column(FETCHED[name], uris)


@overload
def uris_to_fetch(images: pa.Table) -> list[str]: ...


@overload
def uris_to_fetch(images: pa.Table, name: Literal["mask_uri"]) -> list[str | None]: ...


def uris_to_fetch(images: pa.Table, name: str = "uri") -> Sequence[str | None]:
    """The column `name` as it is to be fetched."""
    fetched = FETCHED[name]
    return images[fetched if fetched in images.column_names else name].to_pylist()


def without_sources(images: pa.Table) -> pa.Table:
    """What may be written down of a manifest."""
    return images.drop_columns([name for name in FETCHED.values() if name in images.column_names])
