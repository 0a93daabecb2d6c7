"""Fetch the bytes of many images concurrently; each failure is one image's."""

import asyncio
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import fsspec.asyn
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from tenacity import RetryError, retry_if_result

from padim_ray.errors import ImageError
from padim_ray.images.limits import MAX_IMAGE_BYTES
from padim_ray.storage.credentials import Secrets
from padim_ray.storage.location import Location, version_tag
from padim_ray.storage.retry import is_transient, patience, patiently

READING_THREADS = 16  # for file systems without concurrent reads of their own
HTTP_CHUNK = 2**20  # bytes read at a time, so that an oversized file is noticed early
_FINAL = ("not found", "not a file", "file too large", "changed since it was listed")
"""Causes of failed fetches that another try can't change."""


class ListedFile(NamedTuple):
    """A file to read, with its size in bytes and its version tag when it was listed, if known."""

    uri: str
    size: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Fetcher:
    """Reads files concurrently.

    Transient failures are retried with backoff and jitter, until `retry.patience()` ends. Files of
    more than `max_bytes` aren't read.
    """

    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    max_bytes: int = MAX_IMAGE_BYTES

    def __call__(
        self,
        uris: Sequence[str],
        sizes: Sequence[int | None] | None = None,
        tags: Sequence[str | None] | None = None,
    ) -> list[bytes | ImageError]:
        """Read files.

        Args:
            uris: the files, of any stores.
            sizes: their sizes in bytes when they were listed; None where unknown.
            tags: their version tags when they were listed; None where unknown. A file whose size or
                tag differs now has changed, and fails.

        Returns:
            For each file, in order, its content or an error.
        """
        unknown = [None] * len(uris)
        files = map(ListedFile, uris, sizes or unknown, tags or unknown)
        contents: dict[str, bytes | ImageError] = {}
        for _, same_store in groupby(sorted(files, key=_scheme), key=_scheme):
            contents.update(self._fetch_from_one_store(list(same_store)))
        return [contents[uri] for uri in uris]

    def _fetch_from_one_store(self, files: list[ListedFile]) -> dict[str, bytes | ImageError]:
        fs = Location.of(files[0].uri, self.storage_options).fs
        read = self._read
        if "s3" in fs.protocol:
            read = self._read_from_s3
        elif "http" in fs.protocol:
            read = self._read_from_http
        contents: dict[str, bytes | BaseException] = {}

        def read_remaining() -> bool:
            remaining = [file for file in files if _is_pending(contents.get(file.uri))]
            contents.update(zip((file.uri for file in remaining), read(fs, remaining), strict=True))
            return all(not _is_pending(contents[file.uri]) for file in remaining)

        with suppress(RetryError):  # the remaining images fail with their own errors
            patiently(retry=retry_if_result(operator.not_))(read_remaining)
        return {
            uri: content if isinstance(content, bytes) else self._explain(content)
            for uri, content in contents.items()
        }

    def _read(
        self, fs: AbstractFileSystem, files: Sequence[ListedFile]
    ) -> list[bytes | BaseException]:
        """Read from any file system, and look up each file's version afterwards."""

        def read(file: ListedFile) -> bytes | BaseException:
            try:
                path = fs._strip_protocol(file.uri)
                self._check_size(fs.size(path) if file.size is None else file.size)
                content = fs.cat_file(path)
                _check_version(file, len(content), version_tag(fs.info(path)) if file.tag else None)
                return content
            except Exception as error:  # goes into this image's row; the others go on
                return error

        with ThreadPoolExecutor(READING_THREADS) as pool:
            return list(pool.map(read, files))

    def _read_from_s3(
        self, fs: AsyncFileSystem, files: Sequence[ListedFile]
    ) -> list[bytes | BaseException]:
        """Read with one request per image, because S3 sends size and version with the content."""

        async def read(file: ListedFile) -> bytes:
            self._check_size(file.size)
            bucket, key, version = fs.split_path(file.uri)
            only = {"VersionId": version} if version else {}
            answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **only)
            size, tag = answer["ContentLength"], answer["ETag"].strip('"')
            try:
                self._check_size(size)
                _check_version(file, size, tag)
                return await answer["Body"].read()
            finally:
                answer["Body"].close()

        return _read_concurrently(fs, read, files)

    def _read_from_http(
        self, fs: AsyncFileSystem, files: Sequence[ListedFile]
    ) -> list[bytes | BaseException]:
        """Read with one request per image.

        fsspec would ask for the size first, and take any error there for a missing file.
        """

        async def read(file: ListedFile) -> bytes:
            self._check_size(file.size)
            session = await fs.set_session()
            async with session.get(fs.encode_url(file.uri), **fs.kwargs) as answer:
                if answer.status in (404, 410):
                    raise FileNotFoundError(file.uri)
                if answer.status in (401, 403, 407):
                    raise PermissionError(file.uri)
                answer.raise_for_status()
                self._check_size(answer.content_length)  # of the compressed content, if it is
                content = bytearray()
                async for chunk in answer.content.iter_chunked(HTTP_CHUNK):
                    content += chunk
                    self._check_size(len(content))
                _check_version(file, len(content), version_tag(answer.headers))
                return bytes(content)

        return _read_concurrently(fs, read, files)

    def _explain(self, error: BaseException) -> ImageError:
        redact = Secrets.of(self.storage_options).redact
        match error:
            case ImageError():
                return error
            case FileNotFoundError() if not is_transient(error):
                return ImageError("fetch", "not found")
            case PermissionError():
                return ImageError("fetch", "permission denied")
            case IsADirectoryError() | NotADirectoryError():
                return ImageError("fetch", "not a file")
            case _ if is_transient(error):
                detail = redact(f"tried for {patience():.0f} s: {error}")
                return ImageError("fetch", "the storage failed", detail)
            case Exception():
                return ImageError("fetch", type(error).__name__, redact(str(error)))
            case _:
                raise error

    def _check_size(self, size: int | None) -> None:
        if size is not None and size > self.max_bytes:
            limit = f"more than --max-image-bytes {self.max_bytes}"
            raise ImageError("fetch", "file too large", f"{size} bytes, {limit}")


def _read_concurrently(
    fs: AsyncFileSystem,
    read: Callable[[ListedFile], Awaitable[bytes]],
    files: Sequence[ListedFile],
) -> list[bytes | BaseException]:
    async def read_all() -> list[bytes | BaseException]:
        return await asyncio.gather(*map(read, files), return_exceptions=True)

    return fsspec.asyn.sync(fs.loop, read_all)


def _check_version(file: ListedFile, size: int, tag: str | None) -> None:
    if file.tag not in (None, tag):
        raise ImageError("fetch", "changed since it was listed", f"{file.tag} became {tag}")
    if file.size not in (None, size):
        raise ImageError("fetch", "changed since it was listed", f"{file.size} became {size} bytes")


def _scheme(file: ListedFile) -> str:
    return file.uri.partition("://")[0] if "://" in file.uri else ""


def _is_pending(content: bytes | BaseException | None) -> bool:
    return content is None or (isinstance(content, BaseException) and is_transient(content))


def is_unfetched(error: str | None) -> bool:
    """Whether an image failed only because its content couldn't be fetched.

    The store gave no answer, refused access, or answered with an error. Such an image is unfinished
    work: a job tries it again when it is continued.

    Args:
        error: the image's error or its cause; None if it didn't fail.
    """
    stage, _, cause = (error or "").partition(": ")
    return stage == "fetch" and not cause.startswith(_FINAL)
