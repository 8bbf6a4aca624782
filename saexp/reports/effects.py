"""What an intervention did, from its saved tables: sentences, tables and examples."""

from typing import Any

import pandas as pd

from saexp.reports.saved import SavedRun
from saexp.wording import counted

_UNITS = {
    "resid_norm": "x the stream's median norm",
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


PLACES = {
    "all": "every token",
    "prompt": "the prompt's tokens",
    "generated": "the generated tokens",
    "last": "the last token",
    "entity": "the entity's tokens",
    "entity_all": "the entity's tokens",
    "entity_last": "the entity's last token",
    "entity_to_end": "the tokens from the entity on",
    "after_entity": "the token after the entity",
    "continuation": "the continuation's tokens",
}
"""Where something is read or written, in words."""


def place_words(where: str) -> str:
    """Positions in words; those without words of their own by name."""
    return PLACES.get(where, f"positions {where.replace('_', ' ')}")


def unit_words(cfg: dict[str, Any]) -> str:
    """An intervention's coefficient unit as words that follow the number."""
    name = str(cfg["name"])
    return _UNITS.get(str(cfg["unit"]) if name == "steer" else name, "")


def verb(cfg: dict[str, Any]) -> str:
    """What an intervention does, in words that go before what it changes."""
    return VERBS.get(str(cfg["name"]), f"{cfg['name']} on")


def what(row: Any, told_direction: bool = True, *, towards: bool = False) -> str:
    """What a condition changes, in words: its latents, direction or place.

    Latents are `towards` a group rather than for it where those of both groups are moved there.
    """
    latents = str(row["latent"])
    if row["role"] in ("single", "group"):
        number = len(latents.split("+"))
        named = f"latent {latents}" if number == 1 else f"{number} latents"
        layers = sorted({int(x.partition(":")[0]) for x in latents.split("+") if ":" in x})
        if len(layers) > 1:
            named += f" of layers {', '.join(map(str, layers))}"
        told = told_direction and row["direction"] not in ("latent", "latents")
        return f"{named} {'towards' if towards else 'for'} '{row['direction']}'" if told else named
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
    coefficient = run.told_coefficient(condition, outcome)
    if coefficient is None:
        return _no_effect(run, condition, outcome)
    at = summary[summary["coefficient"] == coefficient]
    row = at[at["condition"] == condition].iloc[0]
    group = row["group"]
    before = summary[(summary["role"] == "baseline") & (summary["group"] == group)].iloc[0]
    where = place_words(cfg["where"])
    strength = "" if cfg["name"] == "orthogonalize" else f", coefficient {coefficient:g}"
    if strength:
        strength = f"{strength} {unit_words(cfg)}".rstrip()
    numbers = (
        f"{before[outcome]:.2f} -> {row[outcome]:.2f} "
        f"[{row[f'{outcome}_ci_low']:.2f}, {row[f'{outcome}_ci_high']:.2f}]"
    )
    place = "" if cfg["name"] == "orthogonalize" else f" at {where}"
    sentence = (
        f"{_doing(cfg, row)}{place}{strength}: {_words(outcome)} on "
        f"{int(row[f'{outcome}_n'])} {prompts_of(group)} {numbers}"
    )
    return f"{sentence}{_controls(at, condition, outcome)}"


def _doing(cfg: dict[str, Any], row: Any) -> str:
    return f"{verb(cfg)} {what(row, towards=cfg['name'] == 'clamp')}"


def _no_effect(run: SavedRun, condition: str, outcome: str) -> str:
    """A condition that no coefficient was chosen for, with the numbers: before, after, controls."""
    summary = run.summary
    assert summary is not None
    mine = summary[summary["condition"] == condition]
    row, told = mine.iloc[0], _doing(run.config["intervention"], mine.iloc[0])
    after = mine.loc[mine["coefficient"] != 0, outcome]
    prompts = prompts_of(row["group"])
    if after.empty:
        return (
            f"{told} was run at coefficient 0 alone, which changes nothing: {_words(outcome)} of "
            f"{prompts} stays {row[outcome]:.2f}"
        )
    if after.isna().all():
        return f"{told}: {_words(outcome)} could be measured on none of the {prompts}"
    before = summary[(summary["role"] == "baseline") & (summary["group"] == row["group"])].iloc[0]
    controls = summary[(summary["of"] == condition) & (summary["role"] == "control")]
    values = controls.loc[controls["coefficient"] != 0, outcome]
    beside = f", controls {_range(values)}" if values.notna().any() else ""
    # Without train prompts it is judged on the prompts it is told of, which a note says.
    whole = run.effects_summary
    trained = whole is not None and bool((whole["split"] == "train").any())
    n = counted(int(row[f"{outcome}_n"]), "test prompt" if trained else "prompt")
    return (
        f"{told} changes {_words(outcome)} of {prompts} at no coefficient by more than its "
        f"controls{' on train prompts' if trained else ''} ({n}: {before[outcome]:.2f} before, "
        f"{_range(after)} after{beside})"
    )


def _range(values: pd.Series) -> str:
    return " to ".join(dict.fromkeys([f"{values.min():.2f}", f"{values.max():.2f}"]))


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
    weights = run.config["intervention"]["name"] == "orthogonalize"
    how = "under the edited weights" if weights else "edited at every token"
    value = f"{row['neutral_kl'].iloc[0]:.2f}"
    return f"; KL per token of neutral text {how} {value} nats{beside}"
