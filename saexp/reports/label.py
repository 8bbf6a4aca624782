"""Tables, sentences and page of task=label."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.errors import counted
from saexp.labeling.matchers import PAPER, Rules, type_key
from saexp.reports import (
    GROUP_COLOURS,
    QUIET,
    Chart,
    Finding,
    Table,
    bar,
    cell,
    style,
    write_run_page,
)
from saexp.reports.saved_run import SavedRun
from saexp.results import model_title
from saexp.stats import wilson

GROUPS = ("known", "unknown", "dropped")
N_EXAMPLES = 3
"""Questions shown per attribute."""


def attribute_table(labels: pd.DataFrame, min_correct: int) -> pd.DataFrame:
    """Fractions of the answers per entity type, attribute and group given by the data set.

    `known_fraction` is the fraction of entities whose attribute is known, with its 95 % Wilson
    interval: one entity is one observation, and a single one has no interval. `greedy_correct`,
    `greedy_refusal` and `sample_correct` are fractions of answers.
    """
    rows = []
    keys = ["entity_type", "attribute", "given_group"]
    for key, part in labels.groupby(keys, sort=False, dropna=False):
        n, known = len(part), int((part["n_correct"] >= min_correct).sum())
        sampled = [label for labels in part["sample_labels"] for label in labels]
        low, high = wilson(known, n) if n > 1 else (np.nan, np.nan)
        names = [k if isinstance(k, str) else "" for k in key]
        rows.append(
            {
                **dict(zip(keys, names, strict=True)),
                "n": n,
                "with_answer": int((part["truths"].map(len) > 0).sum()),
                "known_fraction": known / n,
                "known_fraction_ci_low": low,
                "known_fraction_ci_high": high,
                "greedy_correct": float((part["greedy_label"] == "correct").mean()),
                "greedy_refusal": float((part["greedy_label"] == "refusal").mean()),
                "sample_correct": sampled.count("correct") / len(sampled) if sampled else None,
            }
        )
    return pd.DataFrame(rows)


def rules_table(labels: pd.DataFrame, rules: Rules) -> pd.DataFrame:
    """How the answers about every attribute are judged.

    `tolerance` is in the attribute's unit, `share` is relative to the true value, `ratio` is the
    similarity that names must exceed; `paper_tolerance` is the tolerance of Ferrando et al. 2024.
    """
    rows = []
    for (kind, attribute), _ in labels.groupby(["entity_type", "attribute"], sort=False):
        rule = rules.rule(str(kind), str(attribute))
        paper = PAPER.get(type_key(str(kind)), {}).get(str(attribute))
        is_number = rule.kind in ("number", "year", "coordinates", "text")
        rows.append(
            {
                "entity_type": str(kind),
                "attribute": str(attribute),
                "kind": rule.kind,
                "tolerance": float(rule.tolerance) if is_number else None,
                "share": float(rule.share) if rule.kind in ("number", "text") else None,
                "ratio": float(rule.ratio) if rule.kind in ("name", "text") else None,
                "paper_tolerance": None if paper is None else float(paper),
            }
        )
    columns = ("entity_type", "attribute", "kind", *_LIMITS)
    return pd.DataFrame(rows, columns=list(columns)).astype(dict.fromkeys(_LIMITS, "float64"))


def rule_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `rules_table` as mappings without missing values."""
    return [
        {str(name): value for name, value in row.items() if not pd.isna(value)}
        for row in table.to_dict("records")
    ]


_LIMITS = ("tolerance", "share", "ratio", "paper_tolerance")


def _rule_rows(table: pd.DataFrame) -> list[list[Any]]:
    """Rows of the page's table: what counts as correct, and how to get the paper's tolerance."""
    rows = []
    for row in table.to_dict("records"):
        criterion = {
            "year": f"within {row['tolerance']:g}" if row["tolerance"] else "exact",
            "number": f"within {row['tolerance']:g}, or {100 * row['share']:g}%",
            "coordinates": f"within {row['tolerance']:g} degrees",
            "name": f"whole name, similarity above {row['ratio']:g}",
            "genre": "contains its words",
            "text": f"contains its words, or similarity above {row['ratio']:g}; numbers exactly",
        }[row["kind"]]
        key = f"task.rules.{type_key(row['entity_type'])}.{row['attribute']}.tolerance"
        paper = row["paper_tolerance"]
        of_paper = "" if pd.isna(paper) else f"within {paper:g} ({key}={paper:g})"
        rows.append([row["entity_type"], row["attribute"], row["kind"], criterion, of_paper])
    return rows


def label_sentences(name: str, entities: pd.DataFrame, labels: pd.DataFrame) -> list[str]:
    """How many entities are known, and how often a greedy answer is correct, per entity type."""
    counts = {g: int((entities["group"] == g).sum()) for g in GROUPS}
    sentences = [
        f"{name} knows {counts['known']:,} of {counted(len(entities), 'entity', 'entities')}, does "
        f"not know {counts['unknown']:,}, and {counts['dropped']:,} are neither and dropped "
        f"({counted(len(labels), 'question')})."
    ]
    with_answer = labels[labels["truths"].map(len) > 0]
    for kind, part in with_answer.groupby("entity_type", sort=False, dropna=False):
        names = set(part["entity"])
        of_kind = entities[(entities["entity_type"] == kind) & entities["entity"].isin(names)]
        if of_kind.empty:
            continue
        k, n = int((of_kind["group"] == "known").sum()), len(of_kind)
        sentences.append(
            f"{kind}: {k} of {counted(n, 'entity', 'entities')} with a true answer are known, "
            f"{_rate(k, n)}; greedy answers are correct on a fraction "
            f"{(part['greedy_label'] == 'correct').mean():.2f} of {counted(len(part), 'question')}."
        )
    invented = labels[labels["truths"].map(len) == 0]
    if len(invented):
        refused = (invented["greedy_label"] == "refusal").mean()
        sentences.append(
            f"{counted(invented['entity'].nunique(), 'name')} have no true answer: {refused:.2f} "
            "of the greedy answers about them are refusals, the others are made up."
        )
    return sentences


def memorized_sentences(name: str, table: pd.DataFrame, n_prompt: int, n_next: int) -> list[str]:
    """The fraction of texts continued exactly, with its interval."""
    n, k = len(table), int(table["perfect_match"].sum())
    none = int((table["matching_tokens"] == 0).sum())
    return [
        f"{name} continues {k} of {counted(n, 'text')} exactly for {counted(n_next, 'token')} "
        f"after {n_prompt}, {_rate(k, n)}; {none} have no matching token."
    ]


def _rate(k: int, n: int) -> str:
    """A fraction with its 95 % Wilson interval, which a single observation does not have."""
    if n < 2:
        return f"{k / n:.2f}"
    low, high = wilson(k, n)
    return f"{k / n:.2f} [{low:.2f}, {high:.2f}]"


def write_label_report(folder: str | Path) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    passages = run.table("memorization")
    if passages is not None:
        subject, figure, tables = "Memorised texts", _passages_figure(passages), _passages(passages)
        caption = "Number of texts by the number of leading tokens that match."
    else:
        subject, figure, tables = "Known and unknown entities", _figure(run), _tables(run)
        caption = "Number of entities by type and group."
    sentence, *others = run.provenance["finding"]
    return write_run_page(
        run,
        "label.html",
        {"counts": figure},
        title=f"{subject}: {model_title(run.provenance['model']['name'])}",
        findings=[Finding(sentence, [("counts", caption)])],
        sentences=others,
        tables=tables,
    )


def _figure(run: SavedRun) -> go.Figure:
    entities = run.table("entities")
    assert entities is not None, "task=label saves its entities"
    kinds = entities["entity_type"].fillna("").astype(str)
    order = list(dict.fromkeys(kinds))
    figure = Chart()
    for group, colour in zip(GROUPS, (*GROUP_COLOURS[:2], QUIET), strict=True):
        counts = kinds[entities["group"] == group].value_counts()
        figure.add_trace(
            bar(
                x=order,
                y=[int(counts.get(k, 0)) for k in order],
                name=group,
                marker={"color": colour},
            )
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="entity type")
    figure.update_yaxes(title="number of entities")
    return style(figure, 320)


def _passages_figure(table: pd.DataFrame) -> go.Figure:
    counts = table["matching_tokens"].value_counts().sort_index()
    bars = bar(x=counts.index.tolist(), y=counts.tolist(), marker={"color": GROUP_COLOURS[0]})
    figure = Chart(bars)
    figure.update_xaxes(title="leading tokens that match")
    figure.update_yaxes(title="number of texts")
    return style(figure, 320)


def _tables(run: SavedRun) -> list[Table]:
    entities, attributes, labels = (run.table(n) for n in ("entities", "attributes", "labels"))
    rules = run.table("rules")
    assert entities is not None and attributes is not None and labels is not None
    assert rules is not None, "task=label saves the rules it judged by"
    kinds = entities["entity_type"].fillna("").astype(str)
    counts = [
        [k, *(int(((kinds == k) & (entities["group"] == g)).sum()) for g in GROUPS)]
        for k in dict.fromkeys(kinds)
    ]
    fractions = attributes.astype(object).where(attributes.notna(), None)
    examples = []
    for _, part in labels.groupby(["entity_type", "attribute"], sort=False, dropna=False):
        for row in part.head(N_EXAMPLES).to_dict("records"):
            truths = "; ".join(map(str, row["truths"])) or "(there is none)"
            n = len(row["sample_labels"])
            samples = f"{row['n_correct']} of {n}" if n else "none"
            examples.append([row["prompt"], truths, row["greedy"], row["greedy_label"], samples])
    columns = [c.replace("_", " ").replace("share", "fraction") for c in attributes.columns]
    title = "Answers by attribute (fractions with 95 % Wilson intervals over entities)"
    example_head = ["prompt", "true answers", "greedy answer", "label", "correct samples"]
    rule_head = ["type", "attribute", "judged as", "correct if", "in Ferrando et al. 2024"]
    return [
        Table(["type", *GROUPS], counts, "Entities"),
        Table(columns, fractions.to_numpy().tolist(), title),
        Table(example_head, examples, "Examples"),
        Table(rule_head, _rule_rows(rules), "How answers are judged"),
    ]


def _passages(table: pd.DataFrame) -> list[Table]:
    matches = table["perfect_match"]
    some = pd.concat([table[matches].head(5), table[~matches].head(5)])
    columns = ["input_text", "generated_continuation_text", "matching_tokens"]
    rows = [[cell(v) for v in row] for row in some[columns].to_numpy()]
    head = ["prompt", "greedy continuation", "leading tokens that match"]
    return [Table(head, rows, "Examples")]
