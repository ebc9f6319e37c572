"""Tensors of a stream: their headers, from which a merge is planned, and their values, put together as the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import torch

from ..checkpoint.lazy_tensor import Computed, Piece, Pieces, Slice, Tensor, Transposed
from ..numerics.reference import DTYPES, boxes, in_box
from .local_shards import HEADER_DTYPES, InMemory, local_of


@dataclass(frozen=True)
class Given(InMemory):
    """The header of a tensor that a stream gave."""

    given: str  # its name there


def header(name: str, tensor: torch.Tensor) -> Given:
    """Return the header of a tensor."""
    return Given(name, tuple(tensor.shape), HEADER_DTYPES[tensor.dtype], name)


def givens(side: Tensor) -> Iterator[Given]:
    """Yield the tensors of the stream that a tensor is made of."""
    if isinstance(side, Given):
        yield side
        return
    for each in fields(side):
        value: Any = getattr(side, each.name)
        for part in value if isinstance(value, tuple) else (value,):
            inner = part.tensor if isinstance(part, Piece) else part
            if isinstance(inner, Computed):
                yield from givens(inner)


def layout(side: Tensor) -> tuple[Any, ...]:
    """Return how a tensor is made of those of the stream: equal for equal ones, whatever they are called on the way."""
    return (type(side).__name__, *(_plain(getattr(side, each.name)) for each in fields(side) if each.name != "name"))


def _plain(value: Any) -> Any:
    if isinstance(value, Computed):
        return layout(value)
    if isinstance(value, Piece):
        return layout(value.tensor), value.place
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


class Values:
    """The values of tensors of the stream by name, and what was computed from them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._flat: dict[int, torch.Tensor] = {}  # by id: of the wholes of slices, row-major

    def of(self, side: Tensor) -> torch.Tensor:
        """Return a tensor made of those of the stream: a view of them where it can be one."""
        if isinstance(side, Given):
            return self._tensors[side.given].detach()
        if isinstance(side, Slice):
            if id(side.whole) not in self._flat:
                self._flat[id(side.whole)] = self.of(side.whole).reshape(-1)
            return self._flat[id(side.whole)][side.first : side.first + side.count].view(side.shape)
        if isinstance(side, Transposed):
            return self.of(side.whole).transpose(1, 2)
        assert isinstance(side, Pieces)
        out: torch.Tensor | None = None
        for piece in side.pieces:
            value = self.of(piece.tensor)
            if out is None:
                out = torch.empty(side.shape, dtype=DTYPES[side.dtype], device=value.device)
            place = zip(piece.place, value.shape, strict=True)
            out[tuple(slice(begin, begin + size) for begin, size in place)] = value
        assert out is not None
        return out


def digest(tensor: torch.Tensor) -> bytes:
    """Return a digest of the dtype, shape and bytes of what this process holds of a tensor."""
    local = local_of(tensor)
    found = blake2b(repr((tensor.dtype, tuple(tensor.shape), tuple(local.shape))).encode(), digest_size=16)
    for index, _ in boxes(local.shape):
        found.update(in_box(local, index).cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found.digest()
