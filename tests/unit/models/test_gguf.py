"""A model in a GGUF file computes what the model that it was written from computes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import saexp
from saexp.errors import ModelError
from tests.random_models import TEXTS, random_hf, tokenizer

INSTALLED = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Hugging Face's names of modules -> those of GGUF."""


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write_gguf(hf: torch.nn.Module, file: Path) -> Path:
    """Write a Qwen2 model and the offline tokenizer as llama.cpp does."""
    import gguf

    config, words = hf.config, json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in hf.state_dict().items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.skipif(not INSTALLED, reason="needs the packages of saexp[gguf]")
@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_loads_as_a_model(tmp_path: Path) -> None:
    hf = random_hf("qwen2", tie_word_embeddings=False)
    model = saexp.load_model(write_gguf(hf, tmp_path / "model.gguf"), device="cpu")
    assert (model.n_layers, model.d_model) == (3, 32)
    before = model.fingerprint
    ids = torch.tensor([model.tokenizer(TEXTS[0])["input_ids"]])
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    with torch.inference_mode():
        expected = hf(ids).logits[0]
    torch.testing.assert_close(model.logits(TEXTS[0]), expected, atol=1e-4, rtol=1e-4)
    assert model.fingerprint == before
    write_gguf(random_hf("qwen2", seed=1, tie_word_embeddings=False), tmp_path / "other.gguf")
    assert saexp.load_model(tmp_path / "other.gguf", device="cpu").fingerprint != before


def test_without_its_packages_the_error_and_the_docs_give_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saexp.models.loading.find_spec", lambda _: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = 'pip install "saexp[gguf]"'
    assert command in Path("docs/guides/python.md").read_text("utf-8")
    with pytest.raises(ModelError, match=re.escape(command)):
        saexp.load_model(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; type the folder of the model, or a GGUF file"):
        saexp.load_model(tmp_path / "model.bin")
