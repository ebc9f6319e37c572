"""Importance against change: ranks against a naive reference, fixed correlations, every verdict."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_imm import ArgumentError, MismatchError
from mergekit_imm.analysis.change import WeightChange
from mergekit_imm.analysis.verdict import mismatch, ranks, spearman
from thorough import examples

VALUES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=15)


def change(values: list[float], prefix: str = "h", weight: float = 2.0) -> WeightChange:
    keys = [f"{prefix}.{i}" for i in range(len(values))]
    return WeightChange(dict(zip(keys, values, strict=True)), dict.fromkeys(keys, weight), {}, {})


def keyed(values: list[float], prefix: str = "h") -> dict[str, float]:
    return {f"{prefix}.{i}": value for i, value in enumerate(values)}


def naive_ranks(values: list[float]) -> list[float]:
    """For each value, the number of smaller ones plus half the number of equal ones."""
    return [sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values]


def naive_rho(one: list[float], other: list[float]) -> float:
    x, y = naive_ranks(one), naive_ranks(other)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    scale = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    return cov / scale if scale else math.nan


@given(VALUES)
def test_rho_matches_the_definition(pairs: list[tuple[int, int]]) -> None:
    one, other = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    assert ranks(one).tolist() == naive_ranks(one)
    assert spearman(one, other) == pytest.approx(naive_rho(one, other), abs=1e-12, nan_ok=True)


# From scipy.stats.spearmanr of scipy 1.17.1.
SCIPY = [
    ([2, 1, 4, 1, 7], [7, 7, 6, 3, 1], -0.5000000000000001),
    ([7, 0, 6, 6, 0, 7, 4, 3], [1, 5, 0, 0, 0, 8, 0, 6], 0.1743714581157289),
    ([3, 6, 0, 8, 3, 7, 7, 8, 3, 5, 3, 3], [7, 4, 0, 6, 8, 1, 2, 4, 1, 5, 8, 6], -0.10445238056921634),
    ([8, 3, 4, 4, 7, 8, 6, 0, 7, 3, 6, 6], [2, 5, 8, 5, 1, 7, 8, 1, 2, 8, 6, 5], -0.14621033905573805),
]


@pytest.mark.parametrize(("one", "other", "rho"), SCIPY)
def test_rho_matches_scipy(one: list[int], other: list[int], rho: float) -> None:
    assert spearman(one, other) == pytest.approx(rho, abs=1e-12)


@given(VALUES.filter(lambda pairs: sum(a for a, _ in pairs) > 0), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_order_and_scale_do_not_matter(pairs: list[tuple[int, int]], random: object) -> None:
    one, other = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rho = spearman(one, other)
    assert spearman([one[i] for i in order], [other[i] for i in order]) == pytest.approx(rho, nan_ok=True)
    assert spearman([x**3 for x in one], [math.exp(y) for y in other]) == pytest.approx(rho, nan_ok=True)
    assert spearman([-x for x in one], other) == pytest.approx(-rho, nan_ok=True)


@given(st.lists(st.integers(1, 50), min_size=6, max_size=12))
@settings(max_examples=examples(10))
def test_monotone_transforms_leave_the_whole_interval(values: list[int]) -> None:
    importance = [float(v) for v in values]
    moved = change([float((7 * i) % 11) for i in range(len(values))])
    squared = mismatch(keyed([x * x for x in importance]), moved)
    assert squared.rho == pytest.approx(mismatch(keyed(importance), moved).rho) or math.isnan(squared.rho.value)


def test_thirds_partition_the_layers() -> None:
    found = mismatch(keyed([1, 2, 3, 4, 5, 6, 7, 8]), change([8, 7, 6, 5, 4, 3, 2, 1]))
    assert [third.layers for third in found.thirds.values()] == [
        ("h.0", "h.1"),
        ("h.2", "h.3", "h.4"),
        ("h.5", "h.6", "h.7"),
    ]
    assert [third.importance for third in found.thirds.values()] == pytest.approx([3 / 36, 12 / 36, 21 / 36])
    assert [third.change for third in found.thirds.values()] == pytest.approx([15 / 36, 15 / 36, 6 / 36])


def test_the_verdict() -> None:
    up = [float(i) for i in range(1, 13)]
    assert mismatch(keyed(up), change(up[::-1])).verdict.startswith("Looks superficial: ")
    assert "rho -1.00 [-1.00, -1.00] over 12 layers" in mismatch(keyed(up), change(up[::-1])).verdict
    assert mismatch(keyed(up), change(up)).verdict.startswith("Does not look superficial: ")
    mixed = [3.0, 9, 1, 8, 2, 7, 12, 4, 11, 5, 10, 6]
    assert mismatch(keyed(up), change(mixed)).verdict.startswith("Undecided: the interval contains 0")
    assert mismatch(keyed(up[:5]), change(up[4::-1])).verdict == "Undecided: 5 layers are too few (at least 6)."
    assert mismatch(keyed(up[:6]), change(up[5::-1])).verdict.startswith("Looks superficial")
    flat = mismatch(keyed(up), change([1.0] * 12))
    assert "no order to compare" in flat.verdict
    assert flat.to_dict()["rho"] == {"value": None, "low": None, "high": None, "n": 12}
    still = mismatch(keyed(up), change([0.0] * 12, weight=0.0))
    assert still.thirds["early"].change is None


def test_relative_change_is_separate() -> None:
    up = [float(i) for i in range(1, 9)]
    moved = WeightChange(keyed(up), keyed([x * x for x in up]), {}, {})
    found = mismatch(keyed(up), moved)
    assert (found.rho.value, found.relative.value) == (1.0, -1.0)


def test_layers_must_be_the_same() -> None:
    up = [float(i) for i in range(1, 9)]
    assert mismatch({str(i): x for i, x in enumerate(up)}, change(up)).rho.value == 1.0
    with pytest.raises(ArgumentError, match=r"given for 7 of 8: missing h\.7; name every layer"):
        mismatch(keyed(up[:-1]), change(up))
    with pytest.raises(ArgumentError, match=r"no tensor of the model lies in layer 'h\.7'"):
        mismatch(keyed(up), change(up[:-1]))
    with pytest.raises(ArgumentError, match=r"lies in layer 'g\.0' \(8 such keys\); its layers are h\.0"):
        mismatch(keyed(up, "g"), change(up))
    with pytest.raises(ArgumentError, match="lies in layer 'lm_head'"):
        mismatch({"lm_head": 1.0}, change(up))
    with pytest.raises(ArgumentError, match="must be a finite number"):
        mismatch({**keyed(up), "h.0": math.nan}, change(up))


def test_stacks_are_compared_one_by_one() -> None:
    up = [float(i) for i in range(1, 9)]
    both = WeightChange(keyed(up, "enc") | keyed(up, "dec"), keyed(up, "enc") | keyed(up, "dec"), {}, {})
    with pytest.raises(MismatchError, match=r"2 stacks of layers \(dec, enc\)"):
        mismatch(both.layers, both)
    found = mismatch(keyed(up[::-1], "dec"), both)
    assert (found.rho.value, found.rho.n) == (-1.0, 8)
