"""Judge answers: numbers, choices, times and lists by rules of ours, other mathematics by value with math-verify."""

from __future__ import annotations

import re

from ..common.checks import as_text
from .by_value import TooLongError, check_installed, same_value
from .clause import has_prose
from .extraction import final_answer
from .plain_answer import plain
from .quantity import UNIT_AFTER, quantity, same_date, same_ratio, same_time

LONGEST = 2000  # characters of an answer that is read; longer ones are compared as they stand
MOST, DEEPEST = 30, 4  # elements of a list, and lists within lists

_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\((?P<a>[A-Za-z])\)|(?P<b>[A-Z])(?:\)|[.:](?=\s)))(?:\s(?!(?:and|or|&)\s)(?P<text>.*))?"
    r"|(?i:option|choice)\s+(?P<c>[A-Z])"
)
_SEPARATOR = re.compile(r"(?:,\s+(?:and|or)\b|\b(?:and|or)\b|,(?!\d{3}(?!\d))|;)\s*|,\s+")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d{1,2}")
_WITH_BASE = re.compile(r"\w+_\{?\w+\}?")
_NAME = re.compile(r"[^\d+*/^<>]{1,40}|[A-Za-z]_\{?\w{1,3}\}?|[A-Za-z]\([A-Za-z]\)")  # what an equation is about
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")


def is_correct(response: str, answer: str, *, cut: bool = True) -> bool:
    r"""Whether a response gives the right answer; `answer` may be a whole solution with "####" or \boxed{...}.

    The answer of the response is found by `find_answer`, which says what `cut` does, and compared by `same_answer`. A
    response is also right if all of it is the right answer, such as "no solution". Raises ArgumentError, and ExtraError
    without math-verify.

    >>> is_correct("2 dogs and 3 cats are 5 animals.", "5"), is_correct("I do not know.", "5")
    (True, False)
    """
    as_text("response", response), as_text("answer", answer)
    check_installed()
    right = final_answer(answer, cut=False) if "####" in answer or "\\boxed" in answer else answer
    if right is None or not right.strip():
        return False
    given = final_answer(response, cut=cut)
    if given is not None and same_answer(given, right):
        return True
    is_short = len(response) <= 4 * len(right) + 40  # TeX takes more characters than text
    return is_short and len(right) <= LONGEST and _word(plain(response)) == _word(plain(right))


def same_answer(one: str, other: str) -> bool:
    r"""Whether two answers are the same: by the rules of docs/evaluation.md, then by value with math-verify.

    Numbers are compared exactly, in any notation, with their units; then choices, times, dates, ratios, lists and
    equations; then texts. What is left, if both look like mathematics, math-verify compares, in bounded time: what
    takes it more than three seconds is different. Raises ArgumentError, and ExtraError without math-verify.

    >>> same_answer(r"\frac{3}{4}", "0.75"), same_answer("1,234", "1234.0"), same_answer("50%", "0.5")
    (True, True, True)
    >>> same_answer(r"2\sqrt{3}", r"\sqrt{12}"), same_answer("5 cm", "5"), same_answer("5 cm", "5 m")
    (True, True, False)
    """
    as_text("one", one), as_text("other", other)
    check_installed()
    if one.strip() == other.strip():
        return True
    if max(len(one), len(other)) > LONGEST:
        return False
    try:
        return _same(plain(one), plain(other))
    except TooLongError:
        return False


def _same(one: str, other: str, depth: int = 0) -> bool:
    """Whether two answers in plain form are the same; `depth`, of lists within lists and the like."""
    one, other = sorted((one, other))  # the order does not matter
    if one == other:
        return True
    if depth > DEEPEST:
        return False
    depth += 1
    a, b = quantity(one), quantity(other)
    if a is not None and b is not None:
        return a.equals(b)
    for same in (same_time, same_date, same_ratio):
        if (found := same(one, other)) is not None:
            return found
    if _same_choice(one, other, depth) or _same_choice(other, one, depth) or _word(one) == _word(other):
        return True
    if (a and _DECIMAL_COMMA.fullmatch(other)) or (b and _DECIMAL_COMMA.fullmatch(one)):
        return _same(one.replace(",", "."), other.replace(",", "."), depth)
    if _WITH_BASE.fullmatch(one) and _WITH_BASE.fullmatch(other):
        return False
    if (found := _same_lists(one, other, depth)) is not None:
        return found
    for first, second in ((one, other), (other, one)):
        if "=" in first and (found := _same_equation(first, second, depth)) is not None:
            return found
        if " or " in first and all(_same(part, second, depth) for part in re.split(r",? or ", first)):
            return True  # 3/4 or 75 %
    return _same_mathematics(one, other)


def _word(text: str) -> str:
    """A text without what does not count: spaces, `$`, and case except of a single letter, which is a variable."""
    text = re.sub(r"(?<!\d) | (?!\d)|\$", "", text)
    return text if len(text) == 1 else text.lower()


def _same_choice(letter: str, choice: str, depth: int) -> bool:
    """Whether one is a choice, and the other its letter or its text: `(B) 12 apples` is `B`, `(b)` and `12`."""
    found, bare = _CHOICE.fullmatch(choice), _CHOICE.fullmatch(letter)
    if found is None:
        return False
    mine = (bare["a"] or bare["b"] or bare["c"]) if bare else letter
    if len(mine) == 1 and mine.isalpha():
        return str(found["a"] or found["b"] or found["c"]).upper() == mine.upper()
    return bool(found["text"]) and _same(found["text"].strip(), letter, depth)


def _same_equation(equation: str, other: str, depth: int) -> bool | None:
    """Whether an equation and an answer are the same: `x = 5` and `5`; None if that is left to others."""
    right = _right_side(equation)
    if right is None:  # x + y = 12 is not 12
        return None if "=" in other or any(sign in equation for sign in ",;<>\\") else False
    if "=" not in other:
        return _same(right, other, depth)
    left = _right_side(other)
    names = [text.partition("=")[0].strip() for text in (equation, other)]
    if left is None or (names[0] != names[1] and all(re.match(r"\\?[A-Za-z]", name) for name in names)):
        return None if left is None else False
    return _same(right, left, depth)


def _right_side(text: str) -> str | None:
    """What an equation says something is equal to: of `x = 5`, `f(x) = 5`, `2 + 3 = 5` and `5 = x`; None of others."""
    sides = [side.strip() for side in re.split(r"(?<![<>!\\])=", text)]
    if len(sides) < 2 or not all(sides) or ("," in text and "(" not in text):
        return None
    if len(sides) == 2 and re.fullmatch(r"[A-Za-z]", sides[1]) and not re.search(r"[A-Za-z]", sides[0]):
        return sides[0]
    if all(_NAME.fullmatch(side) or not _VARIABLE.search(side) for side in sides[:-1]):
        return sides[-1]
    return None


def _same_lists(one: str, other: str, depth: int) -> bool | None:
    """Whether two lists are the same, in any order without round or square brackets; None unless both are lists."""
    a, b = _elements(one), _elements(other)
    if a is None or b is None:
        return None
    brackets = {a[0], b[0]} - {""}
    if len(brackets) > 1 or len(a[1]) != len(b[1]):
        return False
    mine, others = (list(map(_assigned, each[1])) for each in (a, b))
    if brackets - {"{}"}:
        return all(_same(*pair, depth) for pair in zip(mine, others, strict=True))
    for each in mine:
        at = next((at for at, candidate in enumerate(others) if _same(each, candidate, depth)), None)
        if at is None:
            return False
        del others[at]
    return True


def _elements(text: str) -> tuple[str, list[str]] | None:
    r"""The brackets and the elements of a list, such as `(2, 3]`, `\{1\}`, `1, 2`, `1 or 2` and `\pm 2`."""
    brackets, inner = "", text
    if text[:2] == r"\{" and text[-2:] == r"\}":
        brackets, inner = "{}", text[2:-2]
    elif len(text) > 1 and text[0] + text[-1] in ("()", "[]", "{}", "(]", "[)"):
        brackets, inner = text[0] + text[-1], text[1:-1]
    parts: list[str] = []
    depth = begin = at = 0
    while at < len(inner):
        depth += (inner[at] in "([{") - (inner[at] in ")]}")
        if depth < 0:  # of (1, 2), (3, 4) the first bracket does not enclose all
            if not brackets:
                return None
            brackets, inner, parts, depth, begin, at = "", text, [], 0, 0, 0
            continue
        if depth == 0 and (found := _SEPARATOR.match(inner, at)) and found[0].strip():
            parts.append(inner[begin:at].strip())
            begin = at = found.end()
        else:
            at += 1
    parts.append(inner[begin:].strip())
    parts = [each for part in parts for each in _both_signs(part)]
    if not all(parts) or len(parts) > MOST or (len(parts) < 2 and brackets != "{}"):
        return None
    return brackets, parts


def _both_signs(text: str) -> list[str]:
    if text.count(r"\pm") != 1:
        return [text]
    before, after = (side.strip() for side in text.split(r"\pm"))
    return [f"{before} + {after}" if before else after, f"{before} - {after}" if before else f"-{after}"]


def _assigned(text: str) -> str:
    right = _right_side(text) if "=" in text else None
    return text if right is None else right


def _same_mathematics(one: str, other: str) -> bool:
    """Whether two answers that look like mathematics have the same value."""
    both = [_exact(each) for each in (one, other)]
    if any(has_prose(each) or not each or each[-1] in "+-=<>" or re.search(r"[?\"#&@]", each) for each in both):
        return False
    if all(len(each) == 1 for each in both):
        return False  # x and X, which math-verify takes for one
    return same_value(*both)


def _exact(text: str) -> str:
    """An expression without unit, and with fractions for decimals, which math-verify would round."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", UNIT_AFTER.sub("", text))
    return _DECIMAL.sub(lambda found: f"\\frac{{{int(found[1] + found[2])}}}{{1{'0' * len(found[2])}}}", text)
