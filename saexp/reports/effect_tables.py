"""Tables and examples of what an intervention did, from its saved tables."""

from typing import Any

import pandas as pd

from saexp.reports.effects import unit_words, what
from saexp.reports.saved import SavedRun
from saexp.wording import counted

N_EXAMPLES = 4
N_HEADS = 12
N_ATTRIBUTED = 20
_ATTRIBUTED = [f"{n}{end}" for n in ("direct", "gradient") for end in ("", "_ci_low", "_ci_high")]


def effect_content(run: SavedRun) -> dict[str, Any]:
    """What effects.html is given."""
    return {
        "effects": effect_tables(run),
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
        rows = []
        for row in summary[summary["role"] != "control"].to_dict("records"):
            same = (summary["of"] == row["condition"]) & (summary["role"] == "control")
            controls = summary.loc[same & (summary["coefficient"] == row["coefficient"]), outcome]
            span = f"{controls.min():.2f} to {controls.max():.2f}" if len(controls) else "–"
            cells = [row["condition"], str(row["latent"]).replace("+", ", "), row["group"]]
            cells += [row[f"{outcome}_n"], row["coefficient"], row[outcome]]
            cells += [row[f"{outcome}_{c}"] for c in ("ci_low", "ci_high", "change", "p")]
            cells += [span, len(controls), row[f"{outcome}_over_controls"]]
            cells += [row[f"{outcome}_p_controls"], "yes" if row["chosen"] else ""]
            rows.append([*cells, *(row[c] for c in units)])
        head = ["condition", "latents", "prompts", "n", "coefficient", outcome, "low", "high"]
        head += ["change", "p", "controls' range", "controls", "beyond controls", "p of that"]
        head += ["chosen on train", *(c.removeprefix("in_").replace("_", " ") for c in units)]
        tables.append({"outcome": outcome, "head": head, "rows": rows})
    return tables


def cost_table(run: SavedRun) -> dict[str, Any] | None:
    """KL on neutral text per condition and coefficient, with the controls' range."""
    costs = run.table("costs")
    if costs is None:
        return None
    rows = []
    for row in costs[costs["role"] != "control"].to_dict("records"):
        same = (costs["of"] == row["condition"]) & (costs["role"] == "control")
        others = costs.loc[same & (costs["coefficient"] == row["coefficient"]), "neutral_kl"]
        span = f"{others.min():.3f} to {others.max():.3f}" if len(others) else "–"
        rows.append([row["condition"], row["coefficient"], row["neutral_kl"], span])
    head = ["condition", "coefficient", "KL, nats a token", "controls' range"]
    return {"head": head, "rows": rows}


def head_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Attention to the entity: all heads together per condition, then those that change most."""
    table, summary = run.table("attention"), run.table("attention_summary")
    if table is None or summary is None:
        return []
    head = ["condition", "prompts", "coefficient", "n", "original", "edited", "difference"]
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
        coefficient = run.told_coefficient(name, run.outcomes[0])
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
                "what": what(row, told_direction=False),
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
