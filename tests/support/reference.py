"""The contract written down naively, element by element, from the formulas; it shares no code with the library.

Arrays are numpy: bfloat16 as uint16 bit patterns, the other floats as they are.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
M32 = 0xFFFFFFFF


def philox4x32_10(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); of numbers, or of arrays of uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M32, (a >> 32) ^ c3 ^ k1, a & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c0, c1, c2, c3


def key_of(name: str, seed: int, iteration: int) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{name}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number & M32, number >> 32


def u16(name: str, element: int, seed: int = 0, iteration: int = 0) -> int:
    return int(u16s(name, element, 1, seed, iteration)[0])


def u16s(name: str, first: int, count: int, seed: int = 0, iteration: int = 0) -> Array:
    elements = np.arange(first, first + count, dtype=np.uint64)
    block, r = np.divmod(elements, np.uint64(1024))
    half, word, lane = r // 512, (r % 512) // 128, r % 128
    c = 128 * block + lane
    words = np.stack(philox4x32_10((c & M32, c >> 32, 0 * c, 0 * c), key_of(name, seed, iteration)))
    found: Array = np.take_along_axis(words, word[None].astype(np.intp), 0)[0] >> (16 * half) & 0xFFFF
    return found


def keep16_of(drop: float) -> int:
    return max(1, round((1 - drop) * 65536))


def mask(name: str, first: int, count: int, drop: float, seed: int = 0, iteration: int = 0) -> npt.NDArray[np.bool_]:
    keep16 = keep16_of(drop)
    if keep16 == 65536:
        return np.ones(count, bool)
    return u16s(name, first, count, seed, iteration) < keep16


def widen(values: Array, wide: type) -> Array:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(wide)


def bfloat16_of(values: Array) -> Array:
    """Round float32 or float64 to the nearest bfloat16, ties to even, by looking at both neighbours."""
    size: Array = np.abs(widen(values, np.float64))
    # Every bfloat16 >= 0 in order, the infinity counted as the power of two it stands at.
    grid = (np.arange(0x7F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    grid[-1] = 2.0**128
    above = np.clip(np.searchsorted(grid, size, side="left"), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    nearer_high = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    bits: Array = np.where(nearer_high, above, above - 1).astype(np.uint16)
    bits = np.where(size >= grid[-1], np.uint16(0x7F80), bits) | np.where(np.signbit(values), 0x8000, 0).astype(
        np.uint16
    )
    return np.where(np.isnan(values), np.uint16(0x7FC0), bits).astype(np.uint16)


def narrow(values: Array, dtype: torch.dtype) -> Array:
    """Round once; NaN to the canonical quiet one."""
    if dtype == torch.bfloat16:
        with np.errstate(invalid="ignore"):
            return bfloat16_of(values)
    kind = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: Array = values.astype(kind)
    bits = {2: 0x7E00, 4: 0x7FC00000, 8: 0x7FF8000000000000}[rounded.itemsize]
    raw = rounded.view(f"u{rounded.itemsize}").copy()
    raw[np.isnan(rounded)] = bits
    return raw.view(kind)


def merge(
    base: Array,
    sft: Array,
    start: Array,
    out: torch.dtype,
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
    """tuned = start + factor * DARE(sft - start), merged = alpha * base + (1 - alpha) * tuned; or sft a delta."""
    exact = np.float64 in (base.dtype, sft.dtype, start.dtype)
    wide: type = np.float64 if exact else np.float32
    b, s, f = (widen(each, wide) for each in (base, start, sft))
    scale = wide((factor * 65536) / keep16_of(drop))
    weight, alpha_ = wide(1 - alpha), wide(alpha)
    with np.errstate(all="ignore"):
        if drop == 0 and factor == 1:
            tuned = s + f if is_delta else f
        else:
            moved = s + (f if is_delta else f - s) * scale
            tuned = np.where(mask(name, first, len(b), drop, seed, iteration), moved, s)
        if weight == 0:
            merged = b
        elif alpha == 0:
            merged = tuned
        elif weight < 0.5:
            merged = b + weight * (tuned - b)
        else:
            merged = tuned - alpha_ * (tuned - b)
    return narrow(merged, out)


def to_array(tensor: torch.Tensor) -> Array:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()


def to_tensor(array: Array, dtype: torch.dtype, shape: Any) -> torch.Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(array).view(np.int16 if dtype == torch.bfloat16 else array.dtype))
    return (flat.view(torch.bfloat16) if dtype == torch.bfloat16 else flat).reshape(shape)


def merge_tensors(
    base: torch.Tensor, sft: torch.Tensor, start: torch.Tensor | None, out: torch.dtype, **parameters: Any
) -> torch.Tensor:
    begin = base if start is None else start
    merged = merge(to_array(base), to_array(sft), to_array(begin), out, **parameters)
    return to_tensor(merged, out, base.shape)


def product(left: Array, right: Array, scaling: float) -> Array:
    """float32(scaling) * sum over k of left[i, k] * right[k, j], in float32, k in order, from zero."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return np.float32(scaling) * total


def squares(values: Array) -> float:
    """The sum of squares in the order that reports are made in: by pairs and halves, in the precision of `values`."""
    with np.errstate(all="ignore"):
        lanes = [0.0] * 16
        padded = np.concatenate([values, np.zeros(-len(values) % 1024, values.dtype)])
        for x in padded.reshape(-1, 1024):
            s = [(x[2 * i] * x[2 * i] + x[2 * i + 1] * x[2 * i + 1])
                 + (x[512 + 2 * i] * x[512 + 2 * i] + x[513 + 2 * i] * x[513 + 2 * i]) for i in range(256)]  # fmt: skip
            while len(s) > 16:
                s = [s[i] + s[i + len(s) // 2] for i in range(len(s) // 2)]
            lanes = [lane + float(each) for lane, each in zip(lanes, s, strict=True)]
        while len(lanes) > 1:
            lanes = [lanes[i] + lanes[i + len(lanes) // 2] for i in range(len(lanes) // 2)]
        return lanes[0]
