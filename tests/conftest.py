"""Shape checking is switched on here and only here: jaxtyping's shapes with beartype's types."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
install_import_hook([f"saexp.{room}" for room in CHECKED], "beartype.beartype")
