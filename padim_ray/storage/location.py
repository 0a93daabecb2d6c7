"""Files and directories on local disk or an object store, through fsspec.

A `Location` is a path or a URI such as `s3://bucket/prefix`, with fsspec's storage options. It can
be sent to workers, because connections are made where it is used. Transient failures are retried.
"""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from padim_ray.errors import PadimError
from padim_ray.storage.options import options_of
from padim_ray.storage.parquet import write_parquet
from padim_ray.storage.refusals import explained
from padim_ray.storage.retry import with_retries
from padim_ray.storage.spelling import canonical_uri

S3_CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,  # images are fetched concurrently
    "retries": {"mode": "standard", "total_max_attempts": 5},  # per request, with backoff
}
DELETING_THREADS = 8
MAX_SEGMENT = 200  # bytes; file systems allow 255 in a name
T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A file, a directory or an object store's prefix.

    `uri` has no trailing slash, and local paths are absolute. `options` are those of all protocols,
    see `options_of`, and may hold credentials.

    A directory that a job has claimed has two more attributes, which everything below it shares:
    `staging` is the local directory for files that are being written (default: beside the file),
    and `guard` is called before each change; it raises PadimError if the job has lost its claim.

    Methods that use the storage raise PadimError, with the reason, if it refuses.
    """

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    staging: str | None = field(default=None, repr=False, compare=False)
    guard: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, uri: str, options: Mapping[str, Any] | None = None) -> "Location":
        """Normalise a path or URI from a user, see `canonical_uri`.

        Raises:
            PadimError: if no file system serves the URI's scheme, the URI names no bucket, or the
                options are malformed.
        """
        spelled = canonical_uri(str(uri))
        scheme, separator, rest = spelled.partition("://")
        options_of(scheme if separator else "file", options or {})  # checks them
        if not separator:
            return cls(spelled)
        if scheme not in fsspec.available_protocols():
            raise PadimError(
                f"{uri!r} has the scheme {scheme!r}, which no known file system serves"
            )
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise PadimError(f"{uri!r} needs a package that is missing: {error}") from error
        if not rest.strip("/"):
            raise PadimError(f"{uri!r} names no bucket")
        return cls(spelled.rstrip("/"), options or {})

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # no connection

    def __truediv__(self, relative: str) -> "Location":
        return replace(self, uri=f"{self.uri.rstrip('/')}/{relative}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def name(self) -> str:
        """The last segment of the path."""
        return self.uri.rpartition("/")[2]

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        if self.is_local:
            return LocalFileSystem()
        return self._connect()

    def _connect(self, **s3_config: Any) -> fsspec.AbstractFileSystem:
        """Make the file system of a remote location, with more of botocore's settings for S3."""
        scheme = self.uri.partition("://")[0]
        options = options_of(scheme, self.options)
        if scheme != "s3":
            return fsspec.filesystem(scheme, **options)
        config = S3_CONFIG | (options.get("config_kwargs") or {}) | s3_config
        fs = fsspec.filesystem(scheme, **options | {"config_kwargs": config})
        fs.retries = 1  # botocore and `with_retries` retry: a third layer would multiply the waits
        return fs

    @property
    def path(self) -> str:
        """This location as its file system writes it, without the scheme."""
        return self.fs._strip_protocol(self.uri)

    def uri_of(self, path: str) -> str:
        """The URI of a path that this location's file system listed."""
        return path if self.is_local else self.fs.unstrip_protocol(path)

    def exists(self) -> bool:
        self.fs.invalidate_cache()
        return self._attempt("look up", lambda: self.fs.exists(self.path))

    def size(self) -> int | None:
        """The file's size in bytes; None if the file system doesn't know it.

        Raises:
            FileNotFoundError: if the file doesn't exist.
        """
        self.fs.invalidate_cache(self.path)  # the last listing may be out of date
        return self._attempt("read", lambda: self.fs.size(self.path))

    def read(self) -> bytes:
        """Read the whole file.

        Raises:
            FileNotFoundError: if the file doesn't exist.
        """
        return self._attempt("read", lambda: self.fs.cat_file(self.path))

    def open_parts(self) -> BinaryIO:
        """Open the file to read parts of it, without read-ahead.

        Raises:
            FileNotFoundError: if the file doesn't exist.
        """
        # some servers send the whole file's checksum with a part of it
        unchecked = {"response_checksum_validation": "when_required"}
        fs = self.fs if self.is_local else self._connect(**unchecked)
        return fs.open(self.path, "rb", cache_type="none")

    @contextmanager
    def as_local_file(self) -> Iterator[Path]:
        """The file on local disk: itself, or a copy that is deleted when the block ends.

        Raises:
            FileNotFoundError: if the file doesn't exist.
        """
        if self.is_local:
            # open it first: libraries report a file that can't be opened in words of their own
            with explained(self.uri, "read"), open(self.uri, "rb"):
                pass
            yield Path(self.uri)
            return
        with tempfile.TemporaryDirectory(prefix="padim-ray-") as directory:
            copy = Path(directory) / "file"
            # one stream: some S3-compatible servers send the whole file's checksum with a part
            whole = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}
            self._attempt("read", lambda: self.fs.get_file(self.path, str(copy), **whole))
            yield copy

    def list_files(self) -> list["Location"]:
        """All files below this directory, sorted; none if it doesn't exist."""
        self.fs.invalidate_cache()  # others may have written since the last listing
        paths = self._attempt("list", lambda: self.fs.find(self.path))
        return [replace(self, uri=self.uri_of(path)) for path in sorted(paths)]

    def list_directories(self) -> list[str]:
        """Names of the directories directly below this one, sorted; none if it doesn't exist."""
        self.fs.invalidate_cache()
        try:
            children = self._attempt("list", lambda: self.fs.ls(self.path, detail=True))
        except FileNotFoundError:
            return []
        names = (child["name"] for child in children if child["type"] == "directory")
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def file_sizes(self) -> dict[str, int]:
        """Sizes in bytes of all files below this directory, by relative path."""
        self.fs.invalidate_cache()
        found = self._attempt("list", lambda: self.fs.find(self.path, detail=True))
        below = len(self.path.rstrip("/")) + 1
        return {path[below:]: info["size"] for path, info in sorted(found.items())}

    def write(self, data: bytes) -> None:
        """Write atomically: readers see the whole file or none of it."""
        with self.replaced_by() as temporary:
            temporary.write_bytes(data)

    def write_table(self, table: pa.Table) -> None:
        """Write a table as Parquet, atomically."""
        with self.replaced_by() as temporary:
            write_parquet(table, temporary)

    @contextmanager
    def replaced_by(self) -> Iterator[Path]:
        """A temporary local file to fill, which replaces this file atomically.

        It is renamed or uploaded when the block ends, and discarded if the block raises.
        """
        with self._temporary() as (temporary, mode):
            yield temporary
            if not self.is_local:
                self._change("write", lambda: self.fs.put_file(str(temporary), self.path))
                return
            temporary.chmod(mode)  # the block may have replaced the temporary file by another
            _flush(temporary)
            self._check_claim()
            os.replace(temporary, self.uri)

    def create(self, data: bytes) -> None:
        """Write a file that doesn't exist yet. Of several processes that try, one succeeds.

        This is certain on local disk and on stores with conditional writes (S3, GCS, Azure). Where
        a server ignores the condition, two processes that try at the same moment may both succeed.

        Args:
            data: the content. It must differ from what other processes write, so that a retry
                recognises the file that its first attempt has written.

        Raises:
            FileExistsError: if the file exists.
        """
        if self.is_local:
            with self._temporary() as (temporary, _):
                temporary.write_bytes(data)
                _flush(temporary)
                self._check_claim()
                os.link(temporary, self.uri)  # atomic like a rename, but never replaces
            return
        if self.exists():
            raise FileExistsError(self.uri)
        # a retry finds the file that its first attempt has written
        with suppress(FileExistsError):
            self._change("write", lambda: self.fs.pipe_file(self.path, data, mode="create"))
        if self.read() != data:
            raise FileExistsError(self.uri)

    def remove(self) -> None:
        """Delete this file if it exists."""
        with suppress(FileNotFoundError):
            self._change("delete", lambda: self.fs.rm_file(self.path))

    def remove_all(self) -> None:
        """Delete this directory and everything below it."""
        with ThreadPoolExecutor(DELETING_THREADS) as pool:
            # one by one, because fsspec's recursive rm takes brackets in names for patterns
            for deletion in [pool.submit(file.remove) for file in self.list_files()]:
                deletion.result()
        if self.is_local:
            self._check_claim()
            shutil.rmtree(self.uri, ignore_errors=True)  # the empty directories

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, int]]:
        """A new local file and its mode; on the file system of this file if that is local."""
        with explained(self.uri, "write"):
            parent = os.path.dirname(self.uri) if self.is_local else tempfile.gettempdir()
            directory = self.staging or parent
            for each in {parent, directory}:
                os.makedirs(each, exist_ok=True)
            # object stores derive the content type from the name, and browsers need it for a report
            suffix = os.path.splitext(self.uri)[1]
            temporary = Path(directory) / f".{secrets.token_hex(8)}.tmp{suffix}"
            # a file that is renamed into place gets the umask's mode; a copy stays private
            mode = 0o666 if self.is_local else 0o600
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, mode))
            mode = temporary.stat().st_mode
        try:
            with explained(self.uri, "write", only=OSError):
                yield temporary, mode
        finally:
            temporary.unlink(missing_ok=True)

    def _change(self, action: str, operation: Callable[[], T]) -> T:
        def checked() -> T:
            self._check_claim()  # before each attempt, because retries take minutes
            return operation()

        return self._attempt(action, checked)

    def _check_claim(self) -> None:
        if self.guard:
            self.guard()

    def _attempt(self, action: str, operation: Callable[[], T]) -> T:
        with explained(self.uri, action):
            return with_retries(operation, f"{action} {self.uri}")


def _flush(file: Path) -> None:
    """Flush to disk. Otherwise a rename may survive a power failure and the content may not."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())


def numbered_file(directory: Location, number: int) -> Location:
    """A file of a numbered series, such as `000004.json`."""
    return directory / f"{number:06d}.json"


def list_numbers(directory: Location) -> list[int]:
    """The numbers of a directory's numbered files, ascending."""
    names = [file.name for file in directory.list_files()]
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{6,9}\.json", name))


def version_tag(info: Mapping[str, Any]) -> str | None:
    """What identifies a file's version: its ETag, or its modification time.

    Args:
        info: the file's entry in fsspec's listing.
    """
    tag = info.get("ETag") or info.get("etag") or info.get("mtime")
    return None if tag is None else str(tag).strip('"')


def safe_segment(text: str, *, without: str = "") -> str:
    """Encode any text as one path segment.

    Different texts give different segments; ordinary names stay as they are. A segment is never
    empty, hidden, `..`, over-long or the start of an option, and never contains `without`.
    """
    quoted = quote(text, safe=" !()+,=@[]")
    if without:
        quoted = quoted.replace(without, "".join(f"%{ord(character):02X}" for character in without))
    if not quoted or quoted.startswith((".", "-", " ")):
        quoted = (f"%{ord(quoted[0]):02X}" if quoted else "%") + quoted[1:]
    if len(quoted) > MAX_SEGMENT:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        quoted = f"{quoted[: MAX_SEGMENT - 20]}%~{digest}"
    return quoted
