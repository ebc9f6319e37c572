"""The inner loop of models in memory whose elements lie in many short runs, compiled by numba."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
from __future__ import annotations

from ..numerics.numba_jit import jit


@jit
def copy_runs(source, source_at, target, target_at, counts, width):
    """Copy runs of elements of `width` bytes; places and counts are in elements."""
    for i in range(len(counts)):
        size, begin, end = counts[i] * width, source_at[i] * width, target_at[i] * width
        run, copy = source[begin : begin + size], target[end : end + size]
        for j in range(size):
            copy[j] = run[j]
