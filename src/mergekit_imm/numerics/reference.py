"""The formula in torch, on flat pieces of tensors: readable, and compiles with torch.compile(fullgraph=True)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dtypes import MERGED, TORCH_NAMES, WHOLE
from .mask import (
    BLOCK,
    COUNTERS,
    PHILOX_BUMPS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    Arithmetic,
)

# Elements per chunk: fits a CPU's cache and the 64 MiB limit on temporaries.
CHUNK = 1 << 18

# Dtype in a safetensors header -> torch's.
DTYPES = {code: getattr(torch, name) for name, code in TORCH_NAMES.items() if code in (*MERGED, *WHOLE)}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}


def uniform16(like: Tensor, offset: int, count: int, key0: int, key1: int) -> Tensor:
    """Return the sixteen random bits of elements offset..offset+count, int64, on the device of `like`."""
    first, last = offset // BLOCK, (offset + count + BLOCK - 1) // BLOCK
    counter = torch.arange(first * COUNTERS, last * COUNTERS, dtype=torch.int64, device=like.device)
    low32 = 0xFFFFFFFF
    c0, c1 = counter & low32, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, but bits 32..63 equal those of the unsigned product.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low32) ^ c1 ^ key0,
            product1 & low32,
            ((product0 >> 32) & low32) ^ c3 ^ key1,
            product0 & low32,
        )
        key0, key1 = (key0 + PHILOX_BUMPS[0]) & low32, (key1 + PHILOX_BUMPS[1]) & low32
    words = torch.stack((c0, c1, c2, c3)).view(4, last - first, COUNTERS).permute(1, 0, 2)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # block, half, word, lane
    return halves.reshape(-1)[offset - first * BLOCK :][:count]


def merge_flat(
    base: Tensor,
    start: Tensor,
    sft: Tensor,
    out_dtype: torch.dtype,
    constants: Arithmetic,
    key0: int,
    key1: int,
    offset: int,
) -> Tensor:
    """Merge elements offset..offset+n of one tensor: 1-D inputs of n elements, 1-D output of `out_dtype`.

    With `constants.is_delta`, `sft` holds the delta.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, start.dtype, sft.dtype) else torch.float32
    exact = wide == torch.float64
    tuned = sft.to(wide)
    if constants.is_identity and constants.is_delta:
        tuned = start.to(wide) + tuned
    elif not constants.is_identity:
        begin = start.to(wide)
        delta = tuned if constants.is_delta else tuned - begin
        tuned = begin + delta * (constants.scale if exact else constants.scale32)
        if constants.uses_mask:
            kept = uniform16(base, offset, base.numel(), key0, key1) < constants.keep16
            tuned = torch.where(kept, tuned, begin)
    return round_to(_interpolate(base.to(wide), tuned, constants, exact), out_dtype)


def _interpolate(base: Tensor, tuned: Tensor, constants: Arithmetic, exact: bool) -> Tensor:
    # Multiply and add separately, each rounded: torch.lerp and add(alpha=) fuse them and give other bits.
    weight = constants.weight if exact else constants.weight32
    if weight == 0:
        return base
    if constants.alpha == 0:
        return tuned
    if weight < 0.5:
        return base + weight * (tuned - base)
    return tuned - (constants.alpha if exact else constants.alpha32) * (tuned - base)


def round_to(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 or float64 once, to nearest even; NaN becomes the canonical quiet NaN."""
    if wide.dtype == torch.float64:
        if dtype == torch.float64:
            return torch.where(wide.isnan(), torch.nan, wide)
        if dtype != torch.float32:
            wide = _round_to_odd(wide)
    if dtype == torch.float64:
        wide = wide.to(dtype)
        return torch.where(wide.isnan(), torch.nan, wide)
    bits = wide.to(dtype).view(_BITS[dtype])
    return torch.where(wide.isnan(), _QUIET_NAN[dtype], bits).view(dtype)


def _round_to_odd(wide: Tensor) -> Tensor:
    # Round to odd: float64 -> float32 towards zero, with the last bit set if inexact. A second rounding to 16 bits
    # then gives the same result as a single one.
    near = wide.to(torch.float32)
    bits = near.view(torch.int32) - (near.to(torch.float64).abs() > wide.abs()).to(torch.int32)
    lost = (near.to(torch.float64) != wide) & ~wide.isnan()
    return (bits | lost.to(torch.int32)).view(torch.float32)


def boxes(shape: Sequence[int]) -> Iterator[tuple[tuple[slice | int, ...], slice]]:
    """Cut a shape into boxes of at most CHUNK elements, consecutive in row-major order.

    Yields (index into the tensor, span of row-major positions). Works for any strides and copies one box at a time.
    """
    sizes = list(shape)
    inner = 1  # elements of one step along dimension `axis`
    axis = len(sizes)
    while axis > 0 and inner * sizes[axis - 1] <= CHUNK:
        axis -= 1
        inner *= sizes[axis]
    if inner == 0 or 0 in sizes:
        return
    if axis == 0:
        yield (), slice(0, inner)
        return
    step = max(1, CHUNK // inner)
    outer = [0] * (axis - 1)
    position = 0
    while True:
        for begin in range(0, sizes[axis - 1], step):
            end = min(begin + step, sizes[axis - 1])
            count = (end - begin) * inner
            yield (*outer, slice(begin, end)), slice(position, position + count)
            position += count
        for i in reversed(range(axis - 1)):
            outer[i] += 1
            if outer[i] < sizes[i]:
                break
            outer[i] = 0
        else:
            return


def in_box(tensor: Tensor, index: tuple[slice | int, ...]) -> Tensor:
    """Return a box of a tensor as a 1-D tensor in row-major order."""
    return tensor.detach()[index].reshape(-1)
