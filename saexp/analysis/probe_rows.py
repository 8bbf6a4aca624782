"""Which rows a probe is fitted on and judged on, their groups, and which of them are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from saexp.analysis.base import AnalysisInputs
from saexp.data.positions import OWN_COLUMNS
from saexp.errors import ConfigError

_TYPES = ("entity_type", "split", "token", "entity")
"""Columns of saexp's own that rows may be told apart by; the file's own columns all may."""


@dataclass(frozen=True)
class Labelled:
    """Rows of one split or data set: which are of the first group, and their units."""

    first: Bool[np.ndarray, " n"]
    units: Shaped[np.ndarray, " n"]
    kinds: Int[np.ndarray, " n"] | None = None
    """Number of the kind each row is of, where AUROC is also wanted over pairs of one kind."""
    judged_apart: Int[np.ndarray, " n"] | None = None
    """Rows with different numbers here were scored by different probes, and never form a pair."""

    def __len__(self) -> int:
        return len(self.first)

    def weights(self) -> Float[np.ndarray, " n"]:
        """Rows of one unit in one group share the weight 1."""
        observed = pd.factorize(self.units)[0] * 2 + self.first
        return 1 / np.bincount(observed)[observed]


def rows_of(inputs: AnalysisInputs, split: str | None) -> np.ndarray:
    """Numbers of the rows of both groups, of one split or of all."""
    rows = inputs.latents.rows
    mine = rows["group"].isin(inputs.groups).to_numpy(dtype=bool)
    if split is not None:
        mine = mine & (rows["split"] == split).fillna(False).to_numpy(dtype=bool)
    return np.flatnonzero(mine)


def labelled(
    inputs: AnalysisInputs,
    chosen: np.ndarray,
    kinds: Sequence[str] = (),
    apart: str | None = None,
) -> Labelled:
    """The rows of these numbers; their kinds are the combinations of values of the columns."""
    rows = inputs.latents.rows.iloc[chosen]
    first = (rows["group"] == inputs.groups[0]).to_numpy(dtype=bool)
    columns = [*kinds, *([apart] if apart else [])]
    return Labelled(
        first,
        rows["unit"].to_numpy(dtype=object),
        kinds_of(rows, columns) if kinds else None,
        kinds_of(rows, [apart]) if apart else None,
    )


def kind_names(rows: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """`[n]`, text: the values of the columns, joined."""
    parts = [rows[c].astype(str).to_numpy(dtype=object) for c in columns]
    return np.array([repr(values) for values in zip(*parts, strict=True)], dtype=object)


def kinds_of(rows: pd.DataFrame, columns: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Rows of equal values in the columns have equal numbers, in order of appearance."""
    return pd.factorize(kind_names(rows, columns))[0].astype(np.int64)


def column_names(name: str, value: Any) -> tuple[str, ...]:
    """Columns that the option `name` gives: one, several or none. Raises ConfigError."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    for column in listed:
        if not isinstance(column, str) or (column in OWN_COLUMNS and column not in _TYPES):
            raise ConfigError(
                f"analyzer.options.{name}={value}: type a column that rows are told apart by, such "
                "as entity_type, or one of the data's own"
            )
    return tuple(listed)


def check_columns(rows: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    """Raise ConfigError for a column that the rows lack."""
    for column in columns:
        if column not in rows or rows[column].isna().all():
            may = [c for c in rows.columns if c == "entity_type" or c not in OWN_COLUMNS]
            there = ", ".join(c for c in may if rows[c].notna().any()) or "none"
            raise ConfigError(f"{where} has no values in a column '{column}'; it has {there}")
