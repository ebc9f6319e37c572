"""Schedules: values such as alpha as functions of the round, an integer from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .common.messages import shown
from .errors import ArgumentError

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return a schedule with the same value in every round.

    >>> constant(0.5)(7)
    0.5
    """
    return lambda _: value


def linear(first: float, last: float, rounds: int) -> Schedule:
    """Return a linear schedule: first + (last - first) * t / (rounds - 1) in round t, and `last` in later rounds.

    >>> [linear(0.2, 0.8, 3)(t) for t in range(4)]
    [0.2, 0.5, 0.8, 0.8]
    """
    return lambda t: first if t <= 0 else last if t >= rounds - 1 else first + (last - first) * t / (rounds - 1)


def cosine(first: float, last: float, rounds: int) -> Schedule:
    """Return a cosine schedule: last + (first - last) * (1 + cos(pi * t / (rounds - 1))) / 2, and `last` later.

    >>> [round(cosine(0.2, 0.8, 3)(t), 3) for t in range(4)]
    [0.2, 0.5, 0.8, 0.8]
    """

    def value(t: int) -> float:
        if t <= 0:
            return first
        return last if t >= rounds - 1 else last + (first - last) * (1 + math.cos(math.pi * t / (rounds - 1))) / 2

    return value


def listed(values: Sequence[float]) -> Schedule:
    """Return a schedule with one value per round. It raises ArgumentError for a round beyond the list.

    >>> listed([0.3, 0.5])(1)
    0.5
    """

    def value(t: int) -> float:
        if not 0 <= t < len(values):
            raise ArgumentError(f"there are {len(values)} values and none for round {t} (rounds count from 0)")
        return values[t]

    return value


def parse_schedule(text: str, rounds: int) -> Schedule:
    """Parse a schedule: "0.5", "0.3,0.5,0.7", "linear:0.3,0.7" or "cosine:0.3,0.7".

    Raises ArgumentError for other texts, and for a list without exactly one value per round.

    >>> parse_schedule("linear:0.2,0.8", 3)(1)
    0.5
    """
    kind, _, rest = text.rpartition(":")
    try:
        values = [float(part) for part in rest.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)) or kind not in ("", "linear", "cosine"):
        raise ArgumentError(
            f"'{shown(text)}' is not a schedule; write 0.5, or 0.3,0.5,0.7, or linear:0.3,0.7, or cosine:0.3,0.7; alpha"
            " may also be choose:0.2,0.4,0.6,0.8 or choose:auto"
        )
    if kind:
        if len(values) != 2:
            raise ArgumentError(f"'{shown(text)}' has {len(values)} values; {kind} takes the first and the last")
        return (linear if kind == "linear" else cosine)(values[0], values[1], rounds)
    if len(values) == 1:
        return constant(values[0])
    if len(values) != rounds:
        raise ArgumentError(
            f"'{shown(text)}' has {len(values)} values for {rounds} rounds; give one per round"
            " (a decimal takes a point)"
        )
    return listed(values)
