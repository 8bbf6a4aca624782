"""The collectors of other libraries give the values of `collector=hf`."""

import importlib.util
from pathlib import Path

import pytest
import torch

from saexp import registry
from saexp.activations import ActivationStore
from saexp.activations.collection import collect
from saexp.activations.collector import (
    CollectionRequest,
    NnsightCollector,
    TransformerLensCollector,
)
from saexp.config import CollectorConfig, StoreConfig
from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import random_hf, random_lm, save
from tests.unit.activations.collecting import MAX_LENGTH, placed, run

STREAMS = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_out", "resid_post")
HOOKPOINTS = [Hookpoint(layer, stream) for layer in (0, 1) for stream in STREAMS]


def collected(name: str, model: LanguageModel, cache: Path) -> ActivationStore:
    collector = registry.build(
        "collector", CollectorConfig(name=name), model=model, store=StoreConfig(batch_tokens=100)
    )
    request = CollectionRequest(positions=placed(), hookpoints=HOOKPOINTS, max_length=MAX_LENGTH)
    return collect(collector, request, cache_dir=cache)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_library_gives_the_same_activations(
    library: str, architecture: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    model = LanguageModel(save(random_hf(architecture), tmp_path / "model"))
    store = collected(library, model, tmp_path)
    expected, _ = run(model, tmp_path, HOOKPOINTS)
    assert store.path != expected.path
    for at in HOOKPOINTS:
        acts, known = (s.acts(at.layer, at.stream) for s in (store, expected))
        torch.testing.assert_close(acts, known, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is not None, reason="nnsight is installed")
def test_a_library_that_is_missing_names_its_extra(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"type pip install 'saexp\[nnsight\]'$"):
        collected("nnsight", random_lm("llama"), tmp_path)


def test_a_model_in_memory_is_refused_where_files_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is in memory; use collector=hf"):
        collected("transformer_lens", random_lm("llama"), tmp_path)


def test_other_libraries_have_keys_of_their_own() -> None:
    model, request = (
        random_lm("llama"),
        CollectionRequest(positions=placed(), hookpoints=HOOKPOINTS, max_length=MAX_LENGTH),
    )
    names = {TransformerLensCollector: "transformer_lens", NnsightCollector: "nnsight"}
    for kind, name in names.items():
        collector = kind(CollectorConfig(name=name), model=model, store=StoreConfig())
        assert collector.ingredients(request)["collector"] == name
