"""Prompts as token ids: against `apply_chat_template` and the tokenizer itself, on many kinds."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saexp
from saexp.config import InterventionConfig, PositionsConfig, RunConfig
from saexp.data import Example
from saexp.data.positions import Candidate, resolve_positions
from saexp.data.tokenization import (
    MESSAGE_CHANGED,
    PositionNotFound,
    format_prompts,
    span_to_tokens,
    tokenize,
    tokenize_prompts,
    tokenize_texts,
)
from saexp.interventions.conditions import position_prompts
from saexp.pipeline.collect import resolve_bos
from saexp.registry import build
from tests.chat_tokenizers import (
    base_tokenizers,
    changing_tokenizers,
    chat_tokenizers,
    with_tokenizer,
)
from tests.random_models import TEXTS

MESSAGES = [
    *TEXTS[:3],
    "Who?",
    " leading and trailing \n",
    "assistant",
    "a user's model",
    "two\n\nlines",
]
MESSAGE = st.lists(
    st.sampled_from(["ant", "user", "Café", "model", "42", "assistant", "\n", " ", "  ", "it's"]),
    min_size=1,
    max_size=8,
).map(" ".join)
BASE = pytest.mark.parametrize("of", list(base_tokenizers()))
CHAT = pytest.mark.parametrize("of", list(chat_tokenizers()))


def by_template(tokenizer: Any, message: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )


def read(model: Any, messages: list[str], max_length: int = 512) -> list[Any]:
    return tokenize_prompts(model, format_prompts(model, messages), max_length)


@BASE
def test_a_base_model_s_ids_are_the_tokenizers_own_without_the_eos_it_appends(of: str) -> None:
    tokenizer = base_tokenizers()[of]
    texts = [m for m in MESSAGES if not m.startswith(" ")]
    for text, tokens in zip(texts, read(with_tokenizer(tokenizer), texts), strict=True):
        own = list(tokenizer(text)["input_ids"])
        appended = own[-1] == tokenizer.eos_token_id and "eos" in of
        assert appended == ("eos" in of)
        assert list(tokens.ids) == (own[:-1] if appended else own)
        assert tokens.message is None
        assert not tokens.special[-1]
        assert not tokens.truncated


@BASE
def test_collected_texts_are_read_alike(of: str) -> None:
    tokenizer = base_tokenizers()[of]
    texts = [m for m in MESSAGES if not m.startswith(" ")]
    assert tokenize(texts, tokenizer, 512) == read(with_tokenizer(tokenizer), texts)


@BASE
def test_an_eos_that_the_text_itself_holds_stays(of: str) -> None:
    tokenizer = base_tokenizers()[of]
    text = f"The end{tokenizer.eos_token}"
    [tokens] = tokenize([text], tokenizer, 64)
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert tokens.ids.count(tokenizer.eos_token_id) == 1


@BASE
def test_max_length_counts_the_tokens_that_are_read(of: str) -> None:
    """An EOS that is left out takes no room."""
    tokenizer = base_tokenizers()[of]
    [whole] = tokenize([TEXTS[0]], tokenizer, 512)
    for n in (2, len(whole) - 1, len(whole), len(whole) + 1):
        [cut] = tokenize([TEXTS[0]], tokenizer, n)
        assert cut.ids == whole.ids[:n]
        assert cut.offsets == whole.offsets[:n]
        assert cut.truncated == (n < len(whole))


@CHAT
@pytest.mark.parametrize("sae_wants_bos", [None, True, False])
def test_in_chat_the_ids_are_those_of_apply_chat_template(
    of: str, sae_wants_bos: bool | None
) -> None:
    tokenizer = chat_tokenizers()[of]
    model = with_tokenizer(tokenizer, chat=True)
    # As `resolve_bos` returns it where the SAE decides.
    model = model.with_bos(sae_wants_bos)
    for message, tokens in zip(MESSAGES, read(model, MESSAGES), strict=True):
        assert list(tokens.ids) == by_template(tokenizer, message)


@CHAT
def test_a_text_that_is_the_template_s_output_is_read_as_the_model_read_it(of: str) -> None:
    """Such as those of task=label; texts beside it are read as texts."""
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    templated = model.chat_text("Who?")
    texts = ["Who?", templated, templated + "Nobody", "Who else?"]
    first, second, third, last = tokenize_texts(model, texts, 512)
    assert [first, last] == tokenize(["Who?", "Who else?"], model.tokenizer, 512)
    assert list(second.ids) == by_template(model.tokenizer, "Who?")
    joined = model.tokenizer(templated + "Nobody", add_special_tokens=False)["input_ids"]
    assert list(third.ids) == list(joined)


@cache
def default_config() -> RunConfig:
    return saexp.compose([])


@pytest.mark.parametrize("of", list(chat_tokenizers()))
@pytest.mark.parametrize("wanted", [True, False])
def test_a_note_says_where_prompts_in_chat_begin_otherwise_than_texts(
    of: str, wanted: bool
) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    bos = getattr(model.tokenizer, "bos_token_id", None)
    has_bos = bos is not None
    _, result = resolve_bos(default_config(), model, [("the SAE", wanted)])
    notes = result.notes
    own = has_bos and by_template(model.tokenizer, "a")[0] == bos
    noted = [n for n in notes if n.startswith("prompts in chat begin ")]
    # In ChatML, BOS marks every role: that texts have none is no difference.
    marks_roles = has_bos and by_template(model.tokenizer, "a").count(bos) > 1
    with_bos = wanted and has_bos
    assert len(noted) == (own != with_bos and (with_bos or not marks_roles))
    assert all(f"begin {'with' if own else 'without'} BOS" in n for n in noted)


@pytest.mark.parametrize("of", ["gemma", "no bos in template", "no bos at all", "slow"])
def test_only_the_user_changes_the_bos_of_a_chat_prompt(of: str) -> None:
    tokenizer = chat_tokenizers()[of]
    model = with_tokenizer(tokenizer, chat=True)
    bos, own = tokenizer.bos_token_id, by_template(tokenizer, "Who?")
    bare = own[1:] if own[0] == bos else own
    for wanted, ids in ((True, [bos, *bare]), (False, bare)):
        model.cfg = replace(model.cfg, prepend_bos=wanted)
        [tokens] = read(model, ["Who?"])
        assert list(tokens.ids) == ids
        [at] = [i for i in span_to_tokens(tokens, tokens.message) if not tokens.special[i]][:1]
        assert tokens.text[slice(*tokens.offsets[at])].strip() in "Who?"


@CHAT
@settings(max_examples=20)
@given(message=MESSAGE)
def test_the_message_is_located_whatever_it_says(of: str, message: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    [prompt] = format_prompts(model, [message])
    assert prompt.text == model.chat_text(message)
    assert prompt.message is not None
    start, end = prompt.message
    assert prompt.text[start:end] in (message, message.strip())
    before, after = prompt.text[:start], prompt.text[end:]
    # With another message in that very place, it is the template of that message.
    other = "Something else?"
    assert before + other + after == model.chat_text(other)
    for index, character in enumerate(message):
        if not character.isspace():
            assert prompt.text[index + prompt.shift] == character


def located(model: Any, example: Example, where: str, **options: Any) -> list[str]:
    """Texts of the tokens that are changed."""
    cfg = InterventionConfig(name="steer", where=where, where_options=options)
    prompts = position_prompts([example], model, cfg, 512)
    assert not prompts.reasons
    [placed] = prompts.all()
    return [placed.tokens.text[slice(*placed.tokens.offsets[i])] for i in placed.positions]


@CHAT
@pytest.mark.parametrize("entity", ["ant", "art", "user", "model", "assistant", "start"])
def test_an_entity_is_the_user_s_and_not_the_template_s(of: str, entity: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    prompt = f"  Is {entity} known?"
    example = Example(id="1", text=entity, spans=((0, len(entity)),), entity=entity, prompt=prompt)
    assert "".join(located(model, example, "entity")).strip() == entity
    cfg = InterventionConfig(name="steer", where="entity")
    [placed] = position_prompts([example], model, cfg, 512).all()
    # Right behind "Is", in the message.
    start = placed.example.spans[-1][0]
    assert placed.tokens.text[:start].endswith("Is ")
    elsewhere = replace(example, prompt="Who is that?")
    reasons = position_prompts([elsewhere], model, cfg, 512).reasons
    assert reasons == {"no entity span": 1}


@CHAT
def test_a_span_given_by_the_user_survives(of: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    text = "Ann met Bob and then Ann left"
    example = Example(id="1", text=text, spans=((0, 3),), entity="Ann")
    cfg = InterventionConfig(name="steer", where="entity")
    [placed] = position_prompts([example], model, cfg, 512).all()
    [(start, end)] = placed.example.spans
    assert placed.tokens.text[start:end] == "Ann"
    assert placed.tokens.text[start:].startswith("Ann met Bob")


@CHAT
def test_positions_are_of_the_message(of: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    example = Example(id="1", text="An ant is no assistant, says art of start")
    assert "".join(located(model, example, "substring", substring="ant")).strip() == "ant"
    assert "".join(located(model, example, "substring", substring="art")).strip() == "art"
    [first], [last] = (located(model, example, "indices", indices=[i]) for i in (0, -1))
    assert "An".startswith(first.strip())
    assert "start".endswith(last.strip())
    every = "".join(located(model, example, "random", n=1000))
    assert every.replace(" ", "") == example.text.replace(" ", "")
    [middle] = located(model, example, "middle")
    assert middle in example.text
    cfg = InterventionConfig(
        name="steer", where="substring", where_options={"substring": "<|", "n": 1}
    )
    assert position_prompts([example], model, cfg, 512).reasons == {"substring not found": 1}


@CHAT
def test_last_is_the_token_before_the_generation(of: str) -> None:
    model = with_tokenizer(chat_tokenizers()[of], chat=True)
    [placed] = position_prompts(
        [Example(id="1", text="Who?")], model, InterventionConfig(name="steer", where="last"), 512
    ).all()
    assert placed.positions == (len(placed.tokens) - 1,)
    assert placed.tokens.ids[-1] == by_template(model.tokenizer, "Who?")[-1]


@pytest.mark.parametrize("of", list(changing_tokenizers()))
def test_a_template_that_changes_the_message_is_a_counted_skip_where_its_place_matters(
    of: str,
) -> None:
    model = with_tokenizer(changing_tokenizers()[of], chat=True)
    example = Example(id="1", text="Is it Bo?", spans=((6, 8),), entity="Bo")
    for where, options in (("entity", {}), ("substring", {"substring": "Bo"}), ("middle", {})):
        cfg = InterventionConfig(name="steer", where=where, where_options=options)
        assert position_prompts([example], model, cfg, 512).reasons == {MESSAGE_CHANGED: 1}
    for where in ("all", "prompt", "last", "generated"):
        cfg = InterventionConfig(name="steer", where=where)
        [placed] = position_prompts([example], model, cfg, 512).all()
        assert list(placed.tokens.ids) == by_template(model.tokenizer, example.text)
        assert placed.example.spans == ()


@BASE
def test_last_is_the_text_s_own_last_token(of: str) -> None:
    tokenizer = base_tokenizers()[of]
    [tokens] = tokenize(["The end."], tokenizer, 64)
    positions = build("positions", PositionsConfig(name="last", include_special=True))
    rows = resolve_positions(
        [Example(id="1", text="The end.")], [tokens], positions, tokenizer, 0
    ).rows
    assert tokens.text[slice(*tokens.offsets[rows["token_index"].item()])].endswith(".")


def test_an_example_without_a_prompt_stays_without() -> None:
    model = with_tokenizer(chat_tokenizers()["gemma"], chat=True)
    assert read(model, []) == []
    [prompt] = format_prompts(model, [" "])
    assert prompt.located((0, 1)) is None
    at = Candidate(Example(id="1", text=" "), read(model, [" "])[0], np.random.default_rng(0))
    with pytest.raises(PositionNotFound, match="text has no ordinary token"):
        build("positions", PositionsConfig(name="all")).select(at)
