"""The errors that users see."""

from typing import Any

from padim_ray.redaction import redact


class PadimError(Exception):
    """A mistake of the user's. The message says what to do, and is shown without a traceback.

    Credentials in the message's URIs are redacted.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ModelError(PadimError):
    """A model can't be fitted, found, read or applied."""


class TooManyFailed(PadimError):
    """More images failed than `--max-failed` allows, or some couldn't be fetched.

    Finished work is kept.
    """


class NoImages(PadimError):
    """No image matches `--images`, or the manifest is empty."""


class ImageError(Exception):
    """One image can't be used.

    It never ends a job: the image becomes a row with `status = "failed"` and this error's text.

    Args:
        stage: where it failed: fetch, decode, mask or embed.
        cause: a fixed phrase, by which failures are counted.
        detail: what differs from image to image. Credentials in its URIs are redacted.
    """

    def __init__(self, stage: str, cause: str, detail: str = "") -> None:
        super().__init__(stage, cause, redact(detail))

    def __str__(self) -> str:
        stage, cause, detail = self.args
        return f"{stage}: {cause}" + (f" ({detail})" if detail else "")
