"""Decorators of compiled functions: numba as this library uses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from numba.extending import overload

_notices: list[str] = []


# Let numba use the widest vectors of the CPU: LLVM avoids those of 512 bits on CPUs where they once were slow. It
# concerns all that this process compiles, so it is for a process of our own: the commands ask for it.
if os.environ.get("MERGEKIT_IMM_WIDE_VECTORS") == "1" and numba.config.CPU_FEATURES is None:
    _features = llvmlite.binding.get_host_cpu_features()
    if _features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{_features.flatten()},-prefer-256-bit"


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function when it is first called, to run without the GIL; kept in numba's cache."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only install and no writable home: compile in memory, each run anew
        if not _notices:
            _notices.append(
                "note: no folder to cache the compiled kernel in (a few seconds per run);"
                " set NUMBA_CACHE_DIR to a writable one"
            )
            print(_notices[0], file=sys.stderr)
        return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop calls for each element: a call that is left standing costs the loop its vectors."""
    return jit(function, forceinline=True)


def by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of which `choose` returns the implementation, given the types of its arguments; inlined too."""

    def chosen(*_: Any) -> None:
        """Stand for the function in compiled code."""

    overload(chosen, jit_options={"forceinline": True})(choose)
    return chosen
