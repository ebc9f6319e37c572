"""The choice of alpha by a metric: which alphas to measure next, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..common.messages import shown
from ..errors import ArgumentError
from ..numerics.mask import check_alpha

AUTO = tuple(tenth / 10 for tenth in range(11))  # what `choose:auto` searches
_PREFIX = "choose:"

Seen = Mapping[float, float]  # alpha -> what it measured, more is better


@dataclass(frozen=True)
class Choice:
    """The alphas to choose from, ascending; `is_search`: measure only those that a search needs, not all."""

    alphas: tuple[float, ...]
    is_search: bool = False

    @property
    def at_once(self) -> int:
        """How many merged models are on the disk at once."""
        return 2 if self.is_search else len(self.alphas)


def parse_choice(text: str) -> Choice | None:
    """Parse "choose:0.2,0.4,0.6" or "choose:auto"; None if the text is a schedule. Raises ArgumentError.

    >>> parse_choice("choose:0.6,0.4")
    Choice(alphas=(0.4, 0.6), is_search=False)
    """
    if not text.startswith(_PREFIX):
        return None
    rest = text.removeprefix(_PREFIX)
    if rest == "auto":
        return Choice(AUTO, is_search=True)
    try:
        alphas = sorted(float(part) for part in rest.split(","))
    except ValueError:
        alphas = []
    for alpha in alphas:
        check_alpha(alpha)
    if len(alphas) < 2 or len(set(alphas)) < len(alphas):
        raise ArgumentError(
            f"alpha is '{shown(text)}'; write two or more different alphas, choose:0.2,0.4,0.6,0.8, or choose:auto"
        )
    return Choice(tuple(alphas))


def next_alphas(choice: Choice, seen: Seen) -> tuple[float, ...]:
    """Return which alphas to measure next, given what was seen; none when the best is known.

    Of a list, all. A search asks for two, then for one at a time: a Fibonacci search (Kiefer 1953), which keeps the
    part of the grid that holds the best if the metric rises up to some alpha and falls from there. On the 11 alphas of
    `choose:auto` it measures 4 or 5, and no search can do with fewer in the worst case.

    >>> next_alphas(Choice(AUTO, is_search=True), {0.4: 51.0, 0.7: 48.0})
    (0.2,)
    """
    if not choice.is_search:
        return tuple(alpha for alpha in choice.alphas if alpha not in seen)
    grid = dict(enumerate(choice.alphas, 1))  # the search is for the best place; beyond the last it is worst
    left, right = 1, 2  # Fibonacci numbers, as is their sum
    while left + right <= len(grid):
        left, right = right, left + right
    low, high = 0, left + right  # the best lies between them
    while left < right:
        lacking = tuple(grid[place] for place in (left, right) if place in grid and grid[place] not in seen)
        if lacking:
            return lacking
        before, after = (seen[grid[place]] if place in grid else -math.inf for place in (left, right))
        if before > after:
            high, left, right = right, low + right - left, left
        else:  # of equals the larger alpha
            low, left, right = left, right, left + high - right
    return ()


def best_of(seen: Seen) -> float:
    """Return the alpha that measured most; of equals the largest, whose model is closest to the anchor.

    >>> best_of({0.2: 50.0, 0.4: 51.0, 0.6: 51.0})
    0.6
    """
    return max(seen, key=lambda alpha: (seen[alpha], alpha))


def dip_in(seen: Seen) -> tuple[float, float, float] | None:
    """Return three alphas, ascending, of which the middle one measured less than both others; None if there is no dip.

    Then the metric does not rise to one peak and fall from there, and a search may have missed the best. Of several
    dips the deepest: the smaller of its two falls is the largest.

    >>> dip_in({0.2: 50.0, 0.4: 48.0, 0.7: 51.0, 0.8: 40.0})
    (0.2, 0.4, 0.7)
    """
    alphas = sorted(seen)
    deepest, found = 0.0, None
    for number, alpha in enumerate(alphas[1:-1], 1):
        before, after = (
            best_of({a: seen[a] for a in alphas[:number]}),
            best_of({a: seen[a] for a in alphas[number + 1 :]}),
        )
        depth = min(seen[before], seen[after]) - seen[alpha]
        if depth > deepest:
            deepest, found = depth, (before, alpha, after)
    return found
