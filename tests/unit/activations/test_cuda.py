"""Collection on a GPU, where there is one: overlapped copies, memory, and the CPU's values."""

import logging
from typing import Any

import pytest
import torch

from saexp.models.loading import LanguageModel
from tests.random_models import STORED, random_hf, random_lm, tokenizer
from tests.unit.activations.collecting import POSTS, placed, run
from tests.unit.activations.test_prefixes import MIXED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("architecture", STORED)
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_values_of_many_overlapping_batches_are_the_cpus(architecture, share_prefixes, tmp_path):
    model = LanguageModel.wrap(random_hf(architecture).cuda(), tokenizer(), "on the GPU")
    settings = {"placement": placed(MIXED * 3), "batch_tokens": 64}
    store, stats = run(model, tmp_path / "gpu", **settings, share_prefixes=share_prefixes)
    cpu, _ = run(random_lm(architecture), tmp_path / "cpu", **settings, share_prefixes=False)
    assert stats.tokens_forwarded > 0
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), cpu.acts(layer), atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_blocks_on_two_devices_give_the_values_of_one(tmp_path):
    from accelerate import dispatch_model

    hf = random_hf("llama")
    places: dict[str, Any] = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.norm": 1,
        "lm_head": 1,
    }
    places |= {f"model.layers.{n}": int(n > 0) for n in range(3)}
    model = LanguageModel.wrap(dispatch_model(hf, places), tokenizer(), "on two GPUs")
    settings = {"placement": placed(MIXED * 3), "batch_tokens": 64}
    store, _ = run(model, tmp_path / "gpus", **settings)
    cpu, _ = run(random_lm("llama"), tmp_path / "cpu", **settings)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), cpu.acts(layer), atol=1e-4, rtol=1e-3)


def test_the_budget_halves_on_real_lack_of_memory(tmp_path, caplog):
    model = LanguageModel.wrap(random_hf("llama").cuda(), tokenizer(), "on the GPU")
    fill = torch.empty(0)
    total = torch.cuda.mem_get_info()[1]

    def hog(_, args, kwargs):
        n_texts = (args[0] if args else kwargs["hidden_states"]).shape[0]
        nonlocal fill
        fill = torch.empty(total * n_texts // 8, dtype=torch.uint8, device="cuda")
        fill = torch.empty(0)

    model.blocks[0].register_forward_pre_hook(hog, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        store, _ = run(model, tmp_path / "gpu", POSTS)
    assert any("out of memory" in m for m in caplog.messages)
    cpu, _ = run(random_lm("llama"), tmp_path / "cpu", POSTS)
    for layer in range(3):
        torch.testing.assert_close(store.acts(layer), cpu.acts(layer), atol=1e-4, rtol=1e-3)
