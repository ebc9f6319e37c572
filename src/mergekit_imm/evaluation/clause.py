"""Read the answer that a sentence gives: `the total is 42 dollars`, `48 + 24 = 72 clips`, `(B) 12, since ...`."""

from __future__ import annotations

import re

from .plain_answer import plain
from .quantity import NUMBER, is_value

LONGEST = 300  # characters of a sentence or formula that is an answer

_FORMULAS = ("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")
_PROSE = re.compile(
    r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])\s+[A-Za-z]"
    r"|(?<![\\A-Za-z{])(?!(?:sin|cos|tan|log|sqrt)\b)[A-Za-z]{3,}(?![A-Za-z}])"
)
_WRAPPING = " \t*_`\"'“”"
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.!?](?=\s+[A-Z\"(*]|\s*$)|\n|</")
# A sentence begins with a choice: `B`, `(B)`, `B) 12`, `option B`, `B because`; or with yes or no.
_CHOICE = re.compile(
    r"(?:(?i:option|choice|letter)\s+)?"
    r"(?:\(([A-Za-z])\)|([A-Z])(?:[).:](?=\s|$)|(?=\s*$|,|\s\(|\s+(?:because|since|as|which|is)\b)))"
    r"|(?i:option|choice|letter)\s+([A-Z])\b|(?i:yes|no|true|false)(?=[,.;!]|$)"
)
_MORE_CHOICES = re.compile(r"(?:(?:\s*,|\s+and|\s+or|\s*&|\s*,\s*and)\s*(?:\([A-Z]\)|[A-Z]\b))+(?=\W*$)")
# Words before the answer that say nothing: `about 7`; `not 5 but 6`, `(not 20)`; `20% of 50, which is 10`.
_INTRO = re.compile(
    r"(?:(?:about|approximately|roughly|around|exactly|equal to|simply|just|only|then|therefore|thus|the)\s+)+(?=.*\d)",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"\((?:not|see|step) [^()]{0,80}\)"
    r"|(?:,| and),? not (?:\$?\d[\d.,]{0,20}|\(?[A-Z]\)?)\W*$"
    r"|\bnot [^,.;]{1,40}?(?:,? but(?: rather)?|, (?:it is|it's)) "
)
_RESTATED = re.compile(
    r".*(?:,\s+(?:but|so|hence|therefore|giving)(?=.*\d)|,\s+(?:which|that) (?:is|are|equals|makes|gives)"
    r"|\bi\.e\.,?|\bthat is,?) ",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"[,:]\s+(?=[A-Za-z(])(?!(?:and|or)\s+[-$\d\\])|;|\s\((?=[A-Za-z])|\s[:;]-?[()DP]"
    r"|\s(?:because|since|which|so that|as the|where|when|after|who|that)\s"
    r"|\s(?:for|on|by|from|with|until|left|each)\b"
)
_BOUNDED = re.compile(
    r"(?:not|less|more|fewer|greater|smaller|larger|at least|at most|over|under|between|no more|up to|below|above)\b",
    re.IGNORECASE,
)
# A sentence begins with mathematics: a number, TeX, a bracket, `x =`, `5x`.
_BEGINS = re.compile(
    r"[-+−–]?\s?(?:[$€£]|\\\$)?\s?[-+−]?(?:[\d.½¼¾√π∞]|\\[A-Za-z]|[(\[{][^A-Za-z]|\\[{(\[])"
    r"|[A-Za-z](?:_\{?\w\}?)?\s?=|\d*[A-Za-z](?:\^|\b\s*[-+*/^=]|$)"
)
_OF = re.compile(r"(?<=\d) of (?:the |all |these )?(?:[a-z]+ )?\d[\d,.]*")
# A number in a text, with what belongs to its value; a dash between words is no sign.
_VALUE = re.compile(
    r"(?<=ratio is )\d+ to \d+|\\frac\s?\{[^{}]{1,40}\}\s?\{[^{}]{1,40}\}"
    rf"|(?<![\w.\\^_])(?:(?<![\w)]\s)[-−–](?=[$\d.\\]))?(?:\\?\$|€|£)?[-−]?(?:{NUMBER}|[½¼¾])(?![A-Za-z]*\d)"
    r"(?:\s\d+/\d+|[½¼¾]|\s?/\s?\d[\d,.]*\d|\s?/\s?\d|:\d+(?::\d+)?|\s?\\d?frac\{\d+\}\{\d+\})?"
    r"(?:[eE][-+]?\d{1,4}\b|(?:\s?(?:\\times|\\cdot|[x×*])\s?10)?\s?\^\s?\{?-?\d{1,4}\}?)?"
    r"(?:\s?%|\s(?:percent|hundred|thousand|million|billion|trillion|dozen|lakh|crore|squared|pi)\b"
    r"|\sand (?:a |one |three )?(?:half|third|quarters?)\b|\s[ap]\.?m\b\.?"
    r"|\\pi|π|√\d+|\\sqrt\{\d+\}|[a-z](?![a-z]))?",
    re.IGNORECASE,
)


def has_prose(text: str) -> bool:
    r"""Return whether a text has words: `5 apples` has, `5x` and `\sin x` have not."""
    return _PROSE.search(text) is not None


def answer_of_clause(text: str) -> str | None:
    """Return the answer in the first sentence of a text: what it begins with, or its last number.

    >>> answer_of_clause("48 + 24 = 72 clips, of course."), answer_of_clause("not 5 but 6.")
    ('48 + 24 = 72 clips', '6')
    """
    if (formula := _formula(text.lstrip(_WRAPPING))) is not None:
        return formula.rstrip(".,")
    end = _SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(_WRAPPING).rstrip(".,;:!?✓✔").strip(_WRAPPING)
    if len(sentence) > LONGEST:
        return last_value(sentence)
    sentence = _REJECTED.sub("", sentence).strip()
    if choice := _choice(sentence):
        return choice
    sentence = _RESTATED.sub("", sentence).strip()
    sentence = _INTRO.sub("", sentence, count=1) if _INTRO.match(sentence) else sentence
    if (formula := _formula(sentence)) is not None:
        return formula
    clause = _CLAUSE_END.split(sentence, maxsplit=1)[0].strip().rstrip(".,;:!").strip(_WRAPPING)
    if _BOUNDED.match(sentence) or _BEGINS.match(sentence) or not re.search(r"\d", sentence):
        return clause or None
    if is_value(plain(clause)):
        return clause
    return last_value(sentence) or clause or None


def _formula(text: str) -> str | None:
    """The formula that a text begins with."""
    for opening, closing in _FORMULAS:
        if text.startswith(opening):
            inner, closed, _ = text[len(opening) :].partition(closing)
            return inner.strip() if closed and _is_formula(inner) else None
    return None


def _is_formula(text: str) -> bool:
    text = re.sub(r"\\(?:text|mathrm|mbox)\s?\{[^{}]*\}", "", text[: LONGEST + 1]).strip()
    return 0 < len(text) <= LONGEST and not has_prose(text) and text[-1] not in "+-=*/,<("


def _choice(text: str) -> str | None:
    """The choice that a text begins with, and its text after `(B)`, `B)`, `B.` and `B:`."""
    found = _CHOICE.match(text)
    if found is None:
        return None
    if more := _MORE_CHOICES.match(text, found.end()):
        return found[0] + more[0]
    rest = _CLAUSE_END.split(text[found.end() :], maxsplit=1)[0].strip(" .;!")
    if rest and rest[0].isalnum() and found[0][-1] in ").:":
        return f"{found[0]} {rest}"
    return found[0].strip(" .,:")


def whole_answer(text: str) -> str | None:
    """Return all of a response, if it is nothing but an answer.

    >>> whole_answer("5x"), whole_answer("(B)"), whole_answer("It is 5.")
    ('5x', '(B)', None)
    """
    whole = text.strip().strip(_WRAPPING)
    if not 0 < len(whole) <= LONGEST or "\n" in whole:
        return None
    if (formula := _formula(whole)) is not None and whole.rstrip(".").endswith(("$", ")", "]")):
        return formula
    if choice := _choice(whole):
        return choice
    bare = whole.rstrip(".!")
    if len(bare) == 1 and bare.isalpha():
        return bare
    is_mathematics = (
        re.search(r"\d|\\[A-Za-z]", bare) and _BEGINS.match(bare) and not has_prose(bare) and "=" not in bare
    )
    return bare if is_mathematics else None


def last_value(text: str) -> str | None:
    r"""Return the last formula or number of a text.

    >>> last_value("So she has $5 left."), last_value(r"Hence $x = \frac{3}{4}$.")
    ('$5', 'x = \\frac{3}{4}')
    """
    text = _OF.sub("", _REJECTED.sub("", text))
    number = None
    for number in _VALUE.finditer(text):  # noqa: B007 - the last one
        pass
    for opening, closing in _FORMULAS:
        end = text.rfind(closing)
        begin = text.rfind(opening, 0, max(end, 0))
        inner = text[begin + len(opening) : end].strip()
        is_last = 0 <= begin >= end - LONGEST and (number is None or number.end() <= end)
        if is_last and re.search(r"\d", inner) and _is_formula(inner):
            return inner.rstrip(".,")
    return number[0].strip().rstrip(",") if number else None
