"""What the server of `tests.interpreters` imports before it forks: all that a run imports."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib
import pkgutil
import warnings

import pandas as pd
import plotly.graph_objs.bar
import plotly.graph_objs.scatter  # noqa: F401
import sklearn.feature_extraction.text
import sklearn.linear_model  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import wandb.sdk.launch.inputs.internal  # noqa: F401
from plotly.offline import get_plotlyjs

import saexp
from saexp.reports import Chart, bar, environment, scatter, style
from tests import cheap_composition, unsynced

for module in pkgutil.walk_packages(saexp.__path__, "saexp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens  # noqa: F401

torch.set_num_threads(1)
cheap_composition.install()
unsynced.install()
# Hydra's plugins, configs of common commands, what plotly imports with a figure, and templates of
# pages.
for words in ([], ["intervention=none"], ["task=collect"], ["task=label"]):
    saexp.compose(words)
    saexp.compose([*words, "tracker=none"])
chart = Chart.with_panels(1, 1, ["t"])
for trace in (scatter(x=pd.Series([0.5])), bar(y=pd.Series([0.5]))):
    chart.add_trace(trace)
style(chart, 300).to_json()
get_plotlyjs()
for template in environment().list_templates():
    environment().get_template(template)
