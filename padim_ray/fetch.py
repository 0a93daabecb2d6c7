"""Reading images' bytes from where they lie: many at once, failures one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from padim_ray.errors import ImageError
from padim_ray.options import MAX_IMAGE_BYTES
from padim_ray.storage import Location


@dataclass(frozen=True)
class Fetcher:
    """Reads files concurrently; what can't be read becomes an `ImageError` in its place.

    `max_bytes`: larger files aren't read.
    """

    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    max_bytes: int = MAX_IMAGE_BYTES

    def __call__(
        self,
        uris: Sequence[str],
        sizes: Sequence[int | None] | None = None,
        tags: Sequence[str | None] | None = None,
    ) -> list[bytes | ImageError]:
        """The files' contents, in order.

        Args:
            sizes: their bytes when they were listed.
            tags: their version tags when they were listed. An image that has another one now has
                changed, and fails.
        """
        contents: dict[str, bytes | ImageError] = {}
        for _, same_store in groupby(sorted(uris), key=_scheme):
            contents.update(_fetch_from_one_store(list(same_store), self.storage_options))
        return [contents[uri] for uri in uris]


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else ""


def _fetch_from_one_store(
    uris: list[str], storage_options: Mapping[str, Any]
) -> dict[str, bytes | ImageError]:
    fs = Location.of(uris[0], storage_options).fs
    paths = [Location(uri, storage_options).path for uri in uris]
    # cat() would take brackets and stars in names for patterns
    everything = [None] * len(paths)
    contents = fs.cat_ranges(paths, everything, everything, on_error="return")
    return {uri: _content(content) for uri, content in zip(uris, contents, strict=True)}


def _content(content: bytes | Exception) -> bytes | ImageError:
    match content:
        case bytes():
            return content
        case FileNotFoundError():
            return ImageError("fetch", "not found")
        case PermissionError():
            return ImageError("fetch", "permission denied")
        case _:
            return ImageError("fetch", type(content).__name__, str(content))
