"""Intervals of rates, over problems: right near 0 and 1 and for few problems, where a bootstrap has no width."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .bootstrap import Interval

Z = 1.959963984540054  # of 95 %
Numbers = npt.NDArray[np.float64]


def rate_interval(values: Numbers) -> Interval:
    """Return the mean of a rate over problems, with its 95 % interval.

        m -+ 1.96 sqrt(s^2 / (n + 4)),  m and s^2 the mean and variance of the n values and of 0, 0, 1, 1

    Args: `values`, of each problem 0 or 1, or a rate from 0 to 1 such as its pass@k; float64, shape (n). The interval
    is cut at 0 and 1. NaN without values; no interval for n = 1.

    Source: Agresti and Coull, "Approximate is better than exact", The American Statistician 52, 1998: close to Wilson's
    interval for values 0 and 1. For rates in between, the same is ours; docs/evaluation.md has its measured coverage.

    >>> rate_interval(np.array([1.0] * 10))
    Interval(value=1.0, low=0.6738431975807744, high=1.0, n=10)
    """
    return _interval(values, np.array([0.0, 0.0, 1.0, 1.0]), 0.0, 1.0)


def difference_interval(reference: Numbers, model: Numbers, *, k: int = 1) -> Interval:
    """Return the mean difference of two models' rates over the same problems, with its paired 95 % interval.

        m -+ 1.96 sqrt(s^2 / (n + 2)),  m and s^2 the mean and variance of the n differences and of -e and e

    Args: `reference` and `model`, rates of each problem, float64, shape (n). e is the largest difference, or 1 if there
    is none; for pass@k with k > 1 it is 1, as these rates saturate and say little of problems not seen. The interval is
    cut at -1 and 1.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", 2012, for values 0 and 1; e for other rates is ours.

    >>> difference_interval(np.zeros(50), np.array([1.0] * 6 + [0.0] * 44)).is_above
    True
    """
    differences = model - reference
    extreme = float(np.abs(differences).max(initial=0)) if k == 1 else 1.0
    return _interval(differences, np.array([-1.0, 1.0]) * (extreme or 1.0), -1.0, 1.0)


def _interval(values: Numbers, added: Numbers, least: float, most: float) -> Interval:
    n = len(values)
    value = float(values.mean()) if n else math.nan
    if n < 2:
        return Interval(value, math.nan, math.nan, n)
    all_values = np.concatenate([values, added])
    middle, half = float(all_values.mean()), Z * math.sqrt(all_values.var() / len(all_values))
    low, high = min(value, middle - half), max(value, middle + half)
    return Interval(value, max(low, least), min(high, most), n)
