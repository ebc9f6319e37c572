"""Inner loops of computed tensors, compiled by numba: low-rank products, dequantisation, sparsifiers by magnitude.

BLAS is not used: its order of additions, and so its bits, depends on block shape and machine.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np
from numba import types

from ..numerics.cpu import PAIRS
from ..numerics.mask import BLOCK, COUNTERS
from ..numerics.numba_jit import by_type, inline, jit
from ..numerics.numba_kernel import fill

TILE = BLOCK  # columns of a product at a time: they stay in the cache over k

_HALF = np.uint32(16)


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
    """Fill `out` with elements of weight + scaling * (left @ right) from `first` on, each row with a given norm.

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


@by_type
def _subtract(values, start, first):
    """Subtract elements of the start from `first` on from values; None means that these are a delta."""
    if start == types.none:
        return lambda values, start, first: None

    def subtract(values, start, first):
        some = start[first : first + len(values)]  # with start[first + j], numba would check for negative indices
        for j in range(len(values)):
            values[j] = values[j] - _number(some[j])

    return subtract


@jit
def _difference(sft, start, first, values):
    """Fill `values` with elements of sft - start from `first` on, each rounded once."""
    some = sft[first : first + len(values)]
    for j in range(len(values)):
        values[j] = _number(some[j])
    _subtract(values, start, first)


@by_type
def _magnitude(x):
    """The bits of a float without the sign: integers that order floats by magnitude, NaN last."""
    if x == types.float32:
        return lambda x: np.uint32(np.float32(x).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return lambda x: np.uint64(np.float64(x).view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))


@jit
def count_magnitudes(sft, start, low, shift, values, bits, counts, below):
    """Count the magnitudes of a delta, as integers: those under `low`, and the others by (magnitude - low) >> shift.

    Those beyond the last count are left out. The rows of `counts`, one or two, are to be added up: where many are
    equal, an element waits for the count of the one before. `values` and `bits` are scratch that fits the L1 cache.
    """
    most, odd, kind = counts.shape[1], len(counts) - 1, bits.dtype.type
    for first in range(0, len(sft), len(values)):
        some = values[: min(len(values), len(sft) - first)]
        _difference(sft, start, first, some)
        under = np.uint32(0)
        for j in range(len(some)):
            size = _magnitude(some[j])
            under += np.uint32(size < low)
            bits[j] = kind(size - low) >> shift  # very large if under `low`
        below[0] += under
        for j in range(len(some)):
            if bits[j] < most:
                counts[j & odd, bits[j]] += np.uint32(1)


@jit
def keep_largest(sft, start, least, out):
    """Fill `out` with the delta where its magnitude, as an integer, is at least `least`, and with -0.0 elsewhere.

    A delta of -0.0 becomes 0.0, so that -0.0 marks what was dropped.
    """
    zero = out.dtype.type(0)
    for first in range(0, len(out), BLOCK):
        some = out[first : first + BLOCK]
        _difference(sft, start, first, some)
        for j in range(len(some)):
            some[j] = some[j] + zero if _magnitude(some[j]) >= least else -zero


@jit
def count_undropped(delta, total):
    """Count the elements of a sparsified delta that are not -0.0."""
    dropped = _bits(-delta.dtype.type(0))
    count = np.int64(0)
    for j in range(len(delta)):
        count += _bits(delta[j]) != dropped
    total[0] += count


@by_type
def _bits(x):
    if x == types.float32:
        return lambda x: np.float32(x).view(np.uint32)
    return lambda x: np.float64(x).view(np.uint64)


@jit
def random_bits(block, key0, key1, work, out):
    """Fill `out` with the sixteen random bits of the elements of whole blocks (see `numerics.mask`).

    `work` is float32 scratch, as of a merge: words of even counters, then of odd ones.
    """
    words = work.view(np.uint32)
    for first in range(0, len(out), BLOCK):
        fill(block + first // BLOCK, key0, key1, work)
        some = out[first : first + BLOCK]
        for word in range(4):
            low, high = some[COUNTERS * word :], some[COUNTERS * (4 + word) :]
            even = words[COUNTERS // 2 * word :]
            odd = words[PAIRS + COUNTERS // 2 * word :]
            for j in range(COUNTERS // 2):
                low[2 * j], low[2 * j + 1] = np.uint16(even[j]), np.uint16(odd[j])
                high[2 * j], high[2 * j + 1] = np.uint16(even[j] >> _HALF), np.uint16(odd[j] >> _HALF)


@jit
def drop_by_rank(sft, start, drawn, keep16, scale, keys, orders, most, counts, out):
    """Fill `out` with rows of the delta, in which elements are kept or dropped by their rank in magnitude.

    The element of rank r, smallest first, ties by index, is multiplied by scale[r] if its random bits are less than
    keep16[r], and else becomes -0.0; NaN and infinity are kept. A delta of -0.0 becomes 0.0. Ranks come from a radix
    sort of as many bits as tell the magnitudes of a row apart, at most `most` in a pass; the last pass needs no order.
    A pass runs through both halves of a row at once: an element waits for the count of the one before, if equal.
    """
    row, kind = len(keys), keys.dtype.type
    half = row // 2
    for first in range(0, len(out), row):
        values, bits = out[first : first + row], drawn[first : first + row]
        _difference(sft, start, first, values)
        width = _narrow(values, keys)
        passes = max(1, (width + most - 1) // most)
        digit = (width + passes - 1) // passes
        some, mask = counts[:, : 1 << digit], kind((1 << digit) - 1)
        for number in range(passes):
            source, target, shift = orders[number & 1], orders[(number & 1) ^ 1], kind(number * digit)
            if number == 0:
                for j in range(row):
                    source[j] = np.uint32(j)
            _begins(keys, source, half, shift, mask, some)
            low, high = some[0], some[1]
            if number < passes - 1:
                for j in range(half):
                    _place(source[j], keys, shift, mask, low, target)
                    _place(source[half + j], keys, shift, mask, high, target)
                if row & 1:
                    _place(source[row - 1], keys, shift, mask, high, target)
            else:
                for j in range(half):
                    _drop(source[j], keys, shift, mask, low, values, bits, keep16, scale)
                    _drop(source[half + j], keys, shift, mask, high, values, bits, keep16, scale)
                if row & 1:
                    _drop(source[row - 1], keys, shift, mask, high, values, bits, keep16, scale)


@inline
def _place(i, keys, shift, mask, counts, target):
    at = (keys[i] >> shift) & mask
    target[counts[at]] = i
    counts[at] += np.uint32(1)


@inline
def _drop(i, keys, shift, mask, counts, values, bits, keep16, scale):
    at = (keys[i] >> shift) & mask
    rank = counts[at]
    counts[at] = np.uint32(rank + np.uint32(1))
    x, zero = values[i], values.dtype.type(0)
    kept = x * scale[rank] + zero
    dropped = kept if bits[i] < keep16[rank] else -zero
    values[i] = dropped if _magnitude(x) < _magnitude(values.dtype.type(np.inf)) else x


@jit
def _narrow(values, keys):
    """Fill `keys` with small integers in the order of the magnitudes of values; return how many bits they have.

    Zero stays zero, the smallest of the others becomes one, and bits that are zero in all are left out.
    """
    kind = keys.dtype.type
    common, low = kind(0), ~kind(0)
    for j in range(len(values)):
        size = _magnitude(values[j])
        keys[j] = size
        common |= size
        low = min(low, size if size else ~kind(0))
    shift = kind(0)
    while common and not (common >> shift) & kind(1):
        shift += kind(1)
    less, largest = kind((low >> shift) - kind(1)), kind(0)
    for j in range(len(keys)):
        key = kind((keys[j] >> shift) - less) if keys[j] else kind(0)
        keys[j] = key
        largest = max(largest, key)
    width = 0
    while largest >> kind(width):
        width += 1
    return width


@jit
def _begins(keys, order, half, shift, mask, counts):
    """Fill `counts` with the place of the first key of each digit: in the first half of an order, and in the second."""
    counts[:] = np.uint32(0)
    low, high = counts[0], counts[1]
    for j in range(half):
        low[(keys[order[j]] >> shift) & mask] += np.uint32(1)
        high[(keys[order[half + j]] >> shift) & mask] += np.uint32(1)
    if len(keys) & 1:
        high[(keys[order[len(keys) - 1]] >> shift) & mask] += np.uint32(1)
    total = np.uint32(0)
    for at in range(counts.shape[1]):
        total, low[at] = np.uint32(total + low[at]), total
        total, high[at] = np.uint32(total + high[at]), total
