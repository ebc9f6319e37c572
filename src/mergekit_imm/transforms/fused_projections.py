"""Projections that one model stores singly and another fused, concatenated: q, k, v; gate and up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ..checkpoint.lazy_tensor import Piece, Pieces, Tensor, sliced
from ..model.layout_names import JOINTS, canonical

Named = tuple[dict[str, Tensor], dict[str, str]]  # tensors by name, and their original names


def split_or_fuse(
    role: str, tensors: Mapping[str, Tensor], original_names: Mapping[str, str], base: Mapping[str, Tensor]
) -> Named:
    """Split or fuse a model's projections to match the base; returns all its tensors and their original names.

        whole = [part 0; part 1; ...]    # along one dimension, with the base's sizes

    Modules match by canonical name, else by their numbers and last component.
    """
    found, names = dict(tensors), dict(original_names)
    unmatched = {name: canonical(name) for name in tensors if name not in base}
    free = {canonical(name): tensor for name, tensor in base.items() if name not in tensors} if unmatched else {}
    for parts, whole, dim, ends in JOINTS:
        for end in ends:
            each = [f"{part}{end}" for part in parts]
            there = _modules(free, [*each, whole + end])
            if not there[0]:
                continue
            made = _fused(role, found, names, unmatched, there, each, whole + end, dim)
            made += _split(role, found, names, unmatched, there, each, whole + end, dim)
            gone = {name for olds, _ in made for name in olds}
            found = {name: tensor for name, tensor in found.items() if name not in gone}
            names = {name: old for name, old in names.items() if name not in gone}
            for _, news in made:
                for name, tensor, old in news:
                    found[name], names[name] = tensor, old
            unmatched = {name: spelling for name, spelling in unmatched.items() if name not in gone}
    return found, names


def waits_for_others(name: str, base: Collection[str]) -> bool:
    """Whether a tensor is a part of one that the base stores fused, under any of these names.

    >>> waits_for_others("layers.0.self_attn.q_proj.weight", ["h.0.attn.qkv.weight"])
    True
    """
    there = [*map(canonical, base)]
    for parts, whole, _, ends in JOINTS:
        for end in ends:
            is_part = any(_stem(canonical(name), part + end) is not None for part in parts)
            if is_part and any(_stem(other, whole + end) is not None for other in there):
                return True
    return False


Module = dict[str, Tensor]  # tensors of a module of the base, by name suffix
Modules = tuple[dict[str, Module], dict[tuple[str, ...], Module]]


def _modules(free: Mapping[str, Tensor], ends: Sequence[str]) -> Modules:
    """Return the base's modules with tensors of these suffixes, by path, and by short key where it is unique."""
    found: dict[str, Module] = defaultdict(dict)
    for name, tensor in free.items():
        for end in ends:
            stem = _stem(name, end)
            if stem is not None:
                found[stem][end] = tensor
    alike: dict[tuple[str, ...], list[Module]] = defaultdict(list)
    for path, module in found.items():
        alike[_alike(path)].append(module)
    return found, {key: modules[0] for key, modules in alike.items() if len(modules) == 1}


def _module(stem: str, there: Modules) -> Module:
    """The base's module that matches a path; empty if there is none."""
    return there[0].get(stem) or there[1].get(_alike(stem)) or {}


def _alike(stem: str) -> tuple[str, ...]:
    """The short key of a path: its numbers and last component, the same across models."""
    parts = stem.rstrip(".").split(".")
    return (*(part for part in parts if part.isdigit()), parts[-1])


# What was split or fused, and the result: old names; (new name, tensor, original name).
Made = list[tuple[list[str], list[tuple[str, Tensor, str]]]]


def _stem(name: str, end: str) -> str | None:
    """The part of a name before a suffix; None if it does not end in it."""
    return name.removesuffix(end) if name == end or name.endswith(f".{end}") else None


def _fused(
    role: str,
    tensors: Mapping[str, Tensor],
    original_names: Mapping[str, str],
    unmatched: Mapping[str, str],
    there: Modules,
    parts: Sequence[str],
    whole: str,
    dim: int,
) -> Made:
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    for name, spelling in sorted(unmatched.items()):
        for part in parts:
            stem = _stem(spelling, part)
            if stem is not None:
                stems[stem][part] = name
    made: Made = []
    for stem, members in stems.items():
        if set(members) != set(parts) or set(_module(stem, there)) != {whole}:
            continue
        names = [members[part] for part in parts]
        shapes = [tensors[name].shape for name in names]
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1 or any(len(s) <= dim for s in shapes):
            continue
        pieces, at = [], 0
        for name, shape in zip(names, shapes, strict=True):
            pieces.append(Piece(role, tensors[name], (0,) * dim + (at,) + (0,) * (len(shape) - dim - 1)))
            at += shape[dim]
        new = stem + whole
        shape = (*shapes[0][:dim], at, *shapes[0][dim + 1 :])
        old = " + ".join([original_names[names[0]], *(original_names[name].split(".")[-2] for name in names[1:])])
        made.append((names, [(new, Pieces(new, shape, tuple(pieces)), old)]))
    return made


def _split(
    role: str,
    tensors: Mapping[str, Tensor],
    original_names: Mapping[str, str],
    unmatched: Mapping[str, str],
    there: Modules,
    parts: Sequence[str],
    whole: str,
    dim: int,
) -> Made:
    made: Made = []
    for name, spelling in sorted(unmatched.items()):
        stem = _stem(spelling, whole)
        if stem is None:
            continue
        shape = tensors[name].shape
        module = _module(stem, there)
        if set(module) != set(parts) or any(len(tensor.shape) <= dim for tensor in module.values()):
            continue
        sizes = [module[part].shape[dim] for part in parts]
        if len(shape) <= dim or sum(sizes) != shape[dim]:
            continue
        news, at = [], 0
        for part, size in zip(parts, sizes, strict=True):
            new = stem + part
            place = ", ".join([*[":"] * dim, f"{at}:{at + size}"])
            news.append((new, _box(role, tensors[name], new, dim, at, size), f"{original_names[name]}[{place}]"))
            at += size
        made.append(([name], news))
    return made


def _box(role: str, tensor: Tensor, name: str, dim: int, at: int, size: int) -> Tensor:
    """Indices at..at + size of a tensor along a dimension, as a tensor of their own."""
    shape = tensor.shape
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    run = (size, *shape[dim + 1 :])
    firsts = [(number * shape[dim] + at) * inner for number in range(outer)]
    if outer == 1:
        return sliced(tensor, role, name, firsts[0], (*shape[:dim], *run))
    assert dim == 1
    pieces = (
        Piece(role, sliced(tensor, role, name, first, (1, *run)), (number, *(0 for _ in run)))
        for number, first in enumerate(firsts)
    )
    return Pieces(name, (outer, *run), tuple(pieces))
