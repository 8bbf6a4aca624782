"""Causal effects over a sweep's cells: chosen on train prompts, reported on test prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saexp.reports.cells import cell_words, line_keys
from saexp.reports.saved import SavedRun
from saexp.stats.multiplicity import ALPHA, holm
from saexp.wording import counted, p_value_words

_MOST_LISTED = 6
"""Cells without train prompts that are listed one by one."""
NUMBERS = ["value", "ci_low", "ci_high", "n", "change", "controls_min", "controls_max"]
NUMBERS += ["p_controls", "p_floor", "gap_train"]
OF_AN_EFFECT = {"outcome", "direction", "prompts", "coefficient", "chosen", *NUMBERS}


def effects_table(folder: Path, done: pd.DataFrame) -> pd.DataFrame:
    """A row per cell, outcome, direction, group of prompts and coefficient, of the main latents.

    Values, intervals, p-values against controls and the matched controls' range are of the test
    split; `gap_train` is, on train prompts, the size of the change less that of the most extreme
    control (NaN without train prompts), `chosen` marks the coefficient that the cell chose there.
    Equal rows of several cells appear once.
    """
    keys = list(dict.fromkeys(["model", "sae", "dataset", "layer", "width", *line_keys(done)]))
    rows: list[dict[str, Any]] = []
    for record in done.to_dict("records"):
        run = SavedRun(folder / str(record["folder"]))
        summary, controls = run.effects_summary, run.controls
        if summary is None:
            continue
        about = {k: record.get(k) for k in keys}
        rows += [about | row for row in _of_cell(summary, controls)]
    columns = [*keys, "outcome", "direction", "prompts", "coefficient", "chosen", *NUMBERS]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(ignore_index=True)


def _of_cell(summary: pd.DataFrame, controls: pd.DataFrame | None) -> list[dict[str, Any]]:
    ending = "_p_controls"
    outcomes = [str(c).removesuffix(ending) for c in summary if str(c).endswith(ending)]
    is_control = summary["role"] == "control"
    if controls is not None:
        matched = controls.loc[controls["matched"], "condition"]
        is_control &= summary["condition"].isin(matched)
    by = ["split", "group", "of", "coefficient"]
    main = summary[summary["main"] & summary["role"].isin(["group", "single"])]
    train = main[main["split"] == "train"]
    of_train = list(zip(train["group"], train["condition"], train["coefficient"], strict=True))
    rows = []
    for outcome in outcomes:
        of_controls = summary[is_control].groupby(by)[outcome]
        least, most = of_controls.min(), of_controls.max()
        changes = summary.assign(size=summary[f"{outcome}_change"].abs())
        rivals = changes[is_control].groupby(by)["size"].max()
        sizes = dict(zip(of_train, train[f"{outcome}_change"].abs(), strict=True))
        for row in main[main["split"] == "test"].to_dict("records"):
            here = (row["group"], row["condition"], row["coefficient"])
            rows.append(
                {
                    "outcome": outcome,
                    "direction": row["direction"],
                    "prompts": row["group"],
                    "coefficient": row["coefficient"],
                    "chosen": bool(row["chosen"]),
                    "value": row[outcome],
                    "ci_low": row[f"{outcome}_ci_low"],
                    "ci_high": row[f"{outcome}_ci_high"],
                    "n": int(row[f"{outcome}_n"]),
                    "change": row[f"{outcome}_change"],
                    "controls_min": least.get(("test", *here), np.nan),
                    "controls_max": most.get(("test", *here), np.nan),
                    "p_controls": row[f"{outcome}_p_controls"],
                    "p_floor": row[f"{outcome}_p_controls_floor"],
                    "gap_train": sizes.get(here, np.nan) - rivals.get(("train", *here), 0.0),
                }
            )
    return rows


def effect_findings(effects: pd.DataFrame) -> list[str]:
    """A sentence per outcome, direction and group of prompts, on the cells at the coefficient that
    each chose. The family of Holm's adjustment is all tests of these sentences."""
    chosen = effects[effects["chosen"].astype(bool) & effects["value"].notna()]
    chosen = chosen.assign(p_holm=holm(chosen["p_controls"].to_numpy(dtype=float)))
    n_tests = int(chosen["p_controls"].notna().sum())
    sentences = []
    for (outcome, direction, prompts), cells in by_effect(chosen):
        words = f"{outcome.replace('_', ' ')}{f' on {prompts} prompts' if prompts else ''}"
        sentence = _sentence(words, cells.reset_index(drop=True), n_tests)
        sentences.append(f"Acting on '{direction}': {sentence}.")
    return sentences


def by_effect(effects: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """((outcome, direction, group of prompts), rows); no group where a direction has one alone."""
    n_groups = effects.groupby(["outcome", "direction"])["prompts"].transform("nunique")
    named = effects["prompts"].where(n_groups > 1, "")
    parts = effects.groupby(["outcome", "direction", named], sort=False)
    return [((str(o), str(d), str(g)), part) for (o, d, g), part in parts]  # pyright: ignore[reportGeneralTypeIssues]


def _sentence(words: str, cells: pd.DataFrame, n_tests: int) -> str:
    """The cell that stands out on train prompts with its test values; never the best test value."""
    about = [str(c) for c in cells if c not in OF_AN_EFFECT and c != "p_holm"]
    named = [c for c in about if cells[c].astype(str).nunique() > 1]
    counts = _counts(cells, n_tests)
    if cells["gap_train"].notna().any():
        best = cells.iloc[int(np.nanargmax(cells["gap_train"]))]
        return (
            f"{words} {_change(best)} at {_named(best, named)}"
            f"{' (chosen on train prompts)' if len(cells) > 1 else ''}{_tested(best, n_tests)}"
            f"{counts}"
        )
    if len(cells) > _MOST_LISTED:
        return (
            f"{words} in {len(cells)} cells, none of which stands out by its train prompts, as "
            f"there are none{counts}"
        )
    each = [f"{_change(c)} at {_named(c, named)}{_tested(c, n_tests)}" for _, c in cells.iterrows()]
    return f"{words} {'; '.join(each)}{counts}"


def _named(cell: pd.Series, named: list[str]) -> str:
    where = cell_words(cell, named)
    return (
        f"{where}, coefficient {cell['coefficient']:g}"
        if where
        else (f"coefficient {cell['coefficient']:g}")
    )


def _change(cell: pd.Series) -> str:
    before = "" if pd.isna(cell["change"]) else f"{cell['value'] - cell['change']:.2f} -> "
    low, high = cell["ci_low"], cell["ci_high"]
    interval = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{before}{cell['value']:.2f}{interval} (n = {cell['n']})"


def _tested(cell: pd.Series, n_tests: int) -> str:
    found = []
    if not pd.isna(cell["controls_min"]):
        found.append(f"controls {cell['controls_min']:.2f} to {cell['controls_max']:.2f}")
    if not pd.isna(cell["p_controls"]):
        found.append(f"rank p {p_value_words(float(cell['p_controls']))}")
        if n_tests > 1:
            found.append(f"{cell['p_holm']:.2g} after Holm over {n_tests} tests")
    return "".join(f", {f}" for f in found)


def _counts(cells: pd.DataFrame, n_tests: int) -> str:
    """How many cells differ from their controls, and whether any could."""
    if not cells["p_controls"].notna().any():
        return "; no cell has enough matched controls for a p-value"
    if len(cells) == 1:
        return ""
    n_significant = int((cells["p_holm"] <= ALPHA).sum())
    found = f"; {n_significant} of {counted(len(cells), 'cell')} "
    found += "differ" if n_significant != 1 else "differs"
    found += " from their controls" if n_significant != 1 else " from its controls"
    floor = float(cells["p_floor"].min())
    if floor * n_tests > ALPHA:
        found += (
            f" (none can: the smallest p-value of {round(1 / floor) - 1} controls is "
            f"{floor * n_tests:.2g} after Holm; raise intervention.n_controls)"
        )
    return found
