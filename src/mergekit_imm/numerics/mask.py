"""The mask, version 1: which elements DARE keeps, and how it rescales them.

An element is kept or dropped by (seed, iteration, tensor name, index in the whole row-major tensor) alone. This module
turns parameters into the integers that all implementations use: `reference` (torch), `numba_kernel`, `triton_kernel`.

The generator is Philox4x32-10 with counter (lo32(c), hi32(c), 0, 0). For element e, with block b = e // 1024 and
r = e % 1024, the sixteen random bits are half r // 512 of word (r % 512) // 128 of counter c = 128*b + r % 128. The
layout is planar: a block is the halves of four words over 128 lanes, and every loop over it is contiguous. The element
is kept if its bits are < keep16.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..common.checks import as_number, is_integer, is_number
from ..errors import ArgumentError

BLOCK = 1024
COUNTERS = 128  # per block
KEEP_ALL = 65536

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_BUMPS = (0x9E3779B9, 0xBB67AE85)


def mask_key(name: str, seed: int = 0, iteration: int = 0) -> tuple[int, int]:
    """Return the Philox key (k0, k1) of one tensor in one iteration, two 32-bit words.

    >>> [hex(k) for k in mask_key("model.layers.0.mlp.up_proj.weight")]
    ['0x37734ecd', '0x6ff7e38a']
    """
    from hashlib import blake2b  # loads OpenSSL, which --help need not wait for

    digest = blake2b(f"{seed}\0{iteration}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def keep_threshold(drop: float) -> int:
    """Return keep16 = round((1 - drop) * 65536), at least 1; at 65536 nothing is dropped.

    >>> keep_threshold(0.9), keep_threshold(0.0)
    (6554, 65536)
    """
    return max(1, round((1 - check_drop(drop)) * KEEP_ALL))


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The constants one tensor is merged with; see `arithmetic`."""

    keep16: int
    scale: float
    scale32: float
    is_identity: bool
    alpha: float
    alpha32: float
    weight: float
    weight32: float
    is_delta: bool = False  # the sft side holds the delta, sft - start

    @property
    def uses_mask(self) -> bool:
        """Whether any element can be dropped, so that random bits are needed."""
        return self.keep16 < KEEP_ALL


def arithmetic(*, alpha: float, drop: float, factor: float = 1.0) -> Arithmetic:
    """Return the constants of the merge formula, in float64 and rounded once to float32.

    scale = factor * 65536 / keep16 divides by the realised keep rate, so DARE stays unbiased. `is_identity` means
    drop = 0 and factor = 1: tuned is the sft. Raises ArgumentError for values out of range.
    """
    import numpy as np

    keep16 = keep_threshold(drop)
    alpha = check_alpha(alpha)
    factor = check_factor(factor)
    scale = factor * KEEP_ALL / keep16
    if scale > float(np.finfo(np.float32).max):
        raise ArgumentError(f"factor {factor} / (1 - drop {drop}) does not fit in float32; use a smaller factor")
    return Arithmetic(
        keep16=keep16,
        scale=scale,
        scale32=float(np.float32(scale)),
        is_identity=drop == 0 and factor == 1,
        alpha=alpha,
        alpha32=float(np.float32(alpha)),
        weight=1 - alpha,
        weight32=float(np.float32(1 - alpha)),
    )


def check_alpha(alpha: float) -> float:
    """Return alpha, or raise ArgumentError unless 0 <= alpha <= 1."""
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha is {alpha!r:.60}; it is the weight of the base, a number in 0 <= alpha <= 1")
    return float(alpha)


def check_drop(drop: float) -> float:
    """Return drop, or raise ArgumentError unless 0 <= drop < 1."""
    if not is_number(drop) or not 0 <= drop < 1:
        raise ArgumentError(
            f"drop is {drop!r:.60}; it is the share of delta elements dropped, a number in 0 <= drop < 1"
            " (for no change at all use --alpha 1)"
        )
    return float(drop)


def check_factor(factor: float) -> float:
    """Return factor, or raise ArgumentError unless it is finite and >= 0."""
    factor = as_number(factor)
    if not is_number(factor) or not 0 <= factor <= sys.float_info.max:
        raise ArgumentError(f"factor is {factor!r:.60}; a layer factor is a finite number >= 0")
    return float(factor)


def check_seed(seed: int) -> int:
    """Return the seed, or raise ArgumentError unless it is an integer."""
    if not is_integer(seed):
        raise ArgumentError(f"seed is {seed!r:.60}; it must be an integer")
    return int(seed)


def check_iteration(iteration: int) -> int:
    """Return the iteration, or raise ArgumentError unless it is an integer >= 0."""
    if not is_integer(iteration) or iteration < 0:
        raise ArgumentError(f"iteration is {iteration!r:.60}; it must be an integer >= 0")
    return int(iteration)


def check_round(seed: int, iteration: int) -> None:
    """Raise ArgumentError unless seed is an integer and iteration one >= 0."""
    check_seed(seed)
    check_iteration(iteration)
