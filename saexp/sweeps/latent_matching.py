"""Which selected latents of a sweep's SAEs are alike."""

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
from saexp.errors import SAEError
from saexp.files import SWEEP_FOLDER, write_json, write_table
from saexp.models.hookpoints import Hookpoint
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.reports.saved import SavedRun, cells_table
from saexp.reports.sweep import MATCHES, MATCHES_NOTES
from saexp.saes.sae import SparseAutoencoder
from saexp.wording import brief

log = logging.getLogger(__name__)


_NEEDED = ("activations", "rows", "latents")
"""Tables that a contrast leaves, and no other task."""


@dataclass(frozen=True)
class _Cell:
    """The first cell with this SAE: its leading selected latents, and where they fire."""

    number: int
    about: dict[str, Any]
    leading: pd.DataFrame
    fires: Firing
    directions: Tensor | None = None
    """`[n, d]`, of the leading latents, in their order."""

    @property
    def hookpoint(self) -> Hookpoint:
        return Hookpoint.parse(self.about["sae"]["hookpoint"])

    @property
    def width(self) -> str:
        """As it was typed, else as it is."""
        return str(self.about["config"]["width"] or self.about["sae"]["d_sae"])

    @property
    def label(self) -> str:
        return f"layer {self.hookpoint.layer}, width {self.width}"

    def is_comparable(self, other: "_Cell") -> bool:
        """Directions of one model's one stream, at any block."""
        same_model = self.about["model"]["fingerprint"] == other.about["model"]["fingerprint"]
        return same_model and self.hookpoint.stream == other.hookpoint.stream


def match_cells(folder: Path) -> None:
    """Write the matches of a sweep's SAEs, and what could not be matched, for its report."""
    for left in (folder / MATCHES, folder / MATCHES_NOTES):
        left.unlink(missing_ok=True)
    notes: list[str] = []
    began = time.perf_counter()
    try:
        cells = _with_directions(_cells(folder), notes)
        found = _matches(cells, notes) if len(cells) > 1 else pd.DataFrame()
        if len(found):
            write_table(folder / MATCHES, found, option=SWEEP_FOLDER)
            seconds = time.perf_counter() - began
            log.info("matched latents of %d SAEs, %.1f s", len(cells), seconds)
    except (Exception, KeyboardInterrupt) as error:
        # The table and the report of the sweep are what counts.
        notes.append(f"latents were not matched: {_told(error)}")
    if notes:
        write_json(folder / MATCHES_NOTES, notes, option=SWEEP_FOLDER)
        for note in notes:
            log.warning("%s", note)


def _told(error: BaseException) -> str:
    return brief(str(error), 300) or type(error).__name__


def _cells(folder: Path) -> list[_Cell]:
    """One finished cell per SAE, of those that selected latents; none where there are no two."""
    found: dict[tuple[str, ...], _Cell] = {}
    table = cells_table(folder)
    for row in table[table["status"] == "finished"].to_dict("records"):
        run = SavedRun(folder / str(row["folder"]))
        if not all((run.folder / f"{name}.parquet").is_file() for name in _NEEDED):
            continue
        about = run.provenance
        names = [about["model"]["fingerprint"], about["sae"]["fingerprint"]]
        key = (*map(str, names), about["sae"]["hookpoint"])
        if key not in found and (cell := _cell(run, int(row["cell"]))) is not None:
            found[key] = cell
    return list(found.values()) if len(found) > 1 else []


def _cell(run: SavedRun, number: int) -> _Cell | None:
    activations, rows, latents = (run.table(name) for name in _NEEDED)
    if activations is None or rows is None or latents is None or activations.empty:
        return None
    fires = firing(activations, rows)
    leading = latents.set_index("latent").loc[fires.latents, ["direction", "rank"]].reset_index()
    return _Cell(number, run.provenance, leading, fires)


def _loaded(cell: _Cell) -> SparseAutoencoder:
    """The cell's SAE, checked as a run does; from this process's cache where it is there."""
    config = resolved(cell.about["config"])
    registry.load_plugins(config["plugins"])
    config["model"], config["sae"] = ModelConfig(**config["model"]), SAEConfig(**config["sae"])
    cfg = RunConfig(**config)
    return sparse_autoencoder(cfg, language_model(cfg))


def _with_directions(cells: Sequence[_Cell], notes: list[str]) -> list[_Cell]:
    kept = []
    for cell in cells:
        try:
            sae = _loaded(cell)
            if sae.metadata.get("fingerprint") != cell.about["sae"]["fingerprint"]:
                raise SAEError("the SAE's files are others by now than when the cell ran")
            own = sae.directions(cell.leading["latent"].tolist())
            kept.append(replace(cell, directions=own.float().cpu()))
        except Exception as error:
            notes.append(f"latents of {cell.label} were not matched: {_told(error)}")
    return kept


def _matches(cells: Sequence[_Cell], notes: list[str]) -> pd.DataFrame:
    """A row per leading latent and other SAE."""
    rows: list[dict[str, Any]] = []
    for target in reversed(cells):
        others = [c for c in cells if c is not target and c.is_comparable(target)]
        if not others:
            continue
        try:
            decoder = _loaded(target).W_dec
            for source in others:
                rows += _rows(source, target, decoder)
        except Exception as error:
            notes.append(f"no latents were matched to {target.label}: {_told(error)}")
    ordered = sorted(rows, key=lambda row: (row["from_cell"], row["to_cell"]))
    return pd.DataFrame(ordered)


def _rows(source: _Cell, target: _Cell, decoder: Tensor) -> list[dict[str, Any]]:
    assert source.directions is not None, "only cells with directions are matched"
    near = nearest_directions(source.directions, decoder)
    together = cofiring(source.fires, target.fires)
    spoken_for = dict(zip(target.leading["latent"], target.leading["direction"], strict=True))
    chance = cosine_by_chance(decoder.shape[1], decoder.shape[0])
    rows = []
    for i, own in enumerate(source.leading.to_dict("records")):
        nearest = int(near.latents[i, 0])
        rows.append(
            {
                **_named("from", source),
                "latent": int(own["latent"]),
                "direction": own["direction"],
                "rank": int(own["rank"]),
                **_named("to", target),
                "nearest": nearest,
                "nearest_direction": spoken_for.get(nearest),
                "cosine": float(near.cosines[i, 0]),
                "cosine_by_chance": chance,
                **_most_together(together, i, target),
            }
        )
    return rows


def _most_together(together: Cofiring, i: int, target: _Cell) -> dict[str, Any]:
    """Of the target's leading latents the one with the largest phi; None where none has one."""
    phi = together.phi[i]
    best = None if np.isnan(phi).all() else int(np.nanargmax(phi))
    return {
        "n_rows": together.n_rows,
        "cofiring": None if best is None else int(target.fires.latents[best]),
        "phi": None if best is None else float(phi[best]),
        "jaccard": None if best is None else float(together.jaccard[i, best]),
    }


def _named(end: str, cell: _Cell) -> dict[str, Any]:
    return {
        f"{end}_cell": cell.number,
        f"{end}_model": str(cell.about["model"]["name"]),
        f"{end}_sae": str(cell.about["config"]["sae"]["name"]),
        f"{end}_layer": cell.hookpoint.layer,
        f"{end}_width": cell.width,
        f"{end}_d_sae": int(cell.about["sae"]["d_sae"]),
    }
