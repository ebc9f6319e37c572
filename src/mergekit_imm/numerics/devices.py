"""The devices that a merge may compute on: each has a module with one function on bytes, and all give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Device:
    """A compute backend: a function that merges a piece, and one that allocates a worker's buffer."""

    merge: Callable[..., None]  # cpu.merge_span, or a function like it
    buffer: Callable[[int], npt.NDArray[np.uint8]]


def pick_device(name: str) -> Device:
    """Return the backend of a device: the compiled CPU kernel, or torch on a GPU. Raises ArgumentError."""
    if name == "cpu":
        from .cpu import merge_span

        return Device(merge_span, lambda nbytes: np.empty(nbytes, np.uint8))
    from .cuda import buffer, merge_span_on

    return Device(merge_span_on(name), buffer)
