"""What computed tensors are made of, element by element, compiled by numba: products of matrices, codes times scales.

No BLAS: its order of additions, and so its bits, depends on the shape of the block and on the machine.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

import numpy as np

from .jit import jit

_TILE = 1024  # columns at a time: they stay in the L1 cache while k runs


@jit
def product(left, right, scaling, first, out):
    """Elements first.. of scaling * (left @ right), row by row: each a float32 sum over k, in order, from zero."""
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
    """Turn a delta into the weight with it, each row rescaled to its magnitude; norms are added up in float64."""
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
    """Elements first.. of matrices of codes, each the code's value times the scale of its block.

    `scales` are rows of scales, of which the first is row `begin` of all; each matrix has grid[0] of them.
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
