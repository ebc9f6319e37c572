"""Tensors computed on read: slices of other tensors, transposed ones, and ones assembled from pieces.

Each fills any range of its elements, so that no tensor is ever in memory whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics.dtypes import DTYPE_BITS
from .safetensors_file import TensorInfo

Read = Callable[["Tensor", int, npt.NDArray[np.uint8]], None]  # fills a buffer from byte `first` of a tensor
Reads = Callable[[str], Read]  # the Read of an input, by its role
Matrix = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Computed:
    """Base class: a name, a shape, and elements in float32 unless a subclass says otherwise."""

    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The dtype its elements are read in."""
        return "F32"

    @property
    def output_dtype(self) -> str:
        """The dtype of an output with this base."""
        return self.dtype

    @property
    def is_delta(self) -> bool:
        """Whether its elements are a delta, to be added to the start."""
        return False

    @property
    def is_whole(self) -> bool:
        """Whether its elements are held as they are, in memory."""
        return False

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, as read."""
        return self.count * DTYPE_BITS[self.dtype] // 8

    @property
    def stored(self) -> int:
        """Bytes read from disk for it."""
        raise NotImplementedError

    def shared(self, reads: Reads) -> Any:  # noqa: ARG002
        """Return what every row needs, computed once."""
        return None

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:
        """Fill a buffer with the elements from `first` on."""
        self.compute(reads, shared, first, out.view(np.float32))

    def compute(self, reads: Reads, shared: Any, first: int, out: Matrix) -> None:
        """Compute the elements from `first` on, in float32."""
        raise NotImplementedError

    def transposed(self, role: str) -> Computed:
        """Return this stack of matrices with each matrix transposed."""
        return Transposed(self.name, (self.shape[0], self.shape[2], self.shape[1]), self, role)

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """Return the range of rows, end exclusive, that elements first..first+count lie in."""
        return first // self.columns, (first + count - 1) // self.columns + 1


Tensor = TensorInfo | Computed


def sliced(tensor: Tensor, role: str, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
    """Return consecutive elements of a tensor, row-major from `first` on, as a tensor of their own."""
    if isinstance(tensor, TensorInfo):
        begin, nbytes = (count * DTYPE_BITS[tensor.dtype] // 8 for count in (first, math.prod(shape)))
        return replace(tensor, name=name, shape=shape, begin=tensor.begin + begin, nbytes=nbytes)
    return Slice(name, shape, tensor, role, first)


def renamed(tensor: Tensor, name: str) -> Tensor:
    """Return the same tensor under another name."""
    return tensor if tensor.name == name else replace(tensor, name=name)


def transposed(tensor: Tensor, role: str) -> Tensor:
    """Return a stack of matrices with each matrix transposed."""
    if isinstance(tensor, TensorInfo):
        return Transposed(tensor.name, (tensor.shape[0], tensor.shape[2], tensor.shape[1]), tensor, role)
    return tensor.transposed(role)


@dataclass(frozen=True)
class View(Computed):
    """A rearrangement of the elements of one tensor, values unchanged."""

    whole: Tensor
    role: str  # of the input it is in

    @property
    def dtype(self) -> str:
        """As of the whole."""
        return self.whole.dtype

    @property
    def output_dtype(self) -> str:
        """As of the whole."""
        return self.whole.output_dtype

    @property
    def is_delta(self) -> bool:
        """As of the whole."""
        return self.whole.is_delta

    @property
    def stored(self) -> int:
        """Its share of the whole's bytes."""
        return self.whole.stored * self.count // max(1, self.whole.count)


@dataclass(frozen=True)
class Slice(View):
    """Consecutive elements of a computed tensor, in row-major order."""

    first: int

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on."""
        reads(self.role)(self.whole, (self.first + first) * DTYPE_BITS[self.dtype] // 8, out)


@dataclass(frozen=True)
class Piece:
    """A tensor that is a box in a larger one, with its first corner at `place`."""

    role: str  # of the input it is in
    tensor: Tensor
    place: tuple[int, ...]


@dataclass(frozen=True)
class Pieces(Computed):
    """A tensor stored in boxes that fill it without overlap."""

    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> str:
        """The pieces' dtype; if they differ, one that holds all their values."""
        dtypes = {piece.tensor.dtype for piece in self.pieces}
        return dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"

    @property
    def output_dtype(self) -> str:
        """As of the first piece."""
        return self.pieces[0].tensor.output_dtype

    @property
    def stored(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.tensor.stored for piece in self.pieces)

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on."""
        width = DTYPE_BITS[self.dtype] // 8
        end = first + len(out) // width
        for piece in self.pieces:
            for at, begin, count in runs(self.shape, piece.place, piece.tensor.shape, first, end):
                target = out[(at - first) * width : (at - first + count) * width]
                fill_as(piece.tensor, self.dtype, reads(piece.role), begin, target)


@dataclass(frozen=True)
class Transposed(View):
    """A stack of matrices [n, rows, columns], stored as [n, columns, rows]."""

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on: rows of each matrix, which are stored as columns."""
        width = DTYPE_BITS[self.dtype] // 8
        values, read = out.view(f"u{width}"), reads(self.role)
        _, rows, columns = self.shape
        at = 0
        while at < len(values):
            number, inside = divmod(first + at, rows * columns)
            count = min(rows * columns - inside, len(values) - at)
            row, end = inside // columns, -(-(inside + count) // columns)
            block = np.empty((columns, end - row), values.dtype)
            if end - row == rows:
                read(self.whole, number * rows * columns * width, block.reshape(-1).view(np.uint8))
            else:
                for column, line in enumerate(block):
                    read(self.whole, ((number * columns + column) * rows + row) * width, line.view(np.uint8))
            values[at : at + count] = block.T.reshape(-1)[inside - row * columns :][:count]
            at += count


@dataclass(frozen=True)
class Extended(Pieces):
    """A tensor followed by rows of another model's: two pieces, its own first."""

    @property
    def own(self) -> Tensor:
        """The tensor's own rows."""
        return self.pieces[0].tensor

    @property
    def is_delta(self) -> bool:
        """As of its own rows; the added ones are never read as a delta."""
        return self.own.is_delta

    @property
    def stored(self) -> int:
        """Bytes of its own rows; the added ones count for the other model."""
        return self.own.stored


Leaf = tuple[str, TensorInfo]  # an input's role, and bytes in one of its files

# For tensor fields that may belong to another input: the field with that input's role.
_ROLES = {"whole": "role", "weight": "role", "start": "origin"}


def leaves(tensor: Tensor, role: str) -> Iterator[Leaf]:
    """Yield the stored tensors that an input's tensor is read from."""
    if isinstance(tensor, TensorInfo):
        yield role, tensor
        return
    for each in fields(tensor):
        value: Any = getattr(tensor, each.name)
        owner = getattr(tensor, _ROLES.get(each.name, ""), role)
        for found in value if isinstance(value, tuple) else (value,):
            if isinstance(found, Piece):
                yield from leaves(found.tensor, found.role)
            elif hasattr(found, "stored") and hasattr(found, "output_dtype"):
                yield from leaves(found, owner)


def is_stored(tensor: Tensor) -> bool:
    """Whether a tensor's own values are stored, not computed."""
    own = tensor.own if isinstance(tensor, Extended) else tensor
    return isinstance(own, TensorInfo) or own.is_whole


def runs(
    whole: tuple[int, ...], place: tuple[int, ...], sizes: tuple[int, ...], first: int, end: int
) -> list[tuple[int, int, int]]:
    """Return which of elements first..end of a tensor lie in a box: runs of (offset in the tensor, in the box, count).

    Offsets are flat, row-major.
    """
    if not whole:
        return [(0, 0, 1)]
    split = len(whole) - 1  # the last dimension that the box does not span; those after it are contiguous
    while split > 0 and sizes[split] == whole[split]:
        split -= 1
    inner = math.prod(whole[split + 1 :])
    run, line = sizes[split] * inner, whole[split] * inner
    lead = whole[:split]
    found = []
    for index in range(first // line if line else 0, -(-end // line) if line else 0):
        at: list[int] = []
        rest = index
        for size in reversed(lead):
            rest, digit = divmod(rest, size)
            at.insert(0, digit)
        inside = [digit - begin for digit, begin in zip(at, place, strict=False)]
        if any(not 0 <= digit < size for digit, size in zip(inside, sizes, strict=False)):
            continue
        number = 0
        for digit, size in zip(inside, sizes, strict=False):
            number = number * size + digit
        begins = index * line + place[split] * inner
        low, high = max(first, begins), min(end, begins + run)
        if low < high:
            found.append((low, number * run + low - begins, high - low))
    return found


def fill_as(tensor: Tensor, dtype: str, read: Read, first: int, out: Raw) -> None:
    """Fill a buffer with elements of a tensor, in a dtype that holds all its values."""
    width = DTYPE_BITS[tensor.dtype] // 8
    if tensor.dtype == dtype:
        read(tensor, first * width, out)
        return
    raw = np.empty(len(out) // (DTYPE_BITS[dtype] // 8) * width, np.uint8)
    read(tensor, first * width, raw)
    values = raw.view(np.float64) if tensor.dtype == "F64" else decoded(raw, tensor.dtype)
    out.view({"F32": np.float32, "F64": np.float64}[dtype])[:] = values


def numbers(tensor: Tensor, dtype: str, read: Read, first: int, count: int) -> npt.NDArray[Any]:
    """Return elements of a tensor as compiled loops take them: the bits of BF16 as uint16, the others in `dtype`."""
    if tensor.dtype == "BF16":
        bits = np.empty(count, np.uint16)
        read(tensor, 2 * first, bits.view(np.uint8))
        return bits
    found = np.empty(count, {"F32": np.float32, "F64": np.float64}[dtype])
    fill_as(tensor, dtype, read, first, found.view(np.uint8))
    return found


def matrix(tensor: Tensor, read: Read, first: int, shape: tuple[int, ...]) -> Matrix:
    """Return elements of a BF16, F16 or F32 tensor from `first` on, decoded exactly to float32, in a shape."""
    width = DTYPE_BITS[tensor.dtype] // 8
    raw = np.empty(math.prod(shape) * width, np.uint8)
    read(tensor, first * width, raw)
    return decoded(raw, tensor.dtype).reshape(shape)


def decoded(raw: npt.NDArray[np.uint8], dtype: str) -> Matrix:
    """Decode BF16, F16 or F32 elements to float32, exactly."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
