"""The errors that users see."""

from typing import Any

from padim_ray.redaction import redact


class PadimError(Exception):
    """A mistake of the user's, in a sentence that says what to do; shown without a traceback.

    Without the credentials that URIs in it hold.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ModelError(PadimError):
    """A model that can't be fitted, found, read or applied."""


class TooManyFailed(PadimError):
    """More images failed than `--max-failed` allows; what was done until then is kept."""


class ImageError(Exception):
    """One unusable image: `stage` (fetch, decode or embed), `cause` (a fixed phrase) and detail.

    Never ends a job: the image becomes a row with `status = "failed"` and this text as its error.
    """

    def __init__(self, stage: str, cause: str, detail: str = "") -> None:
        super().__init__(stage, cause, redact(detail))

    def __str__(self) -> str:
        stage, cause, detail = self.args
        return f"{stage}: {cause}" + (f" ({detail})" if detail else "")
