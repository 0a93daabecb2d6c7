"""Storage options: fsspec's, either for all stores or for each protocol."""

import json
from collections.abc import Mapping
from typing import Any

import fsspec

from padim_ray.errors import PadimError
from padim_ray.storage.spelling import ALIASES

HTTP = ("http", "https")
_HTTP_ONLY = frozenset({"headers", "cookies", "auth", "proxy", "ssl", "params", "encoded"})
"""Options of HTTP requests, which no object store has."""


def options_of(scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one protocol.

    Args:
        scheme: the protocol, in its canonical spelling.
        options: a mapping of protocols to their options; or options without a protocol, which go to
            every protocol but http and https. Web servers must not get an object store's options.

    Raises:
        PadimError: if options with and without a protocol are mixed, if a protocol's options are no
            mapping, or if options without a protocol are meant for http.
    """
    named = [name for name in options if name in fsspec.available_protocols()]
    others = [name for name in options if name not in named]
    if named and others:
        raise PadimError(
            f"--storage-options has options of a protocol ({named[0]}) beside options of none "
            f"({others[0]}): put each under the name of its protocol, as in "
            f"{_example('s3', others[0])}"
        )
    for name in named:
        if not isinstance(options[name], Mapping):
            raise PadimError(f"--storage-options must map names to values for {name}")
    if named:
        chosen = (options[name] for name in named if ALIASES.get(name, name) == scheme)
        return {name: value for own in chosen for name, value in own.items()}
    if scheme not in HTTP:
        return dict(options)
    if misplaced := _HTTP_ONLY & {*options, *(options.get("client_kwargs") or ())}:
        name = min(misplaced)
        raise PadimError(
            f"--storage-options has {name} without a protocol, which {scheme} doesn't get: put it "
            f"under the protocol's name, as in {_example(scheme, name)}"
        )
    return {}


def _example(scheme: str, name: str) -> str:
    return json.dumps({scheme: {name: "…"}}, ensure_ascii=False)
