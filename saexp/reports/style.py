"""The common style of all figures: colours, fonts, and no background of their own."""

from typing import Any

import plotly.graph_objects as go

GROUP_COLOURS = ("#0072B2", "#D55E00")
"""First and second group: blue and vermillion of Okabe and Ito, safe for colour blindness."""
QUIET = "#8a8f98"
"""Controls and everything that is not selected."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def style(figure: go.Figure, height: int, *, legend_below: bool = False) -> go.Figure:
    """One look for all: no background of its own, so that pages can be light or dark."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 55},
        font={"family": _FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"family": _FONT}},
    )
    grid: dict[str, Any] = {
        "gridcolor": "rgba(128,128,128,.25)",
        "zerolinecolor": "rgba(128,128,128,.45)",
    }
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    if legend_below:
        # Where panels have titles of their own, the legend would cover them.
        figure.update_layout(legend={"y": -0.18, "yanchor": "top"}, margin={"b": 110})
    return figure


def see_through(colour: str, share: float) -> str:
    """The colour `#rrggbb` at this opacity; a legend shows it too, as it does no trace's own."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share:.2g})"
