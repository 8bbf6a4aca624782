"""A sweep as its cells' folders tell it: one row per cell, finished or not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from saexp.errors import StoreError
from saexp.reports.saved import PROVENANCE, SavedRun
from saexp.results import read_plan
from saexp.stopping import STOPS

STATES = ("finished", "failed", "damaged", "stopped", "not run")
CONTROL = "control"
"""Column: which control a cell's SAE is (`random`); empty for a trained one."""
PAGES = ("report.html", "dashboard.html")
"""A cell's page, which is rendered from its other files."""
_KEYS = ("model", "sae", "dataset", "sae_trainer", "layer", "width", "coefficient")


def cells_table(folder: Path) -> pd.DataFrame:
    """A row per cell: number, folder, status, error, a column per override and per metric.

    Status is one of `finished`, `failed` (with its error), `damaged` (a file of a finished cell is
    missing or was changed, which `error` names), `stopped` (killed midway), `not run`.
    """
    rows: dict[int, dict[str, Any]] = {}
    planned: list[list[str]] = read_plan(folder).get("cells", [])
    for place in sorted(folder.iterdir()):
        match = re.match(r"(\d+)_?", place.name)
        if not place.is_dir() or not match or not (place / ".hydra").is_dir():
            continue
        number, typed = int(match[1]), _typed(place)
        # A folder that an earlier sweep left here is no cell of this one.
        own = planned[number] if number < len(planned) else None
        if not planned or own is not None and (typed is None or set(typed) == set(own)):
            rows[number] = _cell(place, number, typed or own or [])
    for number, overrides in enumerate(planned):
        if number not in rows:
            rows[number] = {
                "cell": number,
                "folder": None,
                "status": "not run",
                "error": None,
                **_split(overrides),
            }
    return _table([rows[n] for n in sorted(rows)])


def _typed(place: Path) -> list[str] | None:
    """The cell's overrides as Hydra wrote them; None where it was killed before, or the file is
    damaged."""
    try:
        text = (place / ".hydra/overrides.yaml").read_text("utf-8")
        words = yaml.safe_load(text)
        whole = text.endswith("\n") and isinstance(words, list)
        if not whole or not all(isinstance(word, str) for word in words):
            return None
        _split(words)
    except (OSError, ValueError, yaml.YAMLError, HydraException):
        return None
    return words


def _cell(place: Path, number: int, overrides: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": number, "folder": place.name, "status": "stopped", "error": None}
    row |= _split(overrides)
    if (place / "error.txt").is_file():
        text = (place / "error.txt").read_text("utf-8", errors="replace")
        kind, _, text = text.strip().partition(":")
        if kind not in STOPS:
            row |= {"status": "failed", "error": text.strip() or kind}
        return row
    if not any((place / name).exists() for name in (PROVENANCE, *PAGES)):
        return row
    run = SavedRun(place)
    try:
        if run.provenance.get("status") == "finished":
            run.check()
            return {**row, "status": "finished", **_unnamed(run, row), **run.metrics}
        # A cell that was killed midway has its config there.
        _ = run.config
    except StoreError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def _unnamed(run: SavedRun, row: Mapping[str, Any]) -> dict[str, Any]:
    """What may be swept and is no column of the row yet, as the cell's config has it."""
    values = {key: run.config.get(key) for key in _KEYS if key not in row}
    columns = {k: v["name"] if isinstance(v, dict) else v for k, v in values.items()}
    return columns | {CONTROL: (run.provenance.get("sae") or {}).get("control")}


def _split(overrides: list[str]) -> dict[str, Any]:
    """{'layer': 3, 'width': '16k'}: values as Hydra reads them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {read.key_or_group: read.value() for read in parsed}


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    return pd.DataFrame(columns if rows else {n: [] for n in ("cell", "folder", "status")})


def _column(values: list[Any]) -> pd.Series:
    """A type that parquet takes and that does not turn 256 into 256.0; mixed kinds become text."""
    kinds = {type(v) for v in values if v is not None}
    gaps = None in values
    if kinds == {int}:
        return pd.Series(values, dtype="Int64" if gaps else "int64")
    if kinds and kinds <= {int, float}:
        return pd.Series(values, dtype="float64")
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean" if gaps else "bool")
    return pd.Series([None if v is None else str(v) for v in values], dtype=object)


def swept(table: pd.DataFrame) -> list[str]:
    """The overrides whose value differs between cells, in the order of the columns."""
    known = {"cell", "folder", "status", "error", CONTROL}
    names = [c for c in table.columns if c not in known and "/" not in str(c)]
    return [c for c in names if table[c].dropna().astype(str).nunique() > 1]


def groups_of(table: pd.DataFrame) -> list[str]:
    """The contrast's two groups, as the metrics name them."""
    pattern = r"contrast/best_latent_(.+)"
    return [m[1] for c in table.columns if (m := re.fullmatch(pattern, str(c)))]


def line_keys(done: pd.DataFrame) -> list[str]:
    """What separates lines beside layer and width: whatever else was swept but the coefficient."""
    besides = ("layer", "width", "coefficient")
    return [k for k in swept(done) if k not in besides and not k.startswith("intervention")]


def cell_words(row: pd.Series, named: list[str]) -> str:
    """Layer, width where it is set, and what else of `named` differs between cells."""
    others = [k for k in named if k not in ("layer", "width", "coefficient")]
    # A list of layers is no scalar, and never missing.
    shown = [k for k in ("layer", "width", *others) if pd.isna(row[k]) is not True]
    return ", ".join(f"{k} {row[k]}" for k in shown)
