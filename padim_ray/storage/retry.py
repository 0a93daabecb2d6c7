"""Retry operations on object stores after transient failures.

tenacity does the waiting; this module says which failures are transient. botocore already retries
single S3 requests. The retries here come on top: they also cover truncated response bodies, outages
of more than a few seconds, and other stores.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

log = logging.getLogger("padim_ray")
PATIENCE = 120.0  # seconds in all, unless PADIM_RAY_RETRY_SECONDS is set
MAX_WAIT = 15.0  # seconds between two attempts
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {  # S3's; its status may be 200 or 409
    *("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "IncompleteBody"),
    *("Throttling", "ThrottlingException", "ConditionalRequestConflict", "OperationAborted"),
}
_TRANSIENT_KINDS = {  # of botocore, aiohttp, requests (gcsfs) and google.auth, azure, fsspec
    *("ConnectionError", "HTTPClientError", "ResponseStreamingError", "ResponseParserError"),
    *("ClientPayloadError", "ClientConnectionError"),
    *("RequestException", "TransportError"),
    *("ServiceRequestError", "ServiceResponseError"),
    *("FSTimeoutError", "IncompleteRead"),
}
T = TypeVar("T")


def with_retries(operation: Callable[[], T], what: str) -> T:
    """Call `operation`, and retry it after transient failures until patience ends.

    Args:
        operation: what to call.
        what: its description for the log, such as "read s3://bucket/x".

    Raises:
        Exception: the operation's last error, or its first one that is not transient.
    """

    def log_failure(state: RetryCallState) -> None:
        level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
        assert state.outcome is not None
        error = " ".join(str(state.outcome.exception()).split())
        log.log(level, "Can't %s at present (%s); trying again for %.0f s", what, error, patience())

    is_retried = retry_if_exception(is_transient)
    return patiently(retry=is_retried, before_sleep=log_failure, reraise=True)(operation)


def patiently(**settings: Any) -> Retrying:
    """tenacity's `Retrying` with exponential backoff and full jitter, until patience ends."""
    return Retrying(
        stop=stop_after_delay(patience()),
        wait=wait_random_exponential(multiplier=0.5, max=MAX_WAIT),
        **settings,
    )


def patience() -> float:
    """How long to retry, in seconds."""
    return float(os.environ.get("PADIM_RAY_RETRY_SECONDS", PATIENCE))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: not after a 403, a 404 or on a full disk."""
    return any(_is_transient(e) for e in causes(error))


def _is_transient(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return (
            status in _TRANSIENT_STATUSES
            or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
        )
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status in _TRANSIENT_STATUSES
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, TimeoutError | ConnectionError) or bool(kinds & _TRANSIENT_KINDS)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and the chain of exceptions that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
