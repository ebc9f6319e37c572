"""Sparsifiers by magnitude, as pure functions of a delta: trim and DELLA. `merge.dare` is DARE."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_tensor_name
from ..numerics.mask import KEEP_ALL, check_drop, check_round, mask_key
from ..numerics.reference import CHUNK, boxes, in_box, round_to, uniform16
from ..numerics.sparsifiers import check_epsilon, keep_thresholds, trim_count
from .merge import check_float


@torch.no_grad()
def trim(delta: Tensor, *, drop: float) -> Tensor:
    """Keep the largest elements of a delta unchanged, and drop the others.

        trim(delta) = delta where |delta| >= t, 0 elsewhere;   t = the K-th largest |delta|, K = round((1 - drop) n)

    Ties with the K-th element are kept, and so are NaN and infinity. Nothing is rescaled.

    Args: `delta`, a whole tensor of n elements, any float dtype and shape; `drop`, 0 <= drop < 1. Returns a new
    contiguous tensor of delta's shape and dtype. Raises ArgumentError.

    Source: the first step of TIES-Merging (arXiv 2306.01708), applied to each tensor separately.

    >>> import torch
    >>> trim(torch.tensor([0.1, -3.0, 2.0, 0.5]), drop=0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    check_float("delta", delta)
    check_drop(drop)
    out = torch.zeros(delta.shape, dtype=delta.dtype, device=delta.device)
    if not delta.numel():
        return out
    least = _smallest_kept(delta, delta.numel() - trim_count(drop, delta.numel()))
    for index, span in boxes(delta.shape):
        flat = in_box(delta, index)
        out.view(-1)[span] = torch.where(_magnitudes(_wide(flat)) >= least, flat, 0.0)
    return out


def _smallest_kept(delta: Tensor, wanted: int) -> int:
    """Return the bits of the magnitude with rank `wanted` from below; each pass finds sixteen of them."""
    prefix = 0
    for shift in range(48 if delta.dtype == torch.float64 else 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=delta.device)
        for index, _ in boxes(delta.shape):
            bits = _magnitudes(_wide(in_box(delta, index)))
            digits = (bits >> shift)[bits >> (shift + 16) == prefix] if shift < 48 else bits >> shift
            counts += torch.bincount(digits & 0xFFFF, minlength=1 << 16)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, wanted, right=True))
        wanted -= int(below[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    infinity = torch.tensor([torch.inf], dtype=delta.dtype)
    return min(prefix, int(_magnitudes(_wide(infinity))))  # there may be more NaN than elements to keep


@torch.no_grad()
def della(delta: Tensor, *, name: str, drop: float, epsilon: float = 0.1, seed: int = 0, iteration: int = 0) -> Tensor:
    """Drop elements of a delta at random, more often the smaller ones of a row, and divide the rest by their keep rate.

        q = (1 - drop) - epsilon + 2 epsilon * rank / (n - 1)        rank = 0..n-1 by |delta| in its row, ties by index
        della(delta) = delta / q with probability q, else 0;          q in steps of 1/65536, as in `dare`

    A row of n elements runs along the last dimension. With epsilon=0 this is `dare`. NaN and infinity are kept.

    Args: `delta`, a whole tensor, any float dtype and shape; `epsilon`, 0 <= epsilon <= drop and drop + epsilon < 1;
    the others as in `keep_mask`. Returns a new contiguous tensor of delta's shape and dtype. Raises ArgumentError.

    Source: MagPrune of DELLA-Merging (arXiv 2406.11617).

    >>> import torch
    >>> della(torch.arange(1.0, 9.0), name="h.0.attn.weight", drop=0.5, epsilon=0.25)
    tensor([ 0.0000,  6.2223,  0.0000,  8.6155,  0.0000,  9.8823, 10.3158, 10.6667])
    """
    check_float("delta", delta)
    check_round(seed, iteration)
    check_epsilon(epsilon, drop)
    check_tensor_name(name)
    drop, epsilon = float(drop), float(epsilon)
    out = delta.detach().clone(memory_format=torch.contiguous_format)
    row = delta.shape[-1] if delta.ndim else 1
    if not drop or not delta.numel():
        return out
    keep16 = torch.from_numpy(keep_thresholds(row, drop, epsilon)).to(delta.device)
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    scale = (KEEP_ALL / keep16.to(torch.float64)).to(wide)
    key = mask_key(name, seed, iteration)
    rows = out.view(-1, row)
    step = max(1, CHUNK // row)
    for first in range(0, len(rows), step):
        values = rows[first : first + step].to(wide)
        order = _magnitudes(values).sort(dim=1, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(row, device=delta.device).expand_as(order))
        drawn = uniform16(values, first * row, values.numel(), *key).view_as(rank)
        dropped = torch.where(drawn < keep16[rank], values * scale[rank], 0.0)
        rows[first : first + step] = round_to(torch.where(values.isfinite(), dropped, values), delta.dtype)
    return out


def _wide(flat: Tensor) -> Tensor:
    return flat if flat.dtype == torch.float64 else flat.to(torch.float32)


def _magnitudes(wide: Tensor) -> Tensor:
    """The bits of floats without the sign, int64: in the order of their magnitudes, NaN the largest."""
    if wide.dtype == torch.float64:
        return wide.contiguous().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return (wide.contiguous().view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
