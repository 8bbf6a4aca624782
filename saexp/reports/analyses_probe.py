"""Page of analyzer=probe: few latents against the whole stream, on held-out rows."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saexp.reports.analyses_generic import Section, Table, cell, interval, shown, table_of
from saexp.reports.figures import GROUP_COLOURS, QUIET, style
from saexp.reports.saved import SavedRun
from saexp.wording import at_chance_words, counted

_DATA = {
    "train": "train split",
    "test": "test split",
    "unseen": "test split, kinds not trained on",
    "transfer": "second data set",
}
_MEASURES = {
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
}
_BASELINE = "majority"
"""A probe that ranks nothing: its accuracy is what the others' is compared with."""
_COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#E69F00", "#8a8f98")
"""Okabe and Ito's colours, safe for colour blindness."""


def name_of(probe: str) -> str:
    """A probe's name for reading."""
    if probe.startswith("sparse_"):
        k = probe.removeprefix("sparse_")
        return f"{k} latent{'' if k == '1' else 's'}, logistic"
    return {
        "dense": "all of the stream, logistic",
        "mean_difference": "difference of means",
        "best_latent": "best latent as it is",
        "best_latent_within": "best latent within kinds",
        "base_rate": "the kind of row alone",
        "surface": "surface baseline (text alone, no model)",
        "majority": "always the larger group",
    }.get(probe, probe)


def asked(run: SavedRun) -> str:
    """What the run was to find out."""
    first, second = run.groups
    return (
        f"How well do a few latents tell {first} from {second}, beside a probe on all of the "
        "stream? Latents, weights and penalties are chosen on the train split."
    )


def figures(run: SavedRun) -> dict[str, go.Figure]:
    """`probes`, `roc_test` and, with a second data set, `roc_transfer`."""
    table, curves = table_of(run, "probes"), table_of(run, "roc")
    found = {"probes": _probes(table)}
    for data, part in curves.groupby("data", sort=False):
        found[f"roc_{data}"] = _roc(part, table)
    return found


def sentences(run: SavedRun) -> list[str]:
    """Held-out AUROC of every probe, the best accuracy beside the baseline, and how it carries
    over."""
    table = table_of(run, "probes")
    lines = []
    for data in ("test", "unseen", "transfer"):
        mine = table[table["data"] == data]
        if mine.empty:
            continue
        parts = [
            f"{name_of(r['probe'])} {r['auroc']:.3f}"
            f"{interval(r['auroc_ci_low'], r['auroc_ci_high'])}"
            f"{at_chance_words(r['auroc'], r['auroc_p_holm'], run.unit_word)}"
            for r in mine.to_dict("records")
            if r["probe"] != _BASELINE
        ]
        units, rows = (int(run.metrics[f"probe/n_{of}_{data}"] or 0) for of in ("units", "rows"))
        lines.append(
            f"AUROC on the {_DATA[data]} ({counted(units, 'unit')}, {counted(rows, 'row')}): "
            f"{'; '.join(parts)}."
        )
        lines += _accuracy(mine)
    best = run.metrics["probe/best_latent"]
    return [*lines, f"The best latent by train AUROC is {best}."]


def _accuracy(rows: pd.DataFrame) -> list[str]:
    """The dense probe's accuracy beside that of always calling the larger group."""
    found = rows.set_index("probe")
    if not {"dense", _BASELINE} <= set(found.index):
        return []
    dense, always = found.loc["dense"], found.loc[_BASELINE]
    accuracy, balanced = (
        f"{dense[name]:.3f}{interval(dense[f'{name}_ci_low'], dense[f'{name}_ci_high'])}"
        for name in ("accuracy", "balanced_accuracy")
    )
    return [
        f"Accuracy of the probe on all of the stream there: {accuracy}, balanced {balanced}; "
        f"always calling the larger group: {always['accuracy']:.3f}, balanced "
        f"{always['balanced_accuracy']:.3f}."
    ]


def sections(run: SavedRun) -> list[Section]:
    """Every measure on every data set, curves, and the latents chosen."""
    table, latents = table_of(run, "probes"), table_of(run, "probe_latents")
    first, second = run.groups
    there = [d for d in _DATA if (table["data"] == d).any()]
    held_out = [d for d in there if d != "train"]
    curved = [d for d in held_out if d in set(table_of(run, "roc")["data"])]
    tables = [_numbers(table[table["data"] == d], d) for d in (*held_out, "train")]
    captions = [(f"roc_{d}", f"ROC curves on the {_DATA[d]}.") for d in curved]
    bars = (
        "AUROC of each probe with 95 % intervals by Newcombe's method 5, units being the sample "
        "size; each interval by itself. Whether a probe is above chance is decided by p-values "
        "after Holm over the probes."
    )
    columns = {
        "rank": "rank",
        "latent": "latent",
        f"mean_{first}": f"mean, {first}",
        f"mean_{second}": f"mean, {second}",
        "auroc": "AUROC alone (train)",
        "weight": "weight in the largest probe",
    }
    return [
        Section(
            "How well each probe does",
            f"Accuracy, balanced accuracy and F1 (of {first}) at the cut fitted on train: log odds "
            "of 0 for logistic probes, midway between the groups' means, best train accuracy for "
            "the single latent. Every unit of a group counts once. 95 % intervals with units as "
            "the sample size, too wide where a unit has several rows that differ: Newcombe's "
            "method 5 for AUROC, Wilson's for accuracy and, through TP / (TP + FP + FN), for F1, "
            "Newcombe's hybrid for balanced accuracy; none for fewer than 10 units of a group. C "
            "is the inverse penalty that cross-validation over units within train chose.",
            figures=[("probes", bars), *captions],
            tables=tables,
        ),
        Section(
            "The latents chosen",
            "By the largest difference of the groups' means on train; the probe of k latents has "
            "the first k. This rule prefers large activations and misses a latent that separates "
            "the groups at small values; the best latent by train AUROC shows whether there is "
            "one. Weights are per standard deviation.",
            tables=[shown(latents, columns=columns)],
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
    for number, label in enumerate(_MEASURES.values()):
        bounds = [] if data == "train" else [f"low{' ' * number}", f"high{' ' * number}"]
        head += [label, *bounds]
    return Table([*head, "C"], rows, f"On the {_DATA[data]}", folded=data == "train")


def _probes(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    shown_data = ("test", "unseen", "transfer")
    for data, colour in zip(shown_data, (*GROUP_COLOURS, _COLOURS[1]), strict=True):
        mine = table[(table["data"] == data) & (table["probe"] != _BASELINE)]
        if mine.empty:
            continue
        bars = {
            "type": "data",
            "symmetric": False,
            "array": mine["auroc_ci_high"] - mine["auroc"],
            "arrayminus": mine["auroc"] - mine["auroc_ci_low"],
        }
        figure.add_trace(
            go.Scatter(
                x=mine["auroc"],
                y=[name_of(p) for p in mine["probe"]],
                mode="markers",
                name=_DATA[data],
                marker={"color": colour, "size": 10},
                error_x=bars,
            )
        )
    figure.add_vline(x=0.5, line={"color": QUIET, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text="AUROC", range=[min(0.45, table["auroc"].min() - 0.05), 1.02])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return style(figure, 380)


def _roc(curves: pd.DataFrame, table: pd.DataFrame) -> go.Figure:
    figure = make_subplots(rows=1, cols=1)
    aurocs = table[table["data"] == curves["data"].iloc[0]].set_index("probe")["auroc"]
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, line={"color": QUIET, "dash": "dot", "width": 1}
    )
    curves = curves[curves["probe"] != _BASELINE]
    for number, (probe, part) in enumerate(curves.groupby("probe", sort=False)):
        figure.add_trace(
            go.Scatter(
                x=part["fpr"],
                y=part["tpr"],
                mode="lines",
                name=f"{name_of(str(probe))}: {aurocs[probe]:.3f}",
                line={"color": _COLOURS[number % len(_COLOURS)], "width": 2},
            )
        )
    figure.update_xaxes(title_text="false positive rate", range=[-0.02, 1.02])
    figure.update_yaxes(title_text="true positive rate", range=[-0.02, 1.02])
    return style(figure, 480, legend_below=True)
