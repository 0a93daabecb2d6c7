"""Trying again what an object store refused or lost for a moment.

tenacity does the waiting; here is what is worth trying again. botocore (for S3) retries single
requests by itself; this is the layer above, which also covers bodies that end too early, outages
longer than a few seconds, and other stores.
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
PATIENCE = 120.0  # seconds; `PADIM_RAY_RETRY_SECONDS` is another number
LONGEST_WAIT = 15.0
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    # S3's, where a status alone doesn't tell
    *("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "IncompleteBody"),
    *("Throttling", "ThrottlingException", "ConditionalRequestConflict", "OperationAborted"),
}
_TRANSIENT_KINDS = {  # botocore, aiohttp, requests (gcsfs) and google.auth, azure, fsspec
    *("ConnectionError", "HTTPClientError", "ResponseStreamingError", "ResponseParserError"),
    *("ClientPayloadError", "ClientConnectionError"),
    *("RequestException", "TransportError"),
    *("ServiceRequestError", "ServiceResponseError"),
    *("FSTimeoutError", "IncompleteRead"),
}
T = TypeVar("T")


def with_retries(operation: Callable[[], T], what: str) -> T:
    """Do something with a store, again and again while it fails for passing reasons.

    Waits grow exponentially with full jitter, up to 15 s, for 2 minutes in all.

    Args:
        what: for the log, such as "read s3://bucket/x".
    """

    def tell(state: RetryCallState) -> None:
        level = logging.WARNING if state.attempt_number == 1 else logging.DEBUG
        assert state.outcome is not None
        error = " ".join(str(state.outcome.exception()).split())
        log.log(level, "Can't %s at present (%s); trying again for %.0f s", what, error, patience())

    again = retry_if_exception(is_transient)
    return patiently(retry=again, before_sleep=tell, reraise=True)(operation)


def patiently(**settings: Any) -> Retrying:
    """tenacity's retrying, with our waits and our patience."""
    return Retrying(
        stop=stop_after_delay(patience()),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT),
        **settings,
    )


def patience() -> float:
    """For how long to try, in seconds."""
    return float(os.environ.get("PADIM_RAY_RETRY_SECONDS", PATIENCE))


def is_transient(error: BaseException) -> bool:
    """Whether a store may well answer the same request later: not for 403, 404 or a full disk."""
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
    """An exception, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
