"""What a tensor that is not as claimed may be instead: its parts in another order, or an adapter read otherwise.

Each possibility is a claim like any other: views of the tensors that are read, measured by the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.lazy_tensor import Matrix, Raw, Read, Reads, Tensor, Transposed, View, matrix, transposed
from ..model.config import setting
from ..model.tensor_names import blanked
from ..numerics.dtypes import DTYPE_BITS, MERGED
from ..transforms.lora_tensor import OfExperts, Rescaled, tiled
from .audit_inputs import Claimed
from .audit_tensors import NO_MAGNITUDES

QKV = ("qkv", "query_key_value", "c_attn", "attn.Wqkv", "in_proj", "W_pack")
NEIGHBOURS = 8  # of one shape, in one module, that may have been exchanged
HOLDS, IN_CHANGE = " holds what belongs to ", "in the change, "
EXPERTS = 512  # that are told apart by their first elements
SAMPLED = 4096
SHORT = 64  # elements of a row

InOrder = Callable[[str, Tensor], Tensor]  # an input's role and its tensor -> the tensor in another order


class Order(NamedTuple):
    """A possibility: a key that is the same for other tensors, what it means, and the claim."""

    key: str
    why: str
    claim: Claimed


@dataclass(frozen=True)
class Rows(View):
    """A tensor [outer, rows, inner] with the rows in another order: row i is row `order[i]` of the whole."""

    inner: int
    order: tuple[int, ...]

    def fill(self, reads: Reads, shared: Any, first: int, out: Raw) -> None:  # noqa: ARG002
        """Fill a buffer with the elements from `first` on."""
        width = DTYPE_BITS[self.dtype] // 8
        if self.inner < SHORT:
            self._fill_by_blocks(reads(self.role), width, first, out)
            return
        read, height = reads(self.role), len(self.order)
        at, count = 0, len(out) // width
        while at < count:
            row, inside = divmod(first + at, self.inner)
            outer, number = divmod(row, height)
            run = min(self.inner - inside, count - at)
            begin = (outer * height + self.order[number]) * self.inner + inside
            read(self.whole, begin * width, out[at * width : (at + run) * width])
            at += run

    def _fill_by_blocks(self, read: Read, width: int, first: int, out: Raw) -> None:
        """Read all rows of an index of `outer`, and take them in order: rows are too short to be read one by one."""
        size, order = len(self.order) * self.inner, np.array(self.order)
        values, at = out.view(f"u{width}"), 0
        while at < len(values):
            outer, inside = divmod(first + at, size)
            block = np.empty((len(order), self.inner), values.dtype)
            read(self.whole, outer * size * width, block.reshape(-1).view(np.uint8))
            some = block[order].reshape(-1)[inside : inside + len(values) - at]
            values[at : at + len(some)] = some
            at += len(some)


@dataclass(frozen=True)
class ByExpert(OfExperts):
    """A delta of fused experts whose columns of B are taken expert by expert, B[i, e * rank + k]."""

    def shared(self, reads: Reads) -> tuple[Matrix, Matrix]:
        """Return left and right factors, stacked by expert."""
        experts = self.shape[0]
        rank = self.a.shape[0] // experts
        a = matrix(self.a, reads("sft"), 0, (experts, rank, self.a.shape[1]))
        b = matrix(self.b, reads("sft"), 0, (self.b.shape[0], experts, rank)).transpose(1, 0, 2)
        factors = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.is_transposed else (b, a)
        return np.ascontiguousarray(factors[0]), tiled(factors[1])


def orders(
    claim: Claimed, others: Mapping[str, Claimed], config: Mapping[str, Any] | None, first_of: Callable[..., Any]
) -> Iterator[Order]:
    """Yield what a tensor may be instead of its claim. `first_of` reads the first elements of given rows."""
    if claim.base.dtype not in MERGED or claim.merged is None or not claim.count:
        return
    for key, why, view in _views(claim, config):
        yield from _both(key, why, claim, view)
    yield from _neighbours(claim, others)
    if isinstance(claim.sft, OfExperts):
        it = claim.sft
        read_so = ByExpert(it.name, it.shape, it.a, it.b, it.scaling, it.is_transposed)
        why = "the columns of lora_B were taken expert by expert, though PEFT stores them rank by rank"
        yield Order("lora_B", why, replace(claim, sft=read_so))
    if isinstance(claim.sft, Rescaled):
        yield Order("DoRA", NO_MAGNITUDES, replace(claim, sft=claim.sft.change, is_delta=True))
    stacked = len(claim.base.shape) == 3 or (len(claim.base.shape) == 2 and ".experts." in claim.name)
    if stacked and 1 < claim.base.shape[0] <= EXPERTS:
        found = _order_of_experts(claim, first_of)
        if found is not None:
            view = _rows(claim.base.shape, 0, found)
            yield from _both("experts", "the experts are in another order", claim, view)


def _both(key: str, why: str, claim: Claimed, view: InOrder) -> Iterator[Order]:
    """Yield the order of the whole tensor, and that of the change alone."""
    base = view(claim.base_role, claim.base)
    sft = None if claim.sft is None else view("sft", claim.sft)
    yield Order(key, why, replace(claim, base=base, sft=sft))
    if sft is not None:
        yield Order(f"{key} of the change", f"{IN_CHANGE}{why}", replace(claim, sft=sft, origin=base))


def _views(claim: Claimed, config: Mapping[str, Any] | None) -> Iterator[tuple[str, str, InOrder]]:
    """Yield orders of the parts of one tensor."""
    shape = claim.base.shape
    if len(shape) in (2, 3) and shape[-1] == shape[-2]:
        what = "each expert is transposed" if len(shape) == 3 else "it is transposed"
        yield "transposed", what, _turned
    for axis in range(1 if len(shape) == 3 else 0, len(shape)):
        size = shape[axis]
        if size % 2 == 0 and size >= 4:
            half = size // 2
            ways = {
                "its halves (gate and up) are exchanged": [*range(half, size), *range(half)],
                "its halves (gate and up) are interleaved": [i // 2 + half * (i % 2) for i in range(size)],
                "its halves (gate and up), interleaved in the claim, are one after the other": [
                    *range(0, size, 2),
                    *range(1, size, 2),
                ],
            }
            for why, order in ways.items():
                yield f"{why} {axis}", why, _rows(shape, axis, order)
        if any(each in claim.name for each in QKV) and (sizes := _sizes(size, config)):
            begins = [0, sizes[0], sizes[0] + sizes[1]]
            for way in permutations(range(3)):
                if way != (0, 1, 2):
                    order = [i for part in way for i in range(begins[part], begins[part] + sizes[part])]
                    names = ", ".join("qkv"[part] for part in way)
                    yield f"{names} {axis}", f"its parts are in the order {names}", _rows(shape, axis, order)


def _sizes(size: int, config: Mapping[str, Any] | None) -> tuple[int, int, int] | None:
    """Return the sizes of q, k and v in a fused projection."""
    heads, width = setting(config, "num_attention_heads"), setting(config, "hidden_size")
    of_keys, each = setting(config, "num_key_value_heads"), setting(config, "head_dim")
    if type(heads) is int and type(of_keys) is int and heads and type(width) is int:
        each = each if type(each) is int else width // heads
        if (heads + 2 * of_keys) * each == size:
            return heads * each, of_keys * each, of_keys * each
    return (size // 3, size // 3, size // 3) if size % 3 == 0 else None


def _rows(shape: Sequence[int], axis: int, order: Sequence[int]) -> InOrder:
    """Return the view of a tensor with the indices of one axis in another order."""
    inner = math.prod(shape[axis + 1 :])

    def view(role: str, tensor: Tensor) -> Tensor:
        return Rows(tensor.name, tensor.shape, tensor, role, inner, tuple(order))

    return view


def _turned(role: str, tensor: Tensor) -> Tensor:
    """Return a square matrix, or each of a stack, transposed."""
    if len(tensor.shape) == 3:
        return transposed(tensor, role)
    return Transposed(tensor.name, (1, *tensor.shape), tensor, role)  # a stack of one


def _neighbours(claim: Claimed, others: Mapping[str, Claimed]) -> Iterator[Order]:
    """Yield the claims of tensors of one shape in the same module, and of other experts."""
    module, end = _module_of(claim.name)
    kind, block = blanked(claim.name), claim.name.split(".experts.")[0]
    found = 0
    for name, other in others.items():
        if name == claim.name or other.base.shape != claim.base.shape:
            continue
        its_module, its_end = _module_of(name)
        if its_module == module and its_end.split(".")[-1] == end.split(".")[-1] and found < NEIGHBOURS:
            found += 1
            key, why = f"as {its_end}", f"{_short(end)}{HOLDS}{_short(its_end)}"
        elif ".experts." in name and blanked(name) == kind and name.split(".experts.")[0] == block:
            key, why = "experts", "the experts are in another order"
        else:
            continue
        moved = replace(claim, base=other.base, base_role=other.base_role, sft=other.sft, is_delta=other.is_delta)
        yield Order(key, why, moved)
        if other.sft is not None:
            change = replace(claim, sft=other.sft, is_delta=other.is_delta, origin=other.base)
            yield Order(f"{key}, the change", f"{IN_CHANGE}{why}", change)


def _module_of(name: str) -> tuple[str, str]:
    """Return the module around a linear layer, and the layer's own name with its parameter."""
    parts = name.split(".")
    keep = 2 if parts[-1] in ("weight", "bias") else 1
    return ".".join(parts[:-keep]), ".".join(parts[-keep:])


def _short(end: str) -> str:
    return end.removesuffix(".weight")


def _order_of_experts(claim: Claimed, first_of: Callable[..., Any]) -> tuple[int, ...] | None:
    """Return which expert each stored one is, by the first elements of each; None if it is the same, or unclear."""
    experts, inner = claim.base.shape[0], math.prod(claim.base.shape[1:])
    count = min(inner, SAMPLED)
    pairs = [first_of(claim, expert * inner, count) for expert in range(experts)]
    stored, claimed = (np.stack([pair[i] for pair in pairs]).astype(np.float64) for i in (0, 1))
    distance = (
        (stored**2).sum(1)[:, None] - 2 * stored @ claimed.T + (claimed**2).sum(1)[None, :]
    )  # squared, of each stored one from each claimed one
    order = tuple(int(i) for i in distance.argmin(1))
    return order if len({*order}) == experts and order != tuple(range(experts)) else None
