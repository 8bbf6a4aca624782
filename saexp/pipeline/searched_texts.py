"""The texts in which a dashboard looks for the examples of its latents."""

from dataclasses import replace
from pathlib import Path

from saexp.config import DatasetConfig, RunConfig
from saexp.data.datasets import SHIPPED_MODELS, background_file
from saexp.errors import counted
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Collected, collect_examples

_NAMES = ("entities", "wikidata")
"""Data sets whose texts are little more than names."""


def searches_background(cfg: RunConfig, texts: str) -> bool:
    """Whether neutral prose is searched, not the data set; `texts` is auto, dataset or background.

    auto: where the data set's texts are names, unless they are the user's own or the model is a
    shipped one, which was trained on such texts.
    """
    if texts != "auto":
        return texts == "background"
    dataset = cfg.dataset
    has_own_texts = dataset.name == "entities" and dataset.path is not None
    return dataset.name in _NAMES and not has_own_texts and cfg.model.name not in SHIPPED_MODELS


def collect_searched(
    cfg: RunConfig,
    texts: str,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    examples: Collected,
) -> tuple[Collected, str]:
    """(activations of the texts that are searched, a sentence on which these are).

    `examples` are those of the run's data set.
    """
    if not searches_background(cfg, texts):
        n = counted(len(examples.examples.examples), "text")
        if not examples.examples.examples:
            return examples, f"Searched texts: the data set '{cfg.dataset.name}'."
        return examples, f"Searched texts: the data set '{cfg.dataset.name}' ({n})."
    path = background_file(cfg.dataset)
    dataset = DatasetConfig(
        name="text",
        path=str(path),
        max_length=cfg.dataset.max_length,
        model_name=cfg.dataset.model_name,
        seed=cfg.dataset.seed,
    )
    collected = collect_examples(replace(cfg, dataset=dataset), model, hookpoints)
    n = counted(len(collected.examples.examples), "neutral text")
    source = f"of {path}" if cfg.dataset.background else f"that ship with saexp ({Path(path).name})"
    why = f", as the texts of dataset={cfg.dataset.name} are names" if texts == "auto" else ""
    return collected, (
        f"Searched texts: {n} {source}{why}. dataset=text or corpus searches your own, "
        "task.texts=dataset those of the data set."
    )
