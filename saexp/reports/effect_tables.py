"""Tables and examples of what an intervention did, from its saved tables."""

from typing import Any

import pandas as pd

from saexp.reports.effects import kinds_of_control, n_tests, unit_words, what
from saexp.reports.saved import SavedRun
from saexp.wording import CONTROL_WORDS, counted

N_EXAMPLES = 4
N_HEADS = 12
N_ATTRIBUTED = 20
_ATTRIBUTED = [f"{n}{end}" for n in ("direct", "gradient") for end in ("", "_ci_low", "_ci_high")]


def effect_content(run: SavedRun) -> dict[str, Any]:
    """What effects.html is given."""
    return {
        "effects": effect_tables(run),
        "controls": control_rows(run),
        "n_tests": n_tests(run),
        "costs": cost_table(run),
        "cost_words": (
            "with the edited weights"
            if run.config["intervention"]["name"] == "orthogonalize"
            else "with the edit at every token"
        ),
        "heads": head_tables(run),
        "examples": generations(run),
    }


def attribution_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per group the latents of the largest gradient attribution, with their measured effect.

    Intervals of both kinds of attribution are 95 %, bootstrap over entities.
    """
    table, summary = run.table("attribution"), run.summary
    if table is None:
        return []
    measured: dict[tuple[str, str], float] = {}
    if summary is not None and "answer_logit_change" in summary:
        singles = summary[(summary["role"] == "single") & (summary["coefficient"] != 0)]
        for row in singles.sort_values("coefficient", key=abs).to_dict("records"):
            measured[str(row["group"]), str(row["latent"])] = row["answer_logit_change"]
    made = []
    for group, part in table.groupby("group", sort=False):
        rows = [
            [r["latent"], *(r.get(c) for c in _ATTRIBUTED), r["activation"], r["n_active"]]
            + [measured.get((str(group), str(r["latent"])))]
            for r in part.head(N_ATTRIBUTED).to_dict("records")
        ]
        head = ["latent", "direct", "low (95 %)", "high (95 %)"]
        head += ["gradient", "low (95 %)", "high (95 %)"]
        head += ["mean activation", "prompts where active", "measured, largest strength"]
        made.append({"group": group, "head": head, "rows": rows})
    return made


def effect_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per outcome every condition but the controls, with the controls' range beside it."""
    summary = run.summary
    if summary is None:
        return []
    tables = []
    strengths = ("in_raw", "in_max_act", "in_p99_act", "in_resid_norm", "norm_kept")
    units = [c for c in strengths if c in summary]
    for outcome in run.outcomes:
        tested = ["p_controls", "p_controls_holm"]
        tested += ["p_prediction"] if f"{outcome}_p_prediction" in summary else []
        numbers = ["ci_low", "ci_high", "change", "change_ci_low", "change_ci_high", "p"]
        rows = []
        for row in summary[summary["role"] != "control"].to_dict("records"):
            same = (summary["of"] == row["condition"]) & (summary["role"] == "control")
            same &= summary["group"] == row["group"]
            controls = summary.loc[same & (summary["coefficient"] == row["coefficient"]), outcome]
            span = f"{controls.min():.2f} to {controls.max():.2f}" if len(controls) else "–"
            cells = [row["condition"], str(row["latent"]).replace("+", ", "), row["group"]]
            cells += [row[f"{outcome}_n"], row[f"{outcome}_n_prompts"], row["coefficient"]]
            cells += [row[outcome], *(row[f"{outcome}_{c}"] for c in numbers)]
            cells += [span, len(controls), *(row[f"{outcome}_{c}"] for c in tested)]
            exploratory = row["role"] != "baseline" and not row["main"]
            cells += ["yes" if exploratory else "", "yes" if row["chosen"] else ""]
            rows.append([*cells, *(row[c] for c in units)])
        head = ["condition", "latents", "group", "entities", "prompts", "coefficient", outcome]
        head += ["low", "high", "change", "change low"]
        head += ["change high", "p, unsteered"]
        head += ["controls' range", "controls", "p, controls", "after Holm"]
        head += ["p, prediction"] * (len(tested) - 2)
        head += ["exploratory", "chosen on train"]
        head += [c.removeprefix("in_").replace("_", " ") for c in units]
        tables.append({"outcome": outcome, "head": head, "rows": rows})
    return tables


def control_rows(run: SavedRun) -> dict[str, Any] | None:
    """Per main condition at its chosen coefficient: each kind of control, its distances, ranges."""
    summary, rows = run.summary, []
    if summary is None:
        return None
    for row in summary[summary["main"] & summary["chosen"]].to_dict("records"):
        of_outcome = [kinds_of_control(run, row, o) for o in run.outcomes]
        for same in zip(*of_outcome, strict=True):
            distances = same[0].distances
            cells: list[Any] = [row["condition"], row["group"], row["coefficient"]]
            cells.append(CONTROL_WORDS[same[0].kind])
            cells += [len(distances), int(distances["matched"].sum())]
            cells += [_ratios(distances[f"{c}_ratio"]) for c in ("frequency", "norm", "kl")]
            for kind in same:
                cells += [kind.span, kind.p_value]
            rows.append([*cells, "yes" if all(k.achieved for k in same) else "no"])
    head = ["condition", "prompts", "coefficient", "controls", "n", "matched"]
    head += ["frequency ratio", "norm ratio", "KL ratio"]
    for outcome in run.outcomes:
        head += [f"{outcome}, range of matched", f"rank p, {outcome}"]
    return {"head": [*head, "in the p-value"], "rows": rows} if rows else None


def _ratios(values: pd.Series) -> str:
    """Median and range."""
    values = values.dropna()
    if values.empty:
        return "–"
    return f"{values.median():.2g} ({values.min():.2g} to {values.max():.2g})"


def cost_table(run: SavedRun) -> dict[str, Any] | None:
    """KL on neutral text per condition and coefficient, with the range per kind of control."""
    costs = run.table("costs")
    if costs is None:
        return None
    of_kind = costs[costs["role"] == "control"].groupby(["of", "coefficient", "control_kind"])
    spans = of_kind["neutral_kl"].agg(["min", "max"])
    kinds = [k for k in CONTROL_WORDS if k in set(costs["control_kind"])]
    rows = []
    for row in costs[costs["role"] != "control"].to_dict("records"):
        cells = [row["condition"], row["coefficient"], row["neutral_kl"]]
        for kind in kinds:
            key = (row["condition"], row["coefficient"], kind)
            there = key in spans.index
            cells.append(
                f"{spans.loc[key, 'min']:.3f} to {spans.loc[key, 'max']:.3f}" if there else "–"
            )
        rows.append(cells)
    head = ["condition", "coefficient", "KL, nats a token", *(CONTROL_WORDS[k] for k in kinds)]
    return {"head": head, "rows": rows}


def head_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Attention to the entity: all heads together per condition, then those that change most."""
    table, summary = run.table("attention"), run.table("attention_summary")
    if table is None or summary is None:
        return []
    head = ["condition", "prompts", "coefficient", "entities", "original", "edited", "difference"]
    rows = [
        [r["condition"], r["group"], r["coefficient"], r["n"], r["original"], r["edited"]]
        + [r["difference"], r["ci_low"], r["ci_high"], r["p_value"]]
        for r in summary.to_dict("records")
    ]
    made = [{"title": "All heads together", "head": [*head, "low", "high", "p"], "rows": rows}]
    for condition, part in table.groupby("condition", sort=False):
        top = part.reindex(part["difference"].abs().sort_values(ascending=False).index)
        columns = ["layer", "head", "original", "edited", "difference", "p_corrected"]
        made.append(
            {
                "title": f"Heads that change most: {condition}",
                "head": [*columns[:5], "p, corrected over heads"],
                "rows": top.head(N_HEADS)[columns].to_numpy().tolist(),
            }
        )
    return made


def _yes(value: Any) -> bool:
    """A rate's value; a prompt that could not be scored is no yes."""
    return bool(pd.notna(value)) and bool(value)


def generations(run: SavedRun) -> list[dict[str, Any]]:
    """Per main condition a few held-out prompts: as they are, changed, and under one control."""
    effects, summary = run.table("effects"), run.summary
    if effects is None or summary is None or "generated_text" not in effects:
        return []
    rates = [o for o in run.outcomes if run.is_rate(o)]
    outcome = rates[0] if rates else None
    shown = []
    effects = effects[effects["split"] == "test"]
    for name in run.main_conditions():
        coefficient = run.chosen_coefficient(name)
        row = summary[summary["condition"] == name].iloc[0]
        if coefficient is None:
            coefficient = float(summary.loc[summary["condition"] == name, "coefficient"].max())
        at = effects[effects["coefficient"] == coefficient]
        steered = at[at["condition"] == name].set_index("example_id")
        controls = at[(at["of"] == name) & (at["role"] == "control")]
        names = controls["condition"].unique()
        control = controls[controls["condition"] == names[0]] if len(names) else controls
        before = effects[(effects["role"] == "baseline") & (effects["group"] == row["group"])]
        before, control = before.set_index("example_id"), control.set_index("example_id")
        both = [i for i in steered.index if i in before.index]
        n_changed = sum(
            before.loc[i, "generated_text"] != steered.loc[i, "generated_text"] for i in both
        )
        ids = list(steered.groupby("entity_type", sort=False, dropna=False).head(1).index)
        ids = (ids + [i for i in steered.index if i not in ids])[:N_EXAMPLES]
        rows = [
            {
                "prompt": steered.loc[i, "prompt"],
                "texts": [
                    (t.loc[i, "generated_text"], outcome is not None and _yes(t.loc[i, outcome]))
                    if i in t.index
                    else None
                    for t in (before, steered, control)
                ],
            }
            for i in ids
        ]
        shown.append(
            {
                "what": what(row, with_direction=False),
                "direction": row["direction"],
                "group": row["group"],
                "coefficient": f"{coefficient:g} {unit_words(run.config['intervention'])}",
                "outcome": outcome,
                "rows": rows,
                "changed": f"The text differs from the unsteered one on {n_changed} of "
                f"{counted(len(both), 'held-out prompt')}; the first are shown.",
            }
        )
    return shown
