"""Which samples are kept, and mixtures of rounds, by counting."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm.errors import ArgumentError
from mergekit_imm.synthesis import Sample, accumulate, keep_correct, mix

samples = st.lists(
    st.builds(Sample, st.sampled_from("pqr"), st.sampled_from(["so 1", "so 2", "it is 1", "?"]), st.sampled_from("12"))
)


@given(samples, st.sampled_from([None, 1, 2]), st.booleans())
def test_right_samples_are_kept_in_order_and_all_are_counted(
    given: list[Sample], per_prompt: int | None, duplicates: bool
) -> None:
    """Against a naive loop."""
    kept = keep_correct(given, per_prompt=per_prompt, duplicates=duplicates)
    expected: list[Sample] = []
    for each in given:
        right = each.response.endswith(each.answer)
        twice = any((each.prompt, each.response) == (other.prompt, other.response) for other in expected)
        full = sum(other.prompt == each.prompt for other in expected) == per_prompt
        if right and (duplicates or not twice) and not full:
            expected.append(each)
    assert list(kept.samples) == expected
    assert kept.wrong == sum(not each.response.endswith(each.answer) for each in given)
    assert len(kept.samples) + kept.wrong + kept.duplicates + kept.beyond == len(given)
    assert kept.prompts == len({each.prompt for each in given})
    assert set(kept.unsolved) == {each.prompt for each in given} - {each.prompt for each in expected}


def test_any_matcher_can_be_used() -> None:
    given = [Sample("p", "YES", "yes"), Sample("p", "no", "yes")]
    kept = keep_correct(given, matcher=lambda response, answer: response.lower() == answer)
    assert kept.samples == (given[0],)
    with pytest.raises(ArgumentError, match="per_prompt is 0"):
        keep_correct(given, per_prompt=0)


@given(
    st.lists(st.integers(), max_size=40), st.lists(st.integers(), max_size=40), st.floats(0, 0.95), st.integers(0, 9)
)
def test_mixture_has_the_requested_share(current: list[int], previous: list[int], share: float, seed: int) -> None:
    found = mix(current, previous, share=share, seed=seed)
    wanted = min(len(previous), round(share / (1 - share) * len(current)))
    assert found[: len(current)] == current
    assert len(found) == len(current) + wanted
    assert Counter(found[len(current) :]) <= Counter(previous)
    assert found == mix(current, previous, share=share, seed=seed)


def test_all_examples_are_equally_likely() -> None:
    """5 of 20 with 2000 seeds: each 500 times, within 5 standard deviations; fails once in 100,000 runs."""
    drawn = Counter(each for seed in range(2000) for each in mix(range(100, 105), range(20), share=0.5, seed=seed)[5:])
    assert set(drawn) == set(range(20))
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in drawn.values())


def test_draws_are_reproducible() -> None:
    assert mix(list("abc"), list("uvwxyz"), share=0.5, seed=3) == ["a", "b", "c", "z", "u", "w"]


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_invalid_shares_are_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match="share is"):
        mix([1], [2], share=share)


@given(st.lists(st.lists(st.integers(0, 9))))
def test_accumulate_holds_each_example_once(rounds: list[list[int]]) -> None:
    found = accumulate(rounds)
    assert sorted(found) == sorted({each for one in rounds for each in one})
    every = [each for one in rounds for each in one]
    assert [every.index(each) for each in found] == sorted(every.index(each) for each in found)
