"""sweep.html: the table of a sweep, its curves, and latents matched between its SAEs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pyarrow import ArrowException

from saexp.files import SWEEP_FOLDER, write_table
from saexp.reports.html import write_page
from saexp.reports.saved import CONTROL, PAGES, STATES, cell_words, cells_table, groups_of, swept
from saexp.reports.style import GROUP_COLOURS, QUIET, see_through, style
from saexp.reports.sweep_figures import effect_findings, effects_table, sweep_figures
from saexp.results import read_plan
from saexp.stats.power import ALPHA, holm
from saexp.wording import at_chance_words, brief

MATCHES, MATCHES_NOTES = "latent_matches.parquet", "latent_matches_notes.json"
"""Files in a sweep's folder: the table that `task=analyze` cells are matched into, and notes."""
N_PANELS, N_ROWS = 6, 200
HEAD = [
    *["from layer", "from width", "latent", "for", "to layer", "to width", "nearest latent"],
    *["selected there for", "cosine", "by chance", "fires most together with", "phi", "Jaccard"],
    "shared rows",
]


class Node(NamedTuple):
    """A latent of one SAE."""

    cell: int
    latent: int


def read_matches(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table (empty where no latents were matched) and what a reader must know."""
    notes: list[str] = []
    table = pd.DataFrame()
    try:
        if (folder / MATCHES).is_file():
            table = pd.read_parquet(folder / MATCHES)
    except (OSError, ValueError, ArrowException) as error:
        notes.append(
            f"{MATCHES} is damaged, so that no matches are shown: {brief(str(error), 200)}"
        )
    try:
        if (folder / MATCHES_NOTES).is_file():
            notes += map(str, json.loads((folder / MATCHES_NOTES).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        notes.append(f"{MATCHES_NOTES} is damaged")
    return table, notes


def flow_figures(matches: pd.DataFrame) -> dict[str, go.Figure]:
    """`flow_over_width` and `flow_over_layer`: those that the sweep has at least two SAEs for."""
    figures: dict[str, go.Figure] = {}
    for axis in ("width", "layer"):
        chains = _chains(matches, axis)[:N_PANELS]
        if chains:
            figures[f"flow_over_{axis}"] = _flow(matches, axis, chains)
    return figures


def _saes(matches: pd.DataFrame) -> pd.DataFrame:
    """A row per SAE that stands at either end."""
    names = ["cell", "model", "sae", "layer", "width", "d_sae"]
    ends = [
        matches[[f"{end}_{n}" for n in names]].set_axis(names, axis=1) for end in ("from", "to")
    ]
    return pd.concat(ends).drop_duplicates("cell")


def _chains(matches: pd.DataFrame, axis: str) -> list[pd.DataFrame]:
    """SAEs that differ in nothing else, in order along the axis; two or more each."""
    if matches.empty:
        return []
    fixed, by = ("layer", "d_sae") if axis == "width" else ("width", "layer")
    groups = _saes(matches).groupby(["model", "sae", fixed], sort=True)
    ordered = [part.sort_values(by).drop_duplicates(by) for _, part in groups]
    return [part for part in ordered if len(part) > 1]


def adjacent(matches: pd.DataFrame) -> pd.DataFrame:
    """Rows between neighbours on either axis, both ways."""
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
    """Pairs of neighbours' latents, either of which is the other's nearest beyond chance."""
    found: dict[tuple[Node, Node], pd.Series] = {}
    beyond = matches[matches["cosine"] > matches["cosine_by_chance"]]
    for _, row in beyond.iterrows():
        own = Node(int(row["from_cell"]), int(row["latent"]))
        other = Node(int(row["to_cell"]), int(row["nearest"]))
        if (own.cell, other.cell) == (left, right):
            found[own, other] = row
        elif (own.cell, other.cell) == (right, left):
            found.setdefault((other, own), row)
    return found


def _flow(matches: pd.DataFrame, axis: str, chains: list[pd.DataFrame]) -> go.Figure:
    """A panel per chain, a column per SAE; links are as thick as their cosine."""
    figure = go.Figure()
    speaks = _directions(matches)
    groups = list(dict.fromkeys(matches["direction"]))
    colours: dict[str, str] = dict(zip(groups, GROUP_COLOURS, strict=False))
    tall = 0
    for number, chain in enumerate(chains):
        top, bottom = 1 - number / len(chains), 1 - (number + 1) / len(chains)
        gap = 0.06 if len(chains) > 1 else 0.04
        trace, most = _panel(matches, chain, speaks, colours)
        trace.domain = {"x": [0, 1], "y": [bottom, top - gap]}
        figure.add_trace(trace)
        tall = max(tall, most)
        fixed = "layer" if axis == "width" else "width"
        for place, sae in enumerate(chain.to_dict("records")):
            figure.add_annotation(
                x=place / (len(chain) - 1),
                y=top - gap + 0.005,
                xref="paper",
                yref="paper",
                text=f"{axis} {sae[axis]} ({fixed} {sae[fixed]})",
                showarrow=False,
                yanchor="bottom",
                xanchor=("left", "center", "right")[(place > 0) + (place == len(chain) - 1)],
            )
    return style(figure, 60 + len(chains) * max(220, 24 * tall))


def _directions(matches: pd.DataFrame) -> dict[Node, str]:
    """Leading latents -> the group they are selected for."""
    rows = zip(matches["from_cell"], matches["latent"], matches["direction"], strict=True)
    return {Node(int(cell), int(latent)): str(group) for cell, latent, group in rows}


def _panel(
    matches: pd.DataFrame, chain: pd.DataFrame, speaks: dict[Node, str], colours: dict[str, str]
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
        ordered = sorted(columns[cell], key=lambda n: (mean[n], speaks.get(n, "~"), n.latent))
        columns[cell] = ordered
        height |= {n: (i + 0.5) / len(ordered) for i, n in enumerate(ordered)}
    nodes = [n for cell in cells for n in columns[cell]]
    index = {n: i for i, n in enumerate(nodes)}
    trace = go.Sankey(
        arrangement="fixed",
        node={
            "label": [str(n.latent) for n in nodes],
            "color": [colours.get(speaks.get(n, ""), QUIET) for n in nodes],
            # Plotly takes a place of 0 for none.
            "x": [_within(cells.index(n.cell) / (len(cells) - 1)) for n in nodes],
            "y": [_within(height[n]) for n in nodes],
            "pad": 12,
            "thickness": 14,
            "customdata": [f"selected for {speaks[n]}" if n in speaks else "" for n in nodes],
            "hovertemplate": "latent %{label} %{customdata}<extra></extra>",
        },
        link={
            "source": [index[a] for a, _ in links],
            "target": [index[b] for _, b in links],
            "value": [float(row["cosine"]) for row in links.values()],
            "color": [
                see_through(colours.get(speaks.get(a, speaks.get(b, "")), QUIET), 0.35)
                for a, b in links
            ],
            "customdata": [float(row["cosine"]) for row in links.values()],
            "hovertemplate": "%{source.label} and %{target.label}: cosine %{customdata:.3f}"
            "<extra></extra>",
        },
    )
    return trace, max((len(c) for c in columns.values()), default=0)


def _within(share: float) -> float:
    return min(max(share, 0.001), 0.999)


def match_rows(matches: pd.DataFrame) -> list[list[Any]]:
    """Cells of the page's table, under HEAD: neighbours only, the most alike first."""
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
    """A sentence per latent that is nearest, beyond chance, to several of the next wider SAE."""
    told = []
    for chain in _chains(matches, "width"):
        cells = chain["cell"].tolist()
        for narrow, wide in zip(cells[:-1], cells[1:], strict=True):
            mine = matches[(matches["from_cell"] == wide) & (matches["to_cell"] == narrow)]
            mine = mine[mine["cosine"] > mine["cosine_by_chance"]]
            for nearest, part in mine.groupby("nearest"):
                if len(part) < 2:
                    continue
                row = part.iloc[0]
                each = ", ".join(
                    f"{r['latent']} ({r['cosine']:.2f})" for r in part.to_dict("records")
                )
                told.append(
                    f"Layer {row['to_layer']}: latent {nearest} of width {row['to_width']} is the "
                    f"nearest of {len(part)} leading latents of width {row['from_width']}: {each}."
                )
    return told


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
