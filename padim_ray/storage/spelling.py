"""One spelling for each file, so that a file that is listed twice is recognised.

Two URIs get the same spelling only if their file system reads the same file for both of them.
"""

import os

import yarl

ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs", "ssh": "sftp", "local": "file"}
"""fsspec's further names of a protocol, with the name that listings have."""
BUCKETS = ("s3", "gs", "abfs")
PLAIN = (
    r"(?s)^("
    r"(/[^/.][^/]*)+"
    r"|s3://[^/].*"
    r"|https?://[a-z0-9.-]+(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+(\?[^#]+)?"
    r")$"
)
"""A regular expression for most URIs that have their canonical spelling."""


def canonical_uri(uri: str) -> str:
    """The spelling of a path or URI that all URIs of the same file share.

    Local files get an absolute path. What may name another object stays different: on an object
    store `b//k`, `b/./k` and `b/%6B` are keys of their own, and so are versions (`?versionId=`).

    >>> canonical_uri("file://localhost/x/../y")
    '/y'
    >>> canonical_uri("s3a://bucket//key%20")
    's3://bucket//key%20'
    >>> canonical_uri("http://HOST:80/%7eann/./a%2fb?sig=%2f")
    'http://host/~ann/a%2Fb?sig=%2f'
    """
    scheme, separator, rest = uri.partition("://")
    scheme = ALIASES.get(scheme, scheme)
    if not separator or uri.startswith("/"):
        return _absolute(os.path.expanduser(uri))
    if scheme == "file":
        return _absolute(rest.removeprefix("localhost") if rest[:10] == "localhost/" else rest)
    if scheme in ("http", "https"):
        return _http_uri(uri)
    return f"{scheme}://{rest.lstrip('/') if scheme in BUCKETS else rest}"


def _absolute(path: str) -> str:
    return "/" + os.path.abspath(path).lstrip("/")  # which keeps two leading slashes


def _http_uri(uri: str) -> str:
    """An HTTP URI with host and path as aiohttp requests them, and its query untouched."""
    try:
        url = yarl.URL(uri)
    except ValueError:  # then it can't be requested either, and the image fails
        return uri
    if not url.host:
        return uri
    query = uri.partition("#")[0].partition("?")[2]
    return str(url.with_path(url.raw_path, encoded=True)) + (f"?{query}" if query else "")
