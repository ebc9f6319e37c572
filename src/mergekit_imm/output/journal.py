"""The journal of a merge under way: which segments are on the disk, as far as it is certain.

OUT.partial/.imm_journal     first line: the recipe; then batches of finished segments, each recorded only after
                             its bytes were synced. Removed when the folder is whole.
OUT.partial/.imm_journal-N   the same, of rank N where several write one folder; whoever goes on takes them in.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .direct_io import replace_file, sync, sync_folder

JOURNAL = ".imm_journal"
VERSION = 2  # of what is recorded of a segment, too
# One finished segment: its index, and its record of the statistics (zeros for a copied one).
ENTRY = np.dtype([("segment", "<u8"), ("record", "<f8", 5)])
Entries = npt.NDArray[Any]


class Journal:
    """Which segments are on disk, as far as it is certain."""

    def __init__(self, folder: Path, recipe: bytes, segments: int, rank: int = 0) -> None:
        """Begin a new journal for a recipe cut into so many segments, or take up the one that is there."""
        self.path = folder / name_of(rank)
        self.entries: Entries = np.empty(0, ENTRY)
        head = json.dumps({"version": VERSION, "segments": segments, "recipe": json.loads(recipe)}).encode() + b"\n"
        if self.path.exists():
            good = self._load()
            self._file = self._open()
            self._file.truncate(good)
            self._file.seek(good)
        else:
            replace_file(self.path, head)
            self._file = self._open()
            self._file.seek(0, os.SEEK_END)

    def _open(self) -> FileIO:
        # Without a buffer: what a full disk refused would be written again, and refused again, when the file is closed.
        return self.path.open("r+b", buffering=0)

    def _load(self) -> int:
        content = self.path.read_bytes()
        good = content.index(b"\n") + 1
        batches = []
        while good + 8 <= len(content):
            count, check = np.frombuffer(content, "<u4", 2, good)
            end = good + 8 + int(count) * ENTRY.itemsize
            if end > len(content) or zlib.crc32(content[good + 8 : end]) != check:
                break  # cut off while it was written; what it would have said is done again
            batches.append(np.frombuffer(content, ENTRY, int(count), good + 8))
            good = end
        if batches:
            self.entries = np.concatenate(batches)
        return good

    def append(self, entries: Entries) -> None:
        """Record segments whose bytes have been synced."""
        payload = entries.tobytes()
        rest = memoryview(np.array([len(entries), zlib.crc32(payload)], "<u4").tobytes() + payload)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]
        sync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays. All that counts was synced before, so nothing can be wrong any more."""
        with suppress(OSError):
            self._file.close()


def name_of(rank: int) -> str:
    """Return the name of a rank's journal."""
    return f"{JOURNAL}-{rank}" if rank else JOURNAL


def take_in(folder: Path, journal: Journal, recipe: bytes, segments: int) -> Entries:
    """Record what other ranks' journals in a folder say in this one, and remove them; returns what they said."""
    found = [np.empty(0, ENTRY)]
    others = sorted(path for path in folder.glob(f"{JOURNAL}-*") if path.suffix != ".new")
    for path in others:
        rank = path.name.removeprefix(f"{JOURNAL}-")
        if rank.isdecimal() and rank.isascii() and _head(folder, path.name) == _head(folder):
            other = Journal(folder, recipe, segments, int(rank))
            found.append(other.entries[other.entries["segment"] < segments])
            other.close()
    entries = np.concatenate(found)
    if len(entries):
        journal.append(entries)
    for path in others:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    return entries


def unfinished(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of the merge that a folder was being built for; None if it is no such folder."""
    recipe = _head(folder).get("recipe")
    return recipe if isinstance(recipe, dict) else None


def journal_format(folder: Path) -> tuple[Any, Any]:
    """Return the version of the journal in a folder, and into how many segments its merge was cut."""
    head = _head(folder)
    return head.get("version"), head.get("segments")


def has_records(folder: Path) -> bool:
    """Whether a journal in a folder holds more than its first line."""
    for name in (JOURNAL, *(path.name for path in folder.glob(f"{JOURNAL}-*"))):
        if _head(folder, name):
            with (folder / name).open("rb") as file:
                file.readline()
                if file.read(1):
                    return True
    return False


def _head(folder: Path, name: str = JOURNAL) -> dict[str, Any]:
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            return {}
        with path.open("rb") as file:
            line = file.readline()
        head = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def empty(folder: Path) -> None:
    """Remove everything in a folder, the journal last: cut off between, it is still known for what it is."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()
    sync_folder(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
