"""Neuronpedia links: ids of the catalogue, SAELens' addresses, None where there is none."""

import json
import webbrowser
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from saexp.config import SAEConfig
from saexp.errors import SAEError
from saexp.saes import SparseAutoencoder
from saexp.saes.catalogue import (
    catalogue,
    entries,
    neuronpedia_id,
    neuronpedia_list,
    neuronpedia_url,
)
from saexp.saes.loading import random_sae


def sae_with(identity: Any) -> SparseAutoencoder:
    sae = random_sae(SAEConfig(name="r", loader="random", layer=3, d_in=8, width=64, device="cpu"))
    sae.metadata["neuronpedia_id"] = identity
    return sae


RELEASES = {
    "gemma-scope-2b-pt-res-canonical": "gemma-2-2b/12-gemmascope-res-16k",
    "gpt2-small-res-jb": "gpt2-small/8-res-jb",
    "llama_scope_lxr_8x": "llama3.1-8b/7-llamascope-res-32k",
}


@pytest.mark.parametrize(("release", "identity"), RELEASES.items())
def test_links_are_made_of_the_catalogues_ids(release: str, identity: str) -> None:
    there = {e.neuronpedia for e in entries(release)}
    assert identity in there
    assert neuronpedia_url(sae_with(identity), 5) == f"https://neuronpedia.org/{identity}/5"


def test_every_id_of_the_catalogue_makes_a_link() -> None:
    sae = sae_with(None)
    identities = {
        s["neuronpedia"] for r in catalogue().values() for s in r["saes"] if "neuronpedia" in s
    }
    for identity in identities - {None}:
        sae.metadata["neuronpedia_id"] = identity
        assert neuronpedia_url(sae, 0) == f"https://neuronpedia.org/{identity}/0"
    assert len(identities) > 1000


def test_without_an_id_there_is_no_link_whatever_the_model() -> None:
    sae = sae_with(None)
    sae.metadata["model"] = "google/gemma-2-2b"
    assert neuronpedia_id(sae) is None
    assert neuronpedia_url(sae, 5) is None
    assert neuronpedia_list(sae, [5, 6]) is None


@pytest.mark.usefixtures("lens")
def test_the_list_is_saelens_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.analysis.neuronpedia_integration import get_neuronpedia_quick_list

    monkeypatch.setattr(webbrowser, "open", lambda _: True)
    about = SimpleNamespace(neuronpedia_id="gpt2-small/8-res-jb", model_name="gpt2-small")
    theirs: Any = SimpleNamespace(cfg=SimpleNamespace(metadata=about))
    expected = get_neuronpedia_quick_list(theirs, [7, 3, 60], name="my list & more")
    actual = neuronpedia_list(sae_with("gpt2-small/8-res-jb"), [7, 3, 60], "my list & more")
    assert actual == expected


def test_the_lists_latents_can_be_read_back_in_order() -> None:
    url = neuronpedia_list(sae_with("gemma-2-2b/12-gemmascope-res-16k"), [9, 2])
    assert url is not None
    (features,) = parse_qs(urlparse(url).query)["features"]
    source = {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k"}
    assert json.loads(features) == [{**source, "index": "9"}, {**source, "index": "2"}]


def test_latents_that_cannot_be_linked_are_reported() -> None:
    sae = sae_with("a/b")
    with pytest.raises(
        SAEError,
        match=r"latent 64: random control, layer_3.resid_post, width 64, seed 0 has latents 0-63",
    ):
        neuronpedia_url(sae, 64)
    with pytest.raises(SAEError, match="at least one latent"):
        neuronpedia_list(sae, [])
    with pytest.raises(SAEError, match="'gemma-2-2b' is not of the form <model>/<source>"):
        neuronpedia_url(sae_with("gemma-2-2b"), 1)
