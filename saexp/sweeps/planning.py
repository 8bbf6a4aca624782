"""Sweeps: hookpoints planned before the first cell, table and report after the last."""

import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from saexp.config import RunConfig, parse_layers, to_run_config
from saexp.config.messages import COMPOSITION_ERRORS, key_of
from saexp.errors import SaexpError, StoreError
from saexp.files import SWEEP_FOLDER, write_json
from saexp.pipeline.run_folder import reserve
from saexp.results import SWEEP_PLAN, read_plan

log = logging.getLogger(__name__)


_IGNORED = frozenset({"coefficient", "width", "latents", "sae_trainer", "tracker"})
"""Keys that never change which hookpoint of which texts a cell needs; `analyzer.x=` neither, but an
analyzer may choose its positions."""
_OF_LAYERS = ("intervention.latents", "intervention.layers")
"""Settings of an intervention that name layers whose SAEs take part."""
_sweep: Path | None = None
"""Folder of the sweep that this process runs."""


class SweepCallback(Callback):
    """Holds the folder of a run or a sweep before anything is written to it, and plans a sweep;
    `cli.main` calls `finish` at its end, however it ends."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Hold the run's folder, before Hydra writes its config there."""
        _reserve(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Write plan.json: all cells, and per set of texts the hookpoints they need together."""
        global _sweep
        _reserve(Path(config.hydra.sweep.dir))
        _sweep = Path(config.hydra.sweep.dir)
        cells = _cells(config)
        content = {
            "command": f"python -m saexp {shlex.join(sys.argv[1:])}",
            "cells": cells,
            "passes": _passes(cells),
        }
        with _ending_the_process():
            write_json(_sweep / SWEEP_PLAN, content, option=SWEEP_FOLDER)


def _reserve(folder: Path) -> None:
    with _ending_the_process():
        reserve(folder)


@contextmanager
def _ending_the_process() -> Iterator[None]:
    """One line and exit code 1: of a callback's Exception Hydra only warns, and goes on."""
    global _sweep
    try:
        yield
    except StoreError as error:
        # What this process runs next is not taken for the sweep that could not begin.
        _sweep = None
        sys.stderr.write(f"saexp: {error}\n")
        raise SystemExit(1) from error


def _cells(config: DictConfig) -> list[list[str]]:
    """Every cell's overrides in the order of the basic sweeper; empty for a sweeper that searches.

    Raises Hydra's errors for words that are no overrides.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    about = config.hydra.sweeper
    if not str(about._target_).endswith("BasicSweeper"):
        return []
    fixed = [f"{k}={v}" for k, v in (about.params or {}).items()]
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    words = [*fixed, *map(str, typed)]
    parsed = OverridesParser.create().parse_overrides(words)
    return BasicSweeper.split_arguments(parsed, None)[0]


def _passes(cells: Iterable[list[str]]) -> dict[str, list[list[Any]]]:
    """Texts' key -> [layer, stream or null] of all cells that read those texts.

    A cell that cannot be composed is left to fail by itself.
    """
    found: dict[str, set[tuple[int, str | None]]] = {}
    kinds = dict.fromkeys(tuple(_that_matter(cell)) for cell in cells)
    for words in kinds:
        try:
            cfg = to_run_config(compose("config", overrides=list(words)))
            found.setdefault(texts_key(cfg), set()).update(_hookpoints(cfg, alone=len(kinds) == 1))
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            log.debug("not planned: %s (%s)", words, error)
    return {key: [list(h) for h in sorted(hs, key=str)] for key, hs in found.items()}


def _that_matter(cell: list[str]) -> list[str]:
    """Those of a cell's words that may change which hookpoint of which texts it needs."""
    keys = [key_of(w) for w in cell]
    named = any(key in _OF_LAYERS for key in keys)
    return [w for w, key in zip(cell, keys, strict=True) if not _ignored(key, named)]


def _ignored(key: str, layers_named: bool) -> bool:
    if key.split(".")[0] == "intervention":
        return not layers_named or key not in (*_OF_LAYERS, "intervention")
    return key.split(".")[0] in _IGNORED or key.startswith("analyzer.")


def _hookpoints(cfg: RunConfig, *, alone: bool) -> set[tuple[int, str | None]]:
    """What a cell needs; `alone` is the only kind of cell, so that it can say so by itself."""
    if cfg.task.name in ("collect", "train"):
        return {(n, s) for n in parse_layers(cfg.layer) for s in cfg.task.streams}
    layers = [] if cfg.layer is None else parse_layers(cfg.layer)
    if not layers and cfg.sae.release is not None and cfg.sae.id is not None:
        from saexp.saes.catalogue import find

        layer = find(cfg.sae).layer
        layers = [] if layer is None else [layer]
    own = {(n, cfg.sae.stream) for n in layers}
    one = not isinstance(cfg.layer, list)
    if one and not alone and cfg.sae.path and Path(cfg.sae.path).exists():
        from saexp.saes.loading import hookpoints_of

        # Its files say where it reads, whatever the cell names. What they lack, the cell will say.
        with suppress(SaexpError):
            own = set(hookpoints_of(cfg.sae.path, cfg.layer, cfg.sae.stream))
    return own | {(n, cfg.sae.stream) for n in _layers_changed(cfg)}


def _layers_changed(cfg: RunConfig) -> list[int]:
    """Layers beside the run's own whose SAEs the causal test reads."""
    about = cfg.intervention
    if cfg.task.name != "analyze" or about.name == "none":
        return []
    if not about.by_layer or about.layers != "all":
        return about.latent_layers(0)
    from saexp.pipeline.objects import language_model

    return about.latent_layers(language_model(cfg).n_layers)


def texts_key(cfg: RunConfig) -> str:
    """Hash of what decides which texts are forwarded through which model, and where they are read.

    Which of a set of cells share a store; the store's own key is made from what was tokenised.
    """
    parts = [asdict(cfg.model), asdict(cfg.dataset), asdict(cfg.positions), cfg.store.dtype]
    parts.append(asdict(cfg.collector))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def swept_keys(sweep: Path) -> set[str]:
    """Keys that differ between the cells of this sweep; none where there is no plan."""
    pairs = [{key_of(w): w for w in cell} for cell in read_plan(sweep).get("cells", [])]
    keys = {key for cell in pairs for key in cell}
    return {key for key in keys if len({cell.get(key) for cell in pairs}) > 1}


def ahead(cfg: RunConfig, sweep: Path | None) -> list[tuple[int, str | None]]:
    """(layer, stream) that cells of this sweep need from this cell's texts; None: as the SAE's."""
    if sweep is None or not (sweep / SWEEP_PLAN).exists():
        return []
    try:
        hookpoints = read_plan(sweep)["passes"].get(texts_key(cfg), [])
        return [(int(layer), stream) for layer, stream in hookpoints]
    except (KeyError, TypeError, ValueError):
        log.warning(
            "%s is damaged: this cell collects its own hookpoints alone", sweep / SWEEP_PLAN
        )
        return []


def running() -> Path | None:
    """Folder of the sweep that this process runs and has not finished."""
    return _sweep


def finish() -> str | None:
    """Table, report and last W&B run of the sweep of this process; what to print, None if none.

    Works on whatever cells there are, so also after Ctrl-C; a signal that comes while the table and
    the report are written leaves the sweep to the next call.
    """
    global _sweep
    folder = _sweep
    if folder is None:
        return None
    try:
        results = _written(folder) if any(folder.glob("*/.hydra")) else None
    except Exception:
        _sweep = None
        raise
    _sweep = None
    if results is None:
        return None
    table, figures = results
    try:
        _track(folder, table, figures)
    except Exception as error:
        # The files are what counts; each cell that failed by its tracker has said so.
        log.warning("the sweep's own run could not be tracked: %s", " ".join(str(error).split()))
    from saexp.reports.sweep import findings

    counts = table["status"].value_counts()
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    lines = [
        *findings(table, folder),
        f"sweep: {len(table)} cells: {states}",
        f"report: {folder}/sweep.html",
    ]
    return "\n".join(lines)


def _written(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The sweep's table and figures, with its report written from them."""
    from saexp.reports.sweep import write_sweep
    from saexp.sweeps.latent_matching import match_cells

    match_cells(folder)
    return write_sweep(folder)


def _track(folder: Path, table: Any, figures: dict[str, Any]) -> None:
    """One last run in the sweep's group that holds the table and the figures."""
    from saexp import tracking
    from saexp.config import TrackerConfig

    composed = next((p for p in sorted(folder.glob("*/.hydra/config.yaml"))), None)
    if composed is None:
        return
    settings: Any = OmegaConf.to_container(OmegaConf.load(composed).tracker, resolve=True)
    tracker = tracking.start(
        TrackerConfig(**settings),
        # W&B's own process may have begun in another folder.
        folder=folder.resolve(),
        config={"command": read_plan(folder).get("command"), "n_cells": len(table)},
        name=f"sweep-{folder.name}",
        job_type="sweep",
        group=folder.name,
    )
    counts = table["status"].value_counts()
    tracker.metrics({f"sweep/{state.replace(' ', '_')}": int(n) for state, n in counts.items()})
    tracker.table("sweep", table)
    for name, figure in figures.items():
        tracker.figure(name, figure)
    tracker.finish(0)
