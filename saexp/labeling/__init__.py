"""Questions about the attributes of entities, labels of the answers, and groups of entities."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saexp.data import Example
from saexp.errors import ConfigError, DataError
from saexp.labeling.answer_text import runs_of, words
from saexp.labeling.matchers import Rules, canonical, is_correct, type_key

log = logging.getLogger(__name__)


Templates = Mapping[str, Mapping[str, tuple[str, str]]]
"""Entity type -> attribute -> (question, answer prefix), both with {entity}."""

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


EntityKey = tuple[str, str]
"""(entity type, entity)."""
KNOWN, UNKNOWN, DROPPED = "known", "unknown", "dropped"
LABELS = ("correct", "refusal", "error")


@dataclass(frozen=True)
class Question:
    """A question about one attribute of one entity."""

    entity: str
    entity_type: str | None
    attribute: str | None
    text: str
    """The question, or a prompt of the data set where the entity has no attributes."""
    beginning: str
    """Prefix of the answer that the model continues; empty for a prompt of the data set."""
    truths: tuple[str, ...]
    """Accepted answers; empty where the entity does not exist, so that no answer is correct."""
    given_group: str | None
    """Group of the entity in the data set."""

    @property
    def asked(self) -> str:
        """The question with the answer's prefix."""
        return f"{self.text} {self.beginning}".rstrip()


@dataclass(frozen=True)
class Thresholds:
    """Thresholds at which attributes and entities count as known."""

    min_correct: int = 3
    """Least number of correct samples of a known attribute."""
    min_known: int = 2
    """Least number of known attributes of a known entity; all, where fewer were asked about."""
    max_unknown: int = 0
    """Largest number of known attributes of an unknown entity; entities in between are dropped."""

    def __post_init__(self) -> None:
        if not self.min_correct >= 1 or not 0 <= self.max_unknown < self.min_known:
            raise ConfigError(
                f"min_correct={self.min_correct}, min_known={self.min_known}, max_unknown="
                f"{self.max_unknown}: type min_correct >= 1 and 0 <= max_unknown < min_known"
            )

    def group(self, n_known: int, n_asked: int) -> str:
        """KNOWN, UNKNOWN or DROPPED, by how many attributes are known and were asked about."""
        if n_known >= min(self.min_known, n_asked) and n_known > self.max_unknown:
            return KNOWN
        return UNKNOWN if n_known <= self.max_unknown else DROPPED


def pick(seed: int, *names: str | None, n: int) -> int:
    """A pseudo-random index below n that depends on the seed and the names only."""
    digest = hashlib.sha256(repr((seed, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % n


def truths_of(value: Any, attribute: str) -> tuple[str, ...]:
    """Accepted answers for an attribute's value in a published file.

    Every item of a list is accepted, except for coordinates, where a list (or a mapping with
    `latitude` and `longitude`) is one pair. For a birthplace "City, Country", the city is accepted.
    """
    if value is None or value == "":
        return ()
    if canonical(attribute) == "coordinates" and _is_pair(value):
        if isinstance(value, Mapping):
            pair = [v for k in ("lat", "lon") for n, v in value.items() if n.lower().startswith(k)]
        else:
            pair = list(value) if isinstance(value, Sequence) else []
        is_complete = len(pair) == 2 and None not in pair
        return (f"{pair[0]}, {pair[1]}",) if is_complete else ()
    if isinstance(value, list | tuple):
        truths = [t for item in value for t in truths_of(item, attribute)]
    elif isinstance(value, float) and value.is_integer():
        truths = [str(int(value))]
    else:
        truths = [str(value)]
        if canonical(attribute) == "birthplace" and "," in truths[0]:
            truths.append(truths[0].partition(",")[0].strip())
    return tuple(dict.fromkeys(t for t in truths if t.strip()))


def _is_pair(value: Any) -> bool:
    """Whether the value is a mapping, or a list that contains only numbers."""
    if isinstance(value, list | tuple):
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    return not isinstance(value, str)


def read_attributes(value: Any) -> list[tuple[str, Any]]:
    """(name, value) pairs of a published `attributes` list, or of a plain mapping.

    Raises ValueError for anything else.
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
    """(questions, reason -> number of attributes or examples without a question).

    There is one question per entity and attribute with a template, however many examples the entity
    has. For entities without attributes (invented names), the questions are about the attributes of
    other entities of their type and have no correct answer. Where no entity of a type has
    attributes, the prompts of the examples are the questions.
    """
    examples = list(examples)
    not_asked: Counter[str] = Counter()
    asked_of_type: dict[str, dict[str, None]] = {}
    by_entity: dict[tuple[str | None, str], list[Example]] = {}
    for example in examples:
        if example.entity is None:
            not_asked["no entity"] += 1
            continue
        by_entity.setdefault((example.entity_type, example.entity), []).append(example)
        for name, _ in _attributes(example):
            attribute = canonical(name, example.entity_type)
            if attribute in templates.get(type_key(example.entity_type), {}):
                asked_of_type.setdefault(type_key(example.entity_type), {})[attribute] = None
    result: list[Question] = []
    for (entity_type, _), of_entity in by_entity.items():
        first = of_entity[0]
        pairs = [p for example in of_entity for p in _attributes(example)]
        key = type_key(entity_type)
        of_type = templates.get(key, {})
        if pairs:
            truths: dict[str, tuple[str, ...]] = {}
            for name, value in pairs:
                attribute = canonical(name, entity_type)
                if attribute not in of_type:
                    not_asked[no_template(entity_type, attribute)] += 1
                elif accepted := truths_of(value, attribute):
                    truths[attribute] = tuple(dict.fromkeys(truths.get(attribute, ()) + accepted))
                else:
                    not_asked[f"{entity_type} {attribute} without a value"] += 1
            result += [_from_template(first, a, of_type[a], t) for a, t in truths.items()]
        elif key in asked_of_type:
            result += [_from_template(first, a, of_type[a], ()) for a in asked_of_type[key]]
        else:
            from_prompts = [_from_prompt(example) for example in of_entity]
            result += [question for question in from_prompts if question is not None]
            if n := from_prompts.count(None):
                not_asked["neither attributes nor a prompt"] += n
    return result, dict(not_asked)


def no_template(entity_type: str | None, attribute: str) -> str:
    """Why there is no question about an attribute, with the option that adds a template."""
    kind, name = type_key(entity_type), attribute.replace("_", " ")
    question = f"What is the {name} of the {kind.replace('_', ' ')} {{entity}}?"
    return (
        f"no template for {entity_type} {attribute}; to ask about it, type "
        f"\"task.templates.{kind}.{attribute}='{question}'\""
    )


def _attributes(example: Example) -> list[tuple[str, Any]]:
    value = example.extra.get("attributes")
    try:
        return read_attributes(value) if value else []
    except ValueError as error:
        raise DataError(f"example {example.id}: {error}") from error


def _from_template(
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


def _from_prompt(example: Example) -> Question | None:
    """The question of an example's prompt; None for an example without a prompt or an entity."""
    if example.prompt is None or example.entity is None:
        return None
    attribute = example.extra.get("attribute")
    return Question(
        entity=example.entity,
        entity_type=example.entity_type,
        attribute=None if attribute is None else str(attribute),
        text=example.prompt,
        beginning="",
        truths=example.answers,
        given_group=example.group,
    )


def repeats_question(question: Question) -> bool:
    """Whether the question contains all true answers, so that an answer may just repeat it."""
    asked = words(question.asked)
    return bool(question.truths) and all(runs_of(asked, words(t)) for t in question.truths)


def label_answer(
    answer: str, question: Question, rules: Rules, refuses: Callable[[str], bool]
) -> str:
    """One of `LABELS`: correct, refusal or error.

    Where the question contains the true answer, an answer that refuses is a refusal even if it
    mentions the true answer.
    """
    correct = is_correct(
        answer,
        question.truths,
        question.entity_type,
        question.attribute,
        rules,
        question=question.asked,
        entity=question.entity,
    )
    if correct and not (repeats_question(question) and refuses(answer)):
        return "correct"
    return "refusal" if refuses(answer) else "error"


def entity_groups(asked: pd.DataFrame, thresholds: Thresholds) -> pd.DataFrame:
    """One row per entity: `n_asked`, `n_known`, `group`, in order of appearance.

    `asked` has one row per question: `entity`, `entity_type`, `n_correct` (correct samples).
    """
    table = asked.assign(known=asked["n_correct"] >= thresholds.min_correct)
    grouped = table.groupby(["entity_type", "entity"], sort=False, dropna=False)
    entities = grouped["known"].agg(n_asked="size", n_known="sum").reset_index()
    entities["group"] = [
        thresholds.group(int(known), int(n))
        for known, n in zip(entities["n_known"], entities["n_asked"], strict=True)
    ]
    return entities


def choose_queries(queries: list[dict[str, Any]], seed: int) -> dict[EntityKey, dict[str, Any]]:
    """One of the queries of each entity, chosen independently of the answers."""
    by_entity: dict[EntityKey, list[dict[str, Any]]] = {}
    for query in queries:
        by_entity.setdefault((query["entity_type"], query["entity"]), []).append(query)
    return {key: some[pick(seed, *key, n=len(some))] for key, some in by_entity.items()}


def groups_of_queries(
    queries: list[dict[str, Any]], thresholds: Thresholds
) -> dict[EntityKey, str]:
    """The group of each entity, from the queries with sampled answers (`n_correct` not None)."""
    judged = [q for q in queries if q["n_correct"] is not None]
    if not judged:
        return {}
    # Several queries for the same attribute count as one attribute.
    asked = pd.DataFrame(judged)[["entity", "entity_type", "attribute", "n_correct"]]
    asked = asked.groupby(["entity_type", "entity", "attribute"], sort=False).max().reset_index()
    table = entity_groups(asked, thresholds)
    counts = Counter(table["group"])
    log.info(
        "%d entities by their labels: %s; %d of %d queries have no sampled answers",
        len(table),
        ", ".join(f"{n} {group}" for group, n in sorted(counts.items())),
        len(queries) - len(judged),
        len(queries),
    )
    keys = zip(table["entity_type"].map(str), table["entity"].map(str), strict=True)
    return dict(zip(keys, table["group"].map(str), strict=True))
