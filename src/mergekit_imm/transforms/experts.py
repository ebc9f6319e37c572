"""Experts of a mixture: stored one by one, or in one tensor, as transformers 5 has them in memory; either way round."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from ..checkpoint.lazy_tensor import Piece, Pieces, Tensor, sliced

# The tensors that hold all experts -> what they are made of, one below the other, in experts that are stored singly.
Layout = Mapping[str, tuple[str, ...]]
_LAYOUTS: tuple[Layout, ...] = (
    {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
    {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)},
    {"up_proj": ("up_proj.weight",), "down_proj": ("down_proj.weight",)},  # without gates (Nemotron-H)
)
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|up_proj|down_proj)(\.weight)?")


def is_fused(name: str) -> bool:
    """Whether a name is that of a tensor of all experts."""
    return _FUSED.fullmatch(name) is not None


def fused_path(name: str) -> str | None:
    """Return the module that a tensor of all experts is in; None for other names."""
    found = _FUSED.fullmatch(name)
    return found[1] if found else None


def fused_kind(name: str) -> str:
    """Return which tensor of all experts a name is, `down_proj`; nothing for other names."""
    found = _FUSED.fullmatch(name)
    return found[2] if found else ""


def single_layout(names: Iterable[str]) -> Layout | None:
    """Return how a model that stores its experts one by one calls their tensors; None if it does not."""
    ends = {found[3] for found in map(_EXPERT.fullmatch, names) if found}
    return next((layout for layout in _LAYOUTS if {*_ends(layout)} <= ends), None)


def _ends(layout: Layout) -> list[str]:
    return [end for ends in layout.values() for end in ends]


def fused_shape(path: str, which: str, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape that the single experts below a path would have as one tensor; () if they do not fit."""
    ends = layout.get(which, ())
    members = (_EXPERT.fullmatch(name) for name in tensors if name.startswith(f"{path}."))
    count = len({found[2] for found in members if found and found[1] == path})
    parts = [tensors.get(f"{path}.{expert}.{end}") for expert in range(count) for end in ends]
    shapes = {part.shape for part in parts if part is not None}
    if None in parts or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return ()
    return count, len(ends) * shape[0], shape[1]


def fused_shapes(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes that a model's single experts would have as tensors of all, by the names of those."""
    stacks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is not None:
            stacks[found[1]][name] = tensor
    return {
        which: {fused_shape(path, which, layout, stack) for path, stack in stacks.items()} - {()} for which in layout
    }


def cut_experts(role: str, name: str, tensor: Tensor, layout: Layout) -> list[tuple[str, Tensor, str]]:
    """Cut a tensor of all experts into (name of a part, the part, which it is); nothing if it is none.

        gate_up_proj[e] = [gate_proj of expert e; up_proj of expert e],  down_proj[e] = down_proj of expert e

    with shapes [experts, 2 x inner, hidden] and [experts, hidden, inner], as transformers 5 fuses them.
    """
    found = _FUSED.fullmatch(name)
    if found is None or len(tensor.shape) != 3 or found[2] not in layout:
        return []  # of other tensors of that name the names are not found, and they are refused
    path, ends = found[1], layout[found[2]]
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
    role: str, tensors: Mapping[str, Tensor], lost: Iterable[str], original_names: Mapping[str, str]
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
        for which, ends in (single_layout(members.values()) or {}).items():
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
                f"{original_names[names[0]].replace('.0.', '.*.')} of {count} experts",
            )
            gone |= {*names}
    return made, gone


def across(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor of all experts with each matrix transposed."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def turned_round(
    tensors: Mapping[str, Tensor], expected: Callable[[str], Collection[tuple[int, ...]]]
) -> tuple[set[str], str | None]:
    """Return which tensors of all experts are stored the other way round than expected, [in, out] for [out, in].

    Both of a module are the same way round, and not both can be square; so one tells of the other. `expected` returns
    the shapes that one may have, none if unknown. Also returned is one that is square and alone, which cannot be told.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        path = fused_path(name)
        if path is not None and len(tensor.shape) == 3 and expected(name):
            modules[path].append(name)
    turned: set[str] = set()
    for path, names in modules.items():
        straight = [tensors[name].shape in expected(name) for name in names]
        other = [across(tensors[name].shape) in expected(name) for name in names]
        if all(other) and not all(straight):
            turned |= {*names}
        elif all(other) and len(names) == 1 and fused_path(names[0]) == path and _has_partner(names[0], expected):
            return turned, names[0]
    return turned, None


def _has_partner(name: str, expected: Callable[[str], Collection[tuple[int, ...]]]) -> bool:
    """Whether the other tensor of a gated module is expected, too."""
    end = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
    return any(bool(expected(name.replace(one, other))) for one, other in end.items() if one in name)


def _experts_of(name: str) -> str | None:
    """The module of all experts that a tensor belongs to."""
    single = _EXPERT.fullmatch(name)
    return single[1] if single else fused_path(name)
