"""A naive reference of the merge, written from its formulas. It shares no code with the library, to test it.

Arrays are 1-D numpy arrays; bfloat16 is held as uint16 bit patterns. Dtypes are named as in safetensors headers:
BF16, F16, F32, F64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
HELD_AS: dict[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
QUIET_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}
M32 = 0xFFFFFFFF


# --- the mask


def philox4x32_10(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Return a Philox4x32-10 block (Salmon et al., 2011) of integers or uint64 arrays.

    Source: "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M32, (a >> 32) ^ c3 ^ k1, a & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def key_of(name: str, seed: int, iteration: int) -> tuple[int, int]:
    """Return the Philox key of a tensor in an iteration."""
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{name}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number & M32, number >> 32


def u16s(name: str, first: int, count: int, seed: int = 0, iteration: int = 0) -> Array:
    """Return the sixteen random bits of elements first..first+count."""
    elements = np.arange(first, first + count, dtype=np.uint64)
    block, r = np.divmod(elements, np.uint64(1024))
    half, word, lane = r // 512, (r % 512) // 128, r % 128
    c = 128 * block + lane
    words = np.stack(philox4x32_10((c & M32, c >> 32, 0 * c, 0 * c), key_of(name, seed, iteration)))
    bits: Array = np.take_along_axis(words, word[None].astype(np.intp), 0)[0] >> (16 * half) & 0xFFFF
    return bits


def keep16_of(drop: float) -> int:
    """Return keep16: an element is kept if its sixteen bits are below it."""
    return max(1, round((1 - drop) * 65536))


def naive_mask(
    name: str, first: int, count: int, drop: float, seed: int = 0, iteration: int = 0
) -> npt.NDArray[np.bool_]:
    """Return which of the elements first..first+count of a tensor DARE keeps, bool of shape (count,).

    >>> naive_mask("model.layers.0.mlp.up_proj.weight", 0, 8, 0.5).astype(int)
    array([1, 0, 0, 0, 1, 1, 0, 1])
    """
    keep16 = keep16_of(drop)
    if keep16 == 65536:
        return np.ones(count, bool)
    return u16s(name, first, count, seed, iteration) < keep16


# --- dtypes


def widen(values: Array, wide: Any) -> Array:
    """Decode to float32 or float64, exactly."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(wide)


def bfloat16_of(values: Array) -> Array:
    """Round float32 or float64 to the nearest bfloat16, ties to even, by comparing both neighbours."""
    size: Array = np.abs(widen(values, np.float64))
    # Every bfloat16 >= 0 in order; infinity counts as 2^128.
    grid = (np.arange(0x7F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    grid[-1] = 2.0**128
    above = np.clip(np.searchsorted(grid, size, side="left"), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    nearer_high = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    bits: Array = np.where(nearer_high, above, above - 1).astype(np.uint16)
    bits = np.where(size >= grid[-1], np.uint16(0x7F80), bits)
    bits = bits | np.where(np.signbit(values), 0x8000, 0).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(QUIET_NAN["BF16"]), bits).astype(np.uint16)


def narrow(values: Array, dtype: str) -> Array:
    """Round once, to nearest even; a NaN becomes the canonical quiet one."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            return bfloat16_of(values)
        rounded: Array = values.astype(HELD_AS[dtype])
    raw = rounded.view(f"u{rounded.itemsize}").copy()
    raw[np.isnan(rounded)] = QUIET_NAN[dtype]
    return raw.view(rounded.dtype)


# --- the merge


def naive_merge(
    base: Array,
    sft: Array,
    start: Array,
    out: str,
    *,
    alpha: float,
    drop: float,
    factor: float = 1.0,
    name: str = "",
    seed: int = 0,
    iteration: int = 0,
    first: int = 0,
    is_delta: bool = False,
) -> Array:
    """Return alpha * base + (1 - alpha) * (start + factor * DARE(sft - start)), rounded once to the dtype `out`.

    The arrays hold the elements of tensor `name` from `first` on. With `is_delta`, `sft` is the delta itself.

    >>> ones = np.ones(4, np.float32)
    >>> naive_merge(ones, 3 * ones, ones, "F32", alpha=0.5, drop=0.5, name="model.layers.0.mlp.up_proj.weight")
    array([3., 1., 1., 1.], dtype=float32)
    """
    wide: Any = np.float64 if np.float64 in (base.dtype, sft.dtype, start.dtype) else np.float32
    b, s, f = (widen(each, wide) for each in (base, start, sft))
    scale = wide((factor * 65536) / keep16_of(drop))
    weight, alpha_ = wide(1 - alpha), wide(alpha)
    with np.errstate(all="ignore"):
        if drop == 0 and factor == 1:
            tuned = s + f if is_delta else f
        else:
            moved = s + (f if is_delta else f - s) * scale
            tuned = np.where(naive_mask(name, first, len(b), drop, seed, iteration), moved, s)
        if weight == 0:
            merged = b
        elif alpha == 0:
            merged = tuned
        elif weight < 0.5:
            merged = b + weight * (tuned - b)
        else:
            merged = tuned - alpha_ * (tuned - b)
    return narrow(merged, out)


def add_to_tally(tally: Array, base: Array, start: Array, sft: Array, merged: Array, kept: Array) -> None:
    """Add the statistics of `numerics.statistics` to a tally of 50 numbers, in its order; `sft` is not a delta."""
    wide: Any = np.float64 if np.float64 in (base.dtype, start.dtype, sft.dtype) else np.float32
    base, start, sft, merged = (widen(each, wide) for each in (base, start, sft, merged))
    with np.errstate(all="ignore"):
        change = merged - base
        for which, values in enumerate((sft - start, base, change)):
            for first in range(0, len(values), 1024):
                block = np.zeros(1024, wide)
                block[: len(values[first : first + 1024])] = values[first : first + 1024]
                x = block * block
                s = [(x[2 * i] + x[2 * i + 1]) + (x[512 + 2 * i] + x[513 + 2 * i]) for i in range(256)]
                for half in (128, 64, 32, 16):
                    s = [s[i] + s[i + half] for i in range(half)]
                for j in range(16):
                    tally[16 * which + j] = tally[16 * which + j] + np.float64(s[j])
        for size in np.sqrt(change * change):
            if size > tally[48]:
                tally[48] = size
    tally[49] += int(kept.sum())
