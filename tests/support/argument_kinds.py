"""A loop that shows what arguments arrive in compiled code."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from mergekit_imm.numerics.numba_jit import jit


@jit
def arrived(numbers, flag, nothing, matrix, pair, out):
    """Write what arrived into `out`, float64."""
    out[0] = numbers[0]
    out[1] = numbers[1][0]
    out[2] = numbers[1][1]
    out[3] = 1.0 if flag else 2.0
    out[4] = 3.0 if nothing is None else 4.0
    at = 5
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            out[at] = matrix[i, j]
            at += 1
    out[at] = pair[0] + pair[1]
    out[at + 1] = len(out)
