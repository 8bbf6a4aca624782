"""English number words in a text, written as digits."""

import re

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
_NUMBER = re.compile(
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
    return _NUMBER.sub(lambda match: _written(match, text), text)


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
    value = _value([w for w in words if w != "and"])
    if value is None:
        return match[0]
    return f"{value}.5" if match["half"] else str(value)


def _value(words: list[str]) -> int | None:
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
