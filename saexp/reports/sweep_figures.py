"""Figures over the cells of a sweep, and the effects of its interventions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.config import parse_width
from saexp.errors import counted
from saexp.reports import (
    CHANCE_LINE,
    GROUP_COLOURS,
    PALETTE,
    QUIET,
    error_bars,
    interval_words,
    style,
    translucent,
    wrapped,
)
from saexp.reports.effects import capitalized, prompts_of
from saexp.reports.saved_run import SavedRun, cell_words, groups_of, importance, line_keys, swept
from saexp.results import p_value_words
from saexp.stats.significance import ALPHA, holm

_N_LISTED = 6
"""Cells without train prompts that are listed one by one; more are only counted."""
NUMBERS = ["value", "ci_low", "ci_high", "n", "change", "controls_min", "controls_max"]
NUMBERS += ["p_controls", "p_floor", "gap_train"]
_EFFECT = ["outcome", "intervention", "direction", "prompts", "coefficient", "chosen", *NUMBERS]
"""Columns of an effect; the others of the table say which cell it is of."""
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
        about["intervention"] = (run.config.get("intervention") or {}).get("name")
        rows += [about | row for row in _effects_of_cell(summary, controls)]
    return pd.DataFrame(rows, columns=[*keys, *_EFFECT]).drop_duplicates(ignore_index=True)


def _effects_of_cell(summary: pd.DataFrame, controls: pd.DataFrame | None) -> list[dict[str, Any]]:
    suffix = "_p_controls"
    outcomes = [str(c).removesuffix(suffix) for c in summary if str(c).endswith(suffix)]
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
        lowest, highest = of_controls.min(), of_controls.max()
        changes = summary.assign(size=summary[f"{outcome}_change"].abs())
        control_sizes = changes[is_control].groupby(by)["size"].max()
        sizes = dict(zip(of_train, train[f"{outcome}_change"].abs(), strict=True))
        for row in main[main["split"] == "test"].to_dict("records"):
            key = (row["group"], row["condition"], row["coefficient"])
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
                    "controls_min": lowest.get(("test", *key), np.nan),
                    "controls_max": highest.get(("test", *key), np.nan),
                    "p_controls": row[f"{outcome}_p_controls"],
                    "p_floor": row[f"{outcome}_p_controls_floor"],
                    "gap_train": sizes.get(key, np.nan) - control_sizes.get(("train", *key), 0.0),
                }
            )
    return rows


def effect_findings(effects: pd.DataFrame, *, is_brief: bool = False) -> list[str]:
    """A sentence per outcome, direction and group of prompts, on the cells at the coefficient that
    each chose. Holm's adjustment is over all tests of these sentences; brief sentences leave out
    the controls and p-values."""
    chosen = effects[effects["chosen"].astype(bool) & effects["value"].notna()]
    chosen = chosen.assign(p_holm=holm(chosen["p_controls"].to_numpy(dtype=float)))
    n_tests = int(chosen["p_controls"].notna().sum())
    sentence = _brief_sentence if is_brief else _sentence
    return [
        f"{_effect_title(cells)}: {sentence(outcome, cells.reset_index(drop=True), n_tests)}."
        for (outcome, _, _), cells in by_effect(chosen)
    ]


def by_effect(effects: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """((outcome, direction, group of prompts), rows), in the order of the table."""
    parts = effects.groupby(["outcome", "direction", "prompts"], sort=False)
    return [((str(o), str(d), str(g)), part) for (o, d, g), part in parts]  # pyright: ignore[reportGeneralTypeIssues]


def _effect_title(rows: pd.DataFrame) -> str:
    """What was done: "Adding 'unknown' latents to known prompts"."""
    names, direction, group = rows["intervention"].unique(), *rows[["direction", "prompts"]].iloc[0]
    action = _ACTIONS.get(str(names[0]) if len(names) == 1 else "", "changing '{}' latents on {}")
    if direction in ("latent", "latents"):
        action = action.replace("'{}' latents", "the {}")
        direction = "latents"
    return capitalized(action.format(direction, prompts_of(group)))


def _sentence(outcome: str, cells: pd.DataFrame, n_tests: int) -> str:
    """The test values of the cell with the largest effect on train prompts, beyond its controls."""
    words = outcome.replace("_", " ")
    about = [str(c) for c in cells if c not in _EFFECT and c != "p_holm"]
    varied = [c for c in about if cells[c].astype(str).nunique() > 1]
    counts = _counts(cells, n_tests)
    if cells["gap_train"].notna().any():
        best = cells.iloc[int(np.nanargmax(cells["gap_train"]))]
        how = " (chosen on train prompts)" if len(cells) > 1 else ""
        return (
            f"{words} {_change(best)} at {_where(best, varied)}{how}{_tested(best, n_tests)}"
            f"{counts}"
        )
    if len(cells) > _N_LISTED:
        return (
            f"{words} was measured in {len(cells)} cells; none is singled out, as there are no "
            f"train prompts to choose by{counts}"
        )
    each = [
        f"{_change(c)} at {_where(c, varied)}{_tested(c, n_tests)}" for _, c in cells.iterrows()
    ]
    return f"{words} {'; '.join(each)}{counts}"


def _brief_sentence(outcome: str, cells: pd.DataFrame, n_tests: int) -> str:
    """As `_sentence`, with the values and the number of significant cells alone."""
    words = outcome.replace("_", " ")
    counts, _, reason = _counts(cells, n_tests).partition(" (")
    if reason:
        counts = "; there are too few controls for any cell to be significant"
    if cells["gap_train"].notna().any():
        cells = cells.iloc[[int(np.nanargmax(cells["gap_train"]))]]
    elif len(cells) > _N_LISTED:
        return f"{words} was measured in {len(cells)} cells{counts}"
    about = [str(c) for c in cells if c not in _EFFECT and c != "p_holm"]
    varied = [c for c in about if cells[c].astype(str).nunique() > 1] or ["layer"]
    values = []
    for _, cell in cells.iterrows():
        where = ", ".join(f"{key} {cell[key]}" for key in varied)
        change = _change(cell).rpartition(" (n = ")[0]
        values.append(f"{change} at {where}, coefficient {cell['coefficient']:g}")
    return f"{words} {'; '.join(values)}{counts}"


def _where(cell: pd.Series, varied: list[str]) -> str:
    words = cell_words(cell, varied)
    coefficient = f"coefficient {cell['coefficient']:g}"
    return f"{words}, {coefficient}" if words else coefficient


def _change(cell: pd.Series) -> str:
    before = "" if pd.isna(cell["change"]) else f"{cell['value'] - cell['change']:.2f} -> "
    interval = interval_words(cell["ci_low"], cell["ci_high"], 2)
    return f"{before}{cell['value']:.2f}{interval} (n = {cell['n']})"


def _tested(cell: pd.Series, n_tests: int) -> str:
    parts = []
    if not pd.isna(cell["controls_min"]):
        parts.append(f"controls {cell['controls_min']:.2f} to {cell['controls_max']:.2f}")
    if not pd.isna(cell["p_controls"]):
        parts.append(f"rank p {p_value_words(float(cell['p_controls']))}")
        if n_tests > 1:
            parts.append(f"{cell['p_holm']:.2g} after Holm over {n_tests} tests")
    return "".join(f", {part}" for part in parts)


def _counts(cells: pd.DataFrame, n_tests: int) -> str:
    """How many cells differ from their controls, and whether any could."""
    if not cells["p_controls"].notna().any():
        return "; no cell has enough matched controls for a p-value"
    if len(cells) == 1:
        return ""
    n_significant = int((cells["p_holm"] <= ALPHA).sum())
    differ = "differs from its controls" if n_significant == 1 else "differ from their controls"
    words = f"; {n_significant} of {counted(len(cells), 'cell')} {differ}"
    floor = float(cells["p_floor"].min())
    if floor * n_tests > ALPHA:
        words += (
            f" (none can: the smallest p-value of {round(1 / floor) - 1} controls is "
            f"{floor * n_tests:.2g} after Holm; raise intervention.n_controls)"
        )
    return words


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
    more = f" and {len(cells) - _N_LISTED} more" if len(cells) > _N_LISTED else ""
    return "; ".join(cells[:_N_LISTED]) + more


_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_PANELS = {"auroc": "AUROC", "separation": "separation"}


def sweep_figures(table: pd.DataFrame, effects: pd.DataFrame) -> dict[str, go.Figure]:
    """Name -> figure, those with at least two points; `effects` is the cells' `effects_table`.

    `over_layers`, `over_width`, `heat_map` (layer x width) and `over_coefficient`; of trained
    SAEs `pareto`.
    """
    done = table[table["status"] == "finished"]
    if "train/n_steps" in done and done["train/n_steps"].notna().sum() > 1:
        return {"pareto": _pareto(done)}
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
    if effects["coefficient"].nunique() > 1:
        figures["over_coefficient"] = _effects(effects)
    return figures


def _width_size(width: Any) -> tuple[int, str]:
    return parse_width(width) or 0, str(width)


def _pareto(done: pd.DataFrame) -> go.Figure:
    """Explained variance against L0 on held-out texts, a colour per trainer.

    A trace per trainer and layer, its points in order of L0. Up and left is better.
    """
    figure = go.Figure()
    trainers = list(dict.fromkeys(done["sae_trainer"]))
    for index, (name, part) in enumerate(_lines(done, ["sae_trainer", "layer"])):
        ordered = part.sort_values("sparsity/l0")
        colour = PALETTE[trainers.index(ordered["sae_trainer"].iloc[0]) % len(PALETTE)]
        figure.add_trace(
            go.Scatter(
                x=ordered["sparsity/l0"],
                y=ordered["reconstruction/explained_variance"],
                name=name.removeprefix("sae_trainer "),
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"size": 9, "symbol": index % 8},
                customdata=ordered["width"],
                hovertemplate="L0 %{x:.1f}, explained variance %{y:.3f}, width %{customdata}",
            )
        )
    figure.update_xaxes(title="L0 (active latents per position)")
    figure.update_yaxes(title="explained variance (fraction)")
    return style(figure, 460, legend_below=True)


def _lines(table: pd.DataFrame, by: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """(label, rows) per combination of the columns `by`."""
    if not by:
        return [("", table)]
    lines = []
    for key, part in table.groupby(by, sort=False, dropna=False):
        values = key if isinstance(key, tuple) else (key,)
        pairs = zip(by, values, strict=True)
        lines.append((", ".join(f"{n} {v}" for n, v in pairs), part))
    return lines


def _curves(table: pd.DataFrame, x: str, by: list[str]) -> go.Figure:
    """Held-out AUROC and separation of the best latent per direction, with 95 % intervals."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(_PANELS.values()))
    for column, measure in enumerate(_PANELS, start=1):
        for group, colour in zip(groups_of(table), GROUP_COLOURS, strict=False):
            for index, (name, part) in enumerate(_lines(table, by)):
                curve = _curve(part, x, measure, group, f"{group}{', ' if name else ''}{name}")
                curve.line = {"color": colour, "dash": _DASHES[index % len(_DASHES)]}
                curve.showlegend = measure == "auroc"
                figure.add_trace(curve, row=1, col=column)
        figure.update_yaxes(title=f"{_PANELS[measure]} (test)", row=1, col=column)
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
    size = _width_size if x == "width" else None
    ordered = part.dropna(subset=[f"{metric}_test"])
    ordered = ordered.sort_values(x, key=lambda c: c.map(size) if size else c)
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


def _heat_map(table: pd.DataFrame, by: list[str]) -> go.Figure:
    """Held-out AUROC of the best latent by layer and width, a panel per direction and line."""
    panels = [(g, n, part) for n, part in _lines(table, by) for g in groups_of(table)]
    titles = [f"{group}{', ' if name else ''}{name}" for group, name, _ in panels]
    n_columns = len(groups_of(table))
    n_rows = len(panels) // n_columns
    figure = make_subplots(rows=n_rows, cols=n_columns, subplot_titles=titles)
    for index, (group, _, part) in enumerate(panels):
        grid = part.pivot(
            index="width", columns="layer", values=f"contrast/best_auroc_{group}_test"
        )
        grid = grid.loc[sorted(grid.index, key=_width_size)]
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
    titles = [wrapped(_effect_title(panel)) for _, panel in panels]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles)
    by = [n for n in effects.columns if n not in _EFFECT]
    by = [n for n in by if effects[n].astype(str).nunique() > 1]
    # A cell without latents for a direction has no line in that panel.
    order = {name: index for index, (name, _) in enumerate(_lines(effects, by))}
    in_legend: set[str] = set()
    for column, ((outcome, _, _), panel) in enumerate(panels, start=1):
        for name, part in _lines(panel, by):
            line = part.sort_values("coefficient")
            label = name or "selected latents"
            colour = PALETTE[order[name] % len(PALETTE)]
            for trace in _effect(line, label, colour, is_first=label not in in_legend):
                figure.add_trace(trace, row=1, col=column)
            in_legend.add(label)
        figure.update_yaxes(title=outcome.replace("_", " "), row=1, col=column)
        ends = panel[["value", "ci_low", "ci_high", "controls_min", "controls_max"]]
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
    band = line.dropna(subset=["controls_min", "controls_max"])
    if band.empty:
        return [curve]
    # Coefficient 0 changes nothing, whatever the direction.
    unchanged = line[(line["coefficient"] == 0) & line["controls_min"].isna()]
    unchanged = unchanged.assign(controls_min=unchanged["value"], controls_max=unchanged["value"])
    band = pd.concat([unchanged, band]).sort_values("coefficient")
    controls = go.Scatter(
        x=[*band["coefficient"], *band["coefficient"][::-1]],
        y=[*band["controls_max"], *band["controls_min"][::-1]],
        name=f"{label}: matched controls",
        legendgroup=label,
        showlegend=False,
        mode="lines",
        fill="toself",
        fillcolor=translucent(colour, 0.15),
        line={"width": 0},
        hoverinfo="skip",
    )
    return [controls, curve]


def importance_figure(
    done: pd.DataFrame, objective: str | None = None
) -> tuple[go.Figure | None, list[str]]:
    """(bars of the share of variance that each swept key explains, notes on them).

    Of the `objective`; by default of the held-out AUROC of the best latent per direction, of
    trained SAEs the explained variance, of evaluated ones the CE score.
    """
    quality = "explained_variance" if "train/n_steps" in done else "ce_loss_score"
    of_groups = [f"contrast/best_auroc_{g}_test" for g in groups_of(done)]
    objectives = [objective] if objective else of_groups or [f"reconstruction/{quality}"]
    figure, notes = go.Figure(), []
    n_bars = 0
    for name, colour in zip([o for o in objectives if o in done], PALETTE, strict=False):
        by_key = importance(done, name)
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
        return None, notes
    figure.update_xaxes(
        title="share of the variance over cells", tickformat=".0%", rangemode="tozero"
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(showlegend=True)
    return style(figure, 150 + 26 * n_bars, legend_below=True), notes
