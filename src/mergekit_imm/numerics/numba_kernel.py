"""The merge formula, compiled by numba: what `kernel` runs on blocks of 1024 elements, with the GIL released.

A pair of 16-bit elements is one 32-bit word, so that everything is done in 32-bit lanes: nothing is widened or
narrowed, and one pass over memory decodes, merges, rounds and measures (`_merge_block`). The random numbers have a
function of their own (`_fill`) that leaves a block's words in the L1 cache: their 64-bit products would take all the
registers of a loop that did everything, and halve its lanes. The layout of the mask fits: with the words of the even
counters beside those of the odd ones, the low halves belong to the first 256 pairs of a block, in order, and the high
halves to the others.

The type of an array says what it holds: pairs of bfloat16 are uint32, pairs of float16 int32; float32 and float64 are
themselves. `_pair` and `_put` are chosen by it when compiling: a dtype is one implementation of each. Rarer mixtures
of dtypes, of which there are hundreds, are first decoded into tiles of a block (`_decode`).

No operation is contracted or reassociated (numba's default), so the bits are those of `flat.merge_flat`. Words and sums
share an array, `work`: the vectoriser gives up where it must compare many addresses.

All of it stands in this one file: numba's cache looks at the file of the function it calls first.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np
from numba import types

from .mask import BLOCK, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from .numba_jit import by_type, inline, jit
from .statistics import KEPT, LANES, LARGEST

_BF16, _F16, _F32, _F64 = range(4)  # codes of what `_decode` reads
_PAIRS = BLOCK // 4  # of half a block
_COUNTERS = BLOCK // 8

# `work`: the words of the even counters, word by word, those of the odd ones; then sums of delta, base and change.
# Sixteen apart, lest stores collide with later loads.
_ROW = _PAIRS + 16
_SUMS = 2 * _PAIRS + 16
WORK = _SUMS + 3 * _ROW
FAST, CAREFUL, ADDED = 3, 6, 1  # numbers of a `how`: without and with what is rare; 1 more: sft is given as its delta
_u16, _u32, _u64, _f32, _f64 = np.uint16, np.uint32, np.uint64, np.float32, np.float64


# --- random numbers

_M0, _M1 = (_u64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (_u32(x) for x in PHILOX_BUMPS)


@jit
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
                c0, c2 = _u32(p1 >> _u64(32)) ^ c1 ^ k0, _u32(p0 >> _u64(32)) ^ c3 ^ k1
                c1, c3 = _u32(p1), _u32(p0)
            at = _PAIRS * odd + j
            work[at] = _held(_u32(c0), work[at])
            work[64 + at] = _held(_u32(c1), work[at])
            work[128 + at] = _held(_u32(c2), work[at])
            work[192 + at] = _held(_u32(c3), work[at])


@by_type
def _held(word, like):
    """A word as the bits of a float, which is what `work` holds."""
    if like == types.float32:
        return lambda word, like: _u32(word).view(_f32)
    return lambda word, like: _u64(word).view(_f64)


@by_type
def _word(x):
    """The word that `_held` hid."""
    if x == types.float32:
        return lambda x: _f32(x).view(_u32)
    return lambda x: _u32(_f64(x).view(_u64))


# --- decoding: one function for each dtype


@inline
def _from_f16(high):
    """A float16 in the high half of a word: exponent and mantissa moved into place, and multiplied by 2^112.

    That is exact, subnormals included; what then is at least 2^16 stood for an infinity or a NaN.
    """
    size = _f32(_u32(_u32(high & _u32(0x7FFF0000)) >> _u32(3)).view(_f32) * _f32(2.0**112))
    special = _u32(0x7F800000) if size >= _f32(65536) else _u32(0)
    return _u32(_u32(size.view(_u32) | special) | _u32(high & _u32(0x80000000))).view(_f32)


@by_type
def _pair(held, j):
    """Elements 2j and 2j+1 of a block."""
    if held.dtype == types.uint32:  # bfloat16: the high half of a float32
        return lambda held, j: (
            _u32(_u32(held[j]) << _u32(16)).view(_f32),
            _u32(_u32(held[j]) & _u32(0xFFFF0000)).view(_f32),
        )
    if held.dtype == types.int32:
        return lambda held, j: (
            _from_f16(_u32(_u32(held[j]) << _u32(16))),
            _from_f16(_u32(held[j])),
        )
    return lambda held, j: (held[2 * j], held[2 * j + 1])


@jit
def _decode(code, raw, tile):
    """A block of any dtype into a tile of float32 or float64."""
    halves = raw.view(_u16)
    if code == _BF16:
        for i in range(BLOCK):
            tile[i] = _u32(_u32(halves[i]) << _u32(16)).view(_f32)
    elif code == _F16:
        for i in range(BLOCK):
            tile[i] = _from_f16(_u32(_u32(halves[i]) << _u32(16)))
    elif code == _F32:
        tile[:] = raw.view(_f32)
    else:
        tile[:] = raw.view(_f64)
    return tile


# --- encoding: rounded once, to nearest even; a NaN becomes the canonical one


@by_type
def _unless_nan(x, how, bits, canonical):
    """Bits, or those of the canonical NaN if x is one: looked for when there is something to be careful about."""
    if len(how) <= FAST + ADDED:
        return lambda x, how, bits, canonical: bits
    return lambda x, how, bits, canonical: canonical if x != x else bits


@inline
def _to_bf16(x, how):
    """Rounded to bfloat16, as a float32's bits."""
    bits = _f32(x).view(_u32)
    rounded = _u32(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) & _u32(0xFFFF0000))
    return _unless_nan(x, how, rounded, _u32(0x7FC00000))


@inline
def _to_f16(x, how):
    """Rounded to float16: its bits, and its value as a float32's bits.

    Below 2^-14 adding 0.5 rounds to the grid of float16's subnormals; above, integers round the mantissa.
    """
    bits = _f32(x).view(_u32)
    size, sign = _u32(bits & _u32(0x7FFFFFFF)), _u32(bits & _u32(0x80000000))
    normal = _u32(_u32(size + _u32(0xFFF) + ((size >> _u32(13)) & _u32(1))) & _u32(0xFFFFE000))
    shifted = _f32(_u32(size).view(_f32) + _f32(0.5))
    tiny, huge = size < _u32(0x38800000), size >= _u32(0x477FF000)
    value = _f32(shifted - _f32(0.5)).view(_u32) if tiny else normal
    value = _u32(0x7F800000) if huge else value
    half = _u32(shifted.view(_u32) - _u32(0x3F000000)) if tiny else _u32(_u32(normal - _u32(0x38000000)) >> _u32(13))
    half = _u32(0x7C00) if huge else half
    return (
        _unless_nan(x, how, _u32(half | _u32(sign >> _u32(16))), _u32(0x7E00)),
        _unless_nan(x, how, _u32(value | sign), _u32(0x7FC00000)),
    )


@by_type
def _single(x):
    """A float32 that rounds on to 16 bits as `x` would: of a float64 towards zero, odd if anything was lost."""
    if x == types.float32:
        return lambda x: x

    def to_odd(x):
        near = _f32(x)
        bits = _u32(near.view(_u32) - _u32(abs(_f64(near)) > abs(x)))
        odd = _u32(bits | _u32(_f64(near) != x))
        return _f32(x) if x != x else _u32(odd).view(_f32)

    return to_odd


@by_type
def _put(held, j, even, odd, how):
    """Elements 2j and 2j+1 into a block; returns their rounded values."""
    if held.dtype == types.uint32:

        def put_bf16(held, j, even, odd, how):
            e, o = _u32(_to_bf16(_single(even), how)), _u32(_to_bf16(_single(odd), how))
            held[j] = _u32(o | _u32(e >> _u32(16)))
            return _u32(e).view(_f32), _u32(o).view(_f32)

        return put_bf16
    if held.dtype == types.int32:

        def put_f16(held, j, even, odd, how):
            (e, even_value), (o, odd_value) = _to_f16(_single(even), how), _to_f16(_single(odd), how)
            held[j] = np.int32(_u32(_u32(o << _u32(16)) | e))
            return _u32(even_value).view(_f32), _u32(odd_value).view(_f32)

        return put_f16
    kind = _f32 if held.dtype == types.float32 else _f64

    def put(held, j, even, odd, how):
        e, o = _unless_nan(even, how, kind(even), kind(np.nan)), _unless_nan(odd, how, kind(odd), kind(np.nan))
        held[2 * j], held[2 * j + 1] = e, o
        return e, o

    return put


# --- the arithmetic


@by_type
def _choose(mask, one, other):
    """`one` where the mask is all ones, `other` where it is zero: a branch would cost the loop its vectors."""
    if one == types.float32:
        return lambda mask, one, other: _u32(
            _u32(_f32(one).view(_u32) & mask) | _u32(_f32(other).view(_u32) & _u32(~mask))
        ).view(_f32)
    return lambda mask, one, other: _u64(
        _u64(_f64(one).view(_u64) & mask) | _u64(_f64(other).view(_u64) & _u64(~mask))
    ).view(_f64)


@by_type
def _merge_one(base, start, sft, kept, how):
    """Delta and merged value of one element; `how` is constant over a tensor."""

    def fast(base, start, sft, kept, how):
        delta, _ = _sides(start, sft, how)
        tuned = start + delta * how[0] if kept else start
        return delta, _choose(how[2], base, tuned) + how[1] * (tuned - base)

    def careful(base, start, sft, kept, how):
        scale, step, from_base, nothing, is_identity, at_end = how[:CAREFUL]
        delta, whole = _sides(start, sft, how)
        tuned = start + delta * scale if kept else start
        tuned = _choose(is_identity, whole, tuned)
        return delta, _choose(from_base, base, tuned) + _choose(at_end, nothing, step * (tuned - base))

    return fast if len(how) <= FAST + ADDED else careful


@by_type
def _sides(start, sft, how):
    """The delta, and the sft."""
    if len(how) in (FAST, CAREFUL):
        return lambda start, sft, how: (sft - start, sft)
    return lambda start, sft, how: (sft, start + sft)


@by_type
def _pair_or(held, j, even, odd):
    """Elements 2j and 2j+1 of a block, or the ones given if there is no block."""
    if isinstance(held, types.NoneType):
        return lambda held, j, even, odd: (even, odd)
    return lambda held, j, even, odd: _pair(held, j)


@by_type
def _cut(held, first, last):
    """A slice, if there is anything to slice."""
    if isinstance(held, types.NoneType):
        return lambda held, first, last: None
    return lambda held, first, last: held[first:last]


@by_type
def _order(x):
    """The bits of a float >= 0: as integers they are in the same order, and vectorise; a NaN is above all."""
    if x == types.float32:
        return lambda x: _f32(x).view(_u32)
    return lambda x: _f64(x).view(_u64)


@inline
def _merge_pair(base, start, sft, out, j, even_kept, odd_kept, how):
    """Merge elements 2j and 2j+1 of a block; what is measured of both: sums of squares, the larger change."""
    even, odd = _pair(base, j)
    even_start, odd_start = _pair_or(start, j, even, odd)
    even_sft, odd_sft = _pair(sft, j)
    even_delta, even_out = _merge_one(even, even_start, even_sft, even_kept, how)
    odd_delta, odd_out = _merge_one(odd, odd_start, odd_sft, odd_kept, how)
    even_out, odd_out = _put(out, j, even_out, odd_out, how)
    even_change, odd_change = even_out - even, odd_out - odd
    even_square, odd_square = even_change * even_change, odd_change * odd_change
    return (
        even_delta * even_delta + odd_delta * odd_delta,
        even * even + odd * odd,
        even_square + odd_square,
        max(_order(even_square), _order(odd_square)),
        _u32(_u32(even_kept) + _u32(odd_kept)),
    )


@inline
def _halve(work, n):
    for i in range(n):
        work[_SUMS + i] += work[_SUMS + n + i]
        work[_SUMS + _ROW + i] += work[_SUMS + _ROW + n + i]
        work[_SUMS + 2 * _ROW + i] += work[_SUMS + 2 * _ROW + n + i]


@jit
def _merge_block(base, start, sft, out, work, limit, how, largest, tally):
    """Merge a block whose words stand in `work`; returns the largest change so far and how many were kept."""
    kept = _u32(0)
    for i in range(_PAIRS):
        e, o = _u32(_word(work[i])), _u32(_word(work[_PAIRS + i]))
        e_low, o_low = _u32(e << _u32(16)) <= limit, _u32(o << _u32(16)) <= limit
        low = _merge_pair(base, start, sft, out, i, e_low, o_low, how)
        high = _merge_pair(base, start, sft, out, _PAIRS + i, e <= limit, o <= limit, how)
        work[_SUMS + i] = low[0] + high[0]
        work[_SUMS + _ROW + i] = low[1] + high[1]
        work[_SUMS + 2 * _ROW + i] = low[2] + high[2]
        largest = max(largest, max(low[3], high[3]))
        kept = _u32(kept + _u32(low[4] + high[4]))
    _halve(work, 128)
    _halve(work, 64)
    _halve(work, 32)
    _halve(work, 16)
    for i in range(LANES):
        tally[i] += _f64(work[_SUMS + i])
        tally[LANES + i] += _f64(work[_SUMS + _ROW + i])
        tally[2 * LANES + i] += _f64(work[_SUMS + 2 * _ROW + i])
    return largest, kept


@by_type
def _root(bits):
    """The root of what `_order` made bits of; that of a square is exact."""
    if bits == types.uint32:
        return lambda bits: _f64(np.sqrt(_u32(bits).view(_f32)))
    return lambda bits: np.sqrt(_u64(bits).view(_f64))


@jit
def _close(work, limit, largest, kept, count, tally):
    """Put the largest change and the count into a tally; the words are those of the last block."""
    change = _root(largest)
    tally[LARGEST] = change if change > tally[LARGEST] else tally[LARGEST]  # not a NaN
    for r in range((count - 1) % BLOCK + 1, BLOCK):  # what only fills the last block up
        counter, word = r % _COUNTERS, r // _COUNTERS
        bits = _u32(_word(work[_PAIRS * (counter % 2) + 64 * (word % 4) + counter // 2]))
        if word < 4:
            bits = _u32(bits << _u32(16))
        kept -= 1 if bits <= limit else 0
    tally[KEPT] += kept


@jit
def run(base, start, sft, out, work, count, block, uses_mask, key0, key1, limit, how, tally):
    """Merge blocks, each input as it is held, the last block filled up with zeros. A `start` of None is the base."""
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _order(work[0])
    size, size_sft, size_out = len(base) // blocks, len(sft) // blocks, len(out) // blocks
    for b in range(blocks):
        if uses_mask:
            _fill(block + b, key0, key1, work)
        bases, sfts = base[size * b : size * (b + 1)], sft[size_sft * b : size_sft * (b + 1)]
        starts, outs = _cut(start, size * b, size * (b + 1)), out[size_out * b : size_out * (b + 1)]
        largest, some = _merge_block(bases, starts, sfts, outs, work, limit, how, largest, tally)
        kept += some
    _close(work, limit, largest, kept, count, tally)


@jit
def run_decoded(
    base, base_code, start, start_code, sft, sft_code, start_is_base,
    out, work, count, block, uses_mask, key0, key1, limit, how, tally,
):  # fmt: skip
    """The same for bytes of different dtypes, by way of tiles; a `start` that is the base is not decoded again."""
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _order(work[0])
    size, size_start = len(base) // blocks, len(start) // blocks
    size_sft, size_out = len(sft) // blocks, len(out) // blocks
    x, y, z = np.empty(BLOCK, work.dtype), np.empty(BLOCK, work.dtype), np.empty(BLOCK, work.dtype)
    for b in range(blocks):
        if uses_mask:
            _fill(block + b, key0, key1, work)
        _decode(base_code, base[size * b : size * (b + 1)], x)
        _decode(sft_code, sft[size_sft * b : size_sft * (b + 1)], z)
        begin = x if start_is_base else _decode(start_code, start[size_start * b : size_start * (b + 1)], y)
        outs = out[size_out * b : size_out * (b + 1)]
        largest, some = _merge_block(x, begin, z, outs, work, limit, how, largest, tally)
        kept += some
    _close(work, limit, largest, kept, count, tally)
