"""Decorators for functions that numba compiles for `native.Loop`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
from numba.extending import overload

from .object_code import target

# numba compiles for the features that `target` names, unless the user has chosen others.
if numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = target()[1]

# Whether the CPU itself converts float16 to float32 and back: all of ARM's with 64 bits, and Intel's and AMD's of 2013.
HAS_FLOAT16 = platform.machine().lower() in ("aarch64", "arm64") or "+f16c" in target()[1].split(",")


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function at its first call: without the GIL, reference counts or checks of division."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=False, **options)(function)  # type: ignore[no-any-return]


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that loops call per element, always inlined: a call would prevent vectorisation."""
    return jit(function, forceinline=True)


def by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make an inlined function whose implementation `choose` picks by the types of its arguments."""

    def chosen(*_: Any) -> None:
        """Name the function in compiled code; numba calls what `choose` returns."""

    overload(chosen, jit_options={"forceinline": True})(choose)
    return chosen
