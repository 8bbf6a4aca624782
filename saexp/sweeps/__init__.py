"""Sweeps, what is checked before runs, and what runs are called where they are tracked."""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saexp import registry, tracking
from saexp.config import RunConfig, key_of, parse_width
from saexp.config.environment import masked, one_of
from saexp.config.groups import PLACES
from saexp.errors import ConfigError
from saexp.results import check_objective, model_title, read_plan, sae_name

_LONGEST = 120
"""Characters of a tracked run's name; W&B accepts 128."""


_USES_POSITIONS = ("analyze", "collect", "dashboard", "train")
"""Tasks that use the group `positions`."""

_USES_DATASET = (*_USES_POSITIONS, "evaluate", "label")
"""Tasks that use the group `dataset`; what a custom task uses is not known."""


def check_before(cfg: RunConfig) -> None:
    """Raise ConfigError for what the config alone shows to fail.

    A component that the task uses and that does not exist, a tracker that cannot start, a metric
    that the run does not have.
    """
    tracking.check(cfg.tracker)
    check_objective(cfg)
    task = cfg.task.name
    registry.require("task", task)
    if task in _USES_DATASET:
        registry.require("dataset", cfg.dataset.name)
    if task in _USES_POSITIONS:
        registry.require("positions", cfg.positions.name)
    if task != "analyze":
        return
    registry.require("analyzer", cfg.analyzer.name)
    if cfg.intervention.name == "none":
        return
    registry.require("intervention", cfg.intervention.name)
    for outcome in [*cfg.intervention.outcomes, *(cfg.intervention.alternatives or [])]:
        registry.require("outcome", outcome)
    positions = (n for n in registry.names("positions") if n not in PLACES)
    one_of("intervention.where", cfg.intervention.where, (*PLACES, *positions))


def swept_keys(sweep: Path) -> set[str]:
    """Keys that differ between the cells of a sweep; empty where there is no plan."""
    plan = read_plan(sweep)
    if swept := plan.get("swept"):
        return set(swept)
    pairs = [{key_of(w): w for w in cell} for cell in plan.get("cells", [])]
    keys = {key for cell in pairs for key in cell}
    return {key for key in keys if len({cell.get(key) for cell in pairs}) > 1}


def group_name(sweep: Path, cells: list[list[str]], experiment: str | None) -> str:
    """Name of the group of a sweep's tracked runs: its date, time and experiment.

    A sweep that is started again in its folder keeps the name. A folder that the user named counts
    where there is no experiment.
    """
    plan = read_plan(sweep)
    if isinstance(plan.get("group"), str) and plan["cells"] == cells:
        return plan["group"]
    label = experiment or ("" if re.match(r"\d\d-\d\d-\d\d", sweep.name) else sweep.name)
    started = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    return f"{started} · {label}" if label else started


def group_of(sweep: Path | None) -> str | None:
    """The group of the tracked runs of a sweep, None for a run of its own."""
    return None if sweep is None else str(read_plan(sweep).get("group") or sweep.name)


def tracked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config for trackers, with plain values at its top level to compare runs by.

    `layer`, `width` as a number, `coefficient`, `seed`, `model.name` and `sae.release` (the SAE's
    name where it has no release).
    """
    plain = {key: config.get(key) for key in ("layer", "width", "coefficient", "seed")}
    for key in ("layer", "coefficient"):
        value = plain[key]
        plain[key] = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if isinstance(plain["width"], str):
        # Another text is a width by the name that a release gives it.
        with contextlib.suppress(ConfigError):
            plain["width"] = parse_width(plain["width"])
    sae = config["sae"]
    plain["model.name"] = config["model"]["name"]
    plain["sae.release"] = sae.get("release") or sae_name({}, sae)
    return {**config, **plain}


def run_name(config: Mapping[str, Any], folder: Path, sweep: Path | None) -> str:
    """Name of a tracked run: `tiny · layer 2 · coefficient 0.6`.

    After the name that the user gave (`tracker.name`, WANDB_NAME), else the model, stand the
    settings that vary in the sweep; without them SAE and layer, which a given name replaces.
    """
    base_name = (config.get("tracker") or {}).get("name") or os.environ.get("WANDB_NAME")
    sae, layer = config["sae"], config.get("layer")
    control = f"{sae_name({}, sae)} control" if sae.get("loader") == "random" else ""
    varying = [] if sweep is None else _varying(folder, sweep, with_model=bool(base_name))
    if base_name:
        about = [base_name]
    elif varying:
        about = [model_title(config["model"]["name"]), control]
    else:
        at = "" if layer is None else f"layer {layer}"
        about = [model_title(config["model"]["name"]), control or sae_name({}, sae), at]
    if sweep is None and "WANDB_SWEEP_ID" in os.environ:
        # Cells of a sweep of W&B are runs of their own.
        keys = [key for key in ("width", "coefficient") if config.get(key) is not None]
        varying += [f"{key} {config[key]}" for key in keys]
    about = [words for words in about if words]
    name = masked(" · ".join([*about, *varying]))
    if len(name) > _LONGEST:
        # The number of a cell keeps it unique.
        number = f" · {folder.name.partition('_')[0]}"
        name = name[: _LONGEST - len(number)] + number
    return name


def _varying(folder: Path, sweep: Path, *, with_model: bool) -> list[str]:
    """ "layer 2", "coefficient 0.6": a cell's settings that vary in its sweep."""
    number, cells = folder.name.partition("_")[0], read_plan(sweep).get("cells", [])
    if not number.isdigit() or int(number) >= len(cells):
        return []
    swept = swept_keys(sweep)
    words = {key_of(w): w.partition("=")[2] for w in cells[int(number)] if key_of(w) in swept}
    shown = [key for key in words if with_model or key not in ("model", "model.name")]
    labels = [key.rpartition(".")[2] for key in shown]
    return [
        f"{label if labels.count(label) == 1 else key} {words[key]}"
        for key, label in zip(shown, labels, strict=True)
    ]
