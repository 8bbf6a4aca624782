"""Figures over the cells of a sweep, and of latents matched between its SAEs."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports import (
    CHANCE_LINE,
    GROUP_COLOURS,
    PALETTE,
    QUIET,
    error_bars,
    style,
    translucent,
    wrapped,
)
from saexp.reports.contrast import chains
from saexp.reports.effects import capitalized, prompts_of
from saexp.reports.findings import SURFACE
from saexp.reports.saved_run import EFFECT, groups_of, in_order, line_keys, lines, swept
from saexp.reports.training import trained_cells
from saexp.results import outcome_words
from saexp.stats.significance import main_effect_shares

N_PANELS = 6
"""Chains of SAEs that a figure of matched latents shows."""
_ACTIONS = {
    "steer": "adding '{}' latents to {}",
    "clamp": "moving latents towards '{}' on {}",
    "scale": "scaling '{}' latents on {}",
    "ablate": "ablating '{}' latents on {}",
    "project_out": "projecting out '{}' latents on {}",
    "splice": "splicing in the reconstruction on {1}",
    "patch": "patching from {} prompts into {}",
    "orthogonalize": "orthogonalizing the weights against '{}' latents on {}",
}


def by_effect(effects: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """((outcome, direction, group of prompts), rows), in the order of the table."""
    parts = effects.groupby(["outcome", "direction", "prompts"], sort=False)
    return [((str(o), str(d), str(g)), part) for (o, d, g), part in parts]  # pyright: ignore[reportGeneralTypeIssues]


def shown_effects(effects: pd.DataFrame) -> pd.DataFrame:
    """Of each of a cell's effects the row at the chosen coefficient, else at the only one."""
    rows = effects[~effects["is_baseline"].astype(bool)]
    rows = rows.sort_values("chosen", ascending=False, kind="stable")
    return rows.drop_duplicates(["cell", "outcome", "direction", "prompts"]).sort_index()


def effect_label(rows: pd.DataFrame) -> str:
    """ "refusal, adding 'unknown' latents to known prompts"."""
    title = effect_title(rows)
    return f"{outcome_words(str(rows['outcome'].iloc[0]))}, {title[:1].lower()}{title[1:]}"


def effect_title(rows: pd.DataFrame) -> str:
    """What was done: "Adding 'unknown' latents to known prompts"."""
    names, direction, group = rows["intervention"].unique(), *rows[["direction", "prompts"]].iloc[0]
    action = _ACTIONS.get(str(names[0]) if len(names) == 1 else "", "changing '{}' latents on {}")
    if direction in ("latent", "latents"):
        action = action.replace("'{}' latents", "the {}")
        direction = "latents"
    return capitalized(action.format(direction, prompts_of(group)))


_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_PANELS = {"auroc": "AUROC", "separation": "separation"}


def sweep_figures(table: pd.DataFrame, effects: pd.DataFrame) -> dict[str, go.Figure]:
    """Name -> figure, those with at least two points; `effects` is the cells' `effects_table`.

    `over_layers`, `over_width`, `heat_map` (layer x width) and `over_coefficient`; of trained
    SAEs `pareto`.
    """
    done = table[table["status"] == "finished"]
    if "train/n_steps" in done and done["train/n_steps"].notna().sum() > 1:
        return {"pareto": trained_cells(done)}
    if done.empty or not groups_of(done):
        return {}
    figures: dict[str, go.Figure] = {}
    lines = line_keys(done)
    first = done.drop_duplicates(["layer", "width", *lines])
    n_layers, n_widths = first["layer"].nunique(), first["width"].nunique()
    if n_layers > 1:
        figures["over_layers"] = _curves(first, "layer", lines + ["width"] * (n_widths > 1))
    if n_widths > 1:
        figures["over_width"] = _curves(first, "width", lines + ["layer"] * (n_layers > 1))
    if n_layers > 1 and n_widths > 1:
        figures["heat_map"] = _heat_map(first, lines)
    measured = effects[~effects["is_baseline"].astype(bool)]
    if measured["coefficient"].nunique() > 1:
        figures["over_coefficient"] = _effects(effects)
    return figures


def _curves(table: pd.DataFrame, x: str, by: list[str]) -> go.Figure:
    """Held-out AUROC and separation of the best latent per direction, with 95 % intervals."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(_PANELS.values()))
    for column, measure in enumerate(_PANELS, start=1):
        for group, colour in zip(groups_of(table), GROUP_COLOURS, strict=False):
            for index, (name, part) in enumerate(lines(table, by)):
                curve = _curve(part, x, measure, group, f"{group}{', ' if name else ''}{name}")
                curve.line = {"color": colour, "dash": _DASHES[index % len(_DASHES)]}
                curve.showlegend = measure == "auroc"
                figure.add_trace(curve, row=1, col=column)
        figure.update_yaxes(title=f"{_PANELS[measure]} (test)", row=1, col=column)
    for curve in _surface_curves(table, x, by):
        figure.add_trace(curve, row=1, col=1)
    title = "SAE width (latents)" if x == "width" else x
    figure.update_xaxes(title=title, type="category" if x == "width" else "linear")
    if x == "layer":
        figure.update_xaxes(dtick=max(1, table["layer"].nunique() // 12))
    chance = {"type": "line", "x0": 0, "x1": 1, "xref": "x domain", "y0": 0.5, "y1": 0.5}
    figure.add_shape(**chance, yref="y", line=CHANCE_LINE)
    figure.update_yaxes(range=[0.4, 1.02], row=1, col=1)
    figure.update_yaxes(range=[-0.05, 1.02], row=1, col=2)
    return style(figure, 430, legend_below=True)


def _curve(part: pd.DataFrame, x: str, measure: str, group: str, label: str) -> go.Scatter:
    """Test values of a direction's best latent with their intervals, over a column of the cells."""
    metric = f"contrast/best_{measure}_{group}"
    ordered = part.dropna(subset=[f"{metric}_test"])
    ordered = ordered.sort_values(x, key=lambda column: column.map(in_order))
    values = ordered[f"{metric}_test"]
    limits = (ordered[f"{metric}_ci_{end}_test"] for end in ("low", "high"))
    return go.Scatter(
        x=ordered[x],
        y=values,
        name=label,
        legendgroup=label,
        mode="lines+markers",
        error_y=error_bars(values, *limits),
        customdata=ordered[f"contrast/best_latent_{group}"].astype(object),
        hovertemplate=f"{label}<br>{x} %{{x}}: %{{y:.3f}} (latent %{{customdata}})<extra></extra>",
    )


def _surface_curves(table: pd.DataFrame, x: str, by: list[str]) -> list[go.Scatter]:
    """The AUROC of the text alone, once for lines of cells with the same values."""
    if SURFACE not in table:
        return []
    curves: dict[tuple[Any, ...], go.Scatter] = {}
    for name, part in lines(table.dropna(subset=[SURFACE]), by):
        ordered = part.sort_values(x, key=lambda column: column.map(in_order))
        values = ordered[SURFACE].astype(float)
        limits = (ordered.get(f"{SURFACE}_ci_{e}", values * np.nan) for e in ("low", "high"))
        curve = go.Scatter(
            x=ordered[x],
            y=values,
            name="surface baseline (the text alone)" + (f", {name}" if curves else ""),
            mode="lines+markers",
            line={"color": QUIET, "dash": _DASHES[len(curves) % len(_DASHES)]},
            error_y=error_bars(values, *limits),
        )
        curves.setdefault((*ordered[x], *values), curve)
    return list(curves.values())


def _heat_map(table: pd.DataFrame, by: list[str]) -> go.Figure:
    """Held-out AUROC of the best latent by layer and width, a panel per direction and line."""
    panels = [(g, n, part) for n, part in lines(table, by) for g in groups_of(table)]
    titles = [f"{group}{', ' if name else ''}{name}" for group, name, _ in panels]
    n_columns = len(groups_of(table))
    n_rows = len(panels) // n_columns
    figure = make_subplots(rows=n_rows, cols=n_columns, subplot_titles=titles)
    for index, (group, _, part) in enumerate(panels):
        grid = part.pivot(
            index="width", columns="layer", values=f"contrast/best_auroc_{group}_test"
        )
        grid = grid.loc[sorted(grid.index, key=in_order)]
        figure.add_trace(
            go.Heatmap(
                x=[str(v) for v in grid.columns],
                y=[str(v) for v in grid.index],
                z=grid.to_numpy(dtype=float),
                zmin=0.5,
                zmax=1,
                colorscale="Viridis",
                texttemplate="%{z:.2f}",
                showscale=index == 0,
                colorbar={"title": "AUROC"},
            ),
            row=index // n_columns + 1,
            col=index % n_columns + 1,
        )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="SAE width (latents)", type="category")
    return style(figure, n_rows * (160 + 60 * max(2, table["width"].nunique())))


def _effects(effects: pd.DataFrame) -> go.Figure:
    """Outcome against coefficient, a line per cell and the range of its controls as a band."""
    panels = by_effect(effects)
    titles = [wrapped(effect_title(panel)) for _, panel in panels]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles)
    by = [str(n) for n in effects if n not in EFFECT or n == "intervention"]
    by = [n for n in by if effects[n].astype(str).nunique() > 1]
    # A cell without latents for a direction has no line in that panel.
    order = {name: index for index, (name, _) in enumerate(lines(effects, by))}
    in_legend: set[str] = set()
    for column, ((outcome, _, _), panel) in enumerate(panels, start=1):
        for name, part in lines(panel, by):
            line = part.sort_values("coefficient")
            label = name or "selected latents"
            colour = PALETTE[order[name] % len(PALETTE)]
            for trace in _effect(line, label, colour, is_first=label not in in_legend):
                figure.add_trace(trace, row=1, col=column)
            in_legend.add(label)
        figure.update_yaxes(title=outcome.replace("_", " "), row=1, col=column)
        ends = panel[["value", "ci_low", "ci_high", "band_min", "band_max"]]
        if ends.min().min() >= 0 and ends.max().max() <= 1:
            figure.update_yaxes(range=[-0.03, 1.03], row=1, col=column)
    figure.update_xaxes(title="coefficient")
    return style(figure, 430, legend_below=True)


def _effect(line: pd.DataFrame, label: str, colour: str, *, is_first: bool) -> list[go.Scatter]:
    curve = go.Scatter(
        x=line["coefficient"],
        y=line["value"],
        name=label,
        legendgroup=label,
        showlegend=is_first,
        mode="lines+markers",
        line={"color": colour},
        error_y=error_bars(line["value"], line["ci_low"], line["ci_high"]),
    )
    band = line.dropna(subset=["band_min", "band_max"])
    if band.empty:
        return [curve]
    # Coefficient 0 changes nothing, whatever the direction.
    unchanged = line[(line["coefficient"] == 0) & line["band_min"].isna()]
    unchanged = unchanged.assign(band_min=unchanged["value"], band_max=unchanged["value"])
    band = pd.concat([unchanged, band]).sort_values("coefficient")
    controls = go.Scatter(
        x=[*band["coefficient"], *band["coefficient"][::-1]],
        y=[*band["band_max"], *band["band_min"][::-1]],
        name=f"{label}: matched controls",
        legendgroup=label,
        showlegend=False,
        mode="lines",
        fill="toself",
        fillcolor=translucent(colour, 0.15),
        line={"width": 0},
        hoverinfo="skip",
    )
    is_wider = (line["controls_max"] > line["band_max"]) | (line["controls_min"] < line["band_min"])
    chosen = line[line["chosen"] & is_wider]
    all_controls = go.Scatter(
        x=np.repeat(chosen["coefficient"].to_numpy(), 3),
        # Lines of several points are separated by gaps.
        y=chosen.assign(gap=np.nan)[["controls_min", "controls_max", "gap"]].to_numpy().ravel(),
        name=f"{label}: all controls at the chosen coefficient",
        legendgroup=label,
        showlegend=False,
        mode="lines",
        line={"color": colour, "width": 1.5, "dash": "dot"},
    )
    return [controls, *([all_controls] if len(chosen) else []), curve]


class Node(NamedTuple):
    """A latent of one SAE."""

    cell: int
    latent: int


def flow_figures(matches: pd.DataFrame) -> dict[str, go.Figure]:
    """`flow_over_width` and `flow_over_layer`, those that the sweep has at least two SAEs for."""
    figures: dict[str, go.Figure] = {}
    for axis in ("width", "layer"):
        panels = chains(matches, axis)[:N_PANELS]
        if panels:
            figures[f"flow_over_{axis}"] = _flow(matches, axis, panels)
    return figures


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


def _flow(matches: pd.DataFrame, axis: str, panels: list[pd.DataFrame]) -> go.Figure:
    """A panel per chain, a column per SAE; links are as thick as their cosine."""
    figure = go.Figure()
    directions = _directions(matches)
    groups = sorted(set(matches["direction"]))
    colours: dict[str, str] = dict(zip(groups, GROUP_COLOURS, strict=False))
    n_nodes = 0
    for index, chain in enumerate(panels):
        top, bottom = 1 - index / len(panels), 1 - (index + 1) / len(panels)
        gap = 0.06 if len(panels) > 1 else 0.04
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
    return style(figure, 60 + len(panels) * max(220, 24 * n_nodes))


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


class Importance(NamedTuple):
    """How much of the variance of an objective over the cells each swept key explains."""

    shares: dict[str, float]
    """Key, or keys that vary together joined by " + " -> share; empty where there is none."""
    is_complete: bool = True
    """Whether every combination of values has equally many cells, so that shares add up to 1 with
    the interactions."""
    note: str | None = None
    """Why there are no shares, or what is approximate about them."""


def importance(done: pd.DataFrame, objective: str, by_cell: pd.Series | None = None) -> Importance:
    """The shares of `main_effect_shares` for each key with several values over the finished cells.

    The objective is a metric, or has its values `by_cell`. Without a note empty where fewer than
    two keys vary: the only key explains all.
    """
    values = done[objective] if by_cell is None else done["cell"].map(by_cell)
    cells = done[values.notna()]
    levels: dict[str, np.ndarray] = {}
    for key in swept(cells):
        codes = pd.factorize(cells[key].map(str))[0]
        same = next((k for k, other in levels.items() if np.array_equal(other, codes)), None)
        # Keys that always change together have one effect.
        label = key if same is None else f"{same} + {key}"
        levels.pop(same or "", None)
        levels[label] = codes
    if len(levels) < 2:
        return Importance({})
    names = " and ".join(levels)
    shares = main_effect_shares(list(levels.values()), values.dropna().to_numpy(dtype=float))
    if np.isnan(shares).any():
        return Importance(
            {},
            note=f"The importance of {names} is not shown: {objective} is the same in every cell.",
        )
    counts = pd.DataFrame(levels).value_counts()
    n_possible = int(np.prod([codes.max() + 1 for codes in levels.values()]))
    have = f"{len(counts)} of {n_possible} combinations of their values have a value of {objective}"
    if 2 * len(counts) <= n_possible:
        return Importance({}, note=f"The importance of {names} is not shown: only {have}.")
    by_key = dict(zip(levels, shares, strict=True))
    if len(counts) == n_possible and counts.nunique() == 1:
        return Importance(by_key)
    if len(counts) == n_possible:
        have = f"combinations of their values have {counts.min()} to {counts.max()} cells"
    note = f"The importance of {names} is approximate, as the shares of keys overlap: {have}."
    return Importance(by_key, is_complete=False, note=note)


def importance_figure(
    done: pd.DataFrame, objective: str | None = None, effects: pd.DataFrame | None = None
) -> tuple[go.Figure | None, list[str], str]:
    """(bars of the share of variance that each swept key explains, notes, what it is a share of).

    Of the `objective`; without one, where the coefficient or the intervention varies, of the value
    of the first outcome in each of the cells' `effects`; else of the held-out AUROC of the best
    latent per direction, of trained SAEs the explained variance, of evaluated ones the CE score.
    """
    quality = "explained_variance" if "train/n_steps" in done else "ce_loss_score"
    of_groups = [f"contrast/best_auroc_{g}_test" for g in groups_of(done)]
    varies = any(k.split(".")[0] in ("coefficient", "intervention") for k in swept(done))
    values: dict[str, pd.Series] = {}
    if objective:
        objectives, words = [objective], f"the sweep's objective, {objective}"
    elif varies and effects is not None and len(effects):
        shown = shown_effects(effects)
        parts = by_effect(shown[shown["outcome"] == shown["outcome"].iloc[0]])
        values = {effect_label(rows): rows.set_index("cell")["value"] for _, rows in parts}
        objectives, words = list(values), "the outcome under the intervention"
    elif of_groups:
        objectives, words = of_groups, "the held-out AUROC of the best latent per direction"
    else:
        objectives, words = [f"reconstruction/{quality}"], quality.replace("_", " ")
    figure, notes = go.Figure(), []
    n_bars = 0
    for name, colour in zip(
        [o for o in objectives if o in done or o in values], PALETTE, strict=False
    ):
        by_key = importance(done, name, values.get(name))
        notes += [by_key.note] if by_key.note else []
        if not by_key.shares:
            continue
        shares = by_key.shares
        colours = [colour] * len(shares)
        if by_key.is_complete:
            shares = shares | {"interactions": max(0.0, 1 - sum(shares.values()))}
            colours.append(QUIET if len(objectives) == 1 else translucent(colour, 0.4))
        n_bars += len(shares)
        bars = {"x": list(shares.values()), "y": list(shares), "marker": {"color": colours}}
        hover = "%{y}: %{x:.1%}<extra></extra>"
        figure.add_trace(go.Bar(**bars, orientation="h", name=name, hovertemplate=hover))
    if not n_bars:
        return None, notes, words
    figure.update_xaxes(
        title="share of the variance over cells", tickformat=".0%", rangemode="tozero"
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(showlegend=True)
    return style(figure, 150 + 26 * n_bars, legend_below=True), notes, words
