"""SAEs by name, encoding and the most active latents of the interactive API."""

import pytest
import torch

import saexp
from saexp.api.model import InteractiveModel
from saexp.errors import SAEError
from saexp.saes import SparseAutoencoder

TEXTS = ["The player Fenlet Baszad scored twice.", "The city lies on the river.", "Yes"]


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return saexp.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return saexp.load_sae("tiny", layer=2, device="cpu")


@torch.inference_mode()
def test_encode_equals_the_sae_on_the_activations(
    model: InteractiveModel, sae: SparseAutoencoder
) -> None:
    latents = saexp.encode(model, sae, TEXTS)
    acts = model.activations(TEXTS, sae.hookpoint.layer, stream=sae.hookpoint.stream)
    torch.testing.assert_close(latents.dense(), sae.encode(torch.cat(acts)))
    assert latents.rows.groupby("text").size().tolist() == [len(a) for a in acts]
    ids = [i for text in TEXTS for i in model.tokenizer(text)["input_ids"]]
    assert latents.rows["token_id"].tolist() == ids
    assert saexp.encode(model, sae, "Yes", positions="last").dense().shape == (1, sae.d_sae)
    assert saexp.encode(model, sae, []).dense().shape == (0, sae.d_sae)


@torch.inference_mode()
def test_top_latents_are_the_largest_activations_of_each_token(
    model: InteractiveModel, sae: SparseAutoencoder
) -> None:
    dense = saexp.encode(model, sae, TEXTS[0]).dense()
    table = saexp.top_latents(model, sae, TEXTS[0], k=5)
    assert list(table) == ["token_index", "token", "rank", "latent", "activation"]
    for index, values in enumerate(dense):
        here = table[table["token_index"] == index]
        expected = values.topk(5).values
        expected = expected[expected > 0]
        assert here["activation"].tolist() == expected.tolist()
        assert values[here["latent"].tolist()].tolist() == expected.tolist()
        assert here["rank"].tolist() == list(range(1, len(expected) + 1))


def test_an_sae_loads_by_name_and_from_its_folder(sae: SparseAutoencoder) -> None:
    again = saexp.load_sae(sae.metadata["path"], device="cpu")
    assert torch.equal(again.W_dec, sae.W_dec)
    assert saexp.load_sae("tiny", layer=1).hookpoint.layer == 1
    assert saexp.load_sae("tiny_control", layer=2).d_sae == 256


def test_a_catalogue_release_is_found_by_its_name() -> None:
    with pytest.raises(SAEError, match="gpt2-small-res-jb has no SAE at layer=99"):
        saexp.load_sae("gpt2-small-res-jb", layer=99)
    with pytest.raises(SAEError, match="layer"):
        saexp.load_sae("gpt2-small-res-jb")


def test_errors_of_saes_are_one_line() -> None:
    with pytest.raises(SAEError, match="type layer=2"):
        saexp.load_sae("tiny")
    with pytest.raises(SAEError, match="no such folder"):
        saexp.load_sae("./nothing/here")
