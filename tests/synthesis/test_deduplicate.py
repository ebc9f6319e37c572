"""De-duplication of questions against a double loop; rewriting, memory, invalid vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_imm import ArgumentError
from mergekit_imm.synthesis import Deduplicated, Discarded, deduplicate, deduplication

vectors = st.tuples(*[st.integers(-3, 3)] * 3).filter(any)
texts = st.lists(vectors.map(str), max_size=12)  # a text is its own vector
thresholds = st.sampled_from([0.3, 0.7, 0.85, 0.95, 1.0])


def encode(given: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([eval(text) for text in given], dtype=float)


def cosine(one: str, other: str) -> float:
    a, b = eval(one), eval(other)
    return float(
        sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    )


def near(one: str, other: str, threshold: float) -> bool:
    """Cosines of such small integers are either on a threshold or further from it than this."""
    return cosine(one, other) >= threshold - 1e-7


@pytest.fixture(params=[2, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(deduplication, "TEXTS_AT_ONCE", request.param)
    return int(request.param)


@given(texts, texts, thresholds)
@settings(max_examples=150, deadline=None)
def test_deduplicate_matches_a_double_loop(questions: list[str], history: list[str], threshold: float) -> None:
    accepted: list[str] = []
    discarded = []
    for question in questions:
        others = [*history, *accepted]
        if any(near(question, other, threshold) for other in others):
            discarded.append((question, max(cosine(question, other) for other in others)))
        else:
            accepted.append(question)
    for size in (1, 3, 1024):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deduplication, "TEXTS_AT_ONCE", size)
            found = deduplicate(questions, encode, history=history, threshold=threshold)
        assert found.accepted == tuple(accepted)
        assert [lost.question for lost in found.discarded] == [question for question, _ in discarded]
        assert [lost.cosine for lost in found.discarded] == pytest.approx([best for _, best in discarded])
        for lost in found.discarded:  # the neighbour is the nearest one
            assert lost.neighbour in {*history, *accepted}
            assert cosine(lost.question, lost.neighbour) == pytest.approx(lost.cosine)
        assert (found.rewritten, found.retries) == (0, 0)


@given(texts, texts, thresholds, st.lists(st.one_of(vectors.map(str), st.just("")), min_size=1), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_no_accepted_pair_is_too_similar_after_rewriting(
    questions: list[str], history: list[str], threshold: float, given: list[str], retries: int
) -> None:
    calls: list[tuple[str, str]] = []

    def rewrite(question: str, neighbour: str) -> str:
        assert near(question, neighbour, threshold)
        calls.append((question, neighbour))
        return given[len(calls) % len(given)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplication, "TEXTS_AT_ONCE", 3)
        found = deduplicate(questions, encode, history=history, threshold=threshold, rewrite=rewrite, retries=retries)
    for i, one in enumerate(found.accepted):
        assert not any(near(one, other, threshold) for other in [*history, *found.accepted[:i]])
    assert len(found.accepted) + len(found.discarded) == len(questions)
    assert found.retries == len(calls) <= retries * (found.rewritten + len(found.discarded))
    assert found.retries >= found.rewritten + retries * len(found.discarded)


def test_rewriting_by_hand() -> None:
    answers = iter(["(1, 0)", "", "(1, 1)", "(0, 2)", "(1, 3)", "(1, 4)"])
    asked = []

    def rewrite(question: str, neighbour: str) -> str:
        asked.append((question, neighbour))
        return next(answers)

    found = deduplicate(["(2, 0)", "(5, 0)", "(0, 1)", "(0, 3)"], encode, rewrite=rewrite)
    assert found.accepted == ("(2, 0)", "(1, 1)", "(0, 1)")  # on the third try; the second returned nothing
    assert found.discarded == (Discarded("(0, 3)", "(0, 1)", 1.0),)  # in its original wording
    assert (found.rewritten, found.retries) == (1, 6)
    assert asked == [
        ("(5, 0)", "(2, 0)"),
        ("(1, 0)", "(2, 0)"),
        ("(1, 0)", "(2, 0)"),
        ("(0, 3)", "(0, 1)"),
        ("(0, 2)", "(0, 1)"),
        ("(1, 3)", "(0, 1)"),
    ]


def test_equal_vectors_are_too_similar_at_threshold_1(block: int) -> None:
    drawn = np.random.default_rng(0).normal(size=(5, 384))
    again = {f"{i} {scale}": drawn[i] * scale for scale in (1.0, 1e-200, 1e200, 3.0) for i in range(5)}
    found = deduplicate(list(again), lambda given: [again[text] for text in given], threshold=1)
    assert found.accepted == tuple(f"{i} 1.0" for i in range(5))


def test_texts_are_encoded_in_blocks_and_vectors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "TEXTS_AT_ONCE", 4)
    sizes: list[int] = []

    def count(given: list[str]) -> Any:
        sizes.append(len(given))
        return encode(given).astype(np.float32)

    questions = [f"({i}, 1)" for i in range(10)]
    deduplicate(questions[:6], count, history=questions[6:], threshold=1)
    assert sizes == [4, 4, 2]
    assert deduplicate([], count) == Deduplicated((), (), 0, 0)


def test_thousands_of_questions_take_little_memory() -> None:
    import tracemalloc

    drawn = np.random.default_rng(0).normal(size=(6000, 16)).astype(np.float32)
    tracemalloc.start()
    found = deduplicate(list(map(str, range(6000))), lambda given: drawn[[int(text) for text in given]], threshold=0.99)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.accepted) > 5900
    assert peak < 60e6  # all pairwise cosines would take 288 MB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], r"^encode returned a zero vector for 'b', which has no direction; leave it out$"),
        ([[1.0, 0.0], [math.nan, 1.0]], r"a vector with NaN or infinity for 'b'"),
        ([[math.inf, 0.0], [0.0, 1.0]], r"a vector with NaN or infinity for 'a'"),
        ([[1.0, 0.0]], r"^encode returned shape \(1, 2\); it must be \(2, width\): one vector per text$"),
        ([1.0, 0.0], r"shape \(2,\); it must be \(2, width\)"),
        ([[[1.0]], [[1.0]]], r"shape \(2, 1, 1\)"),
        ([[], []], r"a zero vector for 'a'"),
        (
            [[1.0], [1.0, 2.0]],
            r"^encode did not return an array of numbers: .*; return one vector per text, all of one width$",
        ),
        ([["x"], ["y"]], r"not return an array of numbers: could not convert string to float"),
        (None, r"not return an array of numbers|shape \(\)"),
    ],
)
def test_invalid_vectors_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        deduplicate(["a", "b"], lambda _: given)


def test_vectors_of_another_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "TEXTS_AT_ONCE", 1)
    with pytest.raises(ArgumentError, match=r"^encode returned shape \(1, 3\); it must be \(1, 2\): one"):
        deduplicate(["(1, 0)", "(0, 1, 0)"], encode)
    with pytest.raises(ArgumentError, match=r"it must be \(1, 2\): one"):
        deduplicate(["(0, 1, 0)"], encode, history=["(1, 0)"])
    with pytest.raises(ArgumentError, match=r"it must be \(1, 2\): one"):
        deduplicate(["(1, 0)", "(1, 0)"], encode, rewrite=lambda *_: "(0, 1, 0)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0}, r"^threshold is 0; it must be a cosine in 0 < threshold <= 1$"),
        ({"threshold": 1.5}, r"^threshold is 1\.5"),
        ({"threshold": math.nan}, r"^threshold is nan"),
        ({"threshold": True}, r"^threshold is True"),
        ({"retries": -1}, r"^retries is -1; it must be a whole number, 0 or more$"),
        ({"retries": 1.5}, r"^retries is 1\.5"),
        ({"history": "(1, 0)"}, r"^history: one text '\(1, 0\)'; give a list of texts$"),
        ({"history": ["(1, 0)", 3]}, r"^history: number 1 of 2 is 3, not a text$"),
        ({"questions": ["(1, 0)", " "]}, r"^questions: number 1 of 2 is empty; leave it out$"),
        ({"questions": 7}, r"^questions: 7; give a list of texts$"),
        ({"rewrite": lambda *_: None}, r"^rewrite returned None for '\(1, 0\)'; return a string$"),
    ],
)
def test_deduplicate_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"questions": ["(1, 0)", "(1, 0)"], "encode": encode}
    with pytest.raises(ArgumentError, match=message):
        deduplicate(**arguments | change)
