"""What a job was begun with, beside its results: to continue it, and never to mix it with another.

job.json          the job's identity: what its results depend on; written last
listed.parquet    its images, as they were listed
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
    }
)
"""Options that results don't depend on, or that say where they are."""
LATER_OPTIONS = {"density": "gaussian"}
"""Options of `fit` that job records of an earlier padim-ray lack."""

NOT_OPTIONS = frozenset({"job", "model", "model_version", "model_sha256", "weights_sha256"}) | {
    *("models", "models_sha256")
}


@dataclass(frozen=True)
class JobRecord:
    """A job as it was begun.

    `identity`: options by name, and what else the results depend on. `settings`: chosen by the job
    for itself. `images`: the manifest.
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
        """Read what was begun at `root`; None if nothing was.

        Raises:
            PadimError: if it is damaged.
        """
        try:
            content = parse_json((root / JOB).read())
            with (root / LISTED).as_local_file() as path:
                identity = _with_later_options(content["identity"])
                return cls(identity, content["settings"], pq.read_table(path))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise PadimError(f"{root.uri}/{JOB} or {LISTED} is damaged: {error}") from error

    def check_identity(self, identity: Mapping[str, Any], place: str) -> None:
        """Make sure that a job with this identity is this one.

        Args:
            place: what holds this job, for the error.

        Raises:
            PadimError: naming what differs.
        """
        for name in [*identity, *(set(self.identity) - set(identity))]:
            before, now = self.identity.get(name), identity.get(name)
            if before != now:
                raise PadimError(
                    f"{place} with {_named(name)} {_shown(before)}, which is {_shown(now)} now: "
                    f"repeat the command as it was to continue, or start afresh with --overwrite"
                )

    def with_images(self, images: pa.Table, place: str) -> "JobRecord":
        """The same job with the images as they are given now, if they are those that were listed.

        What is given may hold what isn't written down: how to fetch them.

        Raises:
            PadimError: naming what differs.
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
    """A job's identity: what its results depend on, as JSON."""
    chosen = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in NOT_IDENTITY
    }
    if isinstance(options, ImagesOptions):  # however the same place is written
        if options.images is not None:
            template = UriTemplate.parse(options.images, options.storage_options)
            chosen["images"] = "/".join([template.root.uri, *template.segments])
        if options.manifest is not None:
            chosen["manifest"] = Location.of(options.manifest, options.storage_options).uri
    told = {k: redact(v) if isinstance(v, str) else v for k, v in (chosen | more).items()}
    return json.loads(json.dumps(told))


def describe_changes(before: pa.Table, now: pa.Table) -> str | None:
    """How two listings differ, in words; None if they don't."""
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
