"""Curves and maps over the cells of a sweep, and its causal effects."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.config import parse_width
from saexp.reports.figures import GROUP_COLOURS, QUIET, style
from saexp.reports.saved import SavedRun, cell_words, groups_of, line_keys
from saexp.stats.power import ALPHA, holm
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


_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_PANELS = {"auroc": "AUROC", "separation": "separation"}


def sweep_figures(table: pd.DataFrame, effects: pd.DataFrame) -> dict[str, go.Figure]:
    """Name -> figure: those that the cells have at least two points for; `effects` are their
    `effects_table`.

    `over_layers`, `over_width`, `heat_map` (layer x width) and `over_coefficient`; of trained
    SAEs, `pareto`.
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
    """Explained variance over L0 on held-out texts, one colour per variant; up and left is better.

    A trace per variant and layer, its points in order of L0.
    """
    figure = go.Figure()
    variants = list(dict.fromkeys(done["sae_trainer"]))
    for number, (name, part) in enumerate(_lines(done, ["sae_trainer", "layer"])):
        ordered = part.sort_values("sparsity/l0")
        colour = _QUALITATIVE[variants.index(ordered["sae_trainer"].iloc[0]) % len(_QUALITATIVE)]
        figure.add_trace(
            go.Scatter(
                x=ordered["sparsity/l0"],
                y=ordered["reconstruction/explained_variance"],
                name=name.removeprefix("sae_trainer "),
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"size": 9, "symbol": number % 8},
                customdata=ordered["width"],
                hovertemplate="L0 %{x:.1f}, explained variance %{y:.3f}, width %{customdata}",
            )
        )
    figure.update_xaxes(title_text="L0")
    figure.update_yaxes(title_text="explained variance")
    return style(figure, 460, legend_below=True)


def _lines(table: pd.DataFrame, by: list[str]) -> list[tuple[str, pd.DataFrame]]:
    if not by:
        return [("", table)]
    found = []
    for key, part in table.groupby(by, sort=False, dropna=False):
        values = key if isinstance(key, tuple) else (key,)
        pairs = zip(by, values, strict=True)
        found.append((", ".join(f"{n} {v}" for n, v in pairs), part))
    return found


def _curves(table: pd.DataFrame, x: str, by: list[str]) -> go.Figure:
    """Best held-out AUROC and separation per direction with 95 % intervals."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(_PANELS.values()))
    for column, measure in enumerate(_PANELS, start=1):
        for group, colour in zip(groups_of(table), GROUP_COLOURS, strict=False):
            for number, (name, part) in enumerate(_lines(table, by)):
                figure.add_trace(
                    _curve(part, x, measure, group, name, colour, _DASHES[number % len(_DASHES)]),
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title_text=x, type="category" if x == "width" else "linear")
    if x == "layer":
        figure.update_xaxes(dtick=max(1, table["layer"].nunique() // 12))
    chance = {"type": "line", "x0": 0, "x1": 1, "xref": "x domain", "y0": 0.5, "y1": 0.5}
    figure.add_shape(**chance, yref="y", line={"dash": "dot", "color": QUIET})
    figure.update_yaxes(range=[0.4, 1.02], row=1, col=1)
    figure.update_yaxes(range=[-0.05, 1.02], row=1, col=2)
    return style(figure, 430, legend_below=True)


def _curve(
    part: pd.DataFrame, x: str, measure: str, group: str, name: str, colour: str, dash: str
) -> go.Scatter:
    key = f"contrast/best_{measure}_{group}"
    size = _width_size if x == "width" else None
    ordered = part.dropna(subset=[f"{key}_test"])
    ordered = ordered.sort_values(x, key=lambda c: c.map(size) if size else c)
    y = ordered[f"{key}_test"]
    label = f"{group}{', ' if name else ''}{name}"
    return go.Scatter(
        x=ordered[x],
        y=y,
        name=label,
        legendgroup=label,
        showlegend=measure == "auroc",
        mode="lines+markers",
        line={"color": colour, "dash": dash},
        error_y={
            "array": ordered[f"{key}_ci_high_test"] - y,
            "arrayminus": y - ordered[f"{key}_ci_low_test"],
            "thickness": 1,
        },
        customdata=ordered[f"contrast/best_latent_{group}"].astype(object),
        hovertemplate=f"{label}<br>{x} %{{x}}: %{{y:.3f}} (latent %{{customdata}})<extra></extra>",
    )


def _heat_map(table: pd.DataFrame, by: list[str]) -> go.Figure:
    """Best held-out AUROC per direction over layer and width; a panel per direction and line."""
    panels = [(g, n, part) for n, part in _lines(table, by) for g in groups_of(table)]
    titles = [f"{group}{', ' if name else ''}{name}" for group, name, _ in panels]
    n_columns = len(groups_of(table))
    n_rows = len(panels) // n_columns
    figure = make_subplots(rows=n_rows, cols=n_columns, subplot_titles=titles)
    for number, (group, _, part) in enumerate(panels):
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
                showscale=number == 0,
                colorbar={"title": "AUROC"},
            ),
            row=number // n_columns + 1,
            col=number % n_columns + 1,
        )
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text="width", type="category")
    return style(figure, n_rows * (160 + 60 * max(2, table["width"].nunique())))


def _effects(effects: pd.DataFrame) -> go.Figure:
    """Outcome over the coefficient, one line per layer and width; matched controls as a band."""
    panels = by_effect(effects)
    titles = [
        f"{outcome} when acting on '{direction}'{f', {prompts} prompts' if prompts else ''}"
        for (outcome, direction, prompts), _ in panels
    ]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles)
    by = [n for n in effects.columns if n not in OF_AN_EFFECT]
    by = [n for n in by if effects[n].astype(str).nunique() > 1]
    # A cell without latents for one direction has no line in that panel.
    numbers = {name: number for number, (name, _) in enumerate(_lines(effects, by))}
    shown: set[str] = set()
    for column, (_, panel) in enumerate(panels, start=1):
        for name, part in _lines(panel, by):
            line = part.sort_values("coefficient")
            label = name or "selected latents"
            colour = _QUALITATIVE[numbers[name] % len(_QUALITATIVE)]
            for trace in _effect(line, label, colour, first=label not in shown):
                figure.add_trace(trace, row=1, col=column)
            shown.add(label)
    figure.update_xaxes(title_text="coefficient")
    figure.update_yaxes(range=[-0.03, 1.03])
    return style(figure, 430, legend_below=True)


_QUALITATIVE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _effect(line: pd.DataFrame, label: str, colour: str, *, first: bool) -> list[go.Scatter]:
    drawn = go.Scatter(
        x=line["coefficient"],
        y=line["value"],
        name=label,
        legendgroup=label,
        showlegend=first,
        mode="lines+markers",
        line={"color": colour},
        error_y={
            "array": line["ci_high"] - line["value"],
            "arrayminus": line["value"] - line["ci_low"],
            "thickness": 1,
        },
    )
    band = line.dropna(subset=["controls_min", "controls_max"])
    if band.empty:
        return [drawn]
    around = go.Scatter(
        x=[*band["coefficient"], *band["coefficient"][::-1]],
        y=[*band["controls_max"], *band["controls_min"][::-1]],
        name=f"{label}: matched controls",
        legendgroup=label,
        showlegend=False,
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
    )
    return [around, drawn]
