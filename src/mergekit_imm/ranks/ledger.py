"""Which segments of an output are safely on the disk, whichever rank wrote them.

Behind it: a journal for each rank, segments that two ranks complete together, and a file by which a rank that fails
stops the others. One process alone is the case of a single rank.

OUT.partial/.imm_journal-N      The journal of rank N; rank 0 has the plain name.
OUT.partial/.imm_journal.stop   Exists once a rank has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from ..common.messages import shown
from ..errors import OutputError
from ..numerics.statistics import RECORD, Record
from ..output.journal import ENTRY, JOURNAL, Entries, Journal, head_of
from .ranks import Ranks

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
        self._folder, self._recipe, self._several, self._leads = folder, recipe, ranks.size > 1, not ranks.rank
        self._journal = Journal(journal_of(folder, ranks.rank), recipe, count)
        self.finished = np.zeros(count, bool)
        self.records = np.zeros((count, RECORD))
        self._written: list[int] = []  # not synced yet
        self._parts: list[int] = []  # segments of which another rank writes the rest
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
        (self._written if whole else self._parts).append(segment)

    def commit(self) -> None:
        """Record the segments noted, after their bytes were synced."""
        if self._written:
            self._journal.append(self._entries(self._written))
            self.finished[self._written] = True
            self._written.clear()

    def hand_over(self) -> Entries:
        """Return the segments of which this rank wrote a part, for `settle`. Other ranks than 0 close their journal."""
        if not self._leads:
            self.close()
        return self._entries(self._parts)

    def settle(self, parts: Sequence[Entries]) -> None:
        """Take in what all ranks wrote, on rank 0, after the last has committed. Raises OutputError if any is missing.

        `parts` is what every rank handed over: by now all parts of a segment are on the disk.
        """
        shared = np.concatenate(parts)
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
            found.append(other.entries)
            other.close()
    entries = np.concatenate(found)
    if len(entries):
        own.append(entries)
    for path in others:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    return entries
