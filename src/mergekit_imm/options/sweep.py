"""Sweeps: several values of alpha, drop and seed, one output for each combination."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.messages import first_few, shown
from ..errors import ArgumentError
from .options import MergeOptions, options_from

SWEPT = ("alpha", "drop", "seed")


@dataclass(frozen=True)
class Point:
    """One merge of a sweep."""

    out: str
    values: Mapping[str, Any]  # alpha, drop and seed


def is_list(value: object) -> bool:
    """Whether a value is a list of values."""
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return False
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def points(out: str, values: Mapping[str, Any]) -> list[Point]:
    """Return the merges of a sweep: the product of the lists among alpha, drop and seed.

    {alpha}, {drop} and {seed} in `out` are replaced by the values as given; other braces stay. Raises ArgumentError
    for an empty list, and for two merges with one output.

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
            listed = first_few([shown(text, 20) for text, _ in several], ", ")
            raise ArgumentError(
                f"{name} is a list of {len(several)} values ({listed}), but the output {shown(out)} does not contain"
                f" {{{name}}}; use a name such as '{shown(out)}-{{{name}}}'"
            )
    merges: list[Point] = []
    for combination in itertools.product(*lists.values()):
        given = dict(zip(lists, combination, strict=True))
        name = re.sub(r"\{(alpha|drop|seed)\}", lambda match, given=given: given[match[1]][0], out)  # type: ignore[misc]
        merges.append(Point(name, {key: value for key, (_, value) in given.items()}))
    twice = [point.out for number, point in enumerate(merges) if point.out in {p.out for p in merges[:number]}]
    if twice:
        raise ArgumentError(f"two merges would go to the output {shown(twice[0])}; give each value once")
    return merges


def sweep(out: str, given: Mapping[str, Any]) -> list[tuple[str, MergeOptions]]:
    """Return output and options of each merge of a sweep; alpha, drop and seed in `given` may be lists.

    Raises ArgumentError as `points` and `MergeOptions` do, and for merges that cannot share one reading of the inputs.
    """
    if "{" not in out and not any(is_list(given[name]) for name in SWEPT):
        return [(out, options_from(given, MergeOptions))]
    merges = [
        (point.out, options_from({**given, **point.values}, MergeOptions))
        for point in points(out, {name: given[name] for name in SWEPT})
    ]
    sparsify = merges[0][1].sparsify
    if sparsify != "dare" and len({(each.drop, each.seed) for _, each in merges}) > 1:
        raise ArgumentError(
            f"several drops or seeds with sparsify {shown(sparsify)}: each drops other elements; merge them one by"
            " one (several alphas can be merged together)"
        )
    return merges


def _number(name: str, value: Any) -> Any:
    """Parse a value of a list. Commands pass values as typed, because outputs are named by them."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if name == "seed" else float(value)
    except ValueError:
        raise ArgumentError(f"{name} {shown(value)} is not a number; give numbers, such as [0.3, 0.5]") from None
