"""Keep a job's secrets out of its logs and errors."""

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

MIN_LENGTH = 6  # characters; shorter values occur in any text
_OPTION = re.compile(
    r"key|secret|token|passw|pwd|passphrase|credential|connection_string|sas|auth|cookie",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCESS_KEY_ID|ACCOUNT_KEY|API_KEY|CONNECTION_STRING)$"
)


@dataclass(frozen=True)
class Secrets:
    """Values of credentials, which must not appear in any output."""

    values: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(
        cls, storage_options: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ
    ) -> "Secrets":
        """Collect secrets by name.

        Args:
            storage_options: fsspec's options, nested to any depth.
            environment: variables such as AWS_SECRET_ACCESS_KEY.
        """
        found = [value for name, value in environment.items() if _VARIABLE.search(name)]
        found += _secret_values(storage_options or {}, is_secret=False)
        # "Bearer TOKEN" and "AccountName=x;AccountKey=SECRET" have a secret inside
        parts = [part for value in found for part in re.split(r"[\s;]|(?<=Key)=", value)]
        return cls(frozenset(value for value in found + parts if len(value) >= MIN_LENGTH))

    def redact(self, text: str) -> str:
        """Replace these values, however they are quoted, and credentials in URIs by ***."""
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
        # longest first, because one secret may be a prefix of another
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
    """Redacts the messages, arguments and tracebacks of log records."""

    def __init__(self, secrets: Secrets | None = None) -> None:
        super().__init__()
        self.secrets = secrets or Secrets()

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record in place. Always true: no record is dropped."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the arguments don't fit the message
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
    """Redact a job's secrets in all log records and in errors raised inside the block.

    Raises:
        PadimError: raised inside the block. If its text or its causes' texts hold a secret, it is
            replaced by a redacted one without causes.
    """
    secrets = Secrets.of(storage_options)
    redacting = RedactingFilter(secrets)
    # a logger's filter sees only records logged there, so libraries' records need the handlers'
    filtered = [logging.getLogger("padim_ray"), *logging.getLogger().handlers]
    for place in filtered:
        place.addFilter(redacting)
    try:
        yield
    except PadimError as error:
        printed = "".join(traceback.format_exception(error))
        if secrets.redact(printed) == printed:
            raise
        # without the causes, whose texts a traceback would print
        raise type(error)(secrets.redact(str(error))) from None
    finally:
        for place in filtered:
            place.removeFilter(redacting)
