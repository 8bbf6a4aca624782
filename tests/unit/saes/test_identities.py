"""What holds for any SAE: columns of encode, directions as differences of decode, centring."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.models import Hookpoint
from saexp.registry import build
from saexp.saes import ARCHITECTURES, SAE
from tests.unit.saes.make import D_IN, D_SAE, K, points, sae

OPTIONS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "expected_average_only_in", "norm_factor": 0.2},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "layer_norm"},
    {"centre": True},
    {"centre": True, "normalize_activations": "expected_average_only_in", "norm_factor": 3.0},
]
RESCALED = [(a, {**o, "rescale_acts_by_decoder_norm": True}) for a in ("topk", "batchtopk")
            for o in OPTIONS]  # fmt: skip
EVERY = [(a, o) for a in ARCHITECTURES for o in OPTIONS] + RESCALED


@pytest.mark.parametrize(("architecture", "options"), EVERY)
def test_encode_latents_are_columns_of_encode(architecture: str, options: dict[str, Any]) -> None:
    autoencoder = sae(architecture, **options)
    x = points(3, 9, D_IN)
    acts = autoencoder.encode(x)
    assert isinstance(autoencoder, SAE)
    assert acts.shape == (3, 9, D_SAE)
    for chosen in ([7], [39, 0, 7, 7], list(range(D_SAE))):
        torch.testing.assert_close(autoencoder.encode_latents(x, chosen), acts[..., chosen])


@pytest.mark.parametrize(("architecture", "options"), EVERY)
def test_directions_are_what_a_unit_adds(architecture: str, options: dict[str, Any]) -> None:
    autoencoder = sae(architecture, **options)
    x = points(5, D_IN)
    acts, chosen = autoencoder.encode(x), [11, 3]
    directions = autoencoder.directions(chosen)
    own_scale = torch.ones(5, 1)
    if options.get("normalize_activations") == "constant_norm_rescale":
        own_scale = x.norm(dim=-1, keepdim=True) / D_IN**0.5
    elif options.get("normalize_activations") == "layer_norm":
        own_scale = x.std(dim=-1, keepdim=True)
    for row, latent in enumerate(chosen):
        raised = acts.clone()
        raised[:, latent] += 1
        added = autoencoder.decode(raised, x) - autoencoder.decode(acts, x)
        torch.testing.assert_close(added, own_scale * directions[row], rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=8, unique=True))
def test_an_edit_of_latents_needs_no_decode(chosen: list[int]) -> None:
    """Adding to latents and decoding is x + change @ directions (REFERENCE.md, section 4)."""
    autoencoder = sae("jumprelu", normalize_activations="expected_average_only_in", norm_factor=0.4)
    x = points(4, D_IN)
    acts = autoencoder.encode(x)
    change = torch.linspace(-1, 2, len(chosen)).expand(4, -1)
    edited = acts.clone()
    edited[:, chosen] += change
    direct = autoencoder.decode(acts) + change @ autoencoder.directions(chosen)
    torch.testing.assert_close(autoencoder.decode(edited), direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_centred_streams(architecture: str) -> None:
    """As gpt2-small-res-jb: means are taken off before encoding and put back after decoding."""
    plain, centred = sae(architecture), sae(architecture, centre=True)
    x = points(6, D_IN)
    mean = x.mean(dim=-1, keepdim=True)
    acts = plain.encode(x - mean)
    torch.testing.assert_close(centred.encode(x), acts)
    torch.testing.assert_close(centred.encode(x + 5), acts, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(centred.decode(acts, x), plain.decode(acts) + mean)


def test_topk_keeps_k_and_no_negative_ones() -> None:
    acts = sae("topk").encode(points(200, D_IN))
    counts = (acts != 0).sum(-1)
    assert counts.max() == K
    assert (acts >= 0).all()
    assert sae("topk", k=D_SAE).encode(points(2, D_IN)).shape == (2, D_SAE)


@pytest.mark.parametrize(
    "options",
    [
        {"centre": True},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
    ],
)
def test_decode_asks_for_the_input(options: dict[str, Any]) -> None:
    autoencoder = sae("standard", metadata={"name": "mine"}, **options)
    message = "mine scales or centres each input by itself; decode.feature_acts, x. needs the input"
    with pytest.raises(SAEError, match=message):
        autoencoder.decode(autoencoder.encode(points(2, D_IN)))


def test_only_an_sae_on_heads_flattens() -> None:
    """Three vectors of four numbers are not one of twelve, unless they are heads."""
    x = points(3, D_IN // 3)
    with pytest.raises(
        SAEError,
        match="the SAE reads vectors of 12 numbers, not of 4; is it an SAE of this model",
    ):
        sae().encode(x)
    assert sae(hookpoint=Hookpoint(3, "attn_z")).encode(x).shape == (D_SAE,)


def test_lower_precision_inputs_are_read_in_the_weights_dtype() -> None:
    autoencoder, x = sae("jumprelu"), points(8, D_IN).bfloat16()
    acts = autoencoder.encode(x)
    assert acts.dtype == torch.float32
    torch.testing.assert_close(acts, autoencoder.encode(x.float()))


def test_random_control() -> None:
    cfg = SAEConfig(name="random", loader="random", layer=2, width="1k", seed=4, device="cpu")
    autoencoder = build("sae", cfg, d_in=D_IN)
    again = build("sae", cfg, d_in=D_IN)
    other = build("sae", SAEConfig(name="r", loader="random", layer=2, width="1k"), d_in=D_IN)
    assert (autoencoder.d_in, autoencoder.d_sae, autoencoder.settings.k) == (D_IN, 1024, 32)
    assert autoencoder.hookpoint == Hookpoint(2, "resid_post")
    torch.testing.assert_close(autoencoder.W_dec.norm(dim=-1), torch.ones(1024))
    assert torch.equal(autoencoder.W_dec, again.W_dec)
    assert not torch.equal(autoencoder.W_dec, other.W_dec)
    assert autoencoder.metadata["fingerprint"] == again.metadata["fingerprint"]
    assert autoencoder.metadata["fingerprint"] != other.metadata["fingerprint"]
    with pytest.raises(SAEError, match=r"type sae.d_in=<d_model> layer=<block>"):
        build("sae", cfg)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_is_differentiable(architecture: str) -> None:
    """Writing over its own intermediate values loses no gradient, and no input is written to."""
    autoencoder, x = sae(architecture).double(), points(2, D_IN).double()
    original = x.clone()
    assert torch.autograd.gradcheck(autoencoder.encode, (x.requires_grad_(),))
    assert torch.equal(x.detach(), original)
