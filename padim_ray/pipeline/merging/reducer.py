"""The reducer: consumes partial sums, writes finished groups and commits rounds."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from padim_ray.densities import MIN_IMAGES
from padim_ray.errors import ModelError
from padim_ray.images.fetch import is_unfetched
from padim_ray.model.draft import DraftVersion
from padim_ray.model.model_json import GroupEntry
from padim_ray.model.rounds import PartialGroup, Round
from padim_ray.pipeline.merging.base import BaseVersions
from padim_ray.pipeline.merging.groups import (
    Writing,
    check_counts,
    copy_groups,
    load_unfinished,
    save_unfinished,
    start_writing,
)
from padim_ray.pipeline.merging.kept import KEPT, Kept, KeptEmbeddings
from padim_ray.pipeline.merging.tree import Merged, MergeTree
from padim_ray.planning.batches import groups_being_written
from padim_ray.planning.resources import Share
from padim_ray.runs.failures import Failures, count_causes
from padim_ray.storage.location import Location

log = logging.getLogger("padim_ray")
COPIED_PER_ROUND, REWRITTEN_PER_ROUND = 64, 16  # groups
MAX_SHOWN = 20  # images in an error message


@dataclass
class Reducer:
    """Merges partial sums group after group, and finishes a group when the next one begins.

    A finished group is fitted and written by tasks, a few groups at a time. After every
    `round_images` images it commits a round, from which a killed job continues.

    Attributes:
        draft: the version that is being written.
        share: resources of a merging task.
        listed: number of images per group.
        round_images: images after which a round is committed.
        count_failures: counts failed images, and stops the job when there are too many.
        base: versions that the images are added to, or subtracted from.
        on_commit: called after a round is committed, with the number of images that it added and
            the numbers of failed ones by cause.
        rows: number of the manifest's first rows that were added or failed.
        failures: errors of failed images by URI.
        unfetched: the failed images, in earlier attempts, that couldn't be fetched.
        entries: the finished groups.
        kept: embeddings by group.
        group: the unfinished group.
    """

    draft: DraftVersion
    share: Share
    listed: Mapping[str, int]
    round_images: int
    count_failures: Failures
    base: BaseVersions = field(default_factory=BaseVersions)
    on_commit: Callable[[int, Mapping[str, int]], None] = lambda images, causes: None
    rows: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    unfetched: list[str] = field(default_factory=list)
    entries: dict[str, GroupEntry] = field(default_factory=dict)
    kept: dict[str, list[Kept]] = field(default_factory=dict)
    group: str | None = None
    _tree: MergeTree = field(init=False)
    _round: Round = field(init=False)
    _writing: deque[Writing] = field(default_factory=deque)
    _uncommitted: dict[str, str | None] = field(default_factory=dict)
    _uncommitted_images: int = 0
    _again: Iterator[str] | None = None
    _group_rows: int = 0
    _group_failed: int = 0
    _group_has_base: bool = False
    _first_failure: str | None = None

    def __post_init__(self) -> None:
        """Restore the state of the last round that was committed."""
        density = self.draft.spec.density
        self._tree = MergeTree(density, self.share)
        self._round = Round.latest(self.draft.location, self.draft.root)
        self.rows, self.entries = self._round.rows, dict(self._round.groups)
        self.failures = self._round.read_failures(self.draft.location, self.draft.root)
        self.unfetched = [uri for uri, error in self.failures.items() if is_unfetched(error)]
        final = (error for error in self.failures.values() if not is_unfetched(error))
        self.count_failures.add(self.rows - len(self.unfetched), count_causes(final))
        partial = self._round.partial
        if partial is None:
            return
        self.group, self._group_failed = partial.group, partial.failed
        self._group_rows = partial.images + partial.failed
        self._group_has_base = partial.has_base
        for shard in range(self.draft.shards if partial.images else 0):
            file = self._unfinished_file(self._round, shard)
            self._tree.add_merged(
                (partial.group, shard), load_unfinished(self.draft, shard, file, self.share)
            )

    def try_again(self, uris: Iterable[str] | None) -> None:
        """Say which images the next blocks are of.

        Args:
            uris: images in `unfetched`, in the blocks' order. None: the manifest's next images.
        """
        self._again = None if uris is None else iter(uris)

    def add(self, block: ray.ObjectRef) -> None:
        """Add a block of partial sums.

        Raises:
            ModelError: if images that are to be subtracted couldn't be read, or if the group before
                can't be fitted.
            TooManyFailed: as soon as more images failed than --max-failed allows.
        """
        describe: Any = _describe_task.options(**self.share.options, num_returns=2)
        described, kept = describe.remote(block)
        index = 0
        for row, partial in enumerate(ray.get(described)):
            if partial["shard"] == KEPT:
                refs = self.kept.setdefault(partial["group"], [])
                refs.append(Kept(kept, index, partial["count"]))
                index += 1
                continue
            if partial["shard"] == 0:  # the first row of a partial sum
                self._begin(partial)
            if partial["count"]:
                self._tree.add((partial["group"], partial["shard"]), block, row)

    def _begin(self, partial: Mapping[str, Any]) -> None:
        """Count a partial sum's images; first finish the group before, and commit a full round."""
        if partial["group"] != self.group:
            self._finish_group(self.share)
            if self._again is not None:
                self._reopen(partial["group"])
            elif partial["group"] in {*self.entries, *(each.group for each in self._writing)}:
                raise RuntimeError(
                    f"partial sums of group {partial['group']!r} came after the next group's"
                )
        if self._uncommitted_images >= self.round_images:
            self.commit()
        self.group = partial["group"]
        failures = partial["failures"]
        if failures and self.base.subtract:
            shown = "; ".join(
                f"{uri}: {error}" for uri, error in list(failures.items())[:MAX_SHOWN]
            )
            raise ModelError(
                f"{len(failures)} images can't be taken out of the model, because they can't be "
                f"read or have changed: {shown}{'; …' * (len(failures) > MAX_SHOWN)}"
            )
        images = partial["count"] + len(failures)
        self._uncommitted_images += images
        if self._again is None:
            self.rows += images
            self._group_rows += images
            self._group_failed += len(failures)
        else:  # these images were counted as failed ones
            fetched = [uri for uri in islice(self._again, images) if uri not in failures]
            self._group_failed -= len(fetched)
            self._uncommitted |= dict.fromkeys(fetched)
            for uri in fetched:
                del self.failures[uri]
        self._first_failure = self._first_failure or next(iter(failures.values()), None)
        self._uncommitted |= failures
        self.failures |= failures
        self.count_failures.add(images, count_causes(failures.values()))

    def _reopen(self, group: str) -> None:
        """Make a finished group the unfinished one again, all of whose images were counted."""
        self._await_written()
        self.group, self._group_rows = group, self.listed[group]
        entry = self.entries.pop(group, None)
        if entry is None:  # a group of the base to which no image could be added
            self._group_failed, self._group_has_base = self._group_rows, False
            return
        self._group_failed, self._group_has_base = entry.failed, bool(self.base.images(group))
        for shard in range(self.draft.shards):
            file = self.draft.statistics_file(group, shard)
            self._tree.add_merged(
                (group, shard), load_unfinished(self.draft, shard, file, self.share)
            )
        self.commit()  # a copy of these files, which `finish` replaces

    def commit(self) -> None:
        """Commit a round of everything that was added."""
        self._await_written()
        partial = None
        number = self._round.number + 1
        if self.group is not None:
            images = self._group_rows - self._group_failed
            partial = PartialGroup(self.group, images, self._group_failed, self._group_has_base)
        following = Round(number, self.rows, dict(self.entries), partial)
        if partial and partial.images:
            merged = self._tree.finish(partial.group, self.share)
            count = partial.images
            if partial.has_base:
                count += self.base.images(partial.group)
            check_counts(partial.group, merged, count, self.draft.shards)
            saved = []
            for shard, part in merged.items():
                file = self._unfinished_file(following, shard)
                saved.append(save_unfinished(self.draft.spec.density, part, file, self.share))
                self._tree.add_merged((partial.group, shard), part.source)
            ray.get(saved)
        following.commit(self.draft.location, self._uncommitted)
        causes = count_causes(self._uncommitted.values())
        self.on_commit(self._uncommitted_images - sum(causes.values()), causes)
        self._round, self._uncommitted, self._uncommitted_images = following, {}, 0
        log.info(
            "Round %d committed: %d images added or failed, groups finished: %d",
            *(number, self.rows, len(self.entries)),
        )

    def _unfinished_file(self, round_: Round, shard: int) -> Location:
        kind, shards = self.draft.spec.density.statistics_kind, self.draft.shards
        return round_.statistics_file(self.draft.location, kind, shard, shards)

    def finish(self, share: Share) -> None:
        """Merge, fit and write the current group, by tasks that ask for `share`.

        Raises:
            ModelError: if a group has too few readable images, or can't be fitted.
            TooManyFailed: if it has too few because images couldn't be fetched.
            RuntimeError: if an image is missing or counted twice.
        """
        self._finish_group(share)
        self._await_written()

    def _finish_group(self, share: Share) -> None:
        """As `finish`, but don't wait until the last few groups are written."""
        if self.group is None:
            return
        if self._group_rows != self.listed[self.group]:
            raise RuntimeError(
                f"{self._group_rows} of {self.listed[self.group]} images of group "
                f"{self.group!r} were read"
            )
        read, before = self._group_rows - self._group_failed, self.base.images(self.group)
        if read or not before:  # otherwise all new images failed, and the group doesn't change
            count = before + (-read if self.base.subtract else read)
            if count < MIN_IMAGES:
                self.count_failures.check_fetched()
            check_count(self.group, count, self._first_failure)
            merged = self._tree.finish(self.group, share)
            self._write(self.group, merged, count, self._group_failed, share)
        self.group, self._first_failure = None, None
        self._group_rows = self._group_failed = 0
        self._group_has_base = False

    def finish_base(self, share: Share) -> None:
        """Write the base's groups that are copied, or rewritten without a change of images.

        Every few groups a round is committed.
        """
        holders = {
            group: holder
            for group in self.base.copied
            if group not in self.entries
            for holder in self.base.holders(group)
        }
        while holders:
            some = dict(islice(holders.items(), COPIED_PER_ROUND))
            self.entries |= copy_groups(some, self.draft, share)
            holders = {group: each for group, each in holders.items() if group not in some}
            self.commit()
        left = [group for group in self.base.rewritten if group not in self.entries]
        for number, group in enumerate(left, 1):
            self._write(group, {}, self.base.images(group), 0, share)
            if number % REWRITTEN_PER_ROUND == 0:
                self.commit()

    def _write(
        self, group: str, merged: Mapping[int, Merged], count: int, failed: int, share: Share
    ) -> None:
        """Write a group, combined with its statistics in the base."""
        if self.base.images(group) and not self._group_has_base:
            density, shards = self.draft.spec.density, self.draft.shards
            merged = self.base.combine(density, group, merged, shards, share)
        entry = GroupEntry(count, failed, self.draft.shards)
        self._writing.append(start_writing(group, merged, entry, self.draft, share))
        self._await_written(groups_being_written(self.draft.spec))

    def _await_written(self, most: int = 0) -> None:
        """Wait until at most this many groups are being written."""
        while len(self._writing) > most:
            written = self._writing.popleft()
            written.finish(self.draft)
            self.entries[written.group] = written.entry


def check_count(group: str, count: int, failure: str | None = None) -> None:
    """Raises: ModelError if a group has too few readable images to be fitted."""
    if count < MIN_IMAGES:
        cause = f" (the first failure: {failure})" if failure else ""
        raise ModelError(
            f"Group {group!r} has {count} readable image{'s' * (count != 1)}, and a fit "
            f"needs at least {MIN_IMAGES}{cause}"
        )


@ray.remote(max_retries=-1)
def _describe_task(block: pa.Table) -> tuple[list[dict[str, Any]], list[KeptEmbeddings]]:
    """Read a block's rows without their tensors, and copy the embeddings in it.

    So that they can stay in the object store without the partial sums.
    """
    rows = block.drop_columns(["state", "names", "uris"]).to_pylist()
    kept = [
        KeptEmbeddings.of_row(block.slice(row, 1))
        for row, each in enumerate(rows)
        if each["shard"] == KEPT
    ]
    return [row | {"failures": dict(row["failures"])} for row in rows], kept
