"""Write the bytes of output files and force them to the disk.

On a local disk whole pages bypass the page cache (O_DIRECT): the system neither copies them nor makes the writer wait
for other pages, and cached inputs stay cached. A page that several pieces share waits in memory for all of them: a
write through the cache would lock the file, and every other write would wait. What a sync finds there, and what other
filesystems take, goes through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition
from typing import BinaryIO

import numpy as np

from ..common import pages
from ..common.messages import shown
from ..common.pages import NOT_OFFERED, address, libc, open_direct
from ..errors import CheckpointError

# Windows has none; what needs it is refused there first.
if sys.platform != "win32":
    import fcntl

_SYNC_FILE_RANGE_WRITE = 2
_SEND_AT = 64 << 10  # bytes; fewer may wait for others to follow


class _Page:
    """A page of a file that several pieces share, and which bytes of it are there."""

    def __init__(self) -> None:
        room = np.empty(2 * pages.PAGE, np.uint8)
        at = pages.place(room, 0, 0)
        self.content = memoryview(room[at : at + pages.PAGE])  # type: ignore[arg-type]
        self.pieces: list[tuple[int, int]] = []
        self.lacks = pages.PAGE


@dataclass(frozen=True)
class Handle:
    """An output file that is being written."""

    path: Path
    descriptor: int
    direct: bool  # the descriptor takes whole pages only, and they bypass the cache
    shared: dict[int, _Page] = field(default_factory=dict)  # by offset: pages that lack a piece
    in_flight: dict[int, _Page] = field(default_factory=dict)  # by offset: shared pages that are being written
    landed: Condition = field(default_factory=Condition)  # guards both

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def open_output(path: Path, size: int | None) -> Handle:
    """Open a file to write, new or existing, and reserve `size` bytes. Raises OSError if there is no room.

    Without a size the file must exist, and keeps its content.
    """
    new = 0 if size is None else os.O_CREAT
    descriptor = os.open(path, os.O_RDWR | new | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if size is not None:
            allocate(descriptor, size)
        direct = open_direct(path, os.O_RDWR)
        if direct is not None:
            os.close(descriptor)
            return Handle(path, direct, True)
    except BaseException:
        os.close(descriptor)
        raise
    return Handle(path, descriptor, False)


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and reserve its blocks where the filesystem can. Raises OSError if there is no room.

    Calls fallocate(2) itself: os.posix_fallocate touches every block where the filesystem lacks it.
    """
    os.ftruncate(descriptor, size)
    if sys.platform == "linux" and size:
        if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        error = ctypes.get_errno()
        if error not in NOT_OFFERED:
            raise OSError(error, os.strerror(error))


def write_at(handle: Handle, content: memoryview, offset: int) -> None:
    """Write a buffer at an offset of a file; what shares a page with other pieces waits for them, or for a sync.

    Pages bypass the cache if address and offset agree modulo pages.PAGE: see `pages.place`. No two pieces overlap.
    """
    end = offset + len(content)
    if not handle.direct or (address(content) - offset) % pages.PAGE:
        _write_through_cache(handle, content, offset)
        return
    begin, stop = -(-offset // pages.PAGE) * pages.PAGE, end // pages.PAGE * pages.PAGE  # of whole pages
    run = [content[begin - offset : stop - offset]] if begin < stop else []
    own: dict[int, _Page] = {}
    with handle.landed:
        if offset < begin and (page := _shared(handle, content[: begin - offset], offset)):
            begin -= pages.PAGE
            own[begin] = page
            run.insert(0, page.content)
        if end > stop >= offset and (page := _shared(handle, content[stop - offset :], stop)):
            own[stop] = page
            run.append(page.content)
        handle.in_flight.update(own)
    try:
        _write_pages(handle, run, begin)
    except BaseException:
        with handle.landed:  # other pieces are certain only once `sync` has written them
            handle.shared.update(own)
        raise
    finally:
        if own:
            with handle.landed:
                for at in own:
                    del handle.in_flight[at]
                handle.landed.notify_all()


def _shared(handle: Handle, piece: memoryview, offset: int) -> _Page | None:
    """Put a piece into the page that it shares; return the page if that was the last piece."""
    before = offset % pages.PAGE
    page = handle.shared.get(offset - before)
    if page is None:
        page = handle.shared[offset - before] = _Page()
    page.content[before : before + len(piece)] = piece
    page.pieces.append((before, before + len(piece)))
    page.lacks -= len(piece)
    return None if page.lacks else handle.shared.pop(offset - before)


def _write_pages(handle: Handle, run: list[memoryview], offset: int) -> None:
    """Write pages that follow each other, and through the cache what the disk does not accept."""
    while run:
        try:
            done = os.pwritev(handle.descriptor, run, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # larger blocks than a page, or another rule
        run, offset = _rest(run, done), offset + done
        if done % pages.PAGE:
            break
    for content in run:
        _write_through_cache(handle, content, offset)
        offset += len(content)


def _rest(run: list[memoryview], done: int) -> list[memoryview]:
    """Return what follows the first `done` bytes of some buffers."""
    while run and done >= len(run[0]):
        done -= len(run[0])
        run = run[1:]
    return [run[0][done:], *run[1:]] if run else []


def _write_through_cache(handle: Handle, content: memoryview, offset: int) -> None:
    descriptor = os.open(handle.path, os.O_WRONLY | os.O_CLOEXEC) if handle.direct else handle.descriptor
    try:
        _write_all(descriptor, content, offset)
    finally:
        if handle.direct:
            os.close(descriptor)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    begin, length = offset, len(content)
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done
    # Otherwise dirty pages pile up until a writer has to wait for all of them.
    if sys.platform == "linux" and length >= _SEND_AT:
        libc.sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def sync_output(handle: Handle) -> None:
    """Write what is left of shared pages, and force all bytes of the pieces written so far to the disk."""
    with handle.landed:
        before = set(handle.in_flight)
        handle.landed.wait_for(lambda: before.isdisjoint(handle.in_flight))
        left = dict(handle.shared)
        handle.shared.clear()
    for at, page in left.items():
        for begin, end in page.pieces:
            _write_through_cache(handle, page.content[begin:end], at + begin)
    sync(handle.descriptor)


def sync(descriptor: int) -> None:
    """Force a file's bytes to the disk."""
    if not _full_sync(descriptor):
        getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _full_sync(descriptor):
            os.fsync(descriptor)  # fdatasync may leave out names
    finally:
        os.close(descriptor)


def _full_sync(descriptor: int) -> bool:
    """Empty the drive's own cache too, where fsync does not (macOS); False where that is not offered."""
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is None:
        return False
    try:
        fcntl.fcntl(descriptor, command)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


def make_folder(path: Path) -> list[Path]:
    """Make a folder and its missing parents, force their names to the disk, and return them, deepest first."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)
    return new


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and force it to the disk."""
    with _new(path) as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file atomically: after a crash the old one is there, or the new one, whole."""
    new = path.with_name(path.name + ".new")
    write_file(new, content)
    new.rename(path)
    sync_folder(path.parent)


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """Open a new file in place of any old one: writing into the old one would change its hard links too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        yield file


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a side file, with the permissions of a new file, and force them to the disk.

    Raises CheckpointError if the source cannot be read.
    """
    with _read_errors(source):
        opened = source.open("rb")
    with opened, _new(target) as file:
        while True:
            with _read_errors(source):
                piece = opened.read(1 << 20)
            if not piece:
                break
            file.write(piece)
        file.flush()
        sync(file.fileno())


@contextmanager
def _read_errors(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{shown(source)} cannot be read: {error.strerror}; run the same command again"
        ) from error
