"""Sweeps: hookpoints planned before the first cell; after the last, the table, the report, and
latents of the cells matched by direction and co-activation.
"""

import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from saexp import registry
from saexp.analysis.latent_scores import (
    Cofiring,
    Firing,
    cofiring,
    cosine_by_chance,
    firing,
    nearest_directions,
)
from saexp.config import (
    COMPOSITION_ERRORS,
    ModelConfig,
    RunConfig,
    SAEConfig,
    key_of,
    one_line,
)
from saexp.config.environment import resolved
from saexp.context import ObjectCache
from saexp.errors import ConfigError, SAEError, SaexpError, StoreError, brief
from saexp.files import SWEEP_FOLDER, write_json, write_table
from saexp.models import Hookpoint
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.pipeline.run_folder import reserve
from saexp.reports.contrast import MATCHES, MATCHES_NOTES
from saexp.reports.saved_run import SavedRun, cells_table
from saexp.results import SWEEP_PLAN, read_plan
from saexp.saes import SparseAutoencoder
from saexp.saes.training_pass import TRAININGS, planned_trainings
from saexp.sweeps import check_before, group_name, group_of
from saexp.sweeps.passes import CellConfigs, passes, show_plan
from saexp.sweeps.search import between, is_search, visitable

log = logging.getLogger(__name__)


_TABLES = ("activations", "rows", "latents")
"""Tables that only a contrast writes."""


@dataclass(frozen=True)
class _Cell:
    """The first cell with this SAE: its leading selected latents, and where they are active."""

    number: int
    about: dict[str, Any]
    leading: pd.DataFrame
    fires: Firing
    directions: Tensor | None = None
    """`[n, d]`, of the leading latents, in the order of `leading`."""

    @property
    def hookpoint(self) -> Hookpoint:
        return Hookpoint.parse(self.about["sae"]["hookpoint"])

    @property
    def width(self) -> str:
        """The width as it was typed, else the number of latents."""
        return str(self.about["config"]["width"] or self.about["sae"]["d_sae"])

    @property
    def label(self) -> str:
        return f"layer {self.hookpoint.layer}, width {self.width}"

    def is_comparable(self, other: "_Cell") -> bool:
        """Whether both read the same stream of the same model, at any block."""
        same_model = self.about["model"]["fingerprint"] == other.about["model"]["fingerprint"]
        return same_model and self.hookpoint.stream == other.hookpoint.stream


def match_cells(folder: Path, objects: ObjectCache) -> None:
    """Write the matches of a sweep's SAEs for its report, and notes on what was not matched."""
    for earlier in (folder / MATCHES, folder / MATCHES_NOTES):
        earlier.unlink(missing_ok=True)
    began = time.perf_counter()
    try:
        cells, notes = _with_directions(_matched_cells(folder), objects)
        table, table_notes = _matches(cells, objects)
        notes += table_notes
        if len(table):
            write_table(folder / MATCHES, table, option=SWEEP_FOLDER)
            seconds = time.perf_counter() - began
            log.info("matched latents of %d SAEs, %.1f s", len(cells), seconds)
    except (Exception, KeyboardInterrupt) as error:
        # The table and the report of the sweep must be written in any case.
        notes = [f"latents were not matched: {_reason(error)}"]
    if notes:
        write_json(folder / MATCHES_NOTES, notes, option=SWEEP_FOLDER)
        for note in notes:
            log.warning("%s", note)


def _reason(error: BaseException) -> str:
    return brief(str(error), 300) or type(error).__name__


def _matched_cells(folder: Path) -> list[_Cell]:
    """One finished cell per SAE that selected latents; empty if there are fewer than two."""
    cells: dict[tuple[str, ...], _Cell] = {}
    table = cells_table(folder)
    for row in table[table["status"] == "finished"].to_dict("records"):
        run = SavedRun(folder / str(row["folder"]))
        if not all((run.folder / f"{name}.parquet").is_file() for name in _TABLES):
            continue
        about = run.provenance
        names = [about["model"]["fingerprint"], about["sae"]["fingerprint"]]
        key = (*map(str, names), about["sae"]["hookpoint"])
        if key not in cells and (cell := _cell(run, int(row["cell"]))) is not None:
            cells[key] = cell
    return list(cells.values()) if len(cells) > 1 else []


def _cell(run: SavedRun, number: int) -> _Cell | None:
    activations, rows, latents = (run.table(name) for name in _TABLES)
    if activations is None or rows is None or latents is None or activations.empty:
        return None
    fires = firing(activations, rows)
    leading = latents.set_index("latent").loc[fires.latents, ["direction", "rank"]].reset_index()
    return _Cell(number, run.provenance, leading, fires)


def _load_sae(cell: _Cell, objects: ObjectCache) -> SparseAutoencoder:
    """The cell's SAE, checked against its model."""
    config = resolved(cell.about["config"])
    registry.load_plugins(config["plugins"])
    config["model"], config["sae"] = ModelConfig(**config["model"]), SAEConfig(**config["sae"])
    cfg = RunConfig(**config)
    return sparse_autoencoder(cfg, language_model(cfg, objects), objects)


def _with_directions(cells: Sequence[_Cell], objects: ObjectCache) -> tuple[list[_Cell], list[str]]:
    """The cells with the directions of their leading latents; notes on those that cannot load."""
    loaded, notes = [], []
    for cell in cells:
        try:
            sae = _load_sae(cell, objects)
            if sae.metadata.get("fingerprint") != cell.about["sae"]["fingerprint"]:
                raise SAEError("the SAE's files have changed since the cell ran")
            directions = sae.directions(cell.leading["latent"].tolist())
            loaded.append(replace(cell, directions=directions.float().cpu()))
        except Exception as error:
            notes.append(f"latents of {cell.label} were not matched: {_reason(error)}")
    return loaded, notes


def _matches(cells: Sequence[_Cell], objects: ObjectCache) -> tuple[pd.DataFrame, list[str]]:
    """A row per leading latent and other SAE; notes on SAEs that cannot load."""
    rows: list[dict[str, Any]] = []
    notes = []
    for target in reversed(cells):
        others = [c for c in cells if c is not target and c.is_comparable(target)]
        if not others:
            continue
        try:
            decoder = _load_sae(target, objects).W_dec
            for source in others:
                rows += _rows(source, target, decoder)
        except Exception as error:
            notes.append(f"no latents were matched to {target.label}: {_reason(error)}")
    ordered = sorted(rows, key=lambda row: (row["from_cell"], row["to_cell"]))
    return pd.DataFrame(ordered), notes


def _rows(source: _Cell, target: _Cell, decoder: Tensor) -> list[dict[str, Any]]:
    assert source.directions is not None, "only cells with directions are matched"
    near = nearest_directions(source.directions, decoder)
    together = cofiring(source.fires, target.fires)
    direction_of = dict(zip(target.leading["latent"], target.leading["direction"], strict=True))
    chance = cosine_by_chance(decoder.shape[1], decoder.shape[0])
    rows = []
    for i, latent in enumerate(source.leading.to_dict("records")):
        nearest = int(near.latents[i, 0])
        rows.append(
            {
                **_cell_columns("from", source),
                "latent": int(latent["latent"]),
                "direction": latent["direction"],
                "rank": int(latent["rank"]),
                **_cell_columns("to", target),
                "nearest": nearest,
                "nearest_direction": direction_of.get(nearest),
                "cosine": float(near.cosines[i, 0]),
                "cosine_by_chance": chance,
                **_most_coactive(together, i, target),
            }
        )
    return rows


def _most_coactive(together: Cofiring, i: int, target: _Cell) -> dict[str, Any]:
    """The target's leading latent with the largest phi; None where phi is undefined for all."""
    phi = together.phi[i]
    best = None if np.isnan(phi).all() else int(np.nanargmax(phi))
    return {
        "n_rows": together.n_rows,
        "cofiring": None if best is None else int(target.fires.latents[best]),
        "phi": None if best is None else float(phi[best]),
        "jaccard": None if best is None else float(together.jaccard[i, best]),
    }


def _cell_columns(end: str, cell: _Cell) -> dict[str, Any]:
    return {
        f"{end}_cell": cell.number,
        f"{end}_model": str(cell.about["model"]["name"]),
        f"{end}_sae": str(cell.about["config"]["sae"]["name"]),
        f"{end}_layer": cell.hookpoint.layer,
        f"{end}_width": cell.width,
        f"{end}_d_sae": int(cell.about["sae"]["d_sae"]),
    }


class Process:
    """What the runs of one process share.

    Hydra creates the callback and calls the job by itself, so that neither can be given an object:
    this is the one place where they meet.
    """

    def __init__(self) -> None:
        self.objects = ObjectCache()
        """Models, SAEs and results that the cells of a sweep share."""
        self.sweep: Path | None = None
        """Folder of the sweep that the process runs and has not finished."""


PROCESS = Process()


class SweepCallback(Callback):
    """Locks the folder of a run or a sweep before anything is written to it, and plans a sweep.

    `cli.main` calls `finish` at the end of the process, however it ends.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Lock the run's folder, before Hydra writes its config there."""
        words = _words(config)
        _end_of_dry_run([words], CellConfigs())
        folder = Path(config.hydra.run.dir)
        with _ending_the_process():
            _check_not_read(config, folder)
        _reserve(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Write plan.json: all cells, for each set of texts the hookpoints that cells need, and the
        trainings that share a corpus."""
        folder, search = Path(config.hydra.sweep.dir), is_search(config.hydra.sweeper)
        with _ending_the_process():
            cells, configs = _cells(config), CellConfigs()
            n_trials = int(config.hydra.sweeper.n_trials) if search else None
            _end_of_dry_run(cells, configs, n_trials)
            _check_cells(cells, configs)
            if search:
                _check_fractions(_all_words(config), configs)
        _reserve(folder)
        PROCESS.sweep = folder
        launcher = str(config.hydra.launcher.get("_target_", ""))
        content = {
            "command": f"python -m saexp {shlex.join(sys.argv[1:])}",
            # A search lists its cells when it has chosen them.
            "cells": [] if search else cells,
            "group": group_name(
                folder,
                read_plan(folder).get("cells", []) if search else cells,
                config.hydra.runtime.choices.get("experiment"),
            ),
            "passes": passes(cells, PROCESS.objects, configs),
            TRAININGS: planned_trainings(launcher, cells, configs.of),
        }
        with _ending_the_process():
            write_json(folder / SWEEP_PLAN, content, option=SWEEP_FOLDER)


def _reserve(folder: Path) -> None:
    with _ending_the_process():
        reserve(folder)


def _check_cells(cells: Sequence[Sequence[str]], configs: CellConfigs) -> None:
    """Raise the error of all cells, if all have the same; others are reported by their cells."""
    messages: list[str] = []
    for cell in cells:
        try:
            check_before(configs.of(cell))
            return
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            messages.append(str(one_line(error)))
        if messages[-1] != messages[0]:
            return
    if messages:
        raise ConfigError(messages[0])


def _check_fractions(words: Sequence[str], configs: CellConfigs) -> None:
    """Raise ConfigError where a search would choose fractions for a setting that takes none."""
    for key, (start, end), cell in between(words):
        try:
            configs.of(cell)
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            ends = f"{math.ceil(start)},{math.floor(end)}"
            raise ConfigError(
                f"{one_line(error)}; an interval chooses fractions: type 'int(interval({ends}))' "
                f"or 'range({math.ceil(start)},{math.floor(end) + 1})' for {key}"
            ) from error


def _check_not_read(config: DictConfig, folder: Path) -> None:
    """Raise StoreError where the run would write into the run or sweep that its task reads."""
    path = config.task.get("path") if config.task.get("name") in ("report", "workspace") else None
    if path and folder.resolve().is_relative_to(Path(str(path)).resolve()):
        raise StoreError(
            f"hydra.run.dir={folder} is in task.path={path}, whose files it would replace; leave "
            "hydra.run.dir out"
        )


@contextmanager
def _ending_the_process() -> Iterator[None]:
    """Exit with one line and code 1; of other exceptions in a callback, Hydra only warns."""
    try:
        yield
    except SaexpError as error:
        # Later runs of this process are not cells of the sweep that could not begin.
        PROCESS.sweep = None
        sys.stderr.write(f"saexp: {error}\n")
        raise SystemExit(1) from error


def _words(config: DictConfig) -> list[str]:
    """The overrides of a command as they were typed."""
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    return [str(word) for word in typed]


def _end_of_dry_run(
    cells: Sequence[Sequence[str]], configs: CellConfigs, n_trials: int | None = None
) -> None:
    """Print what the cells would compute and exit, where the command asks for no more.

    A search runs `n_trials` of the cells.
    """
    for cell in cells:
        if not any(key_of(word).lstrip("+") == "sweep.dry_run" for word in cell):
            return
        # The cell reports the error of a config that cannot be composed, if another one can.
        with suppress(*COMPOSITION_ERRORS, SaexpError):
            if not configs.of(cell).sweep.dry_run:
                return
            sys.stdout.write("\n".join(show_plan(cells, PROCESS.objects, configs, n_trials)) + "\n")
            sys.stdout.flush()
            raise SystemExit(0)


def _cells(config: DictConfig) -> list[list[str]]:
    """Every cell's overrides in the order of the basic sweeper; of a search, every cell that it may
    visit; empty for another sweeper.

    Raises Hydra's errors for words that are not overrides.
    """
    # Hydra has no public function that expands a sweep into the overrides of its cells.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    about, words = config.hydra.sweeper, _all_words(config)
    if is_search(about):
        return visitable(words)
    if not str(about._target_).endswith("BasicSweeper"):
        return []
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    return BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]


def _all_words(config: DictConfig) -> list[str]:
    """The overrides of a sweep: those of its sweeper's config, then those of the command."""
    params = config.hydra.sweeper.get("params") or {}
    return [*(f"{k}={v}" for k, v in params.items()), *_words(config)]


def running() -> Path | None:
    """Folder of the sweep that this process runs and has not finished."""
    return PROCESS.sweep


def finish(show: Callable[[str], object]) -> None:
    """Write table, report and tracked run of this process's sweep. `show` is given a summary before
    the tracked run, which may end with how to upload it.

    Nothing where the process runs no sweep. Works on the cells that exist, also after Ctrl-C; after
    a signal during the writing, the next call writes them again.
    """
    folder = PROCESS.sweep
    if folder is None:
        return
    try:
        results = _written(folder) if any(folder.glob("*/.hydra")) else None
    except Exception:
        PROCESS.sweep = None
        raise
    PROCESS.sweep = None
    if results is None:
        return
    from saexp.reports.sweep import findings

    table, figures = results
    counts = table["status"].value_counts()
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    lines = [*findings(table, folder), f"sweep: {len(table)} cells: {states}"]
    show("\n".join([*lines, f"report: {folder}/sweep.html"]))
    try:
        _track(folder, table, figures)
    except Exception as error:
        # The files are complete; cells whose tracker failed have reported that.
        log.warning("the sweep's own run could not be tracked: %s", " ".join(str(error).split()))


def _written(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The sweep's table and figures, with its report written from them."""
    from saexp.reports.sweep import write_sweep

    match_cells(folder, PROCESS.objects)
    return write_sweep(folder)


def _track(folder: Path, table: Any, figures: dict[str, Any]) -> None:
    """A last tracked run in the sweep's group, with the table and the figures."""
    from saexp import tracking
    from saexp.config import to_tracker_config

    composed = next((p for p in sorted(folder.glob("*/.hydra/config.yaml"))), None)
    if composed is None:
        return
    settings: Any = OmegaConf.to_container(OmegaConf.load(composed).tracker, resolve=True)
    # W&B's own process may run in another working directory.
    sweep_folder, group = folder.resolve(), group_of(folder)
    tracker = tracking.start(
        to_tracker_config(settings),
        folder=sweep_folder,
        config={"command": read_plan(folder).get("command"), "n_cells": len(table)},
        name=f"sweep {group}",
        job_type="sweep",
        group=group,
        sweep=sweep_folder,
    )
    counts = table["status"].value_counts()
    tracker.metrics({f"sweep/{state.replace(' ', '_')}": int(n) for state, n in counts.items()})
    tracker.table("sweep", table)
    for name, figure in figures.items():
        tracker.figure(name, figure)
    pages = {name: sweep_folder / name for name in ("sweep.parquet", "sweep.html")}
    tracker.artifact(tracking.Artifact(f"sweep-{group}", "sweep", pages))
    tracker.finish(0)
