"""The record of a job, stored with its results.

With it a job is continued with the same images, and never mixed with another job.

job.json          the job's identity, which is everything that its results depend on; written last
listed.parquet    the images as they were listed
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from padim_ray.errors import ModelError, PadimError
from padim_ray.images.manifest import restore_manifest
from padim_ray.images.sources import without_sources
from padim_ray.images.template import split_template
from padim_ray.redaction import redact
from padim_ray.runs.options.common import RunOptions
from padim_ray.storage.json_fields import mapping, parse_json, read_fields, show, text, whole
from padim_ray.storage.location import Location
from padim_ray.storage.spelling import canonical_uri
from padim_ray.storage.untrusted import MAX_ROWS, MAX_TABLE_BYTES, parse_file, read_table

JOB, LISTED = "job.json", "listed.parquet"
MAX_JOB_BYTES = 16 * 2**20  # the names of 50,000 merged models
NOT_IDENTITY = frozenset(
    {
        *("model", "out", "batch_size", "actors", "max_failed", "storage_options", "address"),
        *("overwrite", "round_images", "gpus", "decode_resource", "group_memory"),
        "embedding_memory",
        *("retry_failed", "allow_empty"),
    }
)
"""Options that results don't depend on, or that only say where things are."""
LATER_OPTIONS = {
    "density": "gaussian",
    "stride": 4,
    "neighbourhood": 1,
    "score_share": 0.0,
    "search": 0,
    "search_maps": False,
    "grey_range": None,
    "resize": "stretch",
}
"""Options of `fit` that job records of an earlier padim-ray lack, as it worked."""

NOT_OPTIONS = frozenset({"job", "model", "model_version", "model_sha256", "weights_sha256"}) | {
    *("models", "models_sha256")
}
_SETTINGS = {"images_per_shard": whole(1, 10**9), "precision": text("[a-z0-9]+")}


@dataclass(frozen=True)
class JobRecord:
    """A job as it was started.

    `identity`: options by name, and whatever else the results depend on. `settings`: values that
    the job chose itself, such as the shards' size. `images`: the manifest.
    """

    identity: Mapping[str, Any]
    settings: Mapping[str, Any]
    images: pa.Table

    def write(self, root: Location) -> None:
        (root / LISTED).write_table(without_sources(self.images))
        content = {"identity": self.identity, "settings": self.settings}
        (root / JOB).write(json.dumps(content, indent=1, ensure_ascii=False).encode())

    @classmethod
    def read(cls, root: Location, below: Location | None = None) -> "JobRecord | None":
        """Read the record of the job at `root`; None if no job was started there.

        Args:
            root: the directory of the run, or of the model's version.
            below: a directory that no file may lead out of, such as the model's. Default: `root`.

        Raises:
            PadimError: if the record is damaged.
        """
        content = _read_content(root, below)
        if content is None:
            return None
        images: pa.Table = read_table(
            *(below or root, root / LISTED),
            {"uri": pa.string()},
            range(MAX_ROWS),
            parse=restore_manifest,
            max_bytes=MAX_TABLE_BYTES,
            optional={"group": pa.string(), "size": pa.int64(), "version_tag": pa.string()},
        )
        return cls(content.identity, content.settings, images)

    def check_identity(self, identity: Mapping[str, Any], place: str) -> None:
        """Check that this is the record of a job with the given identity.

        Args:
            place: where this record is, as the beginning of the error's sentence.

        Raises:
            PadimError: naming the first difference.
        """
        for name in [*identity, *sorted(set(self.identity) - set(identity))]:
            before, now = self.identity.get(name), identity.get(name)
            if before != now:
                raise PadimError(
                    f"{place} with {_named(name)} {_shown(before)}, which is {_shown(now)} now: "
                    "repeat the original command to continue, or start afresh with --overwrite"
                )

    def with_images(self, images: pa.Table, place: str) -> "JobRecord":
        """Return this record with `images`, which must be the recorded ones.

        The given table may have the presigned URIs to fetch from, which are never stored.

        Raises:
            PadimError: naming the images that differ.
        """
        changes = describe_changes(self.images, images)
        if changes:
            raise PadimError(
                f"{place} with other images: since then {changes}. Score them to another --out, or "
                "start afresh with --overwrite"
            )
        if not images["uri"].equals(self.images["uri"]):  # spelled otherwise, they were sorted so
            images = images.take(pc.index_in(self.images["uri"], images["uri"]))
        return replace(self, images=images)


@dataclass(frozen=True)
class _Content:
    """The content of job.json."""

    identity: Mapping[str, Any]
    settings: Mapping[str, Any]


def read_identity(root: Location, below: Location | None = None) -> Mapping[str, Any] | None:
    """Read only the identity of the job at `root`; see `JobRecord.read`."""
    content = _read_content(root, below)
    return None if content is None else content.identity


def _read_content(root: Location, below: Location | None) -> _Content | None:
    try:
        return parse_file(below or root, root / JOB, MAX_JOB_BYTES, _parse_content)
    except FileNotFoundError:
        return None


def _parse_content(path: Path) -> _Content:
    return read_fields(
        *(_Content, parse_json(path.read_bytes()), "it"),
        {"identity": _identity, "settings": _settings},
    )


def _options(value: Any, where: str) -> dict[str, Any]:
    """Check for an object of options: their values are scalars or lists of scalars."""
    options = mapping(value, where)
    for name, item in options.items():
        items = item if isinstance(item, list) else [item]
        if not all(isinstance(each, str | int | float | None) for each in items):
            raise ModelError(f"{where}.{name} can't be {show(item)}")
    return options


def _settings(value: Any, where: str) -> dict[str, Any]:
    return {
        name: _SETTINGS[name](item, f"{where}.{name}") if name in _SETTINGS else item
        for name, item in _options(value, where).items()
    }


def _identity(value: Any, where: str) -> Mapping[str, Any]:
    options = _options(value, where)
    for name in _PLACES.keys() & options.keys():
        items = options[name] if name == "models" else [options[name]]
        if not isinstance(items, list) or not all(isinstance(item, str | None) for item in items):
            raise ModelError(f"{where}.{name} can't be {show(options[name])}")
    try:
        return _as_of_now(options)
    except PadimError as error:
        raise ModelError(f"{where}: {error}") from error


def _as_of_now(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity that an earlier padim-ray recorded, as this one identifies the same job.

    It has the options that are newer than it, as they took effect then, and canonical URIs.
    """
    later = LATER_OPTIONS if identity.get("job") == "fit" else {}
    return later | _with_canonical_places(identity)


def identify(options: RunOptions, **more: Any) -> dict[str, Any]:
    """Collect everything that a job's results depend on, as JSON.

    Args:
        more: what isn't an option, such as the model's version.
    """
    chosen = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in NOT_IDENTITY
    }
    chosen = _with_canonical_places(chosen | more)
    redacted = {k: redact(v) if isinstance(v, str) else v for k, v in chosen.items()}
    return json.loads(json.dumps(redacted))  # tuples become lists, as in a stored record


def _canonical_template(text: str) -> str:
    root, patterns = split_template(text)
    return "/".join([_canonical_place(root), *patterns])


def _canonical_place(uri: str) -> str:
    return canonical_uri(uri).rstrip("/")


_PLACES: Mapping[str, Callable[[Any], Any]] = {
    "images": _canonical_template,
    "masks": _canonical_template,
    "manifest": _canonical_place,
    "model": _canonical_place,
    "models": lambda uris: [*map(_canonical_place, uris)],
}


def _with_canonical_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity whose paths and URIs have one spelling for each place."""
    return {
        name: _PLACES[name](value) if name in _PLACES and value is not None else value
        for name, value in identity.items()
    }


def describe_changes(before: pa.Table, now: pa.Table) -> str | None:
    """Describe how two manifests differ; None if they don't."""
    before, now = without_sources(before), without_sources(now)
    if now.equals(before):
        return None
    if now.column_names != before.column_names:
        return f"the columns became {', '.join(now.column_names)}"
    old, new = ({row[0]: row for row in _rows(table)} for table in (before, now))
    kinds = {
        "added": [uri for uri in new if uri not in old],
        "gone": [uri for uri in old if uri not in new],
        "changed": [uri for uri in new if uri in old and old[uri] != new[uri]],
    }
    found = [
        f"{len(uris)} image{'s' * (len(uris) != 1)} {kind} ({uris[0]}{', …' * (len(uris) > 1)})"
        for kind, uris in kinds.items()
        if uris
    ]
    return ", ".join(found) or None


def _rows(table: pa.Table) -> Iterator[tuple]:
    names = ["uri", *(name for name in table.column_names if name != "uri")]
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _named(name: str) -> str:
    words = name.replace("_", " ")
    return words if name in NOT_OPTIONS else "--" + words.replace(" ", "-")


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
