"""Random SAEs, in memory, in SAELens folders and in a hub cache."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder

D_IN, D_SAE, K = 12, 40, 5
D_OUT = 9
HOOK_NAME = "blocks.3.hook_resid_post"
EXTRA = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "groupmax": ("b_enc",),
    "abstopk": ("b_enc",),
    "matching_pursuit": (),
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parameters(
    architecture: str, d_in: int = D_IN, d_sae: int = D_SAE, d_out: int | None = None
) -> dict[str, Tensor]:
    """Every parameter noisy, so that one that is left out shows; no decoder row of norm 1."""
    d_out = d_in if d_out is None else d_out
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"W_enc": noise(d_in, d_sae), "W_dec": noise(d_sae, d_out), "b_dec": noise(d_out)}
    if architecture == "matching_pursuit":
        # Tied, with rows of norm 1 and of a transcoder others of that shape.
        weights["W_enc"] /= weights["W_enc"].norm(dim=0)
        weights["W_dec"] = weights["W_enc"].T.contiguous() if d_out == d_in else weights["W_dec"]
    weights |= {name: 0.3 * noise(d_sae) for name in EXTRA[architecture]}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].abs() * 4
    return weights


def sae(architecture: str = "standard", **options: Any) -> SparseAutoencoder:
    """One of saexp's own, at block 3's output."""
    if architecture in ("topk", "abstopk", "groupmax"):
        options.setdefault("k", K)
    options.setdefault("hookpoint", Hookpoint(3, "resid_post"))
    metadata = options.pop("metadata", None)
    settings = SAESettings(architecture=architecture, **options)
    return SparseAutoencoder(parameters(architecture), settings, metadata)


def transcoder(architecture: str = "standard", **options: Any) -> SparseAutoencoder:
    """One from block 3's MLP's input to 9 numbers of its output, with a skip connection."""
    if architecture in ("topk", "abstopk", "groupmax"):
        options.setdefault("k", K)
    weights = {**parameters(architecture, d_out=D_OUT), "W_skip": skip()}
    options.setdefault("hookpoint", Hookpoint(3, "mlp_in"))
    options.setdefault("hookpoint_out", Hookpoint(3, "mlp_out"))
    metadata = options.pop("metadata", None)
    return SparseAutoencoder(weights, SAESettings(architecture=architecture, **options), metadata)


def skip(d_in: int = D_IN, d_out: int = D_OUT) -> Tensor:
    """`W_skip`, neither square nor symmetric."""
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(7)) / 3


def points(*shape: int) -> Tensor:
    """Inputs with a mean and a norm far from 0 and 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 2 + 0.7


def write_saelens(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A SAELens folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def write_npz(file: Path, tensors: dict[str, Tensor]) -> Path:
    """A Gemma Scope file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: t.numpy() for name, t in tensors.items()}
    np.savez(file, **arrays)
    return file


def publish(cache: Path, repo: str, files: Path) -> None:
    """Put every file below `files` into a hub cache, laid out as huggingface_hub does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (root / "blobs").mkdir(exist_ok=True)
    for file in (f for f in files.rglob("*") if f.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.replace(blob)
        link = root / "snapshots" / COMMIT / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
