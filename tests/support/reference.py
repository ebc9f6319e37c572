"""The naive reference of `mergekit_imm.testing` for torch tensors, and other naive formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergekit_imm.testing import reference
from mergekit_imm.testing.reference import Array as Array
from mergekit_imm.testing.reference import add_to_tally as add_to_tally
from mergekit_imm.testing.reference import keep16_of as keep16_of
from mergekit_imm.testing.reference import naive_mask as mask
from mergekit_imm.testing.reference import philox4x32_10 as philox4x32_10
from mergekit_imm.testing.reference import u16s as u16s
from mergekit_imm.testing.reference import widen as widen

__all__ = ["Array", "add_to_tally", "keep16_of", "mask", "philox4x32_10", "u16s", "widen"]

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def u16(name: str, element: int, seed: int = 0, iteration: int = 0) -> int:
    return int(u16s(name, element, 1, seed, iteration)[0])


def narrow(values: Array, dtype: torch.dtype) -> Array:
    return reference.narrow(values, CODES[dtype])


def merge(base: Array, sft: Array, start: Array, out: torch.dtype, **parameters: Any) -> Array:
    return reference.naive_merge(base, sft, start, CODES[out], **parameters)


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
    """Return float32(scaling) * sum over k of left[i, k] * right[k, j], in float32, adding in order of k from zero."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return np.float32(scaling) * total
