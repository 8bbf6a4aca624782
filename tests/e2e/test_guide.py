"""The guide for users of SAELens: both versions of each step run, and saexp's is no longer."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import saexp
from tests.random_models import D_MODEL, tokenizer
from tests.shipped_texts import texts_of

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "coming-from-saelens.md"
N_LINES = {
    "Load a model and an SAE": 2,
    "Features of a prompt as a tensor": 2,
    "Top latents of each token": 2,
    "Steer one latent while generating": 3,
    "Ablate one latent and compare logits": 3,
    "Layer-2 activations of a list of strings": 1,
    "Contrast two lists of strings": 1,
}
"""Step -> the number of lines that it may take."""
STEP = re.compile(
    r"## ([^\n]+)\n\n\*\*SAELens \+ TransformerLens\*\*\n\n```python\n(.*?)```\n\n"
    r"\*\*saexp\*\*\n\n```python\n(.*?)```",
    re.DOTALL,
)
STEPS = {title: (lens, ours) for title, lens, ours in STEP.findall(PAGE.read_text("utf-8"))}


def names() -> dict[str, Any]:
    return {
        "saexp": saexp,
        "prompt": "My name is",
        "texts": ["The player scored twice.", "It rains in the city."],
        "known": texts_of("known"),
        "unknown": texts_of("unknown"),
    }


def test_every_step_is_at_most_as_long_as_the_other_version() -> None:
    assert list(STEPS) == list(N_LINES)
    for title, (lens, ours) in STEPS.items():
        assert len(ours.splitlines()) <= min(N_LINES[title], len(lens.splitlines())), title
        assert len(ours) <= len(lens), title


def test_the_code_runs_on_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = names()
    for _, ours in STEPS.values():
        code = ours.replace('"gpt2-small-res-jb", layer=8', '"tiny", layer=2')
        exec(code.replace('"gpt2"', '"tiny", device="cpu"'), namespace)
    n_tokens = len(namespace["model"].tokenizer("My name is")["input_ids"])
    assert namespace["features"].shape == (n_tokens, 256)
    assert namespace["table"].groupby("token_index").size().max() <= 10
    assert isinstance(namespace["text"], str)
    assert namespace["change"].shape[0] == n_tokens
    assert [a.shape[1] for a in namespace["acts"]] == [128, 128]
    assert len(namespace["result"].tables["latents"])
    after = PAGE.read_text("utf-8").split("edits them with functions:")[1]
    exec(after.split("```python\n")[1].split("```")[0], namespace)


@pytest.mark.skipif(
    not importlib.util.find_spec("transformer_lens"), reason="needs transformer_lens"
)
@torch.inference_mode()
def test_the_other_version_runs(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE, StandardSAEConfig
        from sae_lens.saes.sae import SAEMetadata
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformers import AutoTokenizer

        cfg = HookedTransformerConfig(
            n_layers=3, d_model=D_MODEL, n_ctx=256, d_head=8, n_heads=4, d_vocab=384, act_fn="relu"
        )
        metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
        sae_cfg = StandardSAEConfig(d_in=D_MODEL, d_sae=160, metadata=metadata)
        namespace = {
            **names(),
            "model": HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(tmp_path)),
            "sae": SAE.from_dict(sae_cfg.to_dict()),
        }
        for lens, _ in list(STEPS.values())[1:]:
            exec(lens, namespace)
    assert namespace["features"].shape[1] == namespace["difference"].shape[0] == 160
