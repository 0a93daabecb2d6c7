"""The gallery: small pictures of the most anomalous images that fit in a byte budget."""

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import quote, unquote

from PIL import Image

from padim_ray.errors import ImageError, PadimError
from padim_ray.images.decode_in_child import Decoded, UprightImage, decode_all
from padim_ray.images.fetch import Fetcher
from padim_ray.images.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from padim_ray.images.preprocessing import GreyRange
from padim_ray.report.rows import Row, captured_columns, score_ratio
from padim_ray.storage.location import Location
from padim_ray.storage.spelling import canonical_uri
from padim_ray.storage.untrusted import check_file

PICTURE_BYTES = 6 * 2**20  # for all pictures together; base64 adds a third
QUALITIES = (
    *((640, 80), (480, 80), (320, 80), (320, 65), (256, 60), (192, 50)),
    *((160, 40), (128, 35), (96, 30), (64, 25)),
)
"""Longer side and WebP quality: a picture gets the first that fits its share of the bytes."""
MIN_BYTES_PER_PIXEL = 1 / 10  # of a photograph; with less there is no point in encoding it
WINDOW_ROWS = 16  # rows whose images are in memory at a time
MAX_REGIONS = 40  # boxes in one image


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with its size in pixels."""

    src: str
    width: int
    height: int


@dataclass(frozen=True)
class GalleryImage:
    """A row of the results with its pictures.

    `captured`: the columns that came with the image. `ratio`: score divided by threshold.
    `regions`: those with the highest peaks, out of `region_count`. `problem`, `heat_problem`: why a
    picture is missing. `heatmap_link`: the full heatmap, relative to the page.
    """

    uri: str
    group: str
    captured: Mapping[str, str]
    score: float
    ratio: float | None
    p_value: float | None
    is_anomalous: bool | None
    width: int
    height: int
    regions: Sequence[Mapping[str, Any]]
    region_count: int
    thumbnail: Picture | None
    problem: str | None
    heat: Picture | None
    heat_problem: str | None
    heatmap_uri: str | None
    heatmap_link: str | None

    @property
    def name(self) -> str:
        """The file name."""
        return self.uri.rpartition("/")[2] or self.uri


def build_gallery(
    rows: Sequence[Row],
    root: Location,
    storage_options: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
    places: Sequence[Location] | None = None,
    grey_range: GreyRange | None = None,
) -> list[GalleryImage]:
    """Fetch images and heatmaps, and shrink them until all of them fit in `PICTURE_BYTES`.

    Args:
        rows: rows of the results.
        root: the run's directory.
        storage_options: of the images' storage.
        sources: the URIs to fetch images from, where they differ from the images' URIs.
        places: directories that images are read from. Default: wherever the rows say, which is for
            rows that this process has made.
        grey_range: of grey pixels with more than 8 bits, see `Preprocessing`.
    """
    columns, sources = captured_columns(rows), sources or {}
    originals: list[str | ImageError | None] = [
        sources.get(uri, uri) if places is None else _below(uri, places)
        for uri in (row["uri"] for row in rows)
    ]
    pictures = encode_pictures(
        [
            (originals, storage_options),
            ([_own_heatmap(row.get("heatmap_uri"), root) for row in rows], root.options),
        ],
        max_pixels(rows),
        grey_range,
    )
    return [
        _gallery_image(columns, root, row, *encoded)
        for row, encoded in zip(rows, pictures, strict=True)
    ]


def encode_pictures(
    columns: Sequence[tuple[Sequence[str | ImageError | None], Mapping[str, Any]]],
    pixels: int,
    grey_range: GreyRange | None,
) -> Iterator[tuple[bytes | ImageError | None, ...]]:
    """Encode pictures as WebP, row by row, so that all of them fit in `PICTURE_BYTES`.

    Args:
        columns: the rows' URIs, with the options of their storage; None for no picture, and an
            error for one that can't be shown.
        pixels: the limit for decoding; larger images are errors.
        grey_range: of grey pixels with more than 8 bits, see `Preprocessing`.

    Yields:
        For each row one value per column: the encoded picture, empty bytes if there is no room for
        it, an error if it can't be shown, or None if there is none.
    """
    left = sum(uri is not None for uris, _ in columns for uri in uris)
    remaining = PICTURE_BYTES
    target = UprightImage(pixels, QUALITIES[0][0], grey_range)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(columns[0][0]), WINDOW_ROWS):
            rows = slice(start, start + WINDOW_ROWS)
            encode = partial(_encode, share=remaining // max(left, 1))
            window = [
                list(pool.map(encode, _decode(_fetch(uris[rows], options), target)))
                for uris, options in columns
            ]
            for encoded in chain.from_iterable(window):
                remaining -= len(encoded) if isinstance(encoded, bytes) else 0
                left -= encoded is not None
            yield from zip(*window, strict=True)


def max_pixels(rows: Sequence[Row]) -> int:
    """The limit for decoding these rows' images: at least the size of those that were scored."""
    sizes = ((row.get("width") or 0) * (row.get("height") or 0) for row in rows)
    return max((MAX_IMAGE_PIXELS, *sizes))


def read_picture(encoded: bytes | ImageError | None) -> tuple[Picture | None, str | None]:
    """The picture, or the reason why it is missing; both None if there is none."""
    match encoded:
        case None:
            return None, None
        case ImageError():
            return None, str(encoded)
        case b"":
            return None, "left out: the page would be too large"
    with Image.open(io.BytesIO(encoded)) as image:
        return Picture(data_uri(encoded, "webp"), *image.size), None


def relative_link(uri: str | None, root: Location) -> str | None:
    """A link from the page in `root` to a file below it; None for a file elsewhere."""
    below = root.uri.rstrip("/") + "/"
    if not uri or not uri.startswith(below) or ".." in uri.split("/"):
        return None
    return quote(uri.removeprefix(below))


def data_uri(data: bytes, kind: str) -> str:
    """Embed bytes in a `data:` URI of type `image/KIND`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _gallery_image(
    columns: Sequence[str],
    root: Location,
    row: Row,
    image: bytes | ImageError | None,
    heatmap: bytes | ImageError | None,
) -> GalleryImage:
    (thumbnail, problem), (heat, heat_problem) = read_picture(image), read_picture(heatmap)
    shape = thumbnail or heat
    whole = [
        region for region in row.get("regions") or () if region and None not in region.values()
    ]
    regions = sorted(whole, key=lambda region: -region["peak"])
    return GalleryImage(
        uri=row["uri"],
        group=row["group"],
        captured={name: str(row[name]) for name in columns if row.get(name) is not None},
        score=row["score"],
        ratio=score_ratio(row),
        p_value=row.get("p_value"),
        is_anomalous=row.get("is_anomalous"),
        width=row["width"] or (shape.width if shape else 4),
        height=row["height"] or (shape.height if shape else 3),
        regions=regions[:MAX_REGIONS],
        region_count=len(regions),
        thumbnail=thumbnail,
        problem=problem,
        heat=heat,
        heat_problem=heat_problem,
        heatmap_uri=row.get("heatmap_uri"),
        heatmap_link=relative_link(row.get("heatmap_uri"), root),
    )


def _below(uri: str, places: Sequence[Location]) -> str | ImageError:
    """The URI if it is below one of the places: anybody may have written it."""
    path = canonical_uri(uri)
    climbs = "://" in path and ".." in unquote(path).split("/")
    if climbs or not any(path.startswith(place.uri.rstrip("/") + "/") for place in places):
        return ImageError("fetch", "not below a directory given with --images")
    return uri


def _own_heatmap(uri: str | None, root: Location) -> str | ImageError | None:
    """The URI if it is of a file of the run: anybody may have written it."""
    if uri is None:
        return None
    if relative_link(uri, root) is None:
        return ImageError("fetch", "not below the run's directory")
    with suppress(FileNotFoundError):  # which fetching explains
        try:
            check_file(root, Location(uri, root.options), MAX_IMAGE_BYTES)
        except PadimError as error:
            return ImageError("fetch", "refused", str(error))
    return uri


def _fetch(
    uris: Sequence[str | ImageError | None], storage_options: Mapping[str, Any]
) -> list[bytes | ImageError | None]:
    contents = iter(_fetch_all([uri for uri in uris if isinstance(uri, str)], storage_options))
    return [next(contents) if isinstance(uri, str) else uri for uri in uris]


def _fetch_all(uris: list[str], storage_options: Mapping[str, Any]) -> list[bytes | ImageError]:
    try:
        return Fetcher(storage_options)(uris)
    except PadimError as error:  # one of the stores can't be used from here
        if len(uris) == 1:
            return [ImageError("fetch", str(error))]
        return [content for uri in uris for content in _fetch_all([uri], storage_options)]


def _decode(
    contents: Sequence[bytes | ImageError | None], target: UprightImage
) -> Iterator[Image.Image | ImageError | None]:
    decoded = decode_all((content for content in contents if content is not None), target)
    for content in contents:
        image = None if content is None else next(decoded)
        yield Image.fromarray(image.pixels) if isinstance(image, Decoded) else image


def _encode(image: Image.Image | ImageError | None, share: int) -> bytes | ImageError | None:
    """Encode as WebP of at most `share` bytes, or as b"" if none of `QUALITIES` is small enough.

    Errors and None are returned as they are.
    """
    if not isinstance(image, Image.Image):
        return image
    bytes_per_pixel = MIN_BYTES_PER_PIXEL
    for side, quality in QUALITIES:
        smaller = image.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        pixels = smaller.width * smaller.height
        if pixels * bytes_per_pixel > share:
            continue
        buffer = io.BytesIO()
        smaller.save(buffer, "WEBP", quality=quality)
        if buffer.tell() <= share:
            return buffer.getvalue()
        bytes_per_pixel = buffer.tell() / pixels / 2  # a lower quality may halve it
    return b""
