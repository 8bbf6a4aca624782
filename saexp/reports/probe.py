"""Page of analyzer=probe: probes on a few latents against one on the whole stream."""

import pandas as pd
import plotly.graph_objects as go

from saexp.reports.page import (
    CHANCE_LINE,
    GROUP_COLOURS,
    PALETTE,
    AnalyzerPage,
    Finding,
    Section,
    Table,
    as_table,
    cell,
    diagonal,
    error_bars,
    interval_words,
    saved_table,
    style,
)
from saexp.reports.saved import SavedRun
from saexp.wording import at_chance_words, counted

_DATA = {
    "train": "train split",
    "test": "test split",
    "unseen": "test split, strata not in training",
    "transfer": "second data set",
}
_MEASURES = {
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
    }.get(probe, probe)


def _question(run: SavedRun) -> str:
    first, second = run.groups
    return (
        f"How well do a few latents distinguish {first} from {second}, compared with a probe on "
        "the whole stream? Latents, weights and penalties are chosen on the train split."
    )


def _findings(run: SavedRun) -> list[Finding]:
    """How close the best probe on latents comes to the one on the whole stream."""
    rows = saved_table(run, "probes")
    rows = rows[rows["data"] == "test"].set_index("probe")
    first, second = run.groups
    sparse = rows[[str(p).startswith("sparse_") for p in rows.index]]
    if sparse.empty or "dense" not in rows.index:
        return [Finding(s) for s in _sentences(run)[:1]]
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
    caption = "Held-out AUROC of every probe with 95 % intervals; the dotted line is chance."
    return [Finding(f"{sentence}.", [("probes", caption)])]


def _figures(run: SavedRun) -> dict[str, go.Figure]:
    """`probes`, `roc_test` and, with a second data set, `roc_transfer`."""
    table, curves = saved_table(run, "probes"), saved_table(run, "roc")
    figures = {"probes": _probes(table)}
    for data, part in curves.groupby("data", sort=False):
        figures[f"roc_{data}"] = _roc(part, table)
    return figures


def _sentences(run: SavedRun) -> list[str]:
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


def _sections(run: SavedRun) -> list[Section]:
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
            "cross-validation over units within train.",
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
    for record in table.to_dict("records"):
        cells = [name_of(record["probe"])]
        for measure in _MEASURES:
            cells.append(cell(record[measure]))
            if data != "train":
                cells += [cell(record[f"{measure}_ci_{side}"]) for side in ("low", "high")]
        rows.append([*cells, cell(record["c"])])
    head = ["probe"]
    for label in _MEASURES.values():
        head += [label] if data == "train" else [label, "low", "high"]
    return Table([*head, "C"], rows, f"On the {_DATA[data]}", folded=data == "train")


def _probes(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    held_out = ("test", "unseen", "transfer")
    for data, colour in zip(held_out, (*GROUP_COLOURS, PALETTE[2]), strict=True):
        rows = table[(table["data"] == data) & (table["probe"] != _BASELINE)]
        if rows.empty:
            continue
        figure.add_trace(
            go.Scatter(
                x=rows["auroc"],
                y=[name_of(p) for p in rows["probe"]],
                mode="markers",
                name=_DATA[data],
                marker={"color": colour, "size": 10},
                error_x=error_bars(rows["auroc"], rows["auroc_ci_low"], rows["auroc_ci_high"]),
                showlegend=True,
            )
        )
    figure.add_vline(x=0.5, line=CHANCE_LINE)
    figure.update_xaxes(title="AUROC", range=[min(0.45, table["auroc"].min() - 0.05), 1.02])
    figure.update_yaxes(title="probe", autorange="reversed")
    return style(figure, 380)


def _roc(curves: pd.DataFrame, table: pd.DataFrame) -> go.Figure:
    aurocs = table[table["data"] == curves["data"].iloc[0]].set_index("probe")["auroc"]
    figure = go.Figure(diagonal(0, 1))
    curves = curves[curves["probe"] != _BASELINE]
    for index, (probe, part) in enumerate(curves.groupby("probe", sort=False)):
        figure.add_trace(
            go.Scatter(
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


PROBE = AnalyzerPage(_question, _findings, _sentences, _figures, _sections)
