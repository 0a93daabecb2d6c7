"""Counting images that fail, and when there are too many to go on."""

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
"""What images fail of, by stage; whatever else a library may say is "other"."""
HOPELESS = 1000  # images: if none of so many can be fetched, something else is wrong


@dataclass
class Failures:
    """How many images failed so far, and of what: `causes` without their details."""

    options: RunOptions
    listed: int
    read: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.causes.total()

    def add(self, read: int, causes: Mapping[str, int]) -> None:
        """Count images that were read, and those of them that failed.

        Raises:
            TooManyFailed: if there are more than `--max-failed`, or not one image can be fetched.
        """
        self.read += read
        self.causes.update(causes)
        main = ", ".join(f"{cause}: {count}" for cause, count in self.causes.most_common(3))
        so_far = f"{self.count} of the {self.read} images read so far failed ({main})"
        if not self.options.allows(self.count, self.listed):
            raise TooManyFailed(
                f"{so_far}, more than --max-failed {self.options.max_failed:g}; what was done is "
                "kept. Repeat the command to go on, with a higher --max-failed or the cause removed"
            )
        fetching = sum(n for cause, n in self.causes.items() if cause.startswith("fetch: "))
        if self.options.max_failed is None and self.read == fetching >= HOPELESS:
            raise TooManyFailed(
                f"{so_far}: not one could be fetched. Repeat the command to go on, with the cause "
                "removed or with a --max-failed that allows it"
            )


def count_causes(errors: Iterable[str | None]) -> dict[str, int]:
    """Numbers of errors by stage and cause, without the details; None is no error."""
    return dict(Counter(error.partition(" (")[0] for error in errors if error))


def bounded_cause(cause: str) -> tuple[str, str]:
    """Stage and cause, of a bounded number: for metrics, which a library's words would swamp."""
    stage, _, short = cause.partition(": ")
    known = KNOWN_CAUSES.get(stage)
    if known is None:
        return "other", "other"
    return stage, short if short in known else "other"
