"""Turn a file system's exceptions into sentences for users."""

from collections.abc import Iterator
from contextlib import contextmanager

from padim_ray.errors import PadimError
from padim_ray.storage.retry import causes


@contextmanager
def explained(uri: str, action: str, only: type[Exception] = Exception) -> Iterator[None]:
    """Explain what a file system raises inside the block.

    Args:
        uri: the file or directory.
        action: what is done to it: "read", "write", "list" and so on.
        only: the exceptions to explain; others pass.

    Raises:
        FileNotFoundError: if the file is missing, unless it is written.
        FileExistsError: if the file must not exist yet, but does.
        PadimError: for other refusals, with their reason.
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
    """Whether a conditional write was refused. S3-compatible servers have several codes for it."""
    codes = {
        response.get("Error", {}).get("Code")
        for response in (getattr(e, "response", None) for e in causes(error))
        if isinstance(response, dict)
    }
    return bool(codes & {"PreconditionFailed", "412"}) or (
        isinstance(error, FileExistsError) and error.filename2 is not None  # os.link
    )


def _reason(uri: str, action: str, error: BaseException) -> str | None:
    """Why a file system refused, in words; None if the exception should pass as it is."""
    text = " ".join(str(error).split())
    names = {kind.__name__ for e in causes(error) for kind in type(e).__mro__}
    if "bucket does not exist" in text or "NoSuchBucket" in text:
        return "the bucket does not exist"
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        return "no credentials were found (set AWS_ACCESS_KEY_ID … or --storage-options)"
    if isinstance(error, FileNotFoundError) and action != "write":
        return None
    if isinstance(error, NotImplementedError):
        return "this kind of storage can only be read"
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
