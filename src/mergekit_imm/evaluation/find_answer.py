"""Find the final answer in a response, and say where it was found; linear in the length of the response."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ..common.checks import as_text
from .plain_answer import plain
from .quantity import NUMBER, date, quantity

LONGEST = 300  # characters of a sentence or formula that is an answer
TRIED = 20  # places where a response may go on to another question, and marks that may be followed by an answer

Where = Literal["box", "mark", "whole", "last"]


@dataclass(frozen=True)
class Found:
    r"""An answer, and where it was found.

    where: "box", in \boxed{...}; "mark", after "####", "the answer is" and the like; "whole", all of the response is
    the answer; "last", the last formula or number.
    """

    text: str
    where: Where


_END = re.compile(r"</s>|<\|[^|<>\n]{1,40}\|>|<(?:eos|end_of_turn|pad)>")
_NEXT = re.compile(
    r"\n[ \t#*>]{0,12}(?:(?:Next\s)?(?:Question|Problem|Exercise|Example|Instruction|Task)\b[ \t]{0,3}[\d.]{0,4}[ \t*]{0,4}[:.]"
    r"|(?:Q|User|Human)\s?\d{0,3}[ \t*]{0,4}:)",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,8}\{|\\[\\{}]|[{}]")
_BARE_BOX = re.compile(r"\\boxed\s{0,8}([-+]?\d[\d.,]{0,40})")
_JOINED = re.compile(r"[\s$.\\()]{0,9}(?:,|and|or|,\s?and|\\text\{ ?(?:and|or) ?\})[\s$\\()]{0,9}")
_MARK = re.compile(
    r"(?<!#)####(?!#)|<answer>"
    r"|\b(?:choose|select|pick)\s+(?=(?:option\s+)?\(?[A-J]\b)|\b(?=(?:option|choice)\s\(?[A-J]\)?\sis\b)"
    r"|\b(?:answer|correct (?:option|choice))[ \t*_)\"]{0,8}"
    r"(?:(?:is|are|was|equals|(?:would|will|should|must) be)(?![a-z])|[:=]|(?=\s*\n))[\s*_]{0,8}(?:[:=])?",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\s*(?:Step\b|\d{1,2}[.)]\s+[A-Za-z]|[A-Za-z][A-Za-z ]*:?\s*\n\s*\S)", re.IGNORECASE)
_NO_ANSWER = re.compile(r"(?:in)?correct\b(?! (?:option|choice))|(?:right|wrong|reasonable|valid|verified|consistent|as follows|below|above)\b", re.I)
_FORMULAS = ("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])\s+[A-Za-z]|(?<![\\A-Za-z{])(?!(?:sin|cos|tan|log|sqrt)\b)[A-Za-z]{3,}(?![A-Za-z}])")
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.!?](?=\s+[A-Z\"(*]|\s*$)|\n|</")
_WRAPPING = " \t*_`\"'“”"
_CASED = re.compile(r"(?:(?i:option|choice|letter)\s+)?(?:\(([A-Za-z])\)|([A-Z])(?:[).:](?=\s|$)|(?=\s*$|,|\s\(|\s+(?:because|since|as|which|is)\b)))")
_YES = re.compile(r"(?:yes|no|true|false)(?=[,.;!]|$)", re.IGNORECASE)
_OPTION = re.compile(r"(?i:option|choice|letter)\s+([A-Z])\b")
_INTRO = re.compile(
    r"(?:(?:about|approximately|roughly|around|exactly|equal to|simply|just|only|then|therefore|thus|the)\s+)+", re.IGNORECASE
)
_REJECTED = re.compile(r"\((?:not|see|step) [^()]{0,80}\)|(?:,| and),? not (?:\$?\d[\d.,]{0,20}|\(?[A-Z]\)?)\W*$|\bnot [^,.;]{1,40}?(?:,? but(?: rather)?) ")
_RESTATED = re.compile(r".*(?:,\s+(?:but|so|hence|therefore|giving)(?=.*\d)|,\s+(?:which|that) (?:is|are|equals|makes|gives)|\bi\.e\.,?|\bthat is,?) ", re.IGNORECASE)
_CLAUSE = re.compile(r"[,:]\s+(?=[A-Za-z(])(?!(?:and|or)\s+[-$\d\\])|;|\s\((?=[A-Za-z])|\s(?:because|since|which|so that|as the|where|when|after|who|that)\s|\s[:;]-?[()DP]|\s(?:for|on|by|from|with|until|left|each)\b")
_BOUNDED = re.compile(r"(?:less|more|fewer|greater|smaller|larger|at least|at most|over|under|between|no more|up to|below|above|nearly all)\b", re.I)
_BEGINS = re.compile(r"[-+−–]?\s?(?:[$€£]|\\\$)?\s?[-+−]?(?:[\d.½¼¾√π∞]|\\[A-Za-z]|[(\[{][^A-Za-z]|\\[{(\[])|[A-Za-z](?:_\{?\w\}?)?\s?=|\d*[A-Za-z](?:\^|\b\s*[-+*/^=]|$)")
_OF = re.compile(r"(?<=\d) of (?:the |all |these )?(?:[a-z]+ )?\d[\d,.]*")
_UNIT_WORD = r"(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)"
_LAST = re.compile(
    r"(?<=ratio is )\d+ to \d+|\\frac\s?\{[^{}]{1,40}\}\s?\{[^{}]{1,40}\}"
    rf"|(?<![\w.\\^_])(?:(?<![\w)]\s)[-−–](?=[$\d.\\]))?(?:\\?\$|€|£)?[-−]?(?:{NUMBER}|[½¼¾])(?![A-Za-z]*\d)"
    rf"(?:\s\d+/\d+|[½¼¾]|\s?/\s?\d[\d,.]*\d|\s?/\s?\d|:\d+(?::\d+)?|\s?\\d?frac\{{\d+\}}\{{\d+\}})?"
    r"(?:[eE][-+]?\d{1,4}\b|\s?(?:\\times|\\cdot|[x×*])\s?10\s?\^\s?\{?-?\d{1,4}\}?|\s?\^\s?\{?-?\d{1,4}\}?)?"
    rf"(?:\s?%|\s(?:percent\b|{_UNIT_WORD}\b|and (?:a |one |three )?(?:half|third|quarters?)\b|[ap]\.?m\b\.?|squared\b|pi\b)|\\pi|π|√\d+|\\sqrt\{{\d+\}}|[a-z](?![a-z]))?",
    re.IGNORECASE,
)


def find_answer(response: str, *, cut: bool = True) -> Found | None:
    r"""Find the final answer of a response; None if there is none.

    The first of these that exists, each time its last occurrence: the content of \boxed{...}; what follows "####", "the
    answer is", "answer:" and the like, to the end of the clause; the whole response, if it is one formula, number or
    choice; the last formula or number. With `cut` (the default), a response ends where it goes on to another question:
    at a line that begins with "Question:", "Problem 2:", "Q:", "User:" and the like, or at an end-of-text token, if
    there is an answer before it. Raises ArgumentError unless it is a text.

    >>> find_answer(r"So 3 + 4 = 7, and \boxed{\frac{1}{2}}."), find_answer("The answer is 48 + 24 = 72 clips.")
    (Found(text='\\frac{1}{2}', where='box'), Found(text='48 + 24 = 72 clips', where='mark'))
    >>> find_answer("#### 7\n\nQuestion: What is 2 + 2?\n#### 4").text
    '7'
    """
    text = as_text("response", response)
    if cut:
        for end in (_END, _NEXT):
            for found in islice(end.finditer(text), TRIED):
                if _find(text[: found.start()]) is not None:
                    text = text[: found.start()]
                    break
    return _find(text)


def final_answer(text: str, *, cut: bool = True) -> str | None:
    r"""Return the text of `find_answer`, or None if there is none.

    >>> final_answer(r"So 3 + 4 = 7, and \boxed{\frac{1}{2}}."), final_answer("3 + 4 = 7, that is 7 apples.")
    ('\\frac{1}{2}', '7')
    """
    found = find_answer(text, cut=cut)
    return found.text if found else None


def _find(text: str) -> Found | None:
    boxed = _boxed(text)
    if boxed is not None:
        return Found(boxed.strip(), "box") if boxed.strip() else None
    if (marked := _marked(text)) is not None:
        return Found(marked, "mark")
    whole = text.strip().strip(_WRAPPING)
    if 0 < len(whole) <= LONGEST and "\n" not in whole and (answer := _whole(whole)) is not None:
        return Found(answer, "whole")
    last = _last(text)
    return Found(last, "last") if last else None


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, of several that are joined by commas or "and", or of one cut off."""
    opened: list[tuple[int, int]] = []  # where a box and its content begin; -1 for other braces
    boxes: list[tuple[int, int, int, int]] = []
    for brace in _BRACES.finditer(text):
        if len(brace[0]) == 2 and brace[0][0] == "\\":
            continue
        if brace[0] != "}":
            opened.append((brace.start(), brace.end()) if brace[0] != "{" else (-1, -1))
        elif opened:
            begin, content = opened.pop()
            if begin >= 0:
                if boxes and boxes[-1][0] > begin:
                    continue  # a box around a box
                boxes.append((begin, content, brace.start(), brace.end()))
    cut_off = next(((at, content) for at, content in reversed(opened) if at >= 0), None)
    if cut_off and (not boxes or boxes[-1][0] < cut_off[0]):
        rest = text[cut_off[1] :].strip().rstrip("$. \n")
        if 0 < len(rest) <= LONGEST and "\n" not in rest and not _PROSE.search(rest):
            return rest + "}" * (rest.count("{") - rest.count("}"))
    if not boxes:
        bare = None
        for bare in _BARE_BOX.finditer(text):  # noqa: B007 - the last one
            pass
        return bare[1].rstrip(".,") if bare else None
    first = len(boxes) - 1
    while first and len(boxes) - first < 9 and _JOINED.fullmatch(text, boxes[first - 1][3], boxes[first][0]):
        first -= 1
    return ", ".join(text[begin:end].strip() for _, begin, end, _ in boxes[first:])


def _marked(text: str) -> str | None:
    """What follows the last mark that an answer follows."""
    for mark in reversed([*_MARK.finditer(text)][-TRIED:]):
        rest = text[mark.end() :]
        if mark[0] == "####" and _HEADING.match(rest[:LONGEST]):
            continue
        rest = rest[: 4 * LONGEST].lstrip()
        if mark[0] != "####" and mark[0] != "<answer>":
            rest = rest.lstrip(" \t*_:")
            rest = re.sub(r"^[-•]\s+", "", rest) if "\n" in text[mark.end() : mark.end() + 4] else rest
        if mark[0] == "####" and "\n" in text[mark.end() : len(text) - len(text[mark.end():].lstrip())]:
            continue
        if not rest or _NO_ANSWER.match(rest):
            continue
        if found := _clause(rest):
            return found
    return None


def _formula(text: str) -> str | None:
    """The formula that a text begins with."""
    for opening, closing in _FORMULAS:
        if text.startswith(opening):
            inner, closed, _ = text[len(opening) :].partition(closing)
            return inner.strip() if closed and _is_formula(inner) else None
    return None


def _is_formula(text: str) -> bool:
    text = re.sub(r"\\(?:text|mathrm|mbox)\s?\{[^{}]*\}", "", text)
    return bool(text.strip()) and not _PROSE.search(text) and text.strip()[-1] not in "+-=*/,<(" and len(text) <= LONGEST


def _clause(text: str) -> str | None:
    """The answer at the beginning of a text, or in its first sentence."""
    if (formula := _formula(text.lstrip(_WRAPPING))) is not None:
        return formula.rstrip(".,")
    end = _SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(_WRAPPING).rstrip(".,;:!?").strip(_WRAPPING)
    sentence = sentence.removesuffix("**").strip()
    if len(sentence) > LONGEST:
        return _last(sentence)
    sentence = _REJECTED.sub("", sentence).strip()
    if choice := _choice(sentence):
        return choice
    sentence = _RESTATED.sub("", sentence).strip()
    if (stripped := _INTRO.sub("", sentence, count=1) if _INTRO.match(sentence) else sentence) and re.search(r"\d", stripped):
        sentence = stripped
    if (formula := _formula(sentence)) is not None:
        return formula
    clause = _CLAUSE.split(sentence, maxsplit=1)[0].strip().rstrip(".,;:!").strip(_WRAPPING)
    if _BOUNDED.match(sentence) or _BEGINS.match(sentence) or not re.search(r"\d", sentence):
        return clause or None
    if quantity(plain(clause)) or date(plain(clause)):
        return clause
    return _last(sentence) or clause or None


def _choice(text: str) -> str | None:
    """The choice that a text begins with, with its text."""
    if found := _YES.match(text):
        return found[0]
    found = _CASED.match(text) or _OPTION.match(text)
    if found is None:
        return None
    rest = _CLAUSE.split(text[found.end() :], maxsplit=1)[0].strip(" .;!")
    if rest and rest[0].isalnum() and found[0][-1] in ").:":
        return f"{found[0]} {rest}"
    return found[0].strip(" .,:")


def _whole(text: str) -> str | None:
    """All of a response, if it is nothing but an answer."""
    if (formula := _formula(text)) is not None and text.rstrip(".").endswith(("$", ")", "]")):
        return formula
    if choice := _choice(text):
        return choice
    bare = text.rstrip(".!")
    if re.fullmatch(r"\(?[A-Za-z]\)?|yes|no|true|false", bare, re.IGNORECASE):
        return bare
    return bare if re.search(r"\d|\\[A-Za-z]", bare) and _BEGINS.match(bare) and not _PROSE.search(bare) and "=" not in bare else None


def _last(text: str) -> str | None:
    """The last formula or number of a text."""
    text = _OF.sub("", _REJECTED.sub("", text)) if len(text) <= 100_000 else text
    number = None
    for number in _LAST.finditer(text):  # noqa: B007 - the last one
        pass
    for opening, closing in _FORMULAS:
        end = text.rfind(closing)
        begin = text.rfind(opening, 0, max(end, 0))
        inner = text[begin + len(opening) : end].strip()
        if 0 <= begin >= end - LONGEST and (number is None or number.end() <= end) and _is_formula(inner):
            if re.search(r"\d", inner):
                return inner.rstrip(".,")
    return number[0].strip().rstrip(",") if number else None
