"""The first token of an answer: against the tokenizer itself, and by what stands in real texts."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from saexp import registry
from saexp.analysis.capability import questions
from saexp.config import DatasetConfig, InterventionConfig
from saexp.data import Example
from saexp.data.tokenization import PositionNotFound, answer_text, answer_token, foil_of, space_note
from saexp.errors import ConfigError
from saexp.interventions.conditions import position_prompts
from saexp.interventions.outcomes import AnswerLogit, AnswerRank, LogitDifference
from tests.chat_tokenizers import base_tokenizers, chat_tokenizers, with_tokenizer
from tests.random_models import random_lm, tokenizer

BASE = pytest.mark.parametrize("of", list(base_tokenizers()))
# (prompt, answer as data files give it, the text as a person would write it)
WRITTEN = [
    ("The capital of France is", "Paris", "The capital of France is Paris"),
    ("The capital of France is", " Paris", "The capital of France is Paris"),
    ("The capital of France is ", "Paris", "The capital of France is Paris"),
    ('He said "', "Yes", 'He said "Yes'),
    ("He said \u201c", "Yes", "He said \u201cYes"),
    ("She lives (in", "Oslo", "She lives (in Oslo"),
    ("The band (", "1987", "The band (1987"),
    ("19", "87", "1987"),
    ("In the year 19", "87", "In the year 1987"),
    ("He was born in", "1987", "He was born in 1987"),
    ("Tom has 5", "apples", "Tom has 5 apples"),
    ("Question: Who?\nAnswer:", "Laura", "Question: Who?\nAnswer: Laura"),
    ("Question: Who?\nAnswer:\n", "Laura", "Question: Who?\nAnswer:\nLaura"),
    ("Paris, London,", "Rome", "Paris, London, Rome"),
    ("The price is $", "12", "The price is $12"),
    (
        "\u4e2d\u56fd\u306e\u9996\u90fd\u306f",
        "\u6771\u4eac",
        "\u4e2d\u56fd\u306e\u9996\u90fd\u306f\u6771\u4eac",
    ),
    ("\u7b54\u3048\u306f", "Paris", "\u7b54\u3048\u306fParis"),
    (
        "\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294",
        "\uc11c\uc6b8",
        "\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294 \uc11c\uc6b8",
    ),
    (
        "\u0421\u0442\u043e\u043b\u0438\u0446\u0430",
        "\u041c\u043e\u0441\u043a\u0432\u0430",
        "\u0421\u0442\u043e\u043b\u0438\u0446\u0430 \u041c\u043e\u0441\u043a\u0432\u0430",
    ),
    # A decomposed letter ends in a combining mark.
    ("The best cafe\u0301", "Paris", "The best cafe\u0301 Paris"),
    ("It is well-", "known", "It is well-known"),
    ("It", "'s", "It's"),
]


@pytest.mark.parametrize(("prompt", "answer", "written"), WRITTEN)
def test_a_space_is_added_where_one_belongs(prompt: str, answer: str, written: str) -> None:
    example = Example(id="1", text=prompt, answers=(answer,))
    assert prompt + answer_text(example, answer) == written
    assert len(space_note([example])) == (written != prompt + answer)
    assert answer_text(replace(example, answer_space="never"), answer) == answer
    always = answer_text(replace(example, answer_space="always"), answer)
    spaced = answer[0].isspace() or prompt[-1].isspace()
    assert always == (answer if spaced else f" {answer}")
    # In chat it begins the model's turn.
    assert answer_text(replace(example, answer_space="strip"), answer) == answer.lstrip()


@BASE
@pytest.mark.parametrize(("prompt", "answer", "written"), WRITTEN)
def test_the_token_is_the_one_that_follows_the_prompt_s_own(
    of: str, prompt: str, answer: str, written: str
) -> None:
    base_tokenizer = base_tokenizers()[of]
    before, whole = (
        list(base_tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (prompt, written)
    )
    example = Example(id="1", text=prompt, answers=(answer,), extra={"foil": answer})
    model = with_tokenizer(base_tokenizer)
    asked, skips = questions([example], model, 512)
    if whole[: len(before)] != before:
        assert [s.reason for s in skips] == ["answer merges with the prompt's last token"]
        with pytest.raises(PositionNotFound, match="^answer merges with the prompt's last token$"):
            AnswerLogit().tokens(example, base_tokenizer)
        return
    # Outcomes and the capability analyzer say the same.
    [question] = asked
    assert question.answer_id == whole[len(before)]
    assert AnswerRank().tokens(example, base_tokenizer) == ([whole[len(before)]], [])
    with pytest.raises(PositionNotFound, match="begin with one token"):
        LogitDifference().tokens(example, base_tokenizer)
    assert question.foil_reason == "foil begins with the answer's first token"


@pytest.mark.parametrize("of", list(chat_tokenizers()))
@pytest.mark.parametrize("answer", ["Paris", " Paris", "  Paris"])
def test_in_chat_the_answer_begins_the_model_s_turn(of: str, answer: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    example = Example(id="1", text="What is the capital of France?", answers=(answer,))
    templated = model.chat_text(example.text)
    before, whole = (
        list(model.tokenizer(t, add_special_tokens=False)["input_ids"])
        for t in (templated, templated + "Paris")
    )
    cfg = InterventionConfig(name="steer", where="last")
    [placed] = position_prompts([example], model, cfg, 512).all()
    asked, skips = questions([example], model, 512)
    if whole[: len(before)] != before:
        assert [s.reason for s in skips] == ["answer merges with the prompt's last token"]
        return
    assert asked[0].answer_id == whole[len(before)]
    assert AnswerLogit().tokens(placed.example, model.tokenizer) == ([asked[0].answer_id], [])
    assert space_note([placed.example]) == []


@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    answer=st.text(st.characters(codec="utf-8"), min_size=1, max_size=6),
)
def test_joined_text_is_prompt_and_answer_with_at_most_one_space(prompt: str, answer: str) -> None:
    assume(answer.strip())
    for space in ("auto", "always", "never"):
        example = Example(id="1", text=prompt, answer_space=space)
        assert answer_text(example, answer) in (answer, f" {answer}")
    if not tokenizer()(prompt)["input_ids"][1:]:
        return
    example = Example(id="1", text=prompt)
    whole = tokenizer()(prompt + answer_text(example, answer), add_special_tokens=False)
    before = tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    if whole["input_ids"][: len(before)] == before:
        assert answer_token(tokenizer(), example, answer) == whole["input_ids"][len(before)]


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer_has_no_token(answer: str) -> None:
    with pytest.raises(PositionNotFound, match="^answer has no token$"):
        answer_token(tokenizer(), Example(id="1", text="The city"), answer)
    with pytest.raises(PositionNotFound, match="^foil has no token$"):
        answer_token(tokenizer(), Example(id="1", text="The city"), answer, "foil")


@pytest.mark.parametrize("foil", [None, "", float("nan")])
def test_a_missing_foil_is_none(foil: Any) -> None:
    example = Example(id="1", text="a", answers=("b",), extra={"foil": foil})
    assert foil_of(example) is None
    with pytest.raises(PositionNotFound, match="no foil"):
        LogitDifference().tokens(example, tokenizer())
    asked, _ = questions([example], random_lm("llama"), 64)
    assert asked[0].foil_reason is None


def test_the_data_set_s_option_decides_and_a_continuation_is_as_given(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "The ci", "answer": "ty of New Bresk"}\n', encoding="utf-8")
    for space, wanted in (("auto", " ty"), ("always", " ty"), ("never", "ty")):
        cfg = DatasetConfig(name="jsonl", path=str(file), answer_space=space)
        [example] = registry.build("dataset", cfg).examples
        assert answer_text(example, example.answers[0]).startswith(wanted)
        cfg = DatasetConfig(name="prompt", text="The ci", answer="ty", answer_space=space)
        [example] = registry.build("dataset", cfg).examples
        assert answer_text(example, example.answers[0]) == wanted
    shipped = registry.build("dataset", DatasetConfig(name="memorization", model_name="tiny"))
    for example in shipped.examples:
        read = example.as_prompt()
        assert read.text + answer_text(read, read.answers[0]) == example.text
    with pytest.raises(ConfigError, match=r"dataset.answer_space=alway.*always"):
        DatasetConfig(name="jsonl", answer_space="alway")
