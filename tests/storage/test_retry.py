import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from padim_ray.storage import retry
from padim_ray.storage.retry import is_transient, with_retries


def refusal(status, code="Any"):
    """The exception that s3fs raises for a response from S3."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, "GetObject"))


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(status) for status in (429, 500, 502, 503, 504)),
        refusal(200, "SlowDown"),
        refusal(200, "InternalError"),  # S3 may send the status before it fails
        refusal(409, "ConditionalRequestConflict"),
        ConnectionResetError(),
        TimeoutError(),
        EndpointConnectionError(endpoint_url="http://x"),
        ReadTimeoutError(endpoint_url="http://x"),
        aiohttp.ClientPayloadError(),
        aiohttp.ServerDisconnectedError(),
    ],
)
def test_transient_failures_are_retried(error, monkeypatch):
    assert is_transient(error)
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)
    failures = [error, error]

    def fail_twice():
        if failures:
            raise failures.pop()
        return "done"

    assert with_retries(fail_twice, "read x") == "done"


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(status) for status in (400, 401, 403, 404, 409, 412)),
        refusal(403, "AccessDenied"),
        FileNotFoundError(),
        PermissionError(),
        OSError(28, "No space left on device"),
        ValueError(),
    ],
)
def test_other_failures_are_not_retried(error):
    assert not is_transient(error)
    calls = []

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(fail, "read x")
    assert len(calls) == 1


def test_patience_ends(monkeypatch, caplog):
    monkeypatch.setenv("PADIM_RAY_RETRY_SECONDS", "0.2")
    calls = []

    def fail():
        calls.append(1)
        raise ConnectionResetError("cut")

    with pytest.raises(ConnectionResetError):
        with_retries(fail, "read x")
    assert len(calls) > 1
    assert "Can't read x at present (cut); trying again" in caplog.text
