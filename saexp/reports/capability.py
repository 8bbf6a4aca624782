"""Page of analyzer=capability: the model's answers without and with the SAE's reconstruction."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports.page import (
    GROUP_COLOURS,
    QUIET,
    AnalyzerPage,
    Finding,
    Section,
    Table,
    as_table,
    diagonal,
    metric_words,
    saved_table,
    style,
)
from saexp.reports.saved import SavedRun
from saexp.wording import counted

STATES = {"clean": "unchanged model", "sae": "with the reconstruction"}
_MEASURES = {
    "rank": "rank of the answer (1 has the largest logit)",
    "top1": "fraction of prompts whose answer has rank 1",
    "logit": "logit of the answer",
    "probability": "probability of the answer",
    "logit_difference": "logit of the answer minus the foil's",
}
_COLUMNS = {
    "example_id": "example",
    "prompt": "prompt",
    "answer_token": "answer",
    "rank_clean": "rank",
    "rank_sae": "rank, SAE",
    "probability_clean": "probability",
    "probability_sae": "probability, SAE",
    "logit_clean": "logit",
    "logit_sae": "logit, SAE",
    "foil_token": "foil",
    "logit_difference_clean": "logit minus foil's",
    "logit_difference_sae": "logit minus foil's, SAE",
}
N_LISTS = 5
"""Prompts whose most probable tokens are shown."""


def _question(_: SavedRun) -> str:
    return (
        "Does the model know the answers, and does it still if the activation at the SAE's "
        "hookpoint is replaced by the SAE's reconstruction? Special tokens keep their own "
        "activations. The first token of the answer counts."
    )


def _figures(run: SavedRun) -> dict[str, go.Figure]:
    """`best_tokens` of the first prompt; of several prompts `answers` as well."""
    prompts, tops = saved_table(run, "prompts"), saved_table(run, "top_tokens")
    figures = {"best_tokens": _best_tokens(prompts, tops)}
    if len(prompts) > 1:
        figures["answers"] = _answers(prompts)
    return figures


def _findings(run: SavedRun) -> list[Finding]:
    """How often the answer has rank 1, without and with the reconstruction."""
    prompts = saved_table(run, "prompts")
    if len(prompts) == 1:
        row = prompts.iloc[0]
        figure = ("best_tokens", f"After '{_short(row['prompt'])}'.")
        sentence = (
            f"After '{_short(row['prompt'])}', '{row['answer_token']}' has rank "
            f"{row['rank_clean']} (probability {row['probability_clean']:.3f}, logit "
            f"{row['logit_clean']:.2f}); with the SAE's reconstruction it has rank "
            f"{row['rank_sae']} (probability {row['probability_sae']:.3f}, logit "
            f"{row['logit_sae']:.2f})."
        )
        return [Finding(sentence, [figure])]
    figure = ("answers", "One point per prompt: with the reconstruction against without it.")
    sentence = (
        "The answer's first token has the largest logit on a fraction "
        f"{metric_words(run, 'capability/top1_clean')} of {_prompts_words(run)}, and with the "
        f"SAE's reconstruction on {metric_words(run, 'capability/top1_sae')}."
    )
    return [Finding(sentence, [figure])]


def _sentences(run: SavedRun) -> list[str]:
    """Changes and logit differences, in numbers."""
    prompts, m = saved_table(run, "prompts"), run.metrics
    if len(prompts) == 1:
        row = prompts.iloc[0]
        if pd.isna(row["logit_difference_clean"]):
            return []
        return [
            f"Its logit minus that of '{row['foil_token']}' is "
            f"{row['logit_difference_clean']:.2f}, and {row['logit_difference_sae']:.2f} with the "
            "reconstruction."
        ]
    sentences = [
        "The fraction with the answer first changes by "
        f"{metric_words(run, 'capability/top1_change')}; mean probability of the answer "
        f"{metric_words(run, 'capability/probability_clean')} -> "
        f"{metric_words(run, 'capability/probability_sae')}."
    ]
    if "capability/logit_difference_clean" in m:
        n = int(prompts["logit_difference_clean"].notna().sum())
        sentences.append(
            f"Logit of the answer minus the foil's, {counted(n, 'prompt')}: "
            f"{metric_words(run, 'capability/logit_difference_clean', 2)} -> "
            f"{metric_words(run, 'capability/logit_difference_sae', 2)} (change "
            f"{metric_words(run, 'capability/logit_difference_change', 2)})."
        )
    return sentences


def _prompts_words(run: SavedRun) -> str:
    n_prompts, n_units = (
        int(run.metrics[f"capability/n_{of}"] or 0) for of in ("prompts", "units")
    )
    of = "" if n_units == n_prompts else f" of {counted(n_units, 'entity', 'entities')}"
    return f"{counted(n_prompts, 'prompt')}{of}"


def _sections(run: SavedRun) -> list[Section]:
    """Means over prompts, the most probable tokens, and every prompt."""
    prompts, tops = saved_table(run, "prompts"), saved_table(run, "top_tokens")
    sections = []
    figures = []
    if len(prompts) > 1:
        sections.append(
            Section(
                "On average",
                "Means over entities, an entity's prompts averaged first; prompts without an "
                "entity count as one each. The change is the value with the reconstruction minus "
                "the one without, prompt by prompt. Low and high are limits of 95 % intervals "
                "over entities, each on its own: Wilson's for the fraction with the answer first, "
                "Newcombe's paired interval for its change, the studentised bootstrap for the "
                "others (none for fewer than 10 entities).",
                tables=[_summary(run)],
            )
        )
        figures = [("best_tokens", f"After '{_short(prompts['prompt'].iloc[0])}'.")]
    lists = [_token_table(row, tops) for row in prompts.head(N_LISTS).to_dict("records")]
    text = "All lists are in top_tokens.parquet."
    sections.append(Section("The most probable tokens", text, figures=figures, tables=lists))
    text = (
        "Columns with SAE are measured with the reconstruction. All prompts are in prompts.parquet."
    )
    tables = [as_table(prompts, columns=_COLUMNS)]
    return [*sections, Section("Prompt by prompt", text, tables=tables)]


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 90 else f"…{prompt[-90:]}"


def _summary(run: SavedRun) -> Table:
    table = saved_table(run, "capability")
    states = {**STATES, "change": "change"}
    columns = ("n", "n_units", "mean", "ci_low", "ci_high")
    rows = [
        [_MEASURES[r["measure"]], states[r["state"]], *(r[c] for c in columns)]
        for r in table.to_dict("records")
    ]
    return Table(["measure", "state", "prompts", "entities", "mean", "low", "high"], rows)


def _token_table(row: Mapping[Any, Any], tops: pd.DataFrame) -> Table:
    """The most probable tokens after a prompt, without and with the reconstruction."""
    of_prompt = tops[tops["example_id"] == row["example_id"]]
    states = [of_prompt[of_prompt["state"] == state].to_dict("records") for state in STATES]
    rows = []
    for pair in zip(*states, strict=True):
        cells = [[repr(t["token"]), t["logit"], t["probability"]] for t in pair]
        rows.append([pair[0]["rank"], *cells[0], *cells[1]])
    head = ["rank", "token", "logit", "probability", "token, SAE", "logit, SAE", "probability, SAE"]
    return Table(head, rows, f"{row['example_id']}: {_short(str(row['prompt']))}", folded=True)


def _best_tokens(prompts: pd.DataFrame, tops: pd.DataFrame) -> go.Figure:
    """Probabilities of the most probable tokens after the first prompt."""
    row = prompts.iloc[0]
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(STATES.values()))
    for column, state in enumerate(STATES, start=1):
        rows = tops[(tops["example_id"] == row["example_id"]) & (tops["state"] == state)]
        colours = [
            GROUP_COLOURS[0] if a else GROUP_COLOURS[1] if f else QUIET
            for a, f in zip(rows["is_answer"], rows["is_foil"], strict=True)
        ]
        bar = go.Bar(
            x=rows["probability"],
            y=rows["rank"],
            text=[repr(t) for t in rows["token"]],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            marker={"color": colours},
            showlegend=False,
            hovertemplate="%{text}: %{x:.4f}<extra></extra>",
        )
        figure.add_trace(bar, row=1, col=column)
    figure.update_xaxes(title="probability (answer blue, foil red)", range=[0, 1.3])
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(title="rank", col=1)
    return style(figure, 360)


def _answers(prompts: pd.DataFrame) -> go.Figure:
    """Probability, and with foils the logit difference, with against without reconstruction."""
    panels = {"probability": "probability of the answer"}
    if prompts["logit_difference_clean"].notna().any():
        panels["logit_difference"] = "logit minus the foil's"
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels.values()))
    for column, name in enumerate(panels, start=1):
        x, y = prompts[f"{name}_clean"], prompts[f"{name}_sae"]
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        points = go.Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={"color": GROUP_COLOURS[0], "size": 6, "opacity": 0.6},
            text=prompts["example_id"],
            hovertemplate="example %{text}: %{x:.3f} -> %{y:.3f}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(diagonal(low, high), row=1, col=column)
        figure.add_trace(points, row=1, col=column)
    figure.update_xaxes(title=STATES["clean"])
    figure.update_yaxes(title=STATES["sae"])
    return style(figure, 400)


CAPABILITY = AnalyzerPage(_question, _findings, _sentences, _figures, _sections)
