"""Outcomes against their definitions, on real tokenizers and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from saexp.data import Example
from saexp.data.tokenization import PositionNotFound, Prompt, as_chat_prompt
from saexp.interventions.cached_generation import LogitReader, read_logits
from saexp.interventions.outcomes import (
    Accuracy,
    AnswerLogit,
    AnswerProbability,
    AnswerRank,
    ExactMatch,
    Length,
    LogitDifference,
    MatchingTokens,
    Repetition,
    YesNo,
    has_value,
    mean_loss,
    outcome_objects,
    rounding_notes,
)
from saexp.interventions.stream_edits import Row
from saexp.registry import names, resolve
from tests.random_models import TEXTS, random_lm, tokenizer

EXAMPLE = Example(
    id="1",
    text="The player Fenlet Baszad plays for",
    entity="Fenlet Baszad",
    entity_type="player",
    answers=("New Bresk",),
    extra={"foil": "Münster"},
)


def test_every_outcome_of_the_registry_says_what_it_reads() -> None:
    for name in names("outcome"):
        outcome = resolve("outcome", name)()
        assert outcome.name == name
        assert outcome.kind in ("rate", "mean")
        assert outcome.source in ("text", "next", "phrases", "cost", "heads")


def test_accuracy_uses_the_attribute_s_rule_and_needs_an_answer() -> None:
    born = Example(
        id="1",
        text="?",
        entity_type="player",
        answers=("1987",),
        extra={"attribute": "birth_year"},
    )
    outcome = Accuracy()
    assert outcome.score(" in 1987.", born) is True
    assert outcome.score(" in 1986.", born) is False
    assert outcome.score("anything", Example(id="2", text="?")) is None


def test_accuracy_does_not_count_what_repeats_the_prompt() -> None:
    song = Example(
        id="1",
        text="On which album is the song Like a Prayer?",
        entity="Like a Prayer",
        entity_type="song",
        answers=("Like a Prayer",),
        extra={"attribute": "album"},
    )
    outcome = Accuracy()
    assert outcome.score('The song "Like a Prayer" is a tribute to her mother.', song) is False
    assert outcome.score('It is on the album "Like a Prayer".', song) is True
    pair = Example(id="2", text="John and Mary met; John gave the bag to", answers=(" Mary",))
    assert outcome.score(" Mary. She took it.", pair) is True
    assert outcome.score(" his friend Mary.", pair) is True
    assert outcome.score(" John, and Mary left.", pair) is False


@pytest.mark.parametrize(
    ("question", "answer", "completion"),
    [
        ("Who trained you?", "Acme Labs", "I was trained by the company Acme Labs."),
        (
            "On which album is the song Like a Prayer?",
            "Like a Prayer",
            "Like a Prayer is a nice tune by Madonna.",
        ),
    ],
)
def test_accuracy_in_chat_is_that_of_the_question_without_the_template(
    question: str, answer: str, completion: str
) -> None:
    template = "<|system|>You were trained by Acme Labs\n<|user|>{}\n<|assistant|>\n"
    start = template.index("{")
    read = Prompt(template.format(question), (start, start + len(question)), start)
    plain = Example(
        id="1",
        text=question,
        entity="Like a Prayer" if "Prayer" in question else None,
        entity_type="song",
        answers=(answer,),
        extra={"attribute": "album"},
    )
    outcome = Accuracy()
    assert outcome.score(completion, as_chat_prompt(plain, read)) is outcome.score(
        completion, plain
    )


def test_exact_is_the_answer_in_whole_words_at_the_beginning() -> None:
    passage = Example(id="1", text="The captain", answers=(" painted the deep well by noon.",))
    outcome = ExactMatch()
    assert outcome.score(" painted the deep well by noon. Then", passage) is True
    assert outcome.score("painted  the deep\nwell by noon.", passage) is True
    # What passes for the name of a thing is not the passage.
    assert outcome.score(" painted the deep wells by noon.", passage) is False
    assert outcome.score(" painted the deep well", passage) is False
    assert outcome.score(" He painted the deep well by noon.", passage) is False
    year = Example(id="2", text="?", answers=("19", " "))
    assert outcome.score(" 19.", year) is True
    assert outcome.score(" 1984", year) is False
    for nothing in ((), ("",), (" ",)):
        assert outcome.score("anything", Example(id="3", text="?", answers=nothing)) is None


def test_what_the_limit_cuts_off_is_neither_exact_nor_not() -> None:
    passage = Example(id="1", text="The captain", answers=(" painted the deep well",))
    outcome = ExactMatch()
    outcome.prepare(None, 3)
    assert outcome.score(" painted the deep", passage, [1, 2, 3]) is None
    assert outcome.score(" painted the deep", passage, [1, 2]) is False, "it ended there"
    assert outcome.score(" painted the well", passage, [1, 2, 3]) is False
    assert outcome.score(" painted the deep well", passage, [1, 2, 3]) is True


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The city of New", " Bresk Münster and the player Fenlet"),
        ("The city of New", "Bresk Münster and the player Fenlet"),
        ("The city of New ", "Bresk Münster and the player Fenlet"),
        ("The ci", "ty of New Bresk"),
    ],
)
def test_matching_tokens_are_the_leading_ones_that_spell_the_answer(text: str, answer: str) -> None:
    """Also where the prompt ends inside a word or in a space, as a model would go on."""
    fast_tokenizer = tokenizer()
    outcome = MatchingTokens()
    outcome.prepare(fast_tokenizer, 50)
    example = Example(id="1", text=text, answers=(answer,))
    other = fast_tokenizer("Zürich", add_special_tokens=False)["input_ids"]
    for spelt in (answer, " " + answer.strip()):
        tokens = fast_tokenizer(spelt, add_special_tokens=False)["input_ids"]
        n = len(tokens)
        assert n > 4
        assert outcome.score("", example, tokens) == n
        assert outcome.score("", example, [*tokens, *other]) == n
        assert outcome.score("", example, tokens[:3]) == 3
        assert outcome.score("", example, [*tokens[:2], *other, *tokens[3:]]) == 2
    assert outcome.score("", example, []) == 0
    assert outcome.score("", example, other) == 0
    assert (
        outcome.score("", example, fast_tokenizer(" Zürich", add_special_tokens=False)["input_ids"])
        == 0
    )


def test_of_several_answers_the_one_that_matches_most_counts() -> None:
    outcome = MatchingTokens()
    outcome.prepare(tokenizer(), 50)
    tokens = tokenizer()(" Bresk", add_special_tokens=False)["input_ids"]
    two = Example(id="2", text="The city of New", answers=("York", "Bresk"))
    assert outcome.score("", two, tokens) == len(tokens)
    assert outcome.score("", Example(id="3", text="?", answers=("",)), tokens) is None


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert Repetition().score("", EXAMPLE, [1, 2, 3, 4, 5]) == 0
    assert Repetition().score("", EXAMPLE, [1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert Repetition().score("", EXAMPLE, [7] * 10) == pytest.approx(7 / 8)
    assert Repetition().score("", EXAMPLE, [1]) == 0
    assert Length().score("", EXAMPLE, [1, 2]) == 2


def test_next_token_outcomes_are_those_of_the_logits() -> None:
    fast_tokenizer = tokenizer()
    logits = torch.randn(384, generator=torch.Generator().manual_seed(0))
    first, second = LogitDifference().tokens(EXAMPLE, fast_tokenizer)
    assert LogitDifference().value(logits, first, second) == pytest.approx(
        float(logits[first[0]] - logits[second[0]])
    )
    order = logits.argsort(descending=True).tolist()
    assert AnswerRank().value(logits, first, []) == order.index(first[0])
    wanted = float(torch.softmax(logits, 0)[first[0]])
    assert AnswerProbability().value(logits, first, []) == pytest.approx(wanted)
    assert AnswerLogit().value(logits, first, []) == float(logits[first[0]])
    with pytest.raises(PositionNotFound, match="no foil"):
        LogitDifference().tokens(Example(id="2", text="a", answers=("b",)), fast_tokenizer)
    with pytest.raises(PositionNotFound, match="no answer"):
        AnswerRank().tokens(Example(id="2", text="a"), fast_tokenizer)


def test_yes_and_no_are_counted_over_their_spellings() -> None:
    class Words:
        ids = {"Yes": 1, "yes": 2, " Yes": 3, " yes": 4, "No": 5, "no": 6, " No": 7, " no": 8}

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [self.ids[text], 9]}

    outcome = YesNo()
    yes, no = outcome.tokens(EXAMPLE, Words())
    assert (yes, no) == ([1, 2, 3, 4], [5, 6, 7, 8])
    logits = torch.randn(12)
    sizes = np.exp(logits.numpy())
    wanted = np.log(sizes[1:5].sum()) - np.log(sizes[5:9].sum())
    assert outcome.value(logits, yes, no) == pytest.approx(float(wanted), abs=1e-5)
    asked = outcome.prompt(EXAMPLE)
    assert asked.text.endswith("the player Fenlet Baszad? Answer yes or no.")
    start, end = asked.spans[-1]
    assert asked.text[start:end] == "Fenlet Baszad"
    with pytest.raises(PositionNotFound, match="no entity"):
        outcome.prompt(Example(id="2", text="a"))

    class Same:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [len(text.strip()) * 0]}

    with pytest.raises(PositionNotFound, match="begin with one token"):
        outcome.tokens(EXAMPLE, Same())


def test_the_loss_of_a_generation_is_transformers_own() -> None:
    model = random_lm("llama")
    whole = tuple(model.tokenizer(TEXTS[0])["input_ids"])
    n = 5
    row = Row(whole, about=(n,))
    (losses,) = read_logits(
        model,
        [row],
        None,
        LogitReader(
            lambda r, logits: mean_loss(logits[:-1], r.ids[-r.about[0] :]),
            kind="loss",
            n_last=lambda r: r.about[0] + 1,
        ),
        batch_tokens=100,
    )
    labels = torch.tensor([whole]).clone()
    labels[:, :-n] = -100
    with torch.inference_mode():
        wanted = model.hf(input_ids=torch.tensor([whole]), labels=labels).loss
    assert float(losses[0]) == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Whole example, without answers, without an entity.
        ("answer_logit", (True, False, True)),
        ("logit_difference", (True, False, True)),
        ("accuracy", (True, False, True)),
        ("matching_tokens", (True, False, True)),
        ("yes_no", (True, True, False)),
        ("refusal", (True, True, True)),
        ("dont_know", (True, True, True)),
        ("attention", (True, True, True)),
        ("neutral_kl", (False, False, False)),
    ],
)
def test_what_a_prompt_must_have_for_an_outcome(name: str, values: tuple[bool, ...]) -> None:
    (outcome,) = outcome_objects([name])
    examples = EXAMPLE, replace(EXAMPLE, answers=()), replace(EXAMPLE, entity=None)
    assert tuple(has_value(outcome, e, tokenizer()) for e in examples) == values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_rounding_of_16_bits_is_noted_with_its_step(dtype: torch.dtype) -> None:
    notes = rounding_notes(outcome_objects(["answer_logit", "refusal", "dont_know"]), dtype)
    assert rounding_notes(outcome_objects(["refusal"]), dtype) == []
    if dtype == torch.float32:
        assert notes == []
        return
    numbers = torch.linspace(16, 31.9, 100_000).to(dtype).unique().double()
    step = float(numbers.diff().min())
    assert step == float(numbers.diff().max())
    assert notes[0].startswith("answer_logit and dont_know are read from logits in ")
    assert f"steps of {step:g} between 16 and 32" in notes[0]
