"""Files on local disk or an object store, through fsspec, with patience for stores.

Everything is addressed by a `Location`: a root (a path or a URI such as `s3://bucket/prefix`) with
fsspec's storage options. It can be sent to workers; connections are made where it is used.
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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from padim_ray.errors import PadimError
from padim_ray.storage.retry import causes, with_retries

MAX_SEGMENT = 200  # bytes; file systems allow 255 in a name
S3_CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": 64,  # as many images as are fetched together
    "retries": {"mode": "standard", "total_max_attempts": 5},  # of one request, with backoff
}
DELETING_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A directory, prefix or file. `uri` has no trailing slash; local paths are absolute."""

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    @classmethod
    def of(cls, uri: str, options: Mapping[str, Any] | None = None) -> "Location":
        """Normalise what a user wrote: `~` and relative paths become absolute ones.

        Raises:
            PadimError: if no file system serves the URI's scheme, or it names no bucket.
        """
        scheme, separator, rest = str(uri).partition("://")
        if not separator:
            return cls(os.path.abspath(os.path.expanduser(uri)))
        if scheme == "file":
            return cls(os.path.abspath(rest))
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
        return cls(uri.rstrip("/"), options or {})

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        if self.is_local:
            return LocalFileSystem()
        scheme, options = self.uri.partition("://")[0], dict(self.options)
        if scheme not in ("s3", "s3a"):
            return fsspec.filesystem(scheme, **options)
        config = S3_CONFIG | (options.get("config_kwargs") or {})
        fs = fsspec.filesystem(scheme, **options | {"config_kwargs": config})
        fs.retries = 1  # botocore and `with_retries` do: a third layer would multiply the waits
        return fs

    def open_parts(self) -> BinaryIO:
        """A file of which only what is asked for is read, and nothing ahead.

        Raises: FileNotFoundError if it isn't there.
        """
        options = dict(self.options)
        if self.uri.startswith(("s3://", "s3a://")):
            # some servers send the whole file's checksum with a part of it
            unchecked = {"response_checksum_validation": "when_required"}
            options["config_kwargs"] = (options.get("config_kwargs") or {}) | unchecked
        return Location(self.uri, options).fs.open(self.path, "rb", cache_type="none")

    @property
    def path(self) -> str:
        """The file system's own name for this location."""
        return self.fs._strip_protocol(self.uri)

    @property
    def name(self) -> str:
        """The last segment."""
        return self.uri.rpartition("/")[2]

    def __truediv__(self, relative: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{relative}", self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "options": self.options}  # not the connection

    def uri_of(self, path: str) -> str:
        """The URI of a path that this location's file system listed."""
        return path if self.is_local else self.fs.unstrip_protocol(path)

    def exists(self) -> bool:
        self.fs.invalidate_cache()
        return self._attempt("look up", lambda: self.fs.exists(self.path))

    def size(self) -> int | None:
        """Bytes, as far as the file system tells. Raises: FileNotFoundError if it isn't there."""
        self.fs.invalidate_cache(self.path)  # it may be newer than the last listing
        return self._attempt("read", lambda: self.fs.size(self.path))

    def read(self) -> bytes:
        """Raises: FileNotFoundError if it isn't there, PadimError if it can't be reached."""
        return self._attempt("read", lambda: self.fs.cat_file(self.path))

    def _attempt(self, action: str, operation: Callable[[], T]) -> T:
        with explained(self.uri, action):
            return with_retries(operation, f"{action} {self.uri}")

    def create(self, data: bytes) -> None:
        """Write a file that isn't there yet: of those who try at once, one succeeds.

        On stores with conditional writes (S3, GCS, Azure) and on disks that is certain. Where a
        server ignores the condition, two who try within a moment of each other may both succeed.

        Args:
            data: unlike what anybody else would write, so that one's own is recognised.

        Raises:
            FileExistsError: if it is there.
        """
        if self.is_local:
            with self._temporary() as (temporary, _):
                temporary.write_bytes(data)
                _flush(temporary)
                os.link(temporary, self.uri)  # atomic like a rename, but never replaces
            return
        if self.exists():
            raise FileExistsError(self.uri)
        # a retry may be told that the file exists which its first attempt had written
        with suppress(FileExistsError):
            self._attempt("write", lambda: self.fs.pipe_file(self.path, data, mode="create"))
        if self.read() != data:
            raise FileExistsError(self.uri)

    def list_files(self) -> list["Location"]:
        """All files below this directory, sorted; none if it doesn't exist."""
        self.fs.invalidate_cache()  # others may have written since this process last listed
        paths = self._attempt("list", lambda: self.fs.find(self.path))
        return [Location(self.uri_of(path), self.options) for path in sorted(paths)]

    def list_directories(self) -> list[str]:
        """The names of the directories right below this one, sorted; none if it doesn't exist."""
        self.fs.invalidate_cache()
        try:
            children = self._attempt("list", lambda: self.fs.ls(self.path, detail=True))
        except FileNotFoundError:
            return []
        names = (child["name"] for child in children if child["type"] == "directory")
        return sorted(name.rstrip("/").rpartition("/")[2] for name in names)

    def file_sizes(self) -> dict[str, int]:
        """Bytes of all files below this directory, by their path relative to it."""
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
            pq.write_table(table, temporary, compression="zstd")

    @contextmanager
    def replaced_by(self) -> Iterator[Path]:
        """A local file to fill, which takes this location's place when the block ends well.

        On local disk it is renamed into place; to an object store it is uploaded, which its readers
        see only when complete.
        """
        with self._temporary() as (temporary, mode):
            yield temporary
            if not self.is_local:
                self._attempt("write", lambda: self.fs.put_file(str(temporary), self.path))
                return
            temporary.chmod(mode)  # the writer may have put a file of its own in its place
            _flush(temporary)
            os.replace(temporary, self.uri)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, int]]:
        """A new file, where this one will be or on its way to an object store, and its mode."""
        with explained(self.uri, "write"):
            directory = os.path.dirname(self.uri) if self.is_local else tempfile.gettempdir()
            os.makedirs(directory, exist_ok=True)
            # object stores take the content's type from the name: browsers then show a report
            suffix = os.path.splitext(self.uri)[1]
            temporary = Path(directory) / f".{secrets.token_hex(8)}.tmp{suffix}"
            # what is renamed into place is for everyone that the umask allows; a copy is not
            mode = 0o666 if self.is_local else 0o600
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, mode))
            mode = temporary.stat().st_mode
        try:
            with explained(self.uri, "write", only=OSError):
                yield temporary, mode
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def as_local_file(self) -> Iterator[Path]:
        """This file on local disk: itself, or a copy that lasts as long as the block."""
        if self.is_local:
            with explained(self.uri, "read"), open(self.uri, "rb"):
                pass  # the reader's own message for one that can't be opened may be anything
            yield Path(self.uri)
            return
        with tempfile.TemporaryDirectory(prefix="padim-ray-") as directory:
            copy = Path(directory) / "file"
            # one stream: some S3-compatible servers send the whole file's checksum with a part
            whole = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}
            self._attempt("read", lambda: self.fs.get_file(self.path, str(copy), **whole))
            yield copy

    def remove(self) -> None:
        """Delete this file, if it is there."""
        with suppress(FileNotFoundError):
            self._attempt("delete", lambda: self.fs.rm_file(self.path))

    def remove_all(self) -> None:
        """Delete this directory's files one by one: a recursive rm takes brackets for patterns."""
        with ThreadPoolExecutor(DELETING_THREADS) as pool:
            for done in [pool.submit(file.remove) for file in self.list_files()]:
                done.result()
        if self.is_local:
            shutil.rmtree(self.uri, ignore_errors=True)  # the empty directories


def numbered_file(directory: Location, number: int) -> Location:
    """`000004.json`, of files that follow each other."""
    return directory / f"{number:06d}.json"


def list_numbers(directory: Location) -> list[int]:
    """The numbers of such files that are there, ascending."""
    names = [file.name for file in directory.list_files()]
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{6,9}\.json", name))


def _flush(file: Path) -> None:
    """To the disk itself: a rename may outlive a power cut that the content doesn't."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())


def version_tag(info: Mapping[str, Any]) -> str | None:
    """What tells a file's version, of what its store says of it: ETag, or modification time."""
    tag = info.get("ETag") or info.get("etag") or info.get("mtime")
    return None if tag is None else str(tag).strip('"')


def safe_segment(text: str, *, without: str = "") -> str:
    """Any text as one path segment: not empty, hidden, `..` or over-long, and not with `without`.

    Different texts stay different, and ordinary ones are themselves.
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


@contextmanager
def explained(uri: str, action: str, only: type[Exception] = Exception) -> Iterator[None]:
    """Turn a file system's refusals into sentences.

    A missing file stays FileNotFoundError, except where one is written, and one that mustn't exist
    FileExistsError.
    """
    try:
        yield
    except PadimError:
        raise
    except only as error:
        if _exists_already(error):
            raise FileExistsError(uri) from error
        reason = _reason(uri, action, error)
        if reason is None:
            raise
        raise PadimError(f"Can't {action} {uri}: {reason}.") from error


def _exists_already(error: BaseException) -> bool:
    """Whether a conditional write was refused: S3's servers don't all say it in the same words."""
    codes = {
        response.get("Error", {}).get("Code")
        for response in (getattr(e, "response", None) for e in causes(error))
        if isinstance(response, dict)
    }
    return bool(codes & {"PreconditionFailed", "412"}) or (
        isinstance(error, FileExistsError) and error.filename2 is not None  # os.link
    )


def _reason(uri: str, action: str, error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    names = {kind.__name__ for e in causes(error) for kind in type(e).__mro__}
    if "bucket does not exist" in text or "NoSuchBucket" in text:
        return "the bucket does not exist"
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        return "no credentials were found (set AWS_ACCESS_KEY_ID … or --storage-options)"
    if isinstance(error, FileNotFoundError) and action != "write":
        return None
    if isinstance(error, FileExistsError):
        return "a file is where a directory should be"
    if isinstance(error, PermissionError):
        if "://" in uri:
            return f"the storage refuses these credentials ({text.rstrip('.')})"
        return "permission denied"
    if names & {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"}:
        return f"the storage can't be reached ({text})"
    if isinstance(error, OSError):
        return error.strerror or text or type(error).__name__
    if "BotoCoreError" in names or ("://" in uri and isinstance(error, ValueError | TypeError)):
        return f"{text.rstrip('.')} (see --storage-options)"
    return None
