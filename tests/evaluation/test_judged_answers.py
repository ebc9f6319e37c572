"""Answers labelled by hand: few are judged wrongly, and fewer than by math-verify alone, on either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_imm.evaluation import is_correct

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("judged_answers.json").read_text("utf-8"))["cases"]
# What is known to be judged wrongly: (response, right answer).
KNOWN = {
    ("The answer is 5k.", "5000"),
    ("The solution is $x=3$ and $y=4$.", "(3,4)"),
    (r"\boxed{\{x \mid x > 2\}}", r"(2,\infty)"),
    ("The answer is 7[EOS]", "7"),
    ("The answer is 7, so C.", "C"),
    ("Answer: b", "B"),
    ("The answer is 1 hour and 30 minutes.", "1.5"),
    ("The answer is 7.5 hours, or 450 minutes.", "7.5"),
    ("The answer is noon.", "12:00 PM"),
    ("The answer is 1990s.", "1990"),
    ("There is no answer.", "no answer"),
}


@pytest.mark.parametrize("kind", dict.fromkeys(case["kind"] for case in CASES))
def test_labelled_answers(kind: str) -> None:
    for case in (case for case in CASES if case["kind"] == kind):
        pair = case["response"], case["answer"]
        assert (is_correct(*pair) == case["right"]) == (pair not in KNOWN), pair


def test_the_cases_are_many_and_each_is_there_once() -> None:
    pairs = [(case["response"], case["answer"]) for case in CASES]
    assert len(pairs) == len(set(pairs)) > 450
    assert set(pairs) >= KNOWN


def test_fewer_errors_than_math_verify_alone() -> None:
    from math_verify import parse, verify

    alone = {True: 0, False: 0}
    for case in CASES:
        right, response = (
            parse(f"${case['answer']}$", parsing_timeout=None),
            parse(case["response"], parsing_timeout=None),
        )
        if bool(verify(right, response, timeout_seconds=None)) != case["right"]:
            alone[case["right"]] += 1
    ours = {
        right: sum(case["right"] == right for case in CASES if (case["response"], case["answer"]) in KNOWN)
        for right in alone
    }
    assert ours[True] < alone[True] / 5
    assert ours[False] < alone[False] / 5
