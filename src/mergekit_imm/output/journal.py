"""The journal of a merge under way: which segments are certain to be on the disk.

OUT.partial/.imm_journal   First line: the recipe. Then batches of finished segments, each recorded only after its bytes
                           were synced. Removed when the folder is complete.
"""

from __future__ import annotations

import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .direct_io import replace_file, sync, sync_folder

JOURNAL = ".imm_journal"
VERSION = 2  # of the format, records of the statistics included
# One finished segment: its index and its record of the statistics (zeros if it was copied).
ENTRY = np.dtype([("segment", "<u8"), ("record", "<f8", 5)])
Entries = npt.NDArray[Any]


class Journal:
    """The segments that are certain to be on the disk."""

    def __init__(self, path: Path, recipe: bytes, segments: int) -> None:
        """Open the journal of a recipe that is cut into so many segments, or begin one."""
        self.path = path
        self.entries: Entries = np.empty(0, ENTRY)
        head = json.dumps({"version": VERSION, "segments": segments, "recipe": json.loads(recipe)}).encode() + b"\n"
        if not path.exists():
            replace_file(path, head)
        good = self._load()
        # Unbuffered: closing would write again what a full disk refused, and fail again.
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(good)
        self._file.seek(good)

    def _load(self) -> int:
        content = self.path.read_bytes()
        good = content.index(b"\n") + 1
        batches = []
        while good + 8 <= len(content):
            count, check = np.frombuffer(content, "<u4", 2, good)
            end = good + 8 + int(count) * ENTRY.itemsize
            if end > len(content) or zlib.crc32(content[good + 8 : end]) != check:
                break  # cut off while it was written: its segments are written again
            batches.append(np.frombuffer(content, ENTRY, int(count), good + 8))
            good = end
        if batches:
            self.entries = np.concatenate(batches)
        return good

    def append(self, entries: Entries) -> None:
        """Record segments after their bytes were synced."""
        payload = entries.tobytes()
        rest = memoryview(np.array([len(entries), zlib.crc32(payload)], "<u4").tobytes() + payload)
        while rest:  # a nearly full disk takes a part
            rest = rest[self._file.write(rest) :]
        sync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Everything was synced before, so an error here loses nothing."""
        with suppress(OSError):
            self._file.close()


def unfinished(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of the unfinished merge in a folder, or None."""
    recipe = head_of(folder / JOURNAL).get("recipe")
    return recipe if isinstance(recipe, dict) else None


def journal_format(folder: Path) -> tuple[Any, Any]:
    """Return the version of the journal in a folder, and how many segments its merge has."""
    head = head_of(folder / JOURNAL)
    return head.get("version"), head.get("segments")


def has_records(folder: Path) -> bool:
    """Return whether a journal in a folder, of any rank, has entries."""
    for path in (folder / JOURNAL, *folder.glob(f"{JOURNAL}-*")):
        if head_of(path):
            with path.open("rb") as file:
                file.readline()
                if file.read(1):
                    return True
    return False


def head_of(path: Path) -> dict[str, Any]:
    """Return the first line of a journal, parsed; empty if it is no journal."""
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
    """Remove everything in a folder, the journal last: if that is cut off, the folder is still recognised."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()
    sync_folder(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
