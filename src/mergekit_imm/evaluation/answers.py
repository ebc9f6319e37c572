"""Find the final answer of a response, and compare answers: numbers exactly, everything else as text.

Nothing is evaluated, and time is linear in the length of the text. The rules are ours; they follow what graders of
GSM8K and MATH have in common.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ..common.checks import as_text

LONGEST = 1000  # characters of a number; longer ones are compared as text
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_IN_TEXT = re.compile(rf"(?<![\w.])[-−]?\s?\$?(?:{_NUMBER})(?:/\d+)?(?:[eE][-+]?\d{{1,4}}\b)?")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
_MARK = re.compile(r"####|\banswer\s{0,8}(?:is\b|:)\s{0,8}:?", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SPACES = re.compile(r"\\[,;:! ]|~|\s+")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\^\{?\\circ\}?|°|\*\*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))")
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s?\$?\s?(?:(?P<a>{_NUMBER})\s?/\s?(?P<b>{_NUMBER})"
    rf"|(?P<whole>{_NUMBER})?(?:\s?(?<![\d.,])(?P<over>\d+)/(?P<under>\d+))?"
    r"(?:[eE](?P<power>[-+]?\d{1,4})(?![\d.])|\s?(?:\\times|\\cdot|[x×*])\s?10\^\{?(?P<ten>[-+]?\d{1,4})\}?)?)"
    r"(?P<unit>\s?(?:[%$€£]|[A-Za-z][A-Za-z .]*(?:[²³]|\^\{?[23]\}?)?(?:/[A-Za-z]+)?)?)"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SHORT = frozenset("cm mm km m kg mg g ml l lb lbs oz ft yd mi hr hrs h min sec s mph in of a an".split())
# Words after a number that change its value, so they are not units.
_NO_UNITS = frozenset(
    "pi half halves third thirds quarter quarters squared cubed sqrt sin cos tan log exp mod plus minus times over out"
    " less more and not".split()
)
_NAMED = re.compile(r"[A-Za-z]\s?=\s?")


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a response, or None if there is none.

    The first of these that exists, each time its last occurrence: 1. the content of \boxed{...}; 2. the rest of the
    line after "####", "the answer is" or "answer:", or its first number if it is a sentence; 3. the last number.

    >>> final_answer(r"So 3 + 4 = 7, and \boxed{\frac{1}{2}}."), final_answer("3 + 4 = 7, that is 7 apples.")
    ('\\frac{1}{2}', '7')
    """
    boxed = _last_boxed(as_text("text", text))
    if boxed is not None:
        return boxed.strip() or None
    mark = None
    for mark in _MARK.finditer(text):  # noqa: B007 - the last one
        pass
    if mark is not None:
        rest = text[mark.end() :].lstrip(" \t*").partition("\n")[0]
        rest = rest.strip().strip("*").strip()
        found = _IN_TEXT.search(rest)
        if found is not None and _WORD.search(rest) and "\\" not in rest:
            return found[0].strip()
        rest = rest.removesuffix(".").strip(" \"'`*")
        if rest:
            return rest
    found = None
    for found in _IN_TEXT.finditer(text):  # noqa: B007 - the last one
        pass
    return found[0].strip() if found else None


def _last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces."""
    opened: list[int] = []  # where the content of a box begins; -1 for other braces
    last: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if len(brace[0]) == 2 and brace[0][0] == "\\":
            continue
        if brace[0] != "}":
            opened.append(brace.end() if brace[0] != "{" else -1)
        elif opened:
            begin = opened.pop()
            if begin >= 0 and (last is None or begin > last[0]):
                last = begin, brace.start()
    return None if last is None else text[last[0] : last[1]]


def same_answer(one: str, other: str) -> bool:
    r"""Whether two answers are the same.

    Numbers are compared exactly, in any notation: `1,234`, `1234.0`, `3/4`, `0.75`, `\frac34`, `1 1/2`, `1.5e3`,
    `1.5 \times 10^3`, `$12`. Units count only if both answers have one: `5 cm` equals `5`, but not `5 m`. `%` is a
    unit: `50%` equals `50`, not `0.5`. `3 million` is `3000000`, and `5x` is not a number. Everything else is compared
    as text, without spaces, case, `$`, `\left`, `\right`, `\text` and a final period; lists in brackets are compared
    element by element. `(B)` equals `B`, and `x = 5` equals `5`.

    >>> same_answer(r"\frac{3}{4}", "0.75"), same_answer("1,234", "1234.0"), same_answer("50%", "0.5")
    (True, True, False)
    """
    a, b = _plain(as_text("one", one)), _plain(as_text("other", other))
    if a == b:
        return True
    ours, theirs = _elements(a), _elements(b)
    if ours is not None and theirs is not None:
        return a[0] == b[0] and len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return _same(a, b)


def is_correct(response: str, answer: str) -> bool:
    r"""Whether a response gives the right answer; `answer` may be a whole solution with "####" or \boxed{...}.

    >>> is_correct("2 dogs and 3 cats are 5 animals.", "5"), is_correct("I do not know.", "5")
    (True, False)
    """
    as_text("response", response), as_text("answer", answer)
    given = final_answer(response)
    right = final_answer(answer) if "####" in answer or "\\boxed" in answer else answer
    return given is not None and right is not None and same_answer(given, right)


def _plain(text: str) -> str:
    """An answer without markup that does not count."""
    text = (
        text.replace("−", "-")
        .replace("–", "-")
        .replace("\\$", "$")
        .replace("\\%", "%")
        .replace("\\(", "")
        .replace("\\)", "")
    )
    text = _TEXT.sub(r" \1 ", _DROPPED.sub("", text))
    text = _FRACTION.sub(_over, text)
    text = _SPACES.sub(" ", text).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = _NAMED.sub("", text, count=1) if _NAMED.match(text) else text
    return text.removesuffix(".").strip()


def _over(found: re.Match[str]) -> str:
    top, bottom = found[1] if found[1] is not None else found[2], found[3] if found[3] is not None else found[4]
    if top.strip().lstrip("-").isdigit() and bottom.strip().lstrip("-").isdigit():
        return f" {top.strip()}/{bottom.strip()}"
    return f"({top})/({bottom})"


def _elements(text: str) -> list[str] | None:
    """The elements of a list in brackets; None if it has fewer than two."""
    if len(text) < 2 or text[0] + text[-1] not in ("()", "[]", "{}", "(]", "[)"):
        return None
    parts, depth, begin = [], 0, 1
    for at in range(1, len(text) - 1):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        elif text[at] == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    parts.append(text[begin:-1].strip())
    return parts if len(parts) > 1 else None


def _same(one: str, other: str) -> bool:
    a, b = _number(one), _number(other)
    if a is not None and b is not None:
        return a[0] == b[0] and (not a[1] or not b[1] or a[1] == b[1])
    return _word(one) == _word(other)


def _word(text: str) -> str:
    text = re.sub(r"(?<!\d) | (?!\d)", "", text.replace("$", "").lower())
    return text[1:-1] if len(text) == 3 and text[0] + text[-1] == "()" else text


def _number(text: str) -> tuple[Fraction, str] | None:
    """The value and the unit of a number; None if the text is not a number, or too long."""
    found = _VALUE.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        return None
    if found["a"] is not None:
        value, under = _fraction(found["a"]), _fraction(found["b"])
    else:
        value, under = _fraction(found["whole"] or "0"), Fraction(int(found["under"] or 1))
        if found["whole"] is None and found["over"] is None:
            return None
    power, measured = int(found["power"] or found["ten"] or 0), _measured(found["unit"])
    if not under or abs(power) > LONGEST or measured is None:
        return None
    value = value / under if found["a"] is not None else value + Fraction(int(found["over"] or 0)) / under
    scale, unit = measured
    return value * Fraction(10) ** power * (-scale if found["sign"] == "-" else scale), unit


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix(".") or "0")


def _measured(tail: str) -> tuple[int, str] | None:
    """The multiplier and the unit in the text after a number; None if that text changes the number's meaning."""
    if not tail.strip() or not tail.strip()[0].isalpha():
        return 1, tail.strip()
    words = tail.lower().split()
    scale = 1
    while words and words[0] in _SCALES:
        scale *= _SCALES[words.pop(0)]
    names = [re.split(r"[./^²³]", word)[0] for word in words]
    if any(name in _NO_UNITS or (len(name) < 3 and name not in _SHORT) for name in names):
        return None
    if words and scale == 1 and tail[0] != " " and names[0] not in _SHORT:
        return None  # 5ab is a product, not a unit
    return scale, " ".join(words).removesuffix("s")
