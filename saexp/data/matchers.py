"""Whether an answer counts as correct: one rule per entity type and attribute.

The rules follow Ferrando et al. 2024 (arXiv 2411.14257): names by fuzzy match, genres by substring,
numbers within a tolerance.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rapidfuzz.fuzz import token_set_ratio

from saexp.data.quantities import METRES, MINUTES, amount, coordinates, quantities, year
from saexp.errors import ConfigError

KINDS = ("name", "genre", "number", "year", "coordinates", "text")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one attribute's answers are judged."""

    kind: str = "text"
    """name, genre, number, year, coordinates, or text (nothing known of the attribute)."""
    ratio: int | float = 90.0
    """name, text: token-set ratio that must be exceeded."""
    surname: bool = False
    """name: a part of the name that holds its last word is enough."""
    tolerance: int | float = 0.0
    """number, year, coordinates: largest difference, in the attribute's own unit."""
    share: int | float = 0.0
    """number: largest difference as a share of the true one."""
    units: Mapping[str, float] = field(default_factory=dict)
    """number: unit words and their factor to the attribute's own unit."""


_PERSON = Rule(kind="name", surname=True)
_NAME = Rule(kind="name")
_GENRE = Rule(kind="genre")

DEFAULT_RULES: Mapping[str, Mapping[str, Rule]] = {
    "player": {
        "birthplace": _NAME,
        "birth_year": Rule(kind="year", tolerance=5),
        "teams": _NAME,
        "sport": _NAME,
    },
    "movie": {
        "director": _PERSON,
        "screenwriter": _PERSON,
        "cast": _PERSON,
        "genre": _GENRE,
        "release_year": Rule(kind="year", tolerance=2),
        "duration": Rule(kind="number", tolerance=3, units=MINUTES),
    },
    "city": {
        "country": _NAME,
        "population": Rule(kind="number", share=0.1),
        "elevation": Rule(kind="number", tolerance=20, units=METRES),
        "coordinates": Rule(kind="coordinates", tolerance=1),
    },
    "song": {
        "performer": _PERSON,
        "album": _NAME,
        "year": Rule(kind="year"),
        "genre": _GENRE,
    },
}

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
_ARTICLES = frozenset(("the", "a", "an"))
_EVERYDAY = frozenset(
    ("who", "what", "where", "when", "it", "them", "us", "her", "him", "she", "he", "you", "me")
    + ("we", "they", "yes", "no", "this", "that", "one")
)


def canonical(attribute: str, entity_type: str | None = None) -> str:
    """An attribute's own name; published ones and prompt types (`player_place_birth`) are known."""
    name = re.sub(r"[^\w]+", "_", attribute.strip().lower())
    name = name.removeprefix(f"{entity_type}_") if entity_type else name
    return ALIASES.get(name, name)


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
            of_type = self.by_type.get(entity_type, {})
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
                raise ConfigError(f"rules.{entity_type}: write attribute: {{setting: value}}")
            for attribute, settings in attributes.items():
                name = canonical(attribute, entity_type)
                before = by_type.setdefault(entity_type, {}).get(name, Rule())
                by_type[entity_type][name] = _changed(
                    before, settings, f"rules.{entity_type}.{attribute}"
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
            raise ConfigError(f"{where}.{name}={value} is no number")
        if name == "units" and not isinstance(value, Mapping):
            raise ConfigError(f"{where}.units={value}: write {{word: factor}}")
    return replace(rule, **settings)


def words(text: str) -> list[str]:
    """Lower-case words without accents and punctuation; `&` is read as "and"."""
    plain = unicodedata.normalize("NFKD", text.replace("&", " and "))
    plain = "".join(c for c in plain if not unicodedata.combining(c)).casefold()
    plain = re.sub(r"(?<=\w)['\u2019](?=\w)|(?<=\b\w)\.(?=\w\b)", "", plain)
    return re.findall(r"\w+", plain)


def _content(found: Sequence[str]) -> list[str]:
    return [w for w in found if w not in _ARTICLES] or list(found)


def is_name(answer: str, truth: str, rule: Rule) -> bool:
    """Fuzzy name match: the token-set ratio of the answer and the true name is above `ratio`.

    Taken of the whole answer and of every run of as many words as the name has, so that a slip in a
    long answer is forgiven as in a short one; articles, accents, case and punctuation do not count.
    An answer that is only a part of the name has ratio 100 too: it counts if it holds more than
    half of the name's letters, or (`surname`) the name's last word. A name made of everyday words
    only ("The Who") must stand there as it is written.
    """
    wanted, given = _content(words(truth)), _content(words(answer))
    if not wanted or not given:
        return False
    if set(wanted) <= _EVERYDAY:
        return re.search(rf"(?<!\w){re.escape(truth.strip())}(?!\w)", answer) is not None
    if set(given) < set(wanted):
        part = sum(len(w) for w in set(given)) / sum(len(w) for w in set(wanted))
        return part > 0.5 or (rule.surname and wanted[-1] in given)
    n, name = len(wanted), " ".join(wanted)
    runs = [given, *(given[i : i + n] for i in range(len(given) - n + 1))]
    return any(
        token_set_ratio(" ".join(run), name) > rule.ratio
        for run in runs
        if not set(run) < set(wanted)
    )


def is_text(answer: str, truth: str, rule: Rule) -> bool:
    """Match where nothing is known of the attribute.

    True where the truth's words stand in the answer one after another, anywhere (a number equals
    one written otherwise: 1,200 and 1200), or where the fuzzy name match holds on the answer's
    beginning: its first clause (up to . ! ? ; or a line's end), at most two words longer than the
    truth. A truth of everyday words only ("yes", "no") must be the answer's first words.
    """
    wanted, given = _content(words(truth)), _content(words(answer))
    if not wanted or not given:
        return False
    if set(wanted) <= _EVERYDAY:
        return given[: len(wanted)] == wanted
    if re.fullmatch(r"\s*[-\u2212+]?\d[\d,. ]*\s*", truth):
        plain = truth.strip().rstrip(".,")
        value = amount(plain)
        return value is not None and value in [q.value for q in quantities(answer)]
    n = len(wanted)
    if any(given[i : i + n] == wanted for i in range(len(given) - n + 1)):
        return True
    clause = re.split(r"[.!?;](?:\s|$)|\n", answer.strip(), maxsplit=1)[0]
    beginning = _content(words(clause))[: n + 2]
    return is_name(" ".join(beginning), truth, rule)


def is_genre(answer: str, truth: str, _rule: Rule) -> bool:
    """The genre's words stand in the answer; "film", "music" and the like are no part of them."""
    wanted = [w for w in words(truth) if w not in ("film", "movie", "music", "song", "genre")]
    name, text = " ".join(wanted), f" {' '.join(words(answer))} "
    return bool(name) and any(
        f" {form}{end} " in text
        for form in (name, *_GENRE_WORDS.get(name, ()))
        for end in ("", "s")
    )


def is_number(answer: str, truth: str, rule: Rule) -> bool:
    """The answer's first amount (see `amount`) is within the tolerance, or the share, of it."""
    given, wanted = amount(answer, rule.units), amount(truth)
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= max(rule.tolerance, rule.share * abs(wanted)) + 1e-9


def is_year(answer: str, truth: str, rule: Rule) -> bool:
    """The answer's first year is within the tolerance; a date's year is its first year."""
    given, wanted = year(answer), year(truth)
    return given is not None and wanted is not None and abs(given - wanted) <= rule.tolerance


def is_place(answer: str, truth: str, rule: Rule) -> bool:
    """Latitude and longitude are each within the tolerance, in degrees."""
    given, wanted = coordinates(answer), coordinates(truth)
    if given is None or wanted is None:
        return False
    east = abs(given[1] - wanted[1]) % 360
    return abs(given[0] - wanted[0]) <= rule.tolerance and min(east, 360 - east) <= rule.tolerance


_JUDGES = {
    "name": is_name,
    "genre": is_genre,
    "number": is_number,
    "year": is_year,
    "coordinates": is_place,
    "text": is_text,
}


def is_correct(
    answer_text: str,
    truths: Sequence[str],
    entity_type: str | None = None,
    attribute: str | None = None,
    rules: Rules | None = None,
) -> bool:
    """Whether the answer says one of the truths, by the rule of that type's attribute.

    Without an attribute, or with one that has no rule, as `is_text` says. No truths: False.
    """
    rule = (rules or Rules()).rule(entity_type, attribute)
    judge = _JUDGES[rule.kind]
    return any(judge(answer_text, truth, rule) for truth in truths)
