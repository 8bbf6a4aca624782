"""What task=label tells: tables per type and attribute, sentences, and its page."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.labeling.matchers import PAPER, Rules, type_key
from saexp.reports.html import write_page
from saexp.reports.saved import SavedRun
from saexp.reports.style import GROUP_COLOURS, QUIET, style
from saexp.stats.intervals import wilson

GROUPS = ("known", "unknown", "dropped")
N_EXAMPLES = 3
"""Questions shown per attribute."""


def attribute_table(labels: pd.DataFrame, min_correct: int) -> pd.DataFrame:
    """Per entity type, attribute and what the data set calls the entity: shares of the answers.

    `known_share` is the share of entities whose attribute is known, with its 95 % Wilson interval:
    one entity is one observation, and a single one has no interval. `greedy_correct`,
    `greedy_refusal`, `sample_correct` are shares of answers.
    """
    rows = []
    keys = ["entity_type", "attribute", "given_group"]
    for key, part in labels.groupby(keys, sort=False, dropna=False):
        n, known = len(part), int((part["n_correct"] >= min_correct).sum())
        sampled = [x for found in part["sample_labels"] for x in found]
        low, high = wilson(known, n) if n > 1 else (np.nan, np.nan)
        named = [k if isinstance(k, str) else "" for k in key]
        rows.append(
            {
                **dict(zip(keys, named, strict=True)),
                "n": n,
                "with_answer": int((part["truths"].map(len) > 0).sum()),
                "known_share": known / n,
                "known_share_ci_low": low,
                "known_share_ci_high": high,
                "greedy_correct": float((part["greedy_label"] == "correct").mean()),
                "greedy_refusal": float((part["greedy_label"] == "refusal").mean()),
                "sample_correct": sampled.count("correct") / len(sampled) if sampled else None,
            }
        )
    return pd.DataFrame(rows)


def rules_table(labels: pd.DataFrame, rules: Rules) -> pd.DataFrame:
    """How the answers on every attribute asked for are judged, with the paper's tolerance.

    `tolerance` is in the attribute's own unit, `share` of the true value, `ratio` the likeness of
    names that must be exceeded; `paper_tolerance` is that of Ferrando et al. 2024.
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
    """The rows of `rules_table` as plain mappings, each with the limits that its rule has."""
    return [
        {str(name): value for name, value in row.items() if not pd.isna(value)}
        for row in table.to_dict("records")
    ]


_LIMITS = ("tolerance", "share", "ratio", "paper_tolerance")


def _rule_rows(table: pd.DataFrame) -> list[list[Any]]:
    """Rows of the page's table: what counts as right, and what to type for the paper's."""
    rows = []
    for row in table.to_dict("records"):
        within = {
            "year": f"within {row['tolerance']:g}" if row["tolerance"] else "exact",
            "number": f"within {row['tolerance']:g}, or {100 * row['share']:g}%",
            "coordinates": f"within {row['tolerance']:g} degrees",
            "name": f"whole name, likeness above {row['ratio']:g}",
            "genre": "its words",
            "text": f"its words, or likeness above {row['ratio']:g}; a number exactly",
        }[row["kind"]]
        key = f"task.rules.{type_key(row['entity_type'])}.{row['attribute']}.tolerance"
        paper = row["paper_tolerance"]
        typed = "" if pd.isna(paper) else f"within {paper:g}: type {key}={paper:g}"
        rows.append([row["entity_type"], row["attribute"], row["kind"], within, typed])
    return rows


def label_sentences(name: str, entities: pd.DataFrame, labels: pd.DataFrame) -> list[str]:
    """How many are known, and how often a greedy answer is right, per entity."""
    counts = {g: int((entities["group"] == g).sum()) for g in GROUPS}
    told = [
        f"{name}: of {len(entities):,} entities ({len(labels):,} questions) {counts['known']:,} "
        f"are known, {counts['unknown']:,} unknown, {counts['dropped']:,} neither and dropped."
    ]
    real = labels[labels["truths"].map(len) > 0]
    for kind, part in real.groupby("entity_type", sort=False, dropna=False):
        names = set(part["entity"])
        mine = entities[(entities["entity_type"] == kind) & entities["entity"].isin(names)]
        if mine.empty:
            continue
        k, n = int((mine["group"] == "known").sum()), len(mine)
        told.append(
            f"{kind}: {k} of {n} that have answers are known, {_rate(k, n)}; greedy "
            f"answers are right on {(part['greedy_label'] == 'correct').mean():.2f} of "
            f"{len(part)} questions."
        )
    invented = labels[labels["truths"].map(len) == 0]
    if len(invented):
        share = (invented["greedy_label"] == "refusal").mean()
        told.append(
            f"{invented['entity'].nunique()} names have no true answer: {share:.2f} of the greedy "
            f"answers about them are refusals, the others are made up."
        )
    return told


def memorized_sentences(name: str, table: pd.DataFrame, n_prompt: int, n_next: int) -> list[str]:
    """Share of texts continued exactly, with its interval."""
    n, k = len(table), int(table["perfect_match"].sum())
    none = int((table["matching_tokens"] == 0).sum())
    return [
        f"{name}: {k} of {n} texts are continued exactly for {n_next} tokens after {n_prompt}, "
        f"{_rate(k, n)}; {none} have no matching token."
    ]


def _rate(k: int, n: int) -> str:
    """A fraction with its 95 % Wilson interval, which a single observation has not."""
    if n < 2:
        return f"{k / n:.2f}"
    low, high = wilson(k, n)
    return f"{k / n:.2f} [{low:.2f}, {high:.2f}]"


def write_label_report(folder: str | Path) -> Path:
    """Render report.html from the folder's files; returns its path."""
    run = SavedRun(Path(folder))
    passages = run.table("memorization")
    figures = {"counts": _passages_figure(passages) if passages is not None else _figure(run)}
    caption = (
        "Texts by the number of leading tokens that agree."
        if passages is not None
        else "Entities by their group and type."
    )
    what = "memorised texts" if passages is not None else "known and unknown entities"
    return write_page(
        Path(folder) / "report.html",
        "label.html",
        figures,
        title=f"{what.capitalize()}: {run.provenance['model']['name'].rpartition('/')[2]}",
        finding=run.provenance["finding"],
        notes=run.provenance["notes"],
        caption=caption,
        tables=_passage_tables(passages) if passages is not None else _tables(run),
        skips=run.provenance["skips"],
        provenance=_provenance(run),
        config=run.config_text,
    )


def _figure(run: SavedRun) -> go.Figure:
    entities = run.table("entities")
    assert entities is not None, "task=label saves its entities"
    kinds = entities["entity_type"].fillna("").astype(str)
    order = list(dict.fromkeys(kinds))
    figure = go.Figure()
    for group, colour in zip(GROUPS, (*GROUP_COLOURS[:2], QUIET), strict=True):
        counts = kinds[entities["group"] == group].value_counts()
        figure.add_trace(
            go.Bar(
                x=order,
                y=[int(counts.get(k, 0)) for k in order],
                name=group,
                marker={"color": colour},
            )
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title_text="entities")
    return style(figure, 320)


def _passages_figure(table: pd.DataFrame) -> go.Figure:
    counts = table["matching_tokens"].value_counts().sort_index()
    bars = go.Bar(x=counts.index.tolist(), y=counts.tolist(), marker={"color": GROUP_COLOURS[0]})
    figure = go.Figure(bars)
    figure.update_xaxes(title_text="leading tokens that agree")
    figure.update_yaxes(title_text="texts")
    return style(figure, 320)


def _tables(run: SavedRun) -> list[dict[str, Any]]:
    entities, attributes, labels = (run.table(n) for n in ("entities", "attributes", "labels"))
    rules = run.table("rules")
    assert entities is not None and attributes is not None and labels is not None
    assert rules is not None, "task=label saves the rules it judged by"
    kinds = entities["entity_type"].fillna("").astype(str)
    counts = [
        [k, *(int(((kinds == k) & (entities["group"] == g)).sum()) for g in GROUPS)]
        for k in dict.fromkeys(kinds)
    ]
    shares = attributes.astype(object).where(attributes.notna(), None)
    shown = []
    keys = ["entity_type", "attribute"]
    for _, part in labels.groupby(keys, sort=False, dropna=False):
        for row in part.head(N_EXAMPLES).to_dict("records"):
            truths = "; ".join(map(str, row["truths"])) or "(there is none)"
            n = len(row["sample_labels"])
            samples = f"{row['n_correct']} of {n}" if n else "none"
            cells = [row["prompt"], truths, row["greedy"], row["greedy_label"], samples]
            shown.append(cells)
    return [
        {"title": "Entities", "head": ["type", *GROUPS], "rows": counts},
        {
            "title": "Answers by attribute (95 % Wilson intervals over entities)",
            "head": [c.replace("_", " ") for c in attributes.columns],
            "rows": shares.to_numpy().tolist(),
        },
        {
            "title": "Examples",
            "head": ["prompt", "true answers", "greedy answer", "label", "right samples"],
            "rows": shown,
        },
        {
            "title": "How answers are judged",
            "head": ["type", "attribute", "judged as", "right", "in Ferrando et al. 2024"],
            "rows": _rule_rows(rules),
        },
    ]


def _passage_tables(table: pd.DataFrame) -> list[dict[str, Any]]:
    some = pd.concat(
        [table[table["perfect_match"]].head(5), table[~table["perfect_match"]].head(5)]
    )
    rows = [
        [r["input_text"], r["generated_continuation_text"], r["matching_tokens"]]
        for r in some.to_dict("records")
    ]
    head = ["prompt", "greedy continuation", "leading tokens that agree"]
    return [{"title": "Examples", "head": head, "rows": rows}]


def _provenance(run: SavedRun) -> list[tuple[str, str]]:
    about = run.provenance
    model, machine = about["model"], about["machine"]
    return [
        ("command", about["command"]),
        ("started", about["started"]),
        ("model", f"{model['name']} (revision {model.get('revision') or 'default'})"),
        ("model weights", model["fingerprint"]),
        ("labels", about["labels"]["key"]),
        ("seed", str(about["seed"])),
        ("machine", f"{machine['system']}, {machine['cores']} cores, {machine['device']}"),
        ("seconds", ", ".join(f"{k} {v:.1f} s" for k, v in about["seconds"].items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())),
    ]
