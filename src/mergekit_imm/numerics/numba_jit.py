"""Decorators for functions that numba compiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from numba.extending import overload

_notices: list[str] = []


# Let numba use 512-bit vectors, which LLVM avoids by default on CPUs where they were once slow. The setting affects all
# that the process compiles, so only our own commands ask for it.
if os.environ.get("MERGEKIT_IMM_WIDE_VECTORS") == "1" and numba.config.CPU_FEATURES is None:
    _features = llvmlite.binding.get_host_cpu_features()
    if _features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{_features.flatten()},-prefer-256-bit"


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function at its first call, without the GIL; keep it in numba's cache."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only install and no writable home: compile in memory in every run
        if not _notices:
            _notices.append(
                "note: no folder to cache the compiled kernel in (a few seconds per run);"
                " set NUMBA_CACHE_DIR to a writable one"
            )
            print(_notices[0], file=sys.stderr)
        return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that loops call per element, always inlined: a call would prevent vectorisation."""
    return jit(function, forceinline=True)


def by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make an inlined function whose implementation `choose` picks by the types of its arguments."""

    def chosen(*_: Any) -> None:
        """Name the function in compiled code; numba calls what `choose` returns."""

    overload(chosen, jit_options={"forceinline": True})(choose)
    return chosen
