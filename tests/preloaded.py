"""What the server of `tests.interpreters` imports before it forks: all that a run imports."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import pkgutil
import warnings

import plotly.graph_objects as go
import sklearn.feature_extraction.text  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import wandb  # noqa: F401

import saexp

for module in pkgutil.walk_packages(saexp.__path__, "saexp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens  # noqa: F401

torch.set_num_threads(1)
# Hydra's plugins, and what plotly imports with a figure.
saexp.compose([])
go.Figure(go.Scatter(x=[0], y=[0]), {"title": "t"}).to_json()
