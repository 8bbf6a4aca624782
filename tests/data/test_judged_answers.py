"""The judge against verdicts that were derived by hand, before it was run."""

import json
from collections import Counter
from pathlib import Path

import pytest

from saexp.data.examples import Example
from saexp.data.labels import Question, label_answer
from saexp.data.matchers import Rules
from saexp.data.templates import TEMPLATES
from saexp.interventions.outcomes import Refusal

FILE = Path(__file__).parent / "judged_answers.jsonl"
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
    refusal, named = Refusal(), Example(id="", text="", entity=row["entity"])
    verdict = label_answer(
        row["answer"], asked(row), Rules(), lambda text: bool(refusal.score(text, named))
    )
    assert verdict == row["verdict"], row


def test_the_sample_is_large_and_holds_every_verdict():
    counts = Counter(row["verdict"] for row in SAMPLE)
    assert len(SAMPLE) >= 100
    assert counts["correct"] >= 40 and counts["error"] >= 40 and counts["refusal"] >= 4
    assert len({row["case"] for row in SAMPLE}) == len(SAMPLE)
