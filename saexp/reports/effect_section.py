"""The section on interventions: dose-response curves, costs, patching, attention, generations."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from saexp.errors import counted
from saexp.reports import (
    GROUP_COLOURS,
    QUIET,
    Chart,
    Trace,
    error_bars,
    scatter,
    style,
    translucent,
    wrapped,
)
from saexp.reports.effects import (
    action_words,
    capitalized,
    coefficient_title,
    control_rows,
    main_rows,
    n_tests,
    prompts_of,
    target_words,
    unit_words,
    with_baseline,
)
from saexp.reports.saved_run import SavedRun
from saexp.results import CONTROL_WORDS, outcome_words

N_EXAMPLES = 4
N_HEADS = 12
_OTHER = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_KIND_COLOURS = {
    "frequency": QUIET,
    "disruption": "#009E73",
    "random_norm": "#E69F00",
    "random_kl": "#CC79A7",
}


def effect_figures(run: SavedRun) -> dict[str, go.Figure]:
    """Name -> figure, those that the run has data for: `effect_<condition>` (the first outcome,
    for the first screen), `dose_response_<outcome>` or `places_<outcome>`, `costs`, `attention`."""
    if run.summary is None:
        return {}
    figures: dict[str, go.Figure] = {}
    is_patching = run.config["intervention"]["name"] == "patch"
    if not is_patching:
        for name in dict.fromkeys(row["condition"] for row, _ in main_rows(run)):
            figures[f"effect_{name}"] = effect_figure(run, name)
    for outcome in run.outcomes:
        if is_patching:
            figures[f"places_{outcome}"] = patching_by_layer(run, outcome)
        else:
            figures[f"dose_response_{outcome}"] = dose_response(run, outcome)
    costs = run.table("costs")
    if costs is not None and len(costs):
        figures["costs"] = cost_curve(run, costs)
    attention = run.table("attention")
    if attention is not None and len(attention):
        figures["attention"] = attention_changes(attention)
    return figures


def _colour(run: SavedRun, direction: str) -> str:
    known = dict(zip(run.provenance["groups"], GROUP_COLOURS, strict=False))
    return known.get(direction, GROUP_COLOURS[0])


def effect_figure(run: SavedRun, condition: str) -> go.Figure:
    """The first outcome of one condition against the coefficient, with the band of all controls."""
    summary, outcome = run.summary, run.outcomes[0]
    assert summary is not None
    figure = Chart()
    controls = summary[(summary["of"] == condition) & (summary["role"] == "control")]
    n_at = controls.groupby("condition")["coefficient"].transform("nunique")
    if (n_at > 1).any():
        band = _band(controls[n_at > 1], outcome, "", is_shown=True)
        figure.add_trace(band | {"name": "range of the controls"})
    chosen = run.chosen_coefficient(condition)
    at = controls[controls["coefficient"] == chosen]
    if len(at):
        points = _points(at, outcome, "", float(chosen or 0.0), is_shown=True)
        figure.add_trace(points | {"name": "controls at the chosen coefficient"})
    for _, rows in summary[summary["condition"] == condition].groupby("group", sort=False):
        figure.add_trace(_curve(run, rows, outcome, is_main=True))
    _label_dose_axes(figure, run, outcome)
    return style(figure, 330, legend_below=True, margin={"t": 40, "b": 115})


def _label_dose_axes(figure: Chart, run: SavedRun, outcome: str) -> None:
    figure.update_xaxes(title=coefficient_title(run.config["intervention"]))
    is_rate = run.is_rate(outcome)
    if is_rate:
        figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(title=f"{outcome} rate" if is_rate else outcome_words(outcome), col=1)


def dose_response(run: SavedRun, outcome: str) -> go.Figure:
    """Outcome against coefficient, a panel per condition: intervals and the bands of controls."""
    summary = run.summary
    assert summary is not None
    names = run.main_conditions()
    n_columns = min(2, max(1, len(names)))
    n_rows = max(1, -(-len(names) // n_columns))
    first_rows = [summary[summary["condition"] == name].iloc[0] for name in names]
    titles = [
        wrapped(capitalized(action_words(run.config["intervention"], row)), 50)
        for row in first_rows
    ]
    figure = Chart.with_panels(n_rows, n_columns, titles, (None, 0.16), shared_yaxes=True)
    in_legend: set[str] = set()
    for index, name in enumerate(names):
        panel: dict[str, Any] = {"row": index // n_columns + 1, "col": index % n_columns + 1}
        controls = summary[(summary["of"] == name) & (summary["role"] == "control")]
        chosen = run.chosen_coefficient(name)
        for trace in _control_traces(controls, outcome, chosen, in_legend):
            figure.add_trace(trace, **panel)
        _add_condition(figure, run, outcome, name, panel)
    _label_dose_axes(figure, run, outcome)
    legend = {"itemsizing": "constant"}
    return style(figure, 380 * n_rows + 100, legend_below=True, legend=legend)


def _band(controls: pd.DataFrame, column: str, kind: str, *, is_shown: bool) -> Trace:
    """From the lowest to the highest of the controls, at each coefficient."""
    band = controls.groupby("coefficient")[column].agg(["min", "max"]).sort_index()
    colour = _KIND_COLOURS.get(kind, QUIET)
    return scatter(
        x=[*band.index, *band.index[::-1]],
        y=[*band["max"], *band["min"][::-1]],
        mode="lines",
        fill="toself",
        fillcolor=translucent(colour, 0.25),
        line={"color": translucent(colour, 0.6), "width": 1},
        name=CONTROL_WORDS.get(kind, "controls"),
        legendgroup=f"controls {kind}",
        showlegend=is_shown,
        hoverinfo="skip",
    )


def _points(controls: pd.DataFrame, column: str, kind: str, x: float, *, is_shown: bool) -> Trace:
    """Every control of a kind at one coefficient, drawn at `x`."""
    return scatter(
        x=[x] * len(controls),
        y=controls[column],
        mode="markers",
        marker={"color": translucent(_KIND_COLOURS.get(kind, QUIET), 0.6), "size": 4},
        text=controls["condition"],
        name=CONTROL_WORDS.get(kind, "controls"),
        legendgroup=f"controls {kind}",
        showlegend=is_shown,
    )


def _control_traces(
    controls: pd.DataFrame, column: str, chosen: float | None, in_legend: set[str]
) -> list[Trace]:
    """Bands and points of a condition's controls; adds their kinds to those `in_legend`."""
    kinds = [k for k in CONTROL_WORDS if k in set(controls["control_kind"])]
    coefficients = controls["coefficient"]
    step = 0.02 * float(coefficients.max() - min(coefficients.min(), 0.0))
    n_at = controls.groupby("condition")["coefficient"].transform("nunique")
    traces = []
    for index, kind in enumerate(kinds):
        of_kind = controls["control_kind"] == kind
        curve = controls[of_kind & (n_at > 1)]
        if len(curve):
            traces.append(_band(curve, column, kind, is_shown=kind not in in_legend))
            in_legend.add(kind)
        at = controls[of_kind & (coefficients == chosen)]
        if len(at):
            x = float(chosen or 0.0) + step * (index - (len(kinds) - 1) / 2)
            traces.append(_points(at, column, kind, x, is_shown=kind not in in_legend))
            in_legend.add(kind)
    return traces


def _add_condition(
    figure: Chart, run: SavedRun, outcome: str, name: str, panel: dict[str, Any]
) -> None:
    """Add a condition's curve with intervals, and thin those of its latents one by one."""
    summary = run.summary
    assert summary is not None
    rows = summary[summary["condition"] == name]
    role, direction = rows[["role", "direction"]].iloc[0]
    if role in ("group", "single"):
        is_related = summary["role"].isin(["group", "single"])
        rows = summary[is_related & (summary["direction"] == direction)]
    for (condition, _), part in rows.groupby(["condition", "group"], sort=False):  # pyright: ignore[reportGeneralTypeIssues]
        figure.add_trace(_curve(run, part, outcome, is_main=condition == name), **panel)


def _curve(run: SavedRun, rows: pd.DataFrame, outcome: str, *, is_main: bool) -> Trace:
    """A condition's outcome against the coefficient; thin and without intervals if not main."""
    points = with_baseline(run, rows)
    limits = (points[f"{outcome}_ci_{end}"] for end in ("low", "high"))
    first = points.iloc[0]
    # Latents without a direction are run on the prompts of every group.
    on = f", {prompts_of(first['group'])}" if first["direction"] in ("latent", "latents") else ""
    return scatter(
        x=points["coefficient"],
        y=points[outcome],
        mode="lines+markers",
        line={
            "color": _colour(run, str(points["direction"].iloc[0])),
            "width": 3 if is_main else 1,
            "dash": None if is_main else "dot",
        },
        error_y=error_bars(points[outcome], *limits) if is_main else None,
        name=f"{target_words(first)}{on}",
    )


def cost_curve(run: SavedRun, costs: pd.DataFrame) -> go.Figure:
    """KL on neutral text against coefficient, main conditions and the band of their controls."""
    names = [c for c in run.main_conditions() if c in set(costs["condition"])]
    figure = Chart()
    controls = costs[(costs["role"] == "control") & costs["of"].isin(names)]
    n_at = controls.groupby("condition")["coefficient"].transform("nunique")
    for kind in [k for k in CONTROL_WORDS if k in set(controls["control_kind"])]:
        curve = controls[(controls["control_kind"] == kind) & (n_at > 1)]
        if len(curve):
            figure.add_trace(_band(curve, "neutral_kl", kind, is_shown=True))
    for index, name in enumerate(names):
        part = costs[costs["condition"] == name].sort_values("coefficient")
        row = part.iloc[0]
        is_latents = row["role"] in ("group", "single")
        colour = _colour(run, str(row["direction"])) if is_latents else _OTHER[index % len(_OTHER)]
        figure.add_trace(
            scatter(
                x=part["coefficient"],
                y=part["neutral_kl"],
                mode="lines+markers",
                line={"color": colour, "width": 3},
                name=name.replace("_", " "),
            )
        )
    figure.update_xaxes(title=coefficient_title(run.config["intervention"]))
    figure.update_yaxes(title="KL on neutral text (nats per token)", rangemode="tozero")
    return style(figure, 420)


def patching_by_layer(run: SavedRun, outcome: str) -> go.Figure:
    """Change of the outcome by the layer that is patched, and that of control patches."""
    summary = run.summary
    assert summary is not None
    largest = summary["coefficient"].abs().max()
    rows = summary[(summary["coefficient"] == largest) & summary["role"].isin(["place", "control"])]
    label = rows["of"].str.extract(
        r"_patch_(?P<stream>.+?)_(?P<layer>\d+)(?:_head_(?P<head>\d+))?$"
    )
    rows = rows.assign(stream=label["stream"], layer=label["layer"].astype(int))
    change = f"{outcome}_change"
    figure = Chart()
    for direction, of_direction in rows.groupby("direction", sort=False):
        for index, (stream, part) in enumerate(of_direction.groupby("stream", sort=False)):
            colour, dash = _colour(run, str(direction)), ("solid", "dash", "dot")[index % 3]
            patched = part[part["role"] == "place"].sort_values("layer")
            limits = (patched[f"{change}_ci_{end}"] for end in ("low", "high"))
            figure.add_trace(
                scatter(
                    x=patched["layer"],
                    y=patched[change],
                    mode="markers" if label["head"].notna().any() else "lines+markers",
                    line={"color": colour, "dash": dash},
                    marker={"color": colour},
                    error_y=error_bars(patched[change], *limits),
                    text=patched["condition"],
                    name=f"{stream} of {direction} prompts",
                )
            )
            controls = part[part["role"] == "control"].groupby("layer")[change].mean()
            figure.add_trace(
                scatter(
                    x=controls.index,
                    y=controls.to_numpy(),
                    mode="lines+markers",
                    line={"color": QUIET, "dash": dash},
                    name=f"{stream}, control: another prompt of the same group",
                )
            )
    figure.update_xaxes(title="patched layer", dtick=1)
    figure.update_yaxes(title=f"change of {outcome.replace('_', ' ')}")
    return style(figure, 460, legend_below=True)


def attention_changes(attention: pd.DataFrame) -> go.Figure:
    """Change of attention to the entity per layer and head; a cross marks p < 0.05, corrected."""
    names = list(dict.fromkeys(attention["condition"]))
    titles = [name.replace("_", " ") for name in names]
    figure = Chart.with_panels(len(names), 1, titles, (None, 0.12))
    limit = float(attention["difference"].abs().max()) or 1.0
    for row, name in enumerate(names, 1):
        part = attention[attention["condition"] == name]
        grid = part.pivot_table(index="layer", columns="head", values="difference")
        figure.add_trace(
            {
                "type": "heatmap",
                "z": grid.to_numpy(),
                "x": list(grid.columns),
                "y": list(grid.index),
                "zmin": -limit,
                "zmax": limit,
                "colorscale": "RdBu",
                "showscale": row == 1,
                "colorbar": {"title": {"text": "change of<br>attention"}},
                "hovertemplate": "layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
            },
            row=row,
            col=1,
        )
        significant = part[part["p_corrected"] < 0.05]
        figure.add_trace(
            scatter(
                x=significant["head"],
                y=significant["layer"],
                mode="markers",
                marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": "#1b1f24"}},
                showlegend=False,
                hoverinfo="skip",
            ),
            row=row,
            col=1,
        )
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    return style(figure, 260 * len(names) + 60)


def effect_content(run: SavedRun) -> dict[str, Any]:
    """Content of the template effects.html."""
    return {
        "effects": effect_tables(run),
        "controls": control_rows(run),
        "n_tests": n_tests(run),
        "costs": cost_table(run),
        "cost_words": (
            "with the edited weights"
            if run.config["intervention"]["name"] == "orthogonalize"
            else "with the edit at every token"
        ),
        "heads": attention_tables(run),
        "examples": generations(run),
    }


def effect_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per outcome a table of all conditions, each with the range of its controls."""
    summary = run.summary
    if summary is None:
        return []
    tables = []
    all_units = ("in_raw", "in_max_act", "in_p99_act", "in_resid_norm", "norm_kept")
    units = [c for c in all_units if c in summary]
    for outcome in run.outcomes:
        tested = ["p_controls", "p_controls_holm"]
        tested += ["p_prediction"] if f"{outcome}_p_prediction" in summary else []
        numbers = ["ci_low", "ci_high", "change", "change_ci_low", "change_ci_high", "p"]
        rows = []
        for row in summary[summary["role"] != "control"].to_dict("records"):
            is_control = (summary["of"] == row["condition"]) & (summary["role"] == "control")
            is_control &= summary["group"] == row["group"]
            controls = summary.loc[
                is_control & (summary["coefficient"] == row["coefficient"]), outcome
            ]
            span = f"{controls.min():.2f} to {controls.max():.2f}" if len(controls) else "–"
            cells = [row["condition"], str(row["latent"]).replace("+", ", "), row["group"]]
            cells += [row[f"{outcome}_n"], row[f"{outcome}_n_prompts"], row["coefficient"]]
            cells += [row[outcome], *(row[f"{outcome}_{c}"] for c in numbers)]
            cells += [span, len(controls), *(row[f"{outcome}_{c}"] for c in tested)]
            exploratory = row["role"] != "baseline" and not row["main"]
            cells += ["yes" if exploratory else "", "yes" if row["chosen"] else ""]
            rows.append([*cells, *(row[c] for c in units)])
        head = ["condition", "latents", "group", "entities", "prompts", "coefficient", outcome]
        head += ["low", "high", "change", "change low"]
        head += ["change high", "p, unsteered"]
        head += ["controls' range", "controls", "p, controls", "after Holm"]
        head += ["p, prediction"] * (len(tested) - 2)
        head += ["exploratory", "chosen on train"]
        head += [c.removeprefix("in_").replace("_", " ") for c in units]
        tables.append({"outcome": outcome, "head": head, "rows": rows})
    return tables


def cost_table(run: SavedRun) -> dict[str, Any] | None:
    """KL on neutral text per condition and coefficient, with the range per kind of control."""
    costs = run.table("costs")
    if costs is None:
        return None
    of_kind = costs[costs["role"] == "control"].groupby(["of", "coefficient", "control_kind"])
    spans = of_kind["neutral_kl"].agg(["min", "max"])
    kinds = [k for k in CONTROL_WORDS if k in set(costs["control_kind"])]
    rows = []
    for row in costs[costs["role"] != "control"].to_dict("records"):
        cells = [row["condition"], row["coefficient"], row["neutral_kl"]]
        for kind in kinds:
            key = (row["condition"], row["coefficient"], kind)
            is_run = key in spans.index
            cells.append(
                f"{spans.loc[key, 'min']:.3f} to {spans.loc[key, 'max']:.3f}" if is_run else "–"
            )
        rows.append(cells)
    head = ["condition", "coefficient", "KL (nats per token)", *(CONTROL_WORDS[k] for k in kinds)]
    return {"head": head, "rows": rows}


def attention_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Attention to the entity summed over heads, then the heads that change most per condition."""
    table, summary = run.table("attention"), run.table("attention_summary")
    if table is None or summary is None:
        return []
    head = ["condition", "prompts", "coefficient", "entities", "original", "edited", "difference"]
    rows = [
        [r["condition"], r["group"], r["coefficient"], r["n"], r["original"], r["edited"]]
        + [r["difference"], r["ci_low"], r["ci_high"], r["p_value"]]
        for r in summary.to_dict("records")
    ]
    tables = [{"title": "All heads together", "head": [*head, "low", "high", "p"], "rows": rows}]
    for condition, part in table.groupby("condition", sort=False):
        top = part.reindex(part["difference"].abs().sort_values(ascending=False).index)
        columns = ["layer", "head", "original", "edited", "difference", "p_corrected"]
        tables.append(
            {
                "title": f"Heads that change most: {condition}",
                "head": [*columns[:5], "p, corrected over heads"],
                "rows": top.head(N_HEADS)[columns].to_numpy().tolist(),
            }
        )
    return tables


def _is_hit(value: Any) -> bool:
    return bool(pd.notna(value)) and bool(value)


def generations(run: SavedRun) -> list[dict[str, Any]]:
    """Per main condition a few held-out prompts: unsteered, steered, and under one control."""
    effects, summary = run.table("effects"), run.summary
    if effects is None or summary is None or "generated_text" not in effects:
        return []
    if effects.loc[effects["role"] != "baseline", "generated_text"].isna().all():
        return []
    effects = effects[effects["split"] == "test"]
    rates = [o for o in run.outcomes if run.is_rate(o)]
    return [
        _generations_of(run, summary, effects, name, rates[0] if rates else None)
        for name in run.main_conditions()
    ]


def _generations_of(
    run: SavedRun, summary: pd.DataFrame, effects: pd.DataFrame, name: str, outcome: str | None
) -> dict[str, Any]:
    rows = summary[summary["condition"] == name]
    row, coefficient = rows.iloc[0], run.chosen_coefficient(name)
    if coefficient is None:
        coefficient = float(rows["coefficient"].max())
    at = effects[effects["coefficient"] == coefficient]
    steered = at[at["condition"] == name].set_index("example_id")
    controls = at[(at["of"] == name) & (at["role"] == "control")]
    is_first = controls["condition"] == controls["condition"].head(1).squeeze()
    control = controls[is_first] if len(controls) else controls
    before = effects[(effects["role"] == "baseline") & (effects["group"] == row["group"])]
    states = [t.set_index("example_id") for t in (before, control)]
    states.insert(1, steered)
    compared = [i for i in steered.index if i in states[0].index]
    n_changed = sum(
        states[0].loc[i, "generated_text"] != steered.loc[i, "generated_text"] for i in compared
    )
    # One prompt per entity type first.
    ids = list(steered.groupby("entity_type", sort=False, dropna=False).head(1).index)
    ids = (ids + [i for i in steered.index if i not in ids])[:N_EXAMPLES]
    shown = [
        {
            "prompt": steered.loc[i, "prompt"],
            "texts": [
                (t.loc[i, "generated_text"], outcome is not None and _is_hit(t.loc[i, outcome]))
                if i in t.index
                else None
                for t in states
            ],
        }
        for i in ids
    ]
    cfg = run.config["intervention"]
    return {
        "title": capitalized(action_words(cfg, row)),
        "coefficient": f"{coefficient:g} {unit_words(cfg)}".rstrip(),
        "outcome": outcome,
        "rows": shown,
        "changed": f"The text differs from the unsteered one on {n_changed} of "
        f"{counted(len(compared), 'held-out prompt')}; the first are shown.",
    }
