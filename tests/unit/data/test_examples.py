"""Splits by entity, seeded choices, the two groups, and prompts."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.data import Example, ExampleSet, assign_splits, infer_groups, subsample
from saexp.errors import DataError

SHARES = {"train": 0.5, "val": 0.1, "test": 0.4}


def many(n_entities=40, per_entity=3, **fields):
    return [
        Example(
            id=f"{group}-{e}-{i}",
            text="t",
            entity=f"{group} entity {e}",
            entity_type=("player", "city")[e % 2],
            group=group,
            **fields,
        )
        for group in ("known", "unknown")
        for e in range(n_entities)
        for i in range(per_entity)
    ]


ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b", "c", "d", "e"]),
        st.sampled_from([None, "player", "city"]),
        st.sampled_from(["known", "unknown"]),
    ),
    max_size=30,
)


@settings(max_examples=50)
@given(ROWS, st.integers(0, 5))
def test_all_examples_of_an_entity_share_a_split(rows, seed):
    examples = [
        Example(id=str(n), text="t", entity=entity, entity_type=entity_type, group=group)
        for n, (entity, entity_type, group) in enumerate(rows)
    ]
    assigned = assign_splits(examples, SHARES, seed)
    assert [e.id for e in assigned] == [e.id for e in examples]
    assert all(e.split in SHARES for e in assigned)
    assert len({(e.unit, e.split) for e in assigned}) == len({e.unit for e in assigned})


def test_splits_are_seeded_and_do_not_depend_on_the_order_of_the_file():
    examples = many()
    one, again = (assign_splits(examples, SHARES, 0) for _ in range(2))
    assert one == again
    backwards = assign_splits(examples[::-1], SHARES, 0)
    assert {e.id: e.split for e in backwards} == {e.id: e.split for e in one}
    other = {e.id: e.split for e in assign_splits(examples, SHARES, 1)}
    assert other != {e.id: e.split for e in one}


def test_shares_hold_in_every_group_and_type():
    assigned = assign_splits(many(), SHARES, 0)
    for group in ("known", "unknown"):
        for entity_type in ("player", "city"):
            units = {
                e.unit: e.split
                for e in assigned
                if (e.group, e.entity_type) == (group, entity_type)
            }
            assert Counter(units.values()) == {"train": 10, "val": 2, "test": 8}


def test_a_share_of_0_takes_nothing_and_one_of_1_everything():
    assigned = assign_splits(many(), {"train": 0.0, "val": 0.0, "test": 1.0}, 0)
    assert {e.split for e in assigned} == {"test"}


def test_given_splits_stay_and_draw_the_entitys_other_examples():
    examples = [
        Example(id="1", text="t", entity="a", split="test"),
        *[Example(id=str(n), text="t", entity="a") for n in range(2, 9)],
        Example(id="9", text="t", entity="b", split="val"),
    ]
    assigned = assign_splits(examples, SHARES, 0)
    assert [e.split for e in assigned] == ["test"] * 8 + ["val"]


def test_examples_without_an_entity_are_units_of_their_own():
    examples = [Example(id=str(n), text="the same") for n in range(20)]
    assert Counter(e.split for e in assign_splits(examples, SHARES, 0)) == {
        "train": 10,
        "val": 2,
        "test": 8,
    }


def test_entities_of_one_name_and_two_types_are_two():
    city, song = (Example(id=t, text="t", entity="Paris", entity_type=t) for t in ("city", "song"))
    assert city.unit != song.unit


def test_choose_takes_n_of_each_group_and_type_in_order():
    examples = many()
    some = subsample(examples, 5, 0)
    assert set(Counter((e.group, e.entity_type) for e in some).values()) == {5}
    assert [e.id for e in some] == [e.id for e in examples if e in some]
    assert some == subsample(examples, 5, 0)
    assert some != subsample(examples, 5, 1)


def test_choose_takes_all_where_there_are_fewer_or_no_limit():
    examples = many(2, 1)
    assert subsample(examples, 99, 0) == examples
    assert subsample(examples, None, 0) is examples


def of_groups(*groups):
    return [Example(id=str(n), text="t", group=g) for n, g in enumerate(groups)]


def test_groups_are_in_order_of_appearance_or_as_asked():
    assert infer_groups(of_groups("b", "a", "b"), None, "f") == ("b", "a")
    assert infer_groups(of_groups("b", "a", "c"), ["c", "b"], "f") == ("c", "b")
    assert infer_groups(of_groups(None, None), None, "f") == ()


@pytest.mark.parametrize(
    ("groups", "wanted", "message"),
    [
        (
            ("a", "a"),
            None,
            "f.csv: all rows are of one group, a (2); a contrast needs two",
        ),
        (
            ("a", None, None, "a"),
            None,
            "f.csv: all rows are of one group, a (2), and 2 rows without a group; "
            "a contrast needs two",
        ),
        (
            ("a", "b", "c", "a"),
            None,
            "f.csv: 3 groups, a (2), b (1), c (1); choose two with 'dataset.groups=[first,second]'",
        ),
        (
            ("a", "b"),
            ["a", "x"],
            "f.csv: no rows of group 'x'; the groups are a (1), b (1)",
        ),
        (
            ("a", "b"),
            ["a"],
            "dataset.groups=['a'] must be two of the groups a (1), b (1)",
        ),
        (
            ("a", "b"),
            ["a", "a"],
            "dataset.groups=['a', 'a'] must be two of the groups a (1), b (1)",
        ),
        (
            (None, None),
            ["a", "b"],
            "f.csv: no row has a group; add a column 'group' or type dataset.group_rule=",
        ),
    ],
)
def test_groups_that_cannot_be_contrasted(groups, wanted, message):
    with pytest.raises(DataError) as error:
        infer_groups(of_groups(*groups), wanted, "f.csv")
    assert str(error.value) == message


def test_a_prompt_becomes_the_text_with_the_entitys_mentions():
    one = Example(id="1", text="Bo is here", spans=((0, 2),), entity="Bo", prompt="Is Bo Bo?")
    prompt = one.as_prompt()
    assert (prompt.text, prompt.spans) == ("Is Bo Bo?", ((3, 5), (6, 8)))
    assert (prompt.id, prompt.unit, prompt.entity) == (one.id, one.unit, "Bo")


@pytest.mark.parametrize(
    ("prompt", "mentions"),
    [
        ("Does the art in Arthur's Art differ?", ["Art differ"]),
        ("Arthur's", ["Arthur"]),
        ("Who is Art? Art, of course", ["Art? ", "Art, "]),
    ],
)
def test_mentions_in_a_prompt_are_whole_words_where_there_are_any(prompt, mentions):
    one = Example(id="1", text="Art", spans=((0, 3),), entity="Art", prompt=prompt).as_prompt()
    assert len(one.spans) == len(mentions)
    for (start, end), rest in zip(one.spans, mentions, strict=True):
        assert prompt[start:end] == "Art"
        assert prompt[start:].startswith(rest)


def test_an_entity_is_one_unit_in_either_normalisation():
    composed, split = (
        Example(id=form, text="t", entity=unicodedata.normalize(form, "Zoë"))
        for form in ("NFC", "NFD")
    )
    assert composed.entity != split.entity
    assert composed.unit == split.unit


def test_a_prompt_without_the_entity_has_no_span():
    one = Example(id="1", text="Bo is here", spans=((0, 2),), entity="Bo", prompt="Who?")
    assert one.as_prompt().spans == ()
    assert Example(id="1", text="t", spans=((0, 1),), prompt="Who?").as_prompt().spans == ()


@pytest.mark.parametrize("prompt", [None, "Bo is here"])
def test_without_a_prompt_of_its_own_an_example_is_its_prompt(prompt):
    one = Example(id="1", text="Bo is here", spans=((0, 2),), prompt=prompt)
    assert one.as_prompt() is one


def test_a_set_has_the_length_of_its_examples():
    assert len(ExampleSet(name="x", examples=of_groups("a", "b", "c"))) == 3
