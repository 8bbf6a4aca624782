"""Sparse-autoencoder experiments on language models: from prompts to a checked, causal result.

Nothing heavy is imported before it is used; see `saexp.api` for what these names do.
"""

from typing import TYPE_CHECKING, Any

from saexp.registry import register

if TYPE_CHECKING:
    from saexp.api import (
        build,
        compose,
        load_sae,
        neuronpedia_list,
        neuronpedia_url,
        open_store,
        run,
    )

__all__ = [
    "build",
    "compose",
    "load_sae",
    "neuronpedia_list",
    "neuronpedia_url",
    "open_store",
    "register",
    "run",
]


def __getattr__(name: str) -> Any:
    """Look public names up in saexp.api on first use."""
    if name in __all__:
        from saexp import api

        return getattr(api, name)
    raise AttributeError(f"module 'saexp' has no attribute '{name}'")
