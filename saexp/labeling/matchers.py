"""Whether an answer counts as correct: one rule per entity type and attribute."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from saexp.errors import ConfigError
from saexp.labeling.answer_text import (
    ARTICLES,
    AnswerText,
    Asked,
    Window,
    content,
    normalised,
    runs_of,
    word_set,
    words,
)
from saexp.labeling.answer_values import (
    Amount,
    amount,
    amounts,
    name_windows,
    with_digits,
    year,
    years,
)

KINDS = ("name", "genre", "number", "year", "coordinates", "text")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one attribute's answers are judged."""

    kind: str = "text"
    """name, genre, number, year, coordinates, or text (for attributes without a rule)."""
    ratio: int | float = 90.0
    """name, text: similarity of the whole names that must be exceeded, 0 to 100."""
    surname: bool = False
    """name: whether it is a person's; then the surname is enough, middle names are optional."""
    nickname: bool = False
    """name: whether the last word alone is enough where it is a plural ("Lakers")."""
    ignored: Sequence[str] = ()
    """name: words that make no difference, such as FC in a club's name."""
    tolerance: int | float = 0.0
    """number, year, coordinates: largest accepted difference, in the attribute's unit."""
    share: int | float = 0.0
    """number: largest accepted difference as a fraction of the true number."""
    units: Mapping[str, float] = field(default_factory=dict)
    """number: unit words and their factors to the attribute's unit."""
    cues: Sequence[str] = ()
    """number, year: words that mark the number meant, where an answer has several."""


_PERSON = Rule(kind="name", surname=True)
_NAME = Rule(kind="name")
_GENRE = Rule(kind="genre")
_CLUB_WORDS = ("fc", "cf", "sc", "ac", "afc", "cfc", "cd", "ud", "if", "bk", "club", "football")
_METRES = {"feet": 0.3048, "foot": 0.3048, "ft": 0.3048, "km": 1000.0}
_MINUTES = {"hour": 60.0, "hours": 60.0, "hr": 60.0, "hrs": 60.0, "h": 60.0}
_RELEASED = ("released", "release", "premiered", "premiere", "came", "published")

DEFAULT_RULES: Mapping[str, Mapping[str, Rule]] = {
    "player": {
        "birthplace": _NAME,
        "birth_year": Rule(kind="year", cues=("born", "birth", "birthday")),
        "teams": Rule(kind="name", nickname=True, ignored=_CLUB_WORDS),
        "sport": _NAME,
    },
    "movie": {
        "director": _PERSON,
        "screenwriter": _PERSON,
        "cast": _PERSON,
        "genre": _GENRE,
        "release_year": Rule(kind="year", cues=_RELEASED),
        "duration": Rule(
            kind="number",
            tolerance=3,
            units=_MINUTES,
            cues=("minutes", "minute", "min", "mins", "hours", "long", "runtime", "duration"),
        ),
    },
    "city": {
        "country": _NAME,
        "population": Rule(
            kind="number",
            share=0.1,
            cues=("population", "people", "inhabitants", "residents"),
        ),
        "elevation": Rule(
            kind="number",
            tolerance=20,
            units=_METRES,
            cues=("elevation", "altitude", "above"),
        ),
        "coordinates": Rule(kind="coordinates", tolerance=1),
    },
    "song": {
        "performer": _PERSON,
        "album": _NAME,
        "year": Rule(kind="year", cues=_RELEASED),
        "genre": _GENRE,
    },
}

PAPER: Mapping[str, Mapping[str, float]] = {
    "player": {"birth_year": 5},
    "movie": {"release_year": 2},
}
"""Tolerances of Ferrando et al. 2024 where they are wider than ours."""

ALIASES: Mapping[str, str] = {
    "place_birth": "birthplace",
    "place_of_birth": "birthplace",
    "date_birth": "birth_year",
    "date_of_birth": "birth_year",
    "teams_list": "teams",
    "team": "teams",
    "directors": "director",
    "screenwriters": "screenwriter",
    "genres": "genre",
    "durations": "duration",
    "duration_minutes": "duration",
    "location": "coordinates",
    "elevation_m": "elevation",
    "performers": "performer",
    "publication_year": "year",
}
"""Attribute names of published files -> the names in `DEFAULT_RULES`."""

_EVERYDAY = word_set(
    "who what where when it them us her him she he you me we they yes no this that one"
)
_GENERIC_GENRE_WORDS = frozenset(("film", "movie", "music", "song", "genre"))
_GENRE_WORDS = {
    "science fiction": ("sci fi", "scifi"),
    "hip hop": ("rap",),
    "r and b": ("rhythm and blues", "rnb"),
    "animation": ("animated", "anime"),
    "animated": ("animation",),
    "romantic comedy": ("rom com", "romcom"),
    "heavy metal": ("metal",),
    "biographical": ("biopic", "biography"),
}


def canonical(attribute: str, entity_type: str | None = None) -> str:
    """The name of an attribute in `DEFAULT_RULES`, from a published name (see `ALIASES`).

    The entity type may precede it, as in the prompt type `player_place_birth`. Names of entity
    types without default rules are not replaced.
    """
    name = re.sub(r"[^\w]+", "_", attribute.strip().lower())
    kind = type_key(entity_type)
    name = name.removeprefix(f"{kind}_") if entity_type else name
    alias = ALIASES.get(name, name)
    return alias if entity_type is None or alias in DEFAULT_RULES.get(kind, {}) else name


def type_key(entity_type: str | None) -> str:
    """An entity type as options spell it: `video_game` for "Video game"."""
    return re.sub(r"[^\w]+", "_", str(entity_type).strip().lower())


@dataclass(frozen=True)
class Rules:
    """Rules by entity type and attribute; attributes without a rule are judged as `text`."""

    by_type: Mapping[str, Mapping[str, Rule]] = field(default_factory=lambda: DEFAULT_RULES)

    def rule(self, entity_type: str | None, attribute: str | None) -> Rule:
        """The rule of an attribute; without a type, the rule of the first type that has it."""
        if attribute is None:
            return Rule()
        if entity_type is not None:
            of_type = self.by_type.get(type_key(entity_type), {})
            return of_type.get(canonical(attribute, entity_type), Rule())
        for rules in self.by_type.values():
            if canonical(attribute) in rules:
                return rules[canonical(attribute)]
        return Rule()

    def changed(self, options: Mapping[str, Any]) -> "Rules":
        """These rules, changed by `{entity type: {attribute: {setting: value}}}` (`task.rules`).

        Raises ConfigError, with the key and what to type instead, for invalid settings.
        """
        by_type = {t: dict(rules) for t, rules in self.by_type.items()}
        for entity_type, attributes in options.items():
            if not isinstance(attributes, Mapping):
                raise ConfigError(
                    f"task.rules.{entity_type}={attributes} is not a mapping; type "
                    f"'task.rules.{entity_type}={{ATTRIBUTE: {{tolerance: 3}}}}'"
                )
            for attribute, settings in attributes.items():
                name = canonical(attribute, entity_type)
                of_type = by_type.setdefault(type_key(entity_type), {})
                of_type[name] = _changed(
                    of_type.get(name, Rule()), settings, f"task.rules.{entity_type}.{attribute}"
                )
        return Rules(by_type)


def _changed(rule: Rule, settings: Any, key: str) -> Rule:
    names = list(Rule.__dataclass_fields__)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key}={settings} is not a mapping; type '{key}={{tolerance: 3}}'")
    for name, value in settings.items():
        if name not in names:
            raise ConfigError(f"{key}.{name}: no such setting; the settings are {', '.join(names)}")
        if name == "kind" and value not in KINDS:
            raise ConfigError(f"{key}.kind={value}: type one of {', '.join(KINDS)}")
        if name in ("ratio", "tolerance", "share") and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ConfigError(f"{key}.{name}={value} is not a number")
        if name in ("surname", "nickname") and not isinstance(value, bool):
            raise ConfigError(f"{key}.{name}={value}: type true or false")
        if name in ("ignored", "cues") and not (
            isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        ):
            raise ConfigError(f"{key}.{name}={value}: type a list of words such as [club, fc]")
        if name == "units" and not isinstance(value, Mapping):
            raise ConfigError(f"{key}.units={value}: type {{word: factor}}")
    return replace(rule, **settings)


def _find_names(answer: AnswerText, truth: str, rule: Rule, *, cased: bool = True) -> list[Window]:
    """Windows with the true name as a whole name (see `name_windows`)."""
    return name_windows(
        answer,
        truth,
        ratio=rule.ratio,
        person=rule.surname,
        nickname=rule.nickname,
        ignored=frozenset(" ".join(map(str, rule.ignored)).casefold().split()),
        cased=cased,
    )


def _find_genres(answer: AnswerText, truth: str, _rule: Rule) -> list[Window]:
    """Windows with the words of the genre; "film", "music" and the like are not among them."""
    genre = " ".join(w for w in words(truth) if w not in _GENERIC_GENRE_WORDS)
    windows: list[Window] = []
    for form in (genre, *_GENRE_WORDS.get(genre, ())):
        for end in ("", "s"):
            windows += runs_of(answer.words, f"{form}{end}".split() if form else [])
    return [answer.widened(window, _GENERIC_GENRE_WORDS) for window in windows]


def _find_text(answer: AnswerText, truth: str, rule: Rule) -> list[Window]:
    """Windows with a truth whose attribute has no rule.

    The truth may be anywhere word for word, or similar within the beginning of the answer: its
    first sentence, up to two words more than the truth has.
    """
    windows = _find_names(answer, truth, replace(rule, ratio=100), cased=False)
    if windows or not answer.tokens:
        return windows
    first_sentence = [n for n, s in enumerate(answer.sentences) if s == 0]
    counted = [n for n in first_sentence if answer.words[n] not in ARTICLES]
    max_words = len(content(words(truth))) + 2
    end = counted[:max_words][-1] + 1 if counted else 0
    return [w for w in _find_names(answer, truth, rule, cased=False) if w[1] <= end]


_FINDERS: Mapping[str, Callable[[AnswerText, str, Rule], list[Window]]] = {
    "name": _find_names,
    "genre": _find_genres,
    "text": _find_text,
}


def _mentions_truth(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether the answer mentions one of the truths in a way that counts as an answer."""
    windows = [w for truth in truths for w in _FINDERS[rule.kind](answer, truth, rule)]
    # "Brooklyn" within "Brooklyn, New York" is the same mention.
    windows = [
        (i, j)
        for i, j in dict.fromkeys(windows)
        if not any(a <= i and j <= b and b - a > j - i for a, b in windows)
    ]
    if any(answer.counts(window, windows) for window in windows):
        return True
    entity_words = answer.asked.entity_words
    return any(content(words(t)) == entity_words for t in truths) and answer.says_same_name()


def _is_near(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether the answer's number is within the tolerance of one of the truths.

    The answer's number is the first with one of the rule's cues near it, otherwise the first. Both
    ends of a range, or both of two alternatives, must be near. A number of the question does not
    count, unless it is the true number at the position of an answer.
    """
    read = years if rule.kind == "year" else lambda text: amounts(text, rule.units)
    read_one = year if rule.kind == "year" else amount
    true_values = [value for value in map(read_one, truths) if value is not None]
    asked = {number.value for number in read(with_digits(answer.asked.text))}
    asked_and_true = {v for v in asked if any(_within(v, true, rule) for true in true_values)}
    numbers = []
    for number in read(answer.text):
        i, j = answer.window(number.start, number.end)
        if i == j or answer.is_negated(i, j) or number.value in asked - asked_and_true:
            continue
        if not (answer.is_repetition((i, j)) or answer.is_asked(i, j)):
            numbers.append(number)
    if not numbers:
        return False
    chosen = next((n for n in numbers if _has_cue(answer, n, rule)), numbers[0])
    ends = [chosen.value] if chosen.other is None else [chosen.value, chosen.other]
    return any(all(_within(end, true, rule) for end in ends) for true in true_values)


def _within(answered: float, true: float, rule: Rule) -> bool:
    return abs(answered - true) <= max(rule.tolerance, rule.share * abs(true)) + 1e-9


_CUE_REACH = 5, 3
"""Tokens before and after a number among which a cue is looked up."""


def _has_cue(answer: AnswerText, number: Amount, rule: Rule) -> bool:
    """Whether one of the rule's cues is near the number, in the same sentence."""
    i, j = answer.window(number.start, number.end)
    sentence = [n for n, s in enumerate(answer.sentences) if s == answer.sentences[i]]
    before = range(max(i - _CUE_REACH[0], sentence[0]), i)
    other_numbers = [n for n in before if answer.words[n][:1].isdigit()]
    before = range(other_numbers[-1] + 1 if other_numbers else before.start, i)
    after = []
    for n in range(j, min(j + _CUE_REACH[1], sentence[-1] + 1)):
        if re.search(r"[,;:()]", answer.gap(n - 1)):
            break
        after.append(n)
    return any(answer.words[n] in rule.cues for n in (*before, *after))


_ANGLE = re.compile(
    r"([-\u2212+]?\d+(?:\.\d+)?)\s*(?:°|º|deg(?:rees?)?\b)?\s*"
    r"(?:(\d+(?:\.\d+)?)\s*(?:['\u2032\u2019]|min(?:utes?)?\b)\s*)?"
    r"(?:(\d+(?:\.\d+)?)\s*(?:[\"\u2033\u201d]|''|sec(?:onds?)?\b)\s*)?"
    r"(north|south|east|west|[NSEW])?(?![A-Za-z])",
    re.IGNORECASE,
)
_POINT = re.compile(r"point\s*\(\s*(-?\d+(?:\.\d+)?)\s+(-?\d+(?:\.\d+)?)\s*\)", re.IGNORECASE)


def coordinates(text: str) -> tuple[float, float] | None:
    """(latitude, longitude) in degrees; None where the text lacks either.

    Accepts "12.5°N, 8°W", degrees with minutes and seconds, "34.05, -118.24", and `Point(lon lat)`.
    Of numbers without a hemisphere, the first is the latitude and the second the longitude.
    """
    if point := _POINT.search(text):
        return float(point[2]), float(point[1])
    by_axis: dict[str, float] = {}
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
        by_axis.setdefault(axis, -abs(value) if letter in "SW" else value)
    if len(by_axis) == 2:
        pair = by_axis["latitude"], by_axis["longitude"]
    elif not by_axis and len(plain) >= 2:
        pair = plain[0], plain[1]
    else:
        return None
    return pair if abs(pair[0]) <= 90 and abs(pair[1]) <= 360 else None


def _are_near_coordinates(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether latitude and longitude are each within the tolerance, in degrees."""
    answered = coordinates(answer.without_echoes())
    if answered is None:
        return False
    for true in map(coordinates, truths):
        if true is None:
            continue
        longitude = abs(answered[1] - true[1]) % 360
        differences = abs(answered[0] - true[0]), min(longitude, 360 - longitude)
        if max(differences) <= rule.tolerance:
            return True
    return False


def is_correct(
    answer_text: str,
    truths: Sequence[str],
    entity_type: str | None = None,
    attribute: str | None = None,
    rules: Rules | None = None,
    *,
    question: str = "",
    entity: str | None = None,
) -> bool:
    """Whether the answer states one of the truths, by the rule of the type's attribute.

    Words that only repeat the `question` (the prompt as asked) or the `entity` do not count.
    Without an attribute, or with one that has no rule, a truth that is a number is compared as a
    number, a truth of everyday words ("yes", "The Who") as it is written, and a truth without words
    ("+", an emoji) must begin the answer; any other must be in the answer word for word, or similar
    at its beginning. False where there are no truths.
    """
    rule = (rules or Rules()).rule(entity_type, attribute)
    asked = Asked(
        text=question,
        entity=entity,
        entity_type=entity_type,
        attribute=None if attribute is None else canonical(attribute, entity_type),
    )
    return any(
        _JUDGES[kind](_prepare(answer_text, asked, kind), of_kind, replace(rule, kind=kind))
        for kind, of_kind in _by_kind(truths, rule)
    )


def _prepare(text: str, asked: Asked, kind: str) -> AnswerText:
    numeric = kind in ("number", "year", "coordinates")
    return AnswerText(with_digits(text) if numeric else text, asked, numeric=numeric)


def _by_kind(truths: Sequence[str], rule: Rule) -> list[tuple[str, list[str]]]:
    """(kind, truths judged as that kind)."""
    by_kind: dict[str, list[str]] = {}
    for truth in truths:
        kind = rule.kind
        everyday = set(content(words(truth))) <= _EVERYDAY and bool(words(truth))
        if kind == "text" and re.fullmatch(r"\s*[-\u2212+]?\d[\d,. ]*\s*", truth):
            kind = "number"
        elif kind in ("text", "name") and everyday:
            kind = "first" if kind == "text" else "written"
        elif kind in ("text", "name") and not words(truth) and truth.strip():
            kind = "symbols"
        by_kind.setdefault(kind, []).append(truth)
    return list(by_kind.items())


def _comes_first(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether the answer begins with the words of a truth ("yes", "no")."""
    answered = content(answer.words)
    return any(answered[: len(w)] == w for w in (content(words(truth)) for truth in truths))


def _begins_with_symbols(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether the answer begins with a truth that has no words ("+", an emoji)."""
    text = answer.text.lstrip()
    return any(text.startswith(normalised(truth).strip()) for truth in truths)


def _is_written(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether the answer contains a truth of everyday words ("The Who") as it is written."""
    windows = [
        answer.window(*match.span())
        for truth in truths
        for match in re.finditer(rf"(?<!\w){re.escape(truth.strip())}(?!\w)", answer.text)
    ]
    return any(answer.counts(window, windows) for window in windows if window[0] < window[1])


_JUDGES: Mapping[str, Callable[[AnswerText, Sequence[str], Rule], bool]] = {
    "name": _mentions_truth,
    "genre": _mentions_truth,
    "text": _mentions_truth,
    "number": _is_near,
    "year": _is_near,
    "coordinates": _are_near_coordinates,
    "first": _comes_first,
    "written": _is_written,
    "symbols": _begins_with_symbols,
}
