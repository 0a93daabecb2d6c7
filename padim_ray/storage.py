"""Files on local disk or an object store, through fsspec.

Everything is addressed by a `Location`: a root (a path or a URI such as `s3://bucket/prefix`) with
fsspec's storage options. It can be sent to workers; connections are made where it is used.
"""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from padim_ray.errors import PadimError

MAX_SEGMENT = 200  # bytes; file systems allow 255 in a name


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
        return fsspec.filesystem(self.uri.partition("://")[0], **self.options)

    @property
    def path(self) -> str:
        """The file system's own name for this location."""
        return self.fs._strip_protocol(self.uri)

    def __truediv__(self, relative: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{relative}", self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "options": self.options}  # not the connection

    def uri_of(self, path: str) -> str:
        """The URI of a path that this location's file system listed."""
        return path if self.is_local else self.fs.unstrip_protocol(path)

    def exists(self) -> bool:
        with explained(self.uri, "look up"):
            self.fs.invalidate_cache()
            return self.fs.exists(self.path)

    def read(self) -> bytes:
        """Raises: FileNotFoundError if it isn't there, PadimError if it can't be reached."""
        with explained(self.uri, "read"):
            return self.fs.cat_file(self.path)

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
            yield temporary
            with explained(self.uri, "write"):
                if self.is_local:
                    temporary.chmod(mode)  # the writer may have put a file of its own in its place
                    os.replace(temporary, self.uri)
                else:
                    self.fs.put_file(str(temporary), self.path)
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
            with explained(self.uri, "read"):
                # one stream: some S3-compatible servers send the whole file's checksum with a part
                whole = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}
                self.fs.get_file(self.path, str(copy), **whole)
            yield copy

    def remove(self) -> None:
        """Delete this file."""
        with explained(self.uri, "delete"):
            self.fs.rm_file(self.path)

    def check_writable(self) -> None:
        """Raises: PadimError if nothing can be written below this location."""
        probe = self / ".write-check"
        probe.write(b"")
        probe.remove()


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
def explained(uri: str, action: str) -> Iterator[None]:
    """Turn a file system's refusals into sentences.

    A missing file stays FileNotFoundError, except where one is written.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(uri, action, error)
        if reason is None:
            raise
        raise PadimError(f"Can't {action} {uri}: {reason}.") from error


def _reason(uri: str, action: str, error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    names = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
