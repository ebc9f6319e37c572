"""Options of merges that come later, after a training: what is wrong with them is found now, from the base alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.open_checkpoint import open_checkpoint
from ..common.messages import shown
from ..engine.workers import check_device, check_workers
from ..errors import ArgumentError
from ..model.rename import parse_rename
from ..numerics.mask import arithmetic
from ..options.layer_factors import factors_of
from ..options.recipe import Parameters, parse_size
from ..plan.compatibility import selection
from ..plan.open_inputs import listed, without_quantisation


def keywords(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's keyword-only arguments."""
    return {each.name for each in inspect.signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY}


def check_keywords(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise ArgumentError for a name that is none of the known ones; it says which is meant.

    >>> check_keywords(["aplha"], ["alpha", "drop"], "a merge")
    Traceback (most recent call last):
    mergekit_imm.errors.ArgumentError: 'aplha' is no option of a merge; did you mean 'alpha'?
    """
    for name in given:
        if name in known:
            continue
        near = get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"its options are {', '.join(sorted(known))}"
        raise ArgumentError(f"'{shown(name)}' is no option of {what}; {hint}")


def check_options(
    base: str | Path, options: Mapping[str, Any], *, points: Sequence[Mapping[str, float]] = ({},)
) -> None:
    """Raise MergeError if a merge with a base would refuse these options, whatever the models that are trained.

    `options` are keyword arguments of `merge_checkpoints` or `merge_into`; `points` alphas and drops that they are used
    with. Values are checked first, then the headers of the base are read: patterns and layers must be its own. What
    only a trained model can tell (patterns of `take` for tensors of its own) is left to the merge.
    """
    check_workers(options.get("workers"))
    check_device(options.get("device", "cpu"))
    decide = {each.name for each in fields(Parameters)}
    values = listed(**{name: value for name, value in options.items() if name in decide})
    values["dtype"] = values.get("dtype") or "base"
    values["iteration"] = values.get("iteration") or 0
    if values.get("max_shard_size") is not None:
        values["max_shard_size"] = parse_size(values["max_shard_size"])
    parameters = [Parameters(**{**values, **point}) for point in points]
    p = parameters[0]
    opened = open_checkpoint(base, "base", dry_run=True, leave_out=p.leave_out)
    if not p.dequantize:  # it may be the trained model alone that is FP8
        without_quantisation({"base": opened}, p)
    taken = tuple(each for each in p.take if any(re.search(each, name) for name in opened.tensors))
    selection(replace(p, take=taken), opened, opened)
    _check_last_rename(p.rename, opened)
    factors = factors_of(opened.tensors, p.importance, p.layer_factors, p.shrink, p.clip)
    for each in parameters:
        arithmetic(alpha=each.alpha, drop=each.drop, factor=max(factors.values(), default=1.0))


def _check_last_rename(rules: Sequence[str], base: Checkpoint) -> None:
    """Raise ArgumentError if the last rule makes names that cannot be the base's."""
    if not rules:
        return
    _, replacement = parse_rename(rules[-1])
    parts = re.split(r"\\(?:\d+|g<\w+>)", replacement)  # between what it takes over from the name
    if any("\\" in part for part in parts):
        return
    wanted = re.compile(".*".join(map(re.escape, parts)))
    if not any(map(wanted.search, base.tensors)):
        raise ArgumentError(
            f"rename rule '{shown(rules[-1])}' makes names with '{shown(replacement)}', and no tensor of {base.label}"
            f" has such a name; they are like {shown(next(iter(base.tensors), ''))!r}"
        )
