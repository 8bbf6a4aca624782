"""Trainings of a sweep on the same corpus, planned into one pass of the language model."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from saexp.config import COMPOSITION_ERRORS, RunConfig, SAETrainerConfig, TrainConfig
from saexp.config.environment import as_typed, resolved
from saexp.config.groups import CorpusConfig
from saexp.config.tasks import OF_ONE_SAE
from saexp.errors import SaexpError
from saexp.results import read_plan

log = logging.getLogger(__name__)

TRAININGS = "trainings"
"""Entry of plan.json: key of the data -> the trainings of all cells that stream them."""


def is_streamed(cfg: RunConfig) -> bool:
    """Whether a run trains on activations that it computes from a corpus."""
    if not isinstance(cfg.task, TrainConfig):
        return False
    source = cfg.sae_trainer.source
    return source == "stream" or (source is None and isinstance(cfg.dataset, CorpusConfig))


def planned(
    config: DictConfig,
    cells: Sequence[Sequence[str]],
    composed: Callable[[Sequence[str]], RunConfig],
) -> dict[str, list[dict[str, Any]]]:
    """Key of the data -> layer, width, streams and trainer of each cell, in the cells' order.

    Empty where cells run in several processes, and where the first cell streams nothing. A cell
    that cannot be composed is left out; it fails with its own error later.
    """
    launcher = str(config.hydra.launcher.get("_target_", ""))
    trainings: dict[str, list[dict[str, Any]]] = {}
    if not launcher.endswith("BasicLauncher"):
        return trainings
    for words in cells:
        try:
            cfg = composed(words)
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            log.debug("not planned: %s (%s)", words, error)
            continue
        if is_streamed(cfg):
            trainings.setdefault(_key(cfg), []).append(_entry(cfg))
        elif not trainings:
            return {}
    return {key: entries for key, entries in trainings.items() if len(entries) > 1}


def _entry(cfg: RunConfig) -> dict[str, Any]:
    assert isinstance(cfg.task, TrainConfig)
    entry = {
        "layer": cfg.layer,
        "width": cfg.width,
        "streams": list(cfg.task.streams),
        "sae_trainer": asdict(cfg.sae_trainer),
    }
    return as_typed(json.loads(json.dumps(entry)))


def _key(cfg: RunConfig) -> str:
    """Hash of all settings in which the trainings of one pass agree."""
    own = {*OF_ONE_SAE, "options", "variants"} - {"seed"}
    trainer = {k: v for k, v in asdict(cfg.sae_trainer).items() if k not in own}
    data = [asdict(part) for part in (cfg.model, cfg.dataset, cfg.positions, cfg.store)]
    parts = [data, trainer, cfg.seed, cfg.cache_dir]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def trainings_to_share(cfg: RunConfig, sweep: Path | None) -> list[dict[str, Any]]:
    """Trainings of the sweep's later cells on the same data: layer, width, streams, sae_trainer.

    Earlier cells are done; those of a damaged plan are trained by their own cells.
    """
    if sweep is None or not is_streamed(cfg):
        return []
    try:
        entries = read_plan(sweep).get(TRAININGS, {}).get(_key(cfg), [])
        own = _entry(cfg)
        if own not in entries:
            return []
        later = entries[entries.index(own) + 1 :]
        return [
            {**entry, "sae_trainer": SAETrainerConfig(**entry["sae_trainer"])}
            for entry in map(resolved, later)
            if entry != own
        ]
    except (AttributeError, KeyError, TypeError, ValueError, SaexpError):
        log.warning("the plan of %s is damaged: this cell trains its own SAEs alone", sweep)
        return []
