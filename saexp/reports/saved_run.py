"""Saved runs and the cells of a sweep, read from their folders."""

import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pyarrow import ArrowException

from saexp.config import parse_width
from saexp.config.run import WITHOUT_EFFECT
from saexp.context import STOPS
from saexp.digests import (
    checksum_of,
    difference,
    file_sha256,
    has_intact_seal,
    is_checksums,
    is_sealed,
)
from saexp.errors import ConfigError, StoreError, brief
from saexp.results import model_words, read_plan

PROVENANCE = "provenance.json"
_AGAIN = "run its command again, which recomputes what is damaged"


class _Content(dict[str, Any]):
    """An object of a JSON file, which reports a missing key in one line."""

    def __init__(self, content: dict[str, Any], file: Path) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.file} is damaged (it has no '{key}'); {_AGAIN}")


@dataclass(frozen=True)
class SavedRun:
    """The files of one run's folder; those of a finished run are compared with their checksums.

    Raises StoreError if the folder holds no run, or a file that is read is damaged.
    """

    folder: Path

    def _content(self, name: str) -> bytes | None:
        """A file's content; None if the run left no file of that name."""
        file = self.folder / name
        checksums = None if name == PROVENANCE else self.checksums
        expected = checksums.get(name) if checksums else None
        if expected is None and not file.is_file():
            return None
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror}); {_AGAIN}") from error
        if expected is not None and checksum_of(content) != expected:
            raise StoreError(f"{file} was changed since the run wrote it; {_AGAIN}")
        return content

    def object(self, name: str) -> dict[str, Any] | None:
        """Content of a JSON file; None if the run left no file of that name."""
        content = self._content(name)
        if content is None:
            return None
        file = self.folder / name
        try:
            parsed = json.loads(content, object_hook=lambda values: _Content(values, file))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{file} is damaged ({error}); {_AGAIN}") from error
        if not isinstance(parsed, dict):
            raise StoreError(f"{file} is damaged (it is not an object); {_AGAIN}")
        return parsed

    def _required(self, name: str) -> dict[str, Any]:
        content = self.object(name)
        if content is None:
            raise StoreError(f"{self.folder} holds no finished run ({name} is missing)")
        return content

    @cached_property
    def metrics(self) -> dict[str, float | int | None]:
        """metrics.json."""
        metrics = self._required("metrics.json")
        for name, value in metrics.items():
            if not isinstance(value, float | int | None):
                file = self.folder / "metrics.json"
                raise StoreError(f"{file} is damaged ({name} is not a number); {_AGAIN}")
        return metrics

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json."""
        provenance = self._required(PROVENANCE)
        if is_sealed(provenance) and not has_intact_seal(provenance):
            raise StoreError(
                f"{self.folder / PROVENANCE} was changed since the run wrote it; {_AGAIN}"
            )
        return provenance

    @cached_property
    def checksums(self) -> dict[str, Any] | None:
        """File name -> checksum; None for a run that is not finished."""
        files = self.provenance.get("files")
        if files is not None and not is_checksums(files):
            raise StoreError(f"{self.folder / PROVENANCE} is damaged ('files'); {_AGAIN}")
        return files

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, or None if the run left none of that name."""
        content = self._content(f"{name}.parquet")
        if content is None:
            return None
        try:
            return pd.read_parquet(io.BytesIO(content))
        except (OSError, ValueError, ArrowException) as error:
            file = self.folder / f"{name}.parquet"
            raise StoreError(f"{file} is damaged ({brief(str(error), 200)}); {_AGAIN}") from error

    def check(self) -> None:
        """Compare every file of the run with its checksum. Raises StoreError if one differs."""
        changed = difference(self.folder, self.checksums or {}, file_sha256)
        if changed is not None:
            raise StoreError(f"{self.folder}: {changed}; {_AGAIN}")

    def tables(self) -> dict[str, pd.DataFrame]:
        """Name -> table, all tables of the run."""
        names = self.checksums or [file.name for file in sorted(self.folder.glob("*.parquet"))]
        stems = [Path(n).stem for n in names if Path(n).suffix == ".parquet"]
        tables = {stem: self.table(stem) for stem in stems}
        return {stem: table for stem, table in tables.items() if table is not None}

    @cached_property
    def latents(self) -> pd.DataFrame | None:
        """latents.parquet."""
        return self.table("latents")

    @cached_property
    def effects_summary(self) -> pd.DataFrame | None:
        """effects_summary.parquet, both splits."""
        return self.table("effects_summary")

    @cached_property
    def summary(self) -> pd.DataFrame | None:
        """Effects on the test split, which all claims rest on."""
        if (table := self.effects_summary) is None or "split" not in table:
            return table
        return table[table["split"] == "test"].reset_index(drop=True)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        config = self.provenance["config"]
        if not isinstance(config, dict):
            raise StoreError(f"{self.folder / PROVENANCE} is damaged ('config'); {_AGAIN}")
        return config

    def analyzer_option(self, name: str, default: Any) -> Any:
        """An option of the analyzer; older runs have it under `options`."""
        analyzer = self.config["analyzer"]
        value = analyzer.get(name, (analyzer.get("options") or {}).get(name))
        return default if value is None else value

    @property
    def config_text(self) -> str:
        """The resolved config as JSON for reading."""
        return json.dumps(self.config, indent=1, ensure_ascii=False)

    @property
    def groups(self) -> tuple[str, str]:
        """The two groups contrasted."""
        first, second = self.provenance["groups"]
        return first, second

    @property
    def outcomes(self) -> list[str]:
        """Outcomes with a number per prompt, in the order of the config."""
        columns = [] if self.summary is None else self.summary.columns
        cfg = self.config["intervention"]
        # A constant rate is replaced by the alternatives.
        outcomes: list[str] = [*cfg["outcomes"], *(cfg.get("alternatives") or [])]
        names = dict.fromkeys(outcomes)
        return [o for o in names if o in columns]

    def is_rate(self, outcome: str) -> bool:
        """Whether an outcome is yes or no for each prompt."""
        return outcome in self._rates

    @cached_property
    def _rates(self) -> set[str]:
        if (effects := self.table("effects")) is None:
            return set()
        return {str(c) for c in effects if str(effects[c].dtype) in ("bool", "boolean")}

    @property
    def entity_types(self) -> list[str]:
        """Entity types that both groups have on the test split."""
        columns = [] if self.latents is None else self.latents.columns
        of_test = [c for c in columns if c.startswith("separation_") and c.endswith("_test")]
        types = [c.removeprefix("separation_").removesuffix("_test") for c in of_test]
        return [t for t in types if t not in ("test", "ci_low", "ci_high")]

    @cached_property
    def unit_word(self) -> str:
        """What one observation is: an entity, or an example if the data has no entities."""
        rows = self.table("rows")
        has_entities = rows is not None and bool(rows["entity"].notna().any())
        return "entities" if has_entities else "examples"

    def selected(self, direction: str) -> pd.DataFrame:
        """Selected latents of a direction, best first."""
        if (table := self.latents) is None:
            return pd.DataFrame()
        rows = table[table["selected"] & (table["direction"] == direction)]
        return rows.sort_values("rank", kind="stable")

    @cached_property
    def controls(self) -> pd.DataFrame | None:
        """controls.parquet: how closely each control of a causal test is matched."""
        return self.table("controls")

    def main_conditions(self) -> list[str]:
        """The conditions that sentences are about, in order."""
        if (summary := self.summary) is None:
            return []
        return list(summary.loc[summary["main"], "condition"].unique())

    def chosen_coefficient(self, condition: str) -> float | None:
        """The coefficient chosen on train prompts; None if only 0 was run or measured."""
        assert (summary := self.summary) is not None
        chosen = summary[(summary["condition"] == condition) & summary["chosen"]]
        return float(chosen["coefficient"].iloc[0]) if len(chosen) else None


STATES = ("finished", "failed", "damaged", "stopped", "not run")
CONTROL = "control"
"""Column with the kind of control that a cell's SAE is (`random`); empty for a trained SAE."""
PAGES = ("report.html", "dashboard.html")
"""Pages of a cell; a cell has at most one."""
_KEYS = ("model", "sae", "dataset", "sae_trainer", "layer", "width", "coefficient")


def cells_table(folder: Path) -> pd.DataFrame:
    """A row per cell: number, folder, status, error, a column per override and per metric.

    Status is one of `finished`, `failed` (with its error), `damaged` (a file of a finished cell is
    missing or was changed, see `error`), `stopped` (killed midway), `not run`.
    """
    rows: dict[int, dict[str, Any]] = {}
    planned: list[list[str]] = read_plan(folder).get("cells", [])
    for subfolder in sorted(folder.iterdir()):
        match = re.match(r"(\d+)_?", subfolder.name)
        if not subfolder.is_dir() or not match or not (subfolder / ".hydra").is_dir():
            continue
        number, overrides = int(match[1]), _overrides(subfolder)
        # A folder that an earlier sweep left here is not a cell of this one.
        expected = planned[number] if number < len(planned) else None
        is_cell = expected is not None and (overrides is None or set(overrides) == set(expected))
        if not planned or is_cell:
            rows[number] = _cell(subfolder, number, overrides or expected or [])
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


def _overrides(folder: Path) -> list[str] | None:
    """The cell's overrides as Hydra wrote them; None if they are missing or the file is damaged."""
    try:
        text = (folder / ".hydra/overrides.yaml").read_text("utf-8")
        overrides = yaml.safe_load(text)
        is_complete = text.endswith("\n") and isinstance(overrides, list)
        if not is_complete or not all(isinstance(word, str) for word in overrides):
            return None
        _split(overrides)
    except (OSError, ValueError, yaml.YAMLError, HydraException):
        return None
    return overrides


def _cell(folder: Path, number: int, overrides: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": number, "folder": folder.name, "status": "stopped"}
    row |= {"error": None, **_split(overrides)}
    if (folder / "error.txt").is_file():
        text = (folder / "error.txt").read_text("utf-8", errors="replace")
        kind, _, text = text.strip().partition(":")
        if kind not in STOPS:
            row |= {"status": "failed", "error": text.strip() or kind}
        return row
    if not any((folder / name).exists() for name in (PROVENANCE, *PAGES)):
        return row
    run = SavedRun(folder)
    try:
        if run.provenance.get("status") == "finished":
            run.check()
            return {**row, "status": "finished", **_config_values(run, row), **run.metrics}
        # A cell that was killed midway has its config there.
        _ = run.config
    except StoreError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def _config_values(run: SavedRun, row: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values of the keys that are often swept and that the row does not have yet."""
    values = {key: run.config.get(key) for key in _KEYS if key not in row}
    columns = {k: v["name"] if isinstance(v, dict) else v for k, v in values.items()}
    if columns.get("model"):
        columns["model"] = model_words(str(columns["model"]))
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
    """A column that parquet can store and that keeps integers; mixed types become text."""
    types = {type(v) for v in values if v is not None}
    has_missing = None in values
    if types == {int}:
        return pd.Series(values, dtype="Int64" if has_missing else "int64")
    if types and types <= {int, float}:
        return pd.Series(values, dtype="float64")
    if types == {bool}:
        return pd.Series(values, dtype="boolean" if has_missing else "bool")
    return pd.Series([None if v is None else str(v) for v in values], dtype=object)


BEST = "is_best"
"""Column of the table of a search: whether the cell has the best value of the objective."""
_NOT_SWEPT = ("cell", "folder", "status", "error", CONTROL, BEST)


def swept(table: pd.DataFrame) -> list[str]:
    """The overrides whose value differs between cells, in the order of the columns."""
    names = [c for c in table.columns if c not in _NOT_SWEPT and "/" not in str(c)]
    return [c for c in names if table[c].dropna().astype(str).nunique() > 1]


def groups_of(table: pd.DataFrame) -> list[str]:
    """The contrast's two groups, as the metrics name them."""
    pattern = r"contrast/best_latent_(.+)"
    return [m[1] for c in table.columns if (m := re.fullmatch(pattern, str(c)))]


def line_keys(done: pd.DataFrame, *, of_effects: bool = False) -> list[str]:
    """The swept overrides that separate curves: all that change a result but layer, width and the
    coefficient. Settings of the intervention separate only effects."""
    without = {"layer", "width", "coefficient", *WITHOUT_EFFECT}
    keys = [k for k in swept(done) if k.split(".")[0] not in without]
    return [k for k in keys if of_effects or k.split(".")[0] != "intervention"]


def contrasts(done: pd.DataFrame) -> pd.DataFrame:
    """The first cell of each contrast: an intervention and its coefficient do not change it."""
    about = ["model", "sae", "dataset", "layer", "width", *line_keys(done)]
    return done[~done[[k for k in about if k in done]].astype(str).duplicated()]


def in_order(value: Any) -> tuple[int, float, str]:
    """Sorts numbers and widths such as 16k by size, and other values after them as text."""
    for read in (float, parse_width):
        with suppress(TypeError, ValueError, ConfigError):
            return 0, float(read(value) or 0), ""
    return 1, 0.0, str(value)


def lines(table: pd.DataFrame, by: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """(label, rows) per combination of the columns `by`, in the order of their values."""
    if not by:
        return [("", table)]
    parts = []
    for key, part in table.groupby(by, sort=False, dropna=False):
        parts.append((key if isinstance(key, tuple) else (key,), part))
    parts.sort(key=lambda one: [in_order(value) for value in one[0]])
    return [
        (", ".join(f"{n} {v}" for n, v in zip(by, values, strict=True)), part)
        for values, part in parts
    ]


def cell_words(row: pd.Series, keys: list[str]) -> str:
    """Layer, width if it is set, and the values of the other `keys`."""
    others = [k for k in keys if k not in ("layer", "width", "coefficient")]
    # pd.isna of a list of layers is an array.
    present = [k for k in ("layer", "width", *others) if pd.isna(row[k]) is not True]
    return ", ".join(f"{k} {row[k]}" for k in present)


RANGES = ["controls_min", "controls_max", "band_min", "band_max"]
_NUMBERS = ["value", "ci_low", "ci_high", "n", "change", *RANGES, "p_controls", "p_floor"]
POINT = ["coefficient", "chosen", "is_baseline", *_NUMBERS, "gap_train"]
EFFECT = ["outcome", "intervention", "direction", "prompts", *POINT]
"""Columns of an effect; the others of the table say which cell it is of."""


def cell_effects(folder: Path, done: pd.DataFrame) -> pd.DataFrame:
    """A row per cell, outcome, direction, group of prompts and coefficient, of the main latents.

    Values, intervals, p-values against controls and the matched controls' range are of the test
    split; `gap_train` is, on train prompts, the size of the change less that of the most extreme
    control (NaN without train prompts), `chosen` marks the coefficient that the cell chose there,
    `is_baseline` the value without intervention. `band_min` and `band_max` are the range of the
    controls that were measured at several coefficients, if there are such.
    """
    about = ["model", "sae", "dataset", "layer", "width", *line_keys(done, of_effects=True)]
    keys = list(dict.fromkeys(k for k in about if k != "intervention"))
    rows: list[dict[str, Any]] = []
    for record in done.to_dict("records"):
        run = SavedRun(folder / str(record["folder"]))
        summary, controls = run.effects_summary, run.controls
        if summary is None:
            continue
        of_cell = {k: record.get(k) for k in ("cell", *keys)}
        of_cell["intervention"] = (run.config.get("intervention") or {}).get("name")
        rows += [of_cell | row for row in _effects_of_cell(summary, controls)]
    return pd.DataFrame(rows, columns=["cell", *keys, *EFFECT])


def _effects_of_cell(summary: pd.DataFrame, controls: pd.DataFrame | None) -> list[dict[str, Any]]:
    suffix = "_p_controls"
    outcomes = [str(c).removesuffix(suffix) for c in summary if str(c).endswith(suffix)]
    is_control = summary["role"] == "control"
    if controls is not None:
        matched = controls.loc[controls["matched"], "condition"]
        is_control &= summary["condition"].isin(matched)
    is_curve = is_control & (summary.groupby("condition")["coefficient"].transform("nunique") > 1)
    is_curve = is_curve if is_curve.any() else is_control
    by = ["split", "group", "of", "coefficient"]
    main = summary[summary["main"] & summary["role"].isin(["group", "single"])]
    test, train = (main[main["split"] == split] for split in ("test", "train"))
    of_train = list(zip(train["group"], train["condition"], train["coefficient"], strict=True))
    is_baseline = (summary["role"] == "baseline") & (summary["split"] == "test")
    rows = []
    for outcome in outcomes:
        parts = [summary[rows_of].groupby(by)[outcome] for rows_of in (is_control, is_curve)]
        ends = dict(
            zip(RANGES, [e for part in parts for e in (part.min(), part.max())], strict=True)
        )
        changes = summary.assign(size=summary[f"{outcome}_change"].abs())
        control_sizes = changes[is_control].groupby(by)["size"].max()
        sizes = dict(zip(of_train, train[f"{outcome}_change"].abs(), strict=True))
        for row in test.to_dict("records"):
            key = (row["group"], row["condition"], row["coefficient"])
            numbers = {
                "chosen": bool(row["chosen"]),
                "change": row[f"{outcome}_change"],
                **{name: end.get(("test", *key), np.nan) for name, end in ends.items()},
                "p_controls": row[f"{outcome}_p_controls"],
                "p_floor": row[f"{outcome}_p_controls_floor"],
                "gap_train": sizes.get(key, np.nan) - control_sizes.get(("train", *key), 0.0),
            }
            rows.append(_effect_row(outcome, row["direction"], row) | numbers)
        pairs = test[["direction", "group"]].drop_duplicates()
        for row in pairs.merge(summary[is_baseline].drop(columns="direction")).to_dict("records"):
            baseline = {"chosen": False, "is_baseline": True, "coefficient": 0.0}
            rows.append(_effect_row(outcome, row["direction"], row) | baseline)
    return rows


def _effect_row(outcome: str, direction: str, row: Mapping[Any, Any]) -> dict[str, Any]:
    """What the rows of an effect and of its baseline have."""
    return {
        "outcome": outcome,
        "direction": direction,
        "prompts": row["group"],
        "coefficient": row["coefficient"],
        "is_baseline": False,
        "value": row[outcome],
        "ci_low": row[f"{outcome}_ci_low"],
        "ci_high": row[f"{outcome}_ci_high"],
        "n": int(row[f"{outcome}_n"]),
    }
