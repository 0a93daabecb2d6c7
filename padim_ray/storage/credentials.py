"""The secrets that a job is given, kept out of what it logs and of the errors that leave it."""

import json
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, quote_plus

from padim_ray.errors import PadimError
from padim_ray.redaction import HIDDEN, redact

SHORTEST = 6  # characters: what is shorter would be found in any text
_OPTION = re.compile(
    r"key|secret|token|passw|pwd|passphrase|credential|connection_string|sas|auth|cookie",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCESS_KEY_ID|ACCOUNT_KEY|API_KEY|CONNECTION_STRING)$"
)


@dataclass(frozen=True)
class Secrets:
    """Values that nobody is to read."""

    values: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(
        cls, storage_options: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ
    ) -> "Secrets":
        """Find them by their names, in fsspec's options at any depth and in the environment."""
        found = [value for name, value in environment.items() if _VARIABLE.search(name)]
        found += _secret_values(storage_options or {}, is_secret=False)
        parts = [part for value in found for part in re.split(r"[\s;]|(?<=Key)=", value)]
        return cls(frozenset(value for value in found + parts if len(value) >= SHORTEST))

    def redact(self, text: str) -> str:
        """A text with *** for these values, however they are quoted, and for URIs' credentials."""
        return redact(self._pattern.sub(HIDDEN, text) if self.values else text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        spellings = {
            spelling
            for value in self.values
            for spelling in (
                *(value, quote(value), quote(value, safe=""), quote_plus(value)),
                *(json.dumps(value)[1:-1], repr(value)[1:-1]),
            )
        }
        # the longest first: one secret may be the beginning of another
        return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))


def _secret_values(value: Any, *, is_secret: bool) -> Iterator[str]:
    match value:
        case Mapping():
            for name, inner in value.items():
                yield from _secret_values(inner, is_secret=bool(_OPTION.search(str(name))))
        case list() | tuple():
            for inner in value:
                yield from _secret_values(inner, is_secret=is_secret)
        case str() if is_secret:
            yield value


class RedactingFilter(logging.Filter):
    """Keeps secrets out of log records: out of messages, arguments and tracebacks."""

    def __init__(self, secrets: Secrets | None = None) -> None:
        super().__init__()
        self.secrets = secrets or Secrets()

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record; none is held back."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that don't fit are logging's to complain about
            message = f"{record.msg} {record.args}"
        record.msg, record.args = self.secrets.redact(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if record.exc_text:
            record.exc_text = self.secrets.redact(record.exc_text)
        if record.stack_info:
            record.stack_info = self.secrets.redact(record.stack_info)
        return True


@contextmanager
def hidden_credentials(storage_options: Mapping[str, Any] | None) -> Iterator[None]:
    """Keep a job's secrets out of everything logged meanwhile, and out of errors that leave."""
    secrets = Secrets.of(storage_options)
    redacting = RedactingFilter(secrets)
    # a logger's filter doesn't see what others log; handlers of the caller's may come later
    places = [logging.getLogger("padim_ray"), *logging.getLogger().handlers]
    for place in places:
        place.addFilter(redacting)
    try:
        yield
    except PadimError as error:
        told = "".join(traceback.format_exception(error))
        if secrets.redact(told) == told:
            raise
        # the causes' own texts go, too: a traceback would print them
        raise type(error)(secrets.redact(str(error))) from None
    finally:
        for place in places:
            place.removeFilter(redacting)
