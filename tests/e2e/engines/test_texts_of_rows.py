"""Generated texts equal a plain loop of transformers' generate, row for row, however rows are
batched and guess each other's text."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from saexp.interventions import cached_generation as batching
from saexp.interventions.cached_generation import generate
from saexp.interventions.generation import greedy_tokens, last_logits
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, VOCABULARY, random_hf, random_lm, tokenizer
from tests.unit.interventions.plain_loop import Hooked, plain_generate

AT = Hookpoint(1, "resid_post")
COEFFICIENTS = (0.0, 0.05, 0.3, 2.0)
LOGIT_BYTES = (VOCABULARY * 4 * 3, VOCABULARY * 4 * 40, 512 * 2**20)
"""A row a batch, a few, all."""


@dataclass(frozen=True)
class Case:
    """Rows with their texts."""

    model: LanguageModel
    rows: list[Row]
    texts: list[list[int]]
    max_new_tokens: int


def steered_rows(rng: np.random.Generator, lengths: list[int]) -> list[Row]:
    """Prompts of these lengths, each steered along two directions at the last token, at an entity
    or at all tokens, generated ones too."""
    vectors = [Vector(torch.tensor(rng.normal(size=D_MODEL)).float()) for _ in range(2)]
    rows = []
    for length in lengths:
        ids = tuple(int(t) for t in rng.integers(3, VOCABULARY, length))
        start = int(rng.integers(length))
        wheres = (
            ((length - 1,), False),
            (tuple(range(start, min(start + 2, length))), False),
            (tuple(range(length)), True),
        )
        positions, generated = wheres[int(rng.integers(3))]
        rows += [
            Row(ids, (Add(AT, vector, c),), positions, generated)
            for vector in vectors
            for c in COEFFICIENTS
        ]
    return rows


def by_plain_loop(model: LanguageModel, row: Row, max_new_tokens: int) -> list[int]:
    (op,) = row.ops
    assert isinstance(op, Add)
    step = op.coefficient * op.vector.values
    hooked = Hooked(AT.layer, lambda x: x + step, row.positions, row.generated)
    return plain_generate(model, row.ids, max_new_tokens, hooked)


@pytest.fixture(
    scope="module", params=[("llama", 0), ("gpt2", 1), ("gemma2", 2), ("llama", 3)], ids=str
)
def case(request: pytest.FixtureRequest) -> Case:
    """Prompts of 1 to 40 tokens; the last case ends many texts at a token that the model likes."""
    architecture, seed = request.param
    rng = np.random.default_rng(seed)
    model = LanguageModel.wrap(random_hf(architecture), tokenizer())
    lengths = [int(rng.integers(7, 40)), 1, int(rng.integers(2, 7)), 40]
    rows, most = steered_rows(rng, lengths), int(rng.integers(2, 22))
    if seed == 3:
        tokens = [t for row in rows[::5] for t in by_plain_loop(model, row, most)]
        model.__dict__["eos_ids"] = tuple({2, *rng.choice(tokens, 3).tolist()})
    texts = [by_plain_loop(model, row, most) for row in rows]
    return Case(model, rows, texts, most)


@pytest.mark.parametrize(
    ("batch_size", "logit_bytes"),
    [
        (1, LOGIT_BYTES[2]),
        (3, LOGIT_BYTES[1]),
        (7, LOGIT_BYTES[0]),
        (16, LOGIT_BYTES[2]),
    ],
)
def test_texts_equal_a_plain_loop_for_any_prompt_length_and_batch_size(
    case: Case, batch_size: int, logit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "LOGIT_BYTES", logit_bytes)
    generated = generate(
        case.model,
        case.rows,
        max_new_tokens=case.max_new_tokens,
        batch_tokens=batch_size * (40 + case.max_new_tokens),
    )
    assert generated == case.texts


def test_guesses_longer_than_a_short_prompt_change_no_text() -> None:
    """Prompts of 6 to 8 tokens, texts of up to 20 of which some end early: before logits were
    counted from the right, 5 of these rows had a wrong text, without an error."""
    rng, model = np.random.default_rng(103), LanguageModel.wrap(random_hf("llama"), tokenizer())
    rows = steered_rows(rng, [int(n) for n in rng.integers(6, 9, 6)])
    tokens = [t for row in rows[::4] for t in by_plain_loop(model, row, 20)[8:]]
    model.__dict__["eos_ids"] = (2, int(rng.choice(tokens)))
    texts = [by_plain_loop(model, row, 20) for row in rows]
    assert generate(model, rows, max_new_tokens=20, batch_tokens=200) == texts


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_end_at_once_leave_the_others_their_edits(seed: int) -> None:
    """Where only generated tokens are changed, nothing has been written when the first rows end."""
    rng, model = np.random.default_rng(seed), LanguageModel.wrap(random_hf("llama"), tokenizer())
    rows = [
        Row(
            tuple(int(t) for t in rng.integers(3, VOCABULARY, 9)),
            (Add(AT, Vector(torch.tensor(rng.normal(size=D_MODEL)).float()), 3.0),),
            (),
            generated=True,
        )
        for _ in range(12)
    ]
    first = [by_plain_loop(model, row, 1)[0] for row in rows]
    model.__dict__["eos_ids"] = tuple(set(first[::2]))
    texts = [by_plain_loop(model, row, 6) for row in rows]
    assert sum(not text for text in texts) >= 6
    assert len({tuple(text) for text in texts}) >= 3
    assert generate(model, rows, max_new_tokens=6, batch_tokens=1000) == texts


@pytest.mark.parametrize("n_last", [1, 2, 4, 9, 30])
def test_logits_are_those_of_each_row_s_last_tokens_counted_from_the_right(n_last: int) -> None:
    """Also where the batch is narrower than `n_last`."""
    model, rng = random_lm("llama"), np.random.default_rng(0)
    rows = [Row(tuple(map(int, rng.integers(3, VOCABULARY, n)))) for n in (1, 3, 5, 9)]
    all_logits = last_logits(model, rows, None, n_last)
    assert all_logits.shape == (4, min(n_last, 9), VOCABULARY)
    for row, logits in zip(rows, all_logits, strict=True):
        n = min(n_last, len(row.ids))
        with torch.inference_mode():
            wanted = model.hf(torch.tensor([row.ids])).logits[0, -n:]
        torch.testing.assert_close(logits[-n:], wanted, atol=1e-4, rtol=1e-4)
    counts = [min(n_last, len(row.ids)) for row in rows]
    tokens = greedy_tokens(model, rows, {}, counts)
    assert tokens == [x[-n:].argmax(-1).tolist() for x, n in zip(all_logits, counts, strict=True)]
