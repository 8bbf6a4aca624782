"""Numbers in generated text: counts, years, durations, coordinates, number words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

SCALES = {
    "thousand": 1e3,
    "k": 1e3,
    "million": 1e6,
    "mio": 1e6,
    "m": 1e6,
    "billion": 1e9,
    "bn": 1e9,
}
METRES = {"feet": 0.3048, "foot": 0.3048, "ft": 0.3048, "km": 1000.0}
MINUTES = {"hour": 60.0, "hours": 60.0, "hr": 60.0, "hrs": 60.0, "h": 60.0}

_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?"  # 1,234,567.8
    r"|\d{1,3}(?:\.\d{3}){2,}"  # 1.234.567
    r"|\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)"  # 1 234 567
    r"|\d+(?:\.\d+)?)"
)
_NUMBER = re.compile(rf"(?<![\w.])([-\u2212+]?)({_DIGITS})(?:[\s-]*([A-Za-z]+))?")
_YEAR = re.compile(r"(?<![\d.,])([12]\d{3})(?!\d|s\b|,\d{3}|\.\d)")
_DATED = re.compile(
    r"(?:\b(?:in|as of|since|by|from|year|until|estimated?|census)\s+|\(\s*)$", re.IGNORECASE
)
_ANGLE = re.compile(
    r"([-\u2212+]?\d+(?:\.\d+)?)\s*(?:°|º|deg(?:rees?)?\b)?\s*"
    r"(?:(\d+(?:\.\d+)?)\s*(?:['\u2032\u2019]|min(?:utes?)?\b)\s*)?"
    r"(?:(\d+(?:\.\d+)?)\s*(?:[\"\u2033\u201d]|''|sec(?:onds?)?\b)\s*)?"
    r"(north|south|east|west|[NSEW])?(?![A-Za-z])",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"\d(?:st|nd|rd|th)$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|per ?cent\b)", re.IGNORECASE)
_RANGE = re.compile(r"\s*(?:-|\u2010|\u2011|\u2013|\u2014|to|or)\s*", re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween\s+$", re.IGNORECASE)
_POINT = re.compile(r"point\s*\(\s*(-?\d+(?:\.\d+)?)\s+(-?\d+(?:\.\d+)?)\s*\)", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number in a text."""

    value: float
    unit: str
    """The word that follows, in lower case, if any."""
    start: int
    end: int
    bare_year: bool
    """Four digits alone, 1500 to 2199: may be a date rather than an amount."""


def _value(digits: str) -> float:
    plain = re.sub(r"[ \u00a0\u202f,]", "", digits)
    return float(plain.replace(".", "") if plain.count(".") > 1 else plain)


def quantities(text: str, *, letters: bool = True) -> list[Quantity]:
    """Every number of a text, in order; scale words are multiplied in ("1.2 million").

    With `letters`, so are an m and a k that touch the number: "2m" is two million, "2 m" is not.
    """
    found = []
    for match in _NUMBER.finditer(text):
        sign, digits, word = match.groups()
        value = _value(digits) * (-1 if sign in ("-", "\u2212") else 1)
        unit = (word or "").lower()
        end = match.end(2)
        if unit in SCALES and (unit not in ("m", "k") or (letters and match.start(3) == end)):
            value, unit = value * SCALES[unit], ""
        bare = digits.isdecimal() and len(digits) == 4 and 1500 <= value < 2200
        found.append(Quantity(value, unit, match.start(), end, bare))
    return found


@dataclass(frozen=True)
class Amount:
    """A number of a text that may be an answer."""

    value: float
    """In the unit wanted."""
    start: int
    end: int
    other: float | None = None
    """The other end of a range ("90 to 120"), or the other of two alternatives ("90 or 120")."""


def amounts(text: str, units: Mapping[str, float] | None = None) -> list[Amount]:
    """The amounts of a text, in order: its numbers but for dates, ordinals and percentages.

    A date is a bare year after "in", "as of", "since", …, or after an opening bracket, where there
    are other numbers. `units` gives the factor of a unit word to the unit wanted; a number that
    follows one in a larger unit is added ("2 hours and 34 minutes"). Where there are units, "2m" is
    not two million.
    """
    found = quantities(text, letters=not units)
    found = [
        q
        for q in found
        if not _ORDINAL.search(text[: q.end] + q.unit) and not _PERCENT.match(text, q.end)
    ]
    found = [q for q in found if not (q.bare_year and _DATED.search(text[: q.start]))] or found
    units, made, i = units or {}, [], 0
    while i < len(found):
        first, second = found[i], found[i + 1] if i + 1 < len(found) else None
        factor = units.get(first.unit, 1.0)
        value, other, end = first.value * factor, None, first.end
        i += 1
        if second is not None:
            between = text[first.end : second.start].lower()
            if (
                factor > 1
                and second.value < 60
                and not re.sub(r"\band\b|[\s,.]", "", between.replace(first.unit, "", 1))
            ):
                value, end, i = value + second.value, second.end, i + 1
            elif _is_range(text, first.start, between.replace(first.unit, "", 1), between):
                factor = units.get(second.unit, 1.0)
                other, end, i = second.value * factor, second.end, i + 1
                value = value if first.unit in units else first.value * factor
        made.append(Amount(value, first.start, end, other))
    return made


def _is_range(text: str, start: int, *between: str) -> bool:
    if any(_RANGE.fullmatch(gap) for gap in between):
        return True
    return bool(_BETWEEN.search(text[:start])) and any(gap.strip() == "and" for gap in between)


def amount(text: str, units: Mapping[str, float] | None = None) -> float | None:
    """The first of the text's `amounts`; None where there is none."""
    found = amounts(text, units)
    return found[0].value if found else None


def years(text: str) -> list[Amount]:
    """The years of a text, 1000 to 2999, in order; "the 1960s" is none.

    A range in brackets, "(1914–1999)", is a lifetime: it counts as its first year.
    """
    found, made, i = list(_YEAR.finditer(text)), [], 0
    while i < len(found):
        match, other = found[i], None
        start, end = match.span(1)
        i += 1
        if i < len(found) and _is_range(text, start, text[end : found[i].start(1)]):
            other, i = found[i], i + 1
        in_brackets = text[:start].rstrip().endswith("(")
        value = float(other[1]) if other and not in_brackets else None
        made.append(Amount(float(match[1]), start, other.end(1) if other else end, value))
    return made


def year(text: str) -> float | None:
    """The first of the text's `years`; None where there is none."""
    found = years(text)
    return found[0].value if found else None


def coordinates(text: str) -> tuple[float, float] | None:
    """(latitude, longitude) in degrees; None where a text has not both.

    Reads "12.5°N, 8°W", degrees with minutes and seconds, "34.05, -118.24", and `Point(lon lat)`.
    Numbers without a hemisphere are latitude, then longitude.
    """
    if point := _POINT.search(text):
        return float(point[2]), float(point[1])
    named: dict[str, float] = {}
    plain: list[float] = []
    for degrees, minutes, seconds, side in _ANGLE.findall(text):
        value = float(degrees.replace("\u2212", "-"))
        parts = float(minutes or 0) / 60 + float(seconds or 0) / 3600
        value += parts if value >= 0 else -parts
        letter = side[:1].upper()
        if not letter:
            plain.append(value)
            continue
        axis = "latitude" if letter in "NS" else "longitude"
        named.setdefault(axis, -abs(value) if letter in "SW" else value)
    if len(named) == 2:
        pair = named["latitude"], named["longitude"]
    elif not named and len(plain) >= 2:
        pair = plain[0], plain[1]
    else:
        return None
    return pair if abs(pair[0]) <= 90 and abs(pair[1]) <= 360 else None


_BELOW_20 = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_SMALL = {word: n for n, word in enumerate(_BELOW_20)}
_SMALL |= {word: 10 * n for n, word in enumerate(_TENS, 2)}
_WORD = "|".join(sorted([*_SMALL, "hundred", *_SCALES], key=len, reverse=True))
_NUMBER_WORDS = re.compile(
    rf"\b(?:(half|a quarter of) an? (?P<part>{'|'.join(_SCALES)})"
    rf"|(?:(?P<a>an?)[\s-]+(?=(?:hundred|{'|'.join(_SCALES)})\b))?"
    rf"(?P<words>(?:{_WORD})(?:(?:[\s-]+(?:and\s+)?)(?:{_WORD}))*)"
    r"(?P<half>\s+and\s+a\s+half)?)\b(?!')",
    re.IGNORECASE,
)


def with_digits(text: str) -> str:
    """The text with its number words written as digits.

    "two hours and thirty-four minutes" becomes "2 hours and 34 minutes", "nineteen ninety-four"
    1994. "one" stays where nothing but another number word would make it a number.
    """
    return _NUMBER_WORDS.sub(lambda match: _written(match, text), text)


def _written(match: re.Match[str], text: str) -> str:
    if match["part"]:
        return f"{_SCALES[match['part'].lower()] / (2 if match[1].lower() == 'half' else 4):.0f}"
    words = re.split(r"[\s-]+", match["words"].lower())
    # "5 million" is read as it is, and "one" is mostly a pronoun.
    if re.search(r"\d[\s-]*$", text[: match.start()]) and (words[0] in _SCALES):
        return match[0]
    if words == ["one"] and not re.match(r"[\s-]+(?:hour|minute|and a half)", text[match.end() :]):
        return match[0]
    if words[0] in ("hundred", *_SCALES) and not match["a"]:
        return match[0]
    value = _value_of_words([w for w in words if w != "and"])
    if value is None:
        return match[0]
    return f"{value}.5" if match["half"] else str(value)


def _value_of_words(words: list[str]) -> int | None:
    year = _year(words)
    if year is not None:
        return year
    total = current = 0
    for word in words:
        if word in _SMALL:
            fits = current % 100 == 0 or (current % 10 == 0 and 0 < _SMALL[word] < 10)
            if not fits or current % 100 == 10:
                return None
            current += _SMALL[word]
        elif word == "hundred":
            current = (current or 1) * 100
        else:
            total += (current or 1) * _SCALES[word]
            current = 0
    return total + current


def _year(words: list[str]) -> int | None:
    """A year read as two numbers of two digits ("nineteen ninety-four"); else None."""
    if any(w not in _SMALL for w in words):
        return None
    values = [_SMALL[w] for w in words]
    for cut in range(1, len(values)):
        pair = [_two_digits(values[:cut]), _two_digits(values[cut:])]
        if pair[0] is not None and pair[1] is not None and pair[0] >= 10 and pair[1] >= 10:
            return 100 * pair[0] + pair[1]
    return None


def _two_digits(values: list[int]) -> int | None:
    """The number below 100 that the values spell, such as [90, 4]; else None."""
    if len(values) == 1:
        return values[0]
    if len(values) == 2 and values[0] >= 20 and values[0] % 10 == 0 and 0 < values[1] < 10:
        return sum(values)
    return None
