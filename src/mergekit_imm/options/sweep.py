"""Sweeps: lists of values in place of one, and an output for each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.messages import shown
from ..errors import ArgumentError
from .options import MergeOptions, options_from

SWEPT = ("alpha", "drop", "seed")


@dataclass(frozen=True)
class Point:
    """One merge of a sweep."""

    out: str
    values: Mapping[str, Any]  # of alpha, drop and seed


def is_list(value: object) -> bool:
    """Whether a value stands for several."""
    if getattr(value, "ndim", None) == 0:  # of numpy or torch
        return False
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def points(out: str, values: Mapping[str, Any]) -> list[Point]:
    """Return the merges that values of alpha, drop and seed stand for: the product of those that are lists.

    `out` names each by {alpha}, {drop} and {seed}, replaced by the values as they were given; other braces stay.
    Raises ArgumentError for an empty list, and where two merges would go to one output.

    >>> [point.out for point in points("out-{alpha}", {"alpha": [0.3, 0.5], "drop": 0.9, "seed": 0})]
    ['out-0.3', 'out-0.5']
    """
    lists = {
        name: [(str(each), _number(name, each)) for each in value] if is_list(value) else [(str(value), value)]
        for name, value in values.items()
    }
    for name, several in lists.items():
        if not several:
            raise ArgumentError(f"{name} is an empty list; give a value, or several")
        if len(several) > 1 and f"{{{name}}}" not in out:
            raise ArgumentError(
                f"{name} is a list of {len(several)} values, and the output {shown(out)} does not say which is which;"
                f" name it such as '{shown(out)}-{{{name}}}'"
            )
    found = []
    for chosen in itertools.product(*lists.values()):
        given = dict(zip(lists, chosen, strict=True))
        name = re.sub(r"\{(alpha|drop|seed)\}", lambda match, given=given: given[match[1]][0], out)  # type: ignore[misc]
        found.append(Point(name, {key: value for key, (_, value) in given.items()}))
    twice = [point.out for number, point in enumerate(found) if point.out in {p.out for p in found[:number]}]
    if twice:
        raise ArgumentError(f"two merges would go to the output {shown(twice[0])}; give each value once")
    return found


def sweep(out: str, given: Mapping[str, Any]) -> list[tuple[str, MergeOptions]]:
    """Return the output and the options of each merge that values stand for, where alpha, drop and seed may be lists.

    Raises ArgumentError as `points` and `MergeOptions` do, and where the merges could not read their inputs once.
    """
    found = [
        (point.out, options_from({**given, **point.values}, MergeOptions))
        for point in points(out, {name: given[name] for name in SWEPT})
    ]
    sparsify = found[0][1].sparsify
    if sparsify != "dare" and len({(each.drop, each.seed) for _, each in found}) > 1:
        raise ArgumentError(
            f"several drops or seeds with sparsify {shown(sparsify)}: what is dropped differs for each of them; merge"
            " them one by one (several alphas are read once)"
        )
    return found


def _number(name: str, value: Any) -> Any:
    """A value of a list as a number; a command gives it as typed, so that outputs can be named by it."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if name == "seed" else float(value)
    except ValueError:
        raise ArgumentError(f"{name} {shown(value)} is not a number; give numbers, such as [0.3, 0.5]") from None
