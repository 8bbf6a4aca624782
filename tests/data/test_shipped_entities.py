"""The shipped entities and background text: complete, matched between groups, consistent."""

import json
from collections import Counter
from typing import Any

import pytest

from saexp.config import DatasetConfig
from saexp.data.datasets import ASSETS, ENTITY_TYPES, background_texts, entities

GROUPS = ("known", "unknown")
ASKED = {
    "player": {"Where": "birthplace", "In what year": "birth_year"},
    "movie": {"Who directed": "director", "In what year": "release_year", "Which actors": "cast"},
    "city": {"In which country": "country", "Which country": "country"},
    "song": {"Who performed": "performer", "In what year": "year", "On which album": "album"},
}
ALLOWED = {
    "player": {"birthplace", "birth_year", "teams", "sport"},
    "movie": {"director", "screenwriter", "cast", "genre", "release_year", "duration_minutes"},
    "city": {"country", "population", "elevation_m", "coordinates"},
    "song": {"performer", "album", "year", "genre"},
}
OTHER_NAMES = {"United States": {"USA", "America"}, "United Arab Emirates": {"UAE"}}


def _rows(entity_type: str) -> list[dict[str, Any]]:
    text = (ASSETS / "entities" / f"{entity_type}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _names(entity_type: str, group: str) -> list[str]:
    return [r["entity"] for r in _rows(entity_type) if r["group"] == group]


def _asked(entity_type: str, question: str) -> str:
    found = [a for start, a in ASKED[entity_type].items() if question.startswith(start)]
    assert len(found) == 1, question
    return found[0]


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
    assert min(sizes.values()) >= 30
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_names_have_equal_lengths_in_both_groups(entity_type: str) -> None:
    known, unknown = (_names(entity_type, g) for g in GROUPS)
    assert Counter(len(n.split()) for n in known) == Counter(len(n.split()) for n in unknown)
    characters = [sum(map(len, names)) / len(names) for names in (known, unknown)]
    assert characters[0] == pytest.approx(characters[1], rel=0.05)


def test_names_are_unique_and_no_unknown_one_holds_a_known_one() -> None:
    known = [n.casefold() for t in ENTITY_TYPES for n in _names(t, "known")]
    unknown = [n.casefold() for t in ENTITY_TYPES for n in _names(t, "unknown")]
    assert [n for n, count in Counter(known + unknown).items() if count > 1] == []
    assert [(u, k) for u in unknown for k in known if k in u] == []


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
        if row["group"] == "unknown":
            assert not row.get("answer")
            assert not row.get("attributes")
            continue
        attributes = row["attributes"]
        assert set(attributes) <= ALLOWED[entity_type]
        fact = attributes[_asked(entity_type, row["question"])]
        assert row["answer"]
        for answer in row["answer"]:
            assert answer.strip() == answer != ""
            assert _answers_it(answer, fact), (row["entity"], answer, fact)


def test_attributes_have_plausible_values() -> None:
    for row in _rows("city"):
        latitude, longitude = row.get("attributes", {}).get("coordinates", (0, 0))
        assert -90 <= latitude <= 90
        assert -180 <= longitude <= 180
    years = [
        row["attributes"][key]
        for entity_type, key in (("player", "birth_year"), ("movie", "release_year"))
        for row in _rows(entity_type)
        if row["group"] == "known"
    ]
    years += [r["attributes"]["year"] for r in _rows("song") if "year" in r.get("attributes", {})]
    assert all(isinstance(y, int) and 1850 < y < 2025 for y in years)


def test_entities_dataset_holds_every_row() -> None:
    examples = entities(DatasetConfig(name="entities")).examples
    assert len(examples) == sum(len(_rows(t)) for t in ENTITY_TYPES)
    for example in examples:
        assert example.prompt is not None
        assert example.entity is not None
        assert example.entity in example.prompt
        assert bool(example.answers) == (example.group == "known")


def test_background_is_long_enough_and_names_no_entity() -> None:
    lines = (ASSETS / "background.txt").read_text("utf-8").splitlines()
    assert all(line.strip() for line in lines)
    assert len(set(lines)) == len(lines)
    assert sum(len(line.split()) for line in lines) >= 4000
    assert background_texts(DatasetConfig(name="entities")) == lines
    names = [n for t in ENTITY_TYPES for g in GROUPS for n in _names(t, g)]
    assert [n for n in names if any(n in line for line in lines)] == []
