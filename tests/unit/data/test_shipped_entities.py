"""The shipped entities and background text: complete, matched between groups, consistent."""

import json
from collections import Counter
from itertools import product
from typing import Any

import pytest
from rapidfuzz import fuzz
from scipy.stats import mannwhitneyu

from saexp.config import DatasetConfig
from saexp.data.datasets import ASSETS, ENTITY_TYPES, background_texts, entities
from saexp.labeling import read_attributes, truths_of
from saexp.labeling.matchers import Rules

GROUPS = ("known", "unknown")
ASKED = {
    "player": {"Where": "birthplace", "In what year": "birth_year"},
    "movie": {"Who directed": "director", "In what year": "release_year", "Which actors": "cast"},
    "city": {"In which country": "country", "Which country": "country"},
    "song": {"Who performed": "performer", "In what year": "year", "On which album": "album"},
}
OTHER_NAMES = {
    "United States": {"USA", "America"},
    "United Arab Emirates": {"UAE"},
    "United Kingdom": {"UK", "Britain"},
    "Czech Republic": {"Czechia"},
    "Democratic Republic of the Congo": {"DRC", "DR Congo"},
    "Republic of the Congo": {"Congo-Brazzaville"},
}
SEVERAL = ("teams", "director", "screenwriter", "cast")


def _rows(entity_type: str) -> list[dict[str, Any]]:
    text = (ASSETS / "entities" / f"{entity_type}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _names(entity_type: str, group: str) -> list[str]:
    return [r["entity"] for r in _rows(entity_type) if r["group"] == group]


def _asked(entity_type: str, question: str) -> str:
    attributes = [a for start, a in ASKED[entity_type].items() if question.startswith(start)]
    assert len(attributes) == 1, question
    return attributes[0]


def _answers_it(answer: str, fact: Any) -> bool:
    """Whether an accepted answer says what the attribute says, or a part of it."""
    if isinstance(fact, list):
        return answer in fact
    if isinstance(fact, int):
        return answer == str(fact)
    return answer in fact or answer in OTHER_NAMES.get(fact, ())


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_groups_are_large_and_of_equal_size(entity_type: str) -> None:
    sizes = Counter(r["group"] for r in _rows(entity_type))
    assert set(sizes) == set(GROUPS)
    assert min(sizes.values()) >= 120
    assert len(set(sizes.values())) == 1
    assert {r["entity_type"] for r in _rows(entity_type)} == {entity_type}


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_names_are_as_long_in_both_groups(entity_type: str) -> None:
    known, unknown = (_names(entity_type, g) for g in GROUPS)
    assert Counter(len(n.split()) for n in known) == Counter(len(n.split()) for n in unknown)
    characters = [[len(n) for n in names] for names in (known, unknown)]
    assert mannwhitneyu(*characters).pvalue > 0.05
    means = [sum(lengths) / len(lengths) for lengths in characters]
    assert means[0] == pytest.approx(means[1], rel=0.05)


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_names_have_as_many_tokens_in_both_groups(entity_type: str) -> None:
    counts = json.loads((ASSETS / "entities" / "token_counts.json").read_text("utf-8"))
    of_name = {name: tuple(pair) for name, pair in counts[entity_type].items()}
    known, unknown = (_names(entity_type, g) for g in GROUPS)
    assert set(of_name) == {*known, *unknown}
    assert Counter(map(of_name.get, known)) == Counter(map(of_name.get, unknown))
    for one, other in zip(known, unknown, strict=True):
        assert of_name[one] == of_name[other], "partners stand after one another"


def test_names_are_unique_and_no_unknown_one_is_like_a_known_one() -> None:
    known = [n.casefold() for t in ENTITY_TYPES for n in _names(t, "known")]
    unknown = [n.casefold() for t in ENTITY_TYPES for n in _names(t, "unknown")]
    assert [n for n, count in Counter(known + unknown).items() if count > 1] == []
    assert [(u, k) for u, k in product(unknown, known) if k in u or u in k] == []
    for entity_type in ENTITY_TYPES:
        pairs = product(_names(entity_type, "unknown"), _names(entity_type, "known"))
        alike = [(u, k) for u, k in pairs if fuzz.ratio(u.casefold(), k.casefold()) >= 80]
        assert alike == []


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_question_forms_do_not_tell_the_group(entity_type: str) -> None:
    forms = {
        g: Counter(r["question"] for r in _rows(entity_type) if r["group"] == g) for g in GROUPS
    }
    assert forms["known"] == forms["unknown"]
    assert len(forms["known"]) in (2, 3)


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_every_question_formats_to_one_with_the_name(entity_type: str) -> None:
    for row in _rows(entity_type):
        name = row["entity"]
        assert name == " ".join(name.split())
        question = row["question"].format(entity=name, entity_type=entity_type)
        assert question.count(name) == 1
        assert "{" not in question
        assert question.endswith("?")


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_answers_agree_with_the_attributes(entity_type: str) -> None:
    for row in _rows(entity_type):
        attributes = dict(read_attributes(row["attributes"]))
        assert len(attributes) == len(row["attributes"])
        assert row["attribute"] == _asked(entity_type, row["question"])
        if row["group"] == "unknown":
            assert row["answer"] == [] and attributes == {}
            continue
        assert set(attributes) <= set(Rules().by_type[entity_type])
        fact = attributes[row["attribute"]]
        assert row["answer"]
        for answer in row["answer"]:
            assert answer.strip() == answer != ""
            assert _answers_it(answer, fact), (row["entity"], answer, fact)
        assert row["entity"].casefold() not in [a.casefold() for a in row["answer"]]


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_every_attribute_gives_accepted_answers(entity_type: str) -> None:
    n_attributes = []
    for row in _rows(entity_type):
        pairs = read_attributes(row["attributes"])
        n_attributes += [len(pairs)] if row["group"] == "known" else []
        for name, value in pairs:
            assert isinstance(value, list) == (name in (*SEVERAL, "coordinates")), row["entity"]
            assert truths_of(value, name)
    assert min(n_attributes) >= 2


def test_attributes_have_plausible_values() -> None:
    facts: dict[str, list[Any]] = {}
    for entity_type in ENTITY_TYPES:
        for row in _rows(entity_type):
            for name, value in read_attributes(row["attributes"]):
                facts.setdefault(name, []).append(value)
    for latitude, longitude in facts["coordinates"]:
        assert -90 <= latitude <= 90
        assert -180 <= longitude <= 180
    years = facts["birth_year"] + facts["release_year"] + facts["year"]
    assert all(isinstance(y, int) and 1850 < y < 2025 for y in years)
    assert all(60 <= m <= 260 for m in facts["duration"])
    assert all(-500 < m < 5200 for m in facts["elevation"])
    assert all(50_000 < n < 40_000_000 for n in facts["population"])


def test_entities_dataset_holds_every_row() -> None:
    examples = entities(DatasetConfig(name="entities")).examples
    assert len(examples) == sum(len(_rows(t)) for t in ENTITY_TYPES)
    for example in examples:
        assert example.prompt is not None
        assert example.entity is not None
        assert example.entity in example.prompt
        assert bool(example.answers) == (example.group == "known")
        assert bool(example.extra["attributes"]) == (example.group == "known")
        assert example.extra["attribute"] in Rules().by_type[str(example.entity_type)]


def test_a_custom_prompt_asks_for_no_attribute() -> None:
    cfg = DatasetConfig(name="entities", prompt_template="Do you know {entity}?")
    assert all("attribute" not in e.extra for e in entities(cfg).examples)


def test_background_is_long_enough_and_names_no_entity() -> None:
    lines = (ASSETS / "background.txt").read_text("utf-8").splitlines()
    assert all(line.strip() for line in lines)
    assert len(set(lines)) == len(lines)
    assert sum(len(line.split()) for line in lines) >= 4000
    assert background_texts(DatasetConfig(name="entities")) == lines
    names = [n for t in ENTITY_TYPES for g in GROUPS for n in _names(t, g)]
    assert [n for n in names if any(n in line for line in lines)] == []
