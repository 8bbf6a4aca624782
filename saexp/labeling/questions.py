"""Questions about an entity's attributes, judged answers, and the groups that follow."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saexp.data.examples import Example
from saexp.errors import ConfigError, DataError
from saexp.labeling.answer_text import runs_of, words
from saexp.labeling.matchers import Rules, canonical, is_correct, type_key

Templates = Mapping[str, Mapping[str, tuple[str, str]]]
"""Entity type -> attribute -> (question, beginning of an answer), with {entity} in both."""

TEMPLATES: Templates = {
    "player": {
        "birthplace": (
            "In which city was the player {entity} born?",
            "The player {entity} was born in the city of",
        ),
        "birth_year": (
            "In what year was the player {entity} born?",
            "The player {entity} was born in the year",
        ),
        "teams": (
            "Name one team that the player {entity} has played for.",
            "The player {entity} has played for the team",
        ),
    },
    "movie": {
        "director": (
            "Who directed the movie {entity}?",
            "The movie {entity} was directed by",
        ),
        "screenwriter": (
            "Who wrote the screenplay of the movie {entity}?",
            "The screenplay of the movie {entity} was written by",
        ),
        "cast": (
            "Name one actor who stars in the movie {entity}.",
            "An actor who stars in the movie {entity} is",
        ),
        "genre": (
            "Which genre does the movie {entity} belong to?",
            "The movie {entity} belongs to the genre of",
        ),
        "release_year": (
            "In what year was the movie {entity} released?",
            "The movie {entity} was released in the year",
        ),
        "duration": (
            "How many minutes long is the movie {entity}?",
            "The duration of the movie {entity}, in minutes, is",
        ),
    },
    "city": {
        "country": (
            "In which country is the city of {entity}?",
            "The city of {entity} is in the country of",
        ),
        "population": (
            "What is the population of the city of {entity}, as a number?",
            "The population of the city of {entity}, as a number, is",
        ),
        "elevation": (
            "How many metres above sea level is the city of {entity}?",
            "The elevation of the city of {entity}, in metres, is",
        ),
        "coordinates": (
            "What are the latitude and longitude of the city of {entity}, in decimal degrees?",
            "The latitude and longitude of the city of {entity}, in decimal degrees, are",
        ),
    },
    "song": {
        "performer": (
            "Who performs the song {entity}?",
            "The song {entity} is performed by",
        ),
        "album": (
            "On which album is the song {entity}?",
            "The song {entity} is on the album",
        ),
        "year": (
            "In what year was the song {entity} released?",
            "The song {entity} was released in the year",
        ),
        "genre": (
            "Which genre does the song {entity} belong to?",
            "The song {entity} belongs to the genre of",
        ),
    },
}


KNOWN, UNKNOWN, DROPPED = "known", "unknown", "dropped"
LABELS = ("correct", "refusal", "error")


@dataclass(frozen=True)
class Question:
    """One attribute of one entity, asked."""

    entity: str
    entity_type: str | None
    attribute: str | None
    text: str
    """The question, or the data's own prompt where it has no attributes."""
    beginning: str
    """Beginning of the answer that the model continues; empty for the data's own prompt."""
    truths: tuple[str, ...]
    """None where the entity does not exist, so that no answer is right."""
    given_group: str | None
    """What the data set itself calls the entity."""

    @property
    def asked(self) -> str:
        """The question and, where the answer is begun, its beginning."""
        return f"{self.text} {self.beginning}".rstrip()


@dataclass(frozen=True)
class Thresholds:
    """When an attribute, and an entity, counts as known."""

    min_correct: int = 3
    """Right samples that make an attribute known."""
    min_known: int = 2
    """Known attributes that make an entity known; all of them where fewer were asked."""
    max_unknown: int = 0
    """Most known attributes of an unknown entity; with more, yet not known, it is dropped."""

    def __post_init__(self) -> None:
        if not self.min_correct >= 1 or not 0 <= self.max_unknown < self.min_known:
            raise ConfigError(
                f"min_correct={self.min_correct}, min_known={self.min_known}, max_unknown="
                f"{self.max_unknown}: needed are min_correct >= 1 and 0 <= max_unknown < min_known"
            )

    def group(self, n_known: int, n_asked: int) -> str:
        """known, unknown or dropped."""
        if n_known >= min(self.min_known, n_asked) and n_known > self.max_unknown:
            return KNOWN
        return UNKNOWN if n_known <= self.max_unknown else DROPPED


def pick(seed: int, *names: str | None, n: int) -> int:
    """One of n, the same for the same names and seed whatever else there is."""
    digest = hashlib.sha256(repr((seed, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % n


def truths_of(value: Any, attribute: str) -> tuple[str, ...]:
    """Accepted answers from an attribute's value as files hold it.

    A list means that any of its items will do, but for coordinates, where it (or a mapping with
    `latitude` and `longitude`) is one pair. Of a birthplace "City, Country" the city is enough.
    """
    if value is None or value == "":
        return ()
    if canonical(attribute) == "coordinates" and _is_pair(value):
        if isinstance(value, Mapping):
            pair = [v for k in ("lat", "lon") for n, v in value.items() if n.lower().startswith(k)]
        else:
            pair = list(value) if isinstance(value, Sequence) else []
        whole = len(pair) == 2 and None not in pair
        return (f"{pair[0]}, {pair[1]}",) if whole else ()
    if isinstance(value, list | tuple):
        found = [t for item in value for t in truths_of(item, attribute)]
    elif isinstance(value, float) and value.is_integer():
        found = [str(int(value))]
    else:
        found = [str(value)]
        if canonical(attribute) == "birthplace" and "," in found[0]:
            found.append(found[0].partition(",")[0].strip())
    return tuple(dict.fromkeys(t for t in found if t.strip()))


def _is_pair(value: Any) -> bool:
    """Whether it is a mapping, or a list of numbers alone."""
    if isinstance(value, list | tuple):
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return not isinstance(value, str)


def read_attributes(value: Any) -> list[tuple[str, Any]]:
    """(name, value) pairs of a published `attributes` list, or of a plain mapping.

    Raises ValueError, with what is wrong, for anything else.
    """
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if not isinstance(value, list | tuple):
        raise ValueError("'attributes' must be a list of {attribute_type, attribute_value}")
    pairs = []
    for item in value:
        if not isinstance(item, Mapping) or not {"attribute_type", "attribute_value"} <= set(item):
            raise ValueError("an attribute needs attribute_type and attribute_value")
        if item["attribute_type"] is not None:
            pairs.append((str(item["attribute_type"]), item["attribute_value"]))
    return pairs


def questions(
    examples: Iterable[Example], templates: Templates = TEMPLATES
) -> tuple[list[Question], dict[str, int]]:
    """Every attribute that has a template, asked of every entity; and what is not asked, counted.

    An entity is asked once, however many examples it has. One without attributes (an invented
    name) is asked what others of its type are, and has no right answer; where none of its type has
    attributes, its examples' own prompts are the questions.
    """
    examples = list(examples)
    not_asked: dict[str, int] = {}
    asked_of_type: dict[str, dict[str, None]] = {}
    of_entity: dict[tuple[str | None, str], list[Example]] = {}
    for example in examples:
        if example.entity is None:
            not_asked["no entity"] = not_asked.get("no entity", 0) + 1
            continue
        of_entity.setdefault((example.entity_type, example.entity), []).append(example)
        for name, _ in _attributes(example):
            attribute = canonical(name, example.entity_type)
            if attribute in templates.get(type_key(example.entity_type), {}):
                asked_of_type.setdefault(type_key(example.entity_type), {})[attribute] = None
    made: list[Question] = []
    for (entity_type, _), same in of_entity.items():
        first = same[0]
        pairs = [p for example in same for p in _attributes(example)]
        key = type_key(entity_type)
        kinds = templates.get(key, {})
        if pairs:
            truths: dict[str, tuple[str, ...]] = {}
            for name, value in pairs:
                attribute = canonical(name, entity_type)
                if attribute not in kinds:
                    reason = no_template(entity_type, attribute)
                    not_asked[reason] = not_asked.get(reason, 0) + 1
                elif accepted := truths_of(value, attribute):
                    truths[attribute] = tuple(dict.fromkeys(truths.get(attribute, ()) + accepted))
                else:
                    reason = f"{entity_type} {attribute} without a value"
                    not_asked[reason] = not_asked.get(reason, 0) + 1
            made += [_asked(first, a, kinds[a], t) for a, t in truths.items()]
        elif key in asked_of_type:
            made += [_asked(first, a, kinds[a], ()) for a in asked_of_type[key]]
        else:
            made += _own_prompts(same, not_asked)
    return made, not_asked


def no_template(entity_type: str | None, attribute: str) -> str:
    """Why an attribute is not asked for, and what to type so that it is."""
    kind, name = type_key(entity_type), attribute.replace("_", " ")
    question = f"What is the {name} of the {kind.replace('_', ' ')} {{entity}}?"
    return (
        f"no template for {entity_type} {attribute}; to ask for it, type "
        f"\"task.templates.{kind}.{attribute}='{question}'\""
    )


def _attributes(example: Example) -> list[tuple[str, Any]]:
    value = example.extra.get("attributes")
    try:
        return read_attributes(value) if value else []
    except ValueError as error:
        raise DataError(f"example {example.id}: {error}") from error


def _asked(
    example: Example, attribute: str, template: tuple[str, str], truths: tuple[str, ...]
) -> Question:
    assert example.entity is not None
    text, beginning = (t.replace("{entity}", example.entity) for t in template)
    return Question(
        entity=example.entity,
        entity_type=example.entity_type,
        attribute=attribute,
        text=text,
        beginning=beginning,
        truths=truths,
        given_group=example.group,
    )


def _own_prompts(same: Sequence[Example], not_asked: dict[str, int]) -> list[Question]:
    made = []
    for example in same:
        if example.prompt is None or example.entity is None:
            reason = "neither attributes nor a prompt"
            not_asked[reason] = not_asked.get(reason, 0) + 1
            continue
        attribute = example.extra.get("attribute")
        made.append(
            Question(
                entity=example.entity,
                entity_type=example.entity_type,
                attribute=None if attribute is None else str(attribute),
                text=example.prompt,
                beginning="",
                truths=example.answers,
                given_group=example.group,
            )
        )
    return made


def repeats_question(question: Question) -> bool:
    """Whether every true answer stands in the question, so that a mention may be a repetition."""
    asked = words(question.asked)
    return bool(question.truths) and all(runs_of(asked, words(t)) for t in question.truths)


def label_answer(
    answer: str, question: Question, rules: Rules, refuses: Callable[[str], bool]
) -> str:
    """correct, refusal or error.

    Where the true answer stands in the question, an answer that refuses is a refusal, even if it
    also names it.
    """
    right = is_correct(
        answer,
        question.truths,
        question.entity_type,
        question.attribute,
        rules,
        question=question.asked,
        entity=question.entity,
    )
    if right and not (repeats_question(question) and refuses(answer)):
        return "correct"
    return "refusal" if refuses(answer) else "error"


def entity_groups(asked: pd.DataFrame, thresholds: Thresholds) -> pd.DataFrame:
    """One row per entity: `n_asked`, `n_known`, `group`, in order of appearance.

    `asked` has a row per question: `entity`, `entity_type`, `n_correct` (right samples).
    """
    table = asked.assign(known=asked["n_correct"] >= thresholds.min_correct)
    grouped = table.groupby(["entity_type", "entity"], sort=False, dropna=False)
    entities = grouped["known"].agg(n_asked="size", n_known="sum").reset_index()
    entities["group"] = [
        thresholds.group(int(known), int(n))
        for known, n in zip(entities["n_known"], entities["n_asked"], strict=True)
    ]
    return entities
