"""Experts of a mixture: stored one by one, or fused into one tensor, as transformers 5 has them in memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from .computed import Piece, Pieces, Tensor, sliced

# What experts are called that are stored one by one, first and second half of `gate_up_proj`, and `down_proj`.
_EXPERT_NAMES = (("gate_proj.weight", "up_proj.weight", "down_proj.weight"), ("w1.weight", "w3.weight", "w2.weight"))
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(\.weight)?")


def is_fused(name: str) -> bool:
    """Whether a name is that of a fused tensor of experts."""
    return _FUSED.fullmatch(name) is not None


def expert_names(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return what a model that stores its experts one by one calls the tensors of one; None if it does not."""
    ends = {found[3] for found in map(_EXPERT.fullmatch, names) if found}
    return next((names for names in _EXPERT_NAMES if {*names} <= ends), None)


def fused_shape(path: str, which: str, names: tuple[str, str, str], tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape that the single experts below a path would have as one tensor; () if they do not fit."""
    ends = names[:2] if which == "gate_up_proj" else names[2:]
    members = (_EXPERT.fullmatch(name) for name in tensors if name.startswith(f"{path}."))
    count = len({found[2] for found in members if found and found[1] == path})
    parts = [tensors.get(f"{path}.{expert}.{end}") for expert in range(count) for end in ends]
    shapes = {part.shape for part in parts if part is not None}
    if None in parts or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return ()
    return count, len(ends) * shape[0], shape[1]


def cut_experts(role: str, name: str, tensor: Tensor, names: tuple[str, str, str]) -> list[tuple[str, Tensor, str]]:
    """Cut a fused tensor of experts into (name of a part, the part, which it is); nothing if it is none.

        gate_up_proj[e] = [gate_proj of expert e; up_proj of expert e],  down_proj[e] = down_proj of expert e

    with shapes [experts, 2 x inner, hidden] and [experts, hidden, inner], as transformers 5 fuses them.
    """
    found = _FUSED.fullmatch(name)
    if found is None or len(tensor.shape) != 3:
        return []  # of other tensors of that name the names are not found, and they are refused
    path, which, _ = found.groups()
    ends = names[:2] if which == "gate_up_proj" else names[2:]
    experts, rows, columns = tensor.shape
    if rows % len(ends):
        return []
    height = rows // len(ends)
    parts = []
    for expert in range(experts):
        for number, end in enumerate(ends):
            part = f"{path}.{expert}.{end}"
            first = (expert * rows + number * height) * columns
            place = f"[{expert}, {number * height}:{(number + 1) * height}]" if len(ends) > 1 else f"[{expert}]"
            parts.append((part, sliced(tensor, role, part, first, (height, columns)), place))
    return parts


def joined(
    role: str, tensors: Mapping[str, Tensor], lost: Iterable[str], was: Mapping[str, str]
) -> tuple[dict[str, tuple[Tensor, str]], set[str]]:
    """Put single experts together where all are there: name -> (tensor, what it was), and the names it was made of."""
    stacks: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in lost:
        found = _EXPERT.fullmatch(name)
        if found is not None:
            stacks[found[1]][int(found[2]), found[3]] = name
    made: dict[str, tuple[Tensor, str]] = {}
    gone: set[str] = set()
    for path, members in stacks.items():
        for gate, up, down in _EXPERT_NAMES:
            for ends, which in (((gate, up), "gate_up_proj"), ((down,), "down_proj")):
                count = sum(end == ends[0] for _, end in members)
                parts = [(e, n, members.get((e, end))) for e in range(count) for n, end in enumerate(ends)]
                names = [name for _, _, name in parts if name is not None]
                shapes = {tensors[name].shape for name in names}
                if not count or len(names) < len(parts) or len(shapes) > 1 or len(shape := shapes.pop()) != 2:
                    continue
                pieces = tuple(
                    Piece(role, sliced(tensors[name], role, name, 0, (1, *shape)), (e, n * shape[0], 0))
                    for (e, n, _), name in zip(parts, names, strict=True)
                )
                fused = f"{path}.{which}"
                made[fused] = (
                    Pieces(fused, (count, len(ends) * shape[0], shape[1]), pieces),
                    f"{was[names[0]].replace('.0.', '.*.')} of {count} experts",
                )
                gone |= {*names}
    return made, gone
