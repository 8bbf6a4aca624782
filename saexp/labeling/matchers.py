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
    words,
)
from saexp.labeling.names import EVERYDAY, name_windows
from saexp.labeling.quantities import (
    METRES,
    MINUTES,
    Amount,
    amount,
    amounts,
    coordinates,
    with_digits,
    year,
    years,
)

KINDS = ("name", "genre", "number", "year", "coordinates", "text")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one attribute's answers are judged."""

    kind: str = "text"
    """name, genre, number, year, coordinates, or text (nothing known of the attribute)."""
    ratio: int | float = 90.0
    """name, text: likeness of the whole names that must be exceeded, 0 to 100."""
    surname: bool = False
    """name: of a person; the surname alone is enough, and middle names may be left out."""
    nickname: bool = False
    """name: the last word alone is enough where it is a plural ("Lakers")."""
    ignored: Sequence[str] = ()
    """name: words that make no difference, such as FC in a club's name."""
    tolerance: int | float = 0.0
    """number, year, coordinates: largest difference, in the attribute's own unit."""
    share: int | float = 0.0
    """number: largest difference as a share of the true one."""
    units: Mapping[str, float] = field(default_factory=dict)
    """number: unit words and their factor to the attribute's own unit."""
    cues: Sequence[str] = ()
    """number, year: words near the right number, where an answer has several."""


_PERSON = Rule(kind="name", surname=True)
_NAME = Rule(kind="name")
_GENRE = Rule(kind="genre")
_CLUB_WORDS = ("fc", "cf", "sc", "ac", "afc", "cfc", "cd", "ud", "if", "bk", "club", "football")
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
            units=MINUTES,
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
            units=METRES,
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
"""Names that published files use -> ours."""

_OF_ANY_GENRE = frozenset(("film", "movie", "music", "song", "genre"))
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
    """An attribute's own name; published ones and prompt types (`player_place_birth`) are known.

    Published names mean ours only for the entity types that have rules.
    """
    name = re.sub(r"[^\w]+", "_", attribute.strip().lower())
    kind = type_key(entity_type)
    name = name.removeprefix(f"{kind}_") if entity_type else name
    alias = ALIASES.get(name, name)
    return alias if entity_type is None or alias in DEFAULT_RULES.get(kind, {}) else name


def type_key(entity_type: str | None) -> str:
    """An entity type as it is typed in options: `video_game` for "Video game"."""
    return re.sub(r"[^\w]+", "_", str(entity_type).strip().lower())


@dataclass(frozen=True)
class Rules:
    """Rules by entity type and attribute; what is not named is judged as `text`."""

    by_type: Mapping[str, Mapping[str, Rule]] = field(default_factory=lambda: DEFAULT_RULES)

    def rule(self, entity_type: str | None, attribute: str | None) -> Rule:
        """The rule of an attribute; without a type, that of the first type with such an attribute
        name."""
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
        """These rules with settings of `{entity type: {attribute: {setting: value}}}` in place.

        Raises ConfigError for a setting that no rule has.
        """
        by_type = {t: dict(rules) for t, rules in self.by_type.items()}
        for entity_type, attributes in options.items():
            if not isinstance(attributes, Mapping):
                raise ConfigError(f"task.rules.{entity_type}: write attribute: {{setting: value}}")
            for attribute, settings in attributes.items():
                name = canonical(attribute, entity_type)
                of_type = by_type.setdefault(type_key(entity_type), {})
                of_type[name] = _changed(
                    of_type.get(name, Rule()), settings, f"task.rules.{entity_type}.{attribute}"
                )
        return Rules(by_type)


def _changed(rule: Rule, settings: Any, where: str) -> Rule:
    known = list(Rule.__dataclass_fields__)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}={settings}: write settings, such as {{tolerance: 3}}")
    for name, value in settings.items():
        if name not in known:
            raise ConfigError(f"{where}.{name}: no such setting; there are {', '.join(known)}")
        if name == "kind" and value not in KINDS:
            raise ConfigError(f"{where}.kind={value}: use one of {', '.join(KINDS)}")
        if name in ("ratio", "tolerance", "share") and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ConfigError(f"{where}.{name}={value} is not a number")
        if name in ("surname", "nickname") and not isinstance(value, bool):
            raise ConfigError(f"{where}.{name}={value}: type true or false")
        if name in ("ignored", "cues") and not (
            isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        ):
            raise ConfigError(f"{where}.{name}={value}: write a list of words, [club, fc]")
        if name == "units" and not isinstance(value, Mapping):
            raise ConfigError(f"{where}.units={value}: write {{word: factor}}")
    return replace(rule, **settings)


def _names(answer: AnswerText, truth: str, rule: Rule, *, cased: bool = True) -> list[Window]:
    """Where the true name is in the answer, as a whole name (see `names.name_windows`)."""
    return name_windows(
        answer,
        truth,
        ratio=rule.ratio,
        person=rule.surname,
        nickname=rule.nickname,
        ignored=frozenset(" ".join(map(str, rule.ignored)).casefold().split()),
        cased=cased,
    )


def _genres(answer: AnswerText, truth: str, _rule: Rule) -> list[Window]:
    """Where the genre's words are; "film", "music" and the like are not part of them."""
    wanted = [w for w in words(truth) if w not in _OF_ANY_GENRE]
    found = []
    for form in (" ".join(wanted), *_GENRE_WORDS.get(" ".join(wanted), ())):
        for end in ("", "s"):
            found += runs_of(answer.words, f"{form}{end}".split() if form else [])
    return [answer.widened(window, _OF_ANY_GENRE) for window in found]


def _text(answer: AnswerText, truth: str, rule: Rule) -> list[Window]:
    """Where the truth is, if nothing is known of the attribute.

    Its words one after another, anywhere; or a fuzzy match of the whole name at the answer's
    beginning: its first sentence, at most two words longer than the truth.
    """
    wanted = content(words(truth))
    found = _names(answer, truth, replace(rule, ratio=100), cased=False)
    if found or not answer.tokens:
        return found
    first = [n for n, s in enumerate(answer.sentences) if s == 0]
    kept = [n for n in first if answer.words[n] not in ARTICLES]
    end = kept[: len(wanted) + 2][-1] + 1 if kept else 0
    return [w for w in _names(answer, truth, rule, cased=False) if w[1] <= end]


_WINDOWS: Mapping[str, Callable[[AnswerText, str, Rule], list[Window]]] = {
    "name": _names,
    "genre": _genres,
    "text": _text,
}


def _is_said(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether one of the truths is mentioned so that it counts as an answer."""
    windows = [w for truth in truths for w in _WINDOWS[rule.kind](answer, truth, rule)]
    # "Brooklyn" within "Brooklyn, New York" is that one mention.
    windows = [
        (i, j)
        for i, j in dict.fromkeys(windows)
        if not any(a <= i and j <= b and b - a > j - i for a, b in windows)
    ]
    if any(answer.counts(window, windows) for window in windows):
        return True
    own = answer.asked.entity_words
    return any(content(words(t)) == own for t in truths) and answer.says_same_name()


def _is_near(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether the answer's number is within the tolerance of one of the truths.

    It is the first that has one of the rule's cues near, else the first. Of a range, or of two
    alternatives, both ends must be near. A number of the question does not count, unless it is
    the true one and stands where an answer stands.
    """
    read = years if rule.kind == "year" else lambda text: amounts(text, rule.units)
    one = year if rule.kind == "year" else amount
    wanted = [value for value in map(one, truths) if value is not None]
    asked = {found.value for found in read(with_digits(answer.asked.text))}
    right = {value for value in asked if any(_within(value, w, rule) for w in wanted)}
    found = []
    for candidate in read(answer.text):
        i, j = answer.window(candidate.start, candidate.end)
        if i == j or answer.is_negated(i, j) or candidate.value in asked - right:
            continue
        if not (answer.is_repetition((i, j)) or answer.is_asked(i, j)):
            found.append(candidate)
    chosen = next((c for c in found if _has_cue(answer, c, rule)), found[0] if found else None)
    if chosen is None:
        return False
    ends = [chosen.value] if chosen.other is None else [chosen.value, chosen.other]
    return any(all(_within(end, w, rule) for end in ends) for w in wanted)


def _within(given: float, wanted: float, rule: Rule) -> bool:
    return abs(given - wanted) <= max(rule.tolerance, rule.share * abs(wanted)) + 1e-9


_CUE_REACH = 5, 3
"""Tokens in front of and behind a number in which a cue may be."""


def _has_cue(answer: AnswerText, found: Amount, rule: Rule) -> bool:
    """Whether one of the rule's cues is near the number, in the same sentence."""
    i, j = answer.window(found.start, found.end)
    same = [n for n, s in enumerate(answer.sentences) if s == answer.sentences[i]]
    before = range(max(i - _CUE_REACH[0], same[0]), i)
    numbers = [n for n in before if answer.words[n][:1].isdigit()]
    before = range(numbers[-1] + 1 if numbers else before.start, i)
    after = []
    for n in range(j, min(j + _CUE_REACH[1], same[-1] + 1)):
        if re.search(r"[,;:()]", answer.gap(n - 1)):
            break
        after.append(n)
    return any(answer.words[n] in rule.cues for n in (*before, *after))


def _is_place(answer: AnswerText, truths: Sequence[str], rule: Rule) -> bool:
    """Whether latitude and longitude are each within the tolerance, in degrees."""
    given = coordinates(answer.without_echoes())
    if given is None:
        return False
    for wanted in map(coordinates, truths):
        if wanted is None:
            continue
        east = abs(given[1] - wanted[1]) % 360
        near = abs(given[0] - wanted[0]), min(east, 360 - east)
        if max(near) <= rule.tolerance:
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
    """Whether the answer says one of the truths, by the rule of that type's attribute.

    Words that only repeat the `question` (the prompt as asked) or the `entity` do not count.
    Without an attribute, or with one that has no rule, a truth that is a number is compared as a
    number, one of everyday words ("yes", "The Who") as it is written, and one without words ("+",
    an emoji) must begin the answer; any other as `_text` says. No truths: False.
    """
    rule = (rules or Rules()).rule(entity_type, attribute)
    asked = Asked(
        text=question,
        entity=entity,
        entity_type=entity_type,
        attribute=None if attribute is None else canonical(attribute, entity_type),
    )
    return any(
        _JUDGES[kind](_answer(answer_text, asked, kind), some, replace(rule, kind=kind))
        for kind, some in _by_kind(truths, rule)
    )


def _answer(text: str, asked: Asked, kind: str) -> AnswerText:
    numeric = kind in ("number", "year", "coordinates")
    return AnswerText(with_digits(text) if numeric else text, asked, numeric=numeric)


def _by_kind(truths: Sequence[str], rule: Rule) -> list[tuple[str, list[str]]]:
    """The truths by the kind that each is judged as."""
    found: dict[str, list[str]] = {}
    for truth in truths:
        kind = rule.kind
        everyday = set(content(words(truth))) <= EVERYDAY and bool(words(truth))
        if kind == "text" and re.fullmatch(r"\s*[-\u2212+]?\d[\d,. ]*\s*", truth):
            kind = "number"
        elif kind in ("text", "name") and everyday:
            kind = "first" if kind == "text" else "written"
        elif kind in ("text", "name") and not words(truth) and truth.strip():
            kind = "symbols"
        found.setdefault(kind, []).append(truth)
    return list(found.items())


def _comes_first(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether the answer begins with the words of a truth ("yes", "no")."""
    given = content(answer.words)
    return any(given[: len(w)] == w for w in (content(words(truth)) for truth in truths))


def _begins_with_symbols(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether the answer begins with a truth that has no words ("+", an emoji)."""
    given = answer.text.lstrip()
    return any(given.startswith(normalised(truth).strip()) for truth in truths)


def _is_written(answer: AnswerText, truths: Sequence[str], _rule: Rule) -> bool:
    """Whether a truth of everyday words ("The Who") stands in the answer as it is written."""
    windows = [
        answer.window(*match.span())
        for truth in truths
        for match in re.finditer(rf"(?<!\w){re.escape(truth.strip())}(?!\w)", answer.text)
    ]
    return any(answer.counts(window, windows) for window in windows if window[0] < window[1])


_JUDGES: Mapping[str, Callable[[AnswerText, Sequence[str], Rule], bool]] = {
    "name": _is_said,
    "genre": _is_said,
    "text": _is_said,
    "number": _is_near,
    "year": _is_near,
    "coordinates": _is_place,
    "first": _comes_first,
    "written": _is_written,
    "symbols": _begins_with_symbols,
}
