"""Inner loops of computed tensors, compiled by numba: low-rank products, dequantisation, sparsifiers by magnitude.

BLAS is not used: its order of additions, and so its bits, depends on block shape and machine.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np

from ..numerics.mask import BLOCK, COUNTERS, PHILOX_BUMPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS
from ..numerics.numba_jit import jit

_TILE = 1024  # columns at a time, to stay in the L1 cache over k
_M0, _M1 = (np.uint64(x) for x in PHILOX_MULTIPLIERS)
_B0, _B1 = (np.uint32(x) for x in PHILOX_BUMPS)
_32 = np.uint64(32)


@jit
def product(left, right, scaling, first, out):
    """Fill `out` with elements of scaling * (left @ right) from `first` on, each a float32 sum from zero in k order."""
    columns, count = right.shape[1], len(out)
    at = 0
    while at < count:
        row, column = (first + at) // columns, (first + at) % columns
        width = min(_TILE, columns - column, count - at)
        piece = out[at : at + width]
        piece[:] = np.float32(0)
        for k in range(right.shape[0]):
            factor, line = left[row, k], right[k, column : column + width]
            for j in range(width):
                piece[j] += factor * line[j]
        for j in range(width):
            piece[j] = scaling * piece[j]
        at += width


@jit
def rescale(weight, delta, magnitude):
    """Replace delta by weight + delta, each row rescaled to its magnitude; norms are summed in float64."""
    for i in range(len(weight)):
        total = np.float64(0)
        for j in range(weight.shape[1]):
            delta[i, j] = weight[i, j] + delta[i, j]
            total += np.float64(delta[i, j]) * np.float64(delta[i, j])
        factor = np.float32(magnitude[i] / np.float32(np.sqrt(total)))
        for j in range(weight.shape[1]):
            delta[i, j] = factor * delta[i, j]


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
