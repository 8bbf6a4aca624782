"""sweep.html: the findings of a sweep, its cells, and latents matched between its SAEs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.errors import counted
from saexp.files import SWEEP_FOLDER, write_table
from saexp.reports import Finding, interval_words, write_page
from saexp.reports.contrast import MATCH_HEAD, match_rows, read_matches, splits
from saexp.reports.findings import CAPTION, SURFACE, probe_columns, probe_figure, probe_findings
from saexp.reports.saved_run import (
    BEST,
    CONTROL,
    EFFECT,
    PAGES,
    POINT,
    STATES,
    SavedRun,
    cell_effects,
    cell_words,
    cells_table,
    contrasts,
    groups_of,
    line_keys,
    swept,
)
from saexp.reports.sweep_figures import (
    by_effect,
    effect_label,
    effect_title,
    flow_figures,
    importance_figure,
    shown_effects,
    sweep_figures,
)
from saexp.results import at_chance_words, outcome_words, p_value_words, read_plan
from saexp.stats.significance import ALPHA, holm

N_LISTED = 6
"""Cells that a sentence lists."""


def effects_table(folder: Path, done: pd.DataFrame) -> pd.DataFrame:
    """`distinct_effects` of all cells."""
    return distinct_effects(cell_effects(folder, done))


def distinct_effects(effects: pd.DataFrame) -> pd.DataFrame:
    """Equal rows of several cells once, and a baseline only for a line without coefficient 0."""
    rows = effects.drop(columns="cell").drop_duplicates(ignore_index=True)
    is_baseline = rows["is_baseline"].astype(bool)
    line = rows[[c for c in rows if c not in POINT]].map(str).agg("|".join, axis=1)
    at_zero = line[(rows["coefficient"] == 0) & ~is_baseline]
    is_extra = line.isin(at_zero) | line.where(is_baseline).duplicated()
    return rows[~(is_baseline & is_extra)].reset_index(drop=True)


def with_holm(effects: pd.DataFrame) -> pd.DataFrame:
    """The effects with the column `p_holm`: Holm over the chosen ones, equal rows of several cells
    being one test."""
    test = effects.groupby([c for c in effects if c != "cell"], dropna=False, sort=False).ngroup()
    is_tested = effects["chosen"].astype(bool) & effects["value"].notna()
    first = effects[is_tested & ~test.where(is_tested).duplicated()]
    p_values = pd.Series(holm(first["p_controls"].to_numpy(dtype=float)), test[first.index])
    return effects.assign(p_holm=test.map(p_values).astype(float))


def effect_findings(effects: pd.DataFrame) -> list[str]:
    """A sentence per outcome, direction and group of prompts: the largest effect, against its
    controls, and the range over the coefficients. Holm's adjustment is over all tests of these
    sentences."""
    effects = with_holm(effects[effects["value"].notna()])
    chosen = effects[effects["chosen"].astype(bool)]
    n_tests = int(chosen["p_controls"].notna().sum())
    of_all = dict(by_effect(effects[effects["coefficient"] != 0]))
    sentences = [_sentence(cells, of_all[key], n_tests) for key, cells in by_effect(chosen)]
    floor = float(chosen["p_floor"].min())
    if n_tests > 1 and floor * n_tests > ALPHA:
        sentences.append(
            f"No cell can differ significantly: the smallest p-value of {round(1 / floor) - 1} "
            f"controls is {floor * n_tests:.2g} after Holm; raise intervention.n_controls."
        )
    return sentences


def _sentence(cells: pd.DataFrame, measured: pd.DataFrame, n_tests: int) -> str:
    """The cell with the largest effect on train prompts, beyond its controls; without train
    prompts, on test prompts, which Holm's adjustment allows for."""
    about = [str(c) for c in cells if c not in (*EFFECT, "p_holm")]
    varied = [c for c in about if cells[c].astype(str).nunique() > 1]
    is_by_train = bool(cells["gap_train"].notna().any())
    sizes = cells["gap_train"] if is_by_train else cells["change"].abs()
    best = cells.iloc[int(sizes.astype(float).fillna(-np.inf).argmax())]
    how = (
        " (chosen on train prompts)"
        if is_by_train
        else f" (the largest change of {len(cells)} cells)"
    )
    action = f"{effect_title(cells)} {_change(best)} at {cell_place(best, varied)}"
    coefficients, values = measured["coefficient"].astype(float), measured["value"].astype(float)
    span = ""
    if coefficients.nunique() > 1:
        ends = list(dict.fromkeys(f"{v:.2f}" for v in (values.min(), values.max())))
        span = f" Over coefficients {coefficients.min():.3g} to {coefficients.max():.3g} it is "
        span += " to ".join(ends) if len(ends) > 1 else f"{ends[0]} throughout"
        span += "."
    how = how if len(cells) > 1 else ""
    return f"{action}{how}{_tested(best, n_tests)}{_counts(cells)}.{span}"


def cell_place(cell: pd.Series, varied: list[str]) -> str:
    """The varied keys that are set, and the coefficient."""
    keys = [k for k in varied if k != "coefficient" and pd.isna(cell[k]) is not True]
    words = [*(f"{k} {cell[k]}" for k in keys), f"coefficient {cell['coefficient']:.3g}"]
    return ", ".join(words)


def _change(cell: pd.Series) -> str:
    """ "raises refusal from 0.00 to 0.80 [0.71, 0.87] (n = 100)"."""
    outcome, after = outcome_words(str(cell["outcome"])), f"{cell['value']:.2f}"
    after_words = f"{after}{interval_words(cell['ci_low'], cell['ci_high'], 2)} (n = {cell['n']})"
    if pd.isna(cell["change"]):
        return f"gives {outcome} {after_words}"
    before = f"{cell['value'] - cell['change']:.2f}"
    if before == after:
        return f"leaves {outcome} at {after_words}"
    verb = "changes"
    if cell["p_holm"] <= ALPHA:
        verb = "raises" if cell["change"] > 0 else "lowers"
    return f"{verb} {outcome} from {before} to {after_words}"


def _tested(cell: pd.Series, n_tests: int) -> str:
    if pd.isna(cell["controls_min"]):
        return ""
    span = f"{cell['controls_min']:.2f} to {cell['controls_max']:.2f}"
    if pd.isna(cell["p_controls"]):
        return f", against {span} for its controls"
    p_words = f"rank p {p_value_words(float(cell['p_controls']))}"
    if n_tests > 1:
        p_words += f", {cell['p_holm']:.2g} after Holm over {n_tests} tests"
    if cell["p_controls"] > ALPHA:
        return f", not distinguishable from its controls at {span} ({p_words})"
    conclusion = "" if cell["p_holm"] <= ALPHA else ": not significant"
    return f", against {span} for its controls ({p_words}{conclusion})"


def _counts(cells: pd.DataFrame) -> str:
    """How many cells differ from their controls."""
    if not cells["p_controls"].notna().any():
        return "; no cell has enough matched controls for a p-value"
    if len(cells) == 1:
        return ""
    n_significant = int((cells["p_holm"] <= ALPHA).sum())
    differ = "differs from its controls" if n_significant == 1 else "differ from their controls"
    return f"; {n_significant} of {counted(len(cells), 'cell')} {differ}"


def missing_words(table: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    """Why cells have no point in the figures, a sentence per reason."""
    keys = swept(table)
    finished = table["status"] == "finished"
    sentences = []
    for status, rows in table[~finished].groupby("status", sort=False):
        sentences.append(f"{_list_cells(rows, keys)}: {status}.")
    done = table[finished]
    for group in groups_of(done):
        latent = f"contrast/best_latent_{group}"
        rows = done[done[latent].isna()]
        if len(rows):
            sentences.append(f"{_list_cells(rows, keys)}: no latent is selected for '{group}'.")
    if len(effects) and groups_of(done):
        about = [k for k in ("layer", "width") if k in effects and k in done]
        measured, finished_cells = (
            pd.MultiIndex.from_frame(rows[about].astype(str)) for rows in (effects, done)
        )
        rows = done[~finished_cells.isin(measured)]
        if len(rows):
            sentences.append(f"{_list_cells(rows, keys)}: no intervention was run.")
    return sentences


def _list_cells(rows: pd.DataFrame, keys: list[str]) -> str:
    cells = [
        ", ".join(f"{k} {r[k]}" for k in keys) or f"cell {r['cell']}"
        for r in rows.to_dict("records")
    ]
    more = f" and {len(cells) - N_LISTED} more" if len(cells) > N_LISTED else ""
    return "; ".join(cells[:N_LISTED]) + more


CAPTIONS = {
    "over_layers": "Held-out AUROC (0.5 is chance) and separation of the best latent per direction "
    "at each layer, with 95 % intervals over entities. The latent is chosen on the train split.",
    "over_width": "Held-out AUROC (0.5 is chance) and separation of the best latent per direction "
    "at each SAE width, with 95 % intervals over entities.",
    "heat_map": "Held-out AUROC of the best latent per direction.",
    "pareto": "Trained SAEs on held-out texts: explained variance against L0; up and left is "
    "better.",
    "probes": CAPTION,
    "over_coefficient": "Outcome against the coefficient, with 95 % intervals over entities. Bands "
    "span controls measured at every coefficient, dotted lines all those at the chosen one.",
    "importance": "How much of the variance of {} over the cells each swept key explains by "
    "itself: the variance of the means per value as a share of the whole (main effects of the "
    "functional ANOVA; Hutter, Hoos and Leyton-Brown 2014). A long bar: it changes with "
    "this key whatever the others are; interactions: its effect depends on the others.",
    "flow_over_width": "The leading selected latents of each SAE and their nearest neighbours in "
    "the next width, by decoder cosine (the thickness of a link), if it is above chance. A latent "
    "with several links to the right is split in the wider SAE. Coloured latents are selected.",
    "flow_over_layer": "The leading selected latents of each SAE and their nearest neighbours in "
    "the next layer: a latent with a link keeps its direction.",
}
_COLUMNS = {
    "contrast/n_significant": "significant latents",
    "collection/tokens_forwarded": "tokens forwarded",
}
_TRAINED = {
    "sparsity/l0": "L0",
    "reconstruction/explained_variance": "explained variance",
    "sparsity/dead_fraction": "fraction of dead latents",
}


def write_sweep(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Write sweep.parquet and sweep.html from the cells' files; returns the table and figures."""
    path = Path(folder)
    plan, table = read_plan(path), cells_table(path)
    done = table[table["status"] == "finished"]
    if (best := _best_of_search(done, plan)) is not None:
        table[BEST] = table["cell"] == best["cell"]
    write_table(path / "sweep.parquet", table, option=SWEEP_FOLDER)
    matches, notes = read_matches(path)
    flows, captions = flow_figures(matches), dict(CAPTIONS)
    of_cells = cell_effects(path, done)
    effects = distinct_effects(of_cells)
    figures = sweep_figures(table, effects)
    probes = probe_figure(done)
    if probes is not None:
        figures["probes"] = probes
    objective = _objective(path, done)
    chart, reasons, of_what = importance_figure(done, objective, of_cells)
    captions["importance"] = CAPTIONS["importance"].format(of_what)
    if chart is not None:
        figures["importance"] = chart
    notes += reasons
    counts = [(s, int((table["status"] == s).sum())) for s in STATES]
    first = _first_screen(_parts(table, effects, plan), figures)
    head, rows = _rows(path, table, objective, _effect_columns(of_cells))
    write_page(
        path / "sweep.html",
        "sweep.html",
        figures | flows,
        title=f"Sweep over {', '.join(swept(table)) or 'one cell'}",
        command=plan.get("command"),
        counts=[(s, n) for s, n in counts if n],
        findings=first,
        missing=missing_words(table, effects) if figures else [],
        captions=captions,
        further=[n for n in figures if not any(n in dict(f.figures) for f in first)],
        head=head,
        rows=rows,
        failed=_failed(table),
        flows=list(flows),
        match_head=MATCH_HEAD,
        matches=match_rows(matches),
        splits=splits(matches),
        notes=notes,
    )
    return table, figures | flows


def _objective(folder: Path, done: pd.DataFrame) -> str | None:
    """The metric that the cells return, `objective=`; None where the command names none."""
    for name in done["folder"].head(1):
        return SavedRun(folder / str(name)).config.get("objective")
    return None


_Part = tuple[list[str], tuple[str, ...]]
"""Sentences, and the figures of which the first that exists is beside them."""


def _first_screen(parts: list[_Part], figures: Mapping[str, go.Figure]) -> list[Finding]:
    """The sentences beside their figures; those without a figure, which do not vary, last."""
    screen = [
        Finding("\n".join(sentences), [(n, CAPTIONS[n]) for n in names if n in figures][:1])
        for sentences, names in parts
        if sentences
    ]
    return sorted(screen, key=lambda finding: not finding.figures)


def findings(table: pd.DataFrame, folder: str | Path | None = None) -> list[str]:
    """The best cell of a search, per direction the best cell, and the effects of interventions
    (read from the `folder`); of trained SAEs the range of their quality."""
    effects, plan = None, {}
    if folder is not None:
        effects = effects_table(Path(folder), table[table["status"] == "finished"])
        plan = read_plan(Path(folder))
    return [sentence for sentences, _ in _parts(table, effects, plan) for sentence in sentences]


def _parts(
    table: pd.DataFrame, effects: pd.DataFrame | None, plan: Mapping[str, Any]
) -> list[_Part]:
    done = table[table["status"] == "finished"]
    sentences = []
    if "train/n_steps" in done and "sparsity/l0" in done and len(done):
        explained = done["reconstruction/explained_variance"]
        sentences.append(
            f"{counted(len(done), 'trained SAE')}: explained variance {explained.min():.3f} to "
            f"{explained.max():.3f} and L0 {done['sparsity/l0'].min():.1f} to "
            f"{done['sparsity/l0'].max():.1f} on held-out texts."
        )
    if "check/begins_with_bos" in done and done["check/begins_with_bos"].nunique() > 1:
        sentences.append(
            "Texts start with BOS in some cells and not in others, as their SAEs were trained "
            "(column check/begins_with_bos of sweep.parquet): compare cells that agree."
        )
    for group in groups_of(done):
        sentences.append(_best_sentence(done, group))
    sentences += probe_findings(done)
    contrast = (sentences, ("over_layers", "over_width", "pareto", "probes"))
    causal = ([] if effects is None else effect_findings(effects), ("over_coefficient",))
    best = _best_of_search(done, plan)
    if best is None:
        return [contrast, causal]
    parts = [contrast, causal]
    if str(plan["search"]["objective"]).startswith("effect/") and causal[0]:
        parts.reverse()
    parts[0][0].insert(0, _search_sentence(done, best, plan["search"]))
    return parts


def _best_of_search(done: pd.DataFrame, plan: Mapping[str, Any]) -> pd.Series | None:
    """The finished cell with the best value of the objective; None where the sweep is no search."""
    about = plan.get("search") or {}
    values = done.get(about.get("objective"))
    if values is None or not values.notna().any():
        return None
    sign = -1 if about.get("direction") == "minimize" else 1
    return done.iloc[int(np.nanargmax(sign * values.to_numpy(dtype=float, na_value=np.nan)))]


def _search_sentence(done: pd.DataFrame, best: pd.Series, about: Mapping[str, Any]) -> str:
    name = str(about["objective"])
    stem, is_test = name.removesuffix("_test"), "_test" if name.endswith("_test") else ""
    low, high = (best.get(f"{stem}_ci_{end}{is_test}") for end in ("low", "high"))
    keys = swept(done)
    where = cell_place(best, keys) if "coefficient" in keys else cell_words(best, keys)
    largest = "smallest" if about.get("direction") == "minimize" else "largest"
    n_missing = int(done[name].isna().sum())
    cells = counted(len(done), "cell") + " of the search"
    cells += f" ({n_missing} without a value)" if n_missing else ""
    return (
        f"Of {cells}, cell {best['cell']} has the {largest} {name}: "
        f"{float(best[name]):.3f}{interval_words(low, high)} at {where}. The cell was chosen by "
        "this value, so it is optimistic."
    )


def _best_sentence(done: pd.DataFrame, group: str) -> str:
    """The best cell of a direction, and the best one with a control SAE."""
    is_control = done[CONTROL].notna() if CONTROL in done else pd.Series(False, index=done.index)
    best = _best_cell(done[~is_control], group)
    control = _best_cell(done[is_control], group)
    if best is None and control is None:
        return f"{group}: no cell selects a latent."
    keys = swept(done)
    words = ""
    if best is not None:
        words = (
            f"the best latent is {_held_out(best, group)} at {cell_words(best, keys)} (chosen on "
            "the train split)"
        )
        if pd.notna(surface := best.get(SURFACE)):
            low, high = (best.get(f"{SURFACE}_ci_{end}") for end in ("low", "high"))
            words += f"; the surface baseline has {surface:.3f}{interval_words(low, high)}"
    elif not is_control.all():
        words = "no cell with a trained SAE selects a latent"
    if control is not None:
        words += "; for comparison" if words else "this sweep has no trained SAE; for comparison"
        words += (
            f", the best latent of the control SAEs ({control[CONTROL]}) is "
            f"{_held_out(control, group)} at {cell_words(control, keys)}, which is not a finding"
        )
    return f"{group}: {words}{_n_above_chance(done[~is_control], group)}."


def _n_above_chance(cells: pd.DataFrame, group: str) -> str:
    """How many SAEs have a best latent above chance on the test split, after Holm; cells with the
    same contrast are one test."""
    names = [f"contrast/best_{n}_{group}_test" for n in ("p_value", "auroc")]
    if not set(names) <= set(cells):
        return ""
    cells = contrasts(cells)
    has_other_data = any(k.split(".")[0] not in ("model", "sae") for k in line_keys(cells))
    what = "contrasts" if has_other_data else "SAEs"
    p_values, aurocs = (cells[n].to_numpy(dtype=float, na_value=np.nan) for n in names)
    tested = holm(p_values)
    n = int((~np.isnan(tested)).sum())
    if n < 2:
        return ""
    above = int(((tested <= ALPHA) & (aurocs > 0.5)).sum())
    return f"; the best latent is above chance in {above} of {n} {what} (Holm over {what})"


def _best_cell(cells: pd.DataFrame, group: str) -> pd.Series | None:
    """The cell with the highest AUROC on the train split, ties by the separation.

    Choosing on the train split keeps the reported test value unbiased.
    """
    key = f"contrast/best_auroc_{group}"
    if f"{key}_test" not in cells or not cells[f"{key}_test"].notna().any():
        return None
    order = [key, f"contrast/best_separation_{group}"]
    scores = cells.reindex(columns=order).astype(float).fillna(-1)
    return cells.loc[scores.sort_values(order, ascending=False, kind="stable").index[0]]


def _held_out(cell: pd.Series, group: str) -> str:
    key = f"contrast/best_auroc_{group}"
    latent, auroc = int(cell[f"contrast/best_latent_{group}"]), cell[f"{key}_test"]
    low, high = (cell.get(f"{key}_ci_{end}_test") for end in ("low", "high"))
    p_value = cell.get(f"contrast/best_p_value_{group}_test")
    known = None if p_value is None or pd.isna(p_value) else float(p_value)
    at_chance = at_chance_words(float(auroc), known)
    return f"{latent} with held-out AUROC {auroc:.3f}{interval_words(low, high)}{at_chance}"


def _effect_columns(effects: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """(head, values by cell): each outcome under the intervention, the range of its controls, and
    its p-value."""
    columns = []
    shown = shown_effects(with_holm(effects))
    for _, rows in by_effect(shown):
        rows, label = rows.set_index("cell"), effect_label(rows)
        lowest, highest = rows["controls_min"], rows["controls_max"]
        spans = [
            f"{a:.2f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{b:.2f}"
            for a, b in zip(lowest, highest, strict=True)
        ]
        columns.append((label, rows["value"]))
        columns.append(("its controls", pd.Series(spans, rows.index).where(lowest.notna(), None)))
        columns.append(("its p after Holm", rows["p_holm"]))
    return columns


def _rows(
    folder: Path,
    table: pd.DataFrame,
    objective: str | None,
    effects: list[tuple[str, pd.Series]],
) -> tuple[list[str], list[dict[str, Any]]]:
    """Head and rows of the table of cells: overrides, status, the numbers per direction, and the
    effects."""
    keys = swept(table) or [k for k in ("layer", "width") if k in table]
    columns = {objective: f"objective: {objective}"} if objective else {}
    if "train/n_steps" in table:
        columns |= _TRAINED
    for group in groups_of(table):
        columns[f"contrast/best_latent_{group}"] = f"{group} latent"
        columns[f"contrast/best_auroc_{group}_test"] = f"{group} AUROC"
        columns[f"contrast/best_separation_{group}_test"] = f"{group} separation"
    columns |= {SURFACE: "surface AUROC"} | probe_columns(table) | _COLUMNS
    columns = {name: label for name, label in columns.items() if name in table}
    rows = []
    for record in table.to_dict("records"):
        values = [record[k] for k in keys]
        values += [by_cell.get(record["cell"]) for _, by_cell in effects]
        values += [record[k] for k in columns]
        page = None
        if record["status"] == "finished" and record["folder"]:
            pages = [f"{record['folder']}/{name}" for name in PAGES]
            page = next((p for p in pages if (folder / p).is_file()), None)
        rows.append(
            {
                "cell": int(record["cell"]),
                "link": page,
                "status": f"{record['status']}{', best' if record.get(BEST) else ''}",
                "values": [None if pd.isna(v) else v for v in values],
            }
        )
    heads = [*keys, *(head for head, _ in effects), *columns.values()]
    return ["cell", "status", *heads], rows


def _failed(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(overrides, error) of each cell that failed or is damaged."""
    failed = table[table["status"].isin(["failed", "damaged"])]
    keys = swept(table)
    return [
        (", ".join(f"{k}={r[k]}" for k in keys) or f"cell {r['cell']}", str(r["error"]))
        for r in failed.to_dict("records")
    ]
