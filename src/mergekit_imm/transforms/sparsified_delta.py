"""Deltas sparsified by magnitude (trim, DELLA), computed on read.

A dropped element is -0.0: adding it changes no value, and it differs from a delta of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.lazy_tensor import Computed, Raw, Reads, Tensor, fill_as
from ..numerics.dtypes import DTYPE_BITS
from ..numerics.mask import KEEP_ALL
from ..numerics.native import Loop
from ..numerics.sparsifiers import keep_thresholds, trim_count

PIECE = 1 << 17  # elements worked on at a time
LONGEST_ROW = 1 << 18  # elements that are ranked together

Wide = npt.NDArray[Any]  # float32 or float64

count_digits = Loop("mergekit_imm.transforms.numba_loops", "count_digits")
drop_ranked = Loop("mergekit_imm.transforms.numba_loops", "drop_ranked")
random_bits = Loop("mergekit_imm.transforms.numba_loops", "random_bits")


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

    def delta(self, reads: Reads, first: int, count: int) -> Wide:
        """Return elements first..first+count of sft - start, each rounded once."""
        found = np.empty(count, np.float64 if self.exact else np.float32)
        fill_as(self.sft, self.dtype, reads("sft"), first, found.view(np.uint8))
        if not self.sft.is_delta:
            start = np.empty_like(found)
            fill_as(self.start, self.dtype, reads(self.origin), first, start.view(np.uint8))
            with np.errstate(all="ignore"):
                np.subtract(found, start, out=found)
        return found


def magnitudes(delta: Wide) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the bits of floats without the sign: integers that order them by magnitude, NaN last."""
    if delta.dtype == np.float64:
        return delta.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF)
    return delta.view(np.uint32) & np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Trimmed(Sparsified):
    """The K largest elements by magnitude, K = (1 - drop) * count, and ties with the K-th; not rescaled."""

    def shared(self, reads: Reads) -> int:
        """Return the magnitude bits of the K-th largest element, found sixteen at a time per pass over the tensor."""
        wanted = self.count - trim_count(self.drop, self.count)  # its rank, from the smallest
        prefix = 0
        for shift in range(DTYPE_BITS[self.dtype] - 16, -1, -16):
            counts = np.zeros(1 << 16, np.int64)
            for first in range(0, self.count, PIECE):
                bits = magnitudes(self.delta(reads, first, min(PIECE, self.count - first)))
                count_digits(bits, prefix, shift, counts)
            below = np.cumsum(counts)
            digit = int(np.searchsorted(below, wanted, side="right"))
            wanted -= int(below[digit - 1]) if digit else 0
            prefix = prefix << 16 | digit
        infinity = np.array([np.inf], np.float64 if self.exact else np.float32)
        return min(prefix, int(magnitudes(infinity)[0]))  # if more than K are NaN, keep infinities too

    def fill(self, reads: Reads, shared: int, first: int, out: Raw) -> None:
        """Fill a buffer with the elements from `first` on."""
        filled = out.view(np.float64 if self.exact else np.float32)
        for begin in range(0, len(filled), PIECE):
            piece = filled[begin : begin + PIECE]
            delta = self.delta(reads, first + begin, len(piece))
            kept = magnitudes(delta) >= shared
            delta += 0.0  # -0.0 marks dropped elements
            piece[:] = np.where(kept, delta, delta.dtype.type(-0.0))


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
        filled = out.view(np.float64 if self.exact else np.float32)
        end = first + len(filled)
        keep16, scale = _by_rank(self.row, self.drop, self.epsilon, self.dtype)
        step = max(1, PIECE // self.row)
        for line in range(first // self.row, -(-end // self.row), step):
            lines = min(step, -(-end // self.row) - line)
            begin = line * self.row
            delta = self.delta(reads, begin, lines * self.row)
            bits = np.empty(len(delta), np.uint16)
            random_bits(begin, *self.key, bits)
            rows = delta.reshape(lines, self.row)
            for values, order, drawn in zip(rows, _orders(rows), bits.reshape(rows.shape), strict=True):
                drop_ranked(values, order, drawn, keep16, scale)
            low, high = max(first, begin), min(end, begin + len(delta))
            filled[low - first : high - first] = delta[low - begin : high - begin]


def _orders(rows: Wide) -> npt.NDArray[Any]:
    """Return the indices of each row's elements by magnitude, smallest first, ties by index."""
    sizes = magnitudes(rows)
    if sizes.dtype == np.uint64:
        return np.argsort(sizes, axis=1, kind="stable")
    # Sort keys of magnitude and index: the same as a stable argsort, but faster.
    keys = (sizes.astype(np.uint64) << np.uint64(32)) | np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return keys.view(np.uint32)[:, 0::2]  # the lower half of each 64 bits


@cache
def _by_rank(row: int, drop: float, epsilon: float, dtype: str) -> tuple[npt.NDArray[np.uint32], Wide]:
    """Return keep16 and the rescale factor for each rank in a row."""
    keep16 = keep_thresholds(row, drop, epsilon).astype(np.uint32)
    scale = KEEP_ALL / keep16.astype(np.float64)
    return keep16, scale if dtype == "F64" else scale.astype(np.float32)


def count_kept(raw: Raw, dtype: str) -> int:
    """Count the elements of a sparsified delta that were kept."""
    bits, dropped = (np.uint64, 1 << 63) if dtype == "F64" else (np.uint32, 1 << 31)
    return int(np.count_nonzero(raw.view(bits) != bits(dropped)))
