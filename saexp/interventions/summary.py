"""Effects summed up: per condition and strength a mean, its interval, and paired tests.

One observation is one entity (unit): prompts of the same entity are averaged first. The test
against baseline flips the signs of the units' differences (exact under the null that a difference
is as likely as its negative); that against the controls does the same with the mean of the
condition's controls.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from saexp.interventions.facts import Condition
from saexp.stats.proportions import wilson

N_RESAMPLES = 4000
KEYS = ["condition", "role", "of", "direction", "latent", "group", "coefficient"]


class Draws:
    """Random signs and resampling weights for n units, drawn once and shared by all cells."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._signs: dict[int, np.ndarray] = {}
        self._weights: dict[int, np.ndarray] = {}

    def sign_flip_p(self, differences: Float[np.ndarray, " n"]) -> float:
        """Two-sided p of the mean being 0, by random sign flips."""
        n = len(differences)
        if n not in self._signs:
            rng = np.random.default_rng([self.seed, 41, n])
            self._signs[n] = rng.integers(0, 2, size=(N_RESAMPLES, n)) * 2.0 - 1
        null = np.abs(self._signs[n] @ differences) / n
        # Sums that differ by rounding alone count as equal.
        return float((1 + (null >= abs(differences.mean()) - 1e-12).sum()) / (N_RESAMPLES + 1))

    def interval(self, values: Float[np.ndarray, " n"]) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the mean over units."""
        n = len(values)
        if n not in self._weights:
            rng = np.random.default_rng([self.seed, 43, n])
            self._weights[n] = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
        low, high = np.quantile(self._weights[n] @ values, [0.025, 0.975])
        return float(low), float(high)


def by_unit(effects: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """Units by (condition, coefficient): the outcome's mean over a unit's prompts."""
    usable = effects[effects[outcome].notna()]
    return usable.pivot_table(
        index="unit", columns=["condition", "coefficient"], values=outcome, aggfunc="mean"
    )


class Cells:
    """Values of units by (condition, coefficient), as arrays over one order of units."""

    def __init__(self, wide: pd.DataFrame) -> None:
        keys: list[Any] = wide.columns.to_list()
        values = np.ascontiguousarray(wide.to_numpy(dtype=float).T)
        self._values = {tuple(key): cell for key, cell in zip(keys, values, strict=True)}

    def of(self, key: tuple[Any, ...]) -> Float[np.ndarray, " n"] | None:
        """One cell's units, NaN where a unit has no value; None without such a cell."""
        return self._values.get(key)


def summarise(effects: pd.DataFrame, outcomes: Mapping[str, str], seed: int = 0) -> pd.DataFrame:
    """One row per condition, coefficient and split; `outcomes` maps names to rate or mean.

    Per outcome: its mean, `_ci_low`, `_ci_high` (Wilson for rates where every unit has one prompt,
    else bootstrap over units), `_n`, `_change` against baseline with `_change_ci_low/high` and
    `_p`, `_over_controls` (change beyond the mean of its controls) with `_p_controls`, and
    `_controls_below`, the share of its controls whose change is smaller in size.
    """
    parts, draws = [], Draws(seed)
    for split, part in effects.groupby("split", sort=False):
        for group, prompts in part.groupby("group", sort=False, dropna=False):
            table = _described(prompts)
            columns: dict[str, list[Any]] = {}
            for name, kind in outcomes.items():
                columns |= _outcome(prompts, table, name, kind, draws)
            about = {"split": [split] * len(table), "group": [group] * len(table)}
            parts.append(pd.concat([table, pd.DataFrame({**columns, **about})], axis=1))
    return pd.concat(parts, ignore_index=True)


def _described(prompts: pd.DataFrame) -> pd.DataFrame:
    keys = [k for k in KEYS if k != "group"]
    return prompts[keys].drop_duplicates().reset_index(drop=True)


def _outcome(
    prompts: pd.DataFrame, table: pd.DataFrame, name: str, kind: str, draws: Draws
) -> dict[str, list[Any]]:
    cells = Cells(by_unit(prompts, name))
    once = len(prompts) == len(prompts[["unit", "condition", "coefficient"]].drop_duplicates())
    baseline = table.loc[table["role"] == "baseline", ["condition", "coefficient"]]
    start = cells.of(tuple(baseline.iloc[0])) if len(baseline) else None
    controls = _controls(table)
    names = ["", "_ci_low", "_ci_high", "_n", "_change", "_change_ci_low", "_change_ci_high", "_p"]
    names += ["_over_controls", "_p_controls", "_controls_below"]
    found: dict[str, list[Any]] = {f"{name}{suffix}": [] for suffix in names}
    for row in table.to_dict("records"):
        key = (row["condition"], row["coefficient"])
        made = dict.fromkeys(names, None)
        values = cells.of(key)
        if values is not None:
            values = _present(values)
            made |= {"": float(values.mean()), "_n": len(values)}
            if kind == "rate" and once:
                made["_ci_low"], made["_ci_high"] = wilson(values.sum(), len(values))
            else:
                made["_ci_low"], made["_ci_high"] = draws.interval(values)
            if start is not None and row["role"] != "baseline":
                made |= _tested(cells, key, start, controls.get(key, []), draws)
        for suffix, value in made.items():
            found[f"{name}{suffix}"].append(value)
    return {k: [np.nan if v is None else v for v in values] for k, values in found.items()}


def _controls(table: pd.DataFrame) -> dict[tuple[str, float], list[tuple[str, float]]]:
    """(condition, coefficient) -> those of its controls."""
    found: dict[tuple[str, float], list[tuple[str, float]]] = {}
    for row in table[table["role"] == "control"].to_dict("records"):
        key = (row["of"], row["coefficient"])
        found.setdefault(key, []).append((row["condition"], row["coefficient"]))
    return found


def _tested(
    cells: Cells,
    key: tuple[str, float],
    start: Float[np.ndarray, " n"],
    controls: Sequence[tuple[str, float]],
    draws: Draws,
) -> dict[str, Any]:
    own = cells.of(key)
    assert own is not None
    values = _change(own, start)
    if not len(values):
        return {}
    low, high = draws.interval(values)
    made: dict[str, Any] = {
        "_change": float(values.mean()),
        "_change_ci_low": low,
        "_change_ci_high": high,
        "_p": draws.sign_flip_p(values),
    }
    there = [found for c in controls if (found := cells.of(c)) is not None]
    if there:
        beyond = _change(own, _mean(np.stack(there)))
        changes = [_change(c, start) for c in there]
        sizes = [abs(float(c.mean())) if len(c) else np.nan for c in changes]
        if len(beyond):
            made["_over_controls"] = float(beyond.mean())
            made["_p_controls"] = draws.sign_flip_p(beyond)
        made["_controls_below"] = float(np.mean([s < abs(made["_change"]) for s in sizes]))
    return made


def _change(
    values: Float[np.ndarray, " n"], start: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Differences where both are there; that of two infinities is none."""
    with np.errstate(invalid="ignore"):
        return _present(values - start)


def _present(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    return values[~np.isnan(values)]


def _mean(values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, " n"]:
    """Over the first axis, of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    n = there.sum(0)
    return np.where(n > 0, np.where(there, values, 0.0).sum(0) / np.maximum(n, 1), np.nan)


def unmoved(effects: pd.DataFrame, kinds: Mapping[str, str]) -> list[str]:
    """A note per rate that is the same on every prompt in every condition, so says nothing."""
    notes = []
    for name in (name for name, kind in kinds.items() if kind == "rate"):
        values = effects[name].dropna()
        if len(values) > 1 and values.nunique() == 1:
            notes.append(
                f"{name.replace('_', ' ')} is {int(values.iloc[0])} on every prompt with and "
                "without changes, so it shows nothing: give rows a prompt it can differ on, or "
                "choose other intervention.outcomes"
            )
    return notes


def chosen_coefficients(summary: pd.DataFrame, outcome: str, split: str) -> dict[str, float]:
    """Per condition the coefficient at which it differs most from its controls on this split.

    The gap is the size of its change less that of the control most like it; with equal gaps the
    smallest coefficient is taken. Conditions without a change are left out.
    """
    mine = summary[summary["split"] == split]
    controls = mine[mine["role"] == "control"]
    found: dict[str, float] = {}
    main = mine[~mine["role"].isin(["control", "baseline"]) & (mine["coefficient"] != 0)]
    for condition, rows in main.groupby("condition", sort=False):
        best = 0.0
        for row in rows.sort_values("coefficient", key=abs).to_dict("records"):
            change = row[f"{outcome}_change"]
            same = (controls["of"] == condition) & (controls["coefficient"] == row["coefficient"])
            others = controls.loc[same, f"{outcome}_change"]
            rival = 0.0
            if len(others):
                rival = float(others.max() if change >= 0 else -others.min())
            gap = abs(change) - max(rival, 0.0)
            if gap > best + 1e-9:
                best, found[str(condition)] = gap, row["coefficient"]
    return found


_STRENGTHS = {"length": "added_norm", "norm_kept": "norm_kept"}
"""Columns of strengths that are no unit of a coefficient."""


def with_strengths(
    summary: pd.DataFrame, conditions: Sequence[Condition], coefficients: Sequence[float]
) -> pd.DataFrame:
    """Columns `added_norm` and `in_<unit>`: what each coefficient is in every unit."""
    found = {
        (c.name, k): s
        for c in conditions
        for k, s in zip(coefficients, c.strengths, strict=False)
        if s
    }
    names = list(dict.fromkeys(n for s in found.values() for n in s))
    rows = [found.get((r["condition"], r["coefficient"]), {}) for r in summary.to_dict("records")]
    found_in = {_STRENGTHS.get(n, f"in_{n}"): [r.get(n, np.nan) for r in rows] for n in names}
    return pd.concat([summary, pd.DataFrame(found_in, index=summary.index)], axis=1)


def effect_metrics(summary: pd.DataFrame, outcomes: Sequence[str]) -> dict[str, float | int | None]:
    """Baselines, selected latents at each coefficient, and the extreme of their controls."""
    metrics: dict[str, float | int | None] = {}
    for name in outcomes:
        for row in summary.to_dict("records"):
            at = f"{row['condition']}_at_{row['coefficient']:g}"
            if row["role"] == "baseline":
                metrics[f"effect/{name}/{row['condition']}"] = row[name]
            elif row["role"] != "control":
                metrics[f"effect/{name}/{at}"] = row[name]
        controls = summary[summary["role"] == "control"]
        for (of, coefficient), part in controls.groupby(["of", "coefficient"], sort=False):
            at = f"effect/{name}/{of}_controls"
            metrics[f"{at}_min_at_{coefficient:g}"] = float(part[name].min())
            metrics[f"{at}_max_at_{coefficient:g}"] = float(part[name].max())
    return metrics
