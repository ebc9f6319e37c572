"""Numbers that change over the rounds of a loop: functions of the round, counted from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .common.messages import shown
from .errors import ArgumentError

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """Return the same value for every round.

    >>> constant(0.5)(7)
    0.5
    """
    return lambda _: value


def linear(first: float, last: float, rounds: int) -> Schedule:
    """Return a line: first + (last - first) * t / (rounds - 1), and `last` in all rounds behind.

    >>> [linear(0.2, 0.8, 3)(t) for t in range(4)]
    [0.2, 0.5, 0.8, 0.8]
    """
    return lambda t: first if t <= 0 else last if t >= rounds - 1 else first + (last - first) * t / (rounds - 1)


def cosine(first: float, last: float, rounds: int) -> Schedule:
    """Return half a wave: last + (first - last) * (1 + cos(pi * t / (rounds - 1))) / 2, and `last` behind.

    >>> [round(cosine(0.2, 0.8, 3)(t), 3) for t in range(4)]
    [0.2, 0.5, 0.8, 0.8]
    """

    def value(t: int) -> float:
        if t <= 0:
            return first
        return last if t >= rounds - 1 else last + (first - last) * (1 + math.cos(math.pi * t / (rounds - 1))) / 2

    return value


def listed(values: Sequence[float]) -> Schedule:
    """Return a value for each round, of a list. Raises ArgumentError for a round that has none.

    >>> listed([0.3, 0.5])(1)
    0.5
    """

    def value(t: int) -> float:
        if not 0 <= t < len(values):
            raise ArgumentError(f"there are {len(values)} values, and none for round {t} (rounds count from 0)")
        return values[t]

    return value


def parse_schedule(text: str, rounds: int) -> Schedule:
    """Return the schedule that a text stands for: "0.5", "0.3,0.5,0.7", "linear:0.3,0.7" or "cosine:0.3,0.7".

    Raises ArgumentError for any other text, and for a list that is not of one value for each round.

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
            f"'{shown(text)}' is no number for each round; write 0.5, or 0.3,0.5,0.7, or linear:0.3,0.7, or"
            " cosine:0.3,0.7"
        )
    if kind:
        if len(values) != 2:
            raise ArgumentError(f"'{shown(text)}' has {len(values)} values; {kind} takes the first and the last")
        return (linear if kind == "linear" else cosine)(values[0], values[1], rounds)
    if len(values) == 1:
        return constant(values[0])
    if len(values) != rounds:
        raise ArgumentError(
            f"'{shown(text)}' has {len(values)} values, and there are {rounds} rounds; give one for each"
        )
    return listed(values)
