"""Pages of analyzer=probe and analyzer=capability."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from saexp.errors import counted
from saexp.reports import (
    CHANCE_LINE,
    GROUP_COLOURS,
    PALETTE,
    QUIET,
    AnalyzerPage,
    Chart,
    Finding,
    Section,
    Table,
    as_table,
    bar,
    cell,
    diagonal,
    error_bars,
    interval_words,
    metric_words,
    saved_table,
    scatter,
    style,
)
from saexp.reports.saved_run import SavedRun
from saexp.results import at_chance_words, p_value_words

_DATA = {
    "train": "train split",
    "test": "test split",
    "unseen": "test split, strata not in training",
    "transfer": "second data set",
}
_PROBE_MEASURES = {
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
}
_BASELINE = "majority"
"""The probe whose accuracy is the baseline of the others; it ranks nothing."""


def name_of(probe: str) -> str:
    """A probe's name for reading."""
    if probe.startswith("sparse_"):
        k = probe.removeprefix("sparse_")
        return f"{k} latent{'' if k == '1' else 's'}, logistic"
    return {
        "dense": "whole stream, logistic",
        "mean_difference": "difference of means",
        "best_latent": "best latent, unscaled",
        "best_latent_within": "best latent within strata",
        "base_rate": "stratum alone",
        "surface": "surface baseline (text alone, no model)",
        "majority": "always the larger group",
        "null": "whole stream, labels permuted",
    }.get(probe, probe)


def _probe_question(run: SavedRun) -> str:
    first, second = run.groups
    return (
        f"How well do a few latents distinguish {first} from {second}, compared with a probe on "
        "the whole stream? Latents, weights and penalties are chosen on the train split."
    )


def _probe_findings(run: SavedRun) -> list[Finding]:
    """How close the best probe on latents comes to the one on the whole stream."""
    rows = saved_table(run, "probes")
    rows = rows[rows["data"] == "test"].set_index("probe")
    first, second = run.groups
    sparse = rows[[str(p).startswith("sparse_") for p in rows.index]]
    if sparse.empty or "dense" not in rows.index:
        return [Finding(s) for s in _probe_sentences(run)[:1]]
    best = str(sparse["auroc"].astype(float).idxmax())
    probes = [(name_of(best), rows.loc[best]), ("the whole stream", rows.loc["dense"])]
    words = [
        f"a probe on {name.removesuffix(', logistic')} has AUROC {row['auroc']:.3f}"
        f"{interval_words(row['auroc_ci_low'], row['auroc_ci_high'])}"
        for name, row in probes
    ]
    sentence = f"On held-out data {words[0]} for {first} against {second}, and {words[1]}"
    if "surface" in rows.index:
        surface = rows.loc["surface"]
        limits = interval_words(surface["auroc_ci_low"], surface["auroc_ci_high"])
        sentence += f"; the text alone, without the model, gives {surface['auroc']:.3f}{limits}"
        sentence += "".join(_above_surface(name, row.to_dict()) for name, row in probes)
    caption = "Held-out AUROC of every probe with 95 % intervals; the dotted line is chance."
    return [Finding(f"{sentence}.", [("probes", caption)])]


def _above_surface(name: str, row: Mapping[Any, Any]) -> str:
    """A clause on a probe's AUROC less the surface baseline's; empty where it is not measured."""
    difference, p_value = (row.get(f"minus_surface{end}") for end in ("", "_p_holm"))
    if difference is None or pd.isna(difference):
        return ""
    limits = interval_words(row["minus_surface_ci_low"], row["minus_surface_ci_high"])
    tested = ""
    if p_value is not None and not pd.isna(p_value):
        tested = f" (paired test: p {p_value_words(p_value)}, Holm)"
    name = name.removesuffix(", logistic")
    return f"; {name} minus the text alone: {difference:+.3f}{limits}{tested}"


def _probe_figures(run: SavedRun) -> dict[str, go.Figure]:
    """`probes`, `roc_test` and, with a second data set, `roc_transfer`."""
    table, curves = saved_table(run, "probes"), saved_table(run, "roc")
    figures = {"probes": _probes(table)}
    for data, part in curves.groupby("data", sort=False):
        figures[f"roc_{data}"] = _roc(part, table)
    return figures


def _probe_sentences(run: SavedRun) -> list[str]:
    """AUROC of every probe and accuracy of the dense one, on each held-out data set."""
    table = saved_table(run, "probes")
    sentences = []
    for data in ("test", "unseen", "transfer"):
        rows = table[table["data"] == data]
        if rows.empty:
            continue
        parts = [
            f"{name_of(r['probe'])} {r['auroc']:.3f}"
            f"{interval_words(r['auroc_ci_low'], r['auroc_ci_high'])}"
            f"{at_chance_words(r['auroc'], r['auroc_p_holm'], run.unit_word)}"
            for r in rows.to_dict("records")
            if r["probe"] != _BASELINE
        ]
        n_units, n_rows = (
            int(run.metrics[f"probe/n_{of}_{data}"] or 0) for of in ("units", "rows")
        )
        sentences.append(
            f"AUROC on the {_DATA[data]} ({counted(n_units, 'unit')}, {counted(n_rows, 'row')}): "
            f"{'; '.join(parts)}."
        )
        sentences += _accuracy(rows)
    best = run.metrics["probe/best_latent"]
    return [*sentences, f"The best latent by train AUROC is {best}."]


def _accuracy(rows: pd.DataFrame) -> list[str]:
    """The dense probe's accuracy and that of always predicting the larger group."""
    by_probe = rows.set_index("probe")
    if not {"dense", _BASELINE} <= set(by_probe.index):
        return []
    dense, always = by_probe.loc["dense"], by_probe.loc[_BASELINE]
    accuracy, balanced = (
        f"{dense[name]:.3f}{interval_words(dense[f'{name}_ci_low'], dense[f'{name}_ci_high'])}"
        for name in ("accuracy", "balanced_accuracy")
    )
    return [
        f"Accuracy of the probe on the whole stream there: {accuracy}, balanced {balanced}; of "
        f"always predicting the larger group: {always['accuracy']:.3f}, balanced "
        f"{always['balanced_accuracy']:.3f}."
    ]


def _probe_sections(run: SavedRun) -> list[Section]:
    """Every measure on every data set, ROC curves, and the latents chosen."""
    table, latents = saved_table(run, "probes"), saved_table(run, "probe_latents")
    first, second = run.groups
    held_out = [d for d in _DATA if d != "train" and (table["data"] == d).any()]
    curved = [d for d in held_out if d in set(saved_table(run, "roc")["data"])]
    tables = [_numbers(table[table["data"] == d], d) for d in (*held_out, "train")]
    captions = [(f"roc_{d}", f"ROC curves on the {_DATA[d]}.") for d in curved]
    columns = {
        "rank": "rank",
        "latent": "latent",
        f"mean_{first}": f"mean, {first}",
        f"mean_{second}": f"mean, {second}",
        "auroc": "AUROC of the latent alone (train)",
        "weight": "weight in the largest probe",
    }
    return [
        Section(
            "Performance of each probe",
            "AUROC: 0.5 is chance, 1 is perfect; whether a probe is above chance is decided by "
            "p-values after Holm over the probes. Accuracy, balanced accuracy and F1 (of "
            f"{first}) use the threshold fitted on train: log odds of 0 for logistic probes, the "
            "midpoint of the groups' means for the difference of means, the best train accuracy "
            "for the single latent. Every unit of a group counts once. Low and high are limits of "
            "95 % intervals, each on its own, with units as the sample size (too wide if a unit "
            "has several rows that differ): Newcombe's method 5 for AUROC, Wilson's for accuracy "
            "and, through TP / (TP + FP + FN), for F1, Newcombe's hybrid for balanced accuracy; "
            "none for fewer than 10 units of a group. C is the inverse penalty chosen by "
            "cross-validation over units within train. AUROCs compare entities of all types; a "
            "contrast compares entities of the same type, so that with several types the surface "
            "baseline has another AUROC there. For permuted labels (analyzer.placebo) AUROC is the "
            "mean over permutations, and low and high are the range of 95% of them.",
            figures=captions,
            tables=tables,
        ),
        Section(
            "The latents chosen",
            "Ordered by the difference of the groups' means on train; a probe on k latents uses "
            "the first k. This rule prefers large activations and misses a latent that separates "
            "the groups at small values; the best latent by train AUROC shows whether there is "
            "one. Weights are per standard deviation.",
            tables=[as_table(latents, columns=columns)],
        ),
    ]


def _numbers(table: pd.DataFrame, data: str) -> Table:
    rows = []
    above = data != "train" and "minus_surface" in table
    for record in table.to_dict("records"):
        cells = [name_of(record["probe"])]
        for measure in _PROBE_MEASURES:
            cells.append(cell(record[measure]))
            if data != "train":
                cells += [cell(record[f"{measure}_ci_{side}"]) for side in ("low", "high")]
        if above:
            columns = ("", "_ci_low", "_ci_high", "_p_holm")
            cells += [cell(record[f"minus_surface{end}"]) for end in columns]
        rows.append([*cells, cell(record["c"])])
    head = ["probe"]
    for label in _PROBE_MEASURES.values():
        head += [label] if data == "train" else [label, "low", "high"]
    if above:
        head += ["AUROC minus surface", "low", "high", "p (Holm)"]
    return Table([*head, "C"], rows, f"On the {_DATA[data]}", folded=data == "train")


def _probes(table: pd.DataFrame) -> go.Figure:
    figure = Chart()
    held_out = ("test", "unseen", "transfer")
    for data, colour in zip(held_out, (*GROUP_COLOURS, PALETTE[2]), strict=True):
        rows = table[(table["data"] == data) & (table["probe"] != _BASELINE)]
        if rows.empty:
            continue
        figure.add_trace(
            scatter(
                x=rows["auroc"],
                y=[name_of(p) for p in rows["probe"]],
                mode="markers",
                name=_DATA[data],
                marker={"color": colour, "size": 10},
                error_x=error_bars(rows["auroc"], rows["auroc_ci_low"], rows["auroc_ci_high"]),
                showlegend=True,
            )
        )
    chance = {"type": "line", "x0": 0.5, "x1": 0.5, "xref": "x", "y0": 0, "y1": 1}
    figure.update_layout(shapes=[{**chance, "yref": "y domain", "line": CHANCE_LINE}])
    figure.update_xaxes(title="AUROC", range=[min(0.45, table["auroc"].min() - 0.05), 1.02])
    figure.update_yaxes(title="probe", autorange="reversed")
    return style(figure, 380)


def _roc(curves: pd.DataFrame, table: pd.DataFrame) -> go.Figure:
    aurocs = table[table["data"] == curves["data"].iloc[0]].set_index("probe")["auroc"]
    figure = Chart(diagonal(0, 1))
    curves = curves[curves["probe"] != _BASELINE]
    for index, (probe, part) in enumerate(curves.groupby("probe", sort=False)):
        figure.add_trace(
            scatter(
                x=part["fpr"],
                y=part["tpr"],
                mode="lines",
                name=f"{name_of(str(probe))}: AUROC {aurocs[probe]:.3f}",
                line={"color": PALETTE[index % len(PALETTE)], "width": 2},
            )
        )
    figure.update_xaxes(title="false positive rate", range=[-0.02, 1.02])
    figure.update_yaxes(title="true positive rate", range=[-0.02, 1.02])
    return style(figure, 520, legend_below=True)


PROBE = AnalyzerPage(
    _probe_question, _probe_findings, _probe_sentences, _probe_figures, _probe_sections
)


STATES = {"clean": "unchanged model", "sae": "with the reconstruction"}
_CAPABILITY_MEASURES = {
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


def _capability_question(_: SavedRun) -> str:
    return (
        "Does the model know the answers, and does it still if the activation at the SAE's "
        "hookpoint is replaced by the SAE's reconstruction? Special tokens keep their own "
        "activations. The first token of the answer counts."
    )


def _capability_figures(run: SavedRun) -> dict[str, go.Figure]:
    """`best_tokens` of the first prompt; of several prompts `answers` as well."""
    prompts, tops = saved_table(run, "prompts"), saved_table(run, "top_tokens")
    figures = {"best_tokens": _best_tokens(prompts, tops)}
    if len(prompts) > 1:
        figures["answers"] = _answers(prompts)
    return figures


def _capability_findings(run: SavedRun) -> list[Finding]:
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


def _capability_sentences(run: SavedRun) -> list[str]:
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


def _capability_sections(run: SavedRun) -> list[Section]:
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
        [_CAPABILITY_MEASURES[r["measure"]], states[r["state"]], *(r[c] for c in columns)]
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
    figure = Chart.with_panels(1, 2, list(STATES.values()))
    for column, state in enumerate(STATES, start=1):
        rows = tops[(tops["example_id"] == row["example_id"]) & (tops["state"] == state)]
        colours = [
            GROUP_COLOURS[0] if a else GROUP_COLOURS[1] if f else QUIET
            for a, f in zip(rows["is_answer"], rows["is_foil"], strict=True)
        ]
        bars = bar(
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
        figure.add_trace(bars, row=1, col=column)
    figure.update_xaxes(title="probability (answer blue, foil red)", range=[0, 1.3])
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(title="rank", col=1)
    return style(figure, 360)


def _answers(prompts: pd.DataFrame) -> go.Figure:
    """Probability, and with foils the logit difference, with against without reconstruction."""
    panels = {"probability": "probability of the answer"}
    if prompts["logit_difference_clean"].notna().any():
        panels["logit_difference"] = "logit minus the foil's"
    figure = Chart.with_panels(1, len(panels), list(panels.values()))
    for column, name in enumerate(panels, start=1):
        x, y = prompts[f"{name}_clean"], prompts[f"{name}_sae"]
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        points = scatter(
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


CAPABILITY = AnalyzerPage(
    _capability_question,
    _capability_findings,
    _capability_sentences,
    _capability_figures,
    _capability_sections,
)
