"""What a model does without intervention: its knowledge, and which outcomes can show an effect."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saexp.data.examples import Example
from saexp.interventions.outcomes import Accuracy, Refusal

BASELINE_COLUMNS = (
    "example_id",
    "group",
    "split",
    "entity_type",
    "unit",
    "prompt",
    "condition",
    "role",
    "control_kind",
    "of",
    "direction",
    "latent",
    "coefficient",
    "answers",
)
"""Columns of the table `baselines` besides the outcomes; those that `summarise` reads included."""


def knowledge(
    baselines: pd.DataFrame, example_of: Mapping[str, Example]
) -> tuple[pd.Series, dict[str, float | int | None]]:
    """(whether each generation contains a correct answer, metrics per group of prompts).

    Prompts without an answer, or whose answer in the data is a refusal, are missing in the series
    and do not count in `baseline/n_questions_<group>`. A group without questions has no
    `baseline/accuracy_<group>`; without any question there are no metrics.
    """
    accuracy, refusal = Accuracy(), Refusal()
    values: list[bool | None] = []
    for name, text in zip(baselines["example_id"], baselines["generated_text"], strict=True):
        example = example_of[name]
        is_question = not any(refusal.score(a, example) for a in example.answers)
        values.append(accuracy.score(text, example) if is_question else None)
    correct = pd.Series(values, index=baselines.index, dtype="boolean")
    metrics: dict[str, float | int | None] = {}
    for group, part in correct.groupby(baselines["group"], sort=False):
        n = int(part.notna().sum())
        metrics |= {
            f"baseline/n_questions_{group}": n,
            f"baseline/n_correct_{group}": int(part.sum()),
        }
        if n:
            metrics[f"baseline/accuracy_{group}"] = float(part.mean())
    if correct.isna().all():
        return correct, {}
    return correct, metrics


def constant_rates(baselines: pd.DataFrame, rates: Sequence[str]) -> dict[str, int]:
    """Rate -> its value, for rates that are the same on every prompt without intervention.

    Only prompts of the train split count, or all where it has none. Empty where these prompts
    belong to fewer than two groups: that a model never refuses questions on known entities does not
    show that it never refuses.
    """
    seen = _seen(baselines)
    if seen["group"].nunique() < 2:
        return {}
    values = {rate: seen[rate].dropna() for rate in rates}
    return {r: int(v.iloc[0]) for r, v in values.items() if len(v) and v.nunique() == 1}


def _seen(baselines: pd.DataFrame) -> pd.DataFrame:
    """The prompts on which outcomes are chosen: those of the train split, or all if it is empty."""
    train = baselines[baselines["split"] == "train"]
    return baselines if train.empty else train


def constant_note(
    constant: Mapping[str, int],
    instead: Sequence[str],
    baselines: pd.DataFrame,
    null: Sequence[str],
) -> str:
    """Which outcomes are left out and why, what is measured `instead`, and the `null` metrics."""
    sizes = _seen(baselines).groupby("group", sort=False).size()
    n = " and ".join(f"{size} {group}" for group, size in sizes.items())
    left_out = " and ".join(f"{r.replace('_', ' ')} is {v}" for r, v in constant.items())
    note = f"without intervention {left_out} on all prompts ({n}), so it is not tested: "
    if instead:
        note += f"{' and '.join(instead)} took its place"
    else:
        note += "no outcome is left, and nothing was changed"
    return (
        f"{note}; {', '.join(null)}: null (intervention.alternatives=[...] sets other outcomes for "
        "this case, null tests every outcome)"
    )


def fitting(baselines: pd.DataFrame, alternatives: Sequence[Any]) -> list[Any]:
    """The alternative outcomes with values without intervention that, if rates, vary."""
    constant = constant_rates(baselines, [a.name for a in alternatives if a.kind == "rate"])
    names = [a.name for a in alternatives if a.name in baselines]
    values = {name: baselines[name].notna().any() for name in names}
    return [a for a in alternatives if values.get(a.name) and a.name not in constant]


def with_texts(effects: pd.DataFrame, baselines: pd.DataFrame | None) -> pd.DataFrame:
    """The effects with a column `generated_text`, also where the outcomes needed no generation.

    Then the rows without intervention have the texts of `baselines`, all others none.
    """
    if "generated_text" in effects or baselines is None:
        return effects
    text_of = baselines.drop_duplicates("example_id").set_index("example_id")["generated_text"]
    texts = effects["example_id"].map(text_of).where(effects["role"] == "baseline")
    return effects.assign(generated_text=texts)
