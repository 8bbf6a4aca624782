"""What an intervention did, from its saved tables: sentences, tables and examples."""

from typing import Any

import pandas as pd

from saexp.reports.saved import SavedRun

N_EXAMPLES = 4
N_HEADS = 12
N_ATTRIBUTED = 20

_UNITS = {
    "resid_norm": "x the stream's mean norm",
    "max_act": "x the latents' maximum activation",
    "p99_act": "x the latents' 99th percentile",
    "raw": "x the direction as it is",
    "clamp": "of the way",
    "scale": "x the latents' own value, added",
    "ablate": "of the way to zero",
    "project_out": "of the component",
    "splice": "of the way to the reconstruction",
    "patch": "of the way to the pair's activation",
    "orthogonalize": "(1: directions taken out)",
}
VERBS = {
    "steer": "adding",
    "clamp": "moving",
    "scale": "scaling",
    "ablate": "silencing",
    "project_out": "removing from the stream",
    "splice": "splicing in",
    "patch": "patching",
    "orthogonalize": "taking out of the weights",
}


def unit_words(cfg: dict[str, Any]) -> str:
    """An intervention's coefficient unit as words that follow the number."""
    name = str(cfg["name"])
    return _UNITS.get(str(cfg["unit"]) if name == "steer" else name, "")


def what(row: Any, told_direction: bool = True) -> str:
    """What a condition changes, in words: its latents, direction or place."""
    latents = str(row["latent"])
    if row["role"] in ("single", "group"):
        number = len(latents.split("+"))
        named = f"latent {latents}" if number == 1 else f"{number} latents"
        told = told_direction and row["direction"] not in ("latent", "latents")
        return f"{named} for '{row['direction']}'" if told else named
    name = str(row["condition"]).removeprefix(f"{row['direction']}_")
    if name == "splice":
        return "the reconstruction"
    if name.startswith("patch_"):
        place = name.removeprefix("patch_")
        return f"{place} from {row['direction']} prompts" if told_direction else place
    named = f"the {name.replace('_', ' ')} direction"
    return f"{named} towards '{row['direction']}'" if told_direction else named


def prompts_of(group: str) -> str:
    """The prompts of a group in words; of a data set without groups, just prompts."""
    return "prompts" if group == "all" else f"{group} prompts"


def effect_sentences(run: SavedRun) -> list[str]:
    """One sentence per main condition: the first outcome in full, the others' numbers behind it."""
    told = []
    for condition in run.main_conditions() if run.outcomes else []:
        first, *others = run.outcomes
        sentence = _effect(run, condition, first)
        coefficient = run.told_coefficient(condition, first)
        if coefficient is not None:
            sentence += "".join(_beside(run, condition, coefficient, o) for o in others)
            sentence += _cost(run, condition, coefficient) + _attention(run, condition)
        told.append(f"{sentence}.")
    return told


def _beside(run: SavedRun, condition: str, coefficient: float, outcome: str) -> str:
    """Another outcome at the same strength: before, after, the controls' range."""
    summary = run.summary
    assert summary is not None
    at = summary[summary["coefficient"] == coefficient]
    row = at[at["condition"] == condition].iloc[0]
    before = summary[(summary["role"] == "baseline") & (summary["group"] == row["group"])].iloc[0]
    controls = at[(at["of"] == condition) & (at["role"] == "control")][outcome]
    beside = f" (controls {controls.min():.2f} to {controls.max():.2f})" if len(controls) else ""
    return f"; {_words(outcome)} {before[outcome]:.2f} -> {row[outcome]:.2f}{beside}"


def _attention(run: SavedRun, condition: str) -> str:
    """Attention from the last token to the entity, where it was measured for the condition."""
    table = run.table("attention_summary")
    if table is None or condition not in set(table["condition"]):
        return ""
    row = table[table["condition"] == condition].iloc[0]
    return (
        f"; attention from the last token to the entity {row['original']:.3f} -> "
        f"{row['edited']:.3f} (p {_p(float(row['p_value']))})"
    )


def _effect(run: SavedRun, condition: str, outcome: str) -> str:
    summary = run.summary
    assert summary is not None
    cfg = run.config["intervention"]
    mine = summary[summary["condition"] == condition]
    coefficient = run.told_coefficient(condition, outcome)
    if coefficient is None:
        row = mine.iloc[0]
        return (
            f"{VERBS.get(cfg['name'], cfg['name'])} {what(row)} changes {_words(outcome)} of "
            f"{prompts_of(row['group'])} at no coefficient by more than its controls"
        )
    at = summary[summary["coefficient"] == coefficient]
    row = at[at["condition"] == condition].iloc[0]
    group = row["group"]
    before = summary[(summary["role"] == "baseline") & (summary["group"] == group)].iloc[0]
    where = cfg["where"].replace("_", " ")
    strength = "" if cfg["name"] == "orthogonalize" else f", coefficient {coefficient:g}"
    if strength:
        strength = f"{strength} {unit_words(cfg)}"
    numbers = (
        f"{before[outcome]:.2f} -> {row[outcome]:.2f} "
        f"[{row[f'{outcome}_ci_low']:.2f}, {row[f'{outcome}_ci_high']:.2f}]"
    )
    place = "" if cfg["name"] == "orthogonalize" else f" at {where}"
    sentence = (
        f"{VERBS.get(cfg['name'], cfg['name'])} {what(row)}{place}{strength}: {_words(outcome)} on "
        f"{int(row[f'{outcome}_n'])} {prompts_of(group)} {numbers}"
    )
    return f"{sentence}{_controls(at, condition, outcome)}"


def _words(outcome: str) -> str:
    return outcome.replace("_", " ")


def _controls(at: pd.DataFrame, condition: str, outcome: str) -> str:
    controls = at[(at["of"] == condition) & (at["role"] == "control")]
    if controls.empty:
        return "; no control could be matched"
    low, high = controls[outcome].min(), controls[outcome].max()
    row = at[at["condition"] == condition].iloc[0]
    p = row[f"{outcome}_p_controls"]
    shown = "" if pd.isna(p) else f" (p {_p(float(p))} against their mean)"
    return f"; {len(controls)} matched controls {low:.2f} to {high:.2f}{shown}"


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 0.001 else "< 0.001"


def _cost(run: SavedRun, condition: str, coefficient: float) -> str:
    costs = run.table("costs")
    if costs is None:
        return ""
    row = costs[(costs["condition"] == condition) & (costs["coefficient"] == coefficient)]
    if row.empty:
        return ""
    others = costs[(costs["of"] == condition) & (costs["role"] == "control")]
    others = others[others["coefficient"] == coefficient]["neutral_kl"]
    beside = f", controls {others.min():.2f} to {others.max():.2f}" if len(others) else ""
    return f"; cost on neutral text {row['neutral_kl'].iloc[0]:.2f} nats a token{beside}"


def effect_content(run: SavedRun) -> dict[str, Any]:
    """What effects.html is given."""
    return {
        "effects": effect_tables(run),
        "costs": cost_table(run),
        "heads": head_tables(run),
        "examples": generations(run),
    }


def attribution_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per group the latents of the largest gradient attribution, with their measured effect."""
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
            [r["latent"], r["direct"], r["gradient"], r["activation"], r["n_active"]]
            + [measured.get((str(group), str(r["latent"])))]
            for r in part.head(N_ATTRIBUTED).to_dict("records")
        ]
        head = ["latent", "direct", "gradient", "mean activation", "prompts where active"]
        made.append({"group": group, "head": [*head, "measured, largest strength"], "rows": rows})
    return made


def effect_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per outcome every condition but the controls, with the controls' range beside it."""
    summary = run.summary
    if summary is None:
        return []
    tables = []
    units = [c for c in ("in_raw", "in_max_act", "in_p99_act", "in_resid_norm") if c in summary]
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
        ids = list(steered.groupby("entity_type", sort=False, dropna=False).head(1).index)
        ids = (ids + [i for i in steered.index if i not in ids])[:N_EXAMPLES]
        rows = [
            {
                "prompt": steered.loc[i, "prompt"],
                "texts": [
                    (t.loc[i, "generated_text"], outcome is not None and bool(t.loc[i, outcome]))
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
            }
        )
    return shown
