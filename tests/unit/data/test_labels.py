"""Questions made of attributes, judged answers, and the groups that follow."""

import re

import pandas as pd
import pytest

from saexp.config import DatasetConfig
from saexp.data import Example
from saexp.data.datasets import ENTITY_TYPES, entities
from saexp.errors import ConfigError, DataError
from saexp.labeling import (
    TEMPLATES,
    Question,
    Thresholds,
    entity_groups,
    label_answer,
    pick,
    questions,
    read_attributes,
    truths_of,
)
from saexp.labeling.matchers import Rules


def example(entity="Pulp Fiction", kind="movie", attributes=None, **more) -> Example:
    extra = {} if attributes is None else {"attributes": attributes}
    extra |= more.pop("extra", {})
    return Example(
        id=f"{entity}{len(more)}",
        text=f"The {kind} {entity}",
        entity=entity,
        entity_type=kind,
        extra=extra,
        **more,
    )


def question(*truths: str, entity="Pulp Fiction", kind="movie", attribute="director") -> Question:
    return Question(entity, kind, attribute, "", "", truths, None)


def refuses(text: str) -> bool:
    return "know" in text


def test_every_rule_has_a_template_with_the_entity_in_it_and_the_other_way_round():
    assert set(TEMPLATES) == set(ENTITY_TYPES)
    for kind, attributes in TEMPLATES.items():
        assert set(attributes) == set(Rules().by_type[kind]) - {"sport"}
        for pair in attributes.values():
            assert all(t.count("{entity}") == 1 and kind in t for t in pair)
            assert pair[0][-1] in "?." and pair[1][-1] not in "?. "


@pytest.mark.parametrize(
    ("value", "attribute", "truths"),
    [
        ("Rosario, Argentina", "birthplace", ("Rosario, Argentina", "Rosario")),
        (["Ajax", "AC Milan", "Ajax"], "teams", ("Ajax", "AC Milan")),
        (1994, "release_year", ("1994",)),
        (154.0, "duration", ("154",)),
        (154.5, "duration", ("154.5",)),
        ([34.05, -118.24], "coordinates", ("34.05, -118.24",)),
        ({"longitude": 8, "latitude": 12}, "location", ("12, 8",)),
        ("Point(8 12)", "location", ("Point(8 12)",)),
        ([1.0], "coordinates", ()),
        (None, "album", ()),
        ("", "album", ()),
        ([None, "x"], "album", ("x",)),
    ],
)
def test_accepted_answers_of_a_value(value, attribute, truths):
    assert truths_of(value, attribute) == truths


def test_attributes_as_they_are_published_or_as_a_mapping():
    listed = [{"attribute_type": "directors", "attribute_value": "Quentin Tarantino"}]
    assert read_attributes(listed) == [("directors", "Quentin Tarantino")]
    assert read_attributes({"year": 1994}) == [("year", 1994)]
    for wrong in ("x", 3, [{"attribute_type": "x"}], ["x"]):
        with pytest.raises(ValueError, match="attribute_value"):
            read_attributes(wrong)


def test_attributes_in_another_form_are_one_line():
    with pytest.raises(DataError, match="example 1: 'attributes' must be a list"):
        questions([Example(id="1", text="x", entity="x", extra={"attributes": "{'a': 1}"})])


def test_each_entity_is_asked_once_and_what_is_not_asked_is_counted():
    asked, not_asked = questions(
        [
            example(attributes={"directors": "Quentin Tarantino", "budget": 8, "genres": ""}),
            example(attributes={"directors": ["Q. T."], "cast": ["Uma Thurman"]}, group="known"),
            Example(id="9", text="no entity"),
        ]
    )
    assert [(q.attribute, q.truths) for q in asked] == [
        ("director", ("Quentin Tarantino", "Q. T.")),
        ("cast", ("Uma Thurman",)),
    ]
    assert asked[0].text == "Who directed the movie Pulp Fiction?"
    assert asked[0].beginning == "The movie Pulp Fiction was directed by"
    reason = (
        "no template for movie budget; to ask about it, type "
        "\"task.templates.movie.budget='What is the budget of the movie {entity}?'\""
    )
    assert not_asked == {"no entity": 1, reason: 1, "movie genre without a value": 1}


def test_invented_names_are_asked_what_others_of_their_type_are():
    asked, not_asked = questions(
        [
            example(attributes={"director": "Quentin Tarantino", "cast": ["Uma Thurman"]}),
            example("Salt Verdict", group="unknown", prompt="Who directed Salt Verdict?"),
        ]
    )
    invented = [q for q in asked if q.entity == "Salt Verdict"]
    assert [q.attribute for q in invented] == ["director", "cast"]
    assert all(q.truths == () and q.given_group == "unknown" for q in invented)
    assert not_asked == {}


def test_without_attributes_the_own_prompts_are_asked():
    asked, not_asked = questions(
        [
            example(prompt="Who directed it?", answers=("Q. T.",), extra={"attribute": "director"}),
            example("Salt Verdict"),
        ]
    )
    assert [(q.text, q.truths, q.attribute, q.beginning) for q in asked] == [
        ("Who directed it?", ("Q. T.",), "director", "")
    ]
    assert not_asked == {"neither attributes nor a prompt": 1}


def test_the_shipped_entities_can_all_be_asked():
    examples = entities(DatasetConfig(name="entities")).examples
    asked, not_asked = questions(examples)
    assert {q.entity for q in asked} == {e.entity for e in examples}
    assert [r.partition(";")[0] for r in not_asked] == ["no template for player sport"]
    for one in asked:
        assert "{" not in one.text + one.beginning
        assert one.text.count(one.entity) == 1
        assert bool(one.truths) == (one.given_group == "known")
    forms = {
        group: {(q.entity_type, q.attribute) for q in asked if q.given_group == group}
        for group in ("known", "unknown")
    }
    assert forms["known"] == forms["unknown"]
    rules = Rules()
    for one in asked[::5]:
        for truth in one.truths:
            answer = f"The answer is {truth}."
            assert label_answer(answer, one, rules, refuses) == "correct", one


@pytest.mark.parametrize(
    ("answer", "truths", "entity", "attribute", "label"),
    [
        ("Quentin Tarantino", ("Quentin Tarantino",), "Pulp Fiction", "director", "correct"),
        ("Steven Spielberg", ("Quentin Tarantino",), "Pulp Fiction", "director", "error"),
        ("I do not know", ("Quentin Tarantino",), "Pulp Fiction", "director", "refusal"),
        (
            "I know it, Quentin Tarantino",
            ("Quentin Tarantino",),
            "Pulp Fiction",
            "director",
            "correct",
        ),
        ("Steven Spielberg", (), "Salt Verdict", "director", "error"),
        ("I do not know", (), "Salt Verdict", "director", "refusal"),
        (
            "I do not know Purple Rain",
            ("Purple Rain",),
            "Purple Rain",
            "album",
            "refusal",
        ),
        ("Purple Rain", ("Purple Rain",), "Purple Rain", "album", "correct"),
    ],
)
def test_answers_are_right_refused_or_wrong(answer, truths, entity, attribute, label):
    kind = "song" if attribute == "album" else "movie"
    one = question(*truths, entity=entity, kind=kind, attribute=attribute)
    assert label_answer(answer, one, Rules(), refuses) == label


@pytest.mark.parametrize(
    ("n_correct", "group"),
    [
        ((3, 10, 0), "known"),
        ((3, 3), "known"),
        ((2, 2, 2), "unknown"),
        ((0,), "unknown"),
        ((3, 2, 0), "dropped"),
        ((3,), "known"),
    ],
)
def test_groups_follow_the_rule(n_correct, group):
    rows = [{"entity_type": "city", "entity": "Linz", "n_correct": n} for n in n_correct]
    table = entity_groups(pd.DataFrame(rows), Thresholds())
    assert table.to_dict("records") == [
        {
            "entity_type": "city",
            "entity": "Linz",
            "n_asked": len(n_correct),
            "n_known": sum(n >= 3 for n in n_correct),
            "group": group,
        }
    ]


def test_custom_thresholds_are_applied():
    asked = pd.DataFrame(
        {"entity_type": [None] * 4, "entity": list("aaab"), "n_correct": [1, 1, 0, 0]}
    )
    of = {
        name: entity_groups(asked, Thresholds(*limits))["group"].tolist()
        for name, limits in {"loose": (1, 2, 0), "strict": (1, 3, 0), "one": (1, 3, 2)}.items()
    }
    assert of == {
        "loose": ["known", "unknown"],
        "strict": ["dropped", "unknown"],
        "one": ["unknown", "unknown"],
    }
    for wrong in ((0, 2, 0), (3, 2, 2), (3, 2, -1)):
        with pytest.raises(ConfigError, match="type min_correct >= 1"):
            Thresholds(*wrong)


def test_a_choice_depends_on_its_names_only():
    many = [pick(0, "city", f"city {i}", n=4) for i in range(400)]
    assert many == [pick(0, "city", f"city {i}", n=4) for i in range(400)]
    assert many != [pick(1, "city", f"city {i}", n=4) for i in range(400)]
    assert all(70 < many.count(k) < 130 for k in range(4))


def test_templates_hold_no_answer():
    for kinds in TEMPLATES.values():
        for pair in kinds.values():
            assert not re.search(r"\d", "".join(pair))
