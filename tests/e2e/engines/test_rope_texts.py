"""Texts of models whose rotary frequencies depend on the length equal single rows, on both sides of
the original context and across it."""

import numpy as np
import pytest
import torch

from saexp.interventions.cached_generation import LogitReader, generate, read_logits
from saexp.interventions.stream_edits import Add, Patch, Row, Sampling, Vector
from saexp.models import Hookpoint
from tests.random_models import D_MODEL, VOCABULARY
from tests.rope_models import CONTEXT, ONE_OF_EACH_KIND, ROPE_MODELS, rope_lm
from tests.unit.interventions.plain_loop import Hooked, plain_generate

AT = Hookpoint(1, "resid_post")
N_NEW = 9
LENGTHS = (3, CONTEXT - N_NEW, CONTEXT - N_NEW + 1, CONTEXT - 1)
LENGTHS += (CONTEXT, CONTEXT + 1, CONTEXT + 5, CONTEXT + 5)


def rows() -> list[Row]:
    """24 rows; three to a prompt, so that prompts are shared and texts guessed."""
    rng = np.random.default_rng(0)
    vector = Vector(torch.tensor(rng.normal(size=D_MODEL)).float())
    edited_rows = []
    for n in LENGTHS:
        ids = tuple(int(t) for t in rng.integers(3, VOCABULARY, n))
        edited_rows += [
            Row(ids, (Add(AT, vector, 0.0),), (n - 1,)),
            Row(ids, (Add(AT, vector, 0.1),), (n - 1,)),
            Row(ids, (Add(AT, vector, 1.0),), tuple(range(n)), True),
        ]
    return edited_rows


def alone(name: str, row: Row) -> list[int]:
    """On a model that has not seen any other sequence."""
    (op,) = row.ops
    step = op.coefficient * op.vector.values
    hooked = Hooked(AT.layer, lambda x: x + step, row.positions, row.generated)
    return plain_generate(rope_lm(name), row.ids, N_NEW, hooked)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_24_texts_across_the_original_context_equal_plain_generate_of_single_rows(name):
    some = rows()
    assert len(some) == 24
    wanted = [alone(name, row) for row in some]
    for batch_tokens in (10_000, 150):
        generated = generate(rope_lm(name), some, max_new_tokens=N_NEW, batch_tokens=batch_tokens)
        assert generated == wanted


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_end_token_ends_a_row_before_and_behind_the_context(name):
    model = rope_lm(name)
    free = generate(model, rows(), max_new_tokens=N_NEW, batch_tokens=10_000)
    model.__dict__["eos_ids"] = (2, free[9][1], free[12][-1], free[-1][3])
    generated = generate(model, rows(), max_new_tokens=N_NEW, batch_tokens=10_000)
    ends = [[i for i, t in enumerate(x) if t in model.eos_ids] for x in free]
    assert generated == [x[: end[0]] if end else x for x, end in zip(free, ends, strict=True)]
    assert any(ends)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_samples_and_patches_across_the_context_depend_on_the_row_alone(name):
    model, some = rope_lm(name), []
    for row in rows()[::3]:
        n = len(row.ids)
        patch = Patch(AT, Vector(torch.ones(2, D_MODEL)), 1.0)
        some += [
            Row(row.ids, sample=Sampling(1.0, 4)),
            Row(row.ids, row.ops, sample=Sampling(2.0, 1)),
        ]
        some += [Row(row.ids, (patch,), (n - 2, n - 1)), Row(row.ids, (patch,), (0, n - 1), True)]
    together = generate(model, some, max_new_tokens=N_NEW, batch_tokens=10_000)
    single = [
        generate(rope_lm(name), [row], max_new_tokens=N_NEW, batch_tokens=1)[0] for row in some
    ]
    assert together == single


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_logits_of_prompts_on_both_sides_equal_single_rows(name):
    model = rope_lm(name)
    all_logits = read_logits(
        model,
        [Row(row.ids) for row in rows()],
        None,
        LogitReader(lambda _row, logits: logits[-1].numpy(), "test"),
        batch_tokens=10_000,
    )
    for row, values in zip(rows(), all_logits, strict=True):
        with torch.inference_mode():
            wanted = rope_lm(name).hf(torch.tensor([row.ids])).logits[0, -1]
        torch.testing.assert_close(torch.tensor(values).float(), wanted, atol=1e-5, rtol=1e-5)
