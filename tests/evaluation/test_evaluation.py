"""pass@k, diversity, intervals and the verdict, against naive formulas."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_imm import ArgumentError
from mergekit_imm.evaluation import (
    Interval,
    cosine_diversity,
    distinct_equations,
    distinct_n,
    expectation_adjusted_distinct,
    group_disparity,
    improvement_set,
    judge,
    mean_distinct,
    mean_pass_at_k,
    pass_at_k,
)
from mergekit_imm.evaluation.bootstrap import bootstrap
from mergekit_imm.evaluation.diversity import equations

UP, DOWN, FLAT = Interval(0.2, 0.1, 0.3, 50), Interval(-0.2, -0.3, -0.1, 50), Interval(0.0, -0.1, 0.1, 50)


def test_pass_at_k_is_exact() -> None:
    for n in range(1, 40):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
            assert abs(pass_at_k(n, c, k) - exact) < 1e-12


@pytest.mark.parametrize(("n", "c", "k", "value"), [(5, 2, 3, 0.9), (4, 1, 2, 0.5), (10, 0, 3, 0.0), (3, 3, 2, 1.0)])
def test_pass_at_k_of_known_cases(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 8), (5, 0, 0), (0, 0, 1), (5, 6, 1), (5, -1, 1)])
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ArgumentError):
        pass_at_k(n, c, k)


def test_mean_pass_at_k_needs_k_samples_of_every_problem() -> None:
    assert mean_pass_at_k([(5, 2), (4, 1)], 1) == pytest.approx((0.4 + 0.25) / 2)
    with pytest.raises(
        ArgumentError, match=r"pass@4 needs 4 samples of each problem; problem b has 3 \(2 problems have too few\)"
    ):
        mean_pass_at_k({"a": (4, 1), "b": (3, 1), "c": (1, 1)}, 4)
    with pytest.raises(ArgumentError, match="problem 1 has 2;"):
        mean_pass_at_k([(4, 1), (2, 1)], 3)
    with pytest.raises(ArgumentError, match="counts is empty"):
        mean_pass_at_k([], 1)


def test_distinct_n_by_hand() -> None:
    texts = ["a b c a b", "a b"]  # 7 tokens, 3 distinct; bigrams ab bc ca ab + ab: 5, 3 distinct
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5)
    assert distinct_n(["abc"], 1, tokenizer=list) == 1
    assert mean_distinct(texts) == pytest.approx((3 / 7 + 3 / 5 + 1 + 1 + 1) / 5)
    assert math.isnan(distinct_n(["a"], 2))
    assert math.isnan(mean_distinct(["a b c d"]))
    with pytest.raises(ArgumentError, match="n is 0"):
        distinct_n(texts, 0)


def test_expectation_adjusted_distinct_by_hand() -> None:
    assert expectation_adjusted_distinct(["a b a", "c"], vocabulary=5) == pytest.approx(3 / (5 * (1 - 0.8**4)))
    assert expectation_adjusted_distinct(["a a"], vocabulary=1) == 1
    assert math.isnan(expectation_adjusted_distinct([""], vocabulary=1))
    with pytest.raises(ArgumentError, match="vocabulary is 2, but 3 distinct"):
        expectation_adjusted_distinct(["a b c"], vocabulary=2)


@given(st.lists(st.lists(st.integers(-5, 5), min_size=3, max_size=3).filter(any), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_cosine_diversity_is_the_mean_over_pairs(rows: list[list[int]]) -> None:
    cosines = [
        sum(a * b for a, b in zip(u, v, strict=True)) / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))
        for u, v in itertools.combinations(rows, 2)
    ]
    assert cosine_diversity(rows) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-12)
    assert cosine_diversity(np.array(rows) * 1e200) == pytest.approx(cosine_diversity(rows), abs=1e-12)


def test_invalid_embeddings_are_refused() -> None:
    assert math.isnan(cosine_diversity([[1.0, 2.0]]))
    for rows, message in (
        ([[1.0], [0.0]], "a zero vector for row 1"),
        ([[1.0], [math.nan]], "with NaN or infinity for row 1"),
        ([1.0, 2.0], r"shape \(2,\)"),
        ([["a"]], "not return an array of numbers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            cosine_diversity(rows)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<<48/2=24>>24 clips", ["24=48/2"]),
        ("x = 5", []),
        ("5 = 5", []),
        ("- (3 + 4 = 7)", ["3+4=7"]),
        ("2 × (3 + 4) = $14 = 7*2", ["14=2*(3+4)", "14=7*2"]),
        ("on day 2 1,200 + 3 = 1,203.", ["1200+3=1203"]),
        (r"3 \times 4 = 12", ["12=3*4"]),
        ("3 + 4\n= 7", []),
    ],
)
def test_equations_of_a_text(text: str, found: list[str]) -> None:
    assert list(equations(text)) == found


def test_distinct_equations_by_hand() -> None:
    assert distinct_equations(["3+4=7 and 7 = 3 + 4", "4+3=7"]) == pytest.approx(2 / 3)
    assert math.isnan(distinct_equations(["none"]))


@pytest.mark.parametrize("part", ["1 + ", "(", "1)", "= 1", "1+1=", "1,", "1("])
def test_degenerate_texts_take_linear_time(part: str) -> None:
    """With a backtracking regular expression it takes an hour, and ends in a timeout."""
    list(equations(part * 200_000 + "="))


def test_interval_has_its_coverage() -> None:
    """95 % of 300 means of 60 normal numbers; fewer than 265 by chance in under one of 1,000 (at 93.5 %, 3.5 sigma)."""
    values = np.random.default_rng(3).normal(size=(300, 60))
    intervals = [bootstrap(lambda i, x=x: float(x[i].mean()), 60, resamples=300) for x in values]  # type: ignore[misc]
    covered = sum(each.low <= 0 <= each.high for each in intervals)
    assert 265 <= covered <= 297


def test_interval_needs_enough_resamples() -> None:
    values = np.array([1.0, *[math.nan] * 9])  # undefined in most resamples without the first
    rare = bootstrap(lambda i: float(values[i][0]), 10)
    assert (rare.value, math.isnan(rare.low), rare.n) == (1.0, True, 10)
    assert math.isnan(bootstrap(lambda _: 1.0, 1).low)
    for n, options in ((0, {}), (3, {"resamples": 0}), (3, {"confidence": 1.0})):
        with pytest.raises(ArgumentError):
            bootstrap(lambda _: 1.0, n, **options)


def test_improvement_set_by_hand() -> None:
    assert improvement_set([True, False, True, False], [False, True, True, False]) == ([0], [1])
    with pytest.raises(ArgumentError, match="1 answers of the model, 2"):
        improvement_set([True], [True, False])


def test_group_disparity_by_hand() -> None:
    assert group_disparity([1, 1, 0, 1, 0], [1, 1, 1, 3, 5]) == 1.0
    assert group_disparity([1, 0, 1], [1, 1, 5]) == -1.0
    assert math.isnan(group_disparity([0, 1], [1, 5]))
    assert math.isnan(group_disparity([1, 1], [2, 2]))
    with pytest.raises(ArgumentError, match="1 problems and 2 levels"):
        group_disparity([1], [1, 2])


@pytest.mark.parametrize("sign", ["diversity", "ood", "pass_k", "disparity"])
def test_each_sign_alone_is_a_reversal(sign: str) -> None:
    worse, better = (UP, DOWN) if sign == "disparity" else (DOWN, UP)
    bad = judge(UP, **{sign: worse})  # type: ignore[arg-type]
    assert bad.is_reversal is True
    assert bad.sentence.startswith("reversal: pass@1 rose by 0.200 [0.100, 0.300] (n = 50), but")
    for each in (better, FLAT):
        good = judge(UP, **{sign: each})  # type: ignore[arg-type]
        assert good.is_reversal is False
        assert "no harm shown in" in good.sentence
        assert "not measured:" in good.sentence
    assert judge(FLAT, **{sign: worse}).is_reversal is False  # type: ignore[arg-type]


def test_verdicts_that_cannot_be_told() -> None:
    assert judge(UP).is_reversal is None
    assert "nothing else was measured" in judge(UP).sentence
    few = judge(Interval(1.0, 1.0, 1.0, 5), ood=DOWN)
    assert (few.improved, few.is_reversal) == (None, None)
    assert "at least 6 problems" in few.sentence
    worse = judge(DOWN, ood=DOWN)
    assert worse.is_reversal is False
    assert worse.sentence == (
        "no improvement shown: pass@1 fell by 0.200 [0.100, 0.300] (n = 50); "
        "OOD pass@1 fell by 0.200 [0.100, 0.300] (n = 50)"
    )
    assert judge(Interval(0.1, math.nan, math.nan, 50)).improved is None
    assert judge(UP, ood=DOWN).to_dict()["evidence"]["ood"] == {"value": -0.2, "low": -0.3, "high": -0.1, "n": 50}
