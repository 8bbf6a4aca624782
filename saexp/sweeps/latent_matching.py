"""Matching the selected latents of a sweep's SAEs by direction and co-activation."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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
from saexp.config import ModelConfig, RunConfig, SAEConfig
from saexp.config.environment import resolved
from saexp.context import ObjectCache
from saexp.errors import SAEError
from saexp.files import SWEEP_FOLDER, write_json, write_table
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.reports.saved import SavedRun, cells_table
from saexp.reports.sweep import MATCHES, MATCHES_NOTES
from saexp.saes.sae import SparseAutoencoder
from saexp.wording import brief

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
        cells, notes = _with_directions(_cells(folder), objects)
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


def _cells(folder: Path) -> list[_Cell]:
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
