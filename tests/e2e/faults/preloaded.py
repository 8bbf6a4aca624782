"""What the server of `injection.start` imports before it forks: all that a run imports."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import pkgutil

import torch

import saexp

for module in pkgutil.walk_packages(saexp.__path__, "saexp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

torch.set_num_threads(1)
