"""URI templates such as `s3://archive/{group}/**/*.jpg`, and listing the images that match one."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from padim_ray.errors import NoImages, PadimError
from padim_ray.images.manifest import (
    DEFAULT_GROUP,
    RESERVED_COLUMNS,
    TEXT,
    canonical_uris,
    check_unique,
    sort_images,
)
from padim_ray.storage.location import Location, version_tag
from padim_ray.storage.refusals import explained
from padim_ray.storage.retry import with_retries
from padim_ray.storage.spelling import ALIASES, BUCKETS

LISTING_THREADS = 16  # more than cores, because they wait for the store
_TOKEN = re.compile(r"\{([^{}]*)\}|\*|\?|\[[!^]?+\]?+[^\]/]*\]")


@dataclass(frozen=True)
class UriTemplate:
    """A location, and patterns for the path segments below it.

    `{name}` captures a path segment, or the shortest fitting part of one. A name that occurs twice
    stands for the same text. `*`, `?` and `[…]` match within a segment, and `**` matches any number
    of segments. As in a shell, a segment that begins with a wildcard doesn't match names that begin
    with a dot, and `**` doesn't follow links.
    """

    root: Location
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, options: Mapping[str, Any] | None = None) -> "UriTemplate":
        """Parse a template.

        Args:
            text: the template, a path or a URI.
            options: fsspec's storage options.

        Raises:
            PadimError: if it is malformed.
        """
        root, patterns = split_template(text)
        _check_names(text)
        return cls(Location.of(root, options), patterns)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it captures, in order of appearance."""
        found = (match[1] for match in _TOKEN.finditer("/".join(self.segments)) if match[1])
        return tuple(dict.fromkeys(found))


def split_template(text: str) -> tuple[str, tuple[str, ...]]:
    """Split a template into the directory that it names and the patterns below.

    Raises:
        PadimError: if it names no bucket, or has no pattern.
    """
    scheme, separator, path = text.partition("://")
    scheme, path = (scheme, path) if separator else ("", text)
    if ALIASES.get(scheme, scheme) in BUCKETS:
        path = path.lstrip("/")
    segments = path.split("/")
    first = 0 if scheme in ("", "file", "local") else 1
    if first and (not segments[0] or _TOKEN.search(segments[0])):
        raise PadimError(f"The bucket in {text!r} must be named, not captured or matched")
    while first < len(segments) - 1 and not _TOKEN.search(segments[first]):
        first += 1
    fixed = "/".join(segments[:first]) or ("/" if first else ".")
    patterns = [segment for segment in segments[first:] if segment]
    if not patterns:
        raise PadimError(f"{text!r} names a directory; end it with a pattern such as /*.png")
    if patterns[-1] == "**":
        patterns.append("*")
    return scheme + separator + fixed, tuple(patterns)


def directory_of(text: str, options: Mapping[str, Any] | None = None) -> Location:
    """The directory of a template's images; without a pattern, the directory that the text names.

    Raises:
        PadimError: if the template is malformed.
    """
    return UriTemplate.parse(text if _TOKEN.search(text) else f"{text}/*", options).root


def _check_names(text: str) -> None:
    for match in re.finditer(r"\{([^{}]*)\}", text):
        name = match[1]
        if not name.isidentifier():
            raise PadimError(f"{{{name}}} in {text!r} is not a name: use letters, digits and _")
        if name in RESERVED_COLUMNS:
            raise PadimError(f"{{{name}}} in {text!r} is a column of the results: use another name")
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", text)):
        raise PadimError(f"{text!r} has a brace without its partner")


def list_images(template: UriTemplate) -> pa.Table:
    """List the images that match a template, as a manifest.

    Raises:
        NoImages: if nothing matches, with the first part of the template that matches nothing.
        PadimError: if only directories match, or the storage refuses.
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
            pattern, kind = (rest, "file") if is_last else ([segment], "directory")
            listings = pool.map(
                lambda entry, deep=segment == "**": _children(location, entry.path, deep), found
            )
            matches = [
                match
                for entry, children in zip(found, listings, strict=True)
                for match in _matches(entry, children, pattern, kind)
            ]
            if not matches:
                raise _nothing_fits(location, found, pattern)
            found = matches
            if is_last:
                break
    images = canonical_uris(_table(location, found, template.names), "uri")
    check_unique(images["uri"], f"The listing of {location.uri}")
    return sort_images(images)


@dataclass(frozen=True)
class _Found:
    """A directory or file that matches the template so far."""

    path: str
    captured: Mapping[str, str]
    size: int | None = None
    version_tag: str | None = None


def _regex(segments: Sequence[str], captured: Mapping[str, str]) -> str:
    """The regular expression for path segments, relative to the directory that is listed.

    A name that was captured before stands for its value.
    """
    parts, named = [], set()
    for segment in segments:
        if segment == "**":
            parts.append(r"(?:(?!\.)[^/]+/)*")
            continue
        pattern = r"(?!\.)" if _TOKEN.match(segment) else ""
        position = 0
        for token in _TOKEN.finditer(segment):
            pattern += re.escape(segment[position : token.start()])
            position = token.end()
            name = token[1]
            if name in captured:
                pattern += re.escape(captured[name])
            elif name:
                pattern += f"(?P={name})" if name in named else f"(?P<{name}>[^/]+?)"
                named.add(name)
            elif token[0].startswith("["):
                pattern += _character_class(token[0])
            else:
                pattern += {"*": "[^/]*", "?": "[^/]"}[token[0]]
        parts.append(pattern + re.escape(segment[position:]) + "/")
    return "".join(parts).removesuffix("/") + r"\Z"


def _character_class(token: str) -> str:
    """A shell's `[…]` as a regular expression. It never matches a slash."""
    translated = fnmatch.translate(token.replace("[^", "[!", 1))  # "(?s:…)" and an anchor
    return "(?!/)" + translated[translated.index(":") + 1 : translated.rindex(")")]


def _children(location: Location, path: str, deep: bool) -> list[dict[str, Any]]:
    try:
        list_all = location.fs.find if deep else location.fs.ls
        listed = with_retries(lambda: list_all(path or "/", detail=True), f"list {location.uri}")
        children = listed.values() if deep else listed
    except (FileNotFoundError, NotADirectoryError) as error:
        if "bucket does not exist" in str(error):
            raise
        return []
    return [_target(location, child) if child.get("islink") else child for child in children]


def _target(location: Location, link: dict[str, Any]) -> dict[str, Any]:
    """The entry of a local link's target, under the link's name; a broken link's own entry."""
    try:
        return location.fs.info(link["name"])
    except OSError:
        return link


def _matches(
    entry: _Found, children: Sequence[Mapping[str, Any]], segments: Sequence[str], kind: str
) -> Iterator[_Found]:
    matcher = re.compile(_regex(segments, entry.captured))
    for child in children:
        path = child["name"].rstrip("/")
        if child["type"] != kind or not path.startswith(f"{entry.path}/"):
            continue  # fsspec lists a file, or an object store's directory, as its own child
        match = matcher.match(path, len(entry.path) + 1)
        if match:
            captured = {**entry.captured, **match.groupdict()}
            yield _Found(path, captured, child.get("size"), version_tag(child))


def _nothing_fits(
    location: Location, parents: Sequence[_Found], segments: Sequence[str]
) -> PadimError:
    """The error that no child of these directories matches path segments."""
    pattern = "/".join(segments)
    first = min(parents, key=lambda entry: entry.path)
    below = location.uri_of(first.path or "/")
    if any(_matches(first, _children(location, first.path, False), segments, "directory")):
        return PadimError(
            f"No image matched: in {below}, only directories fit {pattern!r}; "
            "end it with a pattern such as /*.png"
        )
    others = "" if len(parents) == 1 else f" and {len(parents) - 1} more like it"
    what = "image" if len(segments) > 1 or "." in pattern else "directory or image"
    if "{group}" in pattern:
        what = "group"
    return NoImages(f"No {what} matched: nothing in {below}{others} fits {pattern!r}.")


def _table(location: Location, found: Sequence[_Found], names: Sequence[str]) -> pa.Table:
    try:
        uris = pa.array([location.uri_of(entry.path) for entry in found], TEXT)
    except UnicodeEncodeError as error:
        raise PadimError(
            f"The name {error.object!r} is not UTF-8; rename it, or match images without it"
        ) from error
    columns: dict[str, Any] = {
        "uri": uris,
        "group": pa.array([entry.captured.get("group", DEFAULT_GROUP) for entry in found], TEXT),
    }
    for name in names:
        if name != "group":
            columns[name] = pa.array([entry.captured[name] for entry in found], TEXT)
    columns["size"] = pa.array([entry.size for entry in found], pa.int64())
    columns["version_tag"] = pa.array([entry.version_tag for entry in found], TEXT)
    return pa.table(columns)
