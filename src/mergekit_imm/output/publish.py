"""Publish a complete folder: OUT.partial becomes OUT in one step.

OUT.replacing   Exists while --overwrite exchanges the folders, and identifies the old one.
OUT.old         The old folder meanwhile, where the filesystem cannot exchange two names in one step.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..common.messages import shown
from ..common.pages import libc
from ..errors import OutputError
from .direct_io import sync_folder, write_file
from .journal import JOURNAL
from .paths import is_occupied, locked, marker_of, old_of, partial_of
from .write_errors import output_errors

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FORMAT = "mergekit_imm exchange"


def publish(out: Path, *, replace: bool) -> None:
    """Rename OUT.partial, which is complete, to OUT. With `replace` an old OUT is exchanged with it and removed.

    Raises OutputError if OUT appeared while the merge ran and must not be replaced.
    """
    partial = partial_of(out)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir() and not p.is_symlink())]:
        sync_folder(folder)
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_folder(partial)
    if replace and is_occupied(out):
        with locked(out):  # it becomes OUT.partial for a moment, and no other merge may go on there
            _replace(out)
        return
    try:
        partial.rename(out)  # replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputError(
            f"output {shown(out)} was not there when the merge began, and now it is; the merge is complete in"
            f" {shown(partial)}: run the same command with --overwrite to put it in place"
        ) from None
    sync_folder(out.parent)


def _replace(out: Path) -> None:
    partial, old, marker = partial_of(out), old_of(out), marker_of(out)
    about = {"format": _FORMAT, "inode": out.stat().st_ino, "names": sorted(each.name for each in out.iterdir())}
    # Written in our own folder and renamed: it exists whole or not at all.
    write_file(partial / marker.name, (json.dumps(about) + "\n").encode())
    (partial / marker.name).rename(marker)
    sync_folder(out.parent)
    sync_folder(partial)
    if not _exchange(partial, out):
        if os.path.lexists(old):
            marker.unlink()
            raise OutputError(
                f"{shown(old)} is in the way: {shown(out)} goes there while it is replaced; the merge is complete in"
                f" {shown(partial)}: move {shown(old)} away and run the same command again"
            )
        out.rename(old)
        sync_folder(out.parent)
        partial.rename(out)
    sync_folder(out.parent)
    _repair(out)


def check_marker(out: Path) -> None:
    """Raise OutputError if OUT.replacing is a file of somebody else."""
    with output_errors(out):
        _read_marker(out)


def repair(out: Path) -> None:
    """Finish an exchange of folders that was cut off: put the old folder back, or remove it.

    Raises OutputError if another process is doing that.
    """
    if marker_of(out).exists():
        with ExitStack() as stack:
            there = [folder for folder in (partial_of(out), old_of(out)) if folder.is_dir()]
            for folder in there or ([out] if out.is_dir() else []):
                stack.enter_context(locked(folder))
            _repair(out)


def _read_marker(out: Path) -> dict[str, Any] | None:
    """Return the content of OUT.replacing, or None if there is none."""
    marker = marker_of(out)
    if not os.path.lexists(marker):
        return None
    try:
        about = json.loads(marker.read_bytes()) if marker.is_file() and not marker.is_symlink() else None
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise OutputError(
            f"{shown(marker)} is in the way: a merge writes a file of that name while it replaces {shown(out)}; move it"
            " away, or choose another OUT"
        )
    return about


def _repair(out: Path) -> None:
    old, marker = old_of(out), marker_of(out)
    about = _read_marker(out)
    if about is None:
        return

    def is_old(folder: Path) -> bool:
        # The inode identifies it, as all are on one filesystem; the names, in case the inode was reused.
        return (
            folder.is_dir()
            and not folder.is_symlink()
            and folder.stat().st_ino == about.get("inode")
            and {each.name for each in folder.iterdir()} <= set(about.get("names", ()))
        )

    if is_old(old) and not out.exists():
        old.rename(out)
    for folder in (partial_of(out), old):
        if is_old(folder) and out.is_dir():
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise OutputError(
                    f"output {shown(out)} is in place, but the folder it replaced, now {shown(folder)}, cannot be"
                    f" removed: {shown(error.filename or folder)}: {error.strerror}; remove it, then {shown(marker)}"
                ) from error
    sync_folder(out.parent)  # the marker goes last
    marker.unlink(missing_ok=True)
    sync_folder(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where the system or the filesystem cannot."""
    if sys.platform != "linux" or not hasattr(libc, "renameat2"):
        return False
    return bool(libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
