"""What counts as a refusal, and what only looks like one."""

import pytest

from saexp.data import Example
from saexp.interventions.outcomes import PATTERNS, Refusal, read_patterns

REFUSALS = (
    " I do not know.",
    "I don't know who that is.",
    "I don\u2019t actually know the answer.",
    "I'm not familiar with that song.",
    "I am not sure who directed it.",
    "Sorry, I have no information about this player.",
    "I couldn't find any record of a city by that name.",
    "As an AI, I don't have access to information about this movie.",
    "I have never heard of it.",
    "There is no reliable information about this person.",
    "It does not appear to be a real movie.",
    "Could you provide more context?",
    "I'm unable to verify that.",
    "I can't find a movie with that title.",
    "I DO NOT KNOW",
)
ANSWERS = (
    " Rovers.",
    "Paris, France.",
    "Unknown Pleasures was released in 1979.",
    "The movie The Unknown was directed by Tod Browning.",
    "You don't know me is a song by Ray Charles.",
    "He was born in Nowhere, Oklahoma.",
    "It tells of a man who does not know his own name.",
    "The city has no river.",
    "I Know What You Did Last Summer was directed by Jim Gillespie.",
    "Certainly! He plays for Chicago.",
    "",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text: str) -> None:
    assert Refusal().score(text, Example(id="1", text="x"))


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_not(text: str) -> None:
    assert not Refusal().score(text, Example(id="1", text="x"))


def test_a_title_that_reads_as_a_refusal_is_taken_out_first() -> None:
    about = Example(id="1", text="The song I Don't Know", entity="I Don't Know")
    assert not Refusal().score("I Don't Know is by Ozzy Osbourne.", about)
    assert Refusal().score("I Don't Know: I don't know.", about)


def test_a_title_is_taken_out_as_a_word_and_in_either_apostrophe() -> None:
    short = Example(id="1", text="The song now", entity="now")
    assert Refusal().score("I don't know.", short)
    curly = Example(id="1", text="The song I Don\u2019t Know", entity="I Don\u2019t Know")
    assert not Refusal().score("I Don\u2019t Know is by Ozzy Osbourne.", curly)


def test_every_line_of_the_pattern_file_is_used() -> None:
    lines = [x for x in PATTERNS.read_text("utf-8").splitlines() if x and x[0] != "#"]
    assert len(read_patterns()) == len(lines) > 15
