"""Inner loops of computed tensors, compiled by numba: low-rank products, dequantisation, sparsifiers by magnitude.

BLAS is not used: its order of additions, and so its bits, depends on block shape and machine.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np

from numba import types

from ..numerics.mask import BLOCK, COUNTERS, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from ..numerics.numba_jit import by_type, inline, jit

TILE = BLOCK  # columns of a product at a time: they stay in the cache over k

_M0, _M1 = (np.uint64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (np.uint32(x) for x in PHILOX_BUMPS)
_32 = np.uint64(32)


# --- arrays of any dtype: uint16 stands for bfloat16, floats for themselves


@by_type
def _number(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


# --- adapters


@jit
def product(left, right, columns, scaling, first, out):
    """Fill `out` with elements of scaling * (left @ right) from `first` on, each a float32 sum from zero in k order.

    `right` is in tiles of columns, [tiles, k * TILE], so that the distance of its lines is a constant: with eight
    addresses that it cannot tell apart, the vectoriser gives up.
    """
    rank, end = left.shape[1], first + len(out)
    for row in range(first // columns, (end - 1) // columns + 1):
        for number in range(right.shape[0]):
            begin = row * columns + number * TILE
            low, high = max(first, begin), min(end, row * columns + min(columns, (number + 1) * TILE))
            if low < high:
                _dot(left[row], right[number, low - begin :], rank, scaling, out[low - first : high - first])


@jit
def _dot(factors, lines, rank, scaling, out):
    """Fill `out` with scaling * sum over k of factors[k] * lines[k * TILE + j], eight k at a time."""
    width, whole = len(out), rank - rank % 8
    for j in range(width):
        out[j] = np.float32(0)
    for k in range(0, whole, 8):
        some = lines[k * TILE :]
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        f4, f5, f6, f7 = factors[k + 4], factors[k + 5], factors[k + 6], factors[k + 7]
        for j in range(width):
            total = out[j] + f0 * some[j]
            total += f1 * some[TILE + j]
            total += f2 * some[2 * TILE + j]
            total += f3 * some[3 * TILE + j]
            total += f4 * some[4 * TILE + j]
            total += f5 * some[5 * TILE + j]
            total += f6 * some[6 * TILE + j]
            out[j] = total + f7 * some[7 * TILE + j]
    for k in range(whole, rank):
        factor, some = factors[k], lines[k * TILE :]
        for j in range(width):
            out[j] += factor * some[j]
    for j in range(width):
        out[j] = scaling * out[j]


@jit
def rescaled(left, right, columns, scaling, weight, magnitude, first, work, squares, out):
    """Fill `out` with elements of weight + scaling * (left @ right) from `first` on, each row rescaled to its magnitude.

    Norms are summed in float64, in row order: of eight rows at a time, as each addition waits for the one before.
    `work` holds eight rows, `squares` [8, columns] what the L1 cache takes of them.
    """
    end, some = first + len(out), squares.shape[1]
    for row in range(0, len(magnitude), 8):
        rows = min(8, len(magnitude) - row)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float64(0)
        for column in range(0, columns, some):
            width = min(some, columns - column)
            lines = right[column // TILE, column % TILE :]
            for i in range(rows):
                begin = i * columns + column
                _dot(left[row + i], lines, left.shape[1], scaling, work[begin : begin + width])
                _add_and_square(weight[row * columns + begin :], work[begin : begin + width], squares[i])
            for j in range(width):
                s0 += squares[0, j]
                s1 += squares[1, j]
                s2 += squares[2, j]
                s3 += squares[3, j]
                s4 += squares[4, j]
                s5 += squares[5, j]
                s6 += squares[6, j]
                s7 += squares[7, j]
        norms = squares[:, 0]  # not a tuple: its index would be checked
        norms[0], norms[1], norms[2], norms[3], norms[4], norms[5], norms[6], norms[7] = s0, s1, s2, s3, s4, s5, s6, s7
        for i in range(rows):
            factor = np.float32(magnitude[row + i] / np.float32(np.sqrt(norms[i])))
            begin = (row + i) * columns
            low, high = max(first, begin), min(end, begin + columns)
            if low < high:
                _scale(factor, work[i * columns + low - begin :], out[low - first : high - first])


@jit
def _add_and_square(weight, delta, squares):
    for j in range(len(delta)):
        value = _number(weight[j]) + delta[j]
        delta[j] = value
        squares[j] = np.float64(value) * np.float64(value)


@jit
def _scale(factor, values, out):
    for j in range(len(out)):
        out[j] = factor * values[j]


# --- FP8


@jit
def dequantize(codes, table, scales, begin, matrix, grid, block, first, out):
    """Fill `out` with elements of code matrices from `first` on: the code's value times the scale of its block.

    `scales` holds rows of scales from row `begin` on; each matrix has grid[0] rows.
    """
    rows, columns = matrix
    at = 0
    while at < len(out):
        line, column = (first + at) // columns, (first + at) % columns
        row, place = line // rows * grid[0] + line % rows // block[0] - begin, column // block[1]
        if block[1] == 1:
            width = min(columns - column, len(out) - at)
            for j in range(width):
                out[at + j] = table[codes[at + j]] * scales[row, column + j]
        else:
            width = min((place + 1) * block[1] - column, columns - column, len(out) - at)
            factor = scales[row, place]
            for j in range(at, at + width):
                out[j] = table[codes[j]] * factor
        at += width


# --- sparsifiers by magnitude


@jit
def count_digits(bits, prefix, shift, counts):
    """Histogram the sixteen bits above `shift` of the numbers whose higher bits equal `prefix`."""
    for i in range(len(bits)):
        high = np.uint64(bits[i]) >> np.uint64(shift)
        if high >> np.uint64(16) == np.uint64(prefix):
            counts[high & np.uint64(0xFFFF)] += 1


@jit
def random_bits(first, key0, key1, out):
    """Fill `out` with the sixteen random bits of elements `first` on (see `numerics.mask`)."""
    e = 0
    while e < len(out):
        at = first + e
        block, inside = at // BLOCK, at % BLOCK
        word, lane = (inside % (4 * COUNTERS)) // COUNTERS, inside % COUNTERS
        shift = np.uint32(16 * (inside // (4 * COUNTERS)))
        run = min(COUNTERS - lane, len(out) - e)  # one word and one half
        for j in range(run):
            counter = np.uint64(COUNTERS * block + lane + j)
            c0, c1, c2, c3 = np.uint32(counter), np.uint32(counter >> _32), np.uint32(0), np.uint32(0)
            k0, k1 = np.uint32(key0), np.uint32(key1)
            for _ in range(PHILOX_ROUNDS):
                p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
                c0, c1 = np.uint32(np.uint32(p1 >> _32) ^ c1 ^ k0), np.uint32(p1)
                c2, c3 = np.uint32(np.uint32(p0 >> _32) ^ c3 ^ k1), np.uint32(p0)
                k0, k1 = np.uint32(k0 + _B0), np.uint32(k1 + _B1)
            chosen = c0 if word == 0 else c1 if word == 1 else c2 if word == 2 else c3
            out[e + j] = np.uint16(chosen >> shift)
        e += run


@jit
def drop_ranked(delta, order, bits, keep16, scale):
    """Drop elements of one row, ranked by `order`, smallest first; dropped ones become -0.0.

    NaN and infinity are kept. A delta of -0.0 becomes 0.0, so that -0.0 marks what was dropped.
    """
    for rank in range(len(order)):
        i = order[rank]
        if not np.isfinite(delta[i]):
            continue
        if np.uint32(bits[i]) < keep16[rank]:
            delta[i] = delta[i] * scale[rank] + delta.dtype.type(0)
        else:
            delta[i] = -delta.dtype.type(0)
