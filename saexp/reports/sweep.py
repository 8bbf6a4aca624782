"""sweep.html and sweep.parquet: what a sweep's cells found, side by side, failed ones included."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saexp.files import SWEEP_FOLDER, write_table
from saexp.reports.html import write_page
from saexp.reports.latent_flow import HEAD, flow_figures, match_rows, read_matches, splits
from saexp.reports.saved import CONTROL, PAGES, STATES, cell_words, cells_table, groups_of, swept
from saexp.reports.sweep_figures import effect_findings, effects_table, sweep_figures
from saexp.results import read_plan
from saexp.stats.power import ALPHA, holm
from saexp.wording import at_chance_words

CAPTIONS = {
    "over_layers": "Best latent per direction at each layer: held-out AUROC and separation with "
    "95 % intervals over entities. The latent is chosen on the train split.",
    "over_width": "The same over the SAE's width.",
    "heat_map": "Held-out AUROC of the best latent per direction.",
    "pareto": "Trained SAEs on held-out texts: explained variance against L0.",
    "over_coefficient": "Outcome when the selected latents are acted on, over the coefficient, "
    "with 95 % intervals over entities; bands span the matched controls.",
    "flow_over_width": "The leading selected latents of each SAE and their nearest in its "
    "neighbours over the width, by decoder cosine (thickness), where it is larger than chance. A "
    "latent with several links to the right is split in the wider SAE. Coloured: selected there.",
    "flow_over_layer": "The same over layers: a latent that goes on keeps its direction.",
}
_SHOWN = {
    "contrast/n_significant": "significant latents",
    "collection/tokens_forwarded": "tokens forwarded",
}
_TRAINED = {
    "sparsity/l0": "L0",
    "reconstruction/explained_variance": "explained variance",
    "sparsity/dead_fraction": "silent latents",
}


def write_sweep(folder: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make both files from what the cells left so far; returns the table and the figures."""
    place = Path(folder)
    table = cells_table(place)
    write_table(place / "sweep.parquet", table, option=SWEEP_FOLDER)
    matches, notes = read_matches(place)
    flows = flow_figures(matches)
    effects = effects_table(place, table[table["status"] == "finished"])
    figures = sweep_figures(table, effects) | flows
    counts = [(s, int((table["status"] == s).sum())) for s in STATES]
    head, rows = _rows(place, table)
    write_page(
        place / "sweep.html",
        "sweep.html",
        figures,
        title=f"Sweep over {', '.join(swept(table)) or 'one cell'}",
        command=read_plan(place).get("command"),
        counts=[(s, n) for s, n in counts if n],
        finding=findings(table, place),
        captions=CAPTIONS,
        head=head,
        rows=rows,
        failed=_failed(table),
        flows=list(flows),
        match_head=HEAD,
        matches=match_rows(matches),
        splits=splits(matches),
        notes=notes,
    )
    return table, figures


def findings(table: pd.DataFrame, folder: str | Path | None = None) -> list[str]:
    """Per direction the best cell and its effects (read from the `folder`); of trained SAEs, the
    range of their quality."""
    done = table[table["status"] == "finished"]
    sentences = []
    if "train/n_steps" in done and len(done):
        explained = done["reconstruction/explained_variance"]
        sentences.append(
            f"{len(done)} SAEs trained: explained variance {explained.min():.3f} to "
            f"{explained.max():.3f}, L0 {done['sparsity/l0'].min():.1f} to "
            f"{done['sparsity/l0'].max():.1f} on held-out texts."
        )
    if "check/begins_with_bos" in done and done["check/begins_with_bos"].nunique() > 1:
        sentences.append(
            "In some cells texts begin with BOS and in others not, as their SAEs were trained "
            "(column check/begins_with_bos of sweep.parquet): compare those that are alike."
        )
    for group in groups_of(done):
        sentences.append(_best_sentence(done, group))
    return sentences + (
        [] if folder is None else effect_findings(effects_table(Path(folder), done))
    )


def _best_sentence(done: pd.DataFrame, group: str) -> str:
    """The best cell of a direction; control SAEs don't compete but stand beside it."""
    is_control = done[CONTROL].notna() if CONTROL in done else pd.Series(False, index=done.index)
    best = _best_cell(done[~is_control], group)
    rival = _best_cell(done[is_control], group)
    if best is None and rival is None:
        return f"{group}: no cell selects a latent."
    named = swept(done)
    words = "no cell with a trained SAE selects a latent" if best is None else ""
    if best is not None:
        words = (
            f"best at {cell_words(best, named)} (chosen on the train split): latent "
            f"{_held_out(best, group)}"
        )
    if rival is not None:
        words += (
            f"; the best of the control SAEs ({rival[CONTROL]}), {cell_words(rival, named)}: "
            f"latent {_held_out(rival, group)}"
        )
    return f"{group}: {words}{_n_above_chance(done[~is_control], group)}."


def _n_above_chance(cells: pd.DataFrame, group: str) -> str:
    """In how many cells the best latent is above chance on the test split, after Holm."""
    names = [f"contrast/best_{n}_{group}_test" for n in ("p_value", "auroc")]
    if not set(names) <= set(cells):
        return ""
    p_values, aurocs = (cells[n].to_numpy(dtype=float, na_value=np.nan) for n in names)
    tested = holm(p_values)
    n = int((~np.isnan(tested)).sum())
    if n < 2:
        return ""
    above = int(((tested <= ALPHA) & (aurocs > 0.5)).sum())
    return f"; the best latent is above chance in {above} of {n} cells (Holm over cells)"


def _best_cell(cells: pd.DataFrame, group: str) -> pd.Series | None:
    """Chosen by the train split's AUROC, so that the number reported is not the luckiest one.

    Of cells that separate the groups as well the one with the largest separation.
    """
    key = f"contrast/best_auroc_{group}"
    if f"{key}_test" not in cells or not cells[f"{key}_test"].notna().any():
        return None
    order = [key, f"contrast/best_separation_{group}"]
    scores = cells.reindex(columns=order).astype(float).fillna(-1)
    return cells.loc[scores.sort_values(order, ascending=False, kind="stable").index[0]]


def _held_out(cell: pd.Series, group: str) -> str:
    key = f"contrast/best_auroc_{group}"
    latent = int(cell[f"contrast/best_latent_{group}"])
    words = f"{latent}, held-out AUROC {cell[f'{key}_test']:.3f}{_interval(cell, key)}"
    p_value = cell.get(f"contrast/best_p_value_{group}_test")
    known = None if p_value is None or pd.isna(p_value) else float(p_value)
    return words + at_chance_words(float(cell[f"{key}_test"]), known)


def _interval(row: pd.Series, key: str) -> str:
    low, high = row.get(f"{key}_ci_low_test"), row.get(f"{key}_ci_high_test")
    return "" if pd.isna(low) or pd.isna(high) else f" [{low:.3f}, {high:.3f}]"


def _rows(place: Path, table: pd.DataFrame) -> tuple[list[str], list[dict[str, Any]]]:
    """The table shown: what was swept, the status, and the leading numbers per direction."""
    keys = swept(table) or [k for k in ("layer", "width") if k in table]
    columns = dict(_SHOWN)
    if "train/n_steps" in table:
        columns |= _TRAINED
    for group in groups_of(table):
        columns[f"contrast/best_latent_{group}"] = f"{group} latent"
        columns[f"contrast/best_auroc_{group}_test"] = f"{group} AUROC"
        columns[f"contrast/best_separation_{group}_test"] = f"{group} separation"
    columns = {name: label for name, label in columns.items() if name in table}
    rows = []
    for record in table.to_dict("records"):
        values = [record[k] for k in [*keys, *columns]]
        page = None
        if record["status"] == "finished" and record["folder"]:
            pages = [f"{record['folder']}/{name}" for name in PAGES]
            page = next((p for p in pages if (place / p).is_file()), None)
        rows.append(
            {
                "cell": int(record["cell"]),
                "link": page,
                "status": record["status"],
                "values": [None if pd.isna(v) else v for v in values],
            }
        )
    return ["cell", "status", *keys, *columns.values()], rows


def _failed(table: pd.DataFrame) -> list[tuple[str, str]]:
    """What differs from other cells, and the error, of each cell that failed or is damaged."""
    failed = table[table["status"].isin(["failed", "damaged"])]
    named = swept(table)
    return [
        (", ".join(f"{k}={r[k]}" for k in named) or f"cell {r['cell']}", str(r["error"]))
        for r in failed.to_dict("records")
    ]
