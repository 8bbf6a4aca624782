"""Page of analyzer=capability: what the model answers before and after the SAE is spliced in."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports.analyses_generic import Section, Table, cell, shown, table_of, told
from saexp.reports.figures import GROUP_COLOURS, QUIET, style
from saexp.reports.saved import SavedRun
from saexp.wording import counted

STATES = {"clean": "the model as it is", "sae": "through the SAE"}
_MEASURES = {
    "rank": "rank of the answer (1 has the largest logit)",
    "top1": "share of prompts with the answer first",
    "logit": "logit of the answer",
    "probability": "probability of the answer",
    "logit_difference": "logit of the answer less the foil's",
}
_COLUMNS = {
    "example_id": "example",
    "prompt": "prompt",
    "answer_token": "answer",
    "rank_clean": "rank",
    "rank_sae": "… SAE",
    "probability_clean": "probability",
    "probability_sae": "… SAE ",
    "logit_clean": "logit",
    "logit_sae": "… SAE  ",
    "foil_token": "foil",
    "logit_difference_clean": "less the foil's",
    "logit_difference_sae": "… SAE   ",
}
N_LISTS = 5
"""Prompts whose best tokens are shown."""


def asked(_: SavedRun) -> str:
    """What the run was to find out."""
    return (
        "Does the model know the answers, and does it still when the stream at the SAE's hookpoint "
        "is replaced by the SAE's reconstruction? Special tokens keep their own activations. The "
        "first token of the answer counts."
    )


def figures(run: SavedRun) -> dict[str, go.Figure]:
    """`best_tokens` of the first prompt; of several prompts, `answers` as well."""
    prompts, tops = table_of(run, "prompts"), table_of(run, "top_tokens")
    found = {"best_tokens": _best_tokens(prompts, tops)}
    if len(prompts) > 1:
        found["answers"] = _answers(prompts)
    return found


def sentences(run: SavedRun) -> list[str]:
    """How often and how surely the answer comes first, before and after."""
    prompts, m = table_of(run, "prompts"), run.metrics
    if len(prompts) == 1:
        row = prompts.iloc[0]
        lines = [
            f"'{row['answer_token']}' after '{_short(row['prompt'])}': rank {row['rank_clean']} "
            f"(logit {row['logit_clean']:.2f}, probability {row['probability_clean']:.3f}), "
            f"through the SAE rank {row['rank_sae']} (logit {row['logit_sae']:.2f}, probability "
            f"{row['probability_sae']:.3f}); rank 1 has the largest logit."
        ]
        if pd.notna(row["logit_difference_clean"]):
            lines.append(
                f"Its logit less that of '{row['foil_token']}': "
                f"{row['logit_difference_clean']:.2f}, through the SAE "
                f"{row['logit_difference_sae']:.2f}."
            )
        return lines
    lines = [
        f"On {_asked_of(run)} the answer's first token has the largest logit on a share of "
        f"{told(run, 'capability/top1_clean')}, through the SAE on "
        f"{told(run, 'capability/top1_sae')} (change {told(run, 'capability/top1_change')}); "
        f"mean probability {told(run, 'capability/probability_clean')} -> "
        f"{told(run, 'capability/probability_sae')}."
    ]
    if "capability/logit_difference_clean" in m:
        n = int(prompts["logit_difference_clean"].notna().sum())
        lines.append(
            f"Logit of the answer less the foil's, {n:,} prompts: "
            f"{told(run, 'capability/logit_difference_clean', 2)} -> "
            f"{told(run, 'capability/logit_difference_sae', 2)} (change "
            f"{told(run, 'capability/logit_difference_change', 2)})."
        )
    return lines


def _asked_of(run: SavedRun) -> str:
    prompts, units = (int(run.metrics[f"capability/n_{of}"] or 0) for of in ("prompts", "units"))
    of = "" if units == prompts else f" of {counted(units, 'entity', 'entities')}"
    return f"{counted(prompts, 'prompt')}{of}"


def sections(run: SavedRun) -> list[Section]:
    """On average, prompt by prompt, and the best tokens."""
    prompts, tops = table_of(run, "prompts"), table_of(run, "top_tokens")
    found = []
    if len(prompts) > 1:
        found.append(
            Section(
                "On average",
                "Means over entities (prompts that have none count as one each), an entity's "
                "prompts averaged first; change is through the SAE less without, prompt by prompt. "
                "95 % intervals over entities, each by itself: Wilson's for the share with the "
                "answer first, Newcombe's paired interval for its change, the studentised "
                "bootstrap for the others (none for fewer than 10 entities).",
                figures=[("answers", "One point per prompt: without the SAE against with it.")],
                tables=[_summary(run)],
            )
        )
    first = _short(prompts["prompt"].iloc[0])
    lists = [_list(row, tops) for row in prompts.head(N_LISTS).to_dict("records")]
    found.append(
        Section(
            "The best tokens",
            "All lists are in top_tokens.parquet.",
            figures=[("best_tokens", f"After '{first}'.")],
            tables=lists,
        )
    )
    found.append(
        Section(
            "Prompt by prompt",
            "Beside each number its twin through the SAE. All prompts are in prompts.parquet.",
            tables=[shown(prompts, columns=_COLUMNS)],
        )
    )
    return found


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 90 else f"…{prompt[-90:]}"


def _summary(run: SavedRun) -> Table:
    table = table_of(run, "capability")
    names = {**STATES, "change": "change"}
    rows = [
        [
            _MEASURES[r["measure"]],
            names[r["state"]],
            *(cell(r[c]) for c in ("n", "n_units", "mean")),
        ]
        + [cell(r["ci_low"]), cell(r["ci_high"])]
        for r in table.to_dict("records")
    ]
    return Table(["measure", "", "prompts", "entities", "mean", "low", "high"], rows)


def _list(row: Mapping[Any, Any], tops: pd.DataFrame) -> Table:
    """The best tokens of a prompt, before and after side by side."""
    mine = tops[tops["example_id"] == row["example_id"]]
    sides = [mine[mine["state"] == state] for state in STATES]
    rows = []
    for a, b in zip(*(side.to_dict("records") for side in sides), strict=True):
        pair = [[repr(s["token"]), cell(s["logit"]), cell(s["probability"])] for s in (a, b)]
        rows.append([cell(a["rank"]), *pair[0], *pair[1]])
    head = ["rank", "token", "logit", "probability", "through the SAE", "logit ", "probability "]
    return Table(head, rows, f"{row['example_id']}: {_short(str(row['prompt']))}", folded=True)


def _best_tokens(prompts: pd.DataFrame, tops: pd.DataFrame) -> go.Figure:
    """Probabilities of the first prompt's best tokens, before and after."""
    row = prompts.iloc[0]
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(STATES.values()))
    for column, state in enumerate(STATES, start=1):
        mine = tops[(tops["example_id"] == row["example_id"]) & (tops["state"] == state)]
        marks = [
            GROUP_COLOURS[0] if a else GROUP_COLOURS[1] if f else QUIET
            for a, f in zip(mine["is_answer"], mine["is_foil"], strict=True)
        ]
        bar = go.Bar(
            x=mine["probability"],
            y=mine["rank"],
            text=[repr(t) for t in mine["token"]],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            marker={"color": marks},
            showlegend=False,
            hovertemplate="%{text}: %{x:.4f}<extra></extra>",
        )
        figure.add_trace(bar, row=1, col=column)
    figure.update_xaxes(title_text="probability (answer blue, foil red)", range=[0, 1.3])
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(title_text="rank", col=1)
    return style(figure, 360)


def _answers(prompts: pd.DataFrame) -> go.Figure:
    """Probability, and where there are foils the logit difference, with against without the SAE."""
    panels = {"probability": "probability of the answer"}
    if prompts["logit_difference_clean"].notna().any():
        panels["logit_difference"] = "logit less the foil's"
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels.values()))
    for column, name in enumerate(panels, start=1):
        x, y = prompts[f"{name}_clean"], prompts[f"{name}_sae"]
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        line = go.Scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            line={"color": QUIET, "dash": "dot", "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
        points = go.Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"color": GROUP_COLOURS[0], "size": 6, "opacity": 0.6},
            text=prompts["example_id"],
            hovertemplate="example %{text}: %{x:.3f} -> %{y:.3f}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(line, row=1, col=column)
        figure.add_trace(points, row=1, col=column)
    figure.update_xaxes(title_text=STATES["clean"])
    figure.update_yaxes(title_text=STATES["sae"])
    return style(figure, 400)
