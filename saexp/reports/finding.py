"""What a run found, in sentences with their intervals."""

from pathlib import Path

import pandas as pd

from saexp.reports.saved import SavedRun

_UNITS = {
    "resid_norm": "x the stream's mean norm",
    "max_act": "x the latents' maximum activation",
    "p99_act": "x the latents' 99th percentile",
    "raw": "x the decoder direction",
    "share of the way": "of the way to the other group's mean",
}


def unit_words(unit: str) -> str:
    """A coefficient's unit as words that follow the number."""
    return _UNITS.get(unit, unit)


def headline(folder: str | Path) -> str:
    """The finding in a few lines of plain text."""
    return "\n".join(sentences(SavedRun(Path(folder))))


def sentences(run: SavedRun) -> list[str]:
    """One sentence on the setting, one per direction of the contrast, one per causal effect."""
    if "finding" in run.provenance:
        return list(run.provenance["finding"])
    if run.config["task"]["name"] == "train":
        return [training_sentence(run)]
    if run.latents is None:
        return ["This run compared no groups."]
    return [_setting(run), *(_contrast(run, g) for g in run.groups), *_effects(run)]


def _setting(run: SavedRun) -> str:
    metrics, about = run.metrics, run.provenance
    n = metrics["contrast/n_units_test"]
    return (
        f"{about['model']['name']}, {about['sae']['hookpoint']}, SAE of {about['sae']['d_sae']} "
        f"latents: {metrics['contrast/n_significant']} of {metrics['contrast/n_tested']} latents "
        f"that fired tell {run.groups[0]} from {run.groups[1]} "
        f"(q <= {run.config['analyzer']['alpha']:g}, train split); "
        f"numbers below are of {n} held-out {run.unit_word}."
    )


def _contrast(run: SavedRun, group: str) -> str:
    m = {k.removeprefix("contrast/"): v for k, v in run.metrics.items()}
    latent = m[f"best_latent_{group}"]
    if latent is None:
        return f"No latent speaks for '{group}', so none is selected."
    low, high = m[f"best_auroc_{group}_ci_low_test"], m[f"best_auroc_{group}_ci_high_test"]
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    parts = (
        f"{group}: latent {latent} has AUROC {m[f'best_auroc_{group}_test']:.3f}{interval}, "
        f"separation {m[f'best_separation_{group}_test']:.2f}"
    )
    if len(run.entity_types) > 1:
        parts += (
            f"; smallest over {len(run.entity_types)} entity types: AUROC "
            f"{m[f'best_min_auroc_{group}_test']:.3f}, separation "
            f"{m[f'best_min_separation_{group}_test']:.2f}"
        )
    return f"{parts}."


def _effects(run: SavedRun) -> list[str]:
    told = []
    for condition in run.main_conditions():
        for outcome in run.outcomes:
            sentence = _effect(run, condition, outcome)
            if sentence:
                told.append(sentence)
    return told


def _effect(run: SavedRun, condition: str, outcome: str) -> str | None:
    summary = run.summary
    assert summary is not None
    coefficient = run.told_coefficient(condition, outcome)
    if coefficient is None:
        return None
    at = summary[summary["coefficient"] == coefficient]
    row = at[at["condition"] == condition].iloc[0]
    group = row["group"]
    before = summary[(summary["role"] == "baseline") & (summary["group"] == group)].iloc[0]
    cfg = run.config["intervention"]
    number = len(str(row["latent"]).split("+"))
    what = f"latent {row['latent']}" if number == 1 else f"{number} latents"
    verb = "steering" if cfg["name"] == "steer" else "moving"
    unit = unit_words(cfg["unit"] if cfg["name"] == "steer" else "share of the way")
    where = cfg["where"].replace("_", " ")
    sentence = (
        f"{verb} {what} for '{row['direction']}' at {where}, coefficient {coefficient:g} {unit}: "
        f"{outcome} on {row['n']} {group} prompts {before[outcome]:.2f} -> {row[outcome]:.2f} "
        f"[{row[f'{outcome}_ci_low']:.2f}, {row[f'{outcome}_ci_high']:.2f}]"
    )
    return f"{sentence}{_controls(at, condition, outcome)}."


def _controls(at: pd.DataFrame, condition: str, outcome: str) -> str:
    controls = at[(at["of"] == condition) & (at["role"] == "control")]
    if controls.empty:
        return "; no control could be matched"
    low, high = controls[outcome].min(), controls[outcome].max()
    return f"; {len(controls)} matched controls {low:.2f} to {high:.2f}"


def training_sentence(run: SavedRun) -> str:
    """What `task=train` made, in one sentence of held-out numbers."""
    m, about = run.metrics, run.provenance
    explained = m["reconstruction/explained_variance"]
    shown = "not defined" if explained is None else f"{explained:.3f}"
    return (
        f"{run.config['sae_trainer']['name']} SAE of {about['sae']['d_sae']} latents on "
        f"{about['sae']['hookpoint']} of {about['model']['name']}: explained variance {shown}, L0 "
        f"{m['sparsity/l0']:.1f}, {m['sparsity/dead_fraction']:.0%} of the latents silent on "
        f"{about['n_measured']:,} held-out positions; trained on {about['n_trained_on']:,}."
    )
