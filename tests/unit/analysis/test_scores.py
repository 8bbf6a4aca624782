"""Scores equal the formulas by hand, and find latents that were planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from saexp.analysis.latent_scores import input_scores, logit_lens_tokens, output_scores
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.models.hooks import capture
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import D_MODEL, N_LAYERS, VOCABULARY, random_hf, random_lm, tokenizer
from tests.unit.saes import make

LAST = Hookpoint(N_LAYERS - 1, "resid_post")
PROMPTS = [(1, 40, 77, 200), (1, 9, 60, 61, 62, 5)]
FIVE = pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen2"])


def make_sae(hookpoint=LAST, **options) -> SparseAutoencoder:
    weights = make.parameters("standard", D_MODEL)
    return SparseAutoencoder(
        weights, SAESettings(architecture="standard", hookpoint=hookpoint, **options)
    )


def lens_by_hand(model, direction):
    """Logits of a direction through the final norm without its bias, for the order of tokens."""
    base = model.hf.base_model
    names = ("norm", "ln_f", "final_layer_norm")
    norm = next(getattr(base, n) for n in names if hasattr(base, n))
    out = norm(1e3 * direction) - (norm.bias if getattr(norm, "bias", None) is not None else 0)
    return model.hf.get_output_embeddings().weight @ out


@FIVE
@torch.no_grad()
def test_logit_lens_tokens(architecture):
    model, sae = random_lm(architecture), make_sae()
    tokens = logit_lens_tokens(sae, model, [3, 0, 17], 6)
    for row, latent in zip(tokens, (3, 0, 17), strict=True):
        expected = lens_by_hand(model, sae.W_dec[latent]).topk(6).indices
        assert row.tolist() == expected.tolist()


def planted(architecture="llama", token=123):
    """A model with one loud token, and an SAE: latent 0 is that token's own unembedding row, latent
    1 a direction that does not touch it, and latent 2 is always on."""
    hf = random_hf(architecture, tie_word_embeddings=False)
    hf.get_output_embeddings().weight[token] *= 12
    model = LanguageModel.wrap(hf, tokenizer())
    weights = make.parameters("standard", D_MODEL)
    gain = hf.model.norm.weight
    own = gain * hf.get_output_embeddings().weight[token]
    other = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
    weights["W_dec"][0] = own / own.norm()
    weights["W_dec"][1] = other - (other @ own) * own / own.square().sum()
    weights["W_dec"][:2] /= weights["W_dec"][:2].norm(dim=1, keepdim=True)
    weights["b_enc"][2] = 50
    return model, SparseAutoencoder(weights, SAESettings(architecture="standard", hookpoint=LAST))


def test_a_planted_output_latent_has_a_high_score_and_a_random_one_a_low_score():
    model, sae = planted()
    table = output_scores(sae, model, [1, 0], PROMPTS).set_index("latent")
    assert table.loc[0, "output_score"] > 0.95
    assert table.loc[0, "top_token"] == 123
    assert table.loc[0, "top_rank"] == 0
    assert table.loc[1, "output_score"] < 0.1
    assert (table["output_score_clean"] < 0.6).all()


def test_a_planted_input_latent():
    """Latent 0 fires on its own token in 9 of 12 texts, latent 1 never on one of its tokens."""
    model, sae = planted()
    lens = logit_lens_tokens(sae, model, [0, 1], 5)
    assert lens[0, 0] == 123
    foreign = next(t for t in range(VOCABULARY) if t not in lens)
    ids = np.array([123] * 9 + [foreign] * 3)
    acts = np.zeros((12, sae.d_sae))
    acts[:, 0], acts[:, 1] = np.arange(1, 13), 2
    table = input_scores(sae, model, sparse.csr_array(acts), ids, [1, 0], 5)
    assert table["latent"].tolist() == [1, 0]
    assert table["input_score"].tolist() == [0, 0.75]
    assert table["n_examples"].tolist() == [12, 12]


def test_input_scores_by_hand():
    model, sae = random_lm("gpt2"), make_sae()
    rng = np.random.default_rng(0)
    acts = rng.gamma(1, 1, (300, sae.d_sae)) * (rng.random((300, sae.d_sae)) < 0.2)
    ids = rng.integers(0, VOCABULARY, 300)
    texts = np.repeat(np.arange(60), 5)
    latents = [5, 0, 21]
    lens = logit_lens_tokens(sae, model, latents, 80).tolist()
    table = input_scores(
        sae, model, sparse.csr_array(acts), ids, latents, 80, text_ids=texts, n_examples=25
    )
    for i, latent in enumerate(latents):
        best = []
        for text in range(60):
            rows = np.flatnonzero(texts == text)
            row = rows[acts[rows, latent].argmax()]
            if acts[row, latent] > 0:
                best.append((-acts[row, latent], row))
        chosen = [row for _, row in sorted(best)[:25]]
        expected = np.mean([ids[row] in lens[i] for row in chosen])
        assert table.loc[i, "input_score"] == pytest.approx(expected)
        assert table.loc[i, "n_examples"] == 25
    assert table["input_score"].between(0.02, 0.98).all()
    # Without texts every row is an example.
    rows = input_scores(sae, model, sparse.csr_array(acts), ids, latents, 80, n_examples=300)
    assert rows["n_examples"].tolist() == (acts[:, latents] > 0).sum(0).tolist()


def test_a_latent_with_few_examples_has_no_input_score():
    sae = make_sae()
    acts = np.zeros((20, sae.d_sae))
    acts[:9, 0], acts[:10, 1] = 1, 1
    table = input_scores(sae, random_lm("llama"), sparse.csr_array(acts), np.arange(20), [0, 1, 2])
    assert table["n_examples"].tolist() == [9, 10, 0]
    assert table["input_score"].isna().tolist() == [True, False, True]


@torch.no_grad()
def by_hand(model, sae, latent, prompt, coefficient, k):
    """Amplified and clean score of one latent and prompt, with a hook of its own."""
    ids = torch.tensor([prompt])
    with capture(model, [sae.hookpoint]) as record:
        clean = model.hf(ids).logits[0, -1]
    x = record[sae.hookpoint][0, -1]
    acts = sae.encode(x)
    more = acts.clone()
    more[latent] += coefficient * acts.max()
    moved = x + sae.decode(more, x) - sae.decode(acts, x)

    def amplify(_module, _args, output):
        new = (output if torch.is_tensor(output) else output[0]).clone()
        new[0, -1] = moved
        return new if torch.is_tensor(output) else (new, *output[1:])

    handle = model.blocks[sae.hookpoint.layer].register_forward_hook(amplify)
    after = model.hf(ids).logits[0, -1]
    handle.remove()
    tokens = logit_lens_tokens(sae, model, [latent], k)[0]
    scores = []
    for logits in (after, clean):
        p = torch.softmax(logits.double(), 0)
        order = p.argsort(descending=True).tolist()
        rank = min(order.index(t) for t in tokens.tolist())
        scores.append((1 - rank / VOCABULARY) * float(p[tokens].max()))
    return scores


@FIVE
@pytest.mark.parametrize("scaling", ["none", "layer_norm"])
def test_output_scores_by_hand(architecture, scaling):
    model = random_lm(architecture)
    sae = make_sae(Hookpoint(1, "resid_post"), normalize_activations=scaling)
    latents = [7, 0, 30]
    table = output_scores(sae, model, latents, PROMPTS, 4, 5)
    for i, latent in enumerate(latents):
        scores = np.mean([by_hand(model, sae, latent, p, 4, 5) for p in PROMPTS], axis=0)
        assert table.loc[i, "output_score"] == pytest.approx(scores[0], rel=1e-3, abs=1e-6)
        assert table.loc[i, "output_score_clean"] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
    assert (table["output_score"] != table["output_score_clean"]).all()


def test_batches_do_not_matter():
    model, sae = random_lm("qwen2"), make_sae(Hookpoint(0, "resid_post"))
    latents = list(range(20))
    together = output_scores(sae, model, latents, PROMPTS)
    few = output_scores(sae, model, latents, PROMPTS, batch_tokens=7)
    pd.testing.assert_frame_equal(together, few, atol=1e-5, rtol=1e-3)


def test_a_transcoder_is_read_and_written_at_its_own_places():
    model = random_lm("llama")
    weights = make.parameters("standard", D_MODEL, d_out=D_MODEL)
    sae = SparseAutoencoder(
        weights,
        SAESettings(
            architecture="standard",
            hookpoint=Hookpoint(1, "mlp_in"),
            hookpoint_out=Hookpoint(1, "mlp_out"),
        ),
    )
    table = output_scores(sae, model, [0, 1, 2], PROMPTS)
    assert table["output_score"].between(0, 1).all()
    assert (table["output_score"] != table["output_score_clean"]).all()


def test_no_latent_asked_for():
    table = output_scores(make_sae(), random_lm("llama"), [], PROMPTS)
    assert list(table.columns) == [
        "latent",
        "output_score",
        "output_score_clean",
        "top_token",
        "top_rank",
        "top_probability",
    ]
    assert table.empty


class TestErrors:
    def test_a_stream_without_a_logit_lens(self):
        sae = make_sae(Hookpoint(1, "mlp_in"))
        with pytest.raises(SAEError, match="writes to mlp_in, which is not added"):
            logit_lens_tokens(sae, random_lm("llama"), [0])

    def test_a_latent_that_is_not_there(self):
        with pytest.raises(SAEError, match="^latent=40 is out of range: .* has latents 0-39"):
            output_scores(make_sae(), random_lm("llama"), [0, 40], PROMPTS)

    def test_nothing_to_amplify_by(self):
        sae = make_sae()
        sae.b_enc -= 1e6
        with pytest.raises(SAEError, match="^no latent is active at .* neutral prompt 0"):
            output_scores(sae, random_lm("llama"), [0], PROMPTS)

    @pytest.mark.parametrize("prompts", [[], [()]])
    def test_no_prompt(self, prompts):
        with pytest.raises(SAEError, match="need one or more neutral prompts"):
            output_scores(make_sae(), random_lm("llama"), [0], prompts)
