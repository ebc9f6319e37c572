"""Write the bytes of output files and force them to the disk.

On a local disk whole pages bypass the page cache (O_DIRECT): the system neither copies them nor makes the writer wait
for other pages, and cached inputs stay cached. The rest (pages that two pieces share, other filesystems) goes through
the cache, and its writing starts at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..common import pages
from ..common.messages import shown
from ..common.pages import NOT_OFFERED, address, libc, open_direct
from ..errors import CheckpointError

# Windows has none; what needs it is refused there first.
if sys.platform != "win32":
    import fcntl

_SYNC_FILE_RANGE_WRITE = 2
_SEND_AT = 64 << 10  # bytes; fewer may wait for others to follow


@dataclass(frozen=True)
class Handle:
    """An output file that is being written."""

    path: Path
    descriptor: int
    direct: bool  # the descriptor takes whole pages only, and they bypass the cache

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
    """Write all of a buffer at an offset of a file, and start its way to the disk.

    Pages bypass the cache if address and offset agree modulo pages.PAGE: see `pages.place`.
    """
    if not handle.direct:
        _write_through_cache(handle.descriptor, content, offset)
        return
    end = offset + len(content)
    first, last = -(-offset // pages.PAGE) * pages.PAGE, end // pages.PAGE * pages.PAGE
    if first < last and (address(content) - offset) % pages.PAGE == 0:
        written = _write_pages(handle.descriptor, content[first - offset : last - offset], first)
    else:
        first = written = offset
    for piece, begin in ((content[: first - offset], offset), (content[written - offset :], written)):
        if piece:
            descriptor = os.open(handle.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_through_cache(descriptor, piece, begin)
            finally:
                os.close(descriptor)


def _write_pages(descriptor: int, content: memoryview, offset: int) -> int:
    """Write pages for as long as the disk accepts them; return the offset after the last byte written."""
    while content:
        try:
            done = os.pwrite(descriptor, content, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # larger blocks than a page, or another rule: the cache takes it
        content, offset = content[done:], offset + done
        if done % pages.PAGE:
            break
    return offset


def _write_through_cache(descriptor: int, content: memoryview, offset: int) -> None:
    begin, length = offset, len(content)
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done
    # Otherwise dirty pages pile up until a writer has to wait for all of them.
    if sys.platform == "linux" and length >= _SEND_AT:
        libc.sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


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
