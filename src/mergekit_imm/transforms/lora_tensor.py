"""Tensors that an adapter changes, computed on read: low-rank products, rescaled rows, replaced rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checkpoint.lazy_tensor import Computed, Matrix, Reads, Tensor, matrix
from ..numerics.native import Loop

product = Loop("mergekit_imm.transforms.numba_loops", "product")
rescale = Loop("mergekit_imm.transforms.numba_loops", "rescale")


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
        """Return the right factor."""
        if self.right is None:
            return np.ones((1, 1), np.float32)
        whole = matrix(self.right, reads("sft"), 0, self.right.shape)
        return np.ascontiguousarray(whole.T) if self.is_transposed else whole

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        row, end = self.rows(first, len(out))
        read = reads("sft")
        if self.is_transposed:
            lines = [matrix(self.left, read, k * self.shape[0] + row, (end - row, 1)) for k in range(self.rank)]
            left = np.hstack(lines)
        else:
            left = matrix(self.left, read, row * self.rank, (end - row, self.rank))
        product(left, shared, np.float32(self.scaling), first - row * self.columns, out)


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
        """Return the right factor."""
        return self.change.shared(reads)

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on; norms need whole rows."""
        row, end = self.rows(first, len(out))
        whole = np.empty((end - row) * self.columns, np.float32)
        self.change.compute(reads, shared, row * self.columns, whole)
        weight = matrix(self.weight, reads(self.role), row * self.columns, (end - row, self.columns))
        magnitude = matrix(self.magnitude, reads("sft"), row, (end - row, 1))
        rescale(weight, whole.reshape(weight.shape), magnitude.reshape(-1))
        out[:] = whole[first - row * self.columns :][: len(out)]


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
        """Return left and right factors, stacked by expert."""
        experts = self.shape[0]
        rank = self.a.shape[0] // experts
        read = reads("sft")
        a = matrix(self.a, read, 0, (experts, rank, self.a.shape[1]))
        b = matrix(self.b, read, 0, (self.b.shape[0], rank, experts)).transpose(2, 0, 1)
        factors = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.is_transposed else (b, a)
        return np.ascontiguousarray(factors[0]), np.ascontiguousarray(factors[1])

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
            product(lefts[expert, row:end], rights[expert], np.float32(self.scaling), inside - row * columns, piece)
            at += count
