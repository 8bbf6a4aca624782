"""Caches as `HF_HOME` holds them, of random models and SAEs under the published ones' names.

Repositories, file names, tensor names, configs, tokenizer kinds, depth and d_model are the real
ones; what is inside a block, the vocabulary and, where asked for, an SAE's width are small.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from saexp.saes.catalogue import Entry, entries
from tests.hub_tokenizers import gemma_2, gpt_2, gpt_neox, llama_3
from tests.unit.saes.make import publish

GEMMA_SCOPE = "gemma-scope-2b-pt-res-canonical"
SHARD = "10MB"
"""Gemma's and Llama's weights are in several files there."""


@contextmanager
def repository(home: Path, name: str) -> Iterator[Path]:
    """An empty folder whose files then are the repository's snapshot in the cache `home`."""
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home) as directory:
        yield Path(directory)
        publish(home / "hub", name, Path(directory))


def catalogued(release: str, sae_id: str) -> Entry:
    """Where sae-lens' catalogue says that an SAE is."""
    return next(e for e in entries(release) if e.id == sae_id)


def _random(config: Any, *, embedding: float | None = None) -> Any:
    """A random model in bfloat16; embeddings with this spread, where the stream needs a size."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if embedding is not None:
        with torch.no_grad():
            hf.get_input_embeddings().weight.normal_(0.0, embedding)
    return hf


def _save_tokenizer(folder: Path, pair: tuple[Tokenizer, dict[str, Any]]) -> None:
    tokenizer, settings = pair
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_gemma_2(folder: Path, *, chat: bool = False) -> None:
    """google/gemma-2-2b, or -it with its chat template and two end tokens."""
    tokenizer, settings = gemma_2(chat=chat)
    config = transformers.Gemma2Config(
        vocab_size=tokenizer.get_vocab_size(),
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    hf = _random(config)
    if chat:
        hf.generation_config.eos_token_id = [1, tokenizer.token_to_id("<end_of_turn>")]
    hf.save_pretrained(folder, max_shard_size=SHARD)
    _save_tokenizer(folder, (tokenizer, settings))


def save_llama_3(folder: Path) -> None:
    """meta-llama/Llama-3.1-8B: no padding token, scaled rotary embeddings."""
    tokenizer, settings = llama_3()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=4096,
        intermediate_size=16,
        num_hidden_layers=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=tokenizer.token_to_id("<|end_of_text|>"),
    )
    _random(config, embedding=1.0).save_pretrained(folder, max_shard_size=SHARD)
    _save_tokenizer(folder, (tokenizer, settings))


def save_gpt_2(folder: Path) -> None:
    """openai-community/gpt2, its tensors without `transformer.` in front and without head."""
    tokenizer, settings = gpt_2()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_inner=64, bos_token_id=end, eos_token_id=end
    )
    # The head is tied to it, and logits must be those of no token alone.
    _random(config, embedding=0.05).save_pretrained(folder)
    _save_tokenizer(folder, (tokenizer, settings))
    tensors = load_file(folder / "model.safetensors")
    plain = {n.removeprefix("transformer."): t for n, t in tensors.items() if n != "lm_head.weight"}
    plain |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(config.n_layer)}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})


def save_pythia(folder: Path) -> None:
    """EleutherAI/pythia-70m-deduped at its real sizes; more rows of embeddings than tokens."""
    tokenizer, settings = gpt_neox()
    config = transformers.GPTNeoXConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 128) * 128,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    _random(config, embedding=1.0).save_pretrained(folder)
    _save_tokenizer(folder, (tokenizer, settings))
    tensors = load_file(folder / "model.safetensors")
    for i in range(config.num_hidden_layers):
        at = f"gpt_neox.layers.{i}.attention"
        tensors |= {f"{at}.bias": torch.ones(1, 1, 4, 4), f"{at}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def directions(d_sae: int, d_in: int) -> np.ndarray:
    """Unit rows `[d_sae, d_in]` with four entries each, so that files of them are small."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, d_in // 4, (d_sae, 4)).cumsum(axis=1)
    places = (rng.integers(d_in, size=(d_sae, 1)) + steps) % d_in
    rows = np.zeros((d_sae, d_in), np.float16)
    signs = rng.choice(np.array([-0.5, 0.5], np.float16), (d_sae, 4))
    np.put_along_axis(rows, places, signs, axis=1)
    return rows


def save_gemma_scope(folder: Path, *, d_sae: int, layer: int) -> None:
    """`params.npz` of a residual SAE; its thresholds grow with depth as the stream does."""
    decoder = directions(d_sae, 2304)
    size = (1 + 2 * (layer + 1)) ** 0.5
    folder.mkdir(parents=True)
    arrays = {
        "W_enc": decoder.T,
        "W_dec": decoder,
        "b_enc": np.zeros(d_sae, np.float32),
        "b_dec": np.zeros(2304, np.float32),
        "threshold": np.full(d_sae, 2.75 * size, np.float32),
    }
    # As np.savez_compressed, which takes ten times as long at its own level.
    file = folder / "params.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def save_llama_scope(folder: Path, *, d_sae: int, layer: int) -> None:
    """`hyperparams.json` and `checkpoints/final.safetensors`; inputs are scaled by a half."""
    decoder = torch.from_numpy(directions(d_sae, 4096)).bfloat16()
    (folder / "checkpoints").mkdir(parents=True)
    hook = f"blocks.{layer}.hook_resid_post"
    settings = {
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "d_model": 4096,
        "d_sae": d_sae,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 2.4,
        "norm_activation": "dataset-wise",
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "dataset_average_activation_norm": {"in": 128.0, "out": 128.0},
    }
    (folder / "hyperparams.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = {
        "encoder.weight": decoder,
        "encoder.bias": torch.zeros(d_sae, dtype=torch.bfloat16),
        "decoder.weight": decoder.T.contiguous(),
        "decoder.bias": torch.zeros(4096, dtype=torch.bfloat16),
    }
    save_file(tensors, folder / "checkpoints" / "final.safetensors")


def save_gpt2_jb(folder: Path, *, d_sae: int, layer: int) -> None:
    """A folder of SAELens' first config form, with the sparsity file that lies beside it."""
    decoder = torch.from_numpy(directions(d_sae, 768)).float()
    folder.mkdir(parents=True)
    settings = {
        "model_name": "gpt2-small",
        "hook_point": f"blocks.{layer}.hook_resid_pre",
        "hook_point_layer": layer,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "d_in": 768,
        "d_sae": d_sae,
        "expansion_factor": 32,
        "dtype": "torch.float32",
        "device": "mps",
        "l1_coefficient": 8e-05,
        "b_dec_init_method": "geometric_median",
    }
    (folder / "cfg.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = {
        "W_enc": decoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": torch.full((d_sae,), -0.3),
        "b_dec": torch.zeros(768),
        "scaling_factor": torch.ones(d_sae),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((d_sae,), -2.1)}, folder / "sparsity.safetensors")


def add_gemma_scope(home: Path, *saes: tuple[int, int]) -> None:
    """The canonical SAEs of these (layer, thousands of latents), at their own widths."""
    for layer, thousands in saes:
        entry = catalogued(GEMMA_SCOPE, f"layer_{layer}/width_{thousands}k/canonical")
        assert entry.repo == "google/gemma-scope-2b-pt-res" and entry.width is not None
        with repository(home, entry.repo) as files:
            save_gemma_scope(files / entry.path, d_sae=entry.width, layer=layer)


def add_llama_scope(home: Path, layer: int) -> None:
    """A narrow SAE at the place of one of 32k latents: it needs `width=null`."""
    entry = catalogued("llama_scope_lxr_8x", f"l{layer}r_8x")
    assert entry.repo == "fnlp/Llama3_1-8B-Base-LXR-8x"
    with repository(home, entry.repo) as files:
        save_llama_scope(files / entry.path, d_sae=4096, layer=layer)


def add_gpt2_jb(home: Path, layer: int) -> None:
    """A narrow SAE at the place of one of 24k latents."""
    entry = catalogued("gpt2-small-res-jb", f"blocks.{layer}.hook_resid_pre")
    assert entry.repo == "jbloom/GPT2-Small-SAEs-Reformatted"
    with repository(home, entry.repo) as files:
        save_gpt2_jb(files / entry.path, d_sae=4096, layer=layer)
