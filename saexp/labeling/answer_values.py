"""Names in an answer, compared as whole names, and numbers: amounts and years."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz.fuzz import ratio as similarity

from saexp.labeling.answer_text import (
    ARTICLES,
    FUNCTION_WORDS,
    JOINED,
    AnswerText,
    Window,
    content,
    is_initial,
    normalised,
    tokens_of,
    word_set,
    words,
)

_OTHER_NAMES = {
    "united states": ("US", "USA", "United States of America", "America"),
    "united kingdom": ("UK", "Great Britain", "Britain"),
    "united arab emirates": ("Emirates",),
    "czech republic": ("Czechia",),
    "czechia": ("Czech Republic",),
    "netherlands": ("Holland",),
    "russia": ("Russian Federation",),
    "south korea": ("Republic of Korea",),
    "ivory coast": ("Côte d'Ivoire",),
    "turkey": ("Türkiye",),
    "myanmar": ("Burma",),
}
_TITLES = word_set(
    "mr mrs ms miss dr sir dame lord lady king director filmmaker actor actress singer rapper band"
    " group artist screenwriter writer author legend star president professor jr sr"
)
_BEFORE_OF = word_set(
    "city town village country state republic kingdom club team band commonwealth federation"
    " municipality capital part region area coast heart centre center middle border north south"
    " east west northeast northwest southeast southwest"
)

_MIN_WORD_RATIO = 75
"""Similarity that every word of a name must exceed, besides the similarity of the whole names."""
_MAX_NAME_ALONE = 4
"""Tokens of an answer that may consist of a name only."""
_SMALL_WORDS = frozenset(("of", "and", "the", "de", "del", "la"))


def name_windows(
    answer: AnswerText,
    truth: str,
    *,
    ratio: int | float,
    person: bool = False,
    nickname: bool = False,
    ignored: frozenset[str] = frozenset(),
    cased: bool = True,
) -> list[Window]:
    """Windows of the answer that contain the true name, unless it is part of a longer name.

    Articles, accents, case, punctuation and the `ignored` words make no difference. The similarity
    of the names must exceed `ratio`, that of each of their words 75. A `person` may be given by the
    surname, by initials, with the surname first or without middle names; a `nickname` is the last
    word of a name alone where it is a plural. With `cased`, names begin with a capital letter.
    """
    windows: list[Window] = []
    indices = [n for n, w in enumerate(answer.words) if w not in ARTICLES and w not in ignored]
    indices = indices or list(range(len(answer.words)))
    for name in (truth, *_OTHER_NAMES.get(" ".join(content(words(truth))), ())):
        name_words = _name_words(name, ignored)
        neutral = _neutral_neighbours(name_words, ignored, person)
        spans_sentences = re.search(r"[.!?\u2026]", name.rstrip(".!?")) is not None
        for run in _runs(indices, len(name_words) + (2 if person else 0)):
            window = run[0], run[-1] + 1
            if not (answer.is_one_sentence(*window) or spans_sentences):
                continue
            starts_name = _match_name(answer, run, name_words, ratio, person, nickname)
            if starts_name is None or (cased and not _is_cased(answer, run, name)):
                continue
            begins_before = not starts_name and _begins_before(answer, window, neutral, person)
            if not begins_before and not _ends_after(answer, window, neutral):
                windows.append(answer.widened(window, ignored))
    return windows


def _runs(indices: Sequence[int], max_length: int) -> Iterator[Sequence[int]]:
    for size in range(1, max_length + 1):
        for start in range(len(indices) - size + 1):
            yield indices[start : start + size]


def _begins_before(
    answer: AnswerText, window: Window, neutral: frozenset[str], person: bool
) -> bool:
    """Whether the name begins to the left of the window: "Milan" in "Inter Milan"."""
    left = window[0] - 1
    while left >= 0 and answer.words[left] in neutral and JOINED.fullmatch(answer.gap(left)):
        left -= 1
    of_name = left > 0 and answer.words[left] == "of" and not person
    if of_name and answer.words[left - 1] not in _BEFORE_OF:
        left -= 1
    if not _may_be_name_word(answer, left, window[0], neutral):
        return False
    token = answer.tokens[left]
    is_initial_point = is_initial(token) and answer.gap(left) == ". "
    joined = is_initial_point or JOINED.fullmatch(answer.gap(left)) is not None
    return joined and not token.possessive and token.word not in _TITLES


def _ends_after(answer: AnswerText, window: Window, neutral: frozenset[str]) -> bool:
    """Whether the name ends to the right of the window: "Barcelona" in "Barcelona City"."""
    right = window[1]
    if answer.tokens[right - 1].possessive:
        return False
    while JOINED.fullmatch(answer.gap(right - 1)):
        if answer.words[right] not in neutral:
            return _may_be_name_word(answer, right, right - 1, neutral)
        right += 1
    return False


def _may_be_name_word(answer: AnswerText, n: int, neighbour: int, neutral: frozenset[str]) -> bool:
    """Whether token n, in the same sentence as the token `neighbour`, may be part of a name.

    A capital letter decides. In a short answer without any, all words but function words may be.
    """
    if n < 0 or answer.sentences[n] != answer.sentences[neighbour]:
        return False
    word = answer.words[n]
    if word in FUNCTION_WORDS | neutral or word.isdigit():
        return False
    if any(a <= n < b for a, b in answer.echoes):
        return False
    if answer.has_case:
        return answer.tokens[n].capital
    return answer.sentences.count(answer.sentences[neighbour]) <= _MAX_NAME_ALONE


def _name_words(name: str, ignored: frozenset[str]) -> list[str]:
    all_words = [t.word for t in tokens_of(normalised(name))]
    return [w for w in all_words if w not in ARTICLES and w not in ignored] or all_words


def _neutral_neighbours(
    name_words: Sequence[str], ignored: frozenset[str], person: bool
) -> frozenset[str]:
    """Words that may stand beside a name without making it a longer name."""
    if person:
        return ignored | {"jr"}
    # "LA Lakers": initials of the words that a nickname leaves out.
    return ignored | {_initials(name_words[:-1])}


def _initials(name_words: Sequence[str]) -> str:
    return "".join(w[0] for w in name_words if w not in _SMALL_WORDS)


def _is_cased(answer: AnswerText, run: Sequence[int], name: str) -> bool:
    """Whether the run has the capital letters of a name, where name and answer have any."""
    if not answer.has_case or not any(c.isupper() for c in name):
        return True
    if name.isupper():
        return all(answer.tokens[n].text.isupper() for n in run)
    return answer.tokens[run[0]].capital or answer.tokens[run[-1]].capital


def _match_name(
    answer: AnswerText,
    run: Sequence[int],
    name_words: Sequence[str],
    ratio: int | float,
    person: bool,
    nickname: bool,
) -> bool | None:
    """Whether the run has the beginning of the name, so that no word can precede it.

    None where the run is not that name.
    """
    last = answer.tokens[run[-1]]
    front = [answer.words[n] for n in run[:-1]]
    for run_words in dict.fromkeys(((*front, last.word), (*front, last.stem))):
        if _are_similar(run_words, name_words, ratio):
            return person and len(run_words) > 1
        if person and _is_other_form(answer, run, run_words, name_words, ratio):
            return len(run_words) > 1 and run_words[0] not in name_words[1:]
        if len(run_words) > 1:
            continue
        (word,) = run_words
        if nickname and len(name_words) > 1 and word == name_words[-1] and word.endswith("s"):
            return False
        if not person and len(name_words) > 2 and word == _initials(name_words):
            return False if last.text.replace(".", "").isupper() else None
    return None


def _are_similar(run_words: Sequence[str], name_words: Sequence[str], ratio: int | float) -> bool:
    if list(run_words) == list(name_words):
        return True
    if len(run_words) != len(name_words):
        return False
    if similarity(" ".join(run_words), " ".join(name_words)) <= ratio:
        return False
    pairs = zip(run_words, name_words, strict=True)
    return all(similarity(a, b) > _MIN_WORD_RATIO for a, b in pairs)


def _is_other_form(
    answer: AnswerText,
    run: Sequence[int],
    run_words: Sequence[str],
    name_words: Sequence[str],
    ratio: int | float,
) -> bool:
    """Whether the run is the person's name in another form than the true name."""
    name_words = [w for w in name_words if w not in ("jr", "sr")] or list(name_words)
    if len(name_words) < 2:
        return False
    if len(run_words) < len(name_words) and list(run_words) == name_words[-len(run_words) :]:
        return len(run_words[0]) > 1
    surname_first = [name_words[-1], *name_words[:-1]]
    if _are_similar(run_words, surname_first, ratio) and "," in answer.gap(run[0]):
        return True
    if len(run_words) < 2 or not _are_similar(run_words[-1:], name_words[-1:], ratio):
        return False
    gaps = [answer.gap(n) for n in range(run[0], run[-1])]
    if any(c in gap for gap in gaps for c in ",;:()\n") or "and" in set(run_words) - set(
        name_words
    ):
        return False
    return _given_names_agree(run_words[:-1], name_words[:-1])


def _given_names_agree(answered: Sequence[str], true: Sequence[str]) -> bool:
    """Whether first names agree, as initials too; middle names may be left out of either."""
    if answered == (_initials(true),) or list(true) == [_initials(answered)]:
        return True
    short, long = sorted((answered[0], true[0]), key=len)
    if not (short == long or (long.startswith(short) and len(short) in (1, *range(3, 9)))):
        return False
    middles = answered[1:], true[1:]
    if not middles[0] or not middles[1]:
        return True
    return len(middles[0]) == len(middles[1]) and all(
        a[0] == b[0] and (len(a) == 1 or len(b) == 1 or a == b)
        for a, b in zip(*middles, strict=True)
    )


SCALES = {
    "thousand": 1e3,
    "k": 1e3,
    "million": 1e6,
    "mio": 1e6,
    "m": 1e6,
    "billion": 1e9,
    "bn": 1e9,
}
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
_ORDINAL = re.compile(r"\d(?:st|nd|rd|th)$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|per ?cent\b)", re.IGNORECASE)
_RANGE = re.compile(r"\s*(?:-|\u2010|\u2011|\u2013|\u2014|to|or)\s*", re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween\s+$", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A number in a text, with its position in characters."""

    value: float
    unit: str
    """The word after the number, in lower case; empty where there is none."""
    start: int
    end: int
    bare_year: bool
    """Whether it is written as four digits and is 1500 to 2199, so that it may be a date."""


def _parse_digits(digits: str) -> float:
    plain = re.sub(r"[ \u00a0\u202f,]", "", digits)
    return float(plain.replace(".", "") if plain.count(".") > 1 else plain)


def quantities(text: str, *, letters: bool = True) -> list[Quantity]:
    """All numbers of a text, in order, multiplied by scale words ("1.2 million").

    With `letters`, also by an m or k that touches the number: "2m" is two million, "2 m" is not.
    """
    numbers = []
    for match in _NUMBER.finditer(text):
        sign, digits, word = match.groups()
        value = _parse_digits(digits) * (-1 if sign in ("-", "\u2212") else 1)
        unit = (word or "").lower()
        end = match.end(2)
        if unit in SCALES and (unit not in ("m", "k") or (letters and match.start(3) == end)):
            value, unit = value * SCALES[unit], ""
        bare = digits.isdecimal() and len(digits) == 4 and 1500 <= value < 2200
        numbers.append(Quantity(value, unit, match.start(), end, bare))
    return numbers


@dataclass(frozen=True)
class Amount:
    """A number of a text that may be an answer."""

    value: float
    """In the attribute's unit."""
    start: int
    end: int
    other: float | None = None
    """The other end of a range ("90 to 120"), or the other of two alternatives ("90 or 120")."""


def amounts(text: str, units: Mapping[str, float] | None = None) -> list[Amount]:
    """The amounts of a text, in order: its numbers without dates, ordinals and percentages.

    A number counts as a date where it is a bare year after "in", "as of", "since", … or after an
    opening bracket, and the text has other numbers. `units` maps a unit word to its factor to the
    attribute's unit; a number that follows one in a larger unit is added to it ("2 hours and 34
    minutes"). With `units`, "2m" is not two million.
    """
    numbers = [
        q
        for q in quantities(text, letters=not units)
        if not _ORDINAL.search(text[: q.end] + q.unit) and not _PERCENT.match(text, q.end)
    ]
    undated = [q for q in numbers if not (q.bare_year and _DATED.search(text[: q.start]))]
    numbers = undated or numbers
    units, parsed, i = units or {}, [], 0
    while i < len(numbers):
        first, second = numbers[i], numbers[i + 1] if i + 1 < len(numbers) else None
        factor = units.get(first.unit, 1.0)
        value, other, end = first.value * factor, None, first.end
        i += 1
        if second is not None:
            between = text[first.end : second.start].lower()
            after_unit = between.replace(first.unit, "", 1)
            is_smaller_unit = factor > 1 and second.value < 60
            if is_smaller_unit and not re.sub(r"\band\b|[\s,.]", "", after_unit):
                value, end, i = value + second.value, second.end, i + 1
            elif _is_range(text, first.start, after_unit, between):
                factor = units.get(second.unit, 1.0)
                other, end, i = second.value * factor, second.end, i + 1
                value = value if first.unit in units else first.value * factor
        parsed.append(Amount(value, first.start, end, other))
    return parsed


def _is_range(text: str, start: int, *between: str) -> bool:
    if any(_RANGE.fullmatch(gap) for gap in between):
        return True
    return bool(_BETWEEN.search(text[:start])) and any(gap.strip() == "and" for gap in between)


def amount(text: str, units: Mapping[str, float] | None = None) -> float | None:
    """The first of the text's `amounts`; None where there is none."""
    return next((a.value for a in amounts(text, units)), None)


def years(text: str) -> list[Amount]:
    """The years of a text, 1000 to 2999, in order; "the 1960s" is not a year.

    A range in brackets, "(1914–1999)", is a lifetime and counts as its first year.
    """
    matches, parsed, i = list(_YEAR.finditer(text)), [], 0
    while i < len(matches):
        match, other = matches[i], None
        start, end = match.span(1)
        i += 1
        if i < len(matches) and _is_range(text, start, text[end : matches[i].start(1)]):
            other, i = matches[i], i + 1
        in_brackets = text[:start].rstrip().endswith("(")
        value = float(other[1]) if other and not in_brackets else None
        parsed.append(Amount(float(match[1]), start, other.end(1) if other else end, value))
    return parsed


def year(text: str) -> float | None:
    """The first of the text's `years`; None where there is none."""
    return next((y.value for y in years(text)), None)


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
    "1994". "one" is left as it is unless the words beside it show that it is a number.
    """
    return _NUMBER_WORDS.sub(lambda match: _as_digits(match, text), text)


def _as_digits(match: re.Match[str], text: str) -> str:
    if match["part"]:
        return f"{_SCALES[match['part'].lower()] / (2 if match[1].lower() == 'half' else 4):.0f}"
    number_words = re.split(r"[\s-]+", match["words"].lower())
    # `quantities` reads "5 million" itself, and "one" is mostly a pronoun.
    if re.search(r"\d[\s-]*$", text[: match.start()]) and number_words[0] in _SCALES:
        return match[0]
    if number_words == ["one"] and not re.match(
        r"[\s-]+(?:hour|minute|and a half)", text[match.end() :]
    ):
        return match[0]
    if number_words[0] in ("hundred", *_SCALES) and not match["a"]:
        return match[0]
    value = _parse_words([w for w in number_words if w != "and"])
    if value is None:
        return match[0]
    return f"{value}.5" if match["half"] else str(value)


def _parse_words(number_words: list[str]) -> int | None:
    spelled_year = _parse_spelled_year(number_words)
    if spelled_year is not None:
        return spelled_year
    total = current = 0
    for word in number_words:
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


def _parse_spelled_year(number_words: list[str]) -> int | None:
    """The year in two numbers of two digits ("nineteen ninety-four"); None for other words."""
    if any(w not in _SMALL for w in number_words):
        return None
    values = [_SMALL[w] for w in number_words]
    for cut in range(1, len(values)):
        pair = [_two_digits(values[:cut]), _two_digits(values[cut:])]
        if pair[0] is not None and pair[1] is not None and pair[0] >= 10 and pair[1] >= 10:
            return 100 * pair[0] + pair[1]
    return None


def _two_digits(values: list[int]) -> int | None:
    """The number below 100 that the values make up, such as [90, 4]; None for others."""
    if len(values) == 1:
        return values[0]
    if len(values) == 2 and values[0] >= 20 and values[0] % 10 == 0 and 0 < values[1] < 10:
        return sum(values)
    return None
