"""Figures of an intervention: dose and response, costs, places, heads."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports.effects import prompts_of, unit_words, what
from saexp.reports.saved import SavedRun
from saexp.reports.style import GROUP_COLOURS, QUIET, see_through, style
from saexp.wording import CONTROL_WORDS

_OTHER = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_KIND_COLOURS = {
    "frequency": QUIET,
    "disruption": "#009E73",
    "random_norm": "#E69F00",
    "random_kl": "#CC79A7",
}


def effect_figures(run: SavedRun) -> dict[str, go.Figure]:
    """Those that the run has data for."""
    if run.summary is None:
        return {}
    figures: dict[str, go.Figure] = {}
    patching = run.config["intervention"]["name"] == "patch"
    for outcome in run.outcomes:
        if patching:
            figures[f"places_{outcome}"] = places(run, outcome)
        else:
            figures[f"dose_response_{outcome}"] = dose_response(run, outcome)
    costs = run.table("costs")
    if costs is not None and len(costs):
        figures["costs"] = cost_curve(run, costs)
    attention = run.table("attention")
    if attention is not None and len(attention):
        figures["attention"] = heads(attention)
    return figures


def _colour(run: SavedRun, direction: str) -> str:
    known = dict(zip(run.provenance["groups"], GROUP_COLOURS, strict=False))
    return known.get(direction, GROUP_COLOURS[0])


def dose_response(run: SavedRun, outcome: str) -> go.Figure:
    """Outcome against coefficient: conditions with intervals, and the band of their controls."""
    summary = run.summary
    assert summary is not None
    names = run.main_conditions()
    rate = run.is_rate(outcome)
    columns = min(2, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    titles = []
    for name in names:
        row = summary[summary["condition"] == name].iloc[0]
        titles.append(f"{what(row)}, on {prompts_of(row['group'])}")
    figure = make_subplots(
        cols=columns, rows=rows, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.16
    )
    seen: set[str] = set()
    for number, name in enumerate(names):
        panel = {"row": number // columns + 1, "col": number % columns + 1}
        _dose_panel(figure, run, outcome, name, panel, seen)
    unit = unit_words(run.config["intervention"])
    figure.update_xaxes(title=f"coefficient ({unit})")
    if rate:
        figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(title=f"{outcome} rate" if rate else outcome.replace("_", " "), col=1)
    style(figure, 380 * rows + 100, legend_below=True)
    return figure.update_layout(legend={"itemsizing": "constant"})


def _band(controls: pd.DataFrame, column: str, kind: str, *, shown: bool) -> go.Scatter:
    """From the lowest to the highest of the controls that were run at every coefficient."""
    band = controls.groupby("coefficient")[column].agg(["min", "max"]).sort_index()
    colour = _KIND_COLOURS.get(kind, QUIET)
    return go.Scatter(
        x=[*band.index, *band.index[::-1]],
        y=[*band["max"], *band["min"][::-1]],
        fill="toself",
        fillcolor=see_through(colour, 0.25),
        line={"color": see_through(colour, 0.6), "width": 1},
        name=CONTROL_WORDS.get(kind, "controls"),
        legendgroup=f"controls {kind}",
        showlegend=shown,
        hoverinfo="skip",
    )


def _points(controls: pd.DataFrame, column: str, kind: str, x: float, *, shown: bool) -> go.Scatter:
    """Every control of a kind at one coefficient, drawn at `x` beside it."""
    return go.Scatter(
        x=[x] * len(controls),
        y=controls[column],
        mode="markers",
        marker={"color": see_through(_KIND_COLOURS.get(kind, QUIET), 0.6), "size": 4},
        text=controls["condition"],
        name=CONTROL_WORDS.get(kind, "controls"),
        legendgroup=f"controls {kind}",
        showlegend=shown,
    )


def _control_traces(
    controls: pd.DataFrame, column: str, chosen: float | None, seen: set[str]
) -> list[go.Scatter]:
    """Bands and points of a condition's controls; `seen` are kinds that the legend has."""
    kinds = [k for k in CONTROL_WORDS if k in set(controls["control_kind"])]
    coefficients = controls["coefficient"]
    step = 0.02 * float(coefficients.max() - min(coefficients.min(), 0.0))
    n_at = controls.groupby("condition")["coefficient"].transform("nunique")
    traces = []
    for number, kind in enumerate(kinds):
        of_kind = controls["control_kind"] == kind
        curve = controls[of_kind & (n_at > 1)]
        if len(curve):
            traces.append(_band(curve, column, kind, shown=kind not in seen))
            seen.add(kind)
        at = controls[of_kind & (coefficients == chosen)]
        if len(at):
            x = float(chosen or 0.0) + step * (number - (len(kinds) - 1) / 2)
            traces.append(_points(at, column, kind, x, shown=kind not in seen))
            seen.add(kind)
    return traces


def _dose_panel(
    figure: go.Figure,
    run: SavedRun,
    outcome: str,
    name: str,
    panel: dict[str, int],
    seen: set[str],
) -> None:
    summary = run.summary
    assert summary is not None
    where: dict[str, Any] = dict(panel)
    controls = summary[(summary["of"] == name) & (summary["role"] == "control")]
    for trace in _control_traces(controls, outcome, run.chosen_coefficient(name), seen):
        figure.add_trace(trace, **where)
    main = summary[summary["condition"] == name]
    role, direction = main[["role", "direction"]].iloc[0]
    colour = _colour(run, str(direction))
    same = main
    if role in ("group", "single"):
        family = summary["role"].isin(["group", "single"]) & (summary["direction"] == direction)
        same = summary[family]
    for condition, part in same.groupby("condition", sort=False):
        points = part.sort_values("coefficient")
        is_main = condition == name
        bars = {
            "type": "data",
            "symmetric": False,
            "array": points[f"{outcome}_ci_high"] - points[outcome],
            "arrayminus": points[outcome] - points[f"{outcome}_ci_low"],
        }
        figure.add_trace(
            go.Scatter(
                x=points["coefficient"],
                y=points[outcome],
                mode="lines+markers",
                line={
                    "color": colour,
                    "width": 3 if is_main else 1,
                    "dash": None if is_main else "dot",
                },
                error_y=bars if is_main else None,
                name=what(points.iloc[0]),
            ),
            **where,
        )


def cost_curve(run: SavedRun, costs: pd.DataFrame) -> go.Figure:
    """KL on neutral text against coefficient, main conditions and the band of their controls."""
    names = [c for c in run.main_conditions() if c in set(costs["condition"])]
    figure = go.Figure()
    controls = costs[(costs["role"] == "control") & costs["of"].isin(names)]
    n_at = controls.groupby("condition")["coefficient"].transform("nunique")
    for kind in [k for k in CONTROL_WORDS if k in set(controls["control_kind"])]:
        curve = controls[(controls["control_kind"] == kind) & (n_at > 1)]
        if len(curve):
            figure.add_trace(_band(curve, "neutral_kl", kind, shown=True))
    for number, name in enumerate(names):
        part = costs[costs["condition"] == name].sort_values("coefficient")
        row = part.iloc[0]
        latents = row["role"] in ("group", "single")
        colour = _colour(run, str(row["direction"])) if latents else _OTHER[number % len(_OTHER)]
        figure.add_trace(
            go.Scatter(
                x=part["coefficient"],
                y=part["neutral_kl"],
                mode="lines+markers",
                line={"color": colour, "width": 3},
                name=name.replace("_", " "),
            )
        )
    figure.update_xaxes(title=f"coefficient ({unit_words(run.config['intervention'])})")
    figure.update_yaxes(title="KL on neutral text, nats a token", rangemode="tozero")
    return style(figure, 420)


def places(run: SavedRun, outcome: str) -> go.Figure:
    """Change of the outcome when one place is patched, by layer; controls: own group's values."""
    summary = run.summary
    assert summary is not None
    top = summary["coefficient"].abs().max()
    mine = summary[(summary["coefficient"] == top) & summary["role"].isin(["place", "control"])]
    label = mine["of"].str.extract(
        r"_patch_(?P<stream>.+?)_(?P<layer>\d+)(?:_head_(?P<head>\d+))?$"
    )
    mine = mine.assign(stream=label["stream"], layer_at=label["layer"].astype(int))
    figure = go.Figure()
    for direction in dict.fromkeys(mine["direction"]):
        for number, (stream, part) in enumerate(
            mine[mine["direction"] == direction].groupby("stream", sort=False)
        ):
            colour = _colour(run, str(direction))
            own = part[part["role"] == "place"].sort_values("layer_at")
            figure.add_trace(
                go.Scatter(
                    x=own["layer_at"],
                    y=own[f"{outcome}_change"],
                    mode="markers" if label["head"].notna().any() else "lines+markers",
                    line={"color": colour, "dash": ("solid", "dash", "dot")[number % 3]},
                    marker={"color": colour},
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": own[f"{outcome}_change_ci_high"] - own[f"{outcome}_change"],
                        "arrayminus": own[f"{outcome}_change"] - own[f"{outcome}_change_ci_low"],
                    },
                    text=own["condition"],
                    name=f"{stream} of {direction} prompts",
                )
            )
            others = part[part["role"] == "control"].groupby("layer_at")[f"{outcome}_change"].mean()
            figure.add_trace(
                go.Scatter(
                    x=others.index,
                    y=others.to_numpy(),
                    mode="lines+markers",
                    line={"color": QUIET, "dash": ("solid", "dash", "dot")[number % 3]},
                    name=f"{stream}, control: another prompt of the same group",
                )
            )
    figure.update_xaxes(title="layer patched", dtick=1)
    figure.update_yaxes(title=f"change of {outcome.replace('_', ' ')}")
    return style(figure, 460, legend_below=True)


def heads(attention: pd.DataFrame) -> go.Figure:
    """Change of attention to the entity per layer and head; a cross marks p < 0.05, corrected."""
    names = list(dict.fromkeys(attention["condition"]))
    figure = make_subplots(cols=1, rows=len(names), subplot_titles=names, vertical_spacing=0.12)
    limit = float(attention["difference"].abs().max()) or 1.0
    for number, name in enumerate(names, 1):
        part = attention[attention["condition"] == name]
        wide = part.pivot_table(index="layer", columns="head", values="difference")
        figure.add_trace(
            go.Heatmap(
                z=wide.to_numpy(),
                x=list(wide.columns),
                y=list(wide.index),
                zmin=-limit,
                zmax=limit,
                colorscale="RdBu",
                showscale=number == 1,
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
            ),
            row=number,
            col=1,
        )
        sure = part[part["p_corrected"] < 0.05]
        figure.add_trace(
            go.Scatter(
                x=sure["head"],
                y=sure["layer"],
                mode="markers",
                marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "#1b1f24"}},
                showlegend=False,
                hoverinfo="skip",
            ),
            row=number,
            col=1,
        )
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    return style(figure, 260 * len(names) + 60)
