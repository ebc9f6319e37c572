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
from typing import Any, BinaryIO

import numpy as np

from ..common.messages import shown
from ..errors import CheckpointError

# Windows has neither; what needs them is refused there first.
if sys.platform != "win32":
    import fcntl
libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None

# The unit of direct writes. At least a page of this system's cache: if a part of a page bypassed the cache, the rest,
# written through it, could put back old bytes. At least 4096, which suits the blocks of every usual disk.
PAGE = max(4096, os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0)
# f_type of statfs(2): ext2 to 4, xfs, f2fs, overlayfs (which passes on what is below)
_LOCAL = (0xEF53, 0x58465342, 0xF2F52010, 0x794C7630)
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
_AT_FDCWD = -100
_STATX_DIOALIGN = 0x2000
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
        if _is_local(path) and _takes_pages(path):
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


def _takes_pages(path: Path) -> bool:
    """Whether direct writes of PAGE bytes suit a file; where the system does not say, `write_at` finds out."""
    status = ctypes.create_string_buffer(256)  # struct statx
    if not hasattr(libc, "statx") or libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, status) != 0:
        return True
    mask, memory, offset = (int.from_bytes(status.raw[at : at + 4], sys.byteorder) for at in (0, 152, 156))
    if not mask & _STATX_DIOALIGN:
        return True
    return memory > 0 and offset > 0 and PAGE % memory == PAGE % offset == 0  # zeros: never direct


def allocate(descriptor: int, size: int) -> None:
    """Give a file its size, and reserve its blocks where the filesystem can. Raises OSError if there is no room.

    Calls fallocate(2) itself: os.posix_fallocate touches every block where the filesystem lacks it.
    """
    os.ftruncate(descriptor, size)
    if sys.platform == "linux" and size:
        if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        error = ctypes.get_errno()
        if error not in _NOT_OFFERED:
            raise OSError(error, os.strerror(error))


def write_at(handle: Handle, content: memoryview, offset: int) -> None:
    """Write all of a buffer at an offset of a file, and start its way to the disk.

    Pages bypass the cache if address and offset agree modulo PAGE: see `place`.
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
    """Return the first index >= at of a buffer whose address agrees with `offset` of a file modulo PAGE."""
    return at + (offset - buffer.ctypes.data - at) % PAGE


def _address(content: memoryview) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)


def _write_pages(descriptor: int, pages: memoryview, offset: int) -> int:
    """Write pages for as long as the disk accepts them; return the offset after the last byte written."""
    while pages:
        try:
            done = os.pwrite(descriptor, pages, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # larger blocks than a page, or another rule: the cache takes it
        pages, offset = pages[done:], offset + done
        if done % PAGE:
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
        if error.errno not in _NOT_OFFERED:
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
