"""The merge formula compiled by numba, on blocks of 1024 elements, with the GIL released.

A pair of 16-bit elements is one 32-bit word, so all work is in 32-bit lanes without widening or narrowing, and one pass
over memory decodes, merges, rounds and measures (`_merge_block`). Random words come from a separate function (`fill`),
which leaves a block's words in the L1 cache: in the same loop their 64-bit products would take all registers and halve
the lanes. The layout of the mask fits: with the words of even counters next to those of odd ones, the low halves belong
to the first 256 pairs of a block, in order, and the high halves to the rest.

An array's type tells its contents: uint32 for pairs of bfloat16, int32 for pairs of float16; float32 and float64 stand
for themselves. `_pair` and `_put` have one implementation per type, chosen at compile time. Rare mixtures of dtypes, of
which there are hundreds, are first decoded into tiles of one block (`_decode`).

Nothing is contracted or reassociated (numba's default), so the bits are those of `reference.merge_flat`. Words and sums
share one array, `work`, because the vectoriser gives up on comparing many addresses.

Called by `native.Loop`, so that numba is only imported to compile.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .cpu import PAIRS, ROW, SUMS
from .mask import BLOCK, COUNTERS, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from .numba_jit import HAS_FLOAT16, by_type, inline, jit
from .statistics import KEPT, LANES, LARGEST

_BF16, _F16, _F32, _F64 = range(4)  # dtype codes for `_decode`
# Lengths of `how`: the common constants, or also those for rare cases; DELTA more if the sft side holds the delta.
FAST, CAREFUL, DELTA = 3, 6, 1
_u16, _u32, _u64, _f32, _f64 = np.uint16, np.uint32, np.uint64, np.float32, np.float64


# --- random numbers

_M0, _M1 = (_u64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (_u32(x) for x in PHILOX_BUMPS)


@jit
def fill(block, key0, key1, work):
    """Write the random words of a block's 128 counters: Philox4x32-10, with the first two rounds simplified.

    A block's counters differ only in their low word, so they share the first product of the second round.
    """
    counter = _u64(block) * _u64(COUNTERS)
    low, high = _u32(counter), _u32(counter >> _u64(32))
    key0, key1 = _u32(key0), _u32(key1)
    common = _u64(high ^ key0) * _M0
    common_high, common_low = _u32(common >> _u64(32)), _u32(common)
    for odd in range(2):
        for j in range(COUNTERS // 2):
            k0, k1 = _u32(key0 + _B0), _u32(key1 + _B1)
            p0 = _u64(_u32(low + _u32(2 * j + odd))) * _M0
            p1 = _u64(_u32(p0 >> _u64(32)) ^ key1) * _M1
            c0, c1, c2, c3 = _u32(p1 >> _u64(32)) ^ k0, _u32(p1), common_high ^ _u32(p0) ^ k1, common_low
            for _ in range(PHILOX_ROUNDS - 2):
                k0, k1 = _u32(k0 + _B0), _u32(k1 + _B1)
                p0, p1 = _u64(c0) * _M0, _u64(c2) * _M1
                c0, c2 = _u32(p1 >> _u64(32)) ^ c1 ^ k0, _u32(p0 >> _u64(32)) ^ c3 ^ k1
                c1, c3 = _u32(p1), _u32(p0)
            at = PAIRS * odd + j
            work[at] = _as_float(_u32(c0), work[at])
            work[64 + at] = _as_float(_u32(c1), work[at])
            work[128 + at] = _as_float(_u32(c2), work[at])
            work[192 + at] = _as_float(_u32(c3), work[at])


@by_type
def _as_float(word, like):
    """Store a word in the bits of a float, for `work`."""
    if like == types.float32:
        return lambda word, like: _u32(word).view(_f32)
    return lambda word, like: _u64(word).view(_f64)


@by_type
def _as_word(x):
    """Get back the word that `_as_float` stored."""
    if x == types.float32:
        return lambda x: _f32(x).view(_u32)
    return lambda x: _u32(_f64(x).view(_u64))


# --- decoding: one function per dtype


@intrinsic
def _widen(_context, _word):
    """The float16 in the low half of a word, as float32: one instruction of the CPU."""

    def code(_context, builder, _signature, arguments):
        half = builder.bitcast(builder.trunc(arguments[0], ir.IntType(16)), ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def _narrow(_context, _x):
    """The bits of the float16 nearest to a float32."""

    def code(_context, builder, _signature, arguments):
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.zext(builder.bitcast(half, ir.IntType(16)), ir.IntType(32))

    return types.uint32(types.float32), code


@inline
def _shift_up(word):
    """Decode a float16: shift exponent and mantissa into place, and multiply by 2^112.

    Exact, also for subnormals. A result of at least 2^16 was an infinity or NaN.
    """
    high = _u32(_u32(word) << _u32(16))
    size = _f32(_u32(_u32(high & _u32(0x7FFF0000)) >> _u32(3)).view(_f32) * _f32(2.0**112))
    special = _u32(0x7F800000) if size >= _f32(65536) else _u32(0)
    return _u32(_u32(size.view(_u32) | special) | _u32(high & _u32(0x80000000))).view(_f32)


@inline
def _round_down(x):
    """Round a float32 to float16; returns its bits.

    Below 2^-14, adding 0.5 rounds to float16's subnormal grid; above, integer arithmetic rounds the mantissa.
    """
    bits = _f32(x).view(_u32)
    size, sign = _u32(bits & _u32(0x7FFFFFFF)), _u32(bits & _u32(0x80000000))
    normal = _u32(_u32(size + _u32(0xFFF) + ((size >> _u32(13)) & _u32(1))) & _u32(0xFFFFE000))
    shifted = _f32(_u32(size).view(_f32) + _f32(0.5))
    tiny, huge = size < _u32(0x38800000), size >= _u32(0x477FF000)
    half = _u32(shifted.view(_u32) - _u32(0x3F000000)) if tiny else _u32(_u32(normal - _u32(0x38000000)) >> _u32(13))
    half = _u32(0x7C00) if huge else half
    return _u32(half | _u32(sign >> _u32(16)))


# The low half of a word as float32, and the bits of a float32 as float16.
_from_f16, _to_f16_bits = (_widen, _narrow) if HAS_FLOAT16 else (_shift_up, _round_down)


@by_type
def _pair(elements, j):
    """Elements 2j and 2j+1 of a block."""
    if elements.dtype == types.uint32:  # bfloat16: the high half of a float32
        return lambda elements, j: (
            _u32(_u32(elements[j]) << _u32(16)).view(_f32),
            _u32(_u32(elements[j]) & _u32(0xFFFF0000)).view(_f32),
        )
    if elements.dtype == types.int32:
        return lambda elements, j: (
            _from_f16(_u32(elements[j])),
            _from_f16(_u32(_u32(elements[j]) >> _u32(16))),
        )
    return lambda elements, j: (elements[2 * j], elements[2 * j + 1])


@jit
def _decode(code, raw, tile):
    """Decode a block of any dtype into a tile of float32 or float64."""
    halves = raw.view(_u16)
    if code == _BF16:
        for i in range(BLOCK):
            tile[i] = _u32(_u32(halves[i]) << _u32(16)).view(_f32)
    elif code == _F16:
        for i in range(BLOCK):
            tile[i] = _from_f16(_u32(halves[i]))
    elif code == _F32:
        singles = raw.view(_f32)
        for i in range(BLOCK):
            tile[i] = singles[i]
    else:
        doubles = raw.view(_f64)
        for i in range(BLOCK):
            tile[i] = doubles[i]
    return tile


# --- encoding: round once, to nearest even; NaN becomes the canonical one


@by_type
def _unless_nan(x, how, bits, canonical):
    """`bits`, or `canonical` if x is NaN; only the careful path checks."""
    if len(how) <= FAST + DELTA:
        return lambda x, how, bits, canonical: bits
    return lambda x, how, bits, canonical: canonical if x != x else bits


@inline
def _to_bf16(x, how):
    """Round to bfloat16; returns the bits of the value as a float32."""
    bits = _f32(x).view(_u32)
    rounded = _u32(_u32(bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) & _u32(0xFFFF0000))
    return _unless_nan(x, how, rounded, _u32(0x7FC00000))


@inline
def _to_f16(x, how):
    """Round to float16; returns its bits, and the bits of its value as a float32."""
    half = _to_f16_bits(_f32(x))
    value = _f32(_from_f16(half)).view(_u32)
    return _unless_nan(x, how, half, _u32(0x7E00)), _unless_nan(x, how, value, _u32(0x7FC00000))


@by_type
def _single(x):
    """A float32 that rounds to 16 bits as `x` does: float64 is rounded to odd (see `reference.round_to`)."""
    if x == types.float32:
        return lambda x: x

    def to_odd(x):
        near = _f32(x)
        bits = _u32(near.view(_u32) - _u32(abs(_f64(near)) > abs(x)))
        odd = _u32(bits | _u32(_f64(near) != x))
        return _f32(x) if x != x else _u32(odd).view(_f32)

    return to_odd


@by_type
def _put(elements, j, even, odd, how):
    """Store elements 2j and 2j+1 of a block; returns their rounded values."""
    if elements.dtype == types.uint32:

        def put_bf16(elements, j, even, odd, how):
            e, o = _u32(_to_bf16(_single(even), how)), _u32(_to_bf16(_single(odd), how))
            elements[j] = _u32(o | _u32(e >> _u32(16)))
            return _u32(e).view(_f32), _u32(o).view(_f32)

        return put_bf16
    if elements.dtype == types.int32:

        def put_f16(elements, j, even, odd, how):
            (e, even_value), (o, odd_value) = _to_f16(_single(even), how), _to_f16(_single(odd), how)
            elements[j] = np.int32(_u32(_u32(o << _u32(16)) | e))
            return _u32(even_value).view(_f32), _u32(odd_value).view(_f32)

        return put_f16
    kind = _f32 if elements.dtype == types.float32 else _f64

    def put(elements, j, even, odd, how):
        e, o = _unless_nan(even, how, kind(even), kind(np.nan)), _unless_nan(odd, how, kind(odd), kind(np.nan))
        elements[2 * j], elements[2 * j + 1] = e, o
        return e, o

    return put


# --- the arithmetic


@by_type
def _choose(mask, one, other):
    """`one` where the mask is all ones, `other` where it is zero; a branch would prevent vectorisation."""
    if one == types.float32:
        return lambda mask, one, other: _u32(
            _u32(_u32(_f32(one).view(_u32) ^ _f32(other).view(_u32)) & mask) ^ _f32(other).view(_u32)
        ).view(_f32)
    return lambda mask, one, other: _u64(
        _u64(_u64(_f64(one).view(_u64) ^ _f64(other).view(_u64)) & mask) ^ _f64(other).view(_u64)
    ).view(_f64)


@by_type
def _merge_one(base, start, sft, kept, how):
    """Delta and merged value of one element; `how` is constant for a tensor."""

    def fast(base, start, sft, kept, how):
        delta, _ = _delta_and_sft(start, sft, how)
        tuned = start + delta * how[0] if kept else start
        return delta, _choose(how[2], base, tuned) + how[1] * (tuned - base)

    def careful(base, start, sft, kept, how):
        scale, step, from_base, nothing, is_identity, at_end = how[:CAREFUL]
        delta, whole = _delta_and_sft(start, sft, how)
        tuned = start + delta * scale if kept else start
        tuned = _choose(is_identity, whole, tuned)
        return delta, _choose(from_base, base, tuned) + _choose(at_end, nothing, step * (tuned - base))

    return fast if len(how) <= FAST + DELTA else careful


@by_type
def _delta_and_sft(start, sft, how):
    """The delta and the sft, whichever of them `sft` holds."""
    if len(how) in (FAST, CAREFUL):
        return lambda start, sft, how: (sft - start, sft)
    return lambda start, sft, how: (sft, start + sft)


@by_type
def _pair_or(elements, j, even, odd):
    """Elements 2j and 2j+1 of a block, or `even` and `odd` for an array of bytes, which stands for no block."""
    if elements.dtype == types.uint8:
        return lambda elements, j, even, odd: (even, odd)
    return lambda elements, j, even, odd: _pair(elements, j)


@by_type
def _order(x):
    """The bits of a float >= 0, which as integers have the same order (NaN highest) and vectorise."""
    if x == types.float32:
        return lambda x: _f32(x).view(_u32)
    return lambda x: _f64(x).view(_u64)


@inline
def _merge_pair(base, start, sft, out, j, even_kept, odd_kept, how):
    """Merge elements 2j and 2j+1 of a block; returns sums of squares, the larger change, and how many are kept."""
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
        work[SUMS + i] += work[SUMS + n + i]
        work[SUMS + ROW + i] += work[SUMS + ROW + n + i]
        work[SUMS + 2 * ROW + i] += work[SUMS + 2 * ROW + n + i]


@jit
def _merge_block(base, start, sft, out, work, limit, how, largest, tally):
    """Merge a block with the words in `work`; returns the largest change so far, and how many elements are kept."""
    kept = _u32(0)
    for i in range(PAIRS):
        e, o = _u32(_as_word(work[i])), _u32(_as_word(work[PAIRS + i]))
        e_low, o_low = _u32(e << _u32(16)) <= limit, _u32(o << _u32(16)) <= limit
        low = _merge_pair(base, start, sft, out, i, e_low, o_low, how)
        high = _merge_pair(base, start, sft, out, PAIRS + i, e <= limit, o <= limit, how)
        work[SUMS + i] = low[0] + high[0]
        work[SUMS + ROW + i] = low[1] + high[1]
        work[SUMS + 2 * ROW + i] = low[2] + high[2]
        largest = max(largest, max(low[3], high[3]))
        kept = _u32(kept + _u32(low[4] + high[4]))
    _halve(work, 128)
    _halve(work, 64)
    _halve(work, 32)
    _halve(work, 16)
    for i in range(LANES):
        tally[i] += _f64(work[SUMS + i])
        tally[LANES + i] += _f64(work[SUMS + ROW + i])
        tally[2 * LANES + i] += _f64(work[SUMS + 2 * ROW + i])
    return largest, kept


@by_type
def _root(bits):
    """The square root of a float given by `_order`; exact for a square."""
    if bits == types.uint32:
        return lambda bits: _f64(np.sqrt(_u32(bits).view(_f32)))
    return lambda bits: np.sqrt(_u64(bits).view(_f64))


@jit
def _close(work, limit, largest, kept, count, tally):
    """Add the largest change and the number of kept elements to a tally; `work` holds the last block's words."""
    change = _root(largest)
    tally[LARGEST] = change if change > tally[LARGEST] else tally[LARGEST]  # skips NaN
    for r in range((count - 1) % BLOCK + 1, BLOCK):  # do not count the padding of the last block
        counter, word = r % COUNTERS, r // COUNTERS
        bits = _u32(_as_word(work[PAIRS * (counter % 2) + 64 * (word % 4) + counter // 2]))
        if word < 4:
            bits = _u32(bits << _u32(16))
        kept -= 1 if bits <= limit else 0
    tally[KEPT] += kept


@by_type
def _number(block, b):
    """The number of the b-th block: `block` is the number of the first of a row of blocks, or an array of numbers."""
    if isinstance(block, types.Array):
        return lambda block, b: block[b]
    return lambda block, b: block + b


@jit
def merge_blocks(base, start, sft, out, work, count, block, uses_mask, key0, key1, limit, how, tally):
    """Merge blocks of typed arrays, the last block padded with zeros. `start` is empty bytes if it is the base."""
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _order(work[0])
    size, size_sft, size_out = len(base) // blocks, len(sft) // blocks, len(out) // blocks
    for b in range(blocks):
        if uses_mask:
            fill(_number(block, b), key0, key1, work)
        bases, sfts = base[size * b : size * (b + 1)], sft[size_sft * b : size_sft * (b + 1)]
        starts, outs = start[size * b : size * (b + 1)], out[size_out * b : size_out * (b + 1)]
        largest, some = _merge_block(bases, starts, sfts, outs, work, limit, how, largest, tally)
        kept += some
    _close(work, limit, largest, kept, count, tally)


@jit
def merge_decoded_blocks(
    base,
    base_code,
    start,
    start_code,
    sft,
    sft_code,
    start_is_base,
    out,
    work,
    tiles,
    count,
    block,
    uses_mask,
    key0,
    key1,
    limit,
    how,
    tally,
):
    """Like `merge_blocks`, for raw bytes of any dtypes, decoded into three tiles of a block.

    `start_is_base` leaves `start` unread.
    """
    blocks, kept, largest = (count + BLOCK - 1) // BLOCK, 0, _order(work[0])
    size, size_start = len(base) // blocks, len(start) // blocks
    size_sft, size_out = len(sft) // blocks, len(out) // blocks
    x, y, z = tiles[0], tiles[1], tiles[2]
    for b in range(blocks):
        if uses_mask:
            fill(_number(block, b), key0, key1, work)
        _decode(base_code, base[size * b : size * (b + 1)], x)
        _decode(sft_code, sft[size_sft * b : size_sft * (b + 1)], z)
        begin = x if start_is_base else _decode(start_code, start[size_start * b : size_start * (b + 1)], y)
        outs = out[size_out * b : size_out * (b + 1)]
        largest, some = _merge_block(x, begin, z, outs, work, limit, how, largest, tally)
        kept += some
    _close(work, limit, largest, kept, count, tally)
