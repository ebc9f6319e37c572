"""The merge formula, compiled by numba: what `kernel` runs on blocks of 1024 elements, with the GIL released.

A pair of 16-bit elements is one 32-bit word, so that everything is done in 32-bit lanes: nothing is widened or
narrowed, and one pass over memory decodes, merges, rounds and measures (`_merge_pairs`). The random numbers have a
function of their own (`_fill`) that leaves a block's words in the L1 cache: their 64-bit products would take all the
registers of a loop that did everything, and halve its lanes. The layout of the mask fits: with the words of the even
counters beside those of the odd ones, the low halves belong to the first 256 pairs of a block, in order, and the high
halves to the others.

The type of an array says what it holds: pairs of bfloat16 are uint32, pairs of float16 int32; float32 and float64 are
themselves. `_pair` and `_put` are chosen by it when compiling: a dtype is one implementation of each. Inputs of
different dtypes are first decoded into tiles of a block (`_decode`).

No operation is contracted or reassociated (numba's default), so the bits are those of `flat.merge_flat`. Arrays that a
loop writes are few, because the vectoriser gives up where it must compare many addresses: words, sums and counts share
one, `work`.

All jitted functions stand in this one file: numba's cache looks at the file of the function it calls first.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from .mask import BLOCK, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from .sums import KEPT, LANES, LARGEST

_BF16, _F16, _F32, _F64 = range(4)  # codes of what `_decode` reads

_PAIRS = BLOCK // 4  # of half a block
_COUNTERS = BLOCK // 8

# `work`: the words of the even counters, word by word, those of the odd ones; then sums of delta, base and change.
# Sixteen apart, lest stores collide with later loads.
_ROW = _PAIRS + 16
_SUMS = 2 * _PAIRS + 16
WORK = _SUMS + 3 * _ROW

_u16, _u32, _u64, _f32, _f64 = np.uint16, np.uint32, np.uint64, np.float32, np.float64

_notices: list[str] = []


def _jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only install and no writable home: compile in memory, each run anew
        if not _notices:
            _notices.append(
                "note: no folder to cache the compiled kernel in (a few seconds per run);"
                " set NUMBA_CACHE_DIR to a writable one"
            )
            print(_notices[0], file=sys.stderr)
        return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop calls for each element: a call that is left standing costs the loop its vectors."""
    return _jit(function, forceinline=True)


def _chosen_by_type(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what returns the implementation of a function for the types of its arguments; inlined too."""
    return overload(function, jit_options={"forceinline": True})  # type: ignore[no-any-return]


# --- random numbers

_M0, _M1 = (_u64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (_u32(x) for x in PHILOX_BUMPS)


@_jit
def _fill(block, key0, key1, work):
    """The random words of a block's 128 counters: Philox4x32-10, two rounds of it simplified.

    The counters of a block differ in their low word alone, so the second round's first product is one for all.
    """
    counter = _u64(block) * _u64(_COUNTERS)
    low, high = _u32(counter), _u32(counter >> _u64(32))
    key0, key1 = _u32(key0), _u32(key1)
    common = _u64(high ^ key0) * _M0
    common_high, common_low = _u32(common >> _u64(32)), _u32(common)
    for odd in range(2):
        for j in range(_COUNTERS // 2):
            k0, k1 = _u32(key0 + _B0), _u32(key1 + _B1)
            p0 = _u64(_u32(low + _u32(2 * j + odd))) * _M0
            p1 = _u64(_u32(p0 >> _u64(32)) ^ key1) * _M1
            c0, c1, c2, c3 = _u32(p1 >> _u64(32)) ^ k0, _u32(p1), common_high ^ _u32(p0) ^ k1, common_low
            for _ in range(PHILOX_ROUNDS - 2):
                k0, k1 = _u32(k0 + _B0), _u32(k1 + _B1)
                p0, p1 = _u64(c0) * _M0, _u64(c2) * _M1
                c0, c1, c2, c3 = (
                    _u32(p1 >> _u64(32)) ^ c1 ^ k0,
                    _u32(p1),
                    _u32(p0 >> _u64(32)) ^ c3 ^ k1,
                    _u32(p0),
                )
            at = _PAIRS * odd + j
            work[at] = _held(_u32(c0), work[at])
            work[64 + at] = _held(_u32(c1), work[at])
            work[128 + at] = _held(_u32(c2), work[at])
            work[192 + at] = _held(_u32(c3), work[at])


def _held(word, like):
    """A word as the bits of a float, which is what `work` holds."""


@_chosen_by_type(_held)
def _held_as(word, like):
    if like == types.float32:
        return lambda word, like: _u32(word).view(_f32)
    return lambda word, like: _u64(word).view(_f64)


def _word(x):
    """The word that `_held` hid."""


@_chosen_by_type(_word)
def _word_in(x):
    if x == types.float32:
        return lambda x: _f32(x).view(_u32)
    return lambda x: _u32(_f64(x).view(_u64))


# --- decoding: one function for each dtype


@_inline
def _from_f16(half):
    # Exponent and mantissa moved into place and multiplied by 2^112, which is exact, subnormals included.
    size = _f32(_u32(_u32(_u32(half) & _u32(0x7FFF)) << _u32(13)).view(_f32) * _f32(2.0**112))
    special = _u32(0x7F800000) if _u32(_u32(half) & _u32(0x7C00)) == _u32(0x7C00) else _u32(0)
    return _u32(_u32(_u32(size.view(_u32)) | special) | _u32(_u32(_u32(half) & _u32(0x8000)) << _u32(16))).view(_f32)


def _pair(held, j):
    """Elements 2j and 2j+1 of a block."""


@_chosen_by_type(_pair)
def _pair_of(held, j):
    if held.dtype == types.uint32:  # bfloat16: the high half of a float32
        return lambda held, j: (
            _u32(_u32(held[j]) << _u32(16)).view(_f32),
            _u32(_u32(held[j]) & _u32(0xFFFF0000)).view(_f32),
        )
    if held.dtype == types.int32:
        return lambda held, j: (
            _from_f16(_u32(_u32(held[j]) & _u32(0xFFFF))),
            _from_f16(_u32(_u32(held[j]) >> _u32(16))),
        )
    return lambda held, j: (held[2 * j], held[2 * j + 1])


@_jit
def _decode(code, raw, tile):
    """A block of any dtype into a tile of float32 or float64."""
    if code == _BF16:
        halves = raw.view(_u16)
        for i in range(BLOCK):
            tile[i] = _u32(_u32(halves[i]) << _u32(16)).view(_f32)
    elif code == _F16:
        halves = raw.view(_u16)
        for i in range(BLOCK):
            tile[i] = _from_f16(halves[i])
    elif code == _F32:
        singles = raw.view(_f32)
        for i in range(BLOCK):
            tile[i] = singles[i]
    else:
        doubles = raw.view(_f64)
        for i in range(BLOCK):
            tile[i] = doubles[i]


# --- encoding: rounded once, to nearest even; a NaN becomes the canonical one


@_inline
def _to_bf16(x):
    """Rounded to bfloat16, as a float32's bits."""
    bits = _f32(x).view(_u32)
    rounded = _u32(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) & _u32(0xFFFF0000))
    return _u32(0x7FC00000) if x != x else rounded


@_inline
def _to_f16(x):
    """Rounded to float16, as its bits.

    Below 2^-14 adding 0.5 rounds to the grid of float16's subnormals; above, integers round the mantissa.
    """
    bits = _f32(x).view(_u32)
    size = _u32(bits & _u32(0x7FFFFFFF))
    half = _u32(_u32(size + _u32(0xFFF) + ((size >> _u32(13)) & _u32(1)) - _u32(0x38000000)) >> _u32(13))
    small = _u32(_f32(_u32(size).view(_f32) + _f32(0.5)).view(_u32) - _u32(0x3F000000))
    half = small if size < _u32(0x38800000) else half
    half = _u32(0x7C00) if size >= _u32(0x477FF000) else half
    return _u32(0x7E00) if x != x else _u32(half | _u32(_u32(bits >> _u32(16)) & _u32(0x8000)))


@_inline
def _to_f32(x):
    """Its bits."""
    return _u32(0x7FC00000) if x != x else _f32(x).view(_u32)


def _single(x):
    """A float32 that rounds on to 16 bits as `x` would: of a float64 towards zero, odd if anything was lost."""


@_chosen_by_type(_single)
def _single_of(x):
    if x == types.float32:
        return lambda x: x

    def to_odd(x):
        near = _f32(x)
        bits = _u32(near.view(_u32) - _u32(abs(_f64(near)) > abs(x)))
        odd = _u32(bits | _u32(_f64(near) != x))
        return _f32(x) if x != x else _u32(odd).view(_f32)

    return to_odd


def _put(held, j, even, odd):
    """Elements 2j and 2j+1 into a block; returns their rounded values."""


@_chosen_by_type(_put)
def _put_pair(held, j, even, odd):
    if held.dtype == types.uint32:

        def put(held, j, even, odd):
            e, o = _u32(_to_bf16(_single(even))), _u32(_to_bf16(_single(odd)))
            held[j] = _u32(o | _u32(e >> _u32(16)))
            return _u32(e).view(_f32), _u32(o).view(_f32)
    elif held.dtype == types.int32:

        def put(held, j, even, odd):
            e, o = _u32(_to_f16(_single(even))), _u32(_to_f16(_single(odd)))
            held[j] = np.int32(_u32(_u32(o << _u32(16)) | e))
            return _from_f16(e), _from_f16(o)
    elif held.dtype == types.float32:

        def put(held, j, even, odd):
            e, o = _u32(_to_f32(_f32(even))).view(_f32), _u32(_to_f32(_f32(odd))).view(_f32)
            held[2 * j], held[2 * j + 1] = e, o
            return e, o
    else:

        def put(held, j, even, odd):
            e = _f64(np.nan) if even != even else even
            o = _f64(np.nan) if odd != odd else odd
            held[2 * j], held[2 * j + 1] = e, o
            return e, o

    return put


# --- the arithmetic


def _choose(mask, one, other):
    """`one` where the mask is all ones, `other` where it is zero: a branch would cost the loop its vectors."""


@_chosen_by_type(_choose)
def _choose_bits(mask, one, other):
    if one == types.float32:
        return lambda mask, one, other: _u32(
            _u32(_f32(one).view(_u32) & mask) | _u32(_f32(other).view(_u32) & _u32(~mask))
        ).view(_f32)
    return lambda mask, one, other: _u64(
        _u64(_f64(one).view(_u64) & mask) | _u64(_f64(other).view(_u64) & _u64(~mask))
    ).view(_f64)


@_inline
def _merge_one(base, start, sft, kept, how):
    """Delta and merged value of one element; `how` is constant over a tensor."""
    scale, step, nothing, plain, from_base, at_end = how
    delta = sft - start
    tuned = start + delta * scale if kept else start
    tuned = _choose(plain, sft, tuned)
    anchor = _choose(from_base, base, tuned)
    return delta, anchor + _choose(at_end, nothing, step * (tuned - base))


def _pair_or(held, j, even, odd):
    """Elements 2j and 2j+1 of a block, or the ones given if there is no block."""


@_chosen_by_type(_pair_or)
def _pair_if_any(held, j, even, odd):
    if isinstance(held, types.NoneType):
        return lambda held, j, even, odd: (even, odd)
    return lambda held, j, even, odd: _pair(held, j)


def _cut(held, first, last):
    """A slice, if there is anything to slice."""


@_chosen_by_type(_cut)
def _cut_if_any(held, first, last):
    if isinstance(held, types.NoneType):
        return lambda held, first, last: None
    return lambda held, first, last: held[first:last]


def _size(x):
    """The bits of |x|: in their order, and a NaN above all."""


@_chosen_by_type(_size)
def _size_of(x):
    if x == types.float32:
        return lambda x: _u32(_f32(x).view(_u32) & _u32(0x7FFFFFFF))
    return lambda x: _u64(_f64(x).view(_u64) & _u64(0x7FFFFFFFFFFFFFFF))


@_inline
def _merge_pair(base, start, sft, out, j, even_kept, odd_kept, how):
    """Merge elements 2j and 2j+1 of a block; what is measured of both: squares added, and the larger change."""
    even, odd = _pair(base, j)
    even_start, odd_start = _pair_or(start, j, even, odd)
    even_sft, odd_sft = _pair(sft, j)
    even_delta, even_out = _merge_one(even, even_start, even_sft, even_kept, how)
    odd_delta, odd_out = _merge_one(odd, odd_start, odd_sft, odd_kept, how)
    even_out, odd_out = _put(out, j, even_out, odd_out)
    even_change, odd_change = even_out - even, odd_out - odd
    return (
        even_delta * even_delta + odd_delta * odd_delta,
        even * even + odd * odd,
        even_change * even_change + odd_change * odd_change,
        max(_size(even_change), _size(odd_change)),
        _u32(_u32(even_kept) + _u32(odd_kept)),
    )


@_jit
def _merge_block(base, start, sft, out, work, limit, how, tally):
    """Merge a block whose words stand in `work`; returns the largest change and how many were kept."""
    largest, kept = _size(how[2]), _u32(0)
    for i in range(_PAIRS):
        e, o = _u32(_word(work[i])), _u32(_word(work[_PAIRS + i]))
        low = _merge_pair(
            base, start, sft, out, i, _u32(e << _u32(16)) <= limit, _u32(o << _u32(16)) <= limit, how
        )  # fmt: skip
        high = _merge_pair(base, start, sft, out, _PAIRS + i, e <= limit, o <= limit, how)
        work[_SUMS + i] = low[0] + high[0]
        work[_SUMS + _ROW + i] = low[1] + high[1]
        work[_SUMS + 2 * _ROW + i] = low[2] + high[2]
        largest = max(largest, max(low[3], high[3]))
        kept = _u32(kept + _u32(low[4] + high[4]))
    for q in range(3):
        row = _SUMS + _ROW * q
        for i in range(128):
            work[row + i] += work[row + 128 + i]
        for i in range(64):
            work[row + i] += work[row + 64 + i]
        for i in range(32):
            work[row + i] += work[row + 32 + i]
        for i in range(LANES):
            tally[LANES * q + i] += _f64(work[row + i] + work[row + LANES + i])
    return largest, kept


def _value(bits):
    """The float that `_size` made bits of."""


@_chosen_by_type(_value)
def _value_of(bits):
    if bits == types.uint32:
        return lambda bits: _f64(_u32(bits).view(_f32))
    return lambda bits: _u64(bits).view(_f64)


@_jit
def _close(work, limit, largest, kept, count, tally):
    """Put the largest change and the count into a tally; the words are those of the last block."""
    change = _value(largest)
    if change > tally[LARGEST]:
        tally[LARGEST] = change
    last = count % BLOCK
    for r in range(last if last else BLOCK, BLOCK):  # what only fills the last block up
        counter, word = r % _COUNTERS, r // _COUNTERS
        bits = _u32(_word(work[_PAIRS * (counter % 2) + 64 * (word % 4) + counter // 2]))
        if word < 4:
            bits = _u32(bits << _u32(16))
        kept -= 1 if bits <= limit else 0
    tally[KEPT] += kept


@_jit
def run(base, start, sft, out, work, count, block, draws, key0, key1, limit, how, tally):
    """Merge blocks of one dtype, the last one filled up with zeros."""
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _size(how[2])
    size, size_out = len(base) // blocks, len(out) // blocks
    for b in range(blocks):
        if draws:
            _fill(block + b, key0, key1, work)
        i, o = size * b, size_out * b
        begin = _cut(start, i, i + size)
        most, some = _merge_block(
            base[i : i + size], begin, sft[i : i + size], out[o : o + size_out], work, limit, how, tally
        )
        largest, kept = max(largest, most), kept + some
    _close(work, limit, largest, kept, count, tally)


@_jit
def run_decoded(
    base, base_code, start, start_code, sft, sft_code, out, work, count, block, draws, key0, key1, limit, how, tally
):
    """The same for bytes of different dtypes, by way of tiles."""
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _size(how[2])
    size, size_start = len(base) // blocks, len(start) // blocks
    size_sft, size_out = len(sft) // blocks, len(out) // blocks
    x, y, z = np.empty(BLOCK, work.dtype), np.empty(BLOCK, work.dtype), np.empty(BLOCK, work.dtype)
    for b in range(blocks):
        if draws:
            _fill(block + b, key0, key1, work)
        _decode(base_code, base[size * b : size * (b + 1)], x)
        _decode(start_code, start[size_start * b : size_start * (b + 1)], y)
        _decode(sft_code, sft[size_sft * b : size_sft * (b + 1)], z)
        most, some = _merge_block(x, y, z, out[size_out * b : size_out * (b + 1)], work, limit, how, tally)
        largest, kept = max(largest, most), kept + some
    _close(work, limit, largest, kept, count, tally)
