"""Shape checking is switched on here and only here: jaxtyping's shapes with beartype's types."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

CHECKED = ("models", "data", "activations", "saes", "latents", "analysis", "interventions")
install_import_hook([f"saexp.{room}" for room in CHECKED], "beartype.beartype")

# Workers of pytest-xdist, and other jobs, share the cores; so deadlines mean nothing here.
torch.set_num_threads(1)
settings.register_profile("saexp", deadline=None, derandomize=True, database=None)
settings.load_profile("saexp")
