"""Tensors that are computed while they are read, in float32, and never on disk: what an adapter makes of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .tensorfile import DTYPE_BITS, TensorInfo

Read = Callable[[TensorInfo, int, memoryview], None]  # fill a buffer from a byte of a tensor
Reads = Callable[[str], Read]  # of a role
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Computed:
    """What all of them have in common: a name, a shape, and elements in float32."""

    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As it is handed out."""
        return "F32"

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        raise NotImplementedError

    def shared(self, reads: Reads) -> Matrix:
        """Return what all rows need."""
        raise NotImplementedError

    def fill(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        raise NotImplementedError

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """Return the first row of some elements, and the one behind their last."""
        return first // self.columns, (first + count - 1) // self.columns + 1


@dataclass(frozen=True)
class LowRank(Computed):
    """A delta that is a product of two small matrices (LoRA).

        delta[i, j] = float32(scaling) * sum over k of left[i, k] * right[k, j]

    The sum runs over k in order, from zero, each operation rounded. Factors that are `turned` are stored transposed.
    Without `right` the delta is a vector, scaling * left.
    """

    left: TensorInfo
    right: TensorInfo | None
    scaling: float
    turned: bool = False

    @property
    def rank(self) -> int:
        """Number of products that are added."""
        return 1 if self.right is None else self.left.shape[0 if self.turned else 1]

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.left.nbytes + (self.right.nbytes if self.right else 0)

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor."""
        if self.right is None:
            return np.ones((1, 1), np.float32)
        whole = _matrix(self.right, reads("sft"), 0, self.right.shape)
        return np.ascontiguousarray(whole.T) if self.turned else whole

    def fill(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        from ..products import product

        row, end = self.rows(first, len(out))
        read = reads("sft")
        if self.turned:
            lines = [_matrix(self.left, read, k * self.shape[0] + row, (end - row, 1)) for k in range(self.rank)]
            left = np.hstack(lines)
        else:
            left = _matrix(self.left, read, row * self.rank, (end - row, self.rank))
        product(left, shared, np.float32(self.scaling), first - row * self.columns, out)


@dataclass(frozen=True)
class Rescaled(Computed):
    """A weight with a low-rank delta, each row rescaled to a trained norm (DoRA).

        v = weight + delta;  sft[i, j] = float32(magnitude[i] / float32(sqrt(sum over j of v[i, j]^2))) * v[i, j]

    The squares are added in float64, in the order of the row.
    """

    change: LowRank
    magnitude: TensorInfo
    weight: TensorInfo
    role: str  # of the model that the weight is in

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.change.stored + self.magnitude.nbytes

    def shared(self, reads: Reads) -> Matrix:
        """Return the right factor."""
        return self.change.shared(reads)

    def fill(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on; norms are those of whole rows."""
        from ..products import rescale

        row, end = self.rows(first, len(out))
        whole = np.empty((end - row) * self.columns, np.float32)
        self.change.fill(reads, shared, row * self.columns, whole)
        weight = _matrix(self.weight, reads(self.role), row * self.columns, (end - row, self.columns))
        magnitude = _matrix(self.magnitude, reads("sft"), row, (end - row, 1))
        rescale(weight, whole.reshape(weight.shape), magnitude.reshape(-1))
        out[:] = whole[first - row * self.columns :][: len(out)]


@dataclass(frozen=True)
class WithRows(Computed):
    """A weight of which some rows are others (PEFT's trainable tokens): sft[places[n]] = rows[n]."""

    weight: TensorInfo
    role: str  # of the model that the weight is in
    trained: TensorInfo
    places: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Bytes of an adapter that are read for it."""
        return self.trained.nbytes

    def shared(self, reads: Reads) -> Matrix:
        """Return the rows."""
        return _matrix(self.trained, reads("sft"), 0, self.trained.shape)

    def fill(self, reads: Reads, shared: Matrix, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on."""
        out[:] = _matrix(self.weight, reads(self.role), first, (len(out), 1)).reshape(-1)
        row, end = self.rows(first, len(out))
        for number, place in enumerate(self.places):
            if row <= place < end:
                begin = place * self.columns - first
                line = shared[number]
                out[max(0, begin) : begin + self.columns] = line[max(0, -begin) : len(out) - begin]


def _matrix(tensor: TensorInfo, read: Read, first: int, shape: tuple[int, ...]) -> Matrix:
    """Elements first.. of a tensor in float32, which holds each exactly."""
    width = DTYPE_BITS[tensor.dtype] // 8
    raw = np.empty(math.prod(shape) * width, np.uint8)
    read(tensor, first * width, memoryview(raw))  # type: ignore[arg-type]
    return decoded(raw, tensor.dtype).reshape(shape)


def decoded(raw: npt.NDArray[np.uint8], dtype: str) -> Matrix:
    """Return BF16, F16 or F32 elements in float32, which holds each exactly."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
