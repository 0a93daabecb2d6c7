"""Read model.json safely: a version's format, spec and groups."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from padim_ray.errors import ModelError
from padim_ray.model.spec import ModelSpec
from padim_ray.storage.json_fields import mapping, parse_json, read_fields, show, text, whole
from padim_ray.storage.location import Location
from padim_ray.storage.untrusted import naming_file, read_file

FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
MANIFEST = r"manifest(-[0-9a-f]{16})?\.parquet"
"""Names of a version's manifest: without an id before format 3."""
# limits on what a hostile model.json can make its readers allocate
MAX_BYTES = 32 * 2**20  # a quarter of a million groups
MAX_SHARDS = 10_000
MAX_CALIBRATED = 10**7
MAX_IMAGES = 10**10
MAX_VERSION = 10**9 - 1
_BEFORE_VERSION_4 = {
    **{"stride": 4, "neighbourhood": 1, "score_share": 0.0},
    **{"search": 0, "search_maps": False},
}
_version = whole(1, MAX_VERSION)
_name = text("[^\ud800-\udfff]*")  # JSON may contain lone surrogates, which UTF-8 can't encode
_manifest = text(MANIFEST)
_line = text("[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,1000}")  # safe to print on a terminal


@dataclass(frozen=True)
class GroupEntry:
    """A group in model.json.

    Attributes:
        images: the number of images in its statistics.
        failed: the number of images that could not be read.
        shards: the number of files of its statistics.
        calibrated: the number of images with a leave-one-out score; 0 if it isn't calibrated.
        version: the earlier version whose directory holds the group's files, if it isn't this one.
    """

    images: int
    failed: int
    shards: int
    calibrated: int = 0
    version: int | None = None

    def to_json(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "GroupEntry":
        """Read an entry: the inverse of `to_json`.

        Args:
            value: a JSON object, as anybody may have written it.
            where: the object's place in the file, for errors.

        Raises:
            ModelError: if a field is missing, unknown or invalid.
        """
        entry = read_fields(cls, value, where, _ENTRY)
        if entry.calibrated > entry.images:
            raise ModelError(f"{where} has more images calibrated than it has")
        return entry


_ENTRY = {
    "images": whole(2, MAX_IMAGES),
    "failed": whole(0, MAX_IMAGES),
    "shards": whole(1, MAX_SHARDS),
    "calibrated": whole(0, MAX_CALIBRATED),
    "version": lambda value, where: None if value is None else _version(value, where),
}


class Description(NamedTuple):
    """The content of model.json.

    Attributes:
        spec: the model's specification.
        groups: its groups by name.
        created_at: ISO 8601, in UTC.
        why: what made the version, for people.
        manifest: name of the version's manifest.
    """

    spec: ModelSpec
    groups: dict[str, GroupEntry]
    created_at: str
    why: str
    manifest: str


def read_description(root: Location, location: Location) -> Description:
    """Read the model.json of the model at `root`.

    Raises:
        ModelError: if it is missing, of another format version, or invalid.
    """
    content = read_file(root, location, MAX_BYTES, _read_object)
    found = content.get("format_version")
    if type(found) is not int or found not in READABLE_VERSIONS:
        raise ModelError(
            f"{location.uri} has format version {show(found)}, and this padim-ray reads "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}; use the padim-ray that fitted it, "
            "or fit again"
        )
    with naming_file(location):
        groups = {
            _name(name, "a group's name"): GroupEntry.from_json(entry, f"group {show(name)}")
            for name, entry in mapping(content["groups"], "groups").items()
        }
        return Description(
            ModelSpec.from_json(_present_spec(content["spec"], found)),
            groups,
            _line(content.get("created_at", ""), "created_at"),
            _line(content.get("why", ""), "why"),
            _manifest(content.get("manifest") if found > 2 else "manifest.parquet", "manifest"),
        )


def _present_spec(spec: Any, version: int) -> dict[str, Any]:
    """Convert the spec of an earlier format version.

    Version 1 has a regularisation where version 2 has a density. Before version 4, every position
    of the finest level was a cell, and an image's score was its map's maximum.
    """
    spec = dict(mapping(spec, "spec"))
    added: dict[str, Any] = {}
    if version < 4:
        added |= _BEFORE_VERSION_4
    if version == 1:
        if "regularization" not in spec:
            raise ModelError("'regularization' is missing in spec")
        added["density"] = {"kind": "gaussian", "regularization": spec.pop("regularization")}
    for name in added:
        if name in spec:
            raise ModelError(f"spec has the unknown field {name!r}")
    return spec | added


def _read_object(path: Path) -> dict[str, Any]:
    content = mapping(parse_json(path.read_bytes()), "it")
    for name in ("format_version", "spec", "groups"):
        if name not in content:
            raise ModelError(f"it is not a model's: {name!r} is missing")
    return content
