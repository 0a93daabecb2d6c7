"""What a job works on: the table of images, from a URI template or from a Parquet file.

Columns: `uri`, `group`, one string column per other captured name, `size` (bytes) and
`version_tag` (the store's ETag, or the modification time), sorted by group and uri.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from padim_ray.errors import PadimError
from padim_ray.storage import Location, explained

DEFAULT_GROUP = "default"
LISTING_THREADS = 16  # listings wait for the store, not for a processor

_TOKEN = re.compile(r"\{([^{}]*)\}|\*|\?|\[[^\]/]+\]")
_RESULT_COLUMNS = """
    uri size version_tag status error score p_value threshold is_anomalous regions heatmap_uri
    map_uri width height model_version scored_at shard shard_images image distances
"""
_RESERVED = frozenset(_RESULT_COLUMNS.split())


@dataclass(frozen=True)
class UriTemplate:
    """`s3://archive/{group}/**/*.jpg`: a location, and patterns for the path segments below it.

    `{name}` captures a path segment, or the shortest fitting part of one; `*`, `?` and `[…]` match
    within a segment and `**` any number of segments, as in a shell. As in a shell, a segment that
    begins with a wildcard doesn't match names that begin with a dot.
    """

    root: Location
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, options: Mapping[str, Any] | None = None) -> "UriTemplate":
        """Raises: PadimError for a malformed template."""
        scheme, separator, path = text.partition("://")
        scheme, path = (scheme, path) if separator else ("", text)
        fixed, first = [], 0
        segments = path.split("/")
        while first < len(segments) - 1 and not _TOKEN.search(segments[first]):
            fixed.append(segments[first])
            first += 1
        if separator and scheme != "file" and not fixed:
            raise PadimError(f"The bucket in {text!r} must be named, not captured or matched")
        root = Location.of(
            scheme + separator + ("/".join(fixed) or ("/" if first else ".")), options
        )
        template = cls(root, tuple(segment for segment in segments[first:] if segment))
        if not template.segments:
            raise PadimError(f"{text!r} names a directory; end it with a pattern such as /*.png")
        _check_names(text)
        return template

    @property
    def names(self) -> tuple[str, ...]:
        """Captured names, in order of appearance."""
        found = (match[1] for match in _TOKEN.finditer("/".join(self.segments)) if match[1])
        return tuple(dict.fromkeys(found))


def _check_names(text: str) -> None:
    for match in re.finditer(r"\{([^{}]*)\}", text):
        name = match[1]
        if not name.isidentifier():
            raise PadimError(f"{{{name}}} in {text!r} is not a name: use letters, digits and _")
        if name in _RESERVED:
            raise PadimError(f"{{{name}}} in {text!r} is a column of the results: use another name")
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", text)):
        raise PadimError(f"{text!r} has a brace without its partner")


def list_images(template: UriTemplate) -> pa.Table:
    """List the images that fit a template.

    Raises:
        PadimError: if nothing fits, naming the first part of the template that nothing fits, or if
            the storage refuses.
    """
    location = template.root
    with explained(location.uri, "list"), ThreadPoolExecutor(LISTING_THREADS) as pool:
        location.fs.invalidate_cache()
        found: list[_Found] = [_Found(location.path.rstrip("/"), {})]
        for depth, segment in enumerate(template.segments):
            rest = template.segments[depth:]
            is_last = len(rest) == 1 or segment == "**"
            if not is_last and not _TOKEN.search(segment):
                found = [_Found(f"{entry.path}/{segment}", entry.captured) for entry in found]
                continue
            matcher = re.compile(_regex(rest if is_last else [segment]))
            listings = pool.map(
                lambda entry, deep=segment == "**": _children(location, entry.path, deep), found
            )
            matches = [
                match
                for entry, children in zip(found, listings, strict=True)
                for match in _matches(entry, children, matcher, "file" if is_last else "directory")
            ]
            if not matches:
                raise PadimError(_nothing_fits(location, found, rest if is_last else [segment]))
            found = matches
            if is_last:
                break
    return _sorted(_table(location, found, template.names))


@dataclass(frozen=True)
class _Found:
    path: str
    captured: Mapping[str, str]
    size: int | None = None
    version_tag: str | None = None


def _regex(segments: Sequence[str]) -> str:
    """The regular expression of path segments, relative to the directory they are listed in."""
    parts, named = [], set()
    for segment in segments:
        if segment == "**":
            parts.append(r"(?:[^/]+/)*")
            continue
        pattern = r"(?!\.)" if _TOKEN.match(segment) else ""
        position = 0
        for token in _TOKEN.finditer(segment):
            pattern += re.escape(segment[position : token.start()])
            position = token.end()
            name = token[1]
            if name:
                pattern += f"(?P={name})" if name in named else f"(?P<{name}>[^/]+?)"
                named.add(name)
            elif token[0].startswith("["):
                pattern += token[0].replace("[!", "[^")
            else:
                pattern += {"*": "[^/]*", "?": "[^/]"}[token[0]]
        parts.append(pattern + re.escape(segment[position:]) + "/")
    return "".join(parts).removesuffix("/") + r"\Z"


def _children(location: Location, path: str, deep: bool) -> list[dict[str, Any]]:
    try:
        if deep:
            return list(location.fs.find(path, detail=True).values())
        return location.fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        if "bucket does not exist" in str(error):
            raise
        return []


def _matches(
    entry: _Found, children: Sequence[Mapping[str, Any]], matcher: re.Pattern[str], kind: str
) -> Iterator[_Found]:
    for child in children:
        path = child["name"].rstrip("/")
        match = matcher.match(path[len(entry.path) + 1 :])
        if child["type"] != kind or not match:
            continue
        captured = match.groupdict()
        if any(entry.captured.get(name, value) != value for name, value in captured.items()):
            continue  # the same name captured twice, with different values
        tag = child.get("ETag") or child.get("etag") or child.get("mtime")
        yield _Found(
            path,
            {**entry.captured, **captured},
            child.get("size"),
            None if tag is None else str(tag).strip('"'),
        )


def _nothing_fits(location: Location, parents: Sequence[_Found], segments: Sequence[str]) -> str:
    pattern = "/".join(segments)
    below = location.uri_of(min(entry.path for entry in parents))
    others = "" if len(parents) == 1 else f" and {len(parents) - 1} more like it"
    what = "image" if len(segments) > 1 or "." in pattern else "directory or image"
    if "{group}" in pattern:
        what = "group"
    return f"No {what} matched: nothing in {below}{others} fits {pattern!r}."


def _table(location: Location, found: Sequence[_Found], names: Sequence[str]) -> pa.Table:
    columns: dict[str, Any] = {
        "uri": pa.array([location.uri_of(entry.path) for entry in found], pa.string()),
        "group": pa.array(
            [entry.captured.get("group", DEFAULT_GROUP) for entry in found], pa.string()
        ),
    }
    for name in names:
        if name != "group":
            columns[name] = pa.array([entry.captured[name] for entry in found], pa.string())
    columns["size"] = pa.array([entry.size for entry in found], pa.int64())
    columns["version_tag"] = pa.array([entry.version_tag for entry in found], pa.string())
    return pa.table(columns)


def read_manifest(location: Location) -> pa.Table:
    """Read a manifest from a Parquet file: `uri`, and optionally `group` and other columns.

    Raises:
        PadimError: if it is missing, not Parquet, without uris, or names an image twice.
    """
    try:
        with location.as_local_file() as path:
            table = pq.read_table(path)
    except FileNotFoundError as error:
        raise PadimError(f"There is no manifest at {location.uri}.") from error
    except pa.ArrowInvalid as error:
        raise PadimError(f"The manifest {location.uri} is not a Parquet file: {error}.") from error
    if "uri" not in table.column_names:
        raise PadimError(f"The manifest {location.uri} has no column 'uri'.")
    if table.num_rows == 0:
        raise PadimError(f"No image matched: the manifest {location.uri} is empty.")
    for name, kind, default in (
        ("uri", pa.string(), None),
        ("group", pa.string(), DEFAULT_GROUP),
        ("size", pa.int64(), None),
        ("version_tag", pa.string(), None),
    ):
        if name in table.column_names:
            column = table[name].cast(kind)
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, pa.array([default] * table.num_rows, kind))
    clash = sorted(set(table.column_names) & (_RESERVED - {"uri", "size", "version_tag"}))
    if clash:
        table = table.drop_columns(clash)  # a results table used as a manifest
    if table["uri"].null_count or table["group"].null_count:
        raise PadimError(f"The manifest {location.uri} has a row without a uri or without a group.")
    counts = table["uri"].value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise PadimError(
            f"The manifest {location.uri} names {len(repeated)} images more than once, "
            f"among them {repeated[0]['values'].as_py()}."
        )
    return _sorted(table)


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by([("group", "ascending"), ("uri", "ascending")])


def group_counts(manifest: pa.Table) -> dict[str, int]:
    """Number of images of each group, by name."""
    counts = manifest["group"].value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: e["values"])}


def split_shards(manifest: pa.Table, images: int) -> list[pa.Table]:
    """Cut a sorted manifest into shards of one group and at most `images` images each.

    Shards are what travels through the pipelines as one block; columns `shard` and `shard_images`
    hold their number and length.
    """
    shards, start = [], 0
    for count in group_counts(manifest).values():
        parts = -(-count // images)
        for part in range(parts):
            stop = start + count * (part + 1) // parts - count * part // parts
            shard = manifest.slice(start, stop - start)
            for name, value in (("shard", len(shards)), ("shard_images", shard.num_rows)):
                shard = shard.append_column(
                    name, pa.repeat(pa.scalar(value, pa.int32()), stop - start)
                )
            shards.append(shard)
            start = stop
    return shards
