"""Find the final answer in a response, and say where it was found; linear in the length of the response."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ..common.checks import as_text, described
from ..errors import ArgumentError
from .clause import LONGEST, answer_of_clause, has_prose, last_value, whole_answer

TRIED = 20  # places where a response may go on to another question, and marks that may be followed by an answer

# Where a response ends: at a token of the chat format, or where the next question begins.
_TOKEN = re.compile(r"</s>|<\|[^|<>\n]{1,40}\|>|<(?:eos|end_of_turn|pad)>")
_NEXT = re.compile(
    r"\n[ \t#*>]{0,12}(?:Next\s)?(?:Question|Problem|Exercise|Example|Instruction|Task)\b"
    r"[ \t]{0,3}[\d.]{0,4}[ \t*]{0,4}[:.]"
    r"|\n[ \t#*>]{0,12}(?:Q|User|Human)\s?\d{0,3}[ \t*]{0,4}:"
    r"|(?<=[\d.!?])[ \t](?:Question|Problem)\s?\d{0,3}:",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,8}\{|\\[\\{}]|[{}]")
_BARE_BOX = re.compile(r"\\boxed\s{0,8}([-+]?\d[\d.,]{0,40})")
_JOINED = re.compile(r"[\s$.\\()]{0,9}(?:,|and|or|,\s?and|\\text\{ ?(?:and|or) ?\})[\s$\\()]{0,9}")
# What an answer follows: `####`, `the answer is`, `Answer:`, `### Answer` on a line, `<answer>`, `I choose (B)`.
_MARK = re.compile(
    r"(?<!#)####(?!#)|<answer>"
    r"|\b(?:answer|correct (?:option|choice))[ \t*_)\"]{0,8}"
    r"(?:(?:is|are|was|equals|(?:would|will|should|must) be)(?![a-z])|[:=]|(?=\s*\n))[\s*_]{0,8}(?:[:=])?"
    r"|\b(?:choose|select|pick)\s+(?=(?:option\s+)?\(?[A-J]\b)|\b(?=(?:option|choice)\s\(?[A-J]\)?\sis\b)",
    re.IGNORECASE,
)
# Not so: `#### Step 2`, `#### 1. Count`, a heading before more text; "the answer is correct".
_HEADING = re.compile(r"[ \t]*\n|\s*(?:Step\b|\d{1,2}[.)]\s+[A-Za-z]|[A-Za-z][A-Za-z ]*:?\s*\n\s*\S)", re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"(?:(?:in)?correct\b(?! (?:option|choice))|right|wrong|reasonable|valid|verified|consistent|as follows|below"
    r"|above)\b",
    re.IGNORECASE,
)

Where = Literal["box", "mark", "whole", "last"]


@dataclass(frozen=True)
class Found:
    r"""An answer, and where it was found.

    where: "box", in \boxed{...}; "mark", after "####", "the answer is" and the like; "whole", all of the response is
    the answer; "last", the last formula or number.
    """

    text: str
    where: Where


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
    if not isinstance(cut, bool):
        raise ArgumentError(f"cut is {described(cut)}; give True or False")
    if cut:
        for end in (_TOKEN, _NEXT):
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
    for where, look in (("mark", _marked), ("whole", whole_answer), ("last", last_value)):
        if answer := look(text):
            return Found(answer, where)  # type: ignore[arg-type]
    return None


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
        if 0 < len(rest) <= LONGEST and "\n" not in rest and not has_prose(rest):
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
        rest = text[mark.end() : mark.end() + 4 * LONGEST]
        if mark[0] == "####":
            if _HEADING.match(rest):
                continue
        elif mark[0] != "<answer>":
            bullet = r"[\s*_:]*\n\s*[-•*]\s+|" if "\n" in rest[:4] else ""
            rest = re.sub(rf"^(?:{bullet}[\s*_:]+)", "", rest)
        if rest.strip() and not _NO_ANSWER.match(rest) and (found := answer_of_clause(rest.lstrip())):
            return found
    return None
