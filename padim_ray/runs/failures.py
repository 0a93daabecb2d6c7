"""Count failed images, and stop the job when there are too many."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from padim_ray.errors import TooManyFailed
from padim_ray.images.limits import FORMATS
from padim_ray.runs.options.common import RunOptions

KNOWN_CAUSES = {
    "fetch": frozenset(
        {
            *("not found", "permission denied", "the storage failed", "file too large"),
            "changed since it was listed",
        }
    ),
    "decode": frozenset(
        {
            *("empty file", "too many pixels", "unreadable header", "broken image"),
            f"not a {', '.join(FORMATS)} image",
            *(
                "32-bit pixels, whose range nothing tells",
                "the decoder hung",
                "the decoder crashed",
            ),
        }
    ),
    "embed": frozenset({"NaN or infinite features"}),
}
"""Causes of failed images, by stage. Any other cause is reported as "other"."""
MAX_UNFETCHABLE = 1000  # if not one of so many images can be fetched, the storage is to blame


@dataclass
class Failures:
    """Counts of the images that a job has read, and of those that failed, by cause.

    `listed`: images of the job. `read`: images read so far. `causes`: failed images by stage and
    cause, without the error's details.
    """

    options: RunOptions
    listed: int
    read: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.causes.total()

    def add(self, read: int, causes: Mapping[str, int]) -> None:
        """Add a batch of `read` images, of which some failed.

        Raises:
            TooManyFailed: if more images failed than `--max-failed` allows, or if none of the first
                `MAX_UNFETCHABLE` images could be fetched.
        """
        self.read += read
        self.causes.update(causes)
        main = ", ".join(f"{cause}: {count}" for cause, count in self.causes.most_common(3))
        so_far = f"{self.count} of the {self.read} images read so far failed ({main})"
        if not self.options.allows(self.count, self.listed):
            raise TooManyFailed(
                f"{so_far}, more than --max-failed {self.options.max_failed:g}. Finished work is "
                "kept: remove the cause or raise --max-failed, then repeat the command to continue"
            )
        unfetched = sum(n for cause, n in self.causes.items() if cause.startswith("fetch: "))
        if self.options.max_failed is None and self.read == unfetched >= MAX_UNFETCHABLE:
            raise TooManyFailed(
                f"{so_far}: not one could be fetched. Remove the cause or set --max-failed, then "
                "repeat the command to continue"
            )


def count_causes(errors: Iterable[str | None]) -> dict[str, int]:
    """Count errors by stage and cause, without their details. None is no error."""
    return dict(Counter(error.partition(" (")[0] for error in errors if error))


def bounded_cause(cause: str) -> tuple[str, str]:
    """Split a cause into stage and known cause, or "other".

    Metrics use these as labels, whose number must stay small.
    """
    stage, _, short = cause.partition(": ")
    known = KNOWN_CAUSES.get(stage)
    if known is None:
        return "other", "other"
    return stage, short if short in known else "other"
