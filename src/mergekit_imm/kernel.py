"""The merge formula on raw bytes, compiled by numba: what a streaming worker runs, with the GIL released.

It works on blocks of 1024 elements, in tiles that stay in the L1 cache, in steps that are functions of their own:
random numbers (`_fill`), decoding (one per dtype), the arithmetic (`_tune`, `_interpolate`), encoding (one per
dtype), sums (`_measure`). Each is a run of straight loops over contiguous arrays that do not overlap, so that every
one vectorises; the random numbers alone would take all the registers of a loop that did everything. Adding a dtype is
adding its two functions.

No operation is contracted or reassociated (numba's default), so the bits are those of `flat.merge_flat`.

All jitted functions stand in this one file: numba's cache looks at the file of the function it calls first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from .mask import BLOCK, KEEP_ALL, LANES, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, Arithmetic

# dtype codes of safetensors headers -> codes in here
CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
_BF16, _F16, _F32, _F64 = range(4)

# Fields of a record: what is kept of every 2^20 elements of a tensor.
DELTA, BASE, CHANGE, LARGEST, KEPT = range(5)
RECORD_FIELDS = 5

_notices: list[str] = []


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only install and no writable home: compile in memory, each run anew
        if not _notices:
            _notices.append(
                "note: no folder to cache the compiled kernel in (a few seconds per run);"
                " set NUMBA_CACHE_DIR to a writable one"
            )
            print(_notices[0], file=sys.stderr)
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]


_M0, _M1 = (np.uint64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (np.uint32(x) for x in PHILOX_BUMPS)
_U16, _U32 = np.uint64(16), np.uint64(32)
_LOW16 = np.uint32(0xFFFF)


@_jit
def _fill(block, key0, key1, bits):  # type: ignore[no-untyped-def]
    """Sixteen random bits for each element of a block."""
    for j in range(LANES):
        counter = np.uint64(block) * np.uint64(LANES) + np.uint64(j)
        c0, c1 = np.uint32(counter), np.uint32(counter >> _U32)
        c2, c3 = np.uint32(0), np.uint32(0)
        k0, k1 = np.uint32(key0), np.uint32(key1)
        for _ in range(PHILOX_ROUNDS):
            p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
            c0, c1, c2, c3 = (
                np.uint32(np.uint32(p1 >> _U32) ^ c1 ^ k0),
                np.uint32(p1),
                np.uint32(np.uint32(p0 >> _U32) ^ c3 ^ k1),
                np.uint32(p0),
            )
            k0, k1 = np.uint32(k0 + _B0), np.uint32(k1 + _B1)
        bits[j], bits[512 + j] = np.uint16(c0 & _LOW16), np.uint16(c0 >> np.uint32(16))
        bits[128 + j], bits[640 + j] = np.uint16(c1 & _LOW16), np.uint16(c1 >> np.uint32(16))
        bits[256 + j], bits[768 + j] = np.uint16(c2 & _LOW16), np.uint16(c2 >> np.uint32(16))
        bits[384 + j], bits[896 + j] = np.uint16(c3 & _LOW16), np.uint16(c3 >> np.uint32(16))


@_jit
def _decode_bf16(raw, tile):  # type: ignore[no-untyped-def]
    bits = tile.view(np.uint32)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)


@_jit
def _decode_f16(raw, tile):  # type: ignore[no-untyped-def]
    # Exponent and mantissa moved into place and multiplied by 2^112, which is exact, subnormals included.
    bits = tile.view(np.uint32)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i] & np.uint16(0x7FFF)) << np.uint32(13)
    for i in range(raw.size):
        tile[i] = tile[i] * np.float32(2.0**112)
    for i in range(raw.size):
        special = np.uint32(0x7F800000) if (raw[i] & np.uint16(0x7C00)) == np.uint16(0x7C00) else np.uint32(0)
        bits[i] = bits[i] | special | (np.uint32(raw[i] & np.uint16(0x8000)) << np.uint32(16))


@_jit
def _decode_f32(raw, tile):  # type: ignore[no-untyped-def]
    for i in range(raw.size):
        tile[i] = raw[i]


@_jit
def _decode(code, raw, first, count, tile):  # type: ignore[no-untyped-def]
    """Elements first..first+count of a buffer into a float32 tile, zeros behind them."""
    if code == _BF16:
        _decode_bf16(raw[2 * first : 2 * (first + count)].view(np.uint16), tile)
    elif code == _F16:
        _decode_f16(raw[2 * first : 2 * (first + count)].view(np.uint16), tile)
    else:
        _decode_f32(raw[4 * first : 4 * (first + count)].view(np.float32), tile)
    tile[count:] = np.float32(0)


@_jit
def _decode_wide(code, raw, first, count, narrow, tile):  # type: ignore[no-untyped-def]
    """The same into a float64 tile."""
    if code == _F64:
        values = raw[8 * first : 8 * (first + count)].view(np.float64)
        for i in range(count):
            tile[i] = values[i]
        tile[count:] = 0.0
    else:
        _decode(code, raw, first, count, narrow)
        for i in range(tile.size):
            tile[i] = np.float64(narrow[i])


@_jit
def _tune(start, sft, bits, keep16, scale, plain, tuned):  # type: ignore[no-untyped-def]
    if plain:
        for i in range(BLOCK):
            tuned[i] = sft[i]
    elif keep16 == KEEP_ALL:
        for i in range(BLOCK):
            tuned[i] = start[i] + (sft[i] - start[i]) * scale
    else:
        limit = np.uint16(keep16)
        for i in range(BLOCK):
            moved = start[i] + (sft[i] - start[i]) * scale
            tuned[i] = moved if bits[i] < limit else start[i]


@_jit
def _interpolate(base, tuned, alpha, weight, half):  # type: ignore[no-untyped-def]
    """In place: two arrays that may be one would keep the loops from being vectorised."""
    if weight == 0:
        for i in range(BLOCK):
            tuned[i] = base[i]
    elif alpha != 0 and weight < half:
        for i in range(BLOCK):
            tuned[i] = base[i] + weight * (tuned[i] - base[i])
    elif alpha != 0:
        for i in range(BLOCK):
            tuned[i] = tuned[i] - alpha * (tuned[i] - base[i])


@_jit
def _encode_bf16(tile, raw):  # type: ignore[no-untyped-def]
    bits = tile.view(np.uint32)
    for i in range(BLOCK):
        x = bits[i]
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        is_nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits[i] = np.uint32(0x7FC00000) if is_nan else rounded
    for i in range(raw.size):
        raw[i] = np.uint16(bits[i] >> np.uint32(16))


@_jit
def _encode_f16(tile, spare, raw):  # type: ignore[no-untyped-def]
    # Below 2^-14 adding 0.5 rounds to the grid of float16's subnormals; above, integers round the mantissa.
    bits, small = tile.view(np.uint32), spare.view(np.uint32)
    for i in range(BLOCK):
        small[i] = bits[i] & np.uint32(0x7FFFFFFF)
    for i in range(BLOCK):
        spare[i] = spare[i] + np.float32(0.5)
    for i in range(raw.size):
        x = bits[i]
        size = x & np.uint32(0x7FFFFFFF)
        sign = (x >> np.uint32(16)) & np.uint32(0x8000)
        half = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1)) - np.uint32(0x38000000)) >> (
            np.uint32(13)
        )
        half = small[i] - np.uint32(0x3F000000) if size < np.uint32(0x38800000) else half
        half = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else half
        raw[i] = np.uint16(0x7E00) if size > np.uint32(0x7F800000) else np.uint16(half | sign)
    _decode_f16(raw, tile)


@_jit
def _encode_f32(tile, raw):  # type: ignore[no-untyped-def]
    bits = tile.view(np.uint32)
    for i in range(raw.size):
        is_nan = (bits[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits[i] = np.uint32(0x7FC00000) if is_nan else bits[i]
        raw[i] = bits[i]


@_jit
def _encode(code, tile, spare, raw, first, count):  # type: ignore[no-untyped-def]
    """A tile into elements first..first+count of a buffer, rounded once; the tile takes the rounded values."""
    if code == _BF16:
        _encode_bf16(tile, raw[2 * first : 2 * (first + count)].view(np.uint16))
    elif code == _F16:
        _encode_f16(tile, spare, raw[2 * first : 2 * (first + count)].view(np.uint16))
    else:
        _encode_f32(tile, raw[4 * first : 4 * (first + count)].view(np.uint32))


@_jit
def _encode_wide(code, wide, tile, spare, raw, first, count):  # type: ignore[no-untyped-def]
    """The same from float64; to sixteen bits by way of round-to-odd, so that only one rounding counts."""
    if code == _F64:
        values = raw[8 * first : 8 * (first + count)].view(np.float64)
        for i in range(count):
            wide[i] = np.nan if wide[i] != wide[i] else wide[i]
            values[i] = wide[i]
        return
    bits = tile.view(np.uint32)
    for i in range(BLOCK):
        tile[i] = np.float32(wide[i])
        if code != _F32 and wide[i] == wide[i]:
            over = abs(np.float64(tile[i])) > abs(wide[i])
            lost = np.float64(tile[i]) != wide[i]
            bits[i] = (bits[i] - np.uint32(over)) | np.uint32(lost)
    _encode(code, tile, spare, raw, first, count)
    for i in range(BLOCK):
        wide[i] = np.float64(tile[i])


@_jit
def _sum_squares(tile, lanes):  # type: ignore[no-untyped-def]
    """Squares of a block summed in one fixed order: eight planes onto 128 lanes, then halves onto halves."""
    for j in range(LANES):
        x = np.float64(tile[j])
        total = x * x
        for plane in range(1, BLOCK // LANES):
            x = np.float64(tile[plane * LANES + j])
            total += x * x
        lanes[j] = total
    width = LANES // 2
    while width:
        for j in range(width):
            lanes[j] += lanes[j + width]
        width //= 2
    return lanes[0]


@_jit
def _measure(base, start, sft, merged, bits, keep16, count, spare, patterns, lanes, record):  # type: ignore[no-untyped-def]
    record[BASE] += _sum_squares(base, lanes)
    for i in range(BLOCK):
        spare[i] = sft[i] - start[i]
    record[DELTA] += _sum_squares(spare, lanes)
    for i in range(BLOCK):
        spare[i] = abs(merged[i] - base[i])
    record[CHANGE] += _sum_squares(spare, lanes)
    # The largest of floats >= 0 is that of their patterns as integers, which vectorises; a NaN is above them all.
    largest = patterns[0]
    for i in range(BLOCK):
        largest = max(largest, patterns[i])
    patterns[0] = largest
    if spare[0] > record[LARGEST] or spare[0] != spare[0]:
        record[LARGEST] = spare[0]
    if keep16 == KEEP_ALL:
        record[KEPT] += count
    else:
        limit, kept = np.uint16(keep16), np.uint16(0)
        for i in range(count):
            kept = np.uint16(kept + np.uint16(bits[i] < limit))
        record[KEPT] += kept


@_jit
def _run(  # type: ignore[no-untyped-def]
    base, base_code, start, start_code, sft, sft_code, out, out_code, alone, count, block,
    key0, key1, keep16, scale, plain, alpha, weight, record,
):  # fmt: skip
    bits = np.empty(BLOCK, np.uint16)
    x, z = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    y = x if alone else np.empty(BLOCK, np.float32)
    merged, spare = np.empty(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    lanes = np.empty(LANES, np.float64)
    for first in range(0, count, BLOCK):
        here = min(BLOCK, count - first)
        if keep16 < KEEP_ALL:
            _fill(block + first // BLOCK, key0, key1, bits)
        _decode(base_code, base, first, here, x)
        if not alone:
            _decode(start_code, start, first, here, y)
        _decode(sft_code, sft, first, here, z)
        _tune(y, z, bits, keep16, scale, plain, merged)
        _interpolate(x, merged, alpha, weight, np.float32(0.5))
        _encode(out_code, merged, spare, out, first, here)
        _measure(x, y, z, merged, bits, keep16, here, spare, spare.view(np.uint32), lanes, record)


@_jit
def _run_wide(  # type: ignore[no-untyped-def]
    base, base_code, start, start_code, sft, sft_code, out, out_code, alone, count, block,
    key0, key1, keep16, scale, plain, alpha, weight, record,
):  # fmt: skip
    bits = np.empty(BLOCK, np.uint16)
    x, z = np.empty(BLOCK), np.empty(BLOCK)
    y = x if alone else np.empty(BLOCK)
    merged, change, lanes = np.empty(BLOCK), np.empty(BLOCK), np.empty(LANES)
    narrow, spare = np.empty(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    for first in range(0, count, BLOCK):
        here = min(BLOCK, count - first)
        if keep16 < KEEP_ALL:
            _fill(block + first // BLOCK, key0, key1, bits)
        _decode_wide(base_code, base, first, here, narrow, x)
        if not alone:
            _decode_wide(start_code, start, first, here, narrow, y)
        _decode_wide(sft_code, sft, first, here, narrow, z)
        _tune(y, z, bits, keep16, scale, plain, merged)
        _interpolate(x, merged, alpha, weight, 0.5)
        _encode_wide(out_code, merged, narrow, spare, out, first, here)
        _measure(x, y, z, merged, bits, keep16, here, change, change.view(np.uint64), lanes, record)


Bytes = npt.NDArray[np.uint8]
Side = tuple[Bytes, str]  # raw elements, and their dtype as a safetensors header names it


def merge_span(
    base: Side,
    start: Side,
    sft: Side,
    out: Side,
    count: int,
    first: int,
    key: tuple[int, int],
    numbers: Arithmetic,
    record: npt.NDArray[np.float64],
) -> None:
    """Merge elements first..first+count of one tensor, and add what was seen to its record.

    `first` is a multiple of 1024; the buffers begin with element `first`. Bits: those of `flat.merge_flat`.
    """
    sides = [part for raw, dtype in (base, start, sft, out) for part in (raw, CODES[dtype])]
    exact = "F64" in (base[1], start[1], sft[1])
    constants: tuple[Any, ...] = (numbers.scale, numbers.plain, numbers.alpha, numbers.weight)
    if not exact:
        scale, alpha, weight = map(np.float32, (numbers.scale32, numbers.alpha32, numbers.weight32))
        constants = (scale, numbers.plain, alpha, weight)
    run = _run_wide if exact else _run
    run(*sides, start[0] is base[0], count, first // BLOCK, *key, numbers.keep16, *constants, record)


def is_finite(raw: Bytes, dtype: str) -> npt.NDArray[np.bool_]:
    """Return which elements of a buffer are neither NaN nor infinite."""
    bits, exponent = {
        "BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000),
        "F64": (np.uint64, 0x7FF0000000000000),
    }[dtype]  # fmt: skip
    return np.asarray((raw.view(bits) & bits(exponent)) != bits(exponent))
