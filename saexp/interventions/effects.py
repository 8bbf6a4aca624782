"""Effects per condition and coefficient: means, intervals, two kinds of test, and claims.

One observation is one entity (unit): prompts of the same entity are averaged first. Two questions
are tested. Does a condition change its prompts? The test is a sign-flip test over entities, against
the same prompts without intervention. Does a condition differ from its controls? There the choice
of latents or directions is what is random, so the p-value is the rank of the condition among its
controls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from saexp.config import InterventionConfig
from saexp.config.groups import CONTROL_KINDS
from saexp.errors import counted
from saexp.interventions.conditions import Condition, coefficient_unit
from saexp.interventions.directions import LatentStatistics
from saexp.interventions.measure import Job
from saexp.interventions.outcomes import direction_of_set, metric_names
from saexp.stats import MIN_N, mean_interval, paired_change_interval, wilson
from saexp.stats.significance import (
    ALPHA,
    MIN_CONTROLS,
    holm,
    prediction_p_value,
    rank_p_value,
    sign_flip_p_values,
)

N_FLIPS = 4000
_DESCRIBED = ["condition", "role", "control_kind", "of", "direction", "latent", "coefficient"]
Matched = Mapping[tuple[str, float], Mapping[str, Sequence[str]]]
"""(condition, coefficient) -> kind of control -> matched controls."""


def described(
    jobs: Sequence[Job], cfg: InterventionConfig, facts: LatentStatistics
) -> pd.DataFrame:
    """The columns that describe each job, without outcomes; built by column for speed."""
    plain = () if facts.saes else (facts.written,)
    location_of: dict[int, tuple[str, Any]] = {}
    for condition in (job.condition for job in jobs):
        if id(condition) not in location_of:
            written = condition.written or plain
            layer = written[0].layer if len(written) == 1 else pd.NA
            location_of[id(condition)] = ("+".join(at.name for at in written), layer)
    examples, conditions = [j.example for j in jobs], [j.condition for j in jobs]
    return pd.DataFrame(
        {
            "example_id": [e.id for e in examples],
            "group": ["all" if e.group is None else e.group for e in examples],
            "split": [e.split for e in examples],
            "entity_type": [e.entity_type for e in examples],
            "unit": [e.unit for e in examples],
            "prompt": [e.text for e in examples],
            "condition": [c.name for c in conditions],
            "role": [c.role for c in conditions],
            "control_kind": [c.control_kind for c in conditions],
            "of": [c.of for c in conditions],
            "direction": [c.direction for c in conditions],
            "latent": [c.label for c in conditions],
            "coefficient": [j.coefficient for j in jobs],
            "coefficient_unit": coefficient_unit(cfg),
            "hookpoint": [location_of[id(c)][0] for c in conditions],
            "layer": [location_of[id(c)][1] for c in conditions],
            "where": cfg.where,
            "answers": [" | ".join(e.answers) for e in examples],
        }
    )


def summarise(
    effects: pd.DataFrame,
    outcomes: Mapping[str, str],
    seed: int = 0,
    *,
    controls: pd.DataFrame | None = None,
    prediction_test: bool = False,
) -> pd.DataFrame:
    """One row per condition, coefficient, split and group of prompts.

    `outcomes` maps names to rate or mean; `controls` has one row per control: of, coefficient,
    condition, control_kind, matched. Per outcome there are the columns

    - the mean over entities, `_n` entities, `_n_prompts`, and `_ci_low`, `_ci_high`: Wilson for
      rates (an entity's mean rate counts as a fraction of a success), bootstrap-t for means;
    - `_change` from the unsteered prompts with `_change_ci_low/high` (Newcombe's paired interval
      for rates, bootstrap-t for means) and `_p`, the sign-flip test of no change;
    - per kind of control `_n_<kind>` matched controls, and `_p_<kind>`, the rank p-value among
      them, two-sided;
    - `_p_controls`, the largest of these over kinds that are achieved (have `MIN_CONTROLS` matched
      controls): it is small only if the condition differs from every kind. `_p_controls_floor` is
      the smallest value that it can take. With `prediction_test` also `_p_prediction`, the largest
      p-value of the prediction t-test.

    Fewer than `MIN_N` entities have no interval and no p-value. Controls have means and changes
    alone.
    """
    matched = matched_by_kind(controls)
    parts = []
    for split, part in effects.groupby("split", sort=False):
        for group, prompts in part.groupby("group", sort=False, dropna=False):
            table = prompts[_DESCRIBED].drop_duplicates().reset_index(drop=True)
            columns: dict[str, np.ndarray] = {}
            for name, kind in outcomes.items():
                statistics = _outcome(_Cells.read(prompts, table, name), kind, seed)
                statistics |= _against_controls(table, statistics, matched, prediction_test)
                columns |= {f"{name}{suffix}": values for suffix, values in statistics.items()}
            about = {"split": [split] * len(table), "group": [group] * len(table)}
            parts.append(pd.concat([table, pd.DataFrame({**columns, **about})], axis=1))
    return pd.concat(parts, ignore_index=True)


def matched_by_kind(controls: pd.DataFrame | None) -> Matched:
    """The matched controls of every condition and coefficient, from the table `controls`."""
    matched: dict[tuple[str, float], dict[str, list[str]]] = {}
    if controls is None:
        return matched
    for row in controls[controls["matched"]].to_dict("records"):
        kinds = matched.setdefault((row["of"], row["coefficient"]), {})
        kinds.setdefault(row["control_kind"], []).append(row["condition"])
    return matched


@dataclass(frozen=True)
class _Cells:
    """Values of one outcome per unit, by row of the table of conditions."""

    values: Float[np.ndarray, "n_rows n_units"]
    """NaN where a unit has no value."""
    n_prompts: Float[np.ndarray, " n_rows"]
    start: Float[np.ndarray, " n_units"]
    """Values without intervention."""
    is_start: np.ndarray
    is_control: np.ndarray

    @classmethod
    def read(cls, prompts: pd.DataFrame, table: pd.DataFrame, outcome: str) -> "_Cells":
        usable = prompts[prompts[outcome].notna()]
        keys = pd.MultiIndex.from_frame(table[["condition", "coefficient"]])
        grouped = usable.groupby(["condition", "coefficient", "unit"], sort=False)[outcome]
        values = grouped.mean().unstack("unit").reindex(keys).to_numpy(dtype=float)
        n_prompts = usable.groupby(["condition", "coefficient"]).size().reindex(keys, fill_value=0)
        is_start = (table["role"] == "baseline").to_numpy()
        start = values[is_start][0] if is_start.any() else np.full(values.shape[1], np.nan)
        is_control = (table["role"] == "control").to_numpy()
        return cls(values, n_prompts.to_numpy(dtype=float), start, is_start, is_control)


def _outcome(cells: _Cells, kind: str, seed: int) -> dict[str, np.ndarray]:
    """Means and changes with their intervals, by column suffix."""
    values = cells.values
    n = (~np.isnan(values)).sum(1)
    with np.errstate(invalid="ignore"):
        # The difference of two infinities is undefined.
        changes = np.where(cells.is_start[:, None], np.nan, values - cells.start)
    # Controls are compared by their changes; a single control is not tested.
    tested = np.where(cells.is_control[:, None], np.nan, changes)
    if kind == "rate":
        limits = np.stack(wilson(np.nansum(values, axis=1), n), axis=1)
        limits[(n < MIN_N) | cells.is_control] = np.nan
        change_limits = _rate_changes(cells, tested)
    else:
        shown = np.where(cells.is_control[:, None], np.nan, values)
        limits, change_limits = (
            _by_size(v, lambda block: np.stack(mean_interval(block, seed), axis=1), 2)
            for v in (shown, tested)
        )
    p = _by_size(tested, lambda block: sign_flip_p_values(block, seed, N_FLIPS)[:, None], 1)
    return {
        "": _means(values),
        "_ci_low": limits[:, 0],
        "_ci_high": limits[:, 1],
        "_n": n,
        "_n_prompts": cells.n_prompts.astype(int),
        "_change": _means(changes),
        "_change_ci_low": change_limits[:, 0],
        "_change_ci_high": change_limits[:, 1],
        "_p": p[:, 0],
    }


def _rate_changes(
    cells: _Cells, changes: Float[np.ndarray, "n_rows n_units"]
) -> Float[np.ndarray, "n_rows 2"]:
    limits = np.full((len(changes), 2), np.nan)
    for i, there in enumerate(~np.isnan(changes)):
        if there.sum() >= MIN_N:
            limits[i] = paired_change_interval(cells.start[there], cells.values[i, there])
    return limits


def _by_size(
    values: Float[np.ndarray, "n_rows n_units"],
    function: Callable[[Float[np.ndarray, "n k"]], Float[np.ndarray, "k m"]],
    n_numbers: int,
) -> Float[np.ndarray, "n_rows m"]:
    """`function` applied to rows with equally many values, as columns; NaN for fewer than MIN_N."""
    results = np.full((len(values), n_numbers), np.nan)
    n = (~np.isnan(values)).sum(1)
    for size in np.unique(n[n >= MIN_N]):
        rows = np.flatnonzero((n == size) & ~np.isinf(values).any(1))
        if len(rows):
            block = np.stack([row[~np.isnan(row)] for row in values[rows]], axis=1)
            results[rows] = function(block)
    return results


def _means(values: Float[np.ndarray, "n_rows n_units"]) -> Float[np.ndarray, " n_rows"]:
    """Means over units that have a value; NaN where none has."""
    there = ~np.isnan(values)
    n = there.sum(1)
    return np.where(n > 0, np.where(there, values, 0.0).sum(1) / np.maximum(n, 1), np.nan)


def _against_controls(
    table: pd.DataFrame,
    statistics: Mapping[str, np.ndarray],
    matched: Matched,
    prediction_test: bool,
) -> dict[str, np.ndarray]:
    """Rank p-values by kind of control and over kinds, by column suffix."""
    row_of = {
        key: i for i, key in enumerate(zip(table["condition"], table["coefficient"], strict=True))
    }
    columns: dict[str, np.ndarray] = {}
    others_there = {kind for kinds in matched.values() for kind in kinds} - {*CONTROL_KINDS}
    for kind in (*CONTROL_KINDS, *sorted(others_there)):
        columns[f"_p_{kind}"] = np.full(len(table), np.nan)
        columns[f"_n_{kind}"] = np.zeros(len(table), dtype=int)
    for name in ("_p_controls", "_p_controls_floor", *["_p_prediction"] * prediction_test):
        columns[name] = np.full(len(table), np.nan)
    change = statistics["_change"]
    for key, kinds in matched.items():
        i = row_of.get(key)
        if i is None or statistics["_n"][i] < MIN_N or np.isnan(change[i]):
            continue
        achieved = []
        for kind, names in kinds.items():
            rows = [row_of[name, key[1]] for name in names if (name, key[1]) in row_of]
            others = change[rows][~np.isnan(change[rows])]
            columns[f"_p_{kind}"][i] = rank_p_value(float(change[i]), others)
            columns[f"_n_{kind}"][i] = len(others)
            if len(others) >= MIN_CONTROLS:
                achieved.append((columns[f"_p_{kind}"][i], 1 / (len(others) + 1), others))
        if achieved:
            columns["_p_controls"][i] = max(p for p, _, _ in achieved)
            columns["_p_controls_floor"][i] = max(floor for _, floor, _ in achieved)
            if prediction_test:
                p_values = [prediction_p_value(float(change[i]), c) for _, _, c in achieved]
                columns["_p_prediction"][i] = float(np.max(p_values))
    return columns


def chosen_coefficients(summary: pd.DataFrame, outcome: str, split: str) -> dict[str, float]:
    """Per condition the coefficient at which one of the condition and its controls stands out.

    The gap of a coefficient is the largest absolute change among the condition and its controls,
    minus the second largest. The coefficient with the largest gap is chosen; among equal gaps, the
    smallest. The rule treats the condition and its controls alike: a rule that favoured the
    condition would make rank p-values on the test split too small, because it would choose the
    coefficient at which the condition is extreme and compare it with controls at the same one.

    Every condition that has a change at some coefficient other than 0 gets a coefficient. The test
    split shows whether there is an effect at it.
    """
    part = summary[(summary["split"] == split) & (summary["coefficient"] != 0)]
    part = part[(part["role"] != "baseline") & part[f"{outcome}_change"].notna()]
    chosen: dict[str, float] = {}
    for condition in part.loc[part["role"] != "control", "condition"].unique():
        is_own = part["condition"] == condition
        family = part[is_own | ((part["of"] == condition) & (part["role"] == "control"))]
        best = -np.inf
        for coefficient in sorted(part.loc[is_own, "coefficient"].unique(), key=abs):
            at = family[family["coefficient"] == coefficient]
            # A condition on the prompts of several groups has one change for each.
            sizes = at[f"{outcome}_change"].abs().groupby(at["condition"]).max()
            first, second = (*sizes.nlargest(2), 0.0)[:2]
            if first - second > best + 1e-9:
                best, chosen[str(condition)] = first - second, float(coefficient)
    return chosen


_STRENGTHS = {"length": "added_norm", "norm_kept": "norm_kept"}
"""Columns of strengths that are not units of the coefficient."""


def with_strengths(
    summary: pd.DataFrame, conditions: Sequence[Condition], coefficients: Sequence[float]
) -> pd.DataFrame:
    """Columns `added_norm` and `in_<unit>`: each coefficient in every unit."""
    strengths_of = {
        (c.name, k): s
        for c in conditions
        for k, s in zip(coefficients, c.strengths, strict=False)
        if s
    }
    names = list(dict.fromkeys(n for s in strengths_of.values() for n in s))
    rows = [
        strengths_of.get((r["condition"], r["coefficient"]), {}) for r in summary.to_dict("records")
    ]
    found_in = {_STRENGTHS.get(n, f"in_{n}"): [r.get(n, np.nan) for r in rows] for n in names}
    return pd.concat([summary, pd.DataFrame(found_in, index=summary.index)], axis=1)


def effect_metrics(summary: pd.DataFrame, outcomes: Sequence[str]) -> dict[str, float | int | None]:
    """`effect/<outcome>/<condition>` of the baselines, the conditions and their controls.

    A name holds neither the coefficient nor a latent (see `metric_names`), so that it means the
    same in every run. Values of a condition, and of its controls, are those at its selected
    coefficient, `intervention/coefficient_<condition>`: the one marked `chosen`, else the largest.
    `intervention/latent_<condition>` is the latent of a single one. A condition that is run on the
    prompts of several groups has metrics for each group, with `_on_<group>` appended to its name.
    """
    metrics: dict[str, float | int | None] = {}
    for row in summary[summary["role"] == "baseline"].to_dict("records"):
        metrics |= {f"effect/{o}/{row['condition']}": row[o] for o in outcomes}
    selected = _selected_coefficients(summary)
    own = summary["of"].where(summary["role"] == "control", summary["condition"])
    at_selected = summary["coefficient"] == own.map(selected)
    metrics |= _at_coefficient(summary[at_selected], summary, outcomes)
    described = _described(summary)
    names = metric_names(described)
    for condition, role, _, latent in described:
        metrics[f"intervention/coefficient_{names[condition]}"] = selected[condition]
        if role == "single" and latent.isdigit():
            metrics[f"intervention/latent_{names[condition]}"] = int(latent)
    return metrics


def effect_curve(summary: pd.DataFrame) -> list[dict[str, float | int | None]]:
    """A row per coefficient of the test split, ascending: `coefficient`, and the metrics there.

    The metrics are those of `effect_metrics` that depend on the coefficient, by the same names.
    """
    test = summary[summary["split"] == "test"]
    outcomes = [str(c).removesuffix("_change") for c in test if str(c).endswith("_change")]
    edited = test[test["role"] != "baseline"]
    curve: list[dict[str, float | int | None]] = []
    for coefficient in sorted(edited["coefficient"].unique().tolist()):
        part = edited[edited["coefficient"] == coefficient]
        curve.append({"coefficient": coefficient, **_at_coefficient(part, test, outcomes)})
    return curve


def _described(summary: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """(condition, role, direction, latent) of all conditions but baselines and controls."""
    own = summary[~summary["role"].isin(["baseline", "control"])]
    shown = own[["condition", "role", "direction", "latent"]].drop_duplicates().astype(str)
    return [(c, r, d, f) for c, r, d, f in shown.itertuples(index=False, name=None)]


def _selected_coefficients(summary: pd.DataFrame) -> dict[str, float]:
    """Condition -> the coefficient chosen for it, else its largest."""
    own = summary[~summary["role"].isin(["baseline", "control"])]
    selected = {}
    for condition, part in own.groupby("condition", sort=False):
        chosen = part[part["chosen"]] if "chosen" in part else part.iloc[:0]
        coefficients = (chosen if len(chosen) else part)["coefficient"]
        selected[str(condition)] = float(max(coefficients, key=abs))
    return selected


def _at_coefficient(
    rows: pd.DataFrame, summary: pd.DataFrame, outcomes: Sequence[str]
) -> dict[str, float | int | None]:
    """The metrics of rows of the summary that have one coefficient per condition."""
    names = metric_names(_described(summary))
    n_groups = summary.groupby("of")["group"].nunique()
    metrics: dict[str, float | int | None] = {}

    def stem(outcome: str, of: Any, group: Any) -> str:
        suffix = f"_on_{group}" if n_groups.get(of, 1) > 1 else ""
        return f"effect/{outcome}/{names.get(of, of)}{suffix}"

    is_control = rows["role"] == "control"
    for outcome in outcomes:
        for row in rows[~is_control & (rows["role"] != "baseline")].to_dict("records"):
            at = stem(outcome, row["condition"], row["group"])
            metrics[at] = row[outcome]
            for p in ("p_controls", "p_controls_holm"):
                if pd.notna(row.get(f"{outcome}_{p}")):
                    metrics[f"{at}_{p}"] = row[f"{outcome}_{p}"]
        means = []
        for (of, group), part in rows[is_control].groupby(["of", "group"], sort=False):
            at = f"{stem(outcome, of, group)}_control"
            values = part[outcome]
            metrics[f"{at}_mean"] = float(values.mean())
            metrics[f"{at}_min"], metrics[f"{at}_max"] = float(values.min()), float(values.max())
            if "main" not in summary or summary.loc[summary["condition"] == of, "main"].any():
                means.append(metrics[f"{at}_mean"])
        if means:
            metrics[f"effect/{outcome}/control_mean"] = float(np.mean(means))
    return metrics


def summarised_conditions(summary: pd.DataFrame, outcome: str) -> list[str]:
    """The conditions that a report's sentences are about.

    Per direction its latents together (or the first single latent) and its other directions; among
    several patched locations the one with the largest change on train prompts, or on test prompts
    where there are no train prompts. Single latents that also belong to a group are exploratory.
    """
    names: list[str] = []
    conditions = summary[~summary["role"].isin(["baseline", "control"])]
    for _, part in conditions.groupby(conditions["direction"].map(direction_of_set), sort=False):
        of_role = {r: list(p["condition"].unique()) for r, p in part.groupby("role")}
        names += (of_role.get("group") or of_role.get("single") or [])[:1]
        names += of_role.get("direction", [])
        patches = of_role.get("place", [])
        names += [_strongest(summary, patches, outcome)] if len(patches) > 1 else patches
    return names


def _strongest(summary: pd.DataFrame, conditions: Sequence[str], outcome: str) -> str:
    where = summary["split"] == ("train" if (summary["split"] == "train").any() else "test")
    part = summary[where & summary["condition"].isin(conditions)]
    sizes = part[f"{outcome}_change"].abs().sort_values(ascending=False, kind="stable")
    return str(part.loc[sizes.index[0], "condition"])


def with_claims(
    summary: pd.DataFrame, outcomes: Sequence[str], chosen: Mapping[str, float]
) -> pd.DataFrame:
    """The summary with columns `chosen`, `main`, `n_choices`, and per outcome `_p_controls_holm`.

    `chosen` marks rows of the test split at the coefficient chosen for their condition, its
    controls included. The family of Holm's adjustment is the run's main conditions times its
    outcomes, each at the chosen coefficient on the test split; elsewhere it is NaN. Where the
    coefficient was chosen among several on the test prompts, because there are no train prompts,
    p-values are also multiplied by the number of coefficients (Bonferroni).
    """
    main = summarised_conditions(summary, outcomes[0])
    marked = np.array(
        [
            r["split"] == "test" and chosen.get(r["of"] or r["condition"]) == r["coefficient"]
            for r in summary.to_dict("records")
        ],
        dtype=bool,
    )
    is_main = summary["condition"].isin(main).to_numpy()
    family = np.flatnonzero(marked & is_main)
    p_values = summary[[f"{o}_p_controls" for o in outcomes]].to_numpy(dtype=float)
    adjusted = np.full_like(p_values, np.nan)
    corrected = holm(p_values[family].ravel()).reshape(len(family), len(outcomes))
    adjusted[family] = np.minimum(corrected * n_choices(summary), 1)
    columns = {f"{o}_p_controls_holm": adjusted[:, i] for i, o in enumerate(outcomes)}
    about = {"chosen": marked, "main": is_main, "n_choices": n_choices(summary), **columns}
    return pd.concat([summary, pd.DataFrame(about, index=summary.index)], axis=1)


def n_choices(summary: pd.DataFrame) -> int:
    """Number of coefficients among which the reported one was chosen on test prompts, else 1."""
    if (summary["split"] == "train").any():
        return 1
    coefficients = summary.loc[summary["role"] != "baseline", "coefficient"]
    return max(1, int(coefficients[coefficients != 0].nunique()))


def claim_notes(summary: pd.DataFrame, outcomes: Sequence[str]) -> list[str]:
    """Notes where there are too few entities or controls to show any effect."""
    test = summary[summary["split"] == "test"]
    notes = []
    for row in test[test["role"] == "baseline"].to_dict("records"):
        n = max(int(row[f"{o}_n"]) for o in outcomes)
        if n < MIN_N:
            prompts = "" if row["group"] == "all" else f" of group {row['group']}"
            notes.append(
                f"{counted(n, 'entity', 'entities')}{prompts} on the test split: effects on fewer "
                f"than {MIN_N} are reported without interval and p-value; add rows, or raise "
                "intervention.n_prompts"
            )
    family = test[test["chosen"] & test["main"]]
    floors = family[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    floors = floors[~np.isnan(floors)]
    n_tests = len(floors) * n_choices(summary)
    if len(floors) and floors.min() * n_tests > ALPHA:
        notes.append(
            f"no effect can be significant: with {round(1 / floors.min()) - 1} controls the "
            f"smallest p-value is {floors.min():.2g}, after Holm over "
            f"{counted(n_tests, 'test')} {min(1.0, floors.min() * n_tests):.2g}; raise "
            "intervention.n_controls, or test fewer outcomes"
        )
    return notes


def numeric_outcomes(effects: pd.DataFrame, kinds: dict[str, str]) -> pd.DataFrame:
    """Outcomes as floats, missing ones as NaN."""
    return effects.assign(**{k: effects[k].astype("Float64").astype(float) for k in kinds})
