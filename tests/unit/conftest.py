"""Shape checking is switched on for unit tests: jaxtyping's shapes with beartype's types."""

import importlib
import warnings

from jaxtyping import install_import_hook

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
LIBRARIES = (
    "beartype",
    "hydra",
    "pandas",
    "plotly.graph_objects",
    "rapidfuzz",
    "sae_lens",
    "scipy.sparse",
    "scipy.stats",
    "sklearn.linear_model",
    "transformers.modeling_utils",
)
"""Imported before the hook: whatever a checked module imports first, the hook compiles from source
instead of reading the compiled file, which takes 10 s for these."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in LIBRARIES:
        importlib.import_module(library)
install_import_hook([f"saexp.{package}" for package in CHECKED], "beartype.beartype")
