"""What the server of `tests.interpreters` imports before it forks: all that a run imports."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import pkgutil
import warnings

import pandas as pd
import plotly.graph_objects as go
import sklearn.feature_extraction.text  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import wandb  # noqa: F401
from hydra._internal.hydra import Hydra
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

import saexp
from saexp.reports import environment, style

for module in pkgutil.walk_packages(saexp.__path__, "saexp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens  # noqa: F401

torch.set_num_threads(1)
# Composed only to look for hydra.mode, which no config of the project sets.
Hydra.get_mode = lambda *_, **__: None
# Hydra's plugins, what plotly imports with a figure, and templates of pages.
saexp.compose([])
figure = make_subplots(rows=1, cols=1, subplot_titles=["t"])
for kind in (go.Scatter, go.Bar, go.Histogram):
    figure.add_trace(kind(x=pd.Series([0.5])), row=1, col=1)
style(figure.update_layout(title="t"), 300).to_json()
get_plotlyjs()
for template in environment().list_templates():
    environment().get_template(template)
