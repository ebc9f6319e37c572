"""A folder that is whole takes its place: OUT.partial becomes OUT, at once.

OUT.replacing   exists while --overwrite exchanges the folders: the inode of the old one.
OUT.old         the old one meanwhile, where the filesystem cannot exchange two names at once.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from ..errors import OutputError, shown
from .disk import libc, sync_folder, write_file
from .journal import JOURNAL
from .output import is_occupied, locked, marker_of, old_of, partial_of

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(out: Path, *, replace: bool) -> None:
    """Make OUT.partial, which is whole, OUT; one that is there is exchanged with it and removed, if it may be.

    Raises OutputError where OUT holds something and must not be replaced: it came while the merge ran.
    """
    partial = partial_of(out)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir() and not p.is_symlink())]:
        sync_folder(folder)
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_folder(partial)
    if replace and is_occupied(out):
        with locked(out):  # wherever it is moved: no other merge takes it for its own before it is gone
            write_file(marker_of(out), f"{out.stat().st_ino}\n".encode())
            sync_folder(out.parent)
            if not _exchange(partial, out):
                out.rename(old_of(out))
                sync_folder(out.parent)
                partial.rename(out)
            sync_folder(out.parent)
            _repair(out)
        return
    try:
        partial.rename(out)  # an empty folder may be there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputError(
            f"output {shown(out)} was not there when the merge began, and now it is; the merge is whole, in"
            f" {shown(partial)}: run the same command with --overwrite, and it takes the place"
        ) from None
    sync_folder(out.parent)


def repair(out: Path) -> None:
    """Finish an exchange of folders that was cut off: the old folder goes where it stood, or goes away.

    Raises OutputError if another process is at it.
    """
    if marker_of(out).exists():
        with ExitStack() as stack:
            for folder in (partial_of(out), old_of(out)):
                if folder.is_dir():
                    stack.enter_context(locked(folder))
            _repair(out)


def _repair(out: Path) -> None:
    old, marker = old_of(out), marker_of(out)
    try:
        content = marker.read_bytes().strip(b"\0\n").decode(errors="replace")
    except FileNotFoundError:
        return
    if content.strip("0123456789"):
        raise OutputError(f"{shown(marker)} is in the way: it is none of this program; move it, or choose another OUT")

    def is_old(folder: Path) -> bool:
        # All are in one folder, so on one filesystem, whose number may change when the machine starts again.
        return folder.is_dir() and str(folder.stat().st_ino) == content

    if is_old(old) and not out.exists():
        old.rename(out)
    for folder in (partial_of(out), old):
        if is_old(folder) and out.is_dir():
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise OutputError(
                    f"output {shown(out)} is in its place, but what was there before, now {shown(folder)}, cannot be"
                    f" removed: {shown(error.filename or folder)}: {error.strerror}; remove it, then {shown(marker)}"
                ) from error
    sync_folder(out.parent)  # the marker goes last
    marker.unlink()
    sync_folder(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system or the filesystem cannot."""
    if sys.platform != "linux" or not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
