"""Experts of a mixture: stored one by one or fused in one tensor (as transformers 5 holds them), maybe transposed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from ..checkpoint.lazy_tensor import Piece, Pieces, Tensor, sliced

# Fused tensor -> the tensors of a single expert that it stacks, row-wise.
Layout = Mapping[str, tuple[str, ...]]
_LAYOUTS: tuple[Layout, ...] = (
    {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
    {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)},
    {"up_proj": ("up_proj.weight",), "down_proj": ("down_proj.weight",)},  # without gates (Nemotron-H)
)
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|up_proj|down_proj)(\.weight)?")


def is_fused(name: str) -> bool:
    """Whether a name is that of a fused tensor of all experts."""
    return _FUSED.fullmatch(name) is not None


def is_single(name: str) -> bool:
    """Whether a name is that of a tensor of one expert."""
    return _EXPERT.fullmatch(name) is not None


def fused_path(name: str) -> str | None:
    """Return the module of a fused tensor of all experts; None for other names."""
    found = _FUSED.fullmatch(name)
    return found[1] if found else None


def single_layout(names: Iterable[str]) -> Layout | None:
    """Return the naming of a model that stores its experts one by one; None for other models."""
    ends = {found[3] for found in map(_EXPERT.fullmatch, names) if found}
    return next((layout for layout in _LAYOUTS if {end for each in layout.values() for end in each} <= ends), None)


def fused_shape(path: str, which: str, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the single experts in a module, fused into tensor `which`; () if they do not fit."""
    ends = layout.get(which, ())
    members = (_EXPERT.fullmatch(name) for name in tensors if name.startswith(f"{path}."))
    count = len({found[2] for found in members if found and found[1] == path})
    parts = [tensors.get(f"{path}.{expert}.{end}") for expert in range(count) for end in ends]
    shapes = {part.shape for part in parts if part is not None}
    if None in parts or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        return ()
    return count, len(ends) * shape[0], shape[1]


def fused_shapes(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, set[tuple[int, ...]]]:
    """Return, for each fused tensor, the shapes that a model's single experts would have in it."""
    stacks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is not None:
            stacks[found[1]][name] = tensor
    return {
        which: {fused_shape(path, which, layout, stack) for path, stack in stacks.items()} - {()} for which in layout
    }


def split_experts(role: str, name: str, tensor: Tensor, layout: Layout) -> list[tuple[str, Tensor, str]]:
    """Split a fused tensor of all experts into (name, tensor, place in the fused one); [] for other tensors.

        gate_up_proj[e] = [gate_proj of expert e; up_proj of expert e],  down_proj[e] = down_proj of expert e

    with shapes [experts, 2 x inner, hidden] and [experts, hidden, inner], as transformers 5 fuses them.
    """
    found = _FUSED.fullmatch(name)
    if found is None or len(tensor.shape) != 3 or found[2] not in layout:
        return []  # the name will not be found in the base, and is refused there
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


def fuse_experts(
    role: str, tensors: Mapping[str, Tensor], unmatched: Iterable[str], original_names: Mapping[str, str]
) -> tuple[dict[str, tuple[Tensor, str]], set[str]]:
    """Fuse single experts where all are there.

    Returns fused name -> (tensor, its original names in short), and the names that were fused.
    """
    stacks: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
    for name in unmatched:
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


def transposed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a stack of matrices with each matrix transposed."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def find_transposed(
    tensors: Mapping[str, Tensor], expected: Callable[[str], Collection[tuple[int, ...]]]
) -> tuple[set[str], str | None]:
    """Return the fused tensors that are stored transposed, [in, out] for [out, in], or the reverse.

    Both tensors of a module have one orientation, and at most one is square, so each settles the other. `expected`
    returns the shapes a tensor may have, none if unknown. Also returned: a square tensor without its partner, whose
    orientation is unknown.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        path = fused_path(name)
        if path is not None and len(tensor.shape) == 3 and expected(name):
            modules[path].append(name)
    turned: set[str] = set()
    for path, names in modules.items():
        straight = [tensors[name].shape in expected(name) for name in names]
        other = [transposed_shape(tensors[name].shape) in expected(name) for name in names]
        if all(other) and not all(straight):
            turned |= {*names}
        elif all(other) and len(names) == 1 and fused_path(names[0]) == path and _has_partner(names[0], expected):
            return turned, names[0]
    return turned, None


def _has_partner(name: str, expected: Callable[[str], Collection[tuple[int, ...]]]) -> bool:
    """Whether the other tensor of a gated module is expected too."""
    end = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
    return any(bool(expected(name.replace(one, other))) for one, other in end.items() if one in name)
