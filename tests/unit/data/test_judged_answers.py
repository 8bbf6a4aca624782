"""The judge against verdicts derived by hand; the first 116 before the judge was first run."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from saexp.config import DatasetConfig
from saexp.data import Example
from saexp.data.datasets import entities
from saexp.interventions.outcomes import Refusal
from saexp.labeling import TEMPLATES, Question, label_answer, questions
from saexp.labeling.matchers import Rules

OTHER = dict.fromkeys(("birth_year", "release_year", "year"), "1066")
OTHER |= dict.fromkeys(("duration", "population", "elevation"), "99999999")
FILE = Path(__file__).parent / "judged_answers.jsonl"
REFUSAL = Refusal()
SAMPLE = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


def asked(row: dict) -> Question:
    """The row's question: the template of its attribute, unless it has one of its own."""
    pair = (row["question"], "") if "question" in row else TEMPLATES[row["type"]][row["attribute"]]
    text, beginning = (part.replace("{entity}", row["entity"]) for part in pair)
    return Question(
        entity=row["entity"],
        entity_type=row["type"],
        attribute=row["attribute"],
        text=text,
        beginning=beginning if row.get("begun") else "",
        truths=tuple(row["truths"]),
        given_group=None,
    )


@pytest.mark.parametrize("row", SAMPLE, ids=[row["case"] for row in SAMPLE])
def test_the_judge_gives_the_verdict_derived_by_hand(row):
    assert verdict_of(row["answer"], asked(row)) == row["verdict"], row


def test_the_sample_is_large_and_holds_every_verdict():
    counts = Counter(row["verdict"] for row in SAMPLE)
    assert len(SAMPLE) >= 100
    assert counts["correct"] >= 40 and counts["error"] >= 40 and counts["refusal"] >= 4
    assert len({row["case"] for row in SAMPLE}) == len(SAMPLE)


@pytest.fixture(scope="module")
def shipped_questions() -> list[Question]:
    """Ten questions of each attribute about the shipped entities."""
    of_attribute: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in questions(entities(DatasetConfig(name="entities")).examples)[0]:
        if question.truths:
            of_attribute[question.entity_type, question.attribute].append(question)
    return [question for each in of_attribute.values() for question in each[:: len(each) // 9][:10]]


def verdict_of(answer: str, question: Question) -> str:
    entity_example = Example(id="", text="", entity=question.entity)
    return label_answer(
        answer, question, Rules(), lambda text: bool(REFUSAL.score(text, entity_example))
    )


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ("{truth}", True),
        ("{truth}.", True),
        ("I think it is {truth}.", True),
        ("{beginning} {truth}.", True),
        ("{question}", False),
        ("{question} Good question!", False),
        ("The {entity_type} {entity} is well known.", False),
        ('Let me tell you about "{entity}"; {entity} is a {entity_type}.', False),
        ("It is not {truth}.", False),
        ("{beginning} {truth} or Xyzzy.", False),
        ("{beginning} Xyzzy or {truth}.", False),
        ("Is it {truth}?", False),
        ("{beginning} {truth}. No, wait, it was Xyzzy.", False),
        ("{beginning} Xyzzy. No, wait, it was {truth}.", True),
    ],
)
def test_every_shipped_question_is_judged_alike_in_every_form_of_answer(
    shipped_questions: list[Question], form: str, right: bool
):
    """Stated answers are right; echoes, denials, alternatives, questions, retractions are not."""
    for question in shipped_questions:
        judged = replace(question, beginning="")
        for truth in question.truths:
            if question.attribute == "coordinates" and "{truth}" in form:
                continue
            answer = form.replace("Xyzzy", OTHER.get(question.attribute, "Xyzzy")).format(
                truth=truth,
                beginning=question.beginning,
                question=question.text,
                entity=question.entity,
                entity_type=question.entity_type,
            )
            assert (verdict_of(answer, judged) == "correct") is right, (answer, question)
