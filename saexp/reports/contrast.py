"""Page of analyzer=contrast: the latents that separate two groups, and what changing them does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pyarrow import ArrowException

from saexp.errors import brief, counted
from saexp.reports import (
    GROUP_COLOURS,
    QUIET,
    AnalyzerPage,
    Chart,
    Section,
    Table,
    Trace,
    bar,
    cell,
    frequency_scatter,
    style,
    translucent,
)
from saexp.reports.effects import position_words
from saexp.reports.findings import contrast_findings, contrast_sentences, power_sentences
from saexp.reports.saved_run import SavedRun
from saexp.results import is_above_chance, outcome_words, sae_name
from saexp.stats.significance import holm

N_LATENTS, N_EXAMPLES, N_ATTRIBUTED = 15, 8, 20
N_HISTOGRAMS = 2
"""Latents per direction whose activations are drawn."""
_N_BINS = 30
_ATTRIBUTED = [f"{n}{end}" for n in ("direct", "gradient") for end in ("", "_ci_low", "_ci_high")]


def _question(run: SavedRun) -> str:
    cfg, about = run.config, run.provenance
    if run.latents is None:
        return "Which latents separate the groups?"
    first, second = run.groups
    intervention = cfg["intervention"]
    question = (
        f"Which latents of the SAE {sae_name(about['sae'], cfg['sae'])} distinguish "
        f"{first} from {second} in the data set '{about['dataset']['name']}' "
        f"({counted(about['dataset']['n_examples'], 'example')}), at "
        f"{position_words(cfg['positions']['name'])}?"
    )
    if intervention["name"] == "none":
        return question
    # Outcomes without a number per prompt (costs) are no columns of the summary.
    replaced = [o for o in run.outcomes if o not in intervention["outcomes"]]
    outcomes = ", ".join(map(outcome_words, replaced or intervention["outcomes"]))
    where = ""
    if intervention["name"] != "orthogonalize":
        where = f" at {position_words(intervention['where'])}"
    return (
        f"{question} And does changing them change what the model does? Tested with the "
        f"intervention {intervention['name'].replace('_', ' ')}{where}; measured: {outcomes}."
    )


def _colours(run: SavedRun) -> dict[str, str]:
    return dict(zip(run.groups, GROUP_COLOURS, strict=True))


def _figures(run: SavedRun) -> dict[str, go.Figure]:
    """`frequencies`, per direction `latent_of_<group>`, `values`, `types`; those with data."""
    if run.latents is None:
        return {}
    figures = {"frequencies": _frequencies(run)}
    activations = run.table("activations")
    if activations is not None and len(activations):
        saved = set(activations["latent"])
        leading = {g: [f for f in run.selected(g)["latent"] if f in saved] for g in run.groups}
        panels = [(g, f) for g in run.groups for f in leading[g][:N_HISTOGRAMS]]
        for group in run.groups:
            if leading[group]:
                name, first = f"latent_of_{group}", leading[group][:1]
                figures[name] = _activation_histograms(run, activations, [(group, first[0])])
        figures["values"] = _activation_histograms(run, activations, panels)
    if len(run.entity_types) > 1 and bool(run.latents["selected"].any()):
        figures["types"] = _by_type(run)
    return figures


def _frequencies(run: SavedRun) -> go.Figure:
    """How often each latent is active on held-out entities of the two groups."""
    assert run.latents is not None
    first, second = run.groups
    rest = run.latents[~run.latents["selected"]]
    series = [("not selected", rest, QUIET, False)]
    series += [(f"selected for {g}", run.selected(g), c, True) for g, c in _colours(run).items()]
    names = (f"{second} {run.unit_word} (test)", f"{first} {run.unit_word} (test)")
    return frequency_scatter(series, f"freq_{second}_test", f"freq_{first}_test", names)


def _activation_histograms(
    run: SavedRun, activations: pd.DataFrame, panels: list[tuple[str, int]]
) -> go.Figure:
    """Activations of latents on held-out rows of each group, a panel per (direction, latent).

    Active rows are counted on the left axis; the bars marked "inactive" on the right one, as they
    would hide the others.
    """
    n_columns = min(2, max(1, len(panels)))
    n_rows = max(1, -(-len(panels) // n_columns))
    titles = [f"latent {f} (selected for {g})" for g, f in panels]
    figure = Chart.with_panels(n_rows, n_columns, titles, (0.18, 0.22), secondary_y=True)
    test = activations[activations["split"] == "test"]
    for index, (_, latent) in enumerate(panels):
        panel: dict[str, Any] = {"row": index // n_columns + 1, "col": index % n_columns + 1}
        rows = test[test["latent"] == latent]
        top = float(rows["value"].max()) or 1.0
        edges = np.linspace(min(0.0, float(rows["value"].min())), top, _N_BINS + 1)
        for number, (group, colour) in enumerate(_colours(run).items()):
            values = rows.loc[rows["group"] == group, "value"]
            position = edges[0] - (0.13 - 0.06 * number) * top
            active, inactive = _activation_bars(values, edges, position, group)
            for bars in (active, inactive):
                bars.update(legendgroup=group, marker={"color": translucent(colour, 0.65)})
            active["showlegend"] = index == 0
            figure.add_trace(active, **panel)
            figure.add_trace(inactive, **panel, secondary_y=True)
        ticks = _ticks(top)
        figure.update_xaxes(
            tickvals=[edges[0] - 0.1 * top, *ticks],
            ticktext=["inactive", *(f"{t:g}" for t in ticks)],
            **panel,
        )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="activation")
    figure.update_yaxes(title="fraction of rows, active", secondary_y=False)
    figure.update_yaxes(
        title="fraction inactive",
        range=[0, 1.02],
        tickmode="array",
        tickvals=[0, 0.5, 1],
        showgrid=False,
        secondary_y=True,
    )
    height = 330 if len(panels) < 2 else 300 * n_rows + 60
    return style(figure, height, legend_below=True, margin={"r": 60, "b": 90})


def _activation_bars(
    values: pd.Series, edges: np.ndarray, position: float, group: str
) -> tuple[Trace, Trace]:
    """The histogram of a group's active rows, and a bar of its inactive ones at `position`."""
    n = max(len(values), 1)
    active = bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=np.histogram(values[values != 0], bins=edges)[0] / n,
        width=np.diff(edges),
        name=group,
        hovertemplate=f"{group}, %{{x:.3g}}: %{{y:.1%}} of rows<extra></extra>",
    )
    inactive = bar(
        x=[position],
        y=[int((values == 0).sum()) / n],
        width=[0.055 * edges[-1]],
        name=f"{group}, inactive",
        showlegend=False,
        hovertemplate=f"{group}, inactive: %{{y:.1%}} of rows<extra></extra>",
    )
    return active, inactive


def _ticks(top: float) -> list[float]:
    """Three to five round numbers up to `top`, without 0."""
    power = 10.0 ** np.floor(np.log10(top / 3))
    step = next(s * power for s in (1, 2, 5, 10) if top / (s * power) < 5.5)
    return [float(f"{step * i:.6g}") for i in range(1, int(top / step) + 1)]


def _by_type(run: SavedRun) -> go.Figure:
    """Separation of the leading latents per entity type, on held-out entities."""
    figure = Chart()
    first, second = run.groups
    for group, colour in _colours(run).items():
        for index, (_, row) in enumerate(run.selected(group).head(4).iterrows()):
            # The table holds each type's separation in the latent's own direction.
            heights = [row[f"separation_{t}_test"] for t in run.entity_types]
            figure.add_trace(
                bar(
                    x=run.entity_types,
                    y=heights,
                    name=f"{group}: latent {row['latent']}",
                    marker={"color": translucent(colour, 1 - 0.2 * index)},
                )
            )
    figure.update_xaxes(title="entity type")
    figure.update_yaxes(
        title=f"separation in the latent's direction<br>({first} against {second})",
        range=[-0.1, 1.02],
    )
    figure.update_layout(barmode="group")
    return style(figure, 420, legend_below=True)


def _sections(run: SavedRun) -> list[Section]:
    if run.latents is None:
        return []
    units = run.unit_word
    separation = Section(
        "Latents that separate the groups",
        "Latents are selected on the train split; all numbers are from the test split, in each "
        "latent's own direction. AUROC (0.5 is chance, 1 perfect), its 95 % interval (low, high; "
        f"Newcombe's method 5) and the separation compare {units} of the same type. Separation is "
        f"the fraction of {units} of its group on which a latent is active minus that of the "
        "other group. q is Benjamini-Hochberg over every active latent of this run; background is "
        "the fraction of neutral tokens on which the latent is active. All latents are in "
        "latents.parquet.",
        figures=[
            (
                "frequencies",
                f"Fraction of held-out {units} on which each latent is active, by group, on "
                "logarithmic axes; numbers are those of the selected latents. Latents that "
                "separate the groups are far from the dotted line.",
            )
        ],
        tables=[_latent_table(run, group) for group in run.groups],
    )
    details = [
        (
            "values",
            "Activations of the leading latents on held-out rows, as a fraction of each group's "
            "rows. Rows where the latent is inactive are counted by the bars at the left, on the "
            "axis at the right.",
        ),
        (
            "types",
            f"Separation of the leading latents per entity type, held-out {units}. A general "
            "latent separates all types.",
        ),
    ]
    has_values = run.table("activations") is not None and bool(len(run.table("activations")))  # pyright: ignore[reportArgumentType]
    has_types = len(run.entity_types) > 1 and bool(run.latents["selected"].any())
    drawn = [d for d, is_drawn in zip(details, (has_values, has_types), strict=True) if is_drawn]
    sections = [separation]
    examples = _example_tables(run)
    if drawn or examples:
        title = "Activations of the leading latents"
        sections.append(Section(title, figures=drawn, tables=examples))
    tables = _attribution_tables(run)
    if tables:
        text = (
            "Mean effect over held-out prompts on the logit of the answer's first token. Direct: "
            "through the final norm and the unembedding alone. Gradient: to first order through "
            "the rest of the model. Measured: the change of that logit in the intervention at the "
            "largest coefficient, if there was one. Intervals are 95 %, bootstrap over entities."
        )
        sections.append(Section("Attribution to the answer", text, tables=tables))
    power = power_sentences(run)
    if power:
        title = "What this run could have detected"
        sections.append(Section(title, " ".join(power)))
    return sections


def _latent_table(run: SavedRun, group: str) -> Table:
    """The selected latents of a direction with their numbers on the test split."""
    selected = run.selected(group).head(N_LATENTS)
    scores = [c for c in ("input_score", "output_score") if c in selected]
    rows = []
    for row in selected.to_dict("records"):
        auroc, low, high = (row.get(c) for c in ("auroc_test", "ci_low_test", "ci_high_test"))
        if group != run.groups[0]:
            auroc = 1 - row["auroc_test"]
            low, high = (None if x is None else 1 - x for x in (high, low))
        cells = [row["latent"], row["layer"], auroc, low, high, row["min_auroc_test"]]
        cells += [row[f"freq_{g}_test"] for g in run.groups]
        cells += [row[f"mean_{g}_test"] for g in run.groups]
        cells += [row["min_separation_test"], row["q_value"], row["q_value_test"]]
        cells.append(row["background_freq"])
        rows.append([cell(v) for v in [*cells, *(row[c] for c in scores)]])
    head = ["latent", "layer", "AUROC", "low", "high", "min AUROC over types"]
    head += [f"active on {g}" for g in run.groups] + [f"mean on {g}" for g in run.groups]
    head += ["min separation over types", "q train", "q test", "background"]
    head += [c.replace("_", " ") for c in scores]
    return Table(head, rows, _selected_words(run, group), group=group)


def _selected_words(run: SavedRun, group: str) -> str:
    """How many latents are selected, which are at chance, and which the interventions change."""
    n = len(run.selected(group))
    words = counted(n, "selected latent")
    if n and n == run.config["analyzer"].get("top_k"):
        words += " (the most that analyzer.top_k allows)"
    if n > N_LATENTS:
        words += f", the first {N_LATENTS}"
    if at_chance := _at_chance(run, group):
        words += (
            f"; not above chance on held-out {run.unit_word} (Holm over the selected): "
            f"{', '.join(at_chance)}"
        )
    summary = run.effects_summary
    if summary is None:
        return words
    is_changed = (summary["direction"] == group) & summary["role"].isin(["single", "group"])
    # In runs of several layers a latent is written with its layer.
    changed = {
        name for label in summary.loc[is_changed, "latent"].astype(str) for name in label.split("+")
    }
    in_interventions = [
        str(row["latent"])
        for row in run.selected(group).to_dict("records")
        if {str(row["latent"]), f"{row['layer']}:{row['latent']}"} & changed
    ]
    if in_interventions:
        words += f"; used in the interventions: {', '.join(in_interventions)}"
    return words


def _at_chance(run: SavedRun, group: str) -> list[str]:
    """Selected latents not above chance on the test split, after Holm over those of both groups."""
    selected = pd.concat([run.selected(g) for g in run.groups])
    if selected.empty:
        return []
    sign = np.where(selected["direction"] == run.groups[0], 1, -1)
    aurocs = 0.5 + sign * (selected["auroc_test"].to_numpy(dtype=float) - 0.5)
    rows = zip(
        selected["latent"],
        selected["direction"],
        aurocs,
        holm(selected["p_value_test"].to_numpy(dtype=float)),
        strict=True,
    )
    alpha = run.config["analyzer"]["alpha"]
    return [
        str(latent)
        for latent, direction, auroc, p_value in rows
        if direction == group and not is_above_chance(auroc, p_value, alpha)
    ]


def _example_tables(run: SavedRun) -> list[Table]:
    """Held-out texts with the largest activations of the first latent of each direction."""
    activations = run.table("activations")
    if activations is None or not len(activations):
        return []
    tables = []
    for group in run.groups:
        selected = run.selected(group)
        if selected.empty:
            continue
        latent = int(selected.iloc[0]["latent"])
        rows = activations[(activations["latent"] == latent) & (activations["split"] == "test")]
        top = rows.sort_values("value", ascending=False, kind="stable").head(N_EXAMPLES)
        examples = [[cell(v) for v in row] for row in top[["text", "group", "value"]].to_numpy()]
        title = f"Held-out texts with the largest activations of latent {latent} (for {group})"
        tables.append(Table(["text", "group", "activation"], examples, title, folded=True))
    return tables


def _attribution_tables(run: SavedRun) -> list[Table]:
    """Per group the latents with the largest gradient attribution, with their measured effect."""
    table, summary = run.table("attribution"), run.summary
    if table is None:
        return []
    measured: dict[tuple[str, str], float] = {}
    if summary is not None and "answer_logit_change" in summary:
        singles = summary[(summary["role"] == "single") & (summary["coefficient"] != 0)]
        for row in singles.sort_values("coefficient", key=abs).to_dict("records"):
            measured[str(row["group"]), str(row["latent"])] = row["answer_logit_change"]
    head = ["latent", "direct", "low (95 %)", "high (95 %)", "gradient", "low (95 %)"]
    head += ["high (95 %)", "mean activation", "prompts where active"]
    head += ["measured, largest coefficient"]
    tables = []
    for group, part in table.groupby("group", sort=False):
        rows = [
            [cell(r["latent"]), *(cell(r.get(c)) for c in _ATTRIBUTED)]
            + [cell(r["activation"]), cell(r["n_active"])]
            + [cell(measured.get((str(group), str(r["latent"]))))]
            for r in part.head(N_ATTRIBUTED).to_dict("records")
        ]
        tables.append(Table(head, rows, f"{group} prompts", folded=bool(tables)))
    return tables


CONTRAST = AnalyzerPage(_question, contrast_findings, contrast_sentences, _figures, _sections)


# Latents matched between the SAEs of a sweep

MATCHES, MATCHES_NOTES = "latent_matches.parquet", "latent_matches_notes.json"
"""Files in a sweep's folder: latents matched between its SAEs, and notes on them."""
MATCH_HEAD = [
    *["from layer", "from width", "latent", "selected for", "to layer", "to width"],
    *["nearest latent", "which is selected for", "cosine", "cosine by chance"],
    *["most often co-active with", "phi", "Jaccard", "shared rows"],
]


_N_MATCHES = 200


def _saes(matches: pd.DataFrame) -> pd.DataFrame:
    """A row per SAE."""
    names = ["cell", "model", "sae", "layer", "width", "d_sae"]
    ends = [
        matches[[f"{end}_{n}" for n in names]].set_axis(names, axis=1) for end in ("from", "to")
    ]
    return pd.concat(ends).drop_duplicates("cell")


def chains(matches: pd.DataFrame, axis: str) -> list[pd.DataFrame]:
    """Series of two or more SAEs that differ only along the axis, in order."""
    if matches.empty:
        return []
    fixed, by = ("layer", "d_sae") if axis == "width" else ("width", "layer")
    groups = _saes(matches).groupby(["model", "sae", fixed], sort=True)
    ordered = [part.sort_values(by).drop_duplicates(by) for _, part in groups]
    return [part for part in ordered if len(part) > 1]


def read_matches(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table (empty if no latents were matched) and notes on it."""
    notes: list[str] = []
    table = pd.DataFrame()
    try:
        if (folder / MATCHES).is_file():
            table = pd.read_parquet(folder / MATCHES)
    except (OSError, ValueError, ArrowException) as error:
        notes.append(
            f"{MATCHES} is damaged and its matches are not shown: {brief(str(error), 200)}"
        )
    try:
        if (folder / MATCHES_NOTES).is_file():
            notes += map(str, json.loads((folder / MATCHES_NOTES).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        notes.append(f"{MATCHES_NOTES} is damaged")
    return table, notes


def adjacent(matches: pd.DataFrame) -> pd.DataFrame:
    """Matches between neighbours on either axis, in both directions."""
    pairs: set[tuple[int, int]] = set()
    for axis in ("width", "layer"):
        for chain in chains(matches, axis):
            cells = chain["cell"].tolist()
            pairs.update(zip(cells[:-1], cells[1:], strict=True))
    if not pairs:
        return matches.head(0)
    ends = zip(matches["from_cell"], matches["to_cell"], strict=True)
    return matches[[(a, b) in pairs or (b, a) in pairs for a, b in ends]]


def match_rows(matches: pd.DataFrame) -> list[list[Any]]:
    """Rows of the page's table under HEAD: neighbours only, the most similar first."""
    if matches.empty:
        return []
    columns = ["from_layer", "from_width", "latent", "direction", "to_layer", "to_width"]
    columns += ["nearest", "nearest_direction", "cosine", "cosine_by_chance"]
    columns += ["cofiring", "phi", "jaccard", "n_rows"]
    shown = adjacent(matches).sort_values("cosine", ascending=False, kind="stable").head(_N_MATCHES)
    rows = shown[columns].astype(object)
    rows["cofiring"] = [None if pd.isna(v) else int(v) for v in rows["cofiring"]]
    return rows.where(rows.notna(), None).to_numpy().tolist()


def splits(matches: pd.DataFrame) -> list[str]:
    """A sentence per latent that is nearest, above chance, to several of the next wider SAE."""
    sentences = []
    for chain in chains(matches, "width"):
        cells = chain["cell"].tolist()
        for narrow, wide in zip(cells[:-1], cells[1:], strict=True):
            pairs = matches[(matches["from_cell"] == wide) & (matches["to_cell"] == narrow)]
            pairs = pairs[pairs["cosine"] > pairs["cosine_by_chance"]]
            for nearest, part in pairs.groupby("nearest"):
                if len(part) < 2:
                    continue
                row = part.iloc[0]
                each = ", ".join(
                    f"{r['latent']} ({r['cosine']:.2f})" for r in part.to_dict("records")
                )
                sentences.append(
                    f"Layer {row['to_layer']}: latent {nearest} of width {row['to_width']} is the "
                    f"nearest of {len(part)} leading latents of width {row['from_width']}: {each}."
                )
    return sentences
