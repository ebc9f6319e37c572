"""Crescent: votes against a Counter, the pipeline and its counts, cleaning, refusals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_imm import ArgumentError
from mergekit_imm.synthesis import Pair, bait_prompts, clean_question, consensus, crescent

answers = st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=12)


def say(answer: int | None) -> str:
    return "I do not know." if answer is None else f"It is {answer}."


def said(text: str) -> str | None:
    found = re.search(r"-?\d+", text)
    return found[0] if found else None


def equal(one: str, other: str) -> bool:
    return one == other


@given(answers, st.integers(1, 5), st.sampled_from([0, 0.25, 0.5, 2 / 3, 1]))
@settings(max_examples=300, deadline=None)
def test_votes_match_a_counter(given: list[int | None], min_votes: int, min_agreement: float) -> None:
    found = consensus(list(map(say, given)), min_votes=min_votes, min_agreement=min_agreement, extract=said, same=equal)
    ranked = Counter(answer for answer in given if answer is not None).most_common()
    if not ranked:
        expected: tuple[int | None, str | None] = (None, "no answer")
    elif len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        expected = (None, "tie")
    elif ranked[0][1] < min_votes:
        expected = (None, "few votes")
    elif ranked[0][1] / len(given) < min_agreement:
        expected = (None, "low agreement")
    else:
        expected = (ranked[0][0], None)
    winner, reason = expected
    assert (found.answer, found.reason) == (None if winner is None else str(winner), reason)
    assert (found.votes, found.n) == (ranked[0][1] if ranked else 0, len(given))
    assert found.responses == (() if winner is None else (say(winner),) * found.votes)


def test_a_vote_by_hand() -> None:
    def numeric(one: str, other: str) -> bool:
        return float(one) == float(other)

    responses = ["so 7", "no idea", "it is 07", "8", "thus 7"]
    found = consensus(responses, extract=said, same=numeric)
    assert (found.answer, found.votes, found.n) == ("7", 3, 5)
    assert found.responses == ("so 7", "it is 07", "thus 7")
    assert consensus(["7", "7", *["no idea"] * 2], extract=said, same=equal).answer == "7"  # just half
    assert consensus(["7", "7", *["no idea"] * 3], extract=said, same=equal).reason == "low agreement"
    assert consensus(["no idea"] * 9, extract=said, same=equal).reason == "no answer"
    assert consensus(["7"], extract=said, same=equal).reason == "few votes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": []}, r"^responses is empty; give at least one$"),
        ({"responses": "7"}, r"^responses: one text '7'; give a list of texts$"),
        ({"responses": ["7", None]}, r"^responses: number 1 of 2 is None, not a text$"),
        ({"min_votes": 0}, r"^min_votes is 0; it must be a whole number, 1 or more$"),
        ({"min_agreement": 1.1}, r"^min_agreement is 1\.1; it must be a share from 0 to 1$"),
        ({"min_agreement": "half"}, r"^min_agreement is 'half'"),
    ],
)
def test_consensus_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"responses": ["7", "7"], "extract": said, "same": equal}
    with pytest.raises(ArgumentError, match=message):
        consensus(**arguments | change)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is 3/4 - (-5) in %? It is 575 %.", "What is 3/4 - (-5) in %?"),
        (" Ann pays\n\n$1,250.50 = 5 * $250.10;\thow so? And why?", "Ann pays $1,250.50 = 5 * $250.10; how so?"),
        ("Was ist √2² + ½·π?", "Was ist √2² + ½·π?"),
        ("三加四是多少？七。", "三加四是多少？"),
        ("No question.", ""),
        ("", ""),
        (" ? What is 2 + 2?", ""),
    ],
)
def test_cleaning(text: str, question: str) -> None:
    assert clean_question(text) == question


@given(st.text())
def test_a_clean_question_stays_as_it_is(text: str) -> None:
    found = clean_question(text)
    assert clean_question(found) == found
    assert (found == "") == (re.split("[?？؟]", text)[0].strip() == "" or not re.search("[?？؟]", text))
    assert "".join(found.split()) in "".join(text.split())


def test_bait_prompts_are_distinct_single_lines() -> None:
    baits = bait_prompts()
    assert len(set(baits)) == len(baits) > 1
    assert all("question mark" in bait and "\n" not in bait for bait in baits)


def digits(given: list[str]) -> Any:
    return [[text.count(digit) for digit in "0123456789"] for text in given]


RAW = [  # one per prompt; similar questions have the same digits
    "What is 1 + 2? 3",
    "Nothing.",
    "What is 2 + 1?",
    "What is 3 + 4?",
    "What is 5 + 6?",
    "What is 7 + 8?",
    "What is 9 + 0?",
]
ANSWERS = {
    "What is 1 + 2?": ["3", "It is 3", "4"],
    "What is 3 + 4?": ["7", "8", "none"],
    "What is 5 + 6?": ["none", "nothing", "?"],
    "What is 7 + 8?": ["15", "none", "none"],
    "What is 9 + 0?": ["8", "9", "It is 9"],
}


def run(**change: Any) -> Any:
    def answer(questions: list[str]) -> list[str]:
        return [ANSWERS[question][i % 3] for i, question in enumerate(questions)]

    arguments: dict[str, Any] = {
        "generate": lambda prompts: RAW[: len(prompts)],
        "encode": digits,
        "answer": answer,
        "questions": len(RAW),
        "samples": 3,
        "extract": said,
        "same": equal,
    }
    return crescent(**arguments | change)


def test_the_pipeline_by_hand() -> None:
    made = run()
    assert made.pairs == (Pair("What is 1 + 2?", "3"), Pair("What is 9 + 0?", "9"))
    assert made.questions.accepted == tuple(ANSWERS)
    assert [vote.reason for vote in made.votes] == [None, "tie", "no answer", "few votes", None]
    assert made.counts == {
        "asked": 7,
        "no question": 1,
        "too near": 1,
        "no answer": 1,
        "tie": 1,
        "few votes": 1,
        "low agreement": 0,
        "pairs": 2,
    }
    assert run(min_votes=1).counts["low agreement"] == 1
    assert run(history=["6 + 5?"]).questions.discarded[1].neighbour == "6 + 5?"


def test_rewritten_questions_are_cleaned_and_answered() -> None:
    ANSWERS["What is 6 + 6?"] = ["12"] * 3
    try:
        made = run(rewrite=lambda question, neighbour: f"What is 6 + 6? Not {question} or {neighbour}")
    finally:
        del ANSWERS["What is 6 + 6?"]
    assert made.questions.accepted[1] == "What is 6 + 6?"
    assert (made.questions.rewritten, made.questions.retries) == (1, 1)
    assert made.pairs[1] == Pair("What is 6 + 6?", "12")


def test_bait_prompts_are_used_in_turn() -> None:
    prompts: list[str] = []

    def generate(given: list[str]) -> list[str]:
        prompts.extend(given)
        return ["Nothing."] * len(given)

    made = run(generate=generate, answer=lambda _: pytest.fail("there is nothing to answer"), bait=["a", "b"])
    assert prompts == ["a", "b", "a", "b", "a", "b", "a"]
    assert (made.pairs, made.votes, made.counts["no question"]) == ((), (), 7)
    prompts.clear()
    run(generate=generate)
    assert prompts == [*bait_prompts(), bait_prompts()[0]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_counts_add_up(data: st.DataObject) -> None:
    n, samples = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    draw: Callable[[Any], Any] = data.draw
    raw = draw(
        st.lists(
            st.sampled_from(["Nothing.", *(f"{a} + {b}?" for a in range(1, 4) for b in range(1, 4))]),
            min_size=n,
            max_size=n,
        )
    )
    made = crescent(
        lambda _: raw,
        digits,
        lambda given: [say(draw(st.one_of(st.none(), st.integers(0, 1)))) for _ in given],
        questions=n,
        samples=samples,
        min_votes=draw(st.integers(1, samples)),
        extract=said,
        same=equal,
        rewrite=draw(st.sampled_from([None, lambda *_: "1 + 3?", lambda *_: ""])),
    )
    counts = dict(made.counts)
    assert counts.pop("asked") == n == sum(counts.values())
    assert counts["pairs"] == len(made.pairs)
    assert len(made.votes) == len(made.questions.accepted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": 0}, r"^questions is 0; it must be a whole number, 1 or more$"),
        ({"samples": 0}, r"^samples is 0"),
        ({"samples": 1}, r"^min_votes is 2 but samples is 1: no answer could win; sample more$"),
        ({"min_agreement": -1}, r"^min_agreement is -1"),
        ({"bait": []}, r"^bait is empty"),
        ({"bait": "A"}, r"^bait: one text 'A'; give a list of texts$"),
        ({"generate": lambda _: ["1?"]}, r"^generate was given 7 texts and returned 1; it must return one each$"),
        ({"generate": lambda _: [None] * 7}, r"^what generate returned: number 0 of 7 is None, not a text$"),
        ({"answer": lambda _: ["7"]}, r"^answer was given 15 texts and returned 1; it must return one each$"),
        ({"answer": lambda _: "7"}, r"^what answer returned: one text '7'; give a list of texts$"),
        ({"rewrite": lambda *_: None}, r"^rewrite returned None for 'What is 2 \+ 1\?'; return a string$"),
        ({"clean": lambda _: None}, r"^clean returned None for 'What is 1 \+ 2\? 3'; return a string$"),
    ],
)
def test_crescent_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(**change)


@pytest.mark.parametrize(
    "change",
    [{"threshold": 2}, {"retries": -1}, {"history": "1?"}, {"min_votes": 4}, {"min_agreement": 2}],
)
def test_values_are_checked_before_generation(change: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{next(iter(change))}\b"):
        run(generate=lambda _: pytest.fail("it was asked"), **change)


FORMS = ["75", "75%", "0.75", "3/4", r"\frac{3}{4}", "7.5", "1 1/2", "1.5", r"2\sqrt{3}", r"\sqrt{12}", None]


@given(
    st.lists(st.sampled_from(FORMS), min_size=1, max_size=8).flatmap(
        lambda a: st.tuples(st.just(a), st.permutations(a))
    )
)
@settings(max_examples=60, deadline=None)
def test_the_vote_does_not_depend_on_the_order(orders: tuple[list[str | None], list[str | None]]) -> None:
    """Though `same_answer` is not transitive: 75% is 75 and 0.75."""
    one, other = (consensus(["none" if a is None else rf"\boxed{{{a}}}" for a in answers]) for answers in orders)
    assert (one.answer, one.votes, one.n, one.reason) == (other.answer, other.votes, other.n, other.reason)
    assert sorted(one.responses) == sorted(other.responses)


def test_votes_are_those_for_the_winning_form() -> None:
    found = consensus([f"It is {each}." for each in ("0.75", "75%", "75", "75%", "8")])
    assert (found.answer, found.votes) == ("75%", 4)
    assert consensus(["It is 0.75.", "It is 75.", "It is 0.75.", "It is 75."]).reason == "tie"
