"""Answers: found in responses, compared exactly, in linear time."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_imm.evaluation import final_answer, find_answer, is_correct, same_answer

FOUND = [
    (r"so \boxed{12} or rather \boxed{13}", "13"),
    (r"\boxed{\frac{1}{\sqrt{2}}} and {}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"The answer is 7. No: \boxed{8}", "8"),
    (r"never closed \boxed{8, but 9", "9"),
    ("1 + 1 = 2\n#### 1,234", "1,234"),
    ("The answer is 3. No: The answer is -5.", "-5"),
    ("The answer is 1,234.50 dollars.", "1,234.50 dollars"),
    ("The answer is none", "none"),
    ("#### 1\n#### 2", "2"),
    ("The answer is **42**.", "42"),
    ("the answer is: the total is 42 dollars", "42"),
    ("The answer is 42 because there are 3 dogs", "42"),
    ("Answer: (B).", "(B)"),
    ("The answer is Tuesday.", "Tuesday"),
    (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}"),
    ("It costs $5.50 in all.", "$5.50"),
    ("from 2-3 we get -1", "-1"),
    ("x=−3", "−3"),
    ("3.5.", "3.5"),
    ("1/3", "1/3"),
]


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["", "no number", r"\boxed{}", "####", "#### \n", "v2 or h3o"])
def test_no_answer(text: str) -> None:
    assert final_answer(text) is None
    assert not is_correct(text, "5")


WHERE = [
    (r"It is 3, so \boxed{4}.", "box"),
    ("The answer is 4.", "mark"),
    (r"2\sqrt{3}", "whole"),
    ("I count 4 of them.", "last"),
]


@pytest.mark.parametrize(("text", "where"), WHERE)
def test_where_an_answer_was_found_is_said(text: str, where: str) -> None:
    found = find_answer(text)
    assert found is not None
    assert found.where == where


@pytest.mark.parametrize(
    "end", ["\n\nQuestion: 2 + 2 = ?", "\nQ: 2 + 2?", "\n### Problem 2: 2 + 2", "</s>", "<|im_end|>\nUser:"]
)
def test_a_response_ends_where_the_next_question_begins(end: str) -> None:
    assert final_answer(rf"\boxed{{7}}{end}\nSolution: \boxed{{4}}") == "7"
    for answer in ("#### 7", "The answer is 7.", "That makes 7"):
        text = f"{answer}{end}\nAnswer: 2 + 2 = 4\n#### 4"
        assert final_answer(text) == "7", text
        assert final_answer(text, cut=False) == "4"


def test_a_question_before_any_answer_is_no_end() -> None:
    assert final_answer("I restate it.\nQuestion: what is 3 + 4?\nAnswer: 7") == "7"


SAME = [
    (r"\frac{13}{4}\times 10^2", "325"),
    ("3 million", "3,000,000"),
    ("2 dozen eggs", "24"),
    ("5cm", "5 cm"),
    ("12 cm^2", "12"),
    ("60 km/h", "60"),
    ("5x + 3", "5X+3"),
    ("2 1/2 hours", "2.5"),
    ("1,234", "1234.0"),
    ("3/4", "0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"\dfrac34", "0.75"),
    ("-5", "−5"),
    ("$12", "12"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("-1 1/2", "-1.5"),
    ("1.5e3", "1,500"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2*10^-2", "0.02"),
    ("5 cm", "5"),
    ("7 apples", "7 apple"),
    ("50%", "50"),
    ("50%", "0.5"),
    (r"50\%", "50%"),
    ("(B)", "b"),
    ("x = 5", "5"),
    (r"\text{Tuesday}", "tuesday."),
    (r"\left(1,2\right)", "(1, 2)"),
    ("(0.5, 3)", r"(\frac12,3)"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{-1}{2}", "-1/2"),
    ("$-3$", "-3"),
    ("18 dollars", "18"),
    (".5", "0.5"),
    ("5.", "5"),
    (r"90^\circ", "90"),
    (r"$\frac{\pi}{2}$", r"\frac{\pi}{2}"),
    ("1e999999999", "1e999999999"),
    ("1" * 5000, "1" * 5000),
    ("1e900", "10e899"),
    ("6.02 × 10²³", "6.02e23"),
    ("10⁻³", "0.001"),
    ("x⁴ + 1", "x^4 + 1"),
    ("5 cm²", "5 cm^2"),
]
OTHERS = [
    (r"\frac{13}{4}\times 10^2", "175"),
    ("1 2", "12"),
    ("3 million", "3"),
    ("5x", "5"),
    ("5 x", "5"),
    ("5ab", "5"),
    ("2 pi", "2"),
    ("5 squared", "5"),
    ("5 out of 7", "5"),
    ("3 and a half", "3"),
    (r"2\pi", "2"),
    (r"2\sqrt{3}", "2"),
    ("5i", "5"),
    ("5 cm", "5 m"),
    ("1,2", "12"),
    ("5", "-5"),
    ("3/4", "4/3"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("a", "b"),
    ("", "0"),
    ("1e999999999", "5"),
    ("1/0", "1"),
    ("1 1/0", "1"),
    ("1" * 5000, "1" * 5001),
    ("0.333", "1/3"),
    ("1,23", "123"),
    ("10²³", "10^6"),
    ("10⁻³", "1000"),
    ("x⁴", "x4"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_same_answers(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)
    assert is_correct(f"So it is \\boxed{{{one}}}.", other)


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@st.composite
def notations(draw: st.DrawFn) -> tuple[Fraction, str]:
    """A number, and one of its notations."""
    sign, top, under = draw(st.sampled_from(["", "-"])), draw(st.integers(0, 10**9)), draw(st.integers(1, 999))
    value = Fraction(top, under) * (-1 if sign else 1)
    kind = draw(st.sampled_from(["ratio", "latex", "mixed", "decimal", "grouped", "scientific"]))
    if kind == "ratio":
        return value, f"{sign}{top}/{under}"
    if kind == "latex":
        return value, f"{sign}\\frac{{{top}}}{{{under}}}"
    if kind == "mixed":
        return value, f"{sign}{top // under} {top % under}/{under}"
    whole = Fraction(top) * (-1 if sign else 1)
    if kind == "decimal":
        digits = draw(st.integers(0, 6))
        return (
            whole / 10**digits,
            f"{sign}{top // 10**digits}.{top % 10**digits:0{max(digits, 1)}d}" if digits else f"{sign}{top}.",
        )
    if kind == "grouped":
        return whole, f"{sign}{top:,}"
    power = draw(st.integers(-9, 9))
    return whole * Fraction(10) ** power, f"{sign}{top}e{power}"


@given(notations(), notations())
def test_numbers_compare_in_any_notation(one: tuple[Fraction, str], other: tuple[Fraction, str]) -> None:
    assert same_answer(one[1], other[1]) is (one[0] == other[0])
    assert same_answer(one[1], str(one[0]))


@given(st.text(st.sampled_from("\\{}boxedfrac(),.0123456789 $-%#\n answeris:"), max_size=80), st.text(max_size=20))
def test_any_text_is_handled(text: str, other: str) -> None:
    found = final_answer(text)
    assert found is None or (found == found.strip() and found != "")
    assert same_answer(text, text)
    assert same_answer(text, other) is same_answer(other, text)


def test_answer_may_be_a_whole_solution() -> None:
    assert is_correct("that makes 5", "He has 2 and 3.\n#### 5")
    assert is_correct("that makes 5", r"thus $\boxed{5}$.")
    assert not is_correct("that makes 5", "6")


HOSTILE = [
    "\\boxed{",
    "{",
    "}",
    "\\",
    "1,",
    "1",
    "answer ",
    " ",
    "-",
    "\\frac",
    "\\text{",
    "1 ",
    "answer is ",
    "(",
    "1/",
    "$ ",
    "a",
    "°",
    "#### ",
    "</s>",
    "\nQ:",
    "\\(",
    "A) ",
    "=",
    "not 1 but ",
    "1 of 2 ",
    "\\pm",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_long_texts_take_linear_time(piece: str) -> None:
    """300,000 characters: quadratic time would be an hour, and ends in a timeout."""
    text = piece * (300_000 // len(piece))
    final_answer(text)
    same_answer(text, text + "x")
    is_correct(f"\\boxed{{{text[:1900]}}}", text[1:1900])


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is (A) and (C).", "A", False),
        ("The answer is (A) and (C).", "A, C", True),
        ("The answer is (A), (B) and (D).", "(A)", False),
        ("The answer is (A), since C is wrong.", "A", True),
        ("The answer is not 5", "5", False),
        ("The answer is not 20, it is 30.", "30", True),
        ("The answer is not 20, it is 30.", "20", False),
    ],
)
def test_several_choices_and_denied_answers(response: str, answer: str, right: bool) -> None:
    assert is_correct(response, answer) == right
