"""What contrasts, interventions and the probes of a sweep found, in sentences.

With intervals, baseline and power, and what the model's answers say about the labels.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from saexp.data.datasets import SHIPPED_MODELS
from saexp.errors import counted
from saexp.reports import CHANCE_LINE, PALETTE, Finding, error_bars, interval_words, style
from saexp.reports.analyzer_pages import name_of
from saexp.reports.effects import (
    action_words,
    capitalized,
    effect_clause,
    effect_sentences,
    main_rows,
)
from saexp.reports.saved_run import SavedRun, cell_words, contrasts, line_keys, lines, swept
from saexp.results import is_above_chance, model_words, outcome_words, p_value_words, sae_words

KNOWN, UNKNOWN = "known", "unknown"
_BY_ANSWERS = (
    "The command task=label labels names by the model's own answers, and prints the dataset.path= "
    "to use then"
)


def presumed_knowledge(run: SavedRun) -> str | None:
    """A warning where the model's unsteered answers contradict the labels known and unknown.

    That is where it answers fewer than half of the questions on known entities correctly, or at
    least half of those on unknown ones.
    """
    if not _presumes(run):
        return None
    known, unknown = (run.metrics.get(f"baseline/accuracy_{g}") for g in (KNOWN, UNKNOWN))
    if (known is None or known >= 0.5) and (unknown is None or unknown < 0.5):
        return None
    return (
        "Warning: the labels 'known' and 'unknown' are the data set's, not this model's own "
        f"knowledge. {_answers(run)} {_BY_ANSWERS}."
    )


def knowledge_sentences(run: SavedRun) -> list[str]:
    """How many questions the model answers correctly without intervention, per group.

    Where the run asked none, a sentence that the labels known and unknown were not compared with
    the model's answers; nothing if they come from its answers, or belong to a shipped model.
    """
    if presumed_knowledge(run) is not None:
        # It is among the findings.
        return []
    if any(k.startswith("baseline/n_questions_") for k in run.metrics):
        return [_answers(run)]
    is_shipped = run.config["model"]["name"] in SHIPPED_MODELS
    shipped = is_shipped and run.config["dataset"].get("path") is None
    if shipped or not _presumes(run):
        return []
    return [
        "The labels 'known' and 'unknown' are the data set's; this run did not compare them with "
        f"what the model answers. {_BY_ANSWERS}."
    ]


def _presumes(run: SavedRun) -> bool:
    """Whether the groups are known and unknown entities, not labelled by a model's answers."""
    if set(run.provenance["groups"] or ()) != {KNOWN, UNKNOWN}:
        return False
    rows = run.table("rows")
    # task=label writes this column.
    return rows is None or "n_known" not in rows


def _answers(run: SavedRun) -> str:
    """One sentence on the unsteered answers; an entity has one question."""
    asked, unasked = [], []
    for group in run.provenance["groups"]:
        n = run.metrics.get(f"baseline/n_questions_{group}")
        if n:
            n_correct = run.metrics[f"baseline/n_correct_{group}"]
            asked.append(f"{n_correct} of {n} questions on {group} prompts")
        elif n is not None:
            unasked.append(f"{group} prompts have no true answer in the data")
    without = f" ({'; '.join(unasked)})" if unasked else ""
    return f"Without intervention the model answers {' and '.join(asked)} correctly{without}."


Metrics = Mapping[str, float | int | None]
SURFACE = "contrast/surface_auroc_test"
"""Metric: held-out AUROC of the text alone."""
_PLACEBO = {
    "label_fraction": "with permuted group labels, {} of {} permutations report a latent above "
    "chance",
    "latent_fraction": "{} of {} latents drawn at random among the active ones would be reported "
    "as above chance",
    "effect_fraction": "{} of {} controls put in the place of the latent would be reported to have "
    "an effect",
}


def contrast_findings(run: SavedRun) -> list[Finding]:
    """One sentence per direction of the contrast, then one per other condition that was run."""
    if run.latents is None:
        return [Finding("This run compared no groups.")]
    warning = presumed_knowledge(run)
    findings = [] if warning is None else [Finding(warning)]
    for group in run.groups:
        clauses, figures = [_detection(run, group)], []
        for row, before in main_rows(run):
            if row["direction"] == group:
                clauses.append(effect_clause(run, row, before))
                figures += _dose_figures(run, row)
        if not run.selected(group).empty and run.table("activations") is not None:
            figures.append(
                (
                    f"latent_of_{group}",
                    "Activations on held-out rows by group; inactive rows are on the right axis.",
                )
            )
        findings.append(Finding(_joined(clauses), list(dict.fromkeys(figures))))
    return [*findings, *intervention_findings(run, except_for=run.groups)]


def intervention_findings(run: SavedRun, except_for: Sequence[str] = ()) -> list[Finding]:
    """One sentence per main condition and group of prompts, but for these directions."""
    return [
        Finding(f"{capitalized(effect_clause(run, row, before))}.", _dose_figures(run, row))
        for row, before in main_rows(run)
        if row["direction"] not in except_for
    ]


def _dose_figures(run: SavedRun, row: pd.Series) -> list[tuple[str, str]]:
    """The figure of a condition and its caption; none of patching, which has no doses."""
    if run.config["intervention"]["name"] == "patch":
        return []
    outcome = outcome_words(run.outcomes[0])
    action = capitalized(action_words(run.config["intervention"], row))
    caption = f"{action}: {outcome} on held-out prompts, 95% intervals, and the controls' range."
    return [(f"effect_{row['condition']}", caption)]


def _joined(clauses: list[str]) -> str:
    head, *others = clauses
    if not others:
        return f"{head}."
    return f"{head}, and {'; '.join(others)}."


def _detection(run: SavedRun, group: str) -> str:
    """Whether the leading latent of a direction separates the groups on held-out data."""
    m = run.metrics
    first, second = run.groups
    other = second if group == first else first
    latent = m.get(f"contrast/best_latent_{group}")
    if latent is None:
        return _of_control(run, f"No latent is selected for '{group}'")
    auroc, p_value = (m[f"contrast/best_{n}_{group}_test"] for n in ("auroc", "p_value"))
    low, high = (m.get(f"contrast/best_auroc_{group}_ci_{end}_test") for end in ("low", "high"))
    words = f"AUROC {auroc:.3f}{interval_words(low, high)}"
    assert auroc is not None and p_value is not None
    groups = f"{group} from {other} {run.unit_word}"
    if not is_above_chance(auroc, p_value, run.config["analyzer"]["alpha"]):
        return _of_control(
            run,
            f"Latent {latent}, the best candidate for '{group}', does not distinguish {groups} on "
            f"held-out data ({words}, p {p_value_words(p_value)})",
        )
    surface = ""
    above_text = m.get(f"contrast/best_minus_surface_{group}_test_ci_low")
    if above_text is not None and above_text <= 0:
        surface = ", no better than the text alone,"
    return _of_control(
        run, f"Latent {latent} distinguishes {groups}{surface} on held-out data ({words})"
    )


def _of_control(run: SavedRun, clause: str) -> str:
    """The clause, which for a control SAE says so first, so that it is not read as a finding."""
    control = (run.provenance.get("sae") or {}).get("control")
    if not isinstance(control, str):
        return clause
    return f"Control SAE ({control}): {clause[0].lower()}{clause[1:]}"


def contrast_sentences(run: SavedRun) -> list[str]:
    """The context, the latents of each direction, and the effects of the interventions."""
    if run.latents is None:
        return []
    directions = [_direction(run, g) for g in run.groups]
    return [*context_sentences(run), *directions, *effect_sentences(run)]


def context_sentences(run: SavedRun) -> list[str]:
    """What the findings rest on: the setting, the surface baseline, placebos, and the power of a
    run that found nothing."""
    if run.latents is None:
        return []
    power = power_sentences(run) if nothing_found(run) else []
    known = knowledge_sentences(run)
    return [setting_sentence(run), *known, *surface_sentences(run), *placebo_sentences(run), *power]


def setting_sentence(run: SavedRun) -> str:
    """Model, hookpoint, SAE, and how many latents are significant."""
    metrics, about = run.metrics, run.provenance
    first, second = run.groups
    sizes = [f"{metrics[f'contrast/n_units_{g}_test']} {g}" for g in run.groups]
    return (
        f"{model_words(about['model']['name'])}, {about['sae']['hookpoint']}, "
        f"{sae_words(about['sae'])}: "
        f"{metrics['contrast/n_significant']} of {metrics['contrast/n_tested']} active latents "
        f"separate {first} from {second} on the train split (Benjamini-Hochberg q <= "
        f"{run.config['analyzer']['alpha']:g}). The numbers below are measured on "
        f"{metrics['contrast/n_units_test']} held-out {run.unit_word} ({', '.join(sizes)}); "
        "p-values are Holm-adjusted over the latents reported here."
    )


def surface_sentences(run: SavedRun) -> list[str]:
    """AUROC of the text alone; nothing for a run without this baseline."""
    auroc = run.metrics.get(SURFACE)
    if auroc is None:
        return []
    chance = "" if _is_surface_above_chance(run.metrics) else ", not above chance"
    # A probe's AUROC is over all pairs, so that of the same baseline is another number there.
    within = " within entity types" if len(run.entity_types) > 1 else ""
    return [
        "The surface baseline (tokens and n-grams of the text, no model) has AUROC "
        f"{auroc:.3f}{_limits(run.metrics, SURFACE)}{within}{chance}."
    ]


def _is_surface_above_chance(metrics: Metrics) -> bool:
    low = metrics.get(f"{SURFACE}_ci_low")
    return low is not None and low > 0.5


def above_surface(metrics: Metrics, group: str) -> str:
    """How far a direction's best latent is above the surface baseline, as a sentence.

    Empty without the baseline, and if the latent is above a baseline that is itself at chance,
    where the distance would say nothing.
    """
    key = f"contrast/best_minus_surface_{group}_test"
    difference, low = metrics.get(key), metrics.get(f"{key}_ci_low")
    if difference is None:
        return ""
    interval = _limits(metrics, key)
    p_value = metrics.get(f"{key}_p_value")
    p_words = "" if p_value is None else f" (paired test: p {p_value_words(p_value)})"
    if low is None:
        return (
            f" Its AUROC minus that of the surface baseline is {difference:+.3f}, without an "
            "interval."
        )
    if low > 0 and not _is_surface_above_chance(metrics):
        return ""
    if low > 0:
        return (
            f" Its AUROC is {difference:.3f}{interval} above that of the surface baseline{p_words}."
        )
    return (
        " It is not distinguishable from surface cues: its AUROC minus that of the surface "
        f"baseline is {difference:+.3f}{interval}{p_words}."
    )


def _limits(metrics: Metrics, key: str) -> str:
    return interval_words(metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high"))


def _direction(run: SavedRun, group: str) -> str:
    """The most selective latent of a direction, and the strongest one if it is another."""
    m = {k.removeprefix("contrast/"): v for k, v in run.metrics.items()}
    latent, strongest = m[f"best_latent_{group}"], m.get(f"strongest_latent_{group}")
    other = ""
    if strongest is not None and strongest != latent:
        density = m[f"strongest_background_freq_{group}"]
        active = "" if density is None else f", active on {density:.1%} of background tokens"
        other = (
            f" The strongest on the train split is latent {strongest}{active}: "
            f"{_numbers(run, m, 'strongest', group)}."
        )
    if latent is None:
        return f"No latent for '{group}' is selected.{other}"
    most = ", the most selective," if other else ""
    surface = above_surface(run.metrics, group)
    return f"{group}: latent {latent}{most} has {_numbers(run, m, 'best', group)}.{surface}{other}"


def _numbers(run: SavedRun, m: dict[str, Any], kind: str, group: str) -> str:
    """Held-out AUROC and separation of a leading latent, in the group's direction."""
    auroc, p_value = (m[f"{kind}_{name}_{group}_test"] for name in ("auroc", "p_value"))
    limits = [m[f"{kind}_auroc_{group}_ci_{end}_test"] for end in ("low", "high")]
    p_words = f"p {p_value_words(p_value)}"
    if not is_above_chance(auroc, p_value, run.config["analyzer"]["alpha"]):
        p_words = f"not above chance on held-out {run.unit_word}, {p_words}"
    words = (
        f"AUROC {auroc:.3f}{interval_words(*limits)} ({p_words}), "
        f"separation {m[f'{kind}_separation_{group}_test']:.2f}"
    )
    if len(run.entity_types) > 1:
        words += (
            f"; smallest over {len(run.entity_types)} entity types: AUROC "
            f"{m[f'{kind}_min_auroc_{group}_test']:.3f}, separation "
            f"{m[f'{kind}_min_separation_{group}_test']:.2f}"
        )
    return words


def placebo_sentences(run: SavedRun) -> list[str]:
    """One sentence on the placebo trials; nothing if the run made none."""
    parts = []
    for name, words in _PLACEBO.items():
        n, fraction = (run.metrics.get(f"placebo/{name}{end}") for end in ("_n", ""))
        if n is None or fraction is None:
            continue
        low, high = (run.metrics[f"placebo/{name}_ci_{end}"] for end in ("low", "high"))
        sentence = words.format(round(fraction * n), n)
        parts.append(f"{sentence} ({fraction:.1%} [{low:.1%}, {high:.1%}])")
    return [f"Placebo: {'; '.join(parts)}."] if parts else []


def power_sentences(run: SavedRun) -> list[str]:
    """The smallest AUROC and change of a rate that this run could have detected."""
    return [*_contrast_power(run), *_effect_power(run)]


def nothing_found(run: SavedRun) -> bool:
    """Whether no leading latent is above chance on the test split, Holm-adjusted."""
    m = run.metrics
    alpha = run.config["analyzer"]["alpha"]
    for group in run.groups:
        for kind in ("best", "strongest"):
            auroc, p_value = (
                m.get(f"contrast/{kind}_{name}_{group}_test") for name in ("auroc", "p_value")
            )
            if auroc is None or p_value is None:
                continue
            if is_above_chance(auroc, p_value, alpha):
                return False
    return True


def _contrast_power(run: SavedRun) -> list[str]:
    m = run.metrics
    train, test = m.get("power/auroc_train"), m.get("power/auroc_test")
    if train is None or test is None:
        return []
    alpha = run.config["analyzer"]["alpha"]
    leading = {m.get(f"contrast/{k}_latent_{g}") for k in ("best", "strongest") for g in run.groups}
    n_leading = max(len(leading - {None}), 1)
    return [
        f"With this number of {run.unit_word}, a latent is detected on the train split in 80% of "
        f"runs if its AUROC is at least {train:.3f} (level {alpha:g}, Bonferroni over "
        f"{m['contrast/n_tested']} latents), and confirmed on the test split if it is at least "
        f"{test:.3f} (level {alpha:g}, Bonferroni over {counted(n_leading, 'latent')})."
    ]


def _effect_power(run: SavedRun) -> list[str]:
    m = run.metrics
    change, n = m.get("power/rate_change"), m.get("power/rate_n")
    sentences = []
    if change is not None and n is not None:
        sentences.append(
            f"With {n} {run.unit_word}, a change of a rate by at least {change:.2f} from its "
            f"unsteered value of {m['power/rate_baseline']:.2f} is detected in 80% of runs (level "
            "0.05, paired)."
        )
    floor = m.get("power/p_controls_floor")
    if floor is not None:
        sentences.append(
            f"p-values against controls are ranks and cannot be below {floor:.2g}, however large "
            "the effect."
        )
    return sentences


CAPTION = (
    "Held-out AUROC of every probe with 95 % intervals over units; the dotted line is chance. The "
    "surface baseline reads the text alone, without the model."
)

MARKERS = ("circle", "diamond-open", "x")


def probes_of(table: pd.DataFrame) -> list[str]:
    """Names of the probes with a held-out AUROC, but for the one that always predicts one group."""
    pattern = r"probe/(.+?)_auroc_test"
    names = [m[1] for c in table.columns if (m := re.fullmatch(pattern, str(c)))]
    return [n for n in names if n != "majority" and table[f"probe/{n}_auroc_test"].notna().any()]


def probe_columns(table: pd.DataFrame) -> dict[str, str]:
    """Columns of the table of cells and their labels: the held-out AUROC of each probe."""
    return {f"probe/{n}_auroc_test": f"AUROC: {name_of(n)}" for n in probes_of(table)}


def probe_findings(done: pd.DataFrame) -> list[str]:
    """A sentence per probe: its held-out AUROC in the cell that is best on the train split."""
    keys, sentences = swept(done), []
    for name in probes_of(done):
        best, chosen_by = _best_cell(done, name)
        if best is None:
            continue
        at = cell_words(best, keys)
        sentence = (
            f"{name_of(name)}: held-out AUROC {_auroc(best, name)}{f' at {at}' if at else ''}"
        )
        difference = best.get(f"probe/{name}_minus_surface_test")
        if difference is not None and pd.notna(difference):
            low, high = (
                best.get(f"probe/{name}_minus_surface_ci_{e}_test") for e in ("low", "high")
            )
            sentence += f", {difference:+.3f}{interval_words(low, high)} against the text alone"
        others = contrasts(done)[f"probe/{name}_auroc_test"].astype(float).dropna()
        if len(others) > 1:
            sentence += f"; {others.min():.3f} to {others.max():.3f} over the sweep"
        sentences.append(f"{sentence} (cell chosen by {chosen_by}).")
    return sentences


def _best_cell(done: pd.DataFrame, name: str) -> tuple[pd.Series | None, str]:
    """(the cell that is best on the train split, None without a value there; the number it is
    chosen by, in words).

    That is the cross-validated AUROC of a probe that has one: on the rows it is fitted on, the
    AUROC of one with many weights is near 1 everywhere and orders the cells by chance.
    """
    held_out = done[done[f"probe/{name}_auroc_test"].notna()]
    for column, words in (("cv_auroc", "the cross-validated AUROC"), ("auroc", "the AUROC")):
        values = held_out.get(f"probe/{name}_{column}")
        if values is not None and values.notna().any():
            best = held_out.iloc[int(np.nanargmax(values.astype(float)))]
            return best, f"{words} on train"
    return None, ""


def _auroc(cell: pd.Series, name: str) -> str:
    low, high = (cell.get(f"probe/{name}_auroc_ci_{end}_test") for end in ("low", "high"))
    return f"{cell[f'probe/{name}_auroc_test']:.3f}{interval_words(low, high)}"


def probe_figure(done: pd.DataFrame) -> go.Figure | None:
    """Held-out AUROC by layer, or by the first swept key; None where only one cell has probes."""
    names = probes_of(done)
    keys = swept(done)
    x = "layer" if "layer" in done and done["layer"].nunique() > 1 else next(iter(keys), None)
    if not names or x is None:
        return None
    by = [k for k in keys if k != x and k in line_keys(done)]
    figure = go.Figure()
    for index, (label, part) in enumerate(lines(contrasts(done), by)):
        suffix = f", {label}" if label else ""
        ordered = part.sort_values(x) if x == "layer" else part
        for number, name in enumerate(names):
            auroc = ordered[f"probe/{name}_auroc_test"].astype(float)
            limits = [
                ordered.get(f"probe/{name}_auroc_ci_{end}_test", pd.Series(np.nan, ordered.index))
                for end in ("low", "high")
            ]
            figure.add_trace(
                go.Scatter(
                    x=ordered[x] if x == "layer" else ordered[x].astype(str),
                    y=auroc,
                    name=f"{name_of(name)}{suffix}",
                    mode="lines+markers",
                    line={
                        "color": PALETTE[number % len(PALETTE)],
                        "dash": ("solid", "dash", "dot")[index % 3],
                    },
                    # More probes than colours: the next ones differ by their marker.
                    marker={"symbol": MARKERS[number // len(PALETTE) % len(MARKERS)], "size": 9},
                    error_y=error_bars(auroc, *limits),
                )
            )
    figure.add_hline(y=0.5, line=CHANCE_LINE)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title="held-out AUROC")
    return style(figure, 430, legend_below=True)
