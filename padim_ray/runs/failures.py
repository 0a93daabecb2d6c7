"""Count failed images, and stop the job when there are too many."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from padim_ray.errors import TooManyFailed
from padim_ray.images.fetch import is_unfetched
from padim_ray.images.limits import FORMATS
from padim_ray.runs.options.common import RunOptions

KNOWN_CAUSES = {
    "fetch": frozenset(
        {
            *("not found", "permission denied", "the storage failed", "file too large"),
            *("not a file", "changed since it was listed"),
        }
    ),
    "decode": frozenset(
        {
            *("empty file", "too many pixels", "unreadable header", "broken image"),
            f"not a {', '.join(FORMATS)} image",
            *(
                "32-bit pixels, whose range nothing tells",
                "pixels that are not numbers",
                "the decoder hung",
                "the decoder crashed",
                "too much memory",
            ),
        }
    ),
    "embed": frozenset({"NaN or infinite features"}),
}
"""Causes of failed images, by stage. Any other cause is reported as "other"."""
MAX_UNFETCHABLE = 1000  # if so many images in a row can't be fetched, the storage is to blame


@dataclass
class Failures:
    """Counts of the images that a job has read, and of those that failed, by cause.

    Attributes:
        options: of the job.
        listed: number of images of the job.
        read: number of images read so far.
        causes: number of failed images by stage and cause, without the error's details.
        unfetched_in_a_row: number of the last images read, none of which could be fetched.
        unfetched_masks: number of an evaluation's masks that couldn't be fetched.
    """

    options: RunOptions
    listed: int
    read: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    unfetched_in_a_row: int = 0
    unfetched_masks: int = 0

    @property
    def count(self) -> int:
        return self.causes.total()

    @property
    def unfetched(self) -> int:
        """Number of images that failed only because they couldn't be fetched."""
        return _count(self.causes, is_unfetched)

    def add(self, read: int, causes: Mapping[str, int]) -> None:
        """Add a batch of `read` images, of which some failed.

        Raises:
            TooManyFailed: if more images failed than `--max-failed` allows; or, where it isn't
                given, if none of the first or of the last `MAX_UNFETCHABLE` could be fetched.
        """
        self.read += read
        self.causes.update(causes)
        all_unfetched = read == _count(causes, is_unfetched)
        self.unfetched_in_a_row = self.unfetched_in_a_row + read if all_unfetched else 0
        options, unreadable = self.options, self.count - self.unfetched
        counted = unreadable if options.max_failed is None else self.count
        if not options.allows(counted, self.listed):
            raise TooManyFailed(
                f"{self._describe()}, more than {options.describe_max_failed()}. Finished work is "
                "kept: remove the cause or raise --max-failed, then repeat the command to continue"
            )
        if options.max_failed is not None:
            return
        fetches = _count(self.causes, lambda cause: cause.startswith("fetch: "))
        none_at_all = self.read == fetches >= MAX_UNFETCHABLE
        if none_at_all or self.unfetched_in_a_row >= MAX_UNFETCHABLE:
            which = "one" if none_at_all else f"one of the last {self.unfetched_in_a_row}"
            raise TooManyFailed(
                f"{self._describe()}: not {which} could be fetched. Remove the cause or set "
                "--max-failed, then repeat the command to continue"
            )

    @property
    def is_complete(self) -> bool:
        """Whether a job that has read all images is complete: it has fetched them.

        With --max-failed some may be missing.
        """
        unfetched = self.unfetched or self.unfetched_masks
        return not unfetched or self.options.max_failed is not None

    def check_fetched(self) -> None:
        """Raises: TooManyFailed if a job that has read all images isn't complete."""
        if self.is_complete:
            return
        missing = []
        if self.unfetched:
            of_all = f"{self.unfetched} of {self.listed} images"
            missing.append(f"{of_all} ({self._main(is_unfetched)})")
        if self.unfetched_masks:
            missing.append(f"{self.unfetched_masks} mask{'s' * (self.unfetched_masks != 1)}")
        raise TooManyFailed(
            f"{' and '.join(missing)} could not be fetched, so the job is not complete. What is "
            "done is kept: repeat the command to try them again, or go without them by "
            f"--max-failed {max(1, self.count)}"
        )

    def _describe(self) -> str:
        return f"{self.count} of the {self.read} images read so far failed ({self._main()})"

    def _main(self, matches: Callable[[str], bool] = bool) -> str:
        """The most frequent causes, in words."""
        frequent = ((c, n) for c, n in self.causes.most_common() if n and matches(c))
        return ", ".join(f"{cause}: {count}" for cause, count in islice(frequent, 3))


def _count(causes: Mapping[str, int], matches: Callable[[str], bool]) -> int:
    return sum(count for cause, count in causes.items() if matches(cause))


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
