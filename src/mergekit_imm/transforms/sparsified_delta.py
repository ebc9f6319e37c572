"""Deltas sparsified by magnitude (trim, DELLA), computed on read.

A dropped element is -0.0: adding it changes no value, and it differs from a delta of 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.lazy_tensor import Computed, Raw, Reads, Tensor, numbers
from ..numerics.cpu import WORK
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import BLOCK, KEEP_ALL
from ..numerics.native import Loop
from ..numerics.sparsifiers import keep_thresholds, trim_count

PIECE = 1 << 18  # elements worked on at a time
LONGEST_ROW = 1 << 18  # elements that are ranked together
DIGIT = 11  # bits of magnitudes sorted at a time: what the L1 cache takes of their counts
WHOLE = 1 << 20  # elements of a tensor that is held in memory: of one segment, which one thread merges alone
SAMPLE = 1 << 16  # elements, from which a threshold is guessed
SAMPLED = 1 << 12  # of them that are read together

Wide = npt.NDArray[Any]  # float32 or float64
Counts = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]  # of magnitudes in a window, and of those below it

count_magnitudes = Loop("mergekit_imm.transforms.numba_loops", "count_magnitudes")
count_undropped = Loop("mergekit_imm.transforms.numba_loops", "count_undropped")
keep_largest = Loop("mergekit_imm.transforms.numba_loops", "keep_largest")
random_bits = Loop("mergekit_imm.transforms.numba_loops", "random_bits")
drop_by_rank = Loop("mergekit_imm.transforms.numba_loops", "drop_by_rank")


@dataclass(frozen=True)
class Sparsified(Computed):
    """Base class: the difference sft - start, or the sft itself if it is a delta."""

    sft: Tensor
    start: Tensor
    origin: str  # the role of the start: start or base
    exact: bool  # computed in float64, as some input is
    drop: float

    @property
    def dtype(self) -> str:
        """The dtype of the arithmetic."""
        return "F64" if self.exact else "F32"

    @property
    def is_delta(self) -> bool:
        """Always."""
        return True

    @property
    def stored(self) -> int:
        """Bytes of the sft; those of the start count where the merge reads it."""
        return self.sft.stored

    @property
    def wide(self) -> tuple[type[np.floating[Any]], type[np.unsignedinteger[Any]]]:
        """The type of the arithmetic, and that of its bits."""
        return (np.float64, np.uint64) if self.exact else (np.float32, np.uint32)

    def operands(self, reads: Reads, first: int, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Return elements first..first+count of the sft and of the start; None for the start of a delta."""
        sft = numbers(self.sft, self.dtype, reads("sft"), first, count)
        start = None if self.sft.is_delta else numbers(self.start, self.dtype, reads(self.origin), first, count)
        return sft, start


@dataclass(frozen=True)
class Trimmed(Sparsified):
    """The K largest elements by magnitude, K = (1 - drop) * count, and ties with the K-th; not rescaled."""

    def shared(self, reads: Reads) -> Threshold:  # noqa: ARG002
        """Return the search for the K-th largest magnitude."""
        return Threshold(self)

    def fill(self, reads: Reads, shared: Threshold, first: int, out: Raw) -> None:
        """Fill a buffer with the elements from `first` on."""
        least, filled = shared.find(reads), out.view(self.wide[0])
        for begin in range(0, len(filled), PIECE):
            piece = filled[begin : begin + PIECE]
            keep_largest(*self.operands(reads, first + begin, len(piece)), least, piece)


class _Pass:
    """One reading of a tensor, shared out in pieces among the threads that need its result."""

    def __init__(self, count: int, low: int, shift: int, size: int) -> None:
        self.low, self.shift = low, shift
        self.counts: npt.NDArray[Any] = np.zeros(size, np.uint32 if count < 1 << 32 else np.uint64)
        self.below = 0
        self._left = list(range(0, count, PIECE))[::-1]
        self._running = 0
        self._changed = threading.Condition()

    def is_done(self) -> bool:
        """Whether all pieces are counted."""
        with self._changed:
            return not self._left and not self._running

    def join(self, count: Callable[[_Pass, int, Counts], None]) -> None:
        """Count pieces until all are counted; one that failed is left to the threads that wait."""
        while self._begins():
            first: int | None = None
            own = np.zeros((1 if self.shift == 0 else 2, len(self.counts)), np.uint32), np.zeros(1, np.int64)
            try:
                while (first := self._next()) is not None:
                    count(self, first, own)
            finally:
                with self._changed:
                    if first is not None:
                        self._left.append(first)
                    for row in own[0]:
                        self.counts += row
                    self.below += int(own[1][0])
                    self._running -= 1
                    self._changed.notify_all()

    def _begins(self) -> bool:
        """Wait until there is something to count, or all is counted; say which."""
        with self._changed:
            while self._running and not self._left:
                self._changed.wait()
            self._running += bool(self._left)
            return bool(self._left)

    def _next(self) -> int | None:
        with self._changed:
            return self._left.pop() if self._left else None


class Threshold:
    """The magnitude, as an integer, of the K-th largest element; threads that ask for it share the work.

    In a small tensor it is selected in memory. Else a pass over the tensor counts the magnitudes in a window: first,
    all by their highest bits, then those with the highest bits of the K-th by the next ones. A sample of float32 often
    tells a window that is small enough to count every magnitude in it, and holds the K-th: then one pass is enough.
    """

    def __init__(self, tensor: Trimmed) -> None:
        self._tensor, self._rank = tensor, tensor.count - trim_count(tensor.drop, tensor.count)  # from the smallest
        self._lock = threading.Lock()
        self._pass: _Pass | None = None
        self._found: np.unsignedinteger[Any] | None = None

    def find(self, reads: Reads) -> np.unsignedinteger[Any]:
        """Return it."""
        while True:
            with self._lock:
                if self._found is None and (self._pass is None or self._pass.is_done()):
                    self._advance(reads)
                if self._found is not None:
                    return self._found
                current = self._pass
            assert current is not None
            current.join(lambda window, first, counts: self._count(reads, window, first, counts))

    def _advance(self, reads: Reads) -> None:
        """Choose the next pass, or find the threshold in the one that is done."""
        done, count, bits = self._pass, self._tensor.count, self._tensor.wide[1]
        if done is None and count <= WHOLE:
            self._found = self._least(self._ranked(reads, [0], count))
            return
        if done is None and bits is np.uint32 and count >= 16 * SAMPLE:
            places = [number * SAMPLED * count // SAMPLE for number in range(SAMPLE // SAMPLED)]
            low = max(0, self._ranked(reads, places, SAMPLED) - (2 << 16))
            self._pass = _Pass(count, low, shift=0, size=4 << 16)
            return
        if done is None or not 0 <= self._rank - done.below < done.counts.sum():
            self._pass = _Pass(count, 0, shift=DTYPE_BITS[self._tensor.dtype] - 16, size=1 << 15)
            return
        at = int(np.searchsorted(np.cumsum(done.counts, dtype=np.int64), self._rank - done.below, side="right"))
        low = done.low + (at << done.shift)
        if done.shift:
            self._pass = _Pass(count, low, done.shift - 16, size=1 << 16)
        else:
            self._found = self._least(low)

    def _least(self, magnitude: int) -> np.unsignedinteger[Any]:
        """Return the threshold for a K-th largest magnitude: if more than K are NaN, infinities are kept too."""
        wide, bits = self._tensor.wide
        return bits(min(magnitude, int(wide(np.inf).view(bits))))

    def _ranked(self, reads: Reads, places: Sequence[int], some: int) -> int:
        """Return the magnitude of this rank among `some` elements from each of the places on: a sample, or all."""
        wide, bits = self._tensor.wide
        found = np.empty((len(places), some), wide)
        for first, piece in zip(places, found, strict=True):
            keep_largest(*self._tensor.operands(reads, first, some), bits(0), piece)  # all
        rank = self._rank * found.size // self._tensor.count
        magnitudes = np.abs(found, out=found).reshape(-1).view(bits)
        magnitudes.partition(rank)
        return int(magnitudes[rank])

    def _count(self, reads: Reads, window: _Pass, first: int, counts: Counts) -> None:
        """Count a piece of the tensor in a window."""
        wide, bits = self._tensor.wide
        operands = self._tensor.operands(reads, first, min(PIECE, self._tensor.count - first))
        scratch = np.empty(4 * BLOCK, wide), np.empty(4 * BLOCK, bits)
        count_magnitudes(*operands, bits(window.low), bits(window.shift), *scratch, *counts)


@dataclass(frozen=True)
class Ranked(Sparsified):
    """Elements dropped at random, smaller ones of a row more often, the rest divided by their keep rate (DELLA).

    A row is along the last dimension. Elements of equal magnitude are ranked by index.
    """

    epsilon: float
    key: tuple[int, int]

    @property
    def row(self) -> int:
        """Elements that are ranked together."""
        return self.shape[-1] if self.shape else 1

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on."""
        row, (wide, bits) = self.row, self.wide
        filled = out.view(wide)
        end = first + len(filled)
        keep16, scale = _by_rank(row, self.drop, self.epsilon, self.dtype)
        # Rows of counts that are a multiple of 4 KiB apart would slow each other down.
        counts = np.empty((2, (1 << DIGIT) + 16), np.uint32)
        scratch = np.empty(row, bits), np.empty((2, row), np.uint32), DIGIT, counts
        key = np.uint32(self.key[0]), np.uint32(self.key[1])
        work = np.empty(WORK, np.float32)
        for begin, finish in _in_whole_rows(first, end, row):
            block = begin // BLOCK
            drawn = np.empty((-(-finish // BLOCK) - block) * BLOCK, np.uint16)
            random_bits(block, *key, work, drawn)
            is_inside = first <= begin and finish <= end
            delta = filled[begin - first : finish - first] if is_inside else np.empty(finish - begin, wide)
            operands = self.operands(reads, begin, finish - begin)
            drop_by_rank(*operands, drawn[begin - block * BLOCK :], keep16, scale, *scratch, delta)
            if not is_inside:
                low, high = max(first, begin), min(end, finish)
                filled[low - first : high - first] = delta[low - begin : high - begin]


def _in_whole_rows(first: int, end: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole rows that hold elements first..end; those that reach beyond them are single rows."""
    begin, step = first // row * row, max(1, PIECE // row) * row
    while begin < end:
        finish = min(begin + step, end // row * row) if first <= begin and begin + row <= end else begin + row
        yield begin, finish
        begin = finish


@cache
def _by_rank(row: int, drop: float, epsilon: float, dtype: str) -> tuple[npt.NDArray[np.uint32], Wide]:
    """Return keep16 and the rescale factor for each rank in a row."""
    keep16 = keep_thresholds(row, drop, epsilon).astype(np.uint32)
    scale = KEEP_ALL / keep16.astype(np.float64)
    return keep16, scale if dtype == "F64" else scale.astype(np.float32)


def count_kept(raw: Raw, dtype: str) -> int:
    """Count the elements of a sparsified delta that were kept."""
    kept = np.zeros(1, np.int64)
    count_undropped(raw.view({"F32": np.float32, "F64": np.float64}[dtype]), kept)
    return int(kept[0])
