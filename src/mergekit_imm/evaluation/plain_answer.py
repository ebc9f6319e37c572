r"""One way of writing for the many in which models write an answer: `\dfrac12`, `½` and `\frac{1}{2}` become one.

Only the writing changes, never the value. Everything is done by replacement, in linear time.
"""

from __future__ import annotations

import re
from functools import lru_cache

_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")  # one exponent, of several digits
_LOWERED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∅": r"\emptyset ", "°": " degrees ",
        "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅕": " 1/5",
        "⅛": " 1/8", "。": ".", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%", "\u00a0": " ", "\u202f": " ",
    }
)  # fmt: skip
_TEX = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\(?:text|mathrm|textbf|mathbf|textit|mathit|mbox|operatorname|textrm|rm|bf|boxed)\s?\{([^{}]*)\}", r" \1 "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s?", ""),
        (r"\\(?:displaystyle|limits|rm|bf|it)(?![A-Za-z])", ""),
        (r"\\!|\{,\}\\?!?", lambda found: "," if "," in found[0] else ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s?([0-9A-Za-z]|\\[A-Za-z]+)\s?([0-9A-Za-z]|\\[A-Za-z]+)", r"\\frac{\1}{\2}"),
        (r"\\frac\s?(\{[^{}]*\})\s?([0-9A-Za-z])", r"\\frac\1{\2}"),
        (r"\\frac\s?([0-9A-Za-z])\s?(\{[^{}]*\})", r"\\frac{\1}\2"),
        (r"\\sqrt\s?([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\^\s?(-?\d{2,})", r"^{\1}"),
        (r"\\([lr])brace(?![A-Za-z])", lambda found: "\\{" if found[1] == "l" else "\\}"),
        (r"\{[bBvV]matrix\}", "{pmatrix}"),
        (r"√\s?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s?(\d+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s?(\d+)", r"\\sqrt{\1}"),
        (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", " degrees "),
        (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\leq "),
        (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\geq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq?(?![A-Za-z])", r"\\neq "),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (r"(?<!\\)\\[()\[\]]|\$\$|\*\*|__|`", " "),
        (r"\\(?:dots|ldots|cdots)(?![A-Za-z])", "..."),
        (r"\*\*|\*", r"\\cdot "),
    )
)
_WORDS = tuple(
    (re.compile(pattern, re.IGNORECASE), to)
    for pattern, to in (
        (r"^\s*(?:minus|negative)\s+(?=[\d$.])", "-"),
        (r"^(?:about|approximately|roughly|around|exactly|nearly|\\approx|~|≈)\s*(?=[-$\d.\\])", ""),
        (r"^an? (?=dozen|hundred|thousand|million|billion)", "1 "),
        (r"^half$", "1/2"),
        (r"(?<=\d) times (?=\d)", r"\\times "),
        (r"\bper\s?cent\b", "%"),
        (r"(?<=\d)\s+and (?:a|one) half\b|(?<=\d)\s+and 1/2", " 1/2"),
        (r"(?<=\d)\s+and (?:a|one) (?:third)\b", " 1/3"),
        (r"(?<=\d)\s+and (?:a|one) quarter\b", " 1/4"),
        (r"(?<=\d)\s+and three quarters\b", " 3/4"),
        (r"(?<=\d)\s+and (?=\d+/\d)", " "),
        (r"(?<=\d)(?:st|nd|rd|th)\b", ""),
        (r"(?<![\\A-Za-z])pi\b", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|infty)\b", r"\\infty "),
        (r"(?<=[\dA-Za-z)}])\s+squared\b", "^{2}"),
        (r"(?<=[\dA-Za-z)}])\s+cubed\b", "^{3}"),
        (r"(?<=\d)\s?x\s?(?=10\^|\d)", r"\\times "),
        (r"\b(?:in the (?:afternoon|evening)|at night)\b", "PM"),
        (r"\bin the morning\b", "AM"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z])", r"\\\1"),
    )
)
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
_NUMERALS = {word: at for at, word in enumerate(_SMALL)}
_NUMERALS |= {
    word: 10 * at for at, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4}
_PARTS |= {"fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}
_PART = re.compile(rf"(?<![\w.])(\d+|an?|{'|'.join(_SMALL[1:10])})[ -]({'|'.join(_PARTS)})\b", re.I)


_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot)\s?\{?(\d{1,20})\}?")


@lru_cache(maxsize=1 << 14)
def plain(text: str) -> str:
    r"""Return an answer in its plain form.

    >>> plain(r"$\dfrac12$"), plain("3 and a half hours"), plain(r"10,\!000\text{ cm}^2"), plain("twenty-four")
    ('\\frac{1}{2}', '3 1/2 hours', '10,000 cm ^2', '24')
    """
    text = _RAISED.sub(lambda found: f"^{{{found[0].translate(_LOWERED)}}}", text).translate(_CHARACTERS)
    for pattern, to in _TEX:
        text = pattern.sub(to, text)
    text = text.strip(" \t\n\"'“”‘’")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = _numerals(_REPEATING.sub(_repeating, text))
    for pattern, to in _WORDS:
        text = pattern.sub(to, text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<!\.)[.,;:]$|[?]$", "", text).strip()


def _numerals(text: str) -> str:
    """Numbers in words become digits: up to ninety-nine, and as many halves, thirds and so on."""
    if re.search(r"\d", text):
        return _PART.sub(_part, text)
    total, end, begin = 0, 0, -1
    for found in re.finditer(r"[A-Za-z]+", text):
        value = _NUMERALS.get(found[0].lower())
        joined = text[end : found.start()]
        if begin < 0:
            if value is not None:
                begin, total, end = found.start(), value, found.end()
        elif value is not None and joined in ("-", " ") and total >= 20 and total % 10 == 0 and 0 < value < 10:
            total, end = total + value, found.end()
        else:
            break
    if begin >= 0:
        text = f"{text[:begin]}{total}{text[end:]}"
    return _PART.sub(_part, text)


def _part(found: re.Match[str]) -> str:
    count = found[1] if found[1].isdigit() else _NUMERALS.get(found[1].lower(), 1)
    return f"{count}/{_PARTS[found[2].lower()]}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period) - int(whole + fixed or "0")
    return f"\\frac{{{top}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"
