"""The merge as pure functions of tensors, on any device.

They return new tensors, use no global random state, never broadcast, and work in chunks: at most 64 MiB above inputs
and output. The streamed merge gives the same bits.

    delta  = sft - start
    tuned  = start + factor * DARE(delta)              DARE: drop with probability p, divide the rest by 1-p
    merged = alpha * base + (1 - alpha) * tuned

Source: "Superficial Self-Improved Reasoners Benefit from Model Merging" (arXiv 2503.02103), Eq. 5 to 7; DARE is
arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from ..common.checks import check_state, check_tensor_name, is_integer
from ..common.messages import shown
from ..errors import ArgumentError, MismatchError
from ..model.tensor_names import layer_key
from ..numerics.mask import (
    KEEP_ALL,
    Arithmetic,
    arithmetic,
    check_drop,
    check_round,
    keep_threshold,
    mask_key,
)
from ..numerics.reference import CHUNK, FLOATS, boxes, in_box, merge_flat, round_to, uniform16
from ..options.layer_factors import resolve_factors
from .state_dicts import match_tensors

Reference = Literal["start", "base"]
T = TypeVar("T", Tensor, Mapping[str, Tensor])


@torch.no_grad()
def task_vector(sft: Tensor, start: Tensor) -> Tensor:
    """Return the change that fine-tuning made to a tensor.

        delta = sft - start                                                             (Eq. 5)

    Args: two tensors of one shape and device, any float dtypes and strides. Returns a new contiguous float32 tensor
    (float64 if either is float64). Raises MismatchError if shapes, devices or kinds of dtype differ; nothing is
    broadcast.

    >>> import torch
    >>> task_vector(torch.tensor([1.5, 2.0]), torch.tensor([1.0, 2.0]))
    tensor([0.5000, 0.0000])
    """
    _check_alike({"sft": sft, "start": start})
    wide = torch.float64 if torch.float64 in (sft.dtype, start.dtype) else torch.float32
    out = torch.empty(sft.shape, dtype=wide, device=sft.device)
    for index, span in boxes(sft.shape):
        out.view(-1)[span] = in_box(sft, index).to(wide) - in_box(start, index).to(wide)
    return out


@torch.no_grad()
def keep_mask(
    name: str,
    shape: Sequence[int],
    *,
    drop: float,
    seed: int = 0,
    iteration: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which elements DARE keeps.

    Each element is kept with probability round((1 - drop) * 65536) / 65536. The mask depends only on (seed, iteration,
    name, index of the element in the whole row-major tensor), so every device, shard and rank gets the same one.

    Args: `name`, the tensor's name in the base's file; `shape` of the result; `drop`, 0 <= drop < 1; `iteration` >= 0;
    `offset`, the index of the result's first element in the whole tensor, for a rank that holds a slice. Returns a
    bool tensor, True where kept. Raises ArgumentError for values out of range.

    Source: DARE (arXiv 2311.03099), with the generator described in `mergekit_imm.numerics.mask`.

    >>> whole = keep_mask("model.norm.weight", (8,), drop=0.5)
    >>> bool((whole[4:] == keep_mask("model.norm.weight", (4,), drop=0.5, offset=4)).all())
    True
    """
    check_round(seed, iteration)
    keep16 = keep_threshold(drop)
    check_tensor_name(name)
    _check_offset(offset)
    key = mask_key(name, seed, iteration)
    out = torch.ones(_sizes(shape), dtype=torch.bool, device=device)
    if keep16 < KEEP_ALL:
        flat = out.view(-1)
        if _is_fused(out):
            from ..numerics import triton_kernel

            triton_kernel.keep_flat_fused(flat, keep16, *key, offset)
            return out
        for begin in range(0, flat.numel(), CHUNK):
            count = min(CHUNK, flat.numel() - begin)
            flat[begin : begin + count] = uniform16(out, offset + begin, count, *key) < keep16
    return out


@torch.no_grad()
def dare(delta: Tensor, *, name: str, drop: float, seed: int = 0, iteration: int = 0, offset: int = 0) -> Tensor:
    """Drop elements of a delta at random and rescale the rest.

        dare(delta) = delta * (65536 / keep16) where kept, 0 where dropped

    Dividing by the realised keep rate keep16 / 65536 makes the expectation equal the delta, up to rounding into its
    dtype: at drop=0.9 a kept 1 becomes 9.99939, but 10 in bfloat16, with expectation 1.00006.

    Args: `delta`, any float dtype and shape; the others as in `keep_mask`. Returns a new contiguous tensor of delta's
    shape and dtype. Raises ArgumentError for values out of range.

    Source: DARE (arXiv 2311.03099).

    >>> import torch
    >>> dare(torch.ones(8), name="model.norm.weight", drop=0.5)
    tensor([2., 2., 2., 0., 2., 2., 2., 0.])
    """
    check_round(seed, iteration)
    check_float("delta", delta)
    check_tensor_name(name)
    _check_offset(offset)
    constants, key = arithmetic(alpha=0.0, drop=drop), mask_key(name, seed, iteration)
    exact = delta.dtype == torch.float64
    out = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
    for index, span in boxes(delta.shape):
        flat = in_box(delta, index).to(torch.float64 if exact else torch.float32)
        if constants.uses_mask:
            scaled = flat * (constants.scale if exact else constants.scale32)
            kept = uniform16(flat, offset + span.start, flat.numel(), *key) < constants.keep16
            flat = torch.where(kept, scaled, 0.0)
        out.view(-1)[span] = round_to(flat, delta.dtype)
    return out


@torch.no_grad()
def interpolate(base: Tensor, tuned: Tensor, *, alpha: float) -> Tensor:
    """Pull a tuned tensor back towards the base.

        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6)

    Exact at both ends: alpha=1 gives base, alpha=0 gives tuned (rounded to base's dtype).

    Args: two tensors of one shape and device, any float dtypes; `alpha`, the weight of the BASE, 0 <= alpha <= 1.
    Returns a new contiguous tensor of base's dtype, computed in float32 (float64 if either is) and rounded once.
    Raises ArgumentError, MismatchError.

    >>> import torch
    >>> interpolate(torch.tensor([1.0]), torch.tensor([2.0]), alpha=0.75)
    tensor([1.2500])
    """
    return dare_merge(base, tuned, alpha=alpha, drop=0.0)


@overload
def dare_merge(
    base: Tensor,
    sft: Tensor,
    *,
    start: Tensor | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int = 0,
    factor: float = 1.0,
    reference: Reference = "start",
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor: ...


@overload
def dare_merge(
    base: Mapping[str, Tensor],
    sft: Mapping[str, Tensor],
    *,
    start: Mapping[str, Tensor] | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int = 0,
    layer_factors: Mapping[str, float] | None = None,
    reference: Reference = "start",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]: ...


@torch.no_grad()
def dare_merge(
    base: T,
    sft: T,
    *,
    start: T | None = None,
    alpha: float = 0.5,
    drop: float = 0.2,
    seed: int = 0,
    iteration: int = 0,
    factor: float = 1.0,
    layer_factors: Mapping[str, float] | None = None,
    reference: Reference = "start",
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | dict[str, Tensor]:
    """Merge a fine-tuned tensor, or a whole state dict, back towards its base: one round of IMM.

        tuned  = start + factor * DARE(sft - start)                                     (Eq. 5, DARE)
        merged = alpha * base + (1 - alpha) * tuned                                     (Eq. 6, 7)

    Args:
        base: the original model, a tensor or a mapping name -> tensor.
        sft: the fine-tuned model, of the same shapes, any float dtype, on the same device.
        start: the model that fine-tuning started from; None if that is the base (round 0).
        alpha: weight of the BASE, 0 <= alpha <= 1.
        drop: share of the delta's elements to drop, 0 <= drop < 1.
        seed, iteration: select the mask, with the name; increase `iteration` by 1 every round.
        factor: IIMM layer factor of a single tensor, >= 0.
        layer_factors: layer key -> factor, for a mapping, and "outside" for tensors in no layer; see
            `importance_factors`, `lines_factors`, `group_factors`.
        reference: "base" takes the delta from the base instead of from start.
        name: a single tensor's name in the base's file, required if drop > 0; a mapping's keys are its names.
        dtype: of the result; base's if None. Computed in float32 (float64 if any input is), rounded once.

    Returns a new contiguous tensor, or a dict with base's names. Integer and bool tensors must be equal and are copied.
    Names that share storage in the base, and are equal in sft and start too, are one tensor: it is merged once, under
    the input embedding's name, and shared in the result. Raises ArgumentError, or MismatchError, which names the tensor
    and both sides.

    >>> import torch
    >>> dare_merge(torch.tensor([1.0]), torch.tensor([2.5]), start=torch.tensor([1.5]), alpha=0.5, drop=0.0)
    tensor([1.7500])
    >>> base, sft = {"h.0.w": torch.zeros(4)}, {"h.0.w": torch.ones(4)}
    >>> dare_merge(base, sft, alpha=0.5, drop=0.5)
    {'h.0.w': tensor([1., 0., 1., 0.])}
    """
    check_round(seed, iteration)
    if reference not in ("start", "base"):
        raise ArgumentError(f"reference is {reference!r}; it must be 'start' or 'base'")
    if dtype is not None and dtype not in FLOATS:
        raise ArgumentError(f"dtype is {dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    if reference == "base":
        start = None
    if isinstance(base, Tensor) and isinstance(sft, Tensor) and not isinstance(start, Mapping):
        if layer_factors is not None:
            raise ArgumentError("layer_factors is for mappings; give one tensor's factor as factor=")
        if name is not None:
            check_tensor_name(name)
        elif check_drop(drop) > 0:
            raise ArgumentError(
                f"name is None with drop={drop}: the mask is keyed by the tensor's name in the base's file;"
                " pass name='...' (or drop=0)"
            )
        constants = arithmetic(alpha=alpha, drop=drop, factor=factor)
        return _merge(name or "", base, sft, start, constants, mask_key(name or "", seed, iteration), dtype)
    if isinstance(base, Mapping) and isinstance(sft, Mapping) and not isinstance(start, Tensor):
        if name is not None or factor != 1.0:
            raise ArgumentError(
                "name and factor are for single tensors; a mapping has its own names and layer_factors="
            )
        for label, side in (("base", base), ("sft", sft), *((("start", start),) if start is not None else ())):
            check_state(label, side)
        factors = {} if layer_factors is None else resolve_factors(layer_factors, base)
        out: dict[str, Tensor] = {}
        for key, written, sides in match_tensors(base, sft, start):
            constants = arithmetic(alpha=alpha, drop=drop, factor=factors.get(layer_key(key) or "", 1.0))
            merged = _merge(key, *sides, constants, mask_key(key, seed, iteration), dtype)
            out.update(dict.fromkeys(written, merged))
        return {each: out[each] for each in base}
    kinds = ", ".join(
        f"{label} is a {type(side).__name__}"
        for label, side in (("base", base), ("sft", sft), ("start", start))
        if side is not None
    )
    raise ArgumentError(f"base, sft and start must be all tensors or all mappings of tensors; {kinds}")


def _merge(
    name: str,
    base: Tensor,
    sft: Tensor,
    start: Tensor | None,
    constants: Arithmetic,
    key: tuple[int, int],
    dtype: torch.dtype | None,
) -> Tensor:
    sides = {"base": base, "sft": sft} | ({} if start is None else {"start": start})
    if base.dtype not in FLOATS and not base.is_complex():
        return _copy_equal(name, sides)
    _check_alike(sides, name)
    begin = base if start is None else start
    out = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    if _is_fused(base, begin, sft, out):
        from ..numerics import triton_kernel

        b, s, f, o = (each.detach().view(-1) for each in (base, begin, sft, out))
        triton_kernel.merge_flat_fused(b, s, f, o, constants, *key, 0)
        return out
    for index, span in boxes(base.shape):
        pieces = (in_box(base, index), in_box(begin, index), in_box(sft, index))
        out.view(-1)[span] = merge_flat(*pieces, out.dtype, constants, *key, span.start)
    return out


def _is_fused(*tensors: Tensor) -> bool:
    """Whether the Triton kernel can do the merge; in a graph that torch compiles, it is left to torch."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return False
    from ..numerics import triton_kernel  # imports Triton

    return triton_kernel.fits(*tensors)


def _check_offset(offset: int) -> None:
    if not is_integer(offset) or offset < 0:
        raise ArgumentError(f"offset is {shown(repr(offset), 60)}; it must be the index of an element, >= 0")


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(shape)
    except TypeError:
        sizes = (-1,)
    if not all(is_integer(size) and size >= 0 for size in sizes):
        raise ArgumentError(f"shape is {shown(repr(shape), 60)}; give the size of each dimension, such as (8, 8)")
    return sizes


def _copy_equal(name: str, sides: Mapping[str, Tensor]) -> Tensor:
    base = sides["base"]
    if base.is_floating_point():  # float8 and smaller
        raise MismatchError(f"{_of(name)}{base.dtype} cannot be merged; dequantise to bfloat16, float16 or float32")
    for label, side in sides.items():
        if side.dtype != base.dtype or side.shape != base.shape or side.device != base.device:
            raise MismatchError(f"{_of(name)}base is {_described(base)}, {label} is {_described(side)}")
        if not torch.equal(base, side):
            raise MismatchError(
                f"{_of(name)}integer and bool tensors cannot be merged and must be equal, but base and {label} differ"
            )
    return base.detach().clone(memory_format=torch.contiguous_format)


def _check_alike(sides: Mapping[str, Tensor], name: str = "") -> None:
    (first, one), *rest = sides.items()
    for label, side in sides.items():
        check_float(label, side, name)
    for label, side in rest:
        if side.shape != one.shape or side.device != one.device:
            raise MismatchError(
                f"{_of(name)}{first} is {_described(one)}, {label} is {_described(side)};"
                " both must have the same shape and device (nothing is broadcast)"
            )


def check_float(label: str, tensor: Tensor, name: str = "") -> None:
    """Raise ArgumentError or MismatchError unless this is a dense tensor of a float dtype that can be merged."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{_of(name)}{label} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise MismatchError(
            f"{_of(name)}{label} is {kind}; only dense bfloat16, float16, float32 and float64 tensors can be merged"
        )


def _of(name: str) -> str:
    return f"tensor '{shown(name)}': " if name else ""


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
