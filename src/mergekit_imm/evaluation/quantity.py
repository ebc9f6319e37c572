"""Numbers with units, ratios, times of day and dates, read exactly from an answer in its plain form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 1000  # characters of a number, and its largest power of ten; what is longer is compared as text
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d.]|\s?/)|\d+)(?:\.\d*)?|\.\d+"
_FRACTION = (
    rf"(?:(?P<a>{NUMBER})\s?/\s?(?P<b>-?(?:{NUMBER}))"
    rf"|\\frac\{{\s?(?P<c>-?(?:{NUMBER}))\s?\}}\{{\s?(?P<d>-?(?:{NUMBER}))\s?\}})"
)
_PART = r"(?:(?<=\s)(?P<over>\d+)/(?P<under>\d+)|\\frac\{(?P<top>\d+)\}\{(?P<low>\d+)\})"  # of a mixed number
_POWER = (
    r"(?:[eE](?P<e>[-+]?\d{1,4})(?![\d.])"
    r"|\s?(?:\\times|\\cdot|x)\s?10\s?\^\s?\{?\s?(?P<ten>[-+]?\d{1,4})(?:\s?\})?"
    r"|\s?\^\s?\{?\s?(?P<power>\d{1,3})(?:\s?\})?)"
)
_SQUARED = r"(?:\s?\^\s?\{?[23]\}?)"
_WORDS = rf"[A-Za-z][A-Za-z .'-]*{_SQUARED}?(?:\s?/\s?[A-Za-z]+)*{_SQUARED}?"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<money>[$€£]?)\s?(?P<minus>-?)"
    rf"(?:{_FRACTION}|(?P<whole>{NUMBER})(?:\s?(?<![.,]){_PART})?{_POWER}?)"
    rf"(?P<unit>\s?(?:%|[$€£]|/\s?[A-Za-z]+|{_WORDS})?)\s?(?P<tail>%?[A-Za-z ]*)"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES |= {"lakh": 10**5, "crore": 10**7}
# Units: each line the names of one, the first of which stands for all.
_UNITS = {
    name: names.split()[0]
    for names in (
        "cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|g gram gramme"
        "|kg kilogram|mg milligram|l liter litre|ml milliliter millilitre|ft foot feet|in inch inche|yd yard|mi mile"
        "|lb lbs pound|oz ounce|h hr hour|min minute|s sec second|day|week|month|year yr|mph|degree deg C F|rad radian"
        "|dollar usd|cent|euro"
    ).split("|")
    for name in names.split()
}
UNIT_AFTER = re.compile(
    rf"\s(?:(?:square|cubic|sq\.?) )?(?:unit|{'|'.join(sorted(_UNITS, key=len, reverse=True))})s?{_SQUARED}?$"
)
# Words after a number that change its value, so that they are no unit; of one or two letters only units pass.
_CHANGING = frozenset(
    "pi half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth"
    " eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths squared cubed sqrt sin cos tan cot"
    " sec csc log exp mod plus minus over out less more fewer and not or to below above under choose factorial theta"
    " alpha beta gamma lambda least most than between divided multiplied tens".split()
)
_SHORT = frozenset("of a an per at is".split())
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::00)?\s?(?:([ap])\.?\s?m\b\.?)?(?:\s?o'clock)?", re.IGNORECASE)
_MONTHS = {name: at for at, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_MONTH = r"([A-Za-z]{3})[a-z]{0,6}\.?"
_DATES = (
    re.compile(rf"{_MONTH} (?P<day>\d{{1,2}})(?:,? (?P<year>\d{{4}}))?"),
    re.compile(rf"(?:the )?(?P<day>\d{{1,2}})(?: of)? {_MONTH}(?:,? (?P<year>\d{{4}}))?"),
)
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_PARTS = re.compile(rf"(?:{NUMBER})(?:\s?:\s?(?:{NUMBER})){{1,4}}|(?:{NUMBER}) to (?:{NUMBER})")


@dataclass(frozen=True)
class Quantity:
    """A number, whether it is in percent, and its unit; "" without."""

    value: Fraction
    percent: bool
    unit: str

    def equals(self, other: Quantity) -> bool:
        """Whether two quantities are the same; a unit counts if both have one, and 75 % is both 75 and 0.75."""
        if self.unit and other.unit and not _same_unit(self.unit, other.unit):
            return False
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        return self.value == 100 * other.value if self.percent else 100 * self.value == other.value


def quantity(text: str) -> Quantity | None:
    r"""Return the number that a plain answer is, exactly; None if it is something else.

    >>> quantity("1 1/2 hours"), quantity("5x"), quantity("5 or more")
    (Quantity(value=Fraction(3, 2), percent=False, unit='h'), None, None)
    """
    if len(text) > LONGEST:
        return None
    if text[:1] + text[-1:] == "()":
        text = text[1:-1].strip()
    found = _VALUE.fullmatch(text)
    if found is None:
        return None
    top, under = found["a"] or found["c"], found["b"] or found["d"]
    if top is not None:
        if not _fraction(under):
            return None
        value = _fraction(top) / _fraction(under)
    else:
        value = _fraction(found["whole"])
        if part := found["over"] or found["top"]:
            if value.denominator != 1 or not int(found["under"] or found["low"]):
                return None
            value += Fraction(int(part), int(found["under"] or found["low"]))
        shift = int(found["e"] or found["ten"] or 0)
        if abs(shift) > LONGEST:
            return None
        value *= Fraction(10) ** shift
        if found["power"] is not None:
            if int(found["power"]) > 64 or len(found["whole"]) > 20:
                return None
            value **= int(found["power"])
    measured = _measured(found["unit"] + found["tail"], found["money"])
    if measured is None:
        return None
    scale, unit, percent = measured
    if (found["sign"] == "-") != (found["minus"] == "-"):
        scale = -scale
    return Quantity(value * scale, percent, unit)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").removesuffix(".") or "0")


def _measured(tail: str, money: str) -> tuple[int, str, bool] | None:
    """The multiplier, the unit, and whether it is percent; None if the words change the number's meaning."""
    before = {"$": "dollar", "€": "euro", "£": "lb"}
    text = tail.strip()
    if not text:
        return 1, before.get(money, ""), False
    if text[0] == "%":
        return 1, "", True
    if text in before:
        return 1, before[text], False
    glued = not tail[0].isspace()
    text = re.sub(r"\s?\^\s?\{?([23])\}?", r"^\1", text).replace(" per ", "/")
    if text[0] == "/":
        text, glued = f"each {text[1:].strip()}", False
    words = [word for word in re.split(r"[\s-]+", text) if word not in ("the",)]
    scale = 1
    while words and words[0].lower() in _SCALES:
        scale *= _SCALES[words.pop(0).lower()]
    if words and words[0].lower() in ("square", "cubic") and len(words) > 1:
        words[:2] = [f"{words[1]}^{2 if words[0].lower() == 'square' else 3}"]
    for word in words:
        name = re.split(r"[./^]", word)[0]
        if name.lower() in _CHANGING or (len(name) < 3 and name.lower() not in _SHORT and not _unit(name)):
            return None
    if words and all(word.lower() in _SHORT and not _unit(word) for word in words):
        return None  # 5 a
    if words and scale == 1 and glued and not _unit(re.split(r"[/^]", words[0])[0]):
        return None  # 5ab is a product
    return scale, " ".join(filter(None, map(_named, words))) or before.get(money, ""), False


def _unit(name: str) -> str | None:
    name = name.removesuffix(".")
    return _UNITS.get(name) or _UNITS.get(name.lower()) or _UNITS.get(name.lower().removesuffix("s"))


def _named(word: str) -> str:
    """A word of a unit in its one form; "" for words that do not count."""
    if word.lower() in _SHORT:
        return ""
    named = re.sub(r"[A-Za-z.]+", lambda found: _unit(found[0]) or found[0].lower().removesuffix("s"), word)
    return "mph" if named == "mi/h" else named


def _same_unit(one: str, other: str) -> bool:
    a, b = one.split(), other.split()
    return set(a) <= set(b) or set(b) <= set(a)


def same_time(one: str, other: str) -> bool | None:
    """Return whether two times of day are the same; 3:30 is that of the morning and of the afternoon. None for others.

    >>> same_time("3:30 PM", "15:30"), same_time("3:30", "3:30 PM"), same_time("3", "3:30")
    (True, True, None)
    """
    a, b = _minutes(one), _minutes(other)
    if a is None or b is None:
        return None
    day = 1440 if a[1] and b[1] else 720
    return a[0] % day == b[0] % day


def _minutes(text: str) -> tuple[int, bool] | None:
    """Minutes after midnight, and whether morning or afternoon is known."""
    found = _TIME.fullmatch(text)
    if found is None or (found[2] is None and found[3] is None):
        return None
    hour, minute = int(found[1]), int(found[2] or 0)
    if hour > 23 or minute > 59 or (found[3] and not 1 <= hour <= 12):
        return None
    if found[3]:
        hour = hour % 12 + (12 if found[3].lower() == "p" else 0)
    return 60 * hour + minute, bool(found[3]) or hour > 12 or hour == 0


def same_date(one: str, other: str) -> bool | None:
    """Return whether two dates are the same; a year counts if both have one. None for what is no date.

    >>> same_date("March 14", "14 March 2021"), same_date("2021-03-14", "Mar 15, 2021"), same_date("March", "April")
    (True, False, None)
    """
    a, b = _date(one), _date(other)
    if a is None or b is None:
        return None
    return a[1:] == b[1:] and (a[0] is None or b[0] is None or a[0] == b[0])


def _date(text: str) -> tuple[int | None, int, int] | None:
    """Year, month and day; the year may be missing."""
    if iso := _ISO.fullmatch(text):
        return int(iso[1]), int(iso[2]), int(iso[3])
    for form in _DATES:
        if found := form.fullmatch(text):
            month = next((_MONTHS[name.lower()] for name in found.groups() if name and name.lower() in _MONTHS), None)
            if month:
                return int(found["year"]) if found["year"] else None, month, int(found["day"])
    return None


def same_ratio(one: str, other: str) -> bool | None:
    """Return whether two ratios are the same; None for what is no ratio.

    >>> same_ratio("6:8", "3 to 4"), same_ratio("1:2:3", "1:2:4"), same_ratio("3:4", "3")
    (True, False, None)
    """
    a, b = _ratio(one), _ratio(other)
    return None if a is None or b is None else a == b


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """The parts of a ratio relative to the first."""
    if len(text) > LONGEST or not _PARTS.fullmatch(text):
        return None
    parts = [_fraction(part) for part in re.findall(NUMBER, text)]
    return tuple(part / parts[0] for part in parts) if all(parts) else None


def is_value(text: str) -> bool:
    """Return whether a plain answer is a number, a time of day, a date or a ratio.

    >>> is_value("5 km"), is_value("March 14"), is_value("5 or more")
    (True, True, False)
    """
    return any(read(text) is not None for read in (quantity, _minutes, _date, _ratio))
