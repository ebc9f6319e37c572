"""Bootstrap intervals: how much a number would vary with other problems of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.checks import check_callable, check_count, is_number
from ..common.messages import shown
from ..errors import ArgumentError

Indices = npt.NDArray[np.int64]
RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; `n` is the sample size (problems or layers).

    `low` and `high` are NaN if there is no interval: n < 2, or the number is undefined in the sample or in too many
    resamples.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def is_above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """Return the interval as plain data, with None for NaN."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {**{key: x if math.isfinite(x) else None for key, x in values.items()}, "n": self.n}


def number_text(value: float, sign: str = "") -> str:
    """Return a number as tables show it; `sign` "+" for differences."""
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


def range_text(found: Interval, sign: str = "") -> str:
    """Return the interval of a number as tables show it."""
    return "-" if math.isnan(found.low) else f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def text_of(found: Interval, sign: str = "+") -> str:
    """Return a number with its interval, if it has one; `sign` "" for numbers that are no differences.

    >>> text_of(Interval(0.1, -0.05, 0.2, 9))
    '+0.100 [-0.050, +0.200]'
    """
    number = number_text(found.value, sign)
    return number if math.isnan(found.low) else f"{number} {range_text(found, sign)}"


def bootstrap(
    statistic: Callable[[Indices], float],
    n: int,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return a statistic of a sample of size n, with its percentile bootstrap interval.

        [q_(1-c)/2, q_(1+c)/2]  of statistic(i), i = n draws with replacement from 0..n-1, `resamples` times

    Args: `statistic`, from an int64 array of n indices to a number; for a *paired* comparison of two models, return the
    difference of both at these indices. `confidence` c, 0 < c < 1. Resamples in which the statistic is NaN (undefined)
    are left out; if they are more than 1 - c of all, there is no interval. The same arguments give the same interval.
    Raises ArgumentError for values out of range.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    >>> import numpy as np
    >>> solved = np.array([1, 1, 0, 1, 0, 1, 1, 0])
    >>> bootstrap(lambda i: solved[i].mean(), len(solved))
    Interval(value=0.625, low=0.25, high=0.875, n=8)
    """
    check_callable("statistic", statistic, "from an array of indices to a number")
    for name, count, least in (("n", n, 1), ("resamples", resamples, 1), ("seed", seed, 0)):
        check_count(name, count, least)
    if not is_number(confidence) or not 0 < confidence < 1:
        raise ArgumentError(f"confidence is {shown(repr(confidence), 60)}; it must lie between 0 and 1")
    try:
        value = float(statistic(np.arange(n)))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"statistic failed: {shown(error)}; it takes indices and returns a number") from error
    if n < 2 or math.isnan(value):
        return Interval(value, math.nan, math.nan, n)
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(generator.integers(0, n, n)) for _ in range(resamples)], np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < confidence * resamples:
        return Interval(value, math.nan, math.nan, n)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), n)
