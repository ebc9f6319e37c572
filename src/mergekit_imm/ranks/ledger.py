"""What of an output is certain to be on the disk, whichever rank wrote it, and which bytes of it are this rank's.

Behind it: a journal for each rank, the share of each, segments that two ranks complete together, and a file by which a
rank that fails stops the others. One process alone is the case of a single rank.

OUT.partial/.imm_journal-N      The journal of rank N; rank 0 has the plain name.
OUT.partial/.imm_journal.stop   Exists once a rank has failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checkpoint.safetensors_file import TensorInfo
from ..common.messages import shown
from ..errors import OutputError
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.statistics import RECORD, Record
from ..output.journal import ENTRY, JOURNAL, Entries, Journal, head_of
from ..plan.plan import Plan, Segment, segments
from .ranks import Ranks

ALIGNED = 1 << 20
STOP = f"{JOURNAL}.stop"


def begin(folder: Path, recipe: bytes, count: int, ranks: Ranks) -> Entries:
    """Begin or reopen the journals of an output of `count` segments, on rank 0; return what earlier runs finished."""
    (folder / STOP).unlink(missing_ok=True)
    with closing(Journal(folder / JOURNAL, recipe, count)) as own:
        entries = np.concatenate([own.entries, _take_in(folder, own, recipe, count)])
    for rank in range(1, ranks.size):
        Journal(journal_of(folder, rank), recipe, count).close()
    return entries


class Ledger:
    """The segments of one output: which are certain to be on the disk, with their statistics."""

    def __init__(self, folder: Path, recipe: bytes, count: int, finished: Entries, ranks: Ranks) -> None:
        """Open this rank's journal. `finished` is what `begin` returned on rank 0."""
        self._folder, self._recipe, self._several = folder, recipe, ranks.size > 1
        self._journal = Journal(journal_of(folder, ranks.rank), recipe, count)
        self.finished = np.zeros(count, bool)
        self.records = np.zeros((count, RECORD))
        self._written: list[int] = []  # not synced yet
        self._halves: list[int] = []  # another rank writes the rest
        self._enter(finished)

    def _enter(self, entries: Entries) -> None:
        self.finished[entries["segment"]] = True
        self.records[entries["segment"]] = entries["record"]

    def _entries(self, indices: Sequence[int]) -> Entries:
        entries = np.zeros(len(indices), ENTRY)
        entries["segment"], entries["record"] = indices, self.records[indices]
        return entries

    def note(self, segment: int, record: Record, *, whole: bool) -> None:
        """Note a segment that this rank has written, as a whole or in part."""
        self.records[segment] = record
        (self._written if whole else self._halves).append(segment)

    def commit(self) -> None:
        """Record the segments noted, after their bytes were synced."""
        if self._written:
            self._journal.append(self._entries(self._written))
            self.finished[self._written] = True
            self._written.clear()

    def halves(self) -> Entries:
        """Return the segments of which this rank wrote a part, for `settle`."""
        return self._entries(self._halves)

    def settle(self, halves: Sequence[Entries]) -> None:
        """Take in what all ranks wrote, on rank 0, after the last has committed. Raises OutputError if any is missing.

        `halves` are those of every rank: by now all their parts are on the disk.
        """
        shared = np.concatenate(halves)
        if len(shared):
            self._journal.append(shared)
            self._enter(shared)
        if self._several:
            self._enter(_take_in(self._folder, self._journal, self._recipe, len(self.finished)))
        lost = int(np.count_nonzero(~self.finished))
        if lost:
            raise OutputError(
                f"{lost} of the {len(self.finished)} pieces of {shown(self._folder)} are in no rank's journal; run the"
                " same command again to write them"
            )

    def stop_others(self) -> None:
        """Make the other ranks stop, as this one has failed."""
        if self._several:
            with suppress(OSError):
                (self._folder / STOP).touch()

    def is_stopped(self) -> bool:
        """Whether another rank has failed."""
        return self._several and (self._folder / STOP).exists()

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def journal_of(folder: Path, rank: int) -> Path:
    """Return the path of a rank's journal."""
    return folder / (f"{JOURNAL}-{rank}" if rank else JOURNAL)


def _take_in(folder: Path, own: Journal, recipe: bytes, count: int) -> Entries:
    """Move the entries of other ranks' journals in a folder into this one, and return them."""
    found = [np.empty(0, ENTRY)]
    others = sorted(path for path in folder.glob(f"{JOURNAL}-*") if path.suffix != ".new")
    for path in others:
        rank = path.name.removeprefix(f"{JOURNAL}-")
        if rank.isdecimal() and rank.isascii() and head_of(path) == head_of(own.path):
            other = Journal(path, recipe, count)
            found.append(other.entries[other.entries["segment"] < count])
            other.close()
    entries = np.concatenate(found)
    if len(entries):
        own.append(entries)
    for path in others:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    return entries


@dataclass(frozen=True)
class Share:
    """The bytes of an output that one rank writes: begin..end of all its files, laid end to end.

    Each file starts at a multiple of 1 MiB, and shares end at such, so no two ranks write to one block of the
    filesystem. Both ranks compute a segment that spans an end; each writes its own part.
    """

    plan: Plan
    starts: Mapping[str, int]  # where each file begins
    begin: int
    end: int

    def clip(self, tensor: TensorInfo, first: int, count: int) -> tuple[int, int]:
        """Return the range of bytes first..first+count of a tensor that is in the share, relative to `first`."""
        at = self.starts[tensor.file] + tensor.begin + first
        return min(max(self.begin - at, 0), count), min(max(self.end - at, 0), count)

    def held(self, segment: Segment) -> int:
        """Return how many of a segment's output bytes are in the share."""
        total = 0
        for out, first, count in _pieces(self.plan, segment):
            low, high = self.clip(out, first, count)
            total += high - low
        return total


def share_of(plan: Plan, ledgers: Sequence[Ledger], ranks: Ranks) -> Share:
    """Return this rank's share of outputs with one layout (a sweep); every rank has as much left to write."""
    starts, end = {}, 0
    for file in plan.files:
        starts[file.name] = end
        end += -(-file.size // ALIGNED) * ALIGNED
    cuts = [0, end]
    if ranks.size > 1:
        lacking = np.sum([~each.finished for each in ledgers], axis=0)
        cuts = [0, *_cuts(plan, starts, lacking, ranks.size), end]
    return Share(plan, starts, *list(pairwise(cuts))[ranks.rank])


def _cuts(plan: Plan, starts: Mapping[str, int], lacking: npt.NDArray[np.integer], size: int) -> list[int]:
    places, sizes = [], []
    for segment in segments(plan):
        out, first, count = next(_pieces(plan, segment))
        places.append(starts[out.file] + out.begin + first)
        sizes.append(count * len(plan.items[segment.item].outs) * int(lacking[segment.index]))
    if not places:
        return [0] * (size - 1)
    done = np.cumsum(sizes)
    goals = [int(done[-1]) * number // size for number in range(1, size)]
    return [places[at] // ALIGNED * ALIGNED for at in np.searchsorted(done, goals).tolist()]


def _pieces(plan: Plan, segment: Segment) -> Iterator[tuple[TensorInfo, int, int]]:
    """Yield where a segment is written: tensor, first byte in it, number of bytes."""
    item = plan.items[segment.item]
    for out in item.outs:
        width = 1 if item.raw else DTYPE_BITS[out.dtype] // 8
        yield out, segment.first * width, segment.count * width
