"""A model in a GGUF file computes what the model that it was written from computes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import saexp
from saexp.config import ModelConfig
from saexp.errors import ModelError
from saexp.models.loading import LanguageModel
from saexp.models.resolution import find_source
from tests.random_models import TEXTS, random_hf, tokenizer

NEEDS_GGUF = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate")),
    reason="needs the packages of saexp[gguf]",
)
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


@NEEDS_GGUF
@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_loads_as_a_model(tmp_path: Path) -> None:
    hf = random_hf("qwen2", tie_word_embeddings=False)
    model = saexp.load_model(
        write_gguf(hf, tmp_path / "model.gguf"), cache_dir=tmp_path / "cache", device="cpu"
    )
    assert (model.n_layers, model.d_model) == (3, 32)
    before = model.fingerprint
    ids = torch.tensor([model.tokenizer(TEXTS[0])["input_ids"]])
    assert model.tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    with torch.inference_mode():
        expected = hf(ids).logits[0]
    torch.testing.assert_close(model.logits(TEXTS[0]), expected, atol=1e-4, rtol=1e-4)
    assert model.fingerprint == before
    write_gguf(random_hf("qwen2", seed=1, tie_word_embeddings=False), tmp_path / "other.gguf")
    other = LanguageModel(ModelConfig(name=str(tmp_path / "other.gguf"), device="cpu"))
    assert other.fingerprint != before


@NEEDS_GGUF
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_dequantised_once_and_read_without_gguf_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    file = write_gguf(random_hf("qwen2", tie_word_embeddings=False), tmp_path / "model.gguf")
    cfg = ModelConfig(name=str(file), device="cpu", dtype=dtype)
    direct, cached = LanguageModel(cfg), LanguageModel(cfg, tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "models").glob("gguf-*")
    assert cached.source == str(folder)
    assert folder.name.endswith(dtype)
    monkeypatch.setattr("saexp.models.resolution.find_spec", lambda _: None)
    monkeypatch.setattr("saexp.models.resolution.convert", None)
    later = LanguageModel(cfg, tmp_path / "cache")
    for model in (cached, later):
        assert model.fingerprint == direct.fingerprint
        assert model.tokenizer_fingerprint == direct.tokenizer_fingerprint
        assert (model.eos_ids, model.dtype) == (direct.eos_ids, direct.dtype)
        for text in TEXTS:
            assert model.tokenizer(text).input_ids == direct.tokenizer(text).input_ids
        weights = model.hf.state_dict()
        assert weights.keys() == direct.hf.state_dict().keys()
        assert all(torch.equal(weights[name], t) for name, t in direct.hf.state_dict().items())


@NEEDS_GGUF
@pytest.mark.filterwarnings("ignore")
def test_a_conversion_that_stops_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    file = write_gguf(random_hf("qwen2", tie_word_embeddings=False), tmp_path / "model.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:-4096])
    models = tmp_path / "cache" / "models"
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        LanguageModel(ModelConfig(name=str(damaged), device="cpu"), tmp_path / "cache")
    assert not [path for path in models.iterdir() if path.is_dir()]
    # As of a process that was killed.
    (models / ".tmp-killed").mkdir()
    (models / ".tmp-killed" / "config.json").write_text("{")
    LanguageModel(ModelConfig(name=str(file), device="cpu"), tmp_path / "cache")
    assert [path.name[:5] for path in models.iterdir() if path.is_dir()] == ["gguf-"]


def test_the_file_is_found_in_a_folder(tmp_path: Path) -> None:
    def gguf_file(**options: str) -> Path | None:
        return find_source(ModelConfig(name=str(tmp_path), **options)).gguf_file

    assert gguf_file() is None
    (tmp_path / "a.gguf").touch()
    assert gguf_file() == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(
        ModelError, match=re.escape("2 GGUF files; type one of them: model.gguf_file=a")
    ):
        gguf_file()
    assert gguf_file(gguf_file="b.gguf") == tmp_path / "b.gguf"
    with pytest.raises(ModelError, match=re.escape("which has a.gguf, b.gguf")):
        gguf_file(gguf_file="c.gguf")
    (tmp_path / "model.safetensors").touch()
    assert gguf_file() is None
    with pytest.raises(ModelError, match="leave out model.gguf_file"):
        find_source(ModelConfig(name=str(tmp_path / "a.gguf"), gguf_file="b.gguf"))


def test_without_its_packages_the_error_and_the_docs_give_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saexp.models.resolution.find_spec", lambda _: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    command = 'pip install "saexp[gguf]"'
    assert command in Path("docs/guides/python.md").read_text("utf-8")
    with pytest.raises(ModelError, match=re.escape(command)):
        saexp.load_model(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; type the folder of the model, or a GGUF file"):
        saexp.load_model(tmp_path / "model.bin")
