"""What is computed from a bfloat16 model is accumulated in float32 or wider.

The oracle is the same quantity in float64 from the very streams and logits that the model gives;
beside it the same weights in float32, within what bfloat16 (8 bits) leaves.
"""

import copy
import json
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from saexp.activations.stream import ActivationStream, ContextActivations, StreamSettings
from saexp.analysis.evaluation import evaluate_saes, numbers
from saexp.analysis.evaluation_passes import Passes, Where, make_batch
from saexp.analysis.top_latents import attribute
from saexp.config.groups import CorpusConfig
from saexp.data.corpora import tokenized
from saexp.data.documents import TokenizerInfo
from saexp.data.tokenization import tokenize
from saexp.interventions.cached_generation import LogitReader, divergences, generate, read_logits
from saexp.interventions.generation import _Drawing, last_logits
from saexp.interventions.outcomes import mean_loss
from saexp.interventions.stream_edits import Add, BatchEdit, Row, Sampling, Vector
from saexp.latents import encode_rows, splice_edits
from saexp.models import Hookpoint
from saexp.models.hooks import attention_to, capture
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, TEXTS, VOCABULARY, random_hf, tokenizer
from tests.unit.latents.test_splice import sae

AT = Hookpoint(1, "resid_post")
LAST = Hookpoint(2, "resid_post")
TOKENS = tokenize(TEXTS, tokenizer(), 40)
IDS = tuple(TOKENS[0].ids)
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
SEVERAL = pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])


@cache
def pair(architecture: str) -> tuple[LanguageModel, LanguageModel]:
    """(bfloat16, float32) models with equal weights, which no test changes."""
    half = random_hf(architecture).bfloat16()
    full = copy.deepcopy(half).float()
    return LanguageModel.wrap(half, tokenizer()), LanguageModel.wrap(full, tokenizer())


def steered(coefficient: float) -> Row:
    return Row(IDS, (Add(AT, Vector(DIRECTION), coefficient),), (3, len(IDS) - 1))


def whole(_row: Row, logits: torch.Tensor) -> np.ndarray:
    assert logits.dtype == torch.float32
    return logits.numpy()


@SEVERAL
def test_the_streams_are_near_those_in_float32(architecture):
    half, full = pair(architecture)
    ids = torch.tensor([IDS])
    with torch.no_grad(), capture(half, [LAST]) as low, capture(full, [LAST]) as exact:
        half.hf(ids)
        full.hf(ids)
    assert low[LAST].dtype == torch.bfloat16
    distance = (low[LAST].float() - exact[LAST]).norm(dim=-1) / exact[LAST].norm(dim=-1)
    assert 0 < float(distance.max()) < 0.05


@SEVERAL
def test_logits_are_read_in_float32_without_a_further_rounding(architecture):
    half, full = pair(architecture)
    reader = LogitReader(whole, "all", lambda row: len(row.ids))
    (logits,) = read_logits(half, [Row(IDS)], None, reader, batch_tokens=1000)
    (exact,) = read_logits(full, [Row(IDS)], None, reader, batch_tokens=1000)
    raw = last_logits(half, [Row(IDS)], None, len(IDS))[0]
    assert raw.dtype == torch.bfloat16
    assert np.array_equal(logits, raw.double().numpy())
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@SEVERAL
def test_losses_are_sums_in_float32(architecture):
    half, full = pair(architecture)
    targets = list(IDS[1:])
    reader = LogitReader(
        lambda _row, logits: mean_loss(logits[:-1], targets), "loss", lambda row: len(row.ids)
    )
    (loss,) = read_logits(half, [Row(IDS)], None, reader, batch_tokens=1000)
    (exact,) = read_logits(full, [Row(IDS)], None, reader, batch_tokens=1000)
    wide = last_logits(half, [Row(IDS)], None, len(IDS))[0, :-1].double().log_softmax(-1)
    by_hand = -wide[torch.arange(len(targets)), targets].mean()
    assert loss[0] == pytest.approx(float(by_hand), rel=1e-6)
    assert loss[0] == pytest.approx(exact[0], rel=0.02)


@SEVERAL
def test_divergences_are_sums_in_float32(architecture):
    half, full = pair(architecture)
    row = steered(8.0)
    (kl,) = divergences(half, [row], None, batch_tokens=1000)
    (exact,) = divergences(full, [row], None, batch_tokens=1000)
    logits = last_logits(half, [Row(IDS), row], None, len(IDS) - 1).double().log_softmax(-1)
    before, after = logits
    by_hand = (before.exp() * (before - after)).sum(-1).mean()
    assert kl == pytest.approx(float(by_hand), rel=1e-5)
    assert kl == pytest.approx(exact, rel=0.1)
    assert divergences(half, [steered(0.0)], None, batch_tokens=1000) == [0.0]


@SEVERAL
def test_a_steered_stream_is_the_sum_rounded_once(architecture):
    half, _ = pair(architecture)
    ids = torch.tensor([IDS])
    with torch.no_grad(), capture(half, [AT]) as before:
        half.hf(ids)
    change = BatchEdit([steered(3.3)], len(IDS), {}, half.device).functions(len(IDS))
    new = change[AT](before[AT])
    expected = before[AT].clone()
    for token in (3, len(IDS) - 1):
        expected[0, token] = (before[AT][0, token].float() + 3.3 * DIRECTION).bfloat16()
    assert torch.equal(new, expected)


@SEVERAL
def test_latents_are_those_of_the_stream_in_float32(architecture):
    half, _ = pair(architecture)
    with torch.no_grad(), capture(half, [AT]) as streams:
        half.hf(torch.tensor([IDS]))
    x, autoencoder = streams[AT][0], sae()
    assert x.dtype == torch.bfloat16
    every, rows = np.arange(len(x)), pd.DataFrame({"row": range(len(x))})
    low, high = (encode_rows(acts, every, autoencoder, rows) for acts in (x, x.float()))
    assert (low[0].csr != high[0].csr).nnz == 0
    assert low[1] == high[1]
    change = splice_edits(autoencoder)[AT]
    reconstruction = autoencoder.decode(autoencoder.encode(x.float()), x.float())
    assert torch.equal(change(x[None])[0], reconstruction.bfloat16())


@SEVERAL
def test_evaluations_add_up_in_float32(architecture):
    half, full = pair(architecture)
    (low,) = evaluate_saes(half, [sae()], TOKENS)
    (exact,) = evaluate_saes(full, [sae()], TOKENS)
    passes = Passes(half)
    batch = make_batch(TOKENS, range(len(TOKENS)), Where(), pad_id=half.pad_id, device=half.device)
    with torch.inference_mode():
        clean = passes.clean(batch, [AT])
        logits = passes.logits(clean.hidden)
    assert logits.dtype == torch.float32
    wide = logits.double().log_softmax(-1)
    targets = batch.targets
    scored = targets >= 0
    by_hand = -wide[scored].gather(1, targets[scored][:, None]).mean()
    got, reference = (numbers(e, 0, 0) for e in (low, exact))
    assert got["reconstruction/ce_clean"] == pytest.approx(float(by_hand), rel=2e-3)
    tolerances = {
        "reconstruction/ce_clean": 0.02,
        "reconstruction/ce_sae": 0.02,
        "reconstruction/ce_zero": 0.02,
        "reconstruction/kl_sae": 0.1,
        "reconstruction/kl_zero": 0.1,
        "reconstruction/mse": 0.02,
        "reconstruction/explained_variance": 0.02,
        "reconstruction/median_norm": 0.01,
        "sparsity/l0": 0.02,
        "sparsity/mean_active": 0.02,
    }
    for name, tolerance in tolerances.items():
        assert got[name] == pytest.approx(reference[name], rel=tolerance), name


@SEVERAL
def test_attribution_multiplies_in_float32(architecture):
    half, full = pair(architecture)
    prompts, positions = [IDS, IDS[:9]], [[len(IDS) - 1], [8]]
    autoencoder, answers, foils = sae(at=LAST), [7, 30], [11, 200]
    low = attribute(half, autoencoder, prompts, positions, answers, foils)
    exact = attribute(full, autoencoder, prompts, positions, answers, foils)
    for name in ("direct", "gradient"):
        values, reference = (getattr(one, name).toarray() for one in (low, exact))
        distance = np.linalg.norm(values - reference) / np.linalg.norm(reference)
        assert 0 < distance < 0.1, (name, distance)
    logits = torch.stack([last_logits(half, [Row(p)])[0, -1] for p in prompts]).double()
    rows = torch.arange(2)
    by_hand = logits[rows, torch.tensor(answers)] - logits[rows, torch.tensor(foils)]
    assert np.allclose(low.logit, by_hand, atol=0.05)


@SEVERAL
def test_attention_adds_up_to_one(architecture):
    half, full = pair(architecture)
    ids = torch.tensor([IDS])
    mask = torch.ones_like(ids)
    keys = mask.bool()
    assert float((attention_to(half, ids, mask, keys) - 1).abs().max()) < 0.01
    keys[0, : len(IDS) // 2] = False
    attention, exact = (attention_to(model, ids, mask, keys) for model in (half, full))
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, exact, atol=0.03, rtol=0)


@SEVERAL
def test_greedy_tokens_are_those_of_transformers(architecture):
    half, _ = pair(architecture)
    (tokens,) = generate(half, [Row(IDS)], max_new_tokens=8, batch_tokens=1000)
    with torch.inference_mode():
        theirs = half.hf.generate(
            torch.tensor([IDS]), max_new_tokens=8, do_sample=False, pad_token_id=half.pad_id
        )
    assert tokens == [t for t in theirs[0, len(IDS) :].tolist() if t not in half.eos_ids]


def test_samples_are_drawn_from_probabilities_in_float32():
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(200, VOCABULARY, generator=generator) * 4).bfloat16()
    rows = [Row((i,), sample=Sampling(0.7, i)) for i in range(200)]
    alive = torch.arange(200)
    low, wide = (
        _Drawing(rows, 1, torch.device("cpu")).draw(x, 0, alive) for x in (logits, logits.float())
    )
    assert torch.equal(low, wide)


def test_a_stream_of_activations_keeps_the_models_dtype(tmp_path):
    half, _ = pair("llama")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 8), "utf-8")
    cfg = CorpusConfig(name="corpus", path=str(path))
    info = TokenizerInfo(half.tokenizer, half.tokenizer_fingerprint, True)
    corpus = tokenized(cfg, info, 32, str(tmp_path / "cache"))
    for dtype in (None, torch.float32):
        settings = StreamSettings(buffer_rows=64, batch_size=16, max_norm_ratio=10.0, dtype=dtype)
        contexts = np.arange(len(corpus))
        source = ContextActivations(half, corpus, contexts, [AT], settings)
        stream = ActivationStream(source, settings)
        batch = next(stream)[AT]
        assert batch.dtype == (dtype or torch.bfloat16)
        tensors, _ = stream.state()
        assert tensors[AT.name].dtype == batch.dtype
        # The limit comes from norms in float64 of what the model gave.
        values, _ = source.forward(contexts)
        norms = values[AT].double().norm(dim=-1)
        assert stream.mean_norms[AT] == pytest.approx(float(norms.mean()), rel=1e-12)
        assert source.limits[AT] == pytest.approx(10 * float(norms.median()), rel=1e-12)
