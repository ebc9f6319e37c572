"""Intervals of rates: coverage against exact enumeration of all samples, and no width of zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergekit_imm.evaluation.bootstrap import bootstrap
from mergekit_imm.evaluation.rates import difference_interval, rate_interval

SIZES = (10, 20, 50, 100, 200)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize("n", SIZES)
def test_coverage_of_a_rate(n: int) -> None:
    """Exact: the sum of the probabilities of all samples whose interval holds the true rate. Nominal 95 %."""
    found = [rate_interval(np.array([1.0] * k + [0.0] * (n - k))) for k in range(n + 1)]
    for rate in RATES:
        covered = sum(binomial(n, k, rate) for k, each in enumerate(found) if each.low <= rate <= each.high)
        assert covered >= 0.925, rate


@pytest.mark.parametrize("n", [10, 20, 50])
def test_coverage_of_a_difference(n: int) -> None:
    """Exact: over all numbers of gained and lost problems."""
    intervals = {
        (up, down): difference_interval(
            np.array([0.0] * (n - down) + [1.0] * down), np.array([1.0] * up + [0.0] * (n - up))
        )
        for up in range(n + 1)
        for down in range(n + 1 - up)
    }
    for gain, loss in ((0.0, 0.0), (0.05, 0.05), (0.1, 0.02), (0.2, 0.1), (0.3, 0.0), (0.02, 0.02)):
        covered = above = 0.0
        for (up, down), each in intervals.items():
            chance = (
                math.comb(n, up)
                * math.comb(n - up, down)
                * gain**up
                * loss**down
                * (1 - gain - loss) ** (n - up - down)
            )
            covered += chance * (each.low <= gain - loss <= each.high)
            above += chance * each.is_above
        assert covered >= 0.93, (gain, loss)
        if gain == loss:
            assert above <= 0.026


def test_where_the_bootstrap_has_no_width() -> None:
    ones = np.ones(20)
    assert bootstrap(lambda i: float(ones[i].mean()), 20).low == 1
    assert 0.7 < rate_interval(ones).low < 0.9
    equal = difference_interval(ones, ones)
    assert -0.2 < equal.low < -0.05
    assert equal.high == -equal.low


def test_intervals_by_hand() -> None:
    """s^2 of 1, 1, 0 and the added 0, 0, 1, 1 is 4/7 * 3/7."""
    found = rate_interval(np.array([1.0, 1.0, 0.0]))
    half = 1.959963984540054 * math.sqrt(4 / 7 * 3 / 7 / 7)
    assert found.n == 3
    assert found.value == pytest.approx(2 / 3)
    assert found.low == pytest.approx(4 / 7 - half)
    assert found.high == pytest.approx(4 / 7 + half)
    gained = difference_interval(np.zeros(4), np.array([1.0, 0.5, 0.0, 0.0]))
    values = [1, 0.5, 0, 0, 1, -1]
    mean = sum(values) / 6
    half = 1.959963984540054 * math.sqrt(sum((each - mean) ** 2 for each in values) / 36)
    assert [gained.low, gained.high] == pytest.approx([mean - half, mean + half])


def test_little_evidence_is_no_gain() -> None:
    """As a sign test says: five of five differences in one direction have a chance of 1 in 16 on two sides."""
    for gained, shown in ((4, False), (5, False), (6, True), (7, True)):
        model = np.array([1.0] * gained + [0.0] * (200 - gained))
        assert difference_interval(np.zeros(200), model).is_above is shown


def test_no_interval_without_two_problems() -> None:
    assert math.isnan(rate_interval(np.array([])).value)
    assert math.isnan(rate_interval(np.array([1.0])).low)
    assert rate_interval(np.array([1.0])).value == 1
