"""Evaluations equal a plain loop over texts with hooks by hand, however they are cut and shared."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from saexp import latents
from saexp.analysis import evaluation as module
from saexp.analysis.evaluation import (
    Evaluation,
    EvaluationSettings,
    can_be_scored,
    densities,
    evaluate_saes,
    l0_table,
    numbers,
)
from saexp.analysis.evaluation_passes import Passes, Where, make_batch
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.stats import ratio_interval
from tests.random_models import (
    ARCHITECTURES,
    D_MODEL,
    TEXTS,
    hooks_left,
    random_hf,
    random_lm,
    tokenizer,
)
from tests.unit.analysis.evaluation_by_hand import by_hand
from tests.unit.latents.test_splice import perfect, sae
from tests.unit.saes.make import parameters

TOKENS = tokenize([*TEXTS, "a b", TEXTS[0][:20]], tokenizer(), 40)
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def with_special_inside(text: TokenizedText) -> TokenizedText:
    """An end-of-text token in the middle."""
    n = len(text) // 2
    return TokenizedText(
        text.text,
        (*text.ids[:n], 2, *text.ids[n:]),
        (*text.offsets[:n], (0, 0), *text.offsets[n:]),
        (*text.special[:n], True, *text.special[n:]),
        False,
    )


def transcoder(layer: int = 1, stream: str = "mlp_in") -> SparseAutoencoder:
    return SparseAutoencoder(
        {**parameters("jumprelu", D_MODEL, 50), "W_skip": torch.eye(D_MODEL) / 3},
        SAESettings(
            architecture="jumprelu",
            hookpoint=Hookpoint(layer, stream),
            hookpoint_out=Hookpoint(layer, "mlp_out"),
        ),
    )


@cache
def model_with_sinks() -> LanguageModel:
    """Tokens that begin some texts, after <bos>, have a huge norm in the residual stream."""
    hf = random_hf("llama")
    sinks = {text.ids[1] for text in TOKENS[:3]}
    hf.get_input_embeddings().weight[list(sinks)] *= 300
    return LanguageModel.wrap(hf, tokenizer(), name="random-llama-with-sinks")


def assert_equal_by_hand(
    one: Evaluation,
    model: LanguageModel,
    autoencoder: SparseAutoencoder,
    texts: list[TokenizedText],
    where: Where | None = None,
    ratio: float = float("inf"),
) -> None:
    sums, metrics, fired = by_hand(model, autoencoder, texts, where or Where(), ratio)
    for name in sums:
        np.testing.assert_allclose(
            one.texts[name], sums[name], rtol=1e-3, atol=2e-3, err_msg=str(name)
        )
    got = numbers(one, 0, 0)
    plain = {k: v for k, v in got.items() if "_ci_" not in k}
    assert plain == pytest.approx(metrics, rel=2e-3, abs=1e-4, nan_ok=True)
    np.testing.assert_array_equal(densities(one)["n_active"], fired)


def assert_same(one: Evaluation, other: Evaluation, rtol: float = 1e-4) -> None:
    assert list(one.texts) == list(other.texts)
    for name in one.texts:
        np.testing.assert_allclose(
            one.texts[name], other.texts[name], rtol=rtol, atol=1e-3, err_msg=str(name)
        )
    np.testing.assert_array_equal(one.stream.n_active, other.stream.n_active)
    np.testing.assert_array_equal(one.l0_histogram, other.l0_histogram)


@EVERY
def test_equals_a_plain_loop(architecture: str) -> None:
    model = random_lm(architecture)
    saes = [sae("jumprelu", Hookpoint(1, "resid_post"))]
    (one,) = evaluate_saes(model, saes, TOKENS[3:6])
    assert one.resumed
    assert_equal_by_hand(one, model, saes[0], TOKENS[3:6])


@pytest.mark.parametrize(
    ("architecture", "at"),
    [
        ("gpt2", Hookpoint(0, "embed")),
        ("gemma2", Hookpoint(0, "embed")),
        ("gpt2", Hookpoint(0, "resid_pre")),
        ("gemma2", Hookpoint(0, "mlp_out")),
        ("gpt2", Hookpoint(2, "mlp_out")),
        ("gemma2", Hookpoint(2, "resid_pre")),
        ("gpt2", Hookpoint(1, "resid_mid")),
        ("gemma2", Hookpoint(1, "resid_mid")),
        ("gpt2", Hookpoint(1, "mlp_in")),
        ("gemma2", Hookpoint(1, "mlp_in")),
        ("gpt2", Hookpoint(1, "attn_out")),
        ("gemma2", Hookpoint(1, "attn_out")),
        ("gpt2", Hookpoint(2, "resid_post")),
    ],
    ids=str,
)
def test_every_stream(architecture: str, at: Hookpoint) -> None:
    model, autoencoder = random_lm(architecture), sae("gated", at)
    (one,) = evaluate_saes(model, [autoencoder], TOKENS[:2])
    assert_equal_by_hand(one, model, autoencoder, TOKENS[:2])


def test_heads_of_attention() -> None:
    model, at = random_lm("llama"), Hookpoint(1, "attn_z")
    autoencoder = SparseAutoencoder(
        parameters("standard", D_MODEL, 40), SAESettings(architecture="standard", hookpoint=at)
    )
    (one,) = evaluate_saes(model, [autoencoder], TOKENS)
    assert_equal_by_hand(one, model, autoencoder, TOKENS)


@pytest.mark.parametrize(
    "options",
    [{"normalize_activations": "layer_norm"}, {"centre": True}, {"k": 7, "architecture": "topk"}],
    ids=str,
)
def test_saes_whose_scale_depends_on_the_row(options: dict) -> None:
    autoencoder = sae(**{"architecture": "standard", **options})
    model = random_lm("gpt_neox")
    (one,) = evaluate_saes(model, [autoencoder], TOKENS[:4])
    assert_equal_by_hand(one, model, autoencoder, TOKENS[:4])


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_transcoders(architecture: str) -> None:
    model, autoencoder = random_lm(architecture), transcoder()
    (one,) = evaluate_saes(model, [autoencoder], TOKENS[:4])
    assert_equal_by_hand(one, model, autoencoder, TOKENS[:4])


@pytest.mark.parametrize(
    "where",
    [
        Where(splice_special=True),
        Where(ablate_special=True),
        Where(score_special=True),
        Where(splice_special=True, ablate_special=True, score_special=True),
    ],
    ids=str,
)
def test_where_special_tokens_count(where: Where) -> None:
    texts = [with_special_inside(t) for t in TOKENS[:3]]
    model, autoencoder = random_lm("qwen2"), sae()
    (one,) = evaluate_saes(model, [autoencoder], texts, EvaluationSettings(where=where))
    assert_equal_by_hand(one, model, autoencoder, texts, where)
    (plain,) = evaluate_saes(model, [autoencoder], texts)
    assert not np.allclose(plain.texts["ce_zero"], one.texts["ce_zero"]) or where.splice_special


@pytest.mark.parametrize(
    ("autoencoder", "where", "memory"),
    [
        (sae("jumprelu", Hookpoint(1, "resid_post")), Where(), "small"),
        (
            sae("gated", Hookpoint(0, "embed")),
            Where(splice_special=True, ablate_special=True),
            "large",
        ),
        (transcoder(stream="resid_mid"), Where(), "small"),
        (transcoder(stream="resid_mid"), Where(), "large"),
    ],
    ids=["resid_post", "embed with special tokens", "transcoder", "transcoder at once"],
)
def test_high_norm_positions_are_left_as_they_are(
    autoencoder: SparseAutoencoder, where: Where, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks at token 1 of texts (by their norm, not their position), with and without caches."""
    model, texts = model_with_sinks(), TOKENS
    if memory == "small":
        # Passes of single positions are slow: short texts with sinks, and one without.
        texts = [TOKENS[-1], TOKENS[2]]
        for name in ("KEPT_BYTES", "STREAM_BYTES", "LOGIT_BYTES"):
            monkeypatch.setattr(module, name, {"cpu": 1})
        monkeypatch.setattr(latents, "CHUNK_BYTES", 1)
    settings = EvaluationSettings(where=where, max_norm_ratio=5.0)
    (one,) = evaluate_saes(model, [autoencoder], texts, settings)
    assert_equal_by_hand(one, model, autoencoder, texts, where, 5.0)
    n = one.texts["n_high_norm"]
    assert 0 < n.sum() < one.texts["n_spliced"].sum()
    assert f"{n.sum()} of {(n + one.texts['n_spliced']).sum()} positions" in one.notes[0]
    if memory == "large":
        (plain,) = evaluate_saes(model, [autoencoder], texts, EvaluationSettings(where=where))
        assert plain.texts["n_spliced"].sum() == (n + one.texts["n_spliced"]).sum()
        assert plain.notes == []


def test_without_high_norms_the_limit_changes_nothing() -> None:
    model, autoencoder = random_lm("llama"), sae()
    (one,) = evaluate_saes(model, [autoencoder], TOKENS, EvaluationSettings(max_norm_ratio=5.0))
    (plain,) = evaluate_saes(model, [autoencoder], TOKENS)
    pd.testing.assert_frame_equal(one.texts, plain.texts)
    assert numbers(one, 20, 0) == pytest.approx(numbers(plain, 20, 0), nan_ok=True)


def test_a_perfect_sae_loses_nothing() -> None:
    (one,) = evaluate_saes(random_lm("llama"), [perfect()], TOKENS)
    got = numbers(one, 50, 0)
    assert got["reconstruction/ce_sae"] == got["reconstruction/ce_clean"]
    assert got["reconstruction/ce_increase"] == 0
    assert got["reconstruction/kl_sae"] == pytest.approx(0, abs=1e-6)
    for name in ("ce_loss_score", "ce_loss_score_mean", "kl_score", "explained_variance"):
        value = got[f"reconstruction/{name}"]
        assert np.isnan(value) or value == pytest.approx(1, abs=1e-5), name
    assert got["reconstruction/kl_score"] == pytest.approx(1, abs=1e-5)
    assert got["reconstruction/relative_bias"] == pytest.approx(1)


def test_an_sae_of_zeros_is_zero_ablation() -> None:
    autoencoder = perfect()
    autoencoder.W_dec.zero_()
    (one,) = evaluate_saes(random_lm("llama"), [autoencoder], TOKENS)
    np.testing.assert_array_equal(one.texts["ce_sae"], one.texts["ce_zero"])
    np.testing.assert_array_equal(one.texts["kl_sae"], one.texts["kl_zero"])
    assert numbers(one, 0, 0)["reconstruction/kl_score"] == 0
    assert np.isnan(numbers(one, 0, 0)["reconstruction/relative_bias"])


def test_an_sae_that_gives_the_mean_is_mean_ablation() -> None:
    model, autoencoder = random_lm("mistral"), perfect()
    (first,) = evaluate_saes(model, [autoencoder], TOKENS)
    autoencoder.W_dec.zero_()
    autoencoder.b_dec[:] = first.stream.mean.float()
    (one,) = evaluate_saes(model, [autoencoder], TOKENS)
    np.testing.assert_allclose(one.texts["ce_sae"], one.texts["ce_mean"], rtol=1e-5)
    got = numbers(one, 0, 0)
    assert got["reconstruction/explained_variance"] == pytest.approx(0, abs=1e-5)
    assert got["reconstruction/kl_score_mean"] == pytest.approx(0, abs=1e-5)


@cache
def of_two_saes(architecture: str) -> list[Evaluation]:
    return evaluate_saes(random_lm(architecture), [sae(), transcoder()], TOKENS)


@pytest.mark.parametrize(
    ("architecture", "padding_side", "batch_tokens"),
    [
        ("gpt2", "left", 40),
        ("gpt2", "left", 64),
        ("gpt2", "right", 100_000),
        ("gemma3", "left", 100_000),
        ("gemma3", "right", 1),
        ("gemma3", "right", 64),
    ],
)
def test_batches_and_padding_change_no_number(
    architecture: str, padding_side: str, batch_tokens: int
) -> None:
    settings = EvaluationSettings(batch_tokens=batch_tokens, padding_side=padding_side)
    some = evaluate_saes(random_lm(architecture), [sae(), transcoder()], TOKENS, settings)
    for one, other in zip(some, of_two_saes(architecture), strict=True):
        assert_same(one, other)


def test_saes_together_equal_saes_alone() -> None:
    model = random_lm("llama")
    saes = [
        sae("jumprelu", Hookpoint(0, "resid_post")),
        sae("standard", Hookpoint(0, "resid_post")),
        sae("jumprelu", Hookpoint(2, "resid_pre")),
        sae("gated", Hookpoint(2, "resid_post")),
        transcoder(),
    ]
    together = evaluate_saes(model, saes, TOKENS)
    for autoencoder, one in zip(saes, together, strict=True):
        assert_same(one, evaluate_saes(model, [autoencoder], TOKENS)[0])


def test_small_memory_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean passes run again, one position of logits at a time, states scored one by one."""
    model, saes = random_lm("gemma2"), [sae(), sae("standard")]
    before = evaluate_saes(model, saes, TOKENS[5:])
    monkeypatch.setattr(latents, "CHUNK_BYTES", 1)
    # Several chunks of a batch of several texts, then batches of a text.
    of_chunks = evaluate_saes(model, saes, TOKENS[5:])
    for name in ("LOGIT_BYTES", "KEPT_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(module, name, {"cpu": 1})
    for results in (of_chunks, evaluate_saes(model, saes, TOKENS[5:])):
        for one, other in zip(results, before, strict=True):
            assert_same(one, other)


def test_blocks_that_carry_more_than_the_stream_are_all_run() -> None:
    """Block 0 hands block 2 something past the stream; skipping it would lose that."""
    model = LanguageModel.wrap(random_hf("llama"), tokenizer())
    carried: list[Tensor] = []
    model.blocks[0].mlp.register_forward_hook(lambda _m, _a, out: carried.append(out))
    model.blocks[2].register_forward_hook(
        lambda _m, _a, out: out + carried.pop() if carried else out
    )
    (one,) = evaluate_saes(model, [sae()], TOKENS[:3])
    assert not one.resumed
    carried.clear()
    assert_equal_by_hand(one, model, sae(), TOKENS[:3])


@EVERY
def test_logits_are_the_models_own(architecture: str) -> None:
    """Also where it caps, scales or biases them after its LM head."""
    model = random_lm(architecture)
    passes = Passes(model)
    batch = make_batch(TOKENS, [0, 2], Where(), pad_id=0, device=model.device)
    with torch.inference_mode():
        clean = passes.clean(batch, [Hookpoint(1, "resid_post")])
        got = passes.logits(clean.hidden)
    for row, index in enumerate([0, 2]):
        with torch.no_grad():
            whole = model.hf(torch.tensor([TOKENS[index].ids])).logits[0]
        logits = got[batch.texts_of(batch.compared) == index]
        torch.testing.assert_close(logits, whole[1:], rtol=1e-4, atol=1e-4), row


def test_no_hook_and_no_forward_is_left_behind() -> None:
    model = random_lm("llama")
    with pytest.raises(RuntimeError):
        broken = sae()
        broken.W_dec = broken.W_dec[:, :-1]
        evaluate_saes(model, [broken], TOKENS)
    evaluate_saes(model, [sae()], TOKENS)
    assert hooks_left(model.hf) == []
    assert not any("forward" in part.__dict__ for part in model.hf.modules())


def test_half_precision_models() -> None:
    model = LanguageModel.wrap(random_hf("llama").bfloat16(), tokenizer())
    (one,) = evaluate_saes(model, [sae()], TOKENS)
    (full,) = evaluate_saes(random_lm("llama"), [sae()], TOKENS)
    got, exact = (numbers(e, 0, 0) for e in (one, full))
    for name in ("ce_clean", "ce_zero"):
        key = f"reconstruction/{name}"
        assert got[key] == pytest.approx(exact[key], rel=0.05)


def test_what_can_be_scored() -> None:
    def text(*special: bool) -> TokenizedText:
        n = len(special)
        return TokenizedText("t", tuple(range(3, 3 + n)), ((0, 1),) * n, special, False)

    assert can_be_scored(text(True, False, False), Where())
    assert not can_be_scored(text(True, False), Where())
    assert not can_be_scored(text(False, True, False), Where())
    assert can_be_scored(text(True, False), Where(score_special=True))
    assert not can_be_scored(text(True, True), Where(score_special=True))
    assert can_be_scored(text(True, True), Where(score_special=True, splice_special=True))


def test_histogram_and_densities_add_up() -> None:
    (one,) = evaluate_saes(random_lm("llama"), [sae()], TOKENS)
    l0, per_latent, got = l0_table(one), densities(one), numbers(one, 0, 0)
    n = got["sparsity/n_positions"]
    assert l0["n_positions"].sum() == n
    assert np.average(l0["n_active"], weights=l0["n_positions"]) == pytest.approx(
        got["sparsity/l0"]
    )
    assert per_latent["n_active"].sum() / n == pytest.approx(got["sparsity/l0"])
    assert (per_latent["frequency"] == 0).mean() == got["sparsity/dead_fraction"]
    assert per_latent["max_active"].max() == got["sparsity/max_active"]
    value = (per_latent["n_active"] * per_latent["mean_active"]).sum()
    assert value / per_latent["n_active"].sum() == pytest.approx(got["sparsity/mean_active"])
    assert one.texts["n_spliced"].sum() == n


def test_intervals_are_of_the_ratios_of_sums_over_texts() -> None:
    """Every number is its numerator over its denominator, summed; limits are `ratio_interval`'s."""
    texts = [TOKENS[i % len(TOKENS)] for i in range(40)]
    (one,) = evaluate_saes(random_lm("llama"), [sae()], texts)
    got = numbers(one, 2000, 3)
    assert got == numbers(one, 2000, 3)
    t = {str(name): one.texts[name].to_numpy() for name in one.texts}
    expected = {
        "reconstruction/ce_increase": (t["ce_sae"] - t["ce_clean"], t["n_scored"]),
        "reconstruction/kl_score": (t["kl_zero"] - t["kl_sae"], t["kl_zero"]),
        "reconstruction/explained_variance": (t["spread"] - t["error"], t["spread"]),
        "sparsity/l0": (t["active"], t["n_spliced"]),
    }
    for name, (above, below) in expected.items():
        low, high = ratio_interval(above[:, None].astype(float), below[:, None].astype(float), 3)
        assert got[name] == pytest.approx(above.sum() / below.sum())
        assert got[f"{name}_ci_low"] == pytest.approx(low[0])
        assert got[f"{name}_ci_high"] == pytest.approx(high[0])
        assert got[f"{name}_ci_low"] <= got[name] <= got[f"{name}_ci_high"]


def test_texts_of_one_entity_are_drawn_together() -> None:
    """Four copies of each text, one entity: intervals are those of the texts once."""
    whole = " ".join(TEXTS)
    texts = tokenize([whole[5 * i : 11 * i + 20] for i in range(12)], tokenizer(), 40)
    once, often = (evaluate_saes(random_lm("llama"), [sae()], t)[0] for t in (texts, texts * 4))
    want = numbers(once, 500, 3)
    got = numbers(often, 500, 3, units=[f"entity {i}" for i in range(12)] * 4)
    alone = numbers(often, 500, 3)
    for name in ("reconstruction/ce_sae", "reconstruction/kl_score", "sparsity/l0"):
        for end in (f"{name}_ci_low", f"{name}_ci_high"):
            assert got[end] == pytest.approx(want[end], rel=1e-4)
        assert alone[f"{name}_ci_low"] > want[f"{name}_ci_low"]


def test_one_text_has_no_interval() -> None:
    (one,) = evaluate_saes(random_lm("llama"), [sae()], TOKENS[:1])
    got = numbers(one, 100, 0)
    assert got["evaluation/n_units"] == 1
    assert got["reconstruction/ce_sae_ci_low"] is None
    assert got["reconstruction/ce_sae"] is not None


def test_clean_passes_that_are_not_kept_are_repeated_with_equal_results() -> None:
    model, n_passes = random_lm("llama"), 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1

    handle = model.blocks[0].register_forward_pre_hook(count)
    results, passes = [], []
    for keep in (True, False):
        n_passes = 0
        settings = EvaluationSettings(batch_tokens=40, keep_passes=keep)
        results.append(evaluate_saes(model, [sae()], TOKENS, settings)[0])
        passes.append(n_passes)
    handle.remove()
    assert passes[1] > passes[0]
    assert_same(*results)
