"""The journal of a merge under way: which segments are on the disk, as far as it is certain.

OUT.partial/.imm_journal   first line: the recipe; then batches of finished segments, each recorded only after
                           its bytes were synced. Removed when the folder is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .disk import sync, sync_folder

JOURNAL = ".imm_journal"
VERSION = 2  # of what is recorded of a segment, too
# One finished segment: its index, and its record of the statistics (zeros for a copied one).
ENTRY = np.dtype([("segment", "<u8"), ("record", "<f8", 5)])
Entries = npt.NDArray[Any]


class Journal:
    """Which segments are on disk, as far as it is certain."""

    def __init__(self, folder: Path, recipe: bytes, segments: int) -> None:
        """Begin a new journal for a recipe cut into so many segments, or take up the one that is there."""
        self.path = folder / JOURNAL
        self.entries: Entries = np.empty(0, ENTRY)
        head = json.dumps({"version": VERSION, "segments": segments, "recipe": json.loads(recipe)}).encode() + b"\n"
        if self.path.exists():
            good = self._load()
            self._file = self.path.open("r+b")
            self._file.truncate(good)
            self._file.seek(good)
        else:
            temporary = self.path.with_name(JOURNAL + ".new")
            with temporary.open("wb") as file:
                file.write(head)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path)
            sync_folder(folder)
            self._file = self.path.open("r+b")
            self._file.seek(0, os.SEEK_END)

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
        self._file.write(np.array([len(entries), zlib.crc32(payload)], "<u4").tobytes() + payload)
        self._file.flush()
        sync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()


def unfinished(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of the merge that a folder was being built for; None if it is no such folder."""
    recipe = _head(folder).get("recipe")
    return recipe if isinstance(recipe, dict) else None


def journal_format(folder: Path) -> tuple[Any, Any]:
    """Return the version of the journal in a folder, and into how many segments its merge was cut."""
    head = _head(folder)
    return head.get("version"), head.get("segments")


def has_records(folder: Path) -> bool:
    """Whether the journal in a folder holds more than its first line."""
    with (folder / JOURNAL).open("rb") as file:
        file.readline()
        return bool(file.read(1))


def _head(folder: Path) -> dict[str, Any]:
    path = folder / JOURNAL
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
