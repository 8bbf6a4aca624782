"""The picture of the panels of task=workspace in the guide on sweeps.

    python -m docs.workspace_picture panels.html SWEEP [SWEEP ...]
    chromium --headless --hide-scrollbars --window-size=1400,1415 --virtual-time-budget=8000 \\
      --screenshot=docs/images/wandb_workspace.png file://$PWD/panels.html

The panels are those that `saexp.tasks.saved_runs` specifies, drawn by plotly from what the runs of
the sweeps logged: numbers, series and configs are read from W&B's offline files alone. The picture
shows two sweeps with `tracker=wandb tracker.mode=offline dataset.n_examples=80
intervention.n_prompts=12 intervention.n_controls=3 intervention.n_curve_controls=3
intervention.max_new_tokens=8 intervention.n_choice_prompts=4 analyzer.n_bootstrap=50`:
`-m layer=0,1,2,3 width=256,512 coefficient=0.3,0.6` and
`-m layer=1,2,3 width=256 'coefficient=[0,0.2,0.4,0.6,0.8]'`.
"""

import html
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from sklearn.ensemble import RandomForestRegressor

from saexp.tasks.saved_runs import PARAMETERS, Panel, Section, keys_of_folder, sections
from tests.unit.reports.run_outputs import wandb_runs

COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1")
_HEIGHT = 165
_STYLE = """
body { font: 13px system-ui, sans-serif; margin: 0; padding: 10px 16px; width: 1368px;
  background: #f3f4f6; color: #1f2937; }
h1 { font-size: 17px; margin: 0 0 2px; } h2 { font-size: 14px; margin: 10px 0 5px; }
.grid { display: grid; grid-template-columns: repeat(12, 1fr); gap: 8px; }
.panel { background: white; border: 1px solid #d1d5db; border-radius: 4px; padding: 5px;
  min-width: 0; grid-column: span 3; }
.importance { grid-column: span 2; } .parallel { grid-column: 1 / -1; }
.title { font-size: 10.5px; font-weight: 600; }
.tables span { font-family: monospace; margin-right: 24px; }
"""


class Logged:
    """What the analysis runs of some sweeps logged, from W&B's files."""

    def __init__(self, folders: Sequence[Path]) -> None:
        runs = [run for folder in folders for run in wandb_runs(folder)]
        self.runs = [run for run in runs if run["job_type"] == "analyze"]
        self.config = pd.DataFrame([{k: r["config"].get(k) for k in PARAMETERS} for r in self.runs])
        self.summary = pd.DataFrame([run["summary"] for run in self.runs])

    def points(self, *keys: str) -> pd.DataFrame:
        """A row per run that has a number for each key of the summary or config."""
        columns = [self.config[k] if k in PARAMETERS else self.summary[k] for k in keys]
        table = pd.concat(columns, axis=1, keys=keys)
        return table.apply(pd.to_numeric, errors="coerce").dropna()

    def series(self, key: str, axis: str) -> dict[int, list[tuple[float, float]]]:
        """Number of the run -> points of its history."""
        return {
            at: [(row[axis], row[key]) for row in run["history"] if key in row and axis in row]
            for at, run in enumerate(self.runs)
            if any(key in row and axis in row for row in run["history"])
        }


def _scatter(panel: Panel, logged: Logged) -> go.Figure:
    assert panel.x is not None and panel.color is not None, "a scatter plot has both"
    keys = (panel.x, panel.y[0], panel.color)
    table = logged.points(*dict.fromkeys(keys))
    figure = go.Figure()
    for color, (value, part) in zip(COLORS, table.groupby(panel.color), strict=False):
        marker = {"color": color, "size": 7, "opacity": 0.8}
        x, y = part[panel.x], part[panel.y[0]]
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, name=f"{value:g}")
    return figure.update_layout(xaxis_title=panel.x, legend_title=panel.color)


def _line(panel: Panel, logged: Logged) -> go.Figure:
    """A line per layer; the lines of controls are dotted."""
    figure = go.Figure()
    assert panel.x is not None, "a line plot has an x-axis"
    for key in panel.y:
        for at, points in logged.series(key, panel.x).items():
            layer = int(logged.config["layer"][at])
            is_control = key != panel.y[0]
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                line={"color": COLORS[layer], "dash": "dot", "width": 1}
                if is_control
                else {"color": COLORS[layer]},
                name=str(layer),
                showlegend=not is_control,
                mode="lines" if is_control else "lines+markers",
            )
    return figure.update_layout(xaxis_title=panel.x, legend_title="layer")


def _bar(panel: Panel, logged: Logged) -> go.Figure:
    assert panel.color is not None, "bars have groups"
    means = logged.points(panel.color, *panel.y).groupby(panel.color).mean()
    names = [f"{panel.color} {value:g}" for value in means.index]
    figure = go.Figure()
    for color, key in zip(("#c6dbef", "#4e79a7", "#9ecae1"), panel.y, strict=False):
        label = "low" if "_ci_low" in key else "high" if "_ci_high" in key else "AUROC"
        figure.add_bar(y=names, x=means[key], orientation="h", name=label, marker_color=color)
    return figure.update_layout(barmode="group")


def _parallel(panel: Panel, logged: Logged) -> go.Figure:
    table = logged.points(*panel.y)
    axes = [{"label": _short(key), "values": table[key]} for key in panel.y]
    line = {"color": table[panel.y[-1]], "colorscale": "Viridis"}
    return go.Figure(go.Parcoords(line=line, dimensions=axes, labelfont={"size": 11}))


def _importance(panel: Panel, logged: Logged) -> go.Figure:
    """Importance in a random forest, and correlation, of what the cells differ by."""
    table = logged.points(*PARAMETERS, panel.y[0])
    inputs, value = table[list(PARAMETERS)], table[panel.y[0]]
    forest = RandomForestRegressor(200, random_state=0).fit(inputs, value)
    figure = go.Figure()
    # A constant has no correlation with anything.
    correlations = [np.corrcoef(inputs[k], value)[0, 1] if value.std() else 0 for k in PARAMETERS]
    bars = (("importance", forest.feature_importances_), ("correlation", correlations))
    for color, (name, numbers) in zip(("#4e79a7", "#f28e2b"), bars, strict=True):
        figure.add_bar(y=PARAMETERS, x=numbers, orientation="h", name=name, marker_color=color)
    return figure


def _short(key: str) -> str:
    return key.removeprefix("contrast/").removeprefix("effect/").removesuffix("_test")


_DRAW = {"scatter": _scatter, "line": _line, "bar": _bar, "parallel": _parallel}
_DRAW |= {"importance": _importance}


def _drawn(panel: Panel, logged: Logged, *, with_library: bool) -> str:
    figure = _DRAW[panel.kind](panel, logged)
    is_wide = panel.kind == "parallel"
    left = 60 if is_wide or panel.kind in ("bar", "importance") else 40
    figure.update_layout(
        height=_HEIGHT,
        template="plotly_white",
        font_size=10,
        margin={"l": left, "r": 70 if is_wide else 8, "t": 45 if is_wide else 24, "b": 32},
        legend={"font_size": 9, "orientation": "h", "y": 1, "yanchor": "bottom"},
        xaxis_title_standoff=2,
    )
    body = figure.to_html(
        full_html=False, include_plotlyjs=with_library, config={"displayModeBar": False}
    )
    title = f'<div class="title">{html.escape(panel.title)}</div>'
    return f'<div class="panel {panel.kind}">{title}{body}</div>'


def page(specified: Sequence[Section], logged: Logged, counts: Mapping[str, int]) -> str:
    """The panels as a page; `counts` has the number of runs per sweep's name."""
    parts = [f"<style>{_STYLE}</style><h1>saexp</h1>"]
    parts.append(" · ".join(f"{name}: {n} runs" for name, n in counts.items()))
    is_first = True
    for section in specified:
        parts.append(f"<h2>{html.escape(section.name)}</h2>")
        if section.name == "Tables":
            names = "".join(f"<span>{p.y[0]}</span>" for p in section.panels)
            parts.append(f'<div class="panel tables">{names}</div>')
            continue
        drawn = []
        for panel in section.panels:
            drawn.append(_drawn(panel, logged, with_library=is_first))
            is_first = False
        parts.append(f'<div class="grid">{"".join(drawn)}</div>')
    return "<!doctype html><meta charset=utf-8><title>saexp</title>" + "\n".join(parts)


def main(target: Path, folders: Sequence[Path]) -> None:
    keys, _ = keys_of_folder(folders[0])
    for folder in folders[1:]:
        keys |= keys_of_folder(folder)[0]
    counts = {folder.name: len(Logged([folder]).runs) for folder in folders}
    target.write_text(page(sections(keys), Logged(folders), counts), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
