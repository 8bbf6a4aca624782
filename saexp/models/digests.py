"""Digests of weights in memory."""

import hashlib
from typing import Any

import torch
from torch import nn


def tensors_sha256(hf: Any) -> str:
    """Hex digest of a model's config and weights as they are now."""
    return state_sha256(hf, repr(hf.config.to_dict()))


def state_sha256(module: nn.Module, config: str = "") -> str:
    """Hex digest of a module's parameters and buffers as they are now, after its config."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
