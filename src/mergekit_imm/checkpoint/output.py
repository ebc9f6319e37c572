"""The folder a merge writes: built as OUT.partial, journalled, synced, and renamed when it is whole.

OUT.partial/.imm_journal   first line: the recipe; then batches of finished segments, each recorded only after
                           its bytes were synced. Removed when the folder is whole.
OUT.replacing              exists while --overwrite exchanges the folders: device and inode of the old one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutputError, shown
from .disk import libc, sync, sync_folder, write_file

JOURNAL = ".imm_journal"
JOURNAL_VERSION = 2  # of what is recorded of a segment, too
# One finished segment: its index, and its record of the statistics (zeros for a copied one).
ENTRY = np.dtype([("segment", "<u8"), ("record", "<f8", 5)])
Entries = npt.NDArray[Any]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError at the output into an OutputError of one line."""
    try:
        yield
    except OSError as error:
        cure = {
            errno.ENOSPC: "; free some space and run the same command again: it goes on where it stopped",
            errno.EDQUOT: "; raise the quota and run the same command again: it goes on where it stopped",
            errno.EACCES: "; choose another OUT or change its permissions",
            errno.EROFS: "; choose another OUT",
            errno.EMFILE: "; allow more open files (ulimit -n), or give fewer values at a time",
        }.get(error.errno or 0, "")
        raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}{cure}") from error


def expanded(out: str | Path) -> Path:
    """Return an output's path with ~ expanded. Raises OutputError where there is no such home."""
    try:
        return Path(out).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output {shown(out)} cannot be: {error}") from error


def partial_of(out: Path) -> Path:
    """Return the folder that `out` is built in."""
    return out.with_name(out.name + ".partial")


def _marker_of(out: Path) -> Path:
    return out.with_name(out.name + ".replacing")


def _old_of(out: Path) -> Path:
    return out.with_name(out.name + ".old")


def check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that cannot be exchanged or that would touch an input; label -> file or folder of each.

    Raises OutputError. Decided before anything is read.
    """
    with output_errors(out):
        _check_place(out, inputs)


def _check_place(out: Path, inputs: Mapping[str, Path]) -> None:
    if out.name in ("", ".", ".."):
        raise OutputError(f"output {shown(out)} has no name of its own; give a folder that can be created")
    if out.is_symlink():
        raise OutputError(f"output {shown(out)} is a link; give the folder it points to")
    if out.exists() and not out.is_dir():
        raise OutputError(f"output {shown(out)} is a file; an output is a folder")
    if out.is_dir() and out.is_mount():
        raise OutputError(f"output {shown(out)} is a mount point, which cannot be renamed; give a folder inside it")
    if partial_of(out).is_symlink():
        raise OutputError(f"{shown(partial_of(out))}, where the output is built, is a link; remove it")
    if partial_of(out).exists() and not partial_of(out).is_dir():
        raise OutputError(f"{shown(partial_of(out))}, where the output is built, is a file; remove it")
    file = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise OutputError(f"output {shown(out)} lies below a file: {shown(file)}: Not a directory; give another output")
    for label, path in inputs.items():
        place = path.resolve()
        for ours in (out, partial_of(out)):
            if ours.exists() and any(ours.samefile(each) for each in (place, *place.parents)):
                raise OutputError(f"output {shown(ours)} is, or contains, {label} ({shown(path)}); give another output")


def free_space(out: Path) -> int:
    """Return the bytes free where `out` would be written; more than there can be if the filesystem does not say."""
    usage = shutil.disk_usage(_parent_of(out))
    return usage.free if usage.total else sys.maxsize  # ramfs


def device_of(out: Path) -> int:
    """Return the number of the device where `out` would be written."""
    return _parent_of(out).stat().st_dev


def _parent_of(out: Path) -> Path:
    return next((p for p in (out.parent, *out.parent.parents) if p.exists()), Path("/"))


def is_whole(out: Path, recipe: bytes, sizes: Mapping[str, int]) -> bool:
    """Whether `out` already holds this very merge: its recipe, and every file with its size."""
    try:
        return (out / "imm_recipe.json").read_bytes() == recipe and all(
            (out / name).stat().st_size == size for name, size in sizes.items()
        )
    except OSError:
        return False


def is_occupied(out: Path) -> bool:
    """Whether `out` is there and not empty."""
    return out.is_dir() and any(out.iterdir())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone. Raises OutputError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{shown(folder)} is being written by another merge; wait for it, or give another output"
            ) from None
        yield
    finally:
        os.close(descriptor)


# --- the journal


class Journal:
    """Which segments are on disk, as far as it is certain."""

    def __init__(self, folder: Path, recipe: bytes, segments: int) -> None:
        """Begin a new journal for a recipe cut into so many segments, or take up the one that is there."""
        self.path = folder / JOURNAL
        self.entries: Entries = np.empty(0, ENTRY)
        head = (
            json.dumps({"version": JOURNAL_VERSION, "segments": segments, "recipe": json.loads(recipe)}).encode()
            + b"\n"
        )
        if self.path.exists():
            good = self._load()
            self._file = self.path.open("r+b")
            self._file.truncate(good)
            self._file.seek(good)
        else:
            temporary = self.path.with_name(JOURNAL + ".new")
            temporary.write_bytes(head)
            with temporary.open("r+b") as file:
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
    recipe = _journal_head(folder).get("recipe")
    return recipe if isinstance(recipe, dict) else None


def journal_format(folder: Path) -> tuple[Any, Any]:
    """Return the version of the journal in a folder, and into how many segments its merge was cut."""
    head = _journal_head(folder)
    return head.get("version"), head.get("segments")


def _journal_head(folder: Path) -> dict[str, Any]:
    try:
        with (folder / JOURNAL).open("rb") as file:
            head = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return head if isinstance(head, dict) else {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Say where two recipes differ, `parameters.alpha: 0.3, now 0.5`."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{place}{key}.")
        elif one != other and key == "fingerprint":
            found.append(f"{place.rstrip('.')} has changed")
        elif one != other:
            found.append(f"{place}{key}: {shown(json.dumps(one), 60)}, now {shown(json.dumps(other), 60)}")
    return found


# --- the swap


def publish(out: Path) -> None:
    """Make OUT.partial, which is whole, OUT; an OUT that is there is exchanged with it and removed."""
    partial, old, marker = partial_of(out), _old_of(out), _marker_of(out)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir() and not p.is_symlink())]:
        sync_folder(folder)
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_folder(partial)
    if is_occupied(out):
        status = out.stat()
        write_file(marker, f"{status.st_dev} {status.st_ino}\n".encode())
        sync_folder(out.parent)
        if not _exchange(partial, out):
            out.rename(old)
            partial.rename(out)
        sync_folder(out.parent)
        repair(out)
    else:
        if out.exists():
            out.rmdir()
        partial.rename(out)
    sync_folder(out.parent)


def repair(out: Path) -> None:
    """Finish an exchange of folders that was cut off: the old folder goes where it stood, or goes away."""
    if _marker_of(out).exists():
        with locked(partial_of(out)) if partial_of(out).is_dir() else nullcontext():
            _repair(out)


def _repair(out: Path) -> None:
    partial, old, marker = partial_of(out), _old_of(out), _marker_of(out)
    try:
        content = marker.read_text().split()
    except FileNotFoundError:
        return
    identity = tuple(map(int, content)) if len(content) == 2 and all(map(str.isdigit, content)) else ()

    def is_old(folder: Path) -> bool:
        if not folder.is_dir():
            return False
        status = folder.stat()
        return (status.st_dev, status.st_ino) == identity

    if is_old(old) and not out.exists():
        old.rename(out)
    for folder in (partial, old):
        if is_old(folder) and out.is_dir():
            shutil.rmtree(folder)
    marker.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system or the filesystem cannot."""
    if sys.platform != "linux" or not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
