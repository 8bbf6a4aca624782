"""Speculative decoding gives the tokens of each row decoded alone, in fewer passes."""

from functools import cache
from typing import Any

import pytest
import torch

from saexp.interventions import cached_generation as batching
from saexp.interventions import generation
from saexp.interventions.cached_generation import SpeculativeDecoding, generate
from saexp.interventions.stream_edits import Add, Move, Patch, Row, Sampling, Splice, Vector
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import D_MODEL, random_hf, random_lm, tokenizer
from tests.unit.interventions.test_engine import AT, add, made_sae, prompts

N_NEW = 7


def grid(model: LanguageModel, sae: SparseAutoencoder) -> list[Row]:
    """Strong and weak edits of every kind, on prompts with many rows and on one with a single row.

    Edits of generated tokens, patches and samples are among them.
    """
    rows = []
    for ids in prompts(model)[:3]:
        for latent in (1, 9):
            for c in (0.0, 0.5, 4.0):
                rows.append(Row(ids, add(sae, (latent,), c), (1, 3)))
                rows.append(Row(ids, add(sae, (latent,), c), (2,), True))
        rows.append(Row(ids, (Move(AT, (7,), (7,), (2.5,), 1.0),), (), True))
        rows.append(Row(ids, (Splice(AT, 1.0),), (2, 3), True))
        patch = Patch(AT, Vector(torch.ones(2, D_MODEL)), 1.0)
        rows += [Row(ids, (patch,), (1, 2)), Row(ids, (patch,), (1, 2), True)]
        rows += [Row(ids, sample=Sampling(1.0, seed)) for seed in range(3)]
    return [*rows, Row(prompts(model)[3], add(sae, (2,), 3.0), (1,))]


def alone(model: LanguageModel, row: Row, sae: SparseAutoencoder) -> list[int]:
    return generation._generate_batch(model, [row], {AT: sae}, [N_NEW])[0]


@cache
def tokens_alone(architecture: str) -> list[list[int]]:
    """The tokens of each row of the grid, decoded alone."""
    model, sae = random_lm(architecture), made_sae()
    return [alone(model, row, sae) for row in grid(model, sae)]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_each_row_has_the_tokens_it_has_alone(architecture: str) -> None:
    model, sae = random_lm(architecture), made_sae()
    rows, wanted = grid(model, sae), tokens_alone(architecture)
    assert len(set(map(tuple, wanted))) > 10
    for batch_tokens in (10_000, 90):
        generated = generate(
            model, rows, {AT: sae}, max_new_tokens=N_NEW, batch_tokens=batch_tokens
        )
        assert generated == wanted


@pytest.mark.parametrize("min_accepted", [-1.0, 2.0])
def test_drafting_that_continues_or_ends_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, min_accepted: float
) -> None:
    model, sae = random_lm("llama"), made_sae()
    rows = grid(model, sae)
    monkeypatch.setattr(batching, "_MIN_ACCEPTED", min_accepted)
    monkeypatch.setattr(batching, "LOGIT_BYTES", 100_000)
    generated = generate(model, rows, {AT: sae}, max_new_tokens=N_NEW, batch_tokens=500)
    assert generated == tokens_alone("llama")


def test_rows_end_at_the_end_token() -> None:
    """Texts that end at the end token, before the limit, in drafts right and wrong."""
    model, sae = LanguageModel.wrap(random_hf("llama"), tokenizer()), made_sae()
    rows = grid(model, sae)
    free = tokens_alone("llama")
    model.__dict__["eos_ids"] = (free[0][2], free[2][4], free[-1][0])
    generated = generate(model, rows, {AT: sae}, max_new_tokens=N_NEW, batch_tokens=10_000)
    cut = []
    for row, tokens in zip(rows, free, strict=True):
        ends = [i for i, t in enumerate(tokens) if t in model.eos_ids]
        if row.sample is None:
            cut.append(tokens[: ends[0]] if ends else tokens)
        else:
            cut.append(alone(model, row, sae))
    assert generated == cut
    assert len({len(tokens) for tokens in generated}) > 3


def test_a_single_new_token() -> None:
    model, sae = random_lm("gpt2"), made_sae()
    rows = grid(model, sae)
    generated = generate(model, rows, {AT: sae}, max_new_tokens=1, batch_tokens=10_000)
    assert generated == [alone(model, row, sae)[:1] for row in rows]


def test_one_row_per_prompt_is_decoded_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak edits that change no token: one row per prompt is decoded, the others are verified."""
    model, sae = random_lm("llama"), made_sae()
    some = prompts(model)[:3]
    rows = [Row(i, add(sae, (n,), 1e-6), (1,)) for n in range(20) for i in some]
    real, generated = generation._generate_batch, []

    def counted(lm: LanguageModel, batch: list[Row], *rest: Any) -> list[list[int]]:
        generated.extend(batch)
        return real(lm, batch, *rest)

    monkeypatch.setattr(generation, "_generate_batch", counted)
    decoding = SpeculativeDecoding(model, {AT: sae}, N_NEW, 10_000)
    tokens_by_key = {row.key: tokens for batch in decoding.run(rows) for row, tokens in batch}
    assert len(generated) == 3
    assert decoding.n_accepted == decoding.n_verified > 0
    assert len(tokens_by_key) == 60
    monkeypatch.setattr(generation, "_generate_batch", real)
    assert all(tokens_by_key[row.key] == alone(model, row, sae) for row in rows)


def test_single_rows_of_a_prompt_need_no_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_lm("llama")

    def never(*_: object) -> None:
        raise AssertionError("a draft was verified")

    monkeypatch.setattr(generation, "greedy_tokens", never)
    rows = [Row(i) for i in prompts(model)]
    assert len(generate(model, rows, max_new_tokens=3, batch_tokens=1000)) == len(rows)


def test_rows_with_a_transcoder_are_drafted_too() -> None:
    model = random_lm("llama")
    generator = torch.Generator().manual_seed(5)
    source = Hookpoint(1, "mlp_in")
    sae = SparseAutoencoder(
        {
            "W_enc": torch.randn(D_MODEL, 48, generator=generator),
            "W_dec": torch.randn(48, D_MODEL, generator=generator),
            "b_enc": torch.zeros(48),
            "b_dec": torch.zeros(D_MODEL),
        },
        SAESettings(
            architecture="standard", hookpoint=source, hookpoint_out=Hookpoint(1, "mlp_out")
        ),
    )
    rows = [
        Row(ids, (Move(source, (n,), (n,), (c,), 1.0),), (1, 2), generated)
        for ids in prompts(model)[:2]
        for n in range(4)
        for c in (0.1, 3.0)
        for generated in (True, False)
    ]
    drafted = generate(model, rows, {source: sae}, max_new_tokens=N_NEW, batch_tokens=10_000)
    wanted = [generation._generate_batch(model, [row], {source: sae}, [N_NEW])[0] for row in rows]
    assert drafted == wanted


def test_a_grid_of_added_vectors() -> None:
    model, sae = random_lm("qwen2"), made_sae()
    rows = [
        Row(ids, (Add(AT, Vector(sae.W_dec[n]), c),), (len(ids) - 2,))
        for n in range(2)
        for c in (0.0, 0.3, 3.0)
        for ids in prompts(model)
    ]
    generated = generate(model, rows, {AT: sae}, max_new_tokens=N_NEW, batch_tokens=400)
    assert generated == [alone(model, row, sae) for row in rows]
