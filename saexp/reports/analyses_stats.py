"""Page of analyzer=stats: how sparse each group is, how strong, and which latents fire most."""

import pandas as pd
import plotly.graph_objects as go

from saexp.reports.analyses_generic import Section, Table, layers_of, shown, suffix, table_of
from saexp.reports.figures import GROUP_COLOURS, QUIET, style
from saexp.reports.saved import SavedRun
from saexp.wording import counted

_GROUPS = {
    "group": "group",
    "n_positions": "positions (N)",
    "n_units": "units",
    "l0": "L0",
    "l0_ci_low": "low",
    "l0_ci_high": "high",
    "mean_active": "mean active",
    "max_active": "maximum",
    "dead_fraction": "never active in N",
    "n_dead": "… latents",
}
_INTERVALS = "95 % intervals by the studentised bootstrap over units (none for fewer than 10)"
_N_TOLD = 3
"""Layers told one by one; of more, the range."""


def asked(_: SavedRun) -> str:
    """What the run was to find out."""
    return (
        "How many latents are active at a position, how strongly, how many never are, and which "
        "are active most often, group by group? All positions of all splits, every unit (entity or "
        "text) counting once; nothing is selected."
    )


def figures(run: SavedRun) -> dict[str, go.Figure]:
    """Per layer `l0`, `values` and, of two groups, `frequencies`; of several layers `l0_layers`."""
    groups, l0 = table_of(run, "groups"), table_of(run, "l0_histogram")
    values, counts = table_of(run, "value_histogram"), table_of(run, "counts")
    layers = layers_of(groups)
    found = {}
    if len(layers) > 1:
        found["l0_layers"] = _over_layers(groups)
    for layer in layers:
        end = suffix(layer, layers)
        found[f"l0{end}"] = _l0(l0[l0["layer"] == layer])
        found[f"values{end}"] = _values(values[values["layer"] == layer])
        names = list(groups.loc[groups["layer"] == layer, "group"])
        if len(names) == 2:
            found[f"frequencies{end}"] = _frequencies(counts[counts["layer"] == layer], names)
    return found


def sentences(run: SavedRun) -> list[str]:
    """Per layer and group L0, values, silent latents; the overlap of the lists."""
    table = table_of(run, "groups")
    layers = layers_of(table)
    if len(layers) > _N_TOLD:
        return [_range(str(g), part) for g, part in table.groupby("group", sort=False)]
    lines = []
    for layer in layers:
        end, where = suffix(layer, layers), f"Layer {layer}, " if len(layers) > 1 else ""
        mine = table[table["layer"] == layer]
        for row in mine.to_dict("records"):
            interval = f" [{row['l0_ci_low']:.2f}, {row['l0_ci_high']:.2f}]"
            strength = "no latent is active"
            if pd.notna(row["mean_active"]):
                strength = f"mean active value {row['mean_active']:.2f}, maximum "
                strength += f"{row['max_active']:.2f}"
            lines.append(
                f"{where}{row['group']}: L0 {row['l0']:.2f}"
                f"{interval if pd.notna(row['l0_ci_low']) else ''}, {strength}, "
                f"{row['dead_fraction']:.0%} of the latents never active in {row['n_positions']:,} "
                f"positions of {counted(row['n_units'], 'unit')}."
            )
        if len(mine) == 2:
            lines.append(_compared(run, list(mine["group"]), end, where))
    return lines


def sections(run: SavedRun) -> list[Section]:
    """The groups' numbers, then each layer's histograms, lists and counts."""
    groups, frequent = table_of(run, "groups"), table_of(run, "frequent")
    counts = table_of(run, "counts")
    layers = layers_of(groups)
    columns = {**({"layer": "layer"} if len(layers) > 1 else {}), **_GROUPS}
    over = [("l0_layers", f"L0 over layers, with {_INTERVALS}.")]
    found = [
        Section(
            "Groups",
            f"L0: active latents at a position, a unit's positions averaged first, with "
            f"{_INTERVALS}. Maximum and never active are over all positions and depend on how many "
            "there are.",
            figures=over if len(layers) > 1 else [],
            tables=[shown(groups, columns=columns)],
        )
    ]
    for layer in layers:
        end = suffix(layer, layers)
        mine = counts[counts["layer"] == layer].drop(columns="layer")
        active = [c for c in mine if str(c).startswith("n_active_")]
        order = mine[active].sum(axis=1).sort_values(ascending=False, kind="stable").index
        lists = frequent[frequent["layer"] == layer]
        plots = [
            (f"l0{end}", "Active latents per position, fraction of the group's positions."),
            (f"values{end}", "Activations that are not zero; shares are logarithmic."),
        ]
        if len(active) == 2:
            caption = "Fraction of positions at which each latent is active, averaged over units."
            plots.append((f"frequencies{end}", caption))
        found.append(
            Section(
                f"Layer {layer}" if len(layers) > 1 else "Latents",
                figures=plots,
                tables=[
                    *(_list(str(g), part) for g, part in lists.groupby("group", sort=False)),
                    shown(
                        mine.loc[order],
                        "Positions on which each latent fires",
                        _count_columns(mine),
                        folded=len(layers) > 1,
                    ),
                ],
            )
        )
    return found


def _range(group: str, part: pd.DataFrame) -> str:
    ordered = part.sort_values("l0", kind="stable")
    low, high = ordered.iloc[0], ordered.iloc[-1]
    dead = part["dead_fraction"]
    return (
        f"{group}: L0 from {low['l0']:.2f} (layer {low['layer']}) to {high['l0']:.2f} (layer "
        f"{high['layer']}); {dead.min():.0%} to {dead.max():.0%} of the latents never active in "
        f"{part['n_positions'].iloc[0]:,} positions."
    )


def _compared(run: SavedRun, names: list[str], end: str, where: str) -> str:
    m = run.metrics
    both = m[f"stats/n_frequent_in_both{end}"]
    low, high = (m.get(f"stats/l0_difference_ci_{side}{end}") for side in ("low", "high"))
    value = m[f"stats/l0_difference{end}"]
    between = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    frequent = table_of(run, "frequent")
    n = int(frequent.groupby(["layer", "group"]).size().max()) if len(frequent) else 0
    return (
        f"{where}L0 of {names[0]} less {names[1]}, within entity types where both have them: "
        f"{value:.2f}{between}; of the {n} most frequent latents of each, {both} are the same."
    )


def _list(group: str, part: pd.DataFrame) -> Table:
    columns = {
        "rank": "rank",
        "latent": "latent",
        "n_active": "positions",
        "frequency": "share",
        "mean_active": "mean active value",
        "shared": "also in the other list",
    }
    table = part.assign(shared=["yes" if n > 1 else "" for n in part["n_lists"]])
    return shown(table, f"Most frequent in {group}", columns)


def _count_columns(counts: pd.DataFrame) -> dict[str, str]:
    names = {"latent": "latent"}
    for column in map(str, counts.columns):
        if column.startswith("n_active_"):
            names[column] = f"positions, {column.removeprefix('n_active_')}"
        elif column.startswith("freq_") and column != "freq_difference":
            names[column] = f"share, {column.removeprefix('freq_')}"
    return {**names, "freq_difference": "difference"}


def _coloured(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    parts = list(table.groupby("group", sort=False))
    return [(str(g), c, p) for (g, p), c in zip(parts, GROUP_COLOURS, strict=False)]


def _l0(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for group, colour, part in _coloured(table):
        figure.add_trace(
            go.Bar(
                x=part["n_active"],
                y=part["n_positions"] / part["n_positions"].sum(),
                customdata=part["n_positions"],
                name=group,
                marker={"color": colour},
                opacity=0.6,
                hovertemplate="%{x} active: %{customdata} positions<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title_text="active latents at a position (L0)")
    figure.update_yaxes(title_text="share of positions")
    return style(figure, 340)


def _values(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for group, colour, part in _coloured(table):
        figure.add_trace(
            go.Bar(
                x=(part["low"] + part["high"]) / 2,
                y=part["n"] / max(int(part["n"].sum()), 1),
                width=part["high"] - part["low"],
                customdata=part["n"],
                name=group,
                marker={"color": colour},
                opacity=0.6,
                hovertemplate="around %{x:.3g}: %{customdata}<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_xaxes(title_text="activation")
    figure.update_yaxes(title_text="share of activations", type="log")
    return style(figure, 340)


def _frequencies(counts: pd.DataFrame, names: list[str]) -> go.Figure:
    first, second = names
    figure = go.Figure()
    top = max(float(counts[[f"freq_{g}" for g in names]].max().max()), 1e-9) if len(counts) else 1.0
    span = [-0.03 * top, 1.05 * top]
    figure.add_shape(
        type="line", x0=0, y0=0, x1=top, y1=top, line={"color": QUIET, "dash": "dot", "width": 1}
    )
    figure.add_trace(
        go.Scatter(
            x=counts[f"freq_{second}"],
            y=counts[f"freq_{first}"],
            mode="markers",
            marker={"color": GROUP_COLOURS[0], "size": 6, "opacity": 0.6},
            text=counts["latent"],
            hovertemplate=f"latent %{{text}}<br>{first} %{{y:.2f}}, {second} %{{x:.2f}}"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=f"fires on {second} (share)", range=span)
    figure.update_yaxes(title_text=f"fires on {first} (share)", range=span)
    return style(figure, 420)


def _over_layers(groups: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for group, colour, part in _coloured(groups):
        bars = {
            "type": "data",
            "symmetric": False,
            "array": part["l0_ci_high"] - part["l0"],
            "arrayminus": part["l0"] - part["l0_ci_low"],
        }
        figure.add_trace(
            go.Scatter(
                x=part["layer"],
                y=part["l0"],
                mode="lines+markers",
                name=group,
                line={"color": colour},
                error_y=bars,
            )
        )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="L0", rangemode="tozero")
    return style(figure, 340)
