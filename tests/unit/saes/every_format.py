"""A sound folder of every SAE format, and how its files are changed for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saexp
from saexp.errors import SAEError
from tests.unit.saes.make import D_IN, D_SAE, HOOK_NAME, parameters, write_npz, write_saelens
from tests.unit.saes.make_formats import write_dictionary, write_gemma2, write_llama, write_sparsify

SAELENS_CFG: dict[str, Any] = {
    "architecture": "jumprelu",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {
        "hook_name": HOOK_NAME,
        "model_name": "gpt2",
        "prepend_bos": True,
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    },
}
OLD_CFG: dict[str, Any] = {
    "hook_point": HOOK_NAME,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 5},
    "normalize_activations": True,
    "norm_scaling_factor": 0.7,
    "prepend_bos": True,
}
"""A config before version 6, of a TopK SAE."""


def sound_saelens(folder: Path) -> Path:
    """A JumpReLU SAE in a SAELens folder."""
    return write_saelens(folder / "sae", SAELENS_CFG, parameters("jumprelu"))


def _old(folder: Path) -> Path:
    return write_saelens(folder / "sae", OLD_CFG, parameters("topk"))


def _gemma(folder: Path) -> Path:
    sae_folder = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_9"
    write_npz(sae_folder / "params.npz", parameters("jumprelu"))
    return sae_folder


def _gemma2(folder: Path) -> Path:
    return write_gemma2(folder / "resid_post" / "layer_3_width_40", parameters("jumprelu"))


def _llama(folder: Path) -> Path:
    return write_llama(folder / "sae")


def _sparsify(folder: Path) -> Path:
    return write_sparsify(folder / "layers.3", parameters("topk"))


def _dictionary(folder: Path) -> Path:
    return write_dictionary(folder / "trainer_0", "AutoEncoderTopK")


FORMATS: dict[str, tuple[Callable[[Path], Path], str, str, str | None]] = {
    "SAELens": (sound_saelens, "sae_weights.safetensors", "W_dec", "cfg.json"),
    "SAELens 5": (_old, "sae_weights.safetensors", "W_dec", "cfg.json"),
    "Gemma Scope": (_gemma, "params.npz", "W_dec", None),
    "Gemma Scope 2": (_gemma2, "params.safetensors", "w_dec", "config.json"),
    "Llama Scope": (
        *(_llama, "checkpoints/final.safetensors", "decoder.weight", "hyperparams.json"),
    ),
    "sparsify": (_sparsify, "sae.safetensors", "W_dec", "cfg.json"),
    "dictionary_learning": (_dictionary, "ae.pt", "decoder.weight", "config.json"),
}
"""Format -> (writer, its file of weights, its name of the decoder, its config)."""
EVERY = pytest.mark.parametrize("form", FORMATS)


def change(file: Path, do: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors in a file of any format."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            tensors = {n: torch.from_numpy(arrays[n]) for n in arrays}
        do(tensors)
        np.savez(file, **{n: t.numpy() for n, t in tensors.items()})  # pyright: ignore
    elif file.suffix == ".pt":
        tensors = torch.load(file, weights_only=True)
        do(tensors)
        torch.save(tensors, file)
    else:
        tensors = load_file(file)
        do(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)


def void(_: Any) -> None:
    """What a lambda that changes a tensor gives."""


def line_of(path: Path) -> str:
    """The error of reading an SAE, which is one line."""
    with pytest.raises(SAEError) as caught:
        saexp.load_sae(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
