"""Presigned URIs and URIs with passwords: redacted in all output, complete where they are fetched.

A manifest's `uri` and `mask_uri` go into results, errors and file names. If they hold credentials,
these columns are redacted, and `fetch_uri` and `fetch_mask_uri` hold the complete URIs: in memory
only, never in a file.
"""

from collections.abc import Sequence
from typing import Literal, overload

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import PadimError
from padim_ray.redaction import redact

FETCHED = {"uri": "fetch_uri", "mask_uri": "fetch_mask_uri"}
"""The column with the complete URIs, by the column with the redacted ones."""


def hide_credentials(manifest: pa.Table, name: str = "uri") -> pa.Table:
    """Redact credentials in the column `name`; if there are any, add a column of complete URIs.

    Raises:
        PadimError: if two images' URIs differ only in their credentials.
    """
    uris = manifest[name]
    may_hold = pc.match_substring_regex(uris, "://.*[@=]").fill_null(False).combine_chunks()
    if not pc.any(may_hold).as_py():
        return manifest
    some = pa.array([redact(uri) for uri in uris.filter(may_hold).to_pylist()], uris.type)
    redacted = pc.replace_with_mask(uris, may_hold, some)
    is_changed = pc.not_equal(redacted, uris).fill_null(False)
    if not pc.any(is_changed).as_py():
        return manifest
    if name == "uri":
        _check_distinct(redacted.filter(is_changed), uris)
    index = manifest.column_names.index(name)
    return manifest.set_column(index, name, redacted).append_column(FETCHED[name], uris)


def _check_distinct(redacted: pa.ChunkedArray, uris: pa.ChunkedArray) -> None:
    """Compare only what redaction changed, since a hash table of all URIs takes their size twice.

    Raises:
        PadimError: if a redacted URI is there twice, or among the manifest's.
    """
    counts = redacted.value_counts()
    more = pc.greater(counts.field("counts"), 1)
    repeated = counts.field("values").filter(more).to_pylist()
    repeated += uris.filter(pc.is_in(uris, redacted.combine_chunks())).slice(0, 1).to_pylist()
    if repeated:
        raise PadimError(
            "The manifest names images whose URIs differ only in what looks like credentials, "
            f"such as {repeated[0]}"
        )


@overload
def uris_to_fetch(images: pa.Table) -> list[str]: ...


@overload
def uris_to_fetch(images: pa.Table, name: Literal["mask_uri"]) -> list[str | None]: ...


def uris_to_fetch(images: pa.Table, name: str = "uri") -> Sequence[str | None]:
    """The column `name` as it is to be fetched."""
    fetched = FETCHED[name]
    return images[fetched if fetched in images.column_names else name].to_pylist()


def without_sources(images: pa.Table) -> pa.Table:
    """A manifest that may be written to a file: without the columns of complete URIs."""
    return images.drop_columns([name for name in FETCHED.values() if name in images.column_names])
