"""What labels can be used for: the commands that task=label recommends for what it found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saexp.config import LabelConfig
from saexp.errors import counted

MIN_OF_GROUP = 4
"""Members of each group that a contrast with train and test split needs at least."""


def label_usage(
    entities: pd.DataFrame, rows: Sequence[Mapping[str, Any]], options: LabelConfig
) -> dict[str, str]:
    """File -> note with the command that uses it, or why it allows no contrast; `{path}` stands for
    its path."""
    groups = entities["group"].value_counts()
    known, unknown = (int(groups.get(g, 0)) for g in ("known", "unknown"))
    of_entities = """use them with: dataset=jsonl 'dataset.path="{path}"'"""
    if min(known, unknown) < MIN_OF_GROUP:
        of_entities = (
            f"{counted(known, 'entity', 'entities')} known and {unknown} unknown are too few for a "
            f"contrast ({MIN_OF_GROUP} of each are needed): {_advice(known, unknown, options)}; "
            "the labels are in {path}"
        )
    n = Counter(row["group"] for row in rows)
    of_answers = (
        "right against wrong answers, at the prompt's end: "
        """experiment=uncertainty 'dataset.path="{path}"'"""
    )
    if min(n["correct"], n["incorrect"]) < MIN_OF_GROUP:
        of_answers = (
            f"{counted(n['correct'], 'right answer')} and {n['incorrect']} wrong ones are too few "
            f"for experiment=uncertainty ({MIN_OF_GROUP} of each are needed); they are in {{path}}"
        )
    return {"entities.jsonl": of_entities, "answers.jsonl": of_answers}


def _advice(known: int, unknown: int, options: LabelConfig) -> str:
    if known <= unknown:
        return (
            f"lower task.min_correct={options.min_correct} or task.min_known={options.min_known}, "
            "or name entities that the model knows better (dataset.path=)"
        )
    return (
        f"raise task.max_unknown={options.max_unknown}, or name rarer or invented entities "
        "(dataset.path=)"
    )


def memorization_usage(table: pd.DataFrame) -> dict[str, str]:
    """As `label_usage`, for texts continued word for word."""
    n_perfect = int(table["perfect_match"].sum())
    n_none = int((table["matching_tokens"] == 0).sum())
    if min(n_perfect, n_none) >= MIN_OF_GROUP:
        note = """use it with: dataset=memorization 'dataset.path="{path}"'"""
        return {"memorization.csv": note}
    advice = (
        "type a smaller task.continuation_tokens=, or give texts that the model has seen often"
        if n_perfect < MIN_OF_GROUP
        else "add texts that the model cannot have seen"
    )
    return {
        "memorization.csv": f"{counted(n_perfect, 'text')} continued exactly and {n_none} without "
        f"a matching token are too few for dataset=memorization ({MIN_OF_GROUP} of each are "
        f"needed): {advice}; the continuations are in {{path}}"
    }
