"""Digests of files and of weights in memory."""

import hashlib
from pathlib import Path
from typing import Any

import torch


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(hf: Any) -> str:
    """Hex digest of a model's config and weights as they are now."""
    digest = hashlib.sha256(repr(hf.config.to_dict()).encode())
    for name, tensor in hf.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
