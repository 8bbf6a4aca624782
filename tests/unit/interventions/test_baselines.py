"""What the model does without intervention: its knowledge, and outcomes that cannot vary."""

from types import SimpleNamespace

import pandas as pd

from saexp.data import Example
from saexp.interventions.measure import constant_note, constant_rates, fitting, knowledge

TABLE = pd.DataFrame(
    {
        "example_id": ["a", "b", "c", "d", "e", "f"],
        "group": ["known", "known", "known", "unknown", "unknown", "unknown"],
        "split": ["train", "test", "test", "train", "test", "test"],
        "generated_text": ["Paris.", "It is Rome.", "London", "I do not know.", "Oslo", "Bern"],
        "refusal": pd.array([False, False, True, False, True, True], dtype="boolean"),
        "score": [1.0, 2.0, 3.0, None, None, None],
    }
)
EXAMPLES = {
    name: Example(id=name, text="?", answers=answers)
    for name, answers in {
        "a": ("Paris",),
        "b": ("Rome",),
        "c": ("Madrid",),
        "d": ("I do not know.",),
        "e": ("Oslo",),
        "f": (),
    }.items()
}


def test_knowledge_is_the_number_of_questions_answered_correctly_in_each_group() -> None:
    correct, metrics = knowledge(TABLE, EXAMPLES)
    # A refusal in the data is no answer to know, and a prompt without an answer is no question.
    assert correct.tolist() == [True, True, False, pd.NA, True, pd.NA]
    assert metrics == {
        "baseline/n_questions_known": 3,
        "baseline/n_correct_known": 2,
        "baseline/accuracy_known": 2 / 3,
        "baseline/n_questions_unknown": 1,
        "baseline/n_correct_unknown": 1,
        "baseline/accuracy_unknown": 1.0,
    }
    without = {name: Example(id=name, text="?") for name in EXAMPLES}
    assert knowledge(TABLE, without)[1] == {}


def test_a_rate_is_constant_where_it_is_equal_on_the_train_prompts_of_both_groups() -> None:
    assert constant_rates(TABLE, ["refusal"]) == {"refusal": 0}
    # Without train prompts all prompts count, on which this rate differs.
    assert constant_rates(TABLE[TABLE["split"] == "test"], ["refusal"]) == {}
    # Prompts of one group do not show what a model never does.
    assert constant_rates(TABLE[TABLE["group"] == "known"], ["refusal"]) == {}
    other = TABLE.assign(refusal=[False, False, False, True, True, True])
    assert constant_rates(other, ["refusal"]) == {}


def test_alternatives_fit_where_they_have_values_and_vary() -> None:
    rate, score, absent = (
        SimpleNamespace(name=name, kind=kind)
        for name, kind in (("refusal", "rate"), ("score", "mean"), ("neutral_kl", "mean"))
    )
    assert fitting(TABLE, [rate, score, absent]) == [score]
    assert fitting(TABLE.assign(score=None), [score]) == []


def test_the_note_says_what_is_left_out_and_what_is_measured_instead() -> None:
    instead = constant_note({"refusal": 0}, ["dont_know"], TABLE, ["effect/refusal/known_group"])
    assert instead == (
        "without intervention refusal is 0 on all prompts (1 known and 1 unknown), so it is not "
        "tested: dont_know took its place; effect/refusal/known_group: null "
        "(intervention.alternatives=[...] sets other outcomes for this case, null tests every "
        "outcome)"
    )
    nothing = constant_note({"refusal": 0}, [], TABLE, ["effect/refusal/known_group"])
    assert "no outcome is left, and nothing was changed" in nothing
