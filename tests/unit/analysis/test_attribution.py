"""Direct effects equal logits computed by hand; gradients equal finite differences and ablation."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import sparse
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from saexp.analysis import top_latents
from saexp.analysis.top_latents import MIN_ACTIVE, Attribution, attribute
from saexp.errors import DataError
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.stats import mean_interval
from tests.random_models import (
    D_MODEL,
    N_LAYERS,
    PARALLEL,
    VOCABULARY,
    hooks_left,
    random_hf,
    random_lm,
    tokenizer,
)
from tests.unit.saes import make

FIVE = pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen2"])
LAST = Hookpoint(N_LAYERS - 1, "resid_post")
MIDDLE = Hookpoint(1, "resid_post")
_GENERATOR = torch.Generator().manual_seed(8)
PROMPTS = [
    tuple(torch.randint(3, VOCABULARY, (n,), generator=_GENERATOR).tolist()) for n in (6, 9, 4, 9)
]
ENDS = [[len(p) - 1] for p in PROMPTS]
SOME = [[2, 5], [1], [0, 1, 3], [4, 8]]
ANSWERS, FOILS = [5, 7, 300, 11], [6, 100, 8, 12]


def make_sae(hookpoint, d_in=D_MODEL, architecture="standard", **options) -> SparseAutoencoder:
    weights = make.parameters(architecture, d_in)
    return SparseAutoencoder(
        weights, SAESettings(architecture=architecture, hookpoint=hookpoint, **options)
    )


@cache
def double(architecture, **options):
    return LanguageModel.wrap(random_hf(architecture, **options).double(), tokenizer())


@pytest.fixture()
def float64(monkeypatch):
    """Models compute their RMSNorms and softmaxes in float32, whatever their dtype; here not."""
    softmax = torch.nn.functional.softmax

    def exact(x, dim, dtype=None):  # noqa: ARG001
        return softmax(x, dim)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)
    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Gemma2RMSNorm):

        def forward(self, x, gemma=norm is Gemma2RMSNorm):
            eps = self.eps if gemma else self.variance_epsilon
            gain = 1 + self.weight if gemma else self.weight
            return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

        monkeypatch.setattr(norm, "forward", forward)


def stream_of(model, prompt, hookpoint):
    with torch.no_grad(), capture(model, [hookpoint]) as record:
        logits = model.hf(torch.tensor([prompt])).logits[0, -1]
    return record[hookpoint][0], logits


def frozen_norm(model, x, at):
    """The final norm of x with the scale of `at`, from its definition."""
    base = model.hf.base_model
    if hasattr(base, "ln_f") or hasattr(base, "final_layer_norm"):
        norm = base.ln_f if hasattr(base, "ln_f") else base.final_layer_norm
        scale = (at.var(unbiased=False) + norm.eps).sqrt()
        return norm.weight * (x - x.mean()) / scale + norm.bias
    gemma = "Gemma" in type(base).__name__
    eps = base.norm.eps if gemma else base.norm.variance_epsilon
    gain = 1 + base.norm.weight if gemma else base.norm.weight
    return gain * x / (at.square().mean() + eps).sqrt()


@FIVE
@pytest.mark.parametrize("foils", [None, FOILS])
def test_direct_effects_are_those_of_frozen_logits(architecture, foils):
    model, sae = random_lm(architecture), make_sae(LAST)
    attribution = attribute(model, sae, PROMPTS, ENDS, ANSWERS, foils)
    head = model.hf.get_output_embeddings()
    assert attribution.direct is not None
    direct = attribution.direct.toarray()
    for i, prompt in enumerate(PROMPTS[:2]):
        stream, _ = stream_of(model, prompt, LAST)
        x = stream[-1]
        acts = sae.encode(x)

        def logit(y, x=x, i=i):
            logits = head(frozen_norm(model, y, x))
            return float(logits[ANSWERS[i]] - (logits[foils[i]] if foils else 0))

        active = acts.nonzero()[:, 0].tolist()
        assert 5 < len(active) < sae.d_sae
        assert np.flatnonzero(direct[i]).tolist() == active
        for latent in active:
            without = x - acts[latent] * sae.W_dec[latent]
            assert direct[i, latent] == pytest.approx(logit(x) - logit(without), abs=1e-4, rel=1e-4)
    assert attribution.notes == (
        ["direct effects are of logits before the soft-cap at 30; gradients are of those after it"]
        if architecture == "gemma2"
        else []
    )


@FIVE
@pytest.mark.parametrize(
    ("stream", "scaling"),
    [("resid_post", "none"), ("resid_mid", "layer_norm"), ("mlp_out", "none"), ("attn_z", "none")],
)
@pytest.mark.usefixtures("float64")
def test_gradients_equal_finite_differences(architecture, stream, scaling):
    """Of the true logits, in float64, with every position of a latent moved together."""
    if architecture in PARALLEL and stream == "resid_mid":
        stream = "resid_pre"
    model, point = double(architecture), Hookpoint(1, stream)
    width = stream_of(model, PROMPTS[0], point)[0].shape[-1]
    sae = make_sae(point, width, normalize_activations=scaling).double()
    attribution = attribute(model, sae, PROMPTS, SOME, ANSWERS, FOILS)
    gradient = attribution.gradient.toarray()
    step = 1e-5
    for i in (2,):
        values, logits = stream_of(model, PROMPTS[i], point)
        x = values[SOME[i]]
        acts = sae.encode(x)
        difference = float(logits[ANSWERS[i]] - logits[FOILS[i]])
        assert attribution.logit[i] == pytest.approx(difference, abs=1e-9)
        for latent in acts.sum(0).nonzero()[:3, 0].tolist():
            only = torch.zeros_like(acts)
            only[:, latent] = acts[:, latent]
            moved = sae.decode(only, x) - sae.decode(0 * only, x)
            ends = []
            for size in (step, -step):

                def move(x, size=size, moved=moved, i=i):
                    new = x.clone()
                    new[0, SOME[i]] += size * moved
                    return new

                with edit(model, {point: move}):
                    _, after = stream_of(model, PROMPTS[i], point)
                ends.append(float(after[ANSWERS[i]] - after[FOILS[i]]))
            expected = (ends[0] - ends[1]) / (2 * step)
            assert gradient[i, latent] == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("foils", [None, FOILS])
@pytest.mark.usefixtures("float64")
def test_where_the_rest_is_linear_all_three_are_the_effect_of_ablation(foils):
    """Later blocks add nothing, and an epsilon of 1e8 makes the final norm's scale constant."""
    model = double("llama", rms_norm_eps=1e8)
    for block in model.blocks[2:]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    sae = make_sae(MIDDLE).double()
    attribution = attribute(model, sae, PROMPTS, ENDS, ANSWERS, foils)
    assert attribution.direct is not None
    for i, prompt in enumerate(PROMPTS):
        values, logits = stream_of(model, prompt, MIDDLE)
        acts = sae.encode(values[-1])
        for latent in acts.nonzero()[:6, 0].tolist():

            def ablate(x, latent=latent, acts=acts):
                new = x.clone()
                new[0, -1] -= acts[latent] * sae.W_dec[latent]
                return new

            with edit(model, {MIDDLE: ablate}):
                _, after = stream_of(model, prompt, MIDDLE)
            effect = (logits - after)[ANSWERS[i]] - ((logits - after)[foils[i]] if foils else 0)
            assert attribution.gradient[i, latent] == pytest.approx(float(effect), rel=1e-4)
            assert attribution.direct[i, latent] == pytest.approx(float(effect), rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_batches_and_chunks_do_not_matter(architecture, monkeypatch):
    model, sae = random_lm(architecture), make_sae(MIDDLE)
    together = attribute(model, sae, PROMPTS, SOME, ANSWERS, FOILS)
    monkeypatch.setattr(top_latents, "CHUNK_BYTES", 1)
    alone = attribute(model, sae, PROMPTS, SOME, ANSWERS, FOILS, batch_tokens=1)
    for name in ("activation", "direct", "gradient"):
        one, other = getattr(together, name), getattr(alone, name)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_allclose(one.toarray(), other.toarray(), atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(together.logit, alone.logit, atol=1e-4)
    assert np.abs(together.gradient.toarray()).max() > 0.05


def test_positions_add_up():
    model, sae = random_lm("llama"), make_sae(MIDDLE)
    both = attribute(model, sae, PROMPTS[:1], [[2, 5]], [5])
    parts = [attribute(model, sae, PROMPTS[:1], [[p]], [5]) for p in (2, 5)]
    for name in ("activation", "direct", "gradient"):
        expected = sum(getattr(p, name).toarray() for p in parts)
        np.testing.assert_allclose(getattr(both, name).toarray(), expected, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_a_transcoders_latents_act_where_it_writes():
    model = double("qwen2")
    weights = {**make.parameters("standard", D_MODEL, d_out=D_MODEL)}
    reads, writes = Hookpoint(2, "mlp_in"), Hookpoint(2, "mlp_out")
    sae = SparseAutoencoder(
        weights, SAESettings(architecture="standard", hookpoint=reads, hookpoint_out=writes)
    ).double()
    attribution = attribute(model, sae, PROMPTS, ENDS, ANSWERS, FOILS)
    values, _ = stream_of(model, PROMPTS[1], reads)
    acts = sae.encode(values[-1])
    np.testing.assert_allclose(attribution.activation.toarray()[1], acts.numpy())
    at_end = attribute(model, make_sae(LAST).double(), PROMPTS, ENDS, ANSWERS, FOILS)
    np.testing.assert_allclose(attribution.logit, at_end.logit)
    # In the last block what the MLP adds is part of the final stream.
    final, _ = stream_of(model, PROMPTS[1], LAST)
    assert attribution.direct is not None
    for latent in acts.nonzero()[:5, 0].tolist():
        norms = [
            frozen_norm(model, final[-1] - c * acts[latent] * sae.W_dec[latent], final[-1])
            for c in (0, 1)
        ]
        logits = [model.hf.get_output_embeddings()(n) for n in norms]
        change = logits[0] - logits[1]
        expected = float(change[ANSWERS[1]] - change[FOILS[1]])
        assert attribution.direct[1, latent] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_stream_that_is_not_added_has_no_direct_effect():
    attribution = attribute(
        random_lm("llama"), make_sae(Hookpoint(1, "mlp_in")), PROMPTS, ENDS, ANSWERS
    )
    assert attribution.direct is None
    assert attribution.notes == [
        "mlp_in is not added to the residual stream, so no latent has a direct effect"
    ]
    table = attribution.table(["a"] * 4)
    assert table[["direct", "direct_ci_low", "direct_ci_high"]].isna().all(axis=None)
    assert table["gradient"].notna().all()


@pytest.mark.usefixtures("float64")
def test_sums_of_direct_effects_make_up_the_logit():
    """With the SAE's bias and error, the latents' effects are the whole linear logit."""
    model, sae = double("llama"), make_sae(LAST).double()
    attribution = attribute(model, sae, PROMPTS, ENDS, ANSWERS, FOILS)
    assert attribution.direct is not None
    for i, prompt in enumerate(PROMPTS):
        values, _ = stream_of(model, prompt, LAST)
        x = values[-1]
        rest = x - sae.encode(x) @ sae.W_dec
        logits = model.hf.get_output_embeddings()(frozen_norm(model, rest, x))
        others = float(logits[ANSWERS[i]] - logits[FOILS[i]])
        total = float(attribution.direct[[i]].sum()) + others
        assert total == pytest.approx(float(attribution.logit[i]), rel=1e-6)


def test_the_table_of_groups():
    gradient = np.array([[1.0, 0, -4], [3, 0, 0], [0, 5, 0]])
    csr = sparse.csr_array(gradient)
    attribution = Attribution(sparse.csr_array(csr * 2), csr, csr, np.zeros(3), [])
    table = attribution.table(["a", "a", "b"])
    assert table["group"].tolist() == ["a", "a", "b"]
    assert table["latent"].tolist() == [0, 2, 1]
    assert table["gradient"].tolist() == [2, -2, 5]
    assert table["activation"].tolist() == [4, -4, 10]
    assert table["n_active"].tolist() == [2, 1, 1]
    assert table["n_prompts"].tolist() == [2, 2, 1]
    assert table["n_units"].tolist() == [2, 2, 1]
    with pytest.raises(DataError, match="^2 groups for 3 prompts"):
        attribution.table(["a", "b"])
    with pytest.raises(DataError, match="^1 units for 3 prompts"):
        attribution.table(["a", "a", "b"], ["x"])


def test_means_and_intervals_are_over_entities():
    rng = np.random.default_rng(1)
    shape, rates = (60, 6), [0.9, 0.7, 0.5, 0.4, 0.3, 0.02]
    matrices = [
        sparse.csr_array(rng.normal(0.4, 1.0, shape) * (rng.random(shape) < rates))
        for _ in range(3)
    ]
    for matrix in matrices[1:]:
        matrix.data[:] = rng.normal(0.4, 1.0, matrix.nnz)
    attribution = Attribution(matrices[0], matrices[1], matrices[2], np.zeros(60), [])
    # Entities of one to three prompts; those of the second group are fewer than an interval needs.
    sizes = [1, 2, 3] * 8 + [2] * 6
    units = np.repeat([f"entity {i}" for i in range(30)], sizes)
    groups = ["a"] * 48 + ["b"] * 12
    table = attribution.table(groups, units.tolist()).set_index(["group", "latent"])
    for name, values in zip(("activation", "direct", "gradient"), matrices, strict=True):
        dense = values.toarray()
        entities = np.stack([dense[units == f"entity {i}"].mean(0) for i in range(24)])
        for latent in np.flatnonzero(dense[:48].any(0)):
            row = table.loc[("a", latent)]
            assert row[name] == pytest.approx(entities[:, latent].mean())
            low, high = mean_interval(entities[:, [latent]], 0)
            if (entities[:, latent] != 0).sum() < MIN_ACTIVE:
                low = high = [np.nan]
            bounds = [row[f"{name}_ci_low"], row[f"{name}_ci_high"]]
            assert bounds == pytest.approx([low[0], high[0]], nan_ok=True)
    assert table.loc["a", "gradient_ci_low"].notna().sum() >= 4
    assert table.loc[("a", 5), "gradient_ci_low"] != table.loc[("a", 5), "gradient_ci_low"]
    assert table["n_units"].unique().tolist() == [24, 6]
    assert table.loc["b", "gradient_ci_low"].isna().all()
    alone = attribution.table(["a"] * 60, ["one entity"] * 60)
    assert alone["gradient_ci_low"].isna().all()


def test_no_latent_active():
    sae = make_sae(MIDDLE)
    sae.b_enc -= 1e6
    attribution = attribute(random_lm("gpt2"), sae, PROMPTS, ENDS, ANSWERS)
    assert attribution.gradient.shape == (4, sae.d_sae)
    assert attribution.gradient.nnz == 0
    assert attribution.table(["a", "b", "a", "b"]).empty


def test_nothing_is_left_on_the_model():
    model = LanguageModel.wrap(random_hf("gemma2"), tokenizer())
    before = model.fingerprint
    with torch.inference_mode():
        attribute(model, make_sae(MIDDLE), PROMPTS, ENDS, ANSWERS)
    assert not hooks_left(model.hf)
    assert all(p.grad is None for p in model.hf.parameters())
    assert model.fingerprint == before


class TestErrors:
    @pytest.mark.parametrize("bad", [[], [6], [-1]])
    def test_positions(self, bad):
        with pytest.raises(DataError, match="^prompt 0 has positions .* all between 0 and 5$"):
            attribute(random_lm("gpt2"), make_sae(LAST), PROMPTS[:1], [bad], [1])

    def test_lengths(self):
        with pytest.raises(DataError, match="^1 answers for 4 prompts"):
            attribute(random_lm("gpt2"), make_sae(LAST), PROMPTS, ENDS, [1])
        with pytest.raises(DataError, match="^2 foils for 4 prompts"):
            attribute(random_lm("gpt2"), make_sae(LAST), PROMPTS, ENDS, ANSWERS, [1, 2])

    def test_nothing(self):
        with pytest.raises(DataError, match="^attribution needs at least one prompt"):
            attribute(random_lm("gpt2"), make_sae(LAST), [], [], [])
