"""Files in whole pages: past the page cache (O_DIRECT) where that is offered, and what of a file is in the cache."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

# Windows has none; what needs it is refused there first.
libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None

# The unit of direct reads and writes. At least a page of this system's cache: if a part of a page bypassed the cache,
# the rest, written through it, could put back old bytes. At least 4096, which suits the blocks of every usual disk.
PAGE = max(4096, os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0)
# f_type of statfs(2): ext2 to 4, xfs, f2fs, overlayfs (which passes on what is below)
_LOCAL = (0xEF53, 0x58465342, 0xF2F52010, 0x794C7630)
NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
_AT_FDCWD = -100
_STATX_DIOALIGN = 0x2000
_CACHESTAT = 451  # of syscall(2), the same number on every architecture; Linux 6.5

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def open_direct(path: Path, flags: int) -> int | None:
    """Open a file past the page cache; None where the filesystem does not offer that, or not for pages."""
    if not (_is_local(path) and _takes_pages(path)):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return None


def _is_local(path: Path) -> bool:
    if sys.platform != "linux":
        return False
    status = ctypes.create_string_buffer(512)  # struct statfs, of which f_type is the first word
    if libc.statfs(os.fsencode(path), status) != 0:
        return False
    return int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF in _LOCAL


def _takes_pages(path: Path) -> bool:
    """Whether direct writes of PAGE bytes suit a file; where the system does not say, the first access finds out."""
    status = ctypes.create_string_buffer(256)  # struct statx
    if not hasattr(libc, "statx") or libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_DIOALIGN, status) != 0:
        return True
    mask, memory, offset = (int.from_bytes(status.raw[at : at + 4], sys.byteorder) for at in (0, 152, 156))
    if not mask & _STATX_DIOALIGN:
        return True
    return memory > 0 and offset > 0 and PAGE % memory == PAGE % offset == 0  # zeros: never direct


def cached_bytes(descriptor: int, offset: int, count: int) -> int | None:
    """Return the bytes of the pages of a range of a file that are in the cache; None where the system does not say."""
    if sys.platform != "linux":
        return None
    found = (ctypes.c_uint64 * 5)()  # struct cachestat, of which the number of cached pages is the first
    asked = (ctypes.c_uint64 * 2)(offset, count)
    if libc.syscall(_CACHESTAT, descriptor, asked, found, 0) != 0:
        return None
    return int(found[0]) * os.sysconf("SC_PAGE_SIZE")


def is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Whether most of a range of a file is in the page cache; also where the system does not say."""
    found = cached_bytes(descriptor, offset, count)
    return found is None or found * 2 >= count


def room_for_cache() -> int:
    """Return the bytes of memory that the page cache may take: sys.maxsize where the system does not say."""
    room = sys.maxsize
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # of a container, unless it is "max"
        room = min(room, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return room


def place(buffer: Bytes, at: int, offset: int) -> int:
    """Return the first index >= at of a buffer whose address agrees with `offset` of a file modulo PAGE."""
    return at + (offset - buffer.ctypes.data - at) % PAGE


def address(content: memoryview) -> int:
    """Return where a buffer begins in memory."""
    return int(np.frombuffer(content, np.uint8).ctypes.data)
