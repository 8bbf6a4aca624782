"""Sparse-autoencoder experiments on language models: from prompts to a checked, causal result.

Nothing heavy is imported before it is used: the names below are read from their modules on first
access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from saexp.registry import register

if TYPE_CHECKING:
    from saexp.api import (
        build,
        compose,
        neuronpedia_list,
        neuronpedia_url,
        open_store,
        run,
    )
    from saexp.api.latents import ablate, contrast, edit, encode, load_sae, steer, top_latents
    from saexp.api.model import load_model
    from saexp.results import Result

_MODULE_OF = {
    "Result": "saexp.results",
    "build": "saexp.api",
    "compose": "saexp.api",
    "contrast": "saexp.api.latents",
    "load_model": "saexp.api.model",
    "load_sae": "saexp.api.latents",
    "ablate": "saexp.api.latents",
    "edit": "saexp.api.latents",
    "encode": "saexp.api.latents",
    "steer": "saexp.api.latents",
    "top_latents": "saexp.api.latents",
    "neuronpedia_list": "saexp.api",
    "neuronpedia_url": "saexp.api",
    "open_store": "saexp.api",
    "run": "saexp.api",
}
"""Public name -> the module that defines it."""

_NAME_IN_MODULE = {"Result": "Result"}

__all__ = [
    "Result",
    "ablate",
    "build",
    "compose",
    "contrast",
    "edit",
    "encode",
    "load_model",
    "load_sae",
    "neuronpedia_list",
    "neuronpedia_url",
    "open_store",
    "register",
    "run",
    "steer",
    "top_latents",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'saexp' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), _NAME_IN_MODULE.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
