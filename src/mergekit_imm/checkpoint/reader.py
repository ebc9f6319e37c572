"""Read ranges of the inputs' tensors, stored or computed, and compare tensors."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common import pages
from ..common.threads import when_unused
from ..numerics.dtypes import DTYPE_BITS
from .checkpoint import Checkpoint
from .lazy_tensor import Computed, Raw, Read, Reads, Tensor, decoded
from .safetensors_file import TensorInfo, check_unchanged, open_to_read, read_into

COMPARED = 1 << 20  # elements at a time
AHEAD = 8  # pieces of read-ahead: two for each worker
ANNOUNCED = 64 << 10  # bytes; read-ahead does not pay for smaller pieces
ROOM = 2 << 20  # bytes at a time from past the cache to where a caller wants them
SHARED = 4  # tensors to keep shared values of: workers finish one while others begin the next


class _Once:
    """The shared value of a computed tensor: the first worker computes it, the others wait."""

    def __init__(self, tensor: Computed) -> None:
        self._tensor, self._lock, self._value = tensor, threading.Lock(), None

    def value(self, reads: Reads) -> Any:
        with self._lock:
            if self._value is None:
                self._value = self._tensor.shared(reads)
            return self._value


@dataclass
class _File:
    """An input file: its descriptor, and one that reads whole pages past the cache, if there is one."""

    path: Path
    descriptor: int
    announced: bool  # whether to say what will be read; no use where the cache holds it all
    direct: int | None = None


class Files:
    """Read-only handles on the inputs' files, opened on first use.

    With `past_cache` they read from the disk what is not in the page cache, and leave it out of there: for models
    larger than memory, which would evict each other.
    """

    def __init__(self, inputs: Mapping[str, Checkpoint], *, past_cache: bool = False) -> None:
        self._inputs, self._past_cache = inputs, past_cache
        self._open: dict[Path, _File] = {}
        self._to_close = ExitStack()
        self._shared: dict[int, _Once] = {}  # by id: hashing a tensor of many pieces is slow
        self._lock = threading.Lock()

    def __enter__(self) -> Files:  # noqa: D105
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        when_unused(self._to_close.close)

    def read(self, role: str, tensor: Tensor, first: int, buffer: Raw) -> None:
        """Fill a buffer from byte `first` of a tensor."""
        if not isinstance(tensor, TensorInfo):
            tensor.fill(self._reads, self._shared_of(tensor), first // (DTYPE_BITS[tensor.dtype] // 8), buffer)
            return
        file, begin, count = self._file(role, tensor), tensor.begin + first, len(buffer)
        if not _skips_cache(file, begin, count):
            _read_through_cache(file, begin, buffer)
            return
        room = np.empty(min(count, ROOM) + 3 * pages.PAGE, np.uint8)
        for done in range(0, count, ROOM):
            some = min(count - done, ROOM)
            at = _read_past_cache(file, begin + done, some, room, 0)
            buffer[done : done + some] = room[at : at + some]

    def read_placed(self, role: str, tensor: Tensor, first: int, count: int, buffer: Raw, at: int) -> int:
        """Read `count` bytes of a tensor into a buffer, from `at` or after it on; return where they begin.

        Takes at most `count` + 3 * pages.PAGE bytes of the buffer.
        """
        if isinstance(tensor, TensorInfo):
            file, begin = self._file(role, tensor), tensor.begin + first
            if _skips_cache(file, begin, count):
                found = _read_past_cache(file, begin, count, buffer, at)
                odd = begin % 8  # arrays at such an address would be copied again
                if odd:
                    buffer[found - odd : found - odd + count] = buffer[found : found + count]
                return found - odd
            _read_through_cache(file, begin, buffer[at : at + count])
        else:
            self.read(role, tensor, first, buffer[at : at + count])
        return at

    def _file(self, role: str, tensor: TensorInfo) -> _File:
        path = self._inputs[role].path(tensor)
        with self._lock:
            if path not in self._open:
                descriptor = open_to_read(path)
                self._to_close.callback(os.close, descriptor)
                size = os.fstat(descriptor).st_size
                cached = pages.cached_bytes(descriptor, 0, size)
                file = _File(path, descriptor, hasattr(os, "posix_fadvise") and (cached is None or cached < size))
                if self._past_cache:
                    with suppress(OSError):  # the other descriptor will do
                        file.direct = pages.open_direct(path, os.O_RDONLY)
                if file.direct is not None:
                    self._to_close.callback(os.close, file.direct)
                    with suppress(OSError):  # what is read ahead would look cached, and then be read through the cache
                        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._open[path] = file
            return self._open[path]

    def _shared_of(self, tensor: Computed) -> Any:
        if type(tensor).shared is Computed.shared:
            return None
        with self._lock:
            once = self._shared.pop(id(tensor), None) or _Once(tensor)
            self._shared[id(tensor)] = once  # now the most recent
            while len(self._shared) > SHARED:
                del self._shared[next(iter(self._shared))]
        return once.value(self._reads)

    def _reads(self, role: str) -> Read:
        return functools.partial(self.read, role)


def _skips_cache(file: _File, begin: int, count: int) -> bool:
    """Whether to read a range of a file past the cache."""
    return count >= ANNOUNCED and file.direct is not None and not pages.is_cached(file.descriptor, begin, count)


def _read_through_cache(file: _File, begin: int, buffer: Raw) -> None:
    """Fill a buffer from a file, and announce what will probably be read after it."""
    count = len(buffer)
    if count >= ANNOUNCED and file.announced and file.direct is None:
        with suppress(OSError):  # only a hint: the disk reads ahead while the workers compute
            os.posix_fadvise(file.descriptor, begin + AHEAD * count, count, os.POSIX_FADV_WILLNEED)
    read_into(file.descriptor, memoryview(buffer), begin, file.path)  # type: ignore[arg-type]


def _read_past_cache(file: _File, begin: int, count: int, buffer: Raw, at: int) -> int:
    """Read a range of a file into whole pages of a buffer, from `at` or after it on; return where the range begins."""
    before = begin % pages.PAGE
    page = pages.place(buffer, at, 0)
    whole = -(-(before + count) // pages.PAGE) * pages.PAGE
    done = _read_pages(file, memoryview(buffer[page : page + whole]), begin - before)  # type: ignore[arg-type]
    at = page + before
    if done < before + count:  # the end of the file, or not offered after all
        kept = max(0, done - before)
        rest = memoryview(buffer[at + kept : at + count])  # type: ignore[arg-type]
        read_into(file.descriptor, rest, begin + kept, file.path)
    return at


def _read_pages(file: _File, buffer: memoryview, offset: int) -> int:
    """Read whole pages past the cache; return how many bytes were read before the end of the file or a refusal."""
    done = 0
    while done < len(buffer) and file.direct is not None:
        try:
            got = os.preadv(file.direct, [buffer[done:]], offset + done)
        except OSError:
            file.direct = None  # reading through the cache will do, or say what is wrong
            break
        done += got
        if got == 0 or done % pages.PAGE:
            break
    return done


def check_inputs(inputs: Mapping[str, Checkpoint]) -> None:
    """Raise ChangedError if a file of the inputs was written since it was opened."""
    for each in inputs.values():
        for file in each.files.values():
            assert file.path is not None
            check_unchanged(file.path, (file.size, file.written))
        for path, before in each.stamps.items():
            check_unchanged(path, before)


Operand = tuple[str, Tensor]  # an input's role, and one of its tensors


def same_bytes(inputs: Mapping[str, Checkpoint], one: Operand, other: Operand) -> bool:
    """Whether two tensors have equal bytes, dtype and shape; stops at the first difference."""
    if (one[1].dtype, one[1].shape) != (other[1].dtype, other[1].shape):
        return False
    return all(np.array_equal(a, b) for a, b in _side_by_side(inputs, one, other))


def same_values(inputs: Mapping[str, Checkpoint], one: Operand, other: Operand) -> bool:
    """Whether two tensors of BF16, F16 or F32 have equal values; stops at the first difference."""
    dtypes = one[1].dtype, other[1].dtype
    if one[1].shape != other[1].shape or not {*dtypes} <= {"BF16", "F16", "F32"}:
        return False
    pieces = _side_by_side(inputs, one, other)
    return all(np.array_equal(decoded(a, dtypes[0]), decoded(b, dtypes[1])) for a, b in pieces)


def _side_by_side(inputs: Mapping[str, Checkpoint], *operands: Operand) -> Iterator[tuple[Raw, ...]]:
    """Yield the bytes of the same elements of each tensor, piece by piece."""
    with Files(inputs) as files:
        count = operands[0][1].count
        for first in range(0, count, COMPARED):
            raws = []
            for role, tensor in operands:
                begin, end = (min(at, count) * DTYPE_BITS[tensor.dtype] // 8 for at in (first, first + COMPARED))
                raws.append(np.empty(end - begin, np.uint8))
                files.read(role, tensor, begin, raws[-1])
            yield tuple(raws)
