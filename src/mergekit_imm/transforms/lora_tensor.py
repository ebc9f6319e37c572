"""What an adapter makes of a tensor: the product of two small matrices, rescaled rows, rows that are others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checkpoint.lazy_tensor import Computed, Matrix, Reads, Tensor, matrix


@dataclass(frozen=True)
class LowRank(Computed):
    """A delta that is a product of two small matrices (LoRA).

        delta[i, j] = float32(scaling) * sum over k of left[i, k] * right[k, j]

    The sum runs over k in order, from zero, each operation rounded. Factors that are `turned` are stored transposed.
    Without `right` the delta is a vector, scaling * left.
    """

    left: Tensor
    right: Tensor | None
    scaling: float
    turned: bool = False

    @property
    def is_delta(self) -> bool:
        """It is."""
        return True

    @property
    def rank(self) -> int:
        """Number of products that are added."""
        return 1 if self.right is None else self.left.shape[0 if self.turned else 1]

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.left.stored + (self.right.stored if self.right else 0)

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor."""
        if self.right is None:
            return np.ones((1, 1), np.float32)
        whole = matrix(self.right, reads("sft"), 0, self.right.shape)
        return np.ascontiguousarray(whole.T) if self.turned else whole

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        from .numba_loops import product

        row, end = self.rows(first, len(out))
        read = reads("sft")
        if self.turned:
            lines = [matrix(self.left, read, k * self.shape[0] + row, (end - row, 1)) for k in range(self.rank)]
            left = np.hstack(lines)
        else:
            left = matrix(self.left, read, row * self.rank, (end - row, self.rank))
        product(left, shared, np.float32(self.scaling), first - row * self.columns, out)


@dataclass(frozen=True)
class Rescaled(Computed):
    """A weight with a low-rank delta, each row rescaled to a trained norm (DoRA).

        v = weight + delta;  sft[i, j] = float32(magnitude[i] / float32(sqrt(sum over j of v[i, j]^2))) * v[i, j]

    The squares are added in float64, in the order of the row.
    """

    change: LowRank
    magnitude: Tensor
    weight: Tensor
    role: str  # of the model that the weight is in

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.change.stored + self.magnitude.stored

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor."""
        return self.change.shared(reads)

    def compute(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on; norms are those of whole rows."""
        from .numba_loops import rescale

        row, end = self.rows(first, len(out))
        whole = np.empty((end - row) * self.columns, np.float32)
        self.change.compute(reads, shared, row * self.columns, whole)
        weight = matrix(self.weight, reads(self.role), row * self.columns, (end - row, self.columns))
        magnitude = matrix(self.magnitude, reads("sft"), row, (end - row, 1))
        rescale(weight, whole.reshape(weight.shape), magnitude.reshape(-1))
        out[:] = whole[first - row * self.columns :][: len(out)]


@dataclass(frozen=True)
class WithRows(Computed):
    """A weight of which some rows are others (PEFT's trainable tokens): sft[places[n]] = rows[n]."""

    weight: Tensor
    role: str  # of the model that the weight is in
    trained: Tensor
    places: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.trained.stored

    def shared(self, reads: Reads) -> Matrix:
        """Return the rows."""
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
    """A delta of experts in one tensor, for each a product of two small matrices (PEFT's target_parameters).

        delta[e, i, j] = float32(scaling) * sum over k of B[i, k * experts + e] * A[e * rank + k, j]

    The sum runs over k in order, from zero, each operation rounded. Of a tensor that is `turned`, stored as
    [experts, in, out], it is delta[e, j, i]: A[e * rank + k, i] * B[j, k * experts + e].
    """

    a: Tensor
    b: Tensor
    scaling: float
    turned: bool

    @property
    def is_delta(self) -> bool:
        """It is."""
        return True

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.a.stored + self.b.stored

    def shared(self, reads: Reads) -> tuple[Matrix, Matrix]:
        """Return the left and the right factor of each expert."""
        experts = self.shape[0]
        rank = self.a.shape[0] // experts
        read = reads("sft")
        a = matrix(self.a, read, 0, (experts, rank, self.a.shape[1]))
        b = matrix(self.b, read, 0, (self.b.shape[0], rank, experts)).transpose(2, 0, 1)
        factors = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.turned else (b, a)
        return np.ascontiguousarray(factors[0]), np.ascontiguousarray(factors[1])

    def compute(self, reads: Reads, shared: tuple[Matrix, Matrix], first: int, out: Matrix) -> None:  # noqa: ARG002
        """Compute the elements from `first` on, expert by expert."""
        from .numba_loops import product

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
