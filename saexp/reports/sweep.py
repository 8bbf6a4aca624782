"""sweep.html: the findings of a sweep, its cells, and latents matched between its SAEs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pyarrow import ArrowException

from saexp.errors import brief, counted
from saexp.files import SWEEP_FOLDER, write_table
from saexp.reports import (
    GROUP_COLOURS,
    QUIET,
    Finding,
    interval_words,
    style,
    translucent,
    write_page,
)
from saexp.reports.findings import CAPTION, probe_columns, probe_figure, probe_findings
from saexp.reports.saved_run import (
    CONTROL,
    PAGES,
    STATES,
    SavedRun,
    cell_words,
    cells_table,
    groups_of,
    swept,
)
from saexp.reports.sweep_figures import (
    effect_findings,
    effects_table,
    importance_figure,
    missing_words,
    sweep_figures,
)
from saexp.results import at_chance_words, read_plan
from saexp.stats.significance import ALPHA, holm

MATCHES, MATCHES_NOTES = "latent_matches.parquet", "latent_matches_notes.json"
"""Files in a sweep's folder: latents matched between its SAEs, and notes on them."""
N_PANELS, N_ROWS = 6, 200
HEAD = [
    *["from layer", "from width", "latent", "selected for", "to layer", "to width"],
    *["nearest latent", "which is selected for", "cosine", "cosine by chance"],
    *["most often co-active with", "phi", "Jaccard", "shared rows"],
]


class Node(NamedTuple):
    """A latent of one SAE."""

    cell: int
    latent: int


def read_matches(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table (empty if no latents were matched) and notes on it."""
    notes: list[str] = []
    table = pd.DataFrame()
    try:
        if (folder / MATCHES).is_file():
            table = pd.read_parquet(folder / MATCHES)
    except (OSError, ValueError, ArrowException) as error:
        notes.append(
            f"{MATCHES} is damaged and its matches are not shown: {brief(str(error), 200)}"
        )
    try:
        if (folder / MATCHES_NOTES).is_file():
            notes += map(str, json.loads((folder / MATCHES_NOTES).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        notes.append(f"{MATCHES_NOTES} is damaged")
    return table, notes


def flow_figures(matches: pd.DataFrame) -> dict[str, go.Figure]:
    """`flow_over_width` and `flow_over_layer`, those that the sweep has at least two SAEs for."""
    figures: dict[str, go.Figure] = {}
    for axis in ("width", "layer"):
        chains = _chains(matches, axis)[:N_PANELS]
        if chains:
            figures[f"flow_over_{axis}"] = _flow(matches, axis, chains)
    return figures


def _saes(matches: pd.DataFrame) -> pd.DataFrame:
    """A row per SAE."""
    names = ["cell", "model", "sae", "layer", "width", "d_sae"]
    ends = [
        matches[[f"{end}_{n}" for n in names]].set_axis(names, axis=1) for end in ("from", "to")
    ]
    return pd.concat(ends).drop_duplicates("cell")


def _chains(matches: pd.DataFrame, axis: str) -> list[pd.DataFrame]:
    """Series of two or more SAEs that differ only along the axis, in order."""
    if matches.empty:
        return []
    fixed, by = ("layer", "d_sae") if axis == "width" else ("width", "layer")
    groups = _saes(matches).groupby(["model", "sae", fixed], sort=True)
    ordered = [part.sort_values(by).drop_duplicates(by) for _, part in groups]
    return [part for part in ordered if len(part) > 1]


def adjacent(matches: pd.DataFrame) -> pd.DataFrame:
    """Matches between neighbours on either axis, in both directions."""
    pairs: set[tuple[int, int]] = set()
    for axis in ("width", "layer"):
        for chain in _chains(matches, axis):
            cells = chain["cell"].tolist()
            pairs.update(zip(cells[:-1], cells[1:], strict=True))
    if not pairs:
        return matches.head(0)
    ends = zip(matches["from_cell"], matches["to_cell"], strict=True)
    return matches[[(a, b) in pairs or (b, a) in pairs for a, b in ends]]


def _links(matches: pd.DataFrame, left: int, right: int) -> dict[tuple[Node, Node], pd.Series]:
    """Pairs of latents of two SAEs, one of which is nearest to the other, above chance."""
    links: dict[tuple[Node, Node], pd.Series] = {}
    above_chance = matches[matches["cosine"] > matches["cosine_by_chance"]]
    for _, row in above_chance.iterrows():
        source = Node(int(row["from_cell"]), int(row["latent"]))
        target = Node(int(row["to_cell"]), int(row["nearest"]))
        if (source.cell, target.cell) == (left, right):
            links[source, target] = row
        elif (source.cell, target.cell) == (right, left):
            links.setdefault((target, source), row)
    return links


def _flow(matches: pd.DataFrame, axis: str, chains: list[pd.DataFrame]) -> go.Figure:
    """A panel per chain, a column per SAE; links are as thick as their cosine."""
    figure = go.Figure()
    directions = _directions(matches)
    groups = sorted(set(matches["direction"]))
    colours: dict[str, str] = dict(zip(groups, GROUP_COLOURS, strict=False))
    n_nodes = 0
    for index, chain in enumerate(chains):
        top, bottom = 1 - index / len(chains), 1 - (index + 1) / len(chains)
        gap = 0.06 if len(chains) > 1 else 0.04
        trace, n_in_column = _panel(matches, chain, directions, colours)
        trace.domain = {"x": [0, 1], "y": [bottom, top - gap]}
        figure.add_trace(trace)
        n_nodes = max(n_nodes, n_in_column)
        fixed = "layer" if axis == "width" else "width"
        for column, sae in enumerate(chain.to_dict("records")):
            figure.add_annotation(
                x=column / (len(chain) - 1),
                y=top - gap + 0.005,
                xref="paper",
                yref="paper",
                text=f"{axis} {sae[axis]} ({fixed} {sae[fixed]})",
                showarrow=False,
                yanchor="bottom",
                xanchor=("left", "center", "right")[(column > 0) + (column == len(chain) - 1)],
            )
    return style(figure, 60 + len(chains) * max(220, 24 * n_nodes))


def _directions(matches: pd.DataFrame) -> dict[Node, str]:
    """Leading latents -> the group they are selected for."""
    rows = zip(matches["from_cell"], matches["latent"], matches["direction"], strict=True)
    return {Node(int(cell), int(latent)): str(group) for cell, latent, group in rows}


def _panel(
    matches: pd.DataFrame, chain: pd.DataFrame, directions: dict[Node, str], colours: dict[str, str]
) -> tuple[go.Sankey, int]:
    """(a Sankey of one chain, the number of nodes in its fullest column)."""
    cells = [int(c) for c in chain["cell"]]
    links: dict[tuple[Node, Node], pd.Series] = {}
    for left, right in zip(cells[:-1], cells[1:], strict=True):
        links |= _links(matches, left, right)
    columns: dict[int, list[Node]] = {c: [] for c in cells}
    for node in dict.fromkeys(node for pair in links for node in pair):
        columns[node.cell].append(node)
    height: dict[Node, float] = {}
    for cell in cells:
        inward = {n: [height[a] for a, b in links if b == n and a in height] for n in columns[cell]}
        mean = {n: sum(hs) / len(hs) if hs else 0.5 for n, hs in inward.items()}
        ordered = sorted(columns[cell], key=lambda n: (mean[n], directions.get(n, "~"), n.latent))
        columns[cell] = ordered
        height |= {n: (i + 0.5) / len(ordered) for i, n in enumerate(ordered)}
    nodes = [n for cell in cells for n in columns[cell]]
    index = {n: i for i, n in enumerate(nodes)}
    trace = go.Sankey(
        arrangement="fixed",
        node={
            "label": [str(n.latent) for n in nodes],
            "color": [colours.get(directions.get(n, ""), QUIET) for n in nodes],
            # Plotly treats a coordinate of 0 as missing.
            "x": [_inside(cells.index(n.cell) / (len(cells) - 1)) for n in nodes],
            "y": [_inside(height[n]) for n in nodes],
            "pad": 12,
            "thickness": 14,
            "customdata": [
                f"selected for {directions[n]}" if n in directions else "" for n in nodes
            ],
            "hovertemplate": "latent %{label} %{customdata}<extra></extra>",
        },
        link={
            "source": [index[a] for a, _ in links],
            "target": [index[b] for _, b in links],
            "value": [float(row["cosine"]) for row in links.values()],
            "color": [
                translucent(colours.get(directions.get(a, directions.get(b, "")), QUIET), 0.35)
                for a, b in links
            ],
            "customdata": [float(row["cosine"]) for row in links.values()],
            "hovertemplate": "%{source.label} and %{target.label}: cosine %{customdata:.3f}"
            "<extra></extra>",
        },
    )
    return trace, max((len(c) for c in columns.values()), default=0)


def _inside(fraction: float) -> float:
    return min(max(fraction, 0.001), 0.999)


def match_rows(matches: pd.DataFrame) -> list[list[Any]]:
    """Rows of the page's table under HEAD: neighbours only, the most similar first."""
    if matches.empty:
        return []
    columns = ["from_layer", "from_width", "latent", "direction", "to_layer", "to_width"]
    columns += ["nearest", "nearest_direction", "cosine", "cosine_by_chance"]
    columns += ["cofiring", "phi", "jaccard", "n_rows"]
    shown = adjacent(matches).sort_values("cosine", ascending=False, kind="stable").head(N_ROWS)
    rows = shown[columns].astype(object)
    rows["cofiring"] = [None if pd.isna(v) else int(v) for v in rows["cofiring"]]
    return rows.where(rows.notna(), None).to_numpy().tolist()


def splits(matches: pd.DataFrame) -> list[str]:
    """A sentence per latent that is nearest, above chance, to several of the next wider SAE."""
    sentences = []
    for chain in _chains(matches, "width"):
        cells = chain["cell"].tolist()
        for narrow, wide in zip(cells[:-1], cells[1:], strict=True):
            pairs = matches[(matches["from_cell"] == wide) & (matches["to_cell"] == narrow)]
            pairs = pairs[pairs["cosine"] > pairs["cosine_by_chance"]]
            for nearest, part in pairs.groupby("nearest"):
                if len(part) < 2:
                    continue
                row = part.iloc[0]
                each = ", ".join(
                    f"{r['latent']} ({r['cosine']:.2f})" for r in part.to_dict("records")
                )
                sentences.append(
                    f"Layer {row['to_layer']}: latent {nearest} of width {row['to_width']} is the "
                    f"nearest of {len(part)} leading latents of width {row['from_width']}: {each}."
                )
    return sentences


CAPTIONS = {
    "over_layers": "Held-out AUROC (0.5 is chance) and separation of the best latent per direction "
    "at each layer, with 95 % intervals over entities. The latent is chosen on the train split.",
    "over_width": "Held-out AUROC (0.5 is chance) and separation of the best latent per direction "
    "at each SAE width, with 95 % intervals over entities.",
    "heat_map": "Held-out AUROC of the best latent per direction.",
    "pareto": "Trained SAEs on held-out texts: explained variance against L0; up and left is "
    "better.",
    "probes": CAPTION,
    "over_coefficient": "Outcome against the coefficient of the intervention, with 95 % intervals "
    "over entities; bands span the matched controls.",
    "importance": "How much of the variance of a metric over the cells each swept key explains by "
    "itself: the variance of the means per value as a share of the whole (main effects of the "
    "functional ANOVA; Hutter, Hoos and Leyton-Brown 2014). A long bar: the metric changes with "
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
    table = cells_table(path)
    write_table(path / "sweep.parquet", table, option=SWEEP_FOLDER)
    matches, notes = read_matches(path)
    flows = flow_figures(matches)
    effects = effects_table(path, table[table["status"] == "finished"])
    figures = sweep_figures(table, effects)
    probes = probe_figure(table[table["status"] == "finished"])
    if probes is not None:
        figures["probes"] = probes
    chart, reasons = importance_figure(
        table[table["status"] == "finished"], _objective(path, table)
    )
    if chart is not None:
        figures["importance"] = chart
    notes += reasons
    counts = [(s, int((table["status"] == s).sum())) for s in STATES]
    head, rows = _rows(path, table)
    first = _first_screen(table, effects, figures)
    write_page(
        path / "sweep.html",
        "sweep.html",
        figures | flows,
        title=f"Sweep over {', '.join(swept(table)) or 'one cell'}",
        command=read_plan(path).get("command"),
        counts=[(s, n) for s, n in counts if n],
        findings=first,
        sentences=findings(table, path),
        missing=missing_words(table, effects) if figures else [],
        captions=CAPTIONS,
        further=[n for n in figures if not any(n in dict(f.figures) for f in first)],
        head=head,
        rows=rows,
        failed=_failed(table),
        flows=list(flows),
        match_head=HEAD,
        matches=match_rows(matches),
        splits=splits(matches),
        notes=notes,
    )
    return table, figures | flows


def _objective(folder: Path, table: pd.DataFrame) -> str | None:
    """The metric that the cells return, `objective=`; None where the command names none."""
    for name in table.loc[table["status"] == "finished", "folder"].head(1):
        return SavedRun(folder / str(name)).config.get("objective")
    return None


def _first_screen(
    table: pd.DataFrame, effects: pd.DataFrame, figures: dict[str, go.Figure]
) -> list[Finding]:
    """The best cells beside their curves, and the effects of interventions beside theirs."""
    best, effect = findings(table), effect_findings(effects, is_brief=True)
    heroes = [
        (best, ("over_layers", "over_width", "pareto", "probes")),
        (effect, ("over_coefficient",)),
    ]
    return [
        Finding("\n".join(sentences), [(n, CAPTIONS[n]) for n in names if n in figures][:1])
        for sentences, names in heroes
        if sentences
    ]


def findings(table: pd.DataFrame, folder: str | Path | None = None) -> list[str]:
    """Per direction the best cell, then the effects of interventions (read from the `folder`); of
    trained SAEs the range of their quality."""
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
    return sentences + (
        [] if folder is None else effect_findings(effects_table(Path(folder), done))
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
    """The number of cells whose best latent is above chance on the test split, after Holm."""
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


def _rows(folder: Path, table: pd.DataFrame) -> tuple[list[str], list[dict[str, Any]]]:
    """Head and rows of the table of cells: overrides, status, and the numbers per direction."""
    keys = swept(table) or [k for k in ("layer", "width") if k in table]
    columns = dict(_COLUMNS)
    if "train/n_steps" in table:
        columns |= _TRAINED
    for group in groups_of(table):
        columns[f"contrast/best_latent_{group}"] = f"{group} latent"
        columns[f"contrast/best_auroc_{group}_test"] = f"{group} AUROC"
        columns[f"contrast/best_separation_{group}_test"] = f"{group} separation"
    columns |= probe_columns(table)
    columns = {name: label for name, label in columns.items() if name in table}
    rows = []
    for record in table.to_dict("records"):
        values = [record[k] for k in [*keys, *columns]]
        page = None
        if record["status"] == "finished" and record["folder"]:
            pages = [f"{record['folder']}/{name}" for name in PAGES]
            page = next((p for p in pages if (folder / p).is_file()), None)
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
    """(overrides, error) of each cell that failed or is damaged."""
    failed = table[table["status"].isin(["failed", "damaged"])]
    keys = swept(table)
    return [
        (", ".join(f"{k}={r[k]}" for k in keys) or f"cell {r['cell']}", str(r["error"]))
        for r in failed.to_dict("records")
    ]
