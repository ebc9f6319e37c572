"""Sparsifiers: which elements of a delta to drop, and how to rescale the rest.

dare          drop at random with probability p, divide the rest by 1 - p
trim          keep the largest, unchanged
della:EPS     drop at random, with p from drop + EPS (smallest of its row) to drop - EPS (largest);
              divide each kept element by its own keep probability
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common.checks import is_number
from ..common.messages import shown
from ..errors import ArgumentError
from .mask import KEEP_ALL, check_drop

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

EPSILON = 0.1  # for "della" without a number


@dataclass(frozen=True)
class Sparsifier:
    """A sparsifier as an option names it; `epsilon` is the distance of DELLA's extreme drop rates from `drop`."""

    kind: str
    epsilon: float = 0.0


def parse_sparsify(text: str, drop: float) -> Sparsifier:
    """Parse "dare", "trim", "della" or "della:0.1". Raises ArgumentError.

    >>> parse_sparsify("della:0.2", drop=0.5)
    Sparsifier(kind='della', epsilon=0.2)
    """
    kind, colon, rest = str(text).partition(":")
    if kind in ("dare", "trim") and not colon:
        return Sparsifier(kind)
    try:
        epsilon = float(rest) if colon else EPSILON
    except ValueError:
        epsilon = math.nan
    if kind != "della" or not epsilon >= 0:
        raise ArgumentError(f"sparsify is '{shown(text)}'; it must be dare, trim, della or della:EPSILON")
    check_epsilon(epsilon, drop)
    return Sparsifier(kind, epsilon)


def check_epsilon(epsilon: float, drop: float) -> None:
    """Raise ArgumentError unless 0 <= epsilon <= drop and drop + epsilon < 1; drop = 0 allows any epsilon >= 0."""
    check_drop(drop)
    if not is_number(epsilon):
        raise ArgumentError(f"epsilon is {shown(repr(epsilon), 60)}; it must be a number")
    if drop == 0 and epsilon >= 0:
        return
    if not (0 <= epsilon <= drop and drop + epsilon < 1):
        most = math.floor(1000 * min(drop, 0.999 - drop)) / 1000
        raise ArgumentError(
            f"epsilon {epsilon!r} does not go with drop {drop!r}: drop rates would run from {drop - epsilon:.4g} to"
            f" {drop + epsilon:.4g}, and must stay in 0 <= p < 1; use della:{max(most, 0.0):g} or less"
        )


def trim_count(drop: float, count: int) -> int:
    """Return how many of `count` elements `trim` keeps without ties: round((1 - drop) * count), at least 1.

    >>> trim_count(0.9, 25)
    2
    """
    return max(1, round((1 - check_drop(drop)) * count))


def keep_thresholds(row: int, drop: float, epsilon: float) -> npt.NDArray[np.int64]:
    """Return DELLA's keep16 for each rank in a row, smallest element first, int64 of shape (row,).

        q = (1 - drop) - epsilon + 2 * epsilon * rank / (row - 1);   keep16 = round(65536 * q), at least 1

    In a row of one element q = 1 - drop.

    >>> keep_thresholds(3, drop=0.5, epsilon=0.25).tolist()
    [16384, 32768, 49152]
    """
    import numpy as np

    share = np.arange(row) / (row - 1) if row > 1 else np.full(row, 0.5)
    rates = ((1 - drop) - epsilon + 2 * epsilon * share) * KEEP_ALL
    return np.clip(np.rint(rates), 1, KEEP_ALL).astype(np.int64)
