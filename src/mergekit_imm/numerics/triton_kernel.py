"""The formula in one pass over GPU memory: `reference.merge_flat` as a Triton kernel, bit for bit.

A program takes a few blocks of 1024 elements. Each thread computes the random words of neighbouring counters and merges
their elements, which are neighbours in each of a block's eight planes. So memory access is contiguous, and threads
exchange nothing.

Triton comes with torch for CUDA. If it is missing or gives other bits, `fits` returns False and `reference` is used.
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

# Blocks and warps per program: each thread has 4 counters and moves 8 or 16 bytes at a time.
ROWS, WARPS = 4, 4
# For counts that are not a multiple of this, the compiler moves one element at a time.
_ALIGNED = 16

_one_at_a_time = threading.Lock()  # Triton's first launch of a kernel is not known to be thread-safe


def _jit(function: Callable[..., Any]) -> Any:
    # These vary from tensor to tensor; do not compile a kernel for special values of them.
    vary = {"first_tile", "key0", "key1", "keep16"} & set(function.__code__.co_varnames)
    return triton.jit(function, do_not_specialize=sorted(vary)) if triton else function


@_jit
def _load(base, start, sft, at, low, high, start_is_base: tl.constexpr):
    """Elements of base, start and sft; the compiler drops unused loads."""
    here = (at >= low) & (at < high)
    b = tl.load(base + at, mask=here)
    s = b if start_is_base else tl.load(start + at, mask=here)
    return b, s, tl.load(sft + at, mask=here)


@_jit
def _wide(x):
    """Widen an input to float32."""
    if x.dtype == tl.bfloat16:  # the high half of a float32
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@_jit
def _merged(inputs, word, constants, is_identity: tl.constexpr, uses_mask: tl.constexpr, mix: tl.constexpr):
    """The formula in float32; the high half of `word` holds the random bits."""
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
    """Round once, to nearest even, NaN to the canonical one; by hand where GPUs and compilers differ."""
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
    """Zeros in the thread layout of `x`, which the compiler folds only after it has chosen the layout."""
    bits = x.to(tl.uint32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.uint16, bitcast=True)
    return (bits.to(tl.uint64) >> 32).to(tl.uint32)


@_jit
def _words(tile, row, lane, none, key0, key1, rows: tl.constexpr):
    """Philox4x32-10 for the counters of a tile: four words each, in the thread layout of the zeros `none`."""
    counter = tile * (rows * 128)  # the whole tile shares the high word
    low, high = counter.to(tl.uint32) + (row * 128 + lane).to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox_impl(low + none, high + none, none, none, key0.to(tl.uint32), key1.to(tl.uint32))


@_jit
def _tile(count, before, rows: tl.constexpr):
    """The program, where its tile begins (the first may begin before the tensor), and the tile's range inside it."""
    program = tl.program_id(0).to(tl.int64)
    origin = program * (rows * 1024) - before
    low, high = tl.maximum(-origin, 0).to(tl.int32), tl.minimum(count - origin, rows * 1024).to(tl.int32)
    return program, origin, low, high


@_jit
def _merge(
    base,
    start,
    sft,
    out,
    count,
    before,
    first_tile,
    key0,
    key1,
    keep16,
    scale,
    alpha,
    weight,
    start_is_base: tl.constexpr,
    is_identity: tl.constexpr,
    uses_mask: tl.constexpr,
    mix: tl.constexpr,
    rows: tl.constexpr,
):
    """Merge `count` elements, beginning with element `before` of tile `first_tile`; a tile is `rows` blocks."""
    program, origin, low, high = _tile(count, before, rows)
    base, start, sft, out = base + origin, start + origin, sft + origin, out + origin
    row, lane = tl.arange(0, rows)[:, None], tl.arange(0, 128)[None, :]
    constants = (keep16.to(tl.uint32) << 16, scale, alpha, weight)
    w0, w1, w2, w3 = 0, 0, 0, 0
    for half in tl.static_range(2):
        # Load four planes before storing one, to keep more loads in flight.
        at = row * 1024 + lane + 512 * half
        x0 = _load(base, start, sft, at, low, high, start_is_base)
        x1 = _load(base, start, sft, at + 128, low, high, start_is_base)
        x2 = _load(base, start, sft, at + 256, low, high, start_is_base)
        x3 = _load(base, start, sft, at + 384, low, high, start_is_base)
        if uses_mask and half == 0:
            # In another layout than the elements, the words would have to go through shared memory.
            w0, w1, w2, w3 = _words(first_tile + program, row, lane, _nothing(x0[2]), key0, key1, rows)
        shift = 16 - 16 * half
        _store(out, at, low, high, _merged(x0, w0 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 128, low, high, _merged(x1, w1 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 256, low, high, _merged(x2, w2 << shift, constants, is_identity, uses_mask, mix))
        _store(out, at + 384, low, high, _merged(x3, w3 << shift, constants, is_identity, uses_mask, mix))


@_jit
def _keep(out, count, before, first_tile, key0, key1, keep16, rows: tl.constexpr):
    """Write which of `count` elements are kept, one byte each."""
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
    """Merge elements offset..offset+n of one tensor into `out`; call it only if `fits` accepts the tensors."""
    if constants.weight32 == 0:
        mix = "base"
    elif constants.alpha == 0:
        mix = "tuned"
    else:
        mix = "from base" if constants.weight32 < 0.5 else "from tuned"
    how = {
        "start_is_base": start.data_ptr() == base.data_ptr() and start.dtype == base.dtype,
        "is_identity": constants.is_identity,
        "uses_mask": constants.uses_mask,
        "mix": mix,
    }
    scalars = constants.scale32, constants.alpha32, constants.weight32
    for first, count in _parts(out.numel()):
        parts = [each[first : first + count] for each in (base, start, sft, out)]
        _launch(_merge, parts, key0, key1, constants.keep16, offset + first, scalars, how)


def keep_flat_fused(out: Tensor, keep16: int, key0: int, key1: int, offset: int) -> None:
    """Write which of elements offset..offset+n are kept into a flat bool tensor; keep16 < 65536."""
    for first, count in _parts(out.numel()):
        _launch(_keep, [out[first : first + count].view(torch.int8)], key0, key1, keep16, offset + first)


def _parts(count: int) -> list[tuple[int, int]]:
    """Split into (first, count) of the part that vectors move, and of the last few elements."""
    rest = count % _ALIGNED
    return [part for part in ((0, count - rest), (count - rest, rest)) if part[1]]


def _launch(
    kernel: Any,
    tensors: list[Tensor],
    key0: int,
    key1: int,
    keep16: int,
    offset: int,
    scalars: tuple[float, ...] = (),
    how: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    count = tensors[0].numel()
    first_tile, before = divmod(offset, ROWS * BLOCK)
    programs = -(-(before + count) // (ROWS * BLOCK))
    with torch.cuda.device_of(tensors[0]), _one_at_a_time:
        kernel[(programs,)](
            *tensors,
            count,
            before,
            first_tile,
            _signed(key0),
            _signed(key1),
            keep16,
            *scalars,
            **how,
            rows=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=False,  # else a multiply and an add become one operation, rounded once
        )


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word  # always int32 for Triton, so that one kernel serves all keys


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can handle tensors of one device: ordinary, contiguous, of at most 32 bits."""
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
    """Whether the kernel runs on a device and gives the bits of `reference`, tried on float32 of every exponent."""
    constants, low, high = arithmetic(alpha=0.3, drop=0.3), 0x7FFFFF, 0xFF800000
    words = torch.arange(3 * 4096, dtype=torch.int64, device=device).square().mul(2654435761).view(3, -1)
    bits = (words[0] & high) | (words & low)  # the three inputs share an exponent, so every rounding occurs
    base, start, sft = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    out = torch.empty_like(base)
    try:
        merge_flat_fused(base, start, sft, out, constants, 1, 2, 0)
        eager = merge_flat(base, start, sft, out.dtype, constants, 1, 2, 0)
        return torch.equal(out.view(torch.int32), eager.view(torch.int32))
    except Exception:  # no C compiler for Triton's launcher, an old GPU: fall back to torch
        return False
