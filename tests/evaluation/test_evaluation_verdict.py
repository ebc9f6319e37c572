"""What affects a verdict, and what must not: length, other models, few problems, k near the number of samples."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mergekit_imm import ArgumentError
from mergekit_imm.evaluation import Model, Problem, Response, pass_at_k
from mergekit_imm.evaluation.comparison import compare

Text = Callable[[int, int], str]


def made(name: str, text: Text, solved: range, level: int | None = None) -> Model:
    """A model with a greedy answer and eight samples for each of 30 problems, all right or all wrong."""
    problems = {}
    for n in range(30):
        responses = tuple(Response(text(n, i), n in solved) for i in range(8))
        problems[str(n)] = Problem(str(n), level if n else 5, False, responses, Response("x", n in solved))
    return Model(name, problems)


def words(length: int) -> Text:
    """Texts of `length` words out of 2000, the k-th 1/k as frequent as the first (Zipf's law)."""
    vocabulary, weights = [f"w{k}" for k in range(2000)], [1 / (k + 1) for k in range(2000)]
    return lambda n, i: " ".join(random.Random(100 * n + i).choices(vocabulary, weights, k=length))


def test_longer_responses_do_not_lower_diversity_in_the_verdict() -> None:
    (found,) = compare([made("short", words(20), range(10, 30)), made("long", words(120), range(5, 30))]).comparisons
    (fell,) = (each for each in found.measures if each.name == "EAD, correct")
    assert fell.difference.is_below
    assert found.verdict.diversity_fell is None
    assert any("responses are longer, which lowers EAD" in note for note in found.notes)
    (back,) = compare([made("long", words(120), range(10, 30)), made("short", words(20), range(5, 30))]).comparisons
    assert back.verdict.diversity_fell is False


def test_verdict_uses_k_up_to_half_the_samples_and_six_problems_per_level() -> None:
    (found,) = compare([made(name, words(9), range(10, 30), level=1) for name in ("a", "b")]).comparisons
    assert any("fewer than 6 problems of a level" in note for note in found.notes)
    assert found.verdict.disparity_rose is None
    better = made("c", words(9), range(5, 30))
    sentence = compare([made("a", words(9), range(10, 30)), better]).comparisons[0].verdict.sentence
    assert "pass@4 (sampled)" in sentence
    assert "pass@8" not in sentence


def test_a_third_model_does_not_change_the_verdict() -> None:
    models = [made(name, words(9), range(10, 30)) for name in ("a", "b")]
    other = made("c", lambda n, i: " ".join(f"v{n}-{i}-{j}" for j in range(50)), range(10, 30))
    assert compare([*models, other]).to_dict()["comparisons"][0] == compare(models).to_dict()["comparisons"][0]


def test_models_with_one_name_are_refused() -> None:
    with pytest.raises(ArgumentError, match="two models have the name 'a'"):
        compare([made("a", words(3), range(9))] * 2)


def test_one_rate_is_one_number() -> None:
    assert pass_at_k(8, 2, 1) == pass_at_k(12, 3, 1) == 0.25
    assert pass_at_k(10, 1, 1) == pass_at_k(100, 10, 1)


def by_temperature(name: str, right: float, seed: int) -> Model:
    """16 samples of each of 40 problems, cold ones first: few words at low temperature, many at high."""
    chance = random.Random(seed)
    problems = {}
    for n in range(40):
        responses = []
        for i in range(16):
            vocabulary = 3 if i < 8 else 60
            text = " ".join(f"w{chance.randrange(vocabulary)}" for _ in range(12))
            responses.append(Response(text, chance.random() < right))
        problems[str(n)] = Problem(str(n), None, False, tuple(responses), Response("x", chance.random() < right))
    return Model(name, problems)


def test_the_order_of_the_samples_makes_no_reversal() -> None:
    """The second model is right more often, else equal: the first of its right samples are all cold."""
    differences = []
    for seed in range(8):
        before, after = by_temperature("before", 0.4, seed), by_temperature("after", 0.9, seed + 100)
        (found,) = compare([before, after], resamples=50).comparisons
        differences.append(next(m.difference.value for m in found.measures if m.name == "EAD, correct"))
    # The mean has a standard error of 0.01 (measured); taking the first samples, it is -0.2.
    assert abs(sum(differences) / len(differences)) < 0.05


def test_the_seed_decides_which_samples_are_drawn() -> None:
    models = by_temperature("before", 0.4, 0), by_temperature("after", 0.9, 1)
    reports = [compare(models, resamples=50, seed=seed).to_dict() for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]
