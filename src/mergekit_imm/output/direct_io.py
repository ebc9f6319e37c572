"""Bytes of output files, on their way to the disk.

Where the filesystem is known to sit on a local disk, whole pages bypass the page cache (O_DIRECT): the system neither
copies them nor makes the writer wait until others are written back, and what was cached (the inputs) stays. The rest
(pages that two pieces share, other filesystems) goes through the cache, and is sent on to the disk at once.
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
from typing import Any, BinaryIO

import numpy as np

from ..common.messages import shown
from ..errors import CheckpointError

# Windows has none, and is told so where a merge begins.
libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None

PAGE = 4096  # no disk has larger blocks
# f_type of statfs(2): ext2 to 4, xfs, f2fs, overlayfs (which passes on what is below)
_LOCAL = (0xEF53, 0x58465342, 0xF2F52010, 0x794C7630)
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_SYNC_FILE_RANGE_WRITE = 2
_SENT_ON = 16 * PAGE


@dataclass(frozen=True)
class Handle:
    """An output file that is being written."""

    path: Path
    descriptor: int
    direct: bool  # the descriptor takes whole pages only, and they bypass the cache


def open_output(path: Path, size: int | None) -> Handle:
    """Open a file to be written, as it is or new, with room for `size` bytes. Raises OSError if there is none.

    Without a size the file must be there, and keeps what it has.
    """
    new = 0 if size is None else os.O_CREAT
    descriptor = os.open(path, os.O_RDWR | new | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if size is not None:
            allocate(descriptor, size)
        if _is_local(path):
            try:
                direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
            else:
                os.close(descriptor)
                return Handle(path, direct, True)
    except BaseException:
        os.close(descriptor)
        raise
    return Handle(path, descriptor, False)


def _is_local(path: Path) -> bool:
    if sys.platform != "linux":
        return False
    status = ctypes.create_string_buffer(512)  # struct statfs, of which f_type is the first word
    if libc.statfs(os.fsencode(path), status) != 0:
        return False
    return int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF in _LOCAL


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, with its blocks where the filesystem can; raises OSError if there is no room.

    By fallocate(2) itself: os.posix_fallocate touches every block where the filesystem lacks it.
    """
    os.ftruncate(descriptor, size)
    if sys.platform == "linux" and size:
        if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        error = ctypes.get_errno()
        if error not in _NOT_OFFERED:
            raise OSError(error, os.strerror(error))


def write_at(handle: Handle, content: memoryview, offset: int) -> None:
    """Write all of a buffer at an offset of a file, and see to it that it is on its way to the disk.

    Pages go to the disk itself if the buffer lies in memory as it will in the file, modulo a page: see `place`.
    """
    if not handle.direct:
        _write_through_cache(handle.descriptor, content, offset)
        return
    end = offset + len(content)
    first, last = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
    if first < last and (_address(content) - offset) % PAGE == 0:
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


def place(buffer: np.ndarray[tuple[int], np.dtype[np.uint8]], at: int, offset: int) -> int:
    """Return the first index >= at of a buffer where bytes for `offset` of a file can be written as pages."""
    return at + (offset - buffer.ctypes.data - at) % PAGE


def _address(content: memoryview) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)


def _write_pages(descriptor: int, pages: memoryview, offset: int) -> int:
    """Write whole pages, as far as the disk takes them; returns the offset behind the last byte written."""
    while pages:
        try:
            done = os.pwrite(descriptor, pages, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # larger blocks than a page, or another rule: it goes through the cache
        pages, offset = pages[done:], offset + done
        if done % PAGE:
            break
    return offset


def _write_through_cache(descriptor: int, content: memoryview, offset: int) -> None:
    begin, length = offset, len(content)
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done
    # Else it would wait, and at last make a writer wait for all of it; a few bytes, of which others follow, may wait.
    if sys.platform == "linux" and length >= _SENT_ON:
        libc.sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def sync(descriptor: int) -> None:
    """Wait until a file's bytes are on the disk."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and the parents it lacks, see to it that the disk knows them, and return them, deepest first."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)
    return new


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and sync it."""
    with _new(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file and sync it and its name: at any instant the old one is there, or the new one whole."""
    new = path.with_name(path.name + ".new")
    write_file(new, content)
    new.rename(path)
    sync_folder(path.parent)


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is new, whatever was there: never one that others know by another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        yield file


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file's bytes and sync it; the permissions are those of a new file.

    Raises CheckpointError if the source cannot be read.
    """
    with _reading(source):
        reading = source.open("rb")
    with reading, _new(target) as file:
        while True:
            with _reading(source):
                piece = reading.read(1 << 20)
            if not piece:
                break
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{shown(source)} cannot be read: {error.strerror}; run the same command again"
        ) from error
