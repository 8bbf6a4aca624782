"""What stands in the stream once an SAE is spliced in: equal to hooks written by hand."""

import pytest
import torch
from torch import Tensor

from saexp.latents import replacement_edit, splice_edits
from saexp.models import Hookpoint
from saexp.models.hooks import capture, edit
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import ARCHITECTURES, D_MODEL, VOCABULARY, random_hf, random_lm
from tests.unit.saes.make import parameters

D_SAE = 80
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
AT = Hookpoint(1, "resid_post")
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sae(architecture: str = "jumprelu", at: Hookpoint = AT, **options) -> SparseAutoencoder:
    weights = parameters(architecture, D_MODEL, D_SAE)
    weights["W_dec"] /= 20
    return SparseAutoencoder(
        weights, SAESettings(architecture=architecture, hookpoint=at, **options)
    )


def perfect(at: Hookpoint = AT) -> SparseAutoencoder:
    """relu(x) - relu(-x) is x, bit by bit."""
    one = torch.eye(D_MODEL)
    weights = {
        "W_enc": torch.cat([one, -one], dim=1),
        "W_dec": torch.cat([one, -one]),
        "b_enc": torch.zeros(2 * D_MODEL),
        "b_dec": torch.zeros(D_MODEL),
    }
    return SparseAutoencoder(weights, SAESettings(architecture="standard", hookpoint=at))


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    return model.hf(IDS).logits


def logits_by_hand(model: LanguageModel, autoencoder: SparseAutoencoder, mask: Tensor) -> Tensor:
    def hook(_module, _args, output):
        stream = output if torch.is_tensor(output) else output[0]
        out = torch.empty_like(stream)
        for row in range(stream.shape[0]):
            for token in range(stream.shape[1]):
                x = stream[row, token]
                out[row, token] = (
                    autoencoder.decode(autoencoder.encode(x), x) if mask[row, token] else x
                )
        return out if torch.is_tensor(output) else (out, *output[1:])

    handle = model.blocks[autoencoder.hookpoint.layer].register_forward_hook(hook)
    try:
        return logits(model)
    finally:
        handle.remove()


@EVERY
@pytest.mark.parametrize("mask", [MASK, None], ids=["some", "all"])
def test_equals_a_hook_written_by_hand(architecture: str, mask: Tensor | None) -> None:
    model, autoencoder = random_lm(architecture), sae()
    everywhere = torch.ones_like(MASK) if mask is None else mask
    with edit(model, splice_edits(autoencoder, mask)):
        got = logits(model)
    torch.testing.assert_close(
        got, logits_by_hand(model, autoencoder, everywhere), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(got, logits(model), atol=1e-2)


@EVERY
def test_positions_of_high_norm_keep_their_activations(architecture: str) -> None:
    model, autoencoder, left = random_lm(architecture), sae(), []
    with capture(model, [AT]) as seen:
        logits(model)
    norms = seen[AT].norm(dim=-1)
    limit = 1.0001 * float(norms[MASK].median())
    with edit(model, splice_edits(autoencoder, MASK, limits={AT: limit}, excluded=left.append)):
        got = logits(model)
    low = MASK & (norms <= limit)
    torch.testing.assert_close(got, logits_by_hand(model, autoencoder, low), rtol=1e-4, atol=1e-4)
    assert left == [int((MASK & ~low).sum())]
    assert left[0] > 0


@EVERY
def test_a_perfect_sae_changes_no_bit(architecture: str) -> None:
    model = random_lm(architecture)
    before = logits(model)
    with edit(model, splice_edits(perfect(), MASK)):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_with_the_error_kept_nothing_changes_where_the_latents_do_not(architecture: str) -> None:
    model, autoencoder = random_lm("llama"), sae(architecture)
    before = logits(model)
    for change in (None, lambda acts: acts, lambda acts: acts.clone()):
        with edit(model, splice_edits(autoencoder, MASK, error=True, change=change)):
            assert torch.equal(logits(model), before)


def test_a_changed_latent_with_the_error_kept_adds_its_direction() -> None:
    model, autoencoder = random_lm("qwen2"), sae()

    def more(acts: Tensor) -> Tensor:
        new = acts.clone()
        new[:, 5] += 3
        return new

    with (
        edit(model, splice_edits(autoencoder, MASK, error=True, change=more)),
        capture(model, [AT]) as after,
    ):
        logits(model)
    with capture(model, [AT]) as before:
        logits(model)
    expected = before[AT] + 3 * MASK[..., None] * autoencoder.directions([5])
    torch.testing.assert_close(after[AT], expected, rtol=1e-4, atol=1e-4)


def test_outside_the_mask_every_bit_stays() -> None:
    model = random_lm("gpt2")
    with edit(model, splice_edits(sae(), MASK)), capture(model, [AT]) as after:
        logits(model)
    with capture(model, [AT]) as before:
        logits(model)
    assert torch.equal(after[AT][~MASK], before[AT][~MASK])
    assert (after[AT][MASK] != before[AT][MASK]).any(-1).all()


@pytest.mark.parametrize("error", [False, True])
def test_a_transcoder_reads_one_stream_and_writes_another(error: bool) -> None:
    model = random_lm("llama")
    into, out = Hookpoint(1, "mlp_in"), Hookpoint(1, "mlp_out")
    autoencoder = SparseAutoencoder(
        {**parameters("standard", D_MODEL, D_SAE), "W_skip": torch.eye(D_MODEL) / 3},
        SAESettings(architecture="standard", hookpoint=into, hookpoint_out=out),
    )
    with capture(model, [into, out]) as before:
        logits(model)
    with (
        edit(model, splice_edits(autoencoder, MASK, error=error)),
        capture(model, [into, out]) as after,
    ):
        logits(model)
    x = before[into]
    guess = autoencoder.decode(autoencoder.encode(x), x)
    expected = torch.where(MASK[..., None], before[out] if error else guess, before[out])
    assert torch.equal(after[into], before[into])
    torch.testing.assert_close(after[out], expected, rtol=1e-4, atol=1e-4)


def test_a_stream_in_half_precision_stays_so() -> None:
    model = LanguageModel.wrap(random_hf("llama").bfloat16())
    with edit(model, splice_edits(sae(), MASK)), capture(model, [AT]) as after:
        logits(model)
    assert after[AT].dtype == torch.bfloat16


def test_one_vector_or_one_per_position() -> None:
    stream = torch.randn(2, 7, D_MODEL)
    one = torch.randn(D_MODEL)
    many = torch.randn(int(MASK.sum()), D_MODEL)
    original = stream.clone()
    for values in (one, many):
        new = replacement_edit(values, MASK)(stream)
        assert torch.equal(new[MASK], values.expand(len(many), -1))
        assert torch.equal(new[~MASK], stream[~MASK])
    assert torch.equal(stream, original)
