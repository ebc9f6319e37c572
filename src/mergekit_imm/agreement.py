"""Do the models of a merge hold the same tensors? From names, shapes and dtypes alone; and what the options choose."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from .checkpoint.computed import Tensor
from .checkpoint.experts import is_fused, splits_experts
from .checkpoint.source import Checkpoint
from .checkpoint.tensorfile import MERGED, WHOLE
from .checkpoint.tokens import added_tokens
from .errors import ArgumentError, CheckpointError, MergeError, MismatchError, shown
from .layers import is_end, only_in, ready_option
from .recipe import Parameters
from .ties import Group

Choose = Callable[[str, list[str], str], bool]  # option, names, key
Complain = Callable[[MergeError, Collection[str]], None]  # what is wrong, and with which tensors


def refuse(error: MergeError, _: Collection[str] = ()) -> None:
    """Complain by raising."""
    raise error


def side_of(each: Checkpoint, name: str, group: Group | None) -> Tensor | None:
    """The tensor that a name means in a checkpoint."""
    if name in each.tensors or group is None:
        return each.tensors.get(name)
    # Who stores the tied tensor under another of its names means it by this one, too; an adapter, while it is tied.
    names = group.siblings if each.adapter is None else group.names
    return next((found for n in names if (found := each.tensors.get(n))), None)


def check_names(
    used: Mapping[str, Checkpoint], parameters: Parameters, groups: Mapping[str, Group], complain: Complain = refuse
) -> None:
    """Complain of tensors that only one of the models has, and no option permits."""
    base, sft = used["base"], used["sft"]
    kept, taken = matcher(parameters.keep), matcher(parameters.take)
    for role, each in used.items():
        if role == "base" or each.adapter is not None:  # whose names were looked up in the base's
            continue
        differ = [{*one} - {*two, *groups} for one, two in ((base.tensors, each.tensors), (each.tensors, base.tensors))]
        rename = "; or, if they only have other names, --rename REGEX=REPLACEMENT" if all(differ) else ""
        allowed = {n for n in base.tensors if kept(n)} | set(groups)
        names = set(base.tensors) - allowed
        option = "" if splits_experts(names - {*each.tensors}, each.tensors) else "--keep"
        complaint = only_in(names, each.tensors, base.label, each.label, option)
        if complaint:
            complain(MismatchError(complaint + rename), names - set(each.tensors))
        permitted = {n for n in each.tensors if taken(n) and n in sft.tensors} | set(groups)
        names = set(each.tensors) - permitted
        option = "--take" if role == "sft" and not splits_experts(names - {*base.tensors}, base.tensors) else ""
        complaint = only_in(names, base.tensors, each.label, base.label, option)
        if complaint and role == "start":
            complaint += "; a start holds the base's tensors: save it again, or take the delta from the base instead"
            complaint += " (--reference base)"
        if complaint:
            complain(MismatchError(complaint + (rename if role == "sft" else "")), names - set(base.tensors))


def matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test: is a name found by one of the patterns?"""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def selection(parameters: Parameters, base: Checkpoint, sft: Checkpoint) -> Choose:
    """Check the patterns against the names, and return a test: does an option name one of these tensors?"""
    every = [*base.tensors, *(name for name in sft.tensors if name not in base.tensors)]
    for option in ("keep", "take", "no_drop"):
        names = every if option == "take" else list(base.tensors)
        for pattern in getattr(parameters, option):
            if not any(re.search(pattern, name) for name in names):
                raise ArgumentError(
                    f"--{option.replace('_', '-')} '{shown(pattern)}' matches none of the {len(names)} tensor names,"
                    f" such as {shown(names[0]) if names else ''!r}"
                )
    matchers = {option: matcher(getattr(parameters, option)) for option in ("keep", "take", "no_drop")}
    for name in base.tensors:
        if matchers["keep"](name) and matchers["take"](name):
            raise ArgumentError(f"tensor '{shown(name)}' is both kept and taken; change --keep or --take")
    return lambda option, names, key: any(map(matchers[option], {*names, key}))


def check_alike(name: str, sides: Mapping[str, Tensor], used: Mapping[str, Checkpoint]) -> str:
    """Return "float" or "whole"; raise unless all sides have one shape and one mergeable kind of dtype."""
    base = sides["base"]
    for role, side in sides.items():
        if side.dtype not in (*MERGED, *WHOLE):
            raise CheckpointError(
                f"tensor '{shown(name)}' is {side.dtype} in {used[role].label}; quantised, float8 and complex"
                f" tensors are not merged: use an unquantised checkpoint, or {ready_option('--keep', name)} or"
                f" {ready_option('--take', name)}"
            )
    for role, side in sides.items():
        both = (
            f"tensor '{shown(name)}' is {base.dtype} {list(base.shape)} in {used['base'].label} and"
            f" {side.dtype} {list(side.shape)} in {used[role].label}"
        )
        if side.shape != base.shape:
            hint = f"use {ready_option('--keep', name)} for the base's"
            if 0 in (side.count, base.count):
                hint = "the empty one was saved without gathering its parts (ZeRO-3?): save that model again"
            elif is_fused(name):
                hint = "their experts differ in number or size, so the models are not one architecture"
            elif is_end(name) and side.shape[1:] == base.shape[1:]:
                told = added_tokens(used["base"], used[role])
                hint = (
                    f"the vocabularies differ{f' ({told})' if told else ''}; say whose the result has, --vocab base or"
                    " --vocab sft, which merge the rows that both have"
                )
            raise MismatchError(f"{both}; shapes must be equal: {hint}")
        same = side.dtype in MERGED if base.dtype in MERGED else side.dtype == base.dtype
        if not same:
            raise MismatchError(
                f"{both}; integers are merged with neither floats nor other integers:"
                f" use {ready_option('--keep', name)}"
            )
    return "float" if base.dtype in MERGED else "whole"


def main_dtype(base: Checkpoint) -> str:
    """The dtype of most float elements; for tensors that only the sft has."""
    floats = Counter[str]()
    for tensor in base.tensors.values():
        if tensor.dtype in MERGED:
            floats[tensor.native] += tensor.count
    return floats.most_common(1)[0][0] if floats else "F32"
