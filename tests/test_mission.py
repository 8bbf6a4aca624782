"""`model=gemma2b sae=gemmascope layer=12`, offline, against a cache in the hub's own layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from saexp.saes.catalogue import entries
from tests.random_models import tokenizer

D_MODEL, D_SAE, N_LAYERS = 2304, 16384, 26
RELEASE, SAE_ID = "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical"


def repository(home: Path, name: str) -> Path:
    """An empty snapshot of a hub repository in a cache."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit, encoding="utf-8")
    (root / "blobs").mkdir()
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def save_model(folder: Path) -> None:
    """Random Gemma 2 with the real names, depth and d_model, small inside."""
    torch.manual_seed(0)
    words = tokenizer()
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=64,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)


def save_sae(folder: Path) -> None:
    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((D_SAE, D_MODEL), dtype=np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz",
        W_enc=decoder.T,
        W_dec=decoder,
        b_enc=np.zeros(D_SAE, np.float32),
        b_dec=np.zeros(D_MODEL, np.float32),
        # The random stream's root mean square is about 5 here, so some 80 latents fire on a token.
        threshold=np.full(D_SAE, 13.0, np.float32),
    )


def test_the_missions_own_command(tmp_path: Path) -> None:
    home = tmp_path / "hf"
    save_model(repository(home, "google/gemma-2-2b"))
    entry = next(e for e in entries(RELEASE) if e.id == SAE_ID)
    assert entry.repo == "google/gemma-scope-2b-pt-res"
    save_sae(repository(home, entry.repo) / entry.path)
    command = [sys.executable, "-m", "saexp", "model=gemma2b", "sae=gemmascope", "layer=12"]
    # The command as it stands; what follows only keeps a random model from generating for long.
    command += ["intervention.max_new_tokens=2", "intervention.n_prompts=2"]
    command += ["intervention.n_choice_prompts=2", "intervention.n_neutral=1"]
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = next((tmp_path / "outputs").glob("2*/*"))
    assert (folder / "report.html").is_file()
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert 20 < metrics["sparsity/l0"] < 300
    rows = pd.read_parquet(folder / "rows.parquet")
    assert len(rows) >= 240
    provenance = (folder / "provenance.json").read_text("utf-8")
    assert "layer_12.resid_post" in provenance
    assert f"{RELEASE}/{SAE_ID}" in provenance
