"""The record of a job, stored with its results.

With it a job is continued with the same images, and never mixed with another job.

job.json          the job's identity, which is everything that its results depend on; written last
listed.parquet    the images as they were listed
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from padim_ray.errors import PadimError
from padim_ray.images.sources import without_sources
from padim_ray.images.template import UriTemplate
from padim_ray.redaction import redact
from padim_ray.runs.options.common import ImagesOptions, RunOptions
from padim_ray.storage.json_fields import parse_json
from padim_ray.storage.location import Location

JOB, LISTED = "job.json", "listed.parquet"
NOT_IDENTITY = frozenset(
    {
        *("model", "out", "batch_size", "actors", "max_failed", "storage_options", "address"),
        *("overwrite", "round_images", "gpus", "decode_resource", "group_memory"),
        *("retry_failed", "allow_empty"),
    }
)
"""Options that results don't depend on, or that only say where things are."""
LATER_OPTIONS = {"density": "gaussian"}
"""Options of `fit` that job records of an earlier padim-ray lack."""

NOT_OPTIONS = frozenset({"job", "model", "model_version", "model_sha256", "weights_sha256"}) | {
    *("models", "models_sha256")
}


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
    def read(cls, root: Location) -> "JobRecord | None":
        """Read the record of the job at `root`; None if no job was started there.

        Raises:
            PadimError: if the record is damaged.
        """
        try:
            content = parse_json((root / JOB).read())
            with (root / LISTED).as_local_file() as path:
                identity = _with_later_options(content["identity"])
                return cls(identity, content["settings"], pq.read_table(path))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise PadimError(f"{root.uri}/{JOB} or {LISTED} is damaged: {error}") from error

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
        return replace(self, images=images)


def _with_later_options(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record's identity with the options that are newer than it, as they took effect then."""
    return (LATER_OPTIONS if identity.get("job") == "fit" else {}) | dict(identity)


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
    if isinstance(options, ImagesOptions):  # one spelling for each place
        if options.images is not None:
            template = UriTemplate.parse(options.images, options.storage_options)
            chosen["images"] = "/".join([template.root.uri, *template.segments])
        if options.manifest is not None:
            chosen["manifest"] = Location.of(options.manifest, options.storage_options).uri
    redacted = {k: redact(v) if isinstance(v, str) else v for k, v in (chosen | more).items()}
    return json.loads(json.dumps(redacted))  # tuples become lists, as in a stored record


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
