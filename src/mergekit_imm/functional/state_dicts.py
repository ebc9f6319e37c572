"""Match the tensors of two or three state dicts, and find names that share one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..model.tensor_names import only_in, tied_key
from ..numerics.reference import boxes, in_box


def match_tensors(
    base: Mapping[str, Tensor], sft: Mapping[str, Tensor], start: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, list[str], tuple[Tensor, Tensor, Tensor | None]]]:
    """Yield (name for the mask, names to write, (base, sft, start)) for every tensor, once for tied names."""
    tied: dict[Any, list[str]] = {}
    for name, tensor in base.items():
        tied.setdefault(_storage(tensor) if tensor.numel() else name, []).append(name)
    others = {"sft": sft} | ({} if start is None else {"start": start})
    group_of = {name: names for names in tied.values() for name in names}
    for label, side in others.items():
        missing = {n for n in base if n not in side and not any(other in side for other in group_of[n])}
        for problem in (only_in(missing, side, "base", label), only_in(side, base, label, "base")):
            if problem:
                raise MismatchError(problem)
    for names in tied.values():
        stored = {label: [n for n in names if n in side] for label, side in others.items()}
        whole = all(_all_equal([side[n] for n in stored[label]]) for label, side in others.items())
        for written in [names] if whole else [[n] for n in names]:
            key = tied_key(written)
            sides = [side[key if key in side else stored[label][0]] for label, side in others.items()]
            yield key, written, (base[written[0]], sides[0], sides[1] if len(sides) > 1 else None)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common if they are one: memory, dtype and layout."""
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return all(
        _storage(each) == _storage(first)
        or (each.shape == first.shape and each.dtype == first.dtype and _same_bits(each, first))
        for each in tensors[1:]
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return all(
        torch.equal(in_box(one, index).view(torch.uint8), in_box(other, index).view(torch.uint8))
        for index, _ in boxes(one.shape)
    )
