"""Which results are worth a choice: those that no other beats in both of two metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ArgumentError


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, ascending; more is better in both coordinates.

        q dominates p:   q_0 >= p_0 and q_1 >= p_1, and one of them is greater

    On the front are all points that no other dominates; equal ones are on it together. In O(n log n). Raises
    ArgumentError for a coordinate that is not a finite number.

    >>> pareto_front([(50.1, 43.5), (47.0, 71.7), (46.0, 67.9), (46.2, 75.3)])
    [0, 1, 3]
    """
    for point in points:
        if not all(map(math.isfinite, point)):
            raise ArgumentError(f"the point {tuple(point)} is not two finite numbers")
    front, best = [], -math.inf  # the largest second coordinate among points with a larger first one
    last = (math.nan, math.nan)
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        point = points[index]
        if point[1] > best or point == last:
            front.append(index)
            best, last = point[1], point
    return sorted(front)
