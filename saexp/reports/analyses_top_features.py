"""Page of analyzer=top_features: the strongest latents of each layer, and texts shaded by them."""

import pandas as pd
import plotly.graph_objects as go

from saexp.reports.analyses_generic import Section, Strip, layers_of, shown, table_of
from saexp.reports.figures import style
from saexp.reports.saved import SavedRun

_BY = {"max": "maximum", "mean": "mean", "frequency": "frequency"}
_COLUMNS = {
    "rank": "rank",
    "latent": "latent",
    "max": "maximum",
    "token": "at token",
    "example": "of example",
    "mean": "mean",
    "frequency": "fires on (share of positions)",
    "background_freq": "fires on neutral text (share)",
}
N_TOKENS = 150
"""Tokens of a text that a strip shows."""
N_TEXTS = 2
"""Texts that are shown per latent."""
N_STRIPS = 10
"""Latents whose texts are shown per layer; fewer where there are many layers."""
_N_TOLD = 8


def asked(run: SavedRun) -> str:
    """What the run was to find out."""
    by = _BY[run.config["analyzer"]["by"]]
    return f"Which latents are largest by their {by} over the chosen positions, layer by layer?"


def figures(run: SavedRun) -> dict[str, go.Figure]:
    """`by_layer`, where there are several: each layer's leading latents."""
    table = table_of(run, "top_features")
    if len(layers_of(table)) < 2:
        return {}
    column = run.config["analyzer"]["by"]
    points = go.Scatter(
        x=table["layer"],
        y=table[column],
        mode="markers",
        marker={
            "size": 9,
            "opacity": 0.8,
            "color": table["background_freq"],
            "cmin": 0,
            "colorscale": "Viridis",
            "colorbar": {"title": {"text": "fires on<br>neutral text"}},
        },
        customdata=table[["latent", "token"]].to_numpy(),
        hovertemplate="layer %{x}, latent %{customdata[0]}: %{y:.3g} at '%{customdata[1]}'"
        "<extra></extra>",
    )
    figure = go.Figure(points)
    figure.update_xaxes(title_text="layer", dtick=1 if len(layers_of(table)) < 30 else None)
    figure.update_yaxes(title_text=_BY[column])
    return {"by_layer": style(figure, 380)}


def sentences(run: SavedRun) -> list[str]:
    """Per layer the leading latents."""
    table = table_of(run, "top_features")
    layers = layers_of(table)
    lines = []
    for layer in layers[:_N_TOLD]:
        mine = table[table["layer"] == layer]
        first = mine.iloc[0]
        names = ", ".join(map(str, mine["latent"].head(5)))
        lines.append(
            f"Layer {layer}: latents {names} lead; {first['latent']} reaches {first['max']:.2f} at "
            f"'{first['token']}' and fires on {first['frequency']:.0%} of the positions."
        )
    if len(layers) > _N_TOLD:
        lines.append(f"{len(layers) - _N_TOLD} more layers are in top_features.parquet.")
    return lines or ["No latent fires at any position."]


def sections(run: SavedRun) -> list[Section]:
    """All layers at a glance, then each layer with its texts."""
    table, tokens = table_of(run, "top_features"), table_of(run, "tokens")
    layers = layers_of(table)
    found = []
    if len(layers) > 1:
        caption = "The leading latents of each layer; the colour says how often they fire anyway."
        found.append(Section("Layer by layer", figures=[("by_layer", caption)]))
    n_strips = N_STRIPS if len(layers) <= 2 else 5 if len(layers) <= 8 else 2
    for layer in layers:
        mine = table[table["layer"] == layer]
        there = tokens[tokens["layer"] == layer]
        found.append(
            Section(
                f"Layer {layer}",
                "Shaded by the latent's value, full at its maximum here; only positions that were "
                "chosen are shown. All values are in tokens.parquet.",
                tables=[shown(mine, columns=_COLUMNS)],
                strips=[
                    strip
                    for latent in mine["latent"].head(n_strips)
                    for strip in _strips(there[there["latent"] == latent], int(latent))
                ],
            )
        )
    return found


def _strips(tokens: pd.DataFrame, latent: int) -> list[Strip]:
    """The texts in which the latent is strongest, around their strongest token."""
    top = float(tokens["value"].max()) if len(tokens) else 0.0
    strips = []
    for example, text in list(tokens.groupby("example", sort=False))[:N_TEXTS]:
        peak = int(text["value"].to_numpy().argmax())
        start = max(0, min(peak - N_TOKENS // 2, len(text) - N_TOKENS))
        part = text.iloc[start : start + N_TOKENS]
        cut = f", {len(part)} of {len(text)} positions" if len(part) < len(text) else ""
        shaded = [
            (str(t), max(0.0, float(v)) / top if top else 0.0, f"token {i}: {v:.3g}")
            for t, i, v in zip(part["token"], part["token_index"], part["value"], strict=True)
        ]
        label = f"latent {latent}, example {example}, maximum {text['value'].max():.2f}{cut}"
        strips.append(Strip(label, shaded))
    return strips
