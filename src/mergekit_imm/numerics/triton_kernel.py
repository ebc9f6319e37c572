"""The formula in one pass over a GPU's memory: `flat.merge_flat` as a Triton kernel, bit for bit.

A program takes a few blocks of 1024 elements. A thread computes the random words of some neighbouring counters and
merges the elements that belong to them: neighbours too, in each of a block's eight planes. So every access to memory
is contiguous, and no thread needs what another knows.

Triton comes with torch for CUDA. Without it, or where it gives other bits, `fits` says no and `flat` does the work.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .mask import BLOCK, Arithmetic, arithmetic
from .reference import merge_flat

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.bool)

# Blocks of a program, and its warps: each thread has 4 counters, and moves 8 or 16 bytes at a time.
ROWS, WARPS = 4, 4
# A count that is no multiple of this would make the compiler move one element at a time.
_ALIGNED = 16

_one_at_a_time = threading.Lock()  # what Triton does when a kernel is first used is not known to bear threads


def _jit(function: Callable[..., Any]) -> Any:
    # Numbers that vary from tensor to tensor: none of their values is worth a kernel of its own.
    vary = {"first_tile", "key0", "key1", "keep16"} & set(function.__code__.co_varnames)
    return triton.jit(function, do_not_specialize=sorted(vary)) if triton else function


@_jit
def _load(base, start, sft, at, low, high, start_is_base: tl.constexpr):
    """Elements of base, start and sft; the compiler drops what is not used."""
    here = (at >= low) & (at < high)
    b = tl.load(base + at, mask=here)
    s = b if start_is_base else tl.load(start + at, mask=here)
    return b, s, tl.load(sft + at, mask=here)


@_jit
def _wide(x):
    """An input in float32."""
    if x.dtype == tl.bfloat16:  # the high half of a float32
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@_jit
def _merged(inputs, word, constants, is_identity: tl.constexpr, uses_mask: tl.constexpr, mix: tl.constexpr):
    """The formula in float32; the random bits are the high half of `word`."""
    limit, scale, alpha, weight = constants
    base, start, tuned = _wide(inputs[0]), _wide(inputs[1]), _wide(inputs[2])
    if not is_identity:
        tuned = start + (tuned - start) * scale
        if uses_mask:
            tuned = tl.where(word < limit, tuned, start)
    if mix == "base":
        tuned = base
    elif mix == "from base":
        tuned = base + weight * (tuned - base)
    elif mix == "from tuned":
        tuned = tuned - alpha * (tuned - base)
    return tuned


@_jit
def _store(out, at, low, high, merged):
    """Round once, to nearest even, a NaN to the canonical one: by hand where GPUs and compilers differ."""
    if out.dtype.element_ty == tl.bfloat16:
        bits = merged.to(tl.uint32, bitcast=True)
        bits = tl.where(merged != merged, 0x7FC00000, bits + (0x7FFF + ((bits >> 16) & 1)))
        rounded = (bits >> 16).to(tl.uint16)
    elif out.dtype.element_ty == tl.float16:
        rounded = tl.where(merged != merged, 0x7E00, merged.to(tl.float16).to(tl.uint16, bitcast=True)).to(tl.uint16)
    else:
        rounded = tl.where(merged != merged, 0x7FC00000, merged.to(tl.uint32, bitcast=True))
    tl.store(out + at, rounded.to(out.dtype.element_ty, bitcast=True), mask=(at >= low) & (at < high))


@_jit
def _nothing(x):
    """Zeros, which only the compiler knows to be zeros once it has laid them out over the threads as `x` is."""
    bits = x.to(tl.uint32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.uint16, bitcast=True)
    return (bits.to(tl.uint64) >> 32).to(tl.uint32)


@_jit
def _words(tile, row, lane, none, key0, key1, rows: tl.constexpr):
    """Philox4x32-10 of the counters of a tile: four words for each, laid out as the zeros `none` are."""
    counter = tile * (rows * 128)  # its high word is that of the whole tile
    low, high = counter.to(tl.uint32) + (row * 128 + lane).to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox_impl(low + none, high + none, none, none, key0.to(tl.uint32), key1.to(tl.uint32))


@_jit
def _tile(count, before, rows: tl.constexpr):
    """Where the program's tile begins in the tensor (the first one perhaps before it), and its part inside."""
    program = tl.program_id(0).to(tl.int64)
    origin = program * (rows * 1024) - before
    low, high = tl.maximum(-origin, 0).to(tl.int32), tl.minimum(count - origin, rows * 1024).to(tl.int32)
    return program, origin, low, high


@_jit
def _merge(
    base, start, sft, out, count, before, first_tile, key0, key1, keep16, scale, alpha, weight,
    start_is_base: tl.constexpr, is_identity: tl.constexpr, uses_mask: tl.constexpr, mix: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    """Merge `count` elements, of which the first is number `before` of tile `first_tile`; a tile is `rows` blocks."""
    program, origin, low, high = _tile(count, before, rows)
    base, start, sft, out = base + origin, start + origin, sft + origin, out + origin
    row, lane = tl.arange(0, rows)[:, None], tl.arange(0, 128)[None, :]
    constants = (keep16.to(tl.uint32) << 16, scale, alpha, weight)
    w0, w1, w2, w3 = 0, 0, 0, 0
    for half in tl.static_range(2):
        # Four planes are read before one is written: so much more of memory is waited for at a time.
        at = row * 1024 + lane + 512 * half
        x0 = _load(base, start, sft, at, low, high, start_is_base)
        x1 = _load(base, start, sft, at + 128, low, high, start_is_base)
        x2 = _load(base, start, sft, at + 256, low, high, start_is_base)
        x3 = _load(base, start, sft, at + 384, low, high, start_is_base)
        if uses_mask and half == 0:
            # Words laid out otherwise than the elements would go through shared memory to them.
            w0, w1, w2, w3 = _words(first_tile + program, row, lane, _nothing(x0[2]), key0, key1, rows)
        shift = 16 - 16 * half
        _store(out, at, low, high, _merged(x0, w0 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 128, low, high, _merged(x1, w1 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 256, low, high, _merged(x2, w2 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 384, low, high, _merged(x3, w3 << shift, constants, is_identity, uses_mask, mix))


@_jit
def _keep(out, count, before, first_tile, key0, key1, keep16, rows: tl.constexpr):
    """Which of `count` elements are kept, a byte for each."""
    program, origin, low, high = _tile(count, before, rows)
    row, lane = tl.arange(0, rows)[:, None], tl.arange(0, 128)[None, :]
    none = tl.zeros((rows, 128), tl.uint32)
    w0, w1, w2, w3 = _words(first_tile + program, row, lane, none, key0, key1, rows)
    out, limit = out + origin, keep16.to(tl.uint32) << 16
    for half in tl.static_range(2):
        at, shift = row * 1024 + lane + 512 * half, 16 - 16 * half
        tl.store(out + at, (w0 << shift) < limit, mask=(at >= low) & (at < high))
        tl.store(out + at + 128, (w1 << shift) < limit, mask=(at + 128 >= low) & (at + 128 < high))
        tl.store(out + at + 256, (w2 << shift) < limit, mask=(at + 256 >= low) & (at + 256 < high))
        tl.store(out + at + 384, (w3 << shift) < limit, mask=(at + 384 >= low) & (at + 384 < high))


def merge_flat_fused(
    base: Tensor, start: Tensor, sft: Tensor, out: Tensor, constants: Arithmetic, key0: int, key1: int, offset: int
) -> None:
    """Merge elements offset..offset+n of one tensor into `out`: `flat.merge_flat` for tensors that `fits` allows."""
    if constants.weight32 == 0:
        mix = "base"
    elif constants.alpha == 0:
        mix = "tuned"
    else:
        mix = "from base" if constants.weight32 < 0.5 else "from tuned"
    how = {
        "start_is_base": start.data_ptr() == base.data_ptr() and start.dtype == base.dtype,
        "is_identity": constants.is_identity, "uses_mask": constants.uses_mask, "mix": mix,
    }  # fmt: skip
    scalars = constants.scale32, constants.alpha32, constants.weight32
    for first, count in _parts(out.numel()):
        parts = [each[first : first + count] for each in (base, start, sft, out)]
        _launch(_merge, parts, key0, key1, constants.keep16, offset + first, scalars, how)


def keep_flat_fused(out: Tensor, keep16: int, key0: int, key1: int, offset: int) -> None:
    """Write into a flat bool tensor which of elements offset..offset+n are kept; keep16 is less than 65536."""
    for first, count in _parts(out.numel()):
        _launch(_keep, [out[first : first + count].view(torch.int8)], key0, key1, keep16, offset + first)


def _parts(count: int) -> list[tuple[int, int]]:
    """(first, count) of what is moved by vectors, and of the last few elements."""
    rest = count % _ALIGNED
    return [part for part in ((0, count - rest), (count - rest, rest)) if part[1]]


def _launch(
    kernel: Any, tensors: list[Tensor], key0: int, key1: int, keep16: int, offset: int,
    scalars: tuple[float, ...] = (), how: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    count = tensors[0].numel()
    first_tile, before = divmod(offset, ROWS * BLOCK)
    programs = -(-(before + count) // (ROWS * BLOCK))
    with torch.cuda.device_of(tensors[0]), _one_at_a_time:
        kernel[(programs,)](
            *tensors, count, before, first_tile, _signed(key0), _signed(key1), keep16, *scalars, **how, rows=ROWS,
            num_warps=WARPS, enable_fp_fusion=False,  # else a multiply and an add become one operation, rounded once
        )  # fmt: skip


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word  # always an int32 to Triton, so that one kernel serves all keys


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can work on tensors of one device: plain, contiguous, of at most 32 bits."""
    return (
        triton is not None
        and torch.version.cuda is not None
        and all(
            type(x) in (Tensor, torch.nn.Parameter)
            and x.is_cuda
            and x.dtype in DTYPES
            and x.is_contiguous()
            and not x.is_neg()
            for x in tensors
        )
        and _agrees(tensors[0].device)
    )


@functools.cache
def _agrees(device: torch.device) -> bool:
    """Whether the kernel works on a device and gives the bits of `flat`, tried on float32 of every exponent."""
    constants, low, high = arithmetic(alpha=0.3, drop=0.3), 0x7FFFFF, 0xFF800000
    words = torch.arange(3 * 4096, dtype=torch.int64, device=device).square().mul(2654435761).view(3, -1)
    bits = (words[0] & high) | (words & low)  # of one exponent the three, so that every rounding is seen
    base, start, sft = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    out = torch.empty_like(base)
    try:
        merge_flat_fused(base, start, sft, out, constants, 1, 2, 0)
        eager = merge_flat(base, start, sft, out.dtype, constants, 1, 2, 0)
        return torch.equal(out.view(torch.int32), eager.view(torch.int32))
    except Exception:  # no C compiler for Triton's launcher, a GPU too old: whatever it is, there is another way
        return False
