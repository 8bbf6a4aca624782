"""A sweep as its cells' folders tell it: one row per cell, finished or not."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

STATES = ("finished", "failed", "stopped", "not run")
PLAN = "plan.json"
_KEYS = ("model", "sae", "dataset", "sae_trainer", "layer", "width", "coefficient")


def read_plan(folder: Path) -> dict[str, Any]:
    """plan.json, as the sweep wrote it before its first cell; empty where there is none."""
    try:
        return json.loads((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def cells_table(folder: Path) -> pd.DataFrame:
    """A row per cell: number, folder, status, error, a column per override and per metric.

    Status is one of `finished`, `failed` (with its error), `stopped` (killed midway), `not run`.
    """
    rows: dict[int, dict[str, Any]] = {}
    for place in sorted(folder.iterdir()):
        number = re.match(r"(\d+)_?", place.name)
        if place.is_dir() and number and (place / ".hydra").is_dir():
            rows[int(number[1])] = _cell(place, int(number[1]))
    for number, overrides in enumerate(read_plan(folder).get("cells", [])):
        if number not in rows:
            rows[number] = {
                "cell": number,
                "folder": None,
                "status": "not run",
                "error": None,
                **_split(overrides),
            }
    table = pd.DataFrame([rows[n] for n in sorted(rows)])
    return _plain(table) if len(table) else pd.DataFrame(columns=["cell", "folder", "status"])


def _cell(place: Path, number: int) -> dict[str, Any]:
    overrides = yaml.safe_load((place / ".hydra/overrides.yaml").read_text("utf-8")) or []
    row: dict[str, Any] = {"cell": number, "folder": place.name, "status": "stopped", "error": None}
    row |= _split(overrides)
    provenance = _json(place / "provenance.json")
    if (place / "error.txt").is_file():
        kind, _, text = (place / "error.txt").read_text("utf-8").strip().partition(": ")
        interrupted = kind == "KeyboardInterrupt"
        row |= {"status": "stopped"} if interrupted else {"status": "failed", "error": text or kind}
    elif provenance.get("status") == "finished":
        row["status"] = "finished"
        config = provenance["config"]
        for key in _KEYS:
            value = config.get(key)
            row.setdefault(key, value["name"] if isinstance(value, dict) else value)
        row |= _json(place / "metrics.json")
    return row


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _split(overrides: list[str]) -> dict[str, Any]:
    """{'layer': 3, 'width': '16k'}: numbers as numbers, the rest as typed."""
    pairs = [word.lstrip("+~").partition("=") for word in overrides]
    return {key: yaml.safe_load(value) if value else None for key, _, value in pairs}


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Columns that parquet takes: where kinds are mixed, or lists, text."""
    for name in table.columns:
        column = table[name]
        if column.dtype == object:
            kinds = {type(v) for v in column if v is not None and v == v}
            if kinds - {str} and not kinds <= {int, float, bool}:
                table[name] = [None if v is None or v != v else str(v) for v in column]
    return table


def swept(table: pd.DataFrame) -> list[str]:
    """The overrides whose value differs between cells, in the order of the columns."""
    known = {"cell", "folder", "status", "error"}
    names = [c for c in table.columns if c not in known and "/" not in str(c)]
    return [c for c in names if table[c].astype(str).nunique() > 1]


def groups_of(table: pd.DataFrame) -> list[str]:
    """The contrast's two groups, as the metrics name them."""
    pattern = r"contrast/best_latent_(.+)"
    return [m[1] for c in table.columns if (m := re.fullmatch(pattern, str(c)))]
