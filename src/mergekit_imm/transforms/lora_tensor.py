"""Tensors that an adapter changes, computed on read: low-rank products, rescaled rows, replaced rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.lazy_tensor import Computed, Matrix, Reads, Tensor, matrix, numbers
from ..numerics.mask import BLOCK
from ..numerics.native import Loop

product = Loop("mergekit_imm.transforms.numba_loops", "product")
rescaled = Loop("mergekit_imm.transforms.numba_loops", "rescaled")


def tiled(right: Matrix) -> Matrix:
    """Return a right factor [..., rank, columns] in tiles of columns, [..., tiles, rank * BLOCK], for `product`.

    The last tile is filled up with zeros. Lines begin at cache lines: those that do not take twice as long to load.
    """
    *lead, rank, columns = right.shape
    shape = (*lead, -(-columns // BLOCK), rank, BLOCK)
    raw = np.zeros(4 * math.prod(shape) + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    tiles = raw[begin : begin + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    for at in range(0, columns, BLOCK):
        some = right[..., at : at + BLOCK]
        tiles[..., at // BLOCK, :, : some.shape[-1]] = some
    return tiles.reshape(*shape[:-2], rank * BLOCK)


@dataclass(frozen=True)
class LowRank(Computed):
    """A delta that is the product of two small matrices (LoRA).

        delta[i, j] = float32(scaling) * sum over k of left[i, k] * right[k, j]

    The sum starts from zero and runs over k in order, each operation rounded. With `is_transposed` both factors are
    stored transposed. Without `right` the delta is a vector, scaling * left.
    """

    left: Tensor
    right: Tensor | None
    scaling: float
    is_transposed: bool = False

    @property
    def is_delta(self) -> bool:
        """Always."""
        return True

    @property
    def rank(self) -> int:
        """The length of the sum."""
        return 1 if self.right is None else self.left.shape[0 if self.is_transposed else 1]

    @property
    def stored(self) -> int:
        """Bytes read from the adapter."""
        return self.left.stored + (self.right.stored if self.right else 0)

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor, in tiles."""
        if self.right is None:
            return tiled(np.ones((1, 1), np.float32))
        whole = matrix(self.right, reads("sft"), 0, self.right.shape)
        return tiled(whole.T if self.is_transposed else whole)

    def left_rows(self, reads: Reads, row: int, end: int) -> Matrix:
        """Return rows of the left factor."""
        read = reads("sft")
        if self.is_transposed:
            lines = [matrix(self.left, read, k * self.shape[0] + row, (end - row, 1)) for k in range(self.rank)]
            return np.hstack(lines)
        return matrix(self.left, read, row * self.rank, (end - row, self.rank))

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        row, end = self.rows(first, len(out))
        left = self.left_rows(reads, row, end)
        product(left, shared, self.columns, np.float32(self.scaling), first - row * self.columns, out)


@dataclass(frozen=True)
class Rescaled(Computed):
    """A weight with a low-rank delta, each row rescaled to a trained norm (DoRA).

        v = weight + delta;  sft[i, j] = float32(magnitude[i] / float32(sqrt(sum over j of v[i, j]^2))) * v[i, j]

    The squares are summed in float64, in row order.
    """

    change: LowRank
    magnitude: Tensor
    weight: Tensor
    role: str  # of the input that holds the weight

    @property
    def stored(self) -> int:
        """Bytes read from the adapter."""
        return self.change.stored + self.magnitude.stored

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor, in tiles."""
        return self.change.shared(reads)

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on; norms need whole rows."""
        row, end = self.rows(first, len(out))
        left = self.change.left_rows(reads, row, end)
        weight = numbers(self.weight, "F32", reads(self.role), row * self.columns, (end - row) * self.columns)
        magnitude = matrix(self.magnitude, reads("sft"), row, (end - row,))
        work, squares = np.empty(8 * self.columns, np.float32), np.empty((8, BLOCK // 2), np.float64)
        scaling, first = np.float32(self.change.scaling), first - row * self.columns
        rescaled(left, shared, self.columns, scaling, weight, magnitude, first, work, squares, out)


@dataclass(frozen=True)
class WithRows(Computed):
    """A weight with some rows replaced (PEFT's trainable tokens): sft[places[n]] = rows[n]."""

    weight: Tensor
    role: str  # of the input that holds the weight
    trained: Tensor
    places: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Bytes read from the adapter."""
        return self.trained.stored

    def shared(self, reads: Reads) -> Matrix:
        """Return the new rows."""
        return matrix(self.trained, reads("sft"), 0, self.trained.shape)

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        out[:] = matrix(self.weight, reads(self.role), first, (len(out), 1)).reshape(-1)
        row, end = self.rows(first, len(out))
        for number, place in enumerate(self.places):
            if row <= place < end:
                begin = place * self.columns - first
                line = shared[number]
                out[max(0, begin) : begin + self.columns] = line[max(0, -begin) : len(out) - begin]


@dataclass(frozen=True)
class Rows(Computed):
    """Some rows of a weight: rows[n] = weight[places[n]]."""

    weight: Tensor
    role: str  # of the input that holds the weight
    places: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Bytes of the rows."""
        return self.weight.stored * len(self.places) // max(1, self.weight.shape[0])

    def compute(self, reads: Reads, shared: Any, first: int, out: Matrix) -> None:  # noqa: ARG002
        """Compute the elements from `first` on."""
        row, end = self.rows(first, len(out))
        for number in range(row, end):
            line = matrix(self.weight, reads(self.role), self.places[number] * self.columns, (self.columns,))
            begin = number * self.columns - first
            out[max(0, begin) : begin + self.columns] = line[max(0, -begin) : len(out) - begin]


@dataclass(frozen=True)
class OfExperts(Computed):
    """A delta of fused experts, a low-rank product for each (PEFT's target_parameters).

        delta[e, i, j] = float32(scaling) * sum over k of B[i, k * experts + e] * A[e * rank + k, j]

    The sum starts from zero and runs over k in order, each operation rounded. With `is_transposed` the weight is
    stored as [experts, in, out], and this is delta[e, j, i].
    """

    a: Tensor
    b: Tensor
    scaling: float
    is_transposed: bool

    @property
    def is_delta(self) -> bool:
        """Always."""
        return True

    @property
    def stored(self) -> int:
        """Bytes read from the adapter."""
        return self.a.stored + self.b.stored

    def shared(self, reads: Reads) -> tuple[Matrix, Matrix]:
        """Return left and right factors, stacked by expert; the right ones in tiles."""
        experts = self.shape[0]
        rank = self.a.shape[0] // experts
        read = reads("sft")
        a = matrix(self.a, read, 0, (experts, rank, self.a.shape[1]))
        b = matrix(self.b, read, 0, (self.b.shape[0], rank, experts)).transpose(2, 0, 1)
        factors = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.is_transposed else (b, a)
        return np.ascontiguousarray(factors[0]), tiled(factors[1])

    def compute(self, reads: Reads, shared: tuple[Matrix, Matrix], first: int, out: Matrix) -> None:  # noqa: ARG002
        """Compute the elements from `first` on, expert by expert."""
        lefts, rights = shared
        columns = self.shape[2]
        at = 0
        while at < len(out):
            expert, inside = divmod(first + at, self.columns)
            count = min(self.columns - inside, len(out) - at)
            row, end = inside // columns, (inside + count - 1) // columns + 1
            piece = out[at : at + count]
            left = lefts[expert, row:end]
            product(left, rights[expert], columns, np.float32(self.scaling), inside - row * columns, piece)
            at += count
