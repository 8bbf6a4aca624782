"""Findings, figures and report.html of every task=analyze run, from its saved files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from saexp import registry
from saexp.errors import counted
from saexp.files import RUN_FOLDER, write_text
from saexp.reports import (
    GROUP_COLOURS,
    AnalyzerPage,
    Finding,
    Section,
    Table,
    TileGroup,
    as_table,
    cell,
    write_run_page,
)
from saexp.reports.analyzer_pages import CAPABILITY, PROBE
from saexp.reports.contrast import CONTRAST
from saexp.reports.effect_section import effect_content, effect_figures
from saexp.reports.effects import effect_sentences
from saexp.reports.findings import (
    context_sentences,
    intervention_findings,
    knowledge_sentences,
    presumed_knowledge,
)
from saexp.reports.latents import STATS, TOP_FEATURES
from saexp.reports.saved_run import SavedRun
from saexp.reports.training import training_sentence
from saexp.results import SAE_CHECK_HEAD, model_title, model_words, sae_check_rows, sae_words

FIGURES = "figures.json"
"""File with the figures that a custom analyzer made, by name."""
_N_METRICS = 6
"""Metrics of a custom analyzer that its sentence lists."""
_COMMON = ("collection/", "sparsity/", "reconstruction/", "check/")

_DATA = {
    "collection/n_rows": "positions",
    "collection/n_skipped": "examples skipped",
    "collection/tokens_forwarded": "tokens forwarded (0: all from the cache)",
}
_SPARSITY = {
    "sparsity/l0": "L0 (active latents per position)",
    "sparsity/mean_active": "mean activation where active",
    "sparsity/dead_fraction": "fraction of latents never active here",
}
_RECONSTRUCTION = {
    "reconstruction/explained_variance": "explained variance (fraction)",
    "reconstruction/explained_variance_legacy": "… legacy definition",
    "reconstruction/explained_variance_median": "… median position",
    "reconstruction/explained_variance_all_positions": "… with high-norm positions",
    "reconstruction/n_high_norm": "high-norm positions",
    "reconstruction/cosine": "cosine similarity",
    "check/explained_variance": "explained variance, neutral text",
}
_CONTRAST = {
    "contrast/n_tested": "latents tested",
    "contrast/n_significant": "significant on train",
    "contrast/n_significant_test": "… and again on test",
    "contrast/token_count_p_value": "p-value for equal token counts",
}
_GROUPS = (
    ("Data", "How many token positions the numbers below rest on.", _DATA),
    (
        "Sparsity of the SAE at these positions",
        "Activations are in the units of the SAE's latents.",
        _SPARSITY,
    ),
    (
        "Reconstruction",
        "1 is a perfect reconstruction; an explained variance of 0 is no better than the mean.",
        _RECONSTRUCTION,
    ),
    ("Tests", "Numbers of latents; significance is Benjamini-Hochberg's.", _CONTRAST),
)


# Custom analyzers


def _custom_question(run: SavedRun) -> str:
    return f"Result of the analyzer '{run.config['analyzer']['name']}'."


def _custom_figures(run: SavedRun) -> dict[str, go.Figure]:
    saved = run.object(FIGURES) or {}
    return {name: plotly.io.from_json(text) for name, text in saved.items()}


def _custom_sentences(run: SavedRun) -> list[str]:
    metrics = _custom_metrics(run)
    if not metrics:
        return []
    words = [
        f"{k} {'not defined' if v is None else f'{v:.4g}'}"
        for k, v in list(metrics.items())[:_N_METRICS]
    ]
    n_more = len(metrics) - _N_METRICS
    more = f", and {n_more} more in metrics.json" if n_more > 0 else ""
    return [f"{', '.join(words)}{more}."]


def _custom_findings(run: SavedRun) -> list[Finding]:
    names = list(_custom_figures(run))[:1]
    sentences = _custom_sentences(run) or [f"{_custom_question(run)}"]
    return [Finding("\n".join(sentences), [(n, n.replace("_", " ")) for n in names])]


def _custom_sections(run: SavedRun) -> list[Section]:
    sections = []
    metrics = _custom_metrics(run)
    if metrics:
        rows = [[name, cell(value)] for name, value in metrics.items()]
        sections.append(Section("Metrics", tables=[Table(["metric", "value"], rows)]))
    sections += [Section(name, figures=[(name, "")]) for name in list(_custom_figures(run))[1:]]
    for name in run.provenance["tables"]:
        table = run.table(name)
        if table is not None:
            text = f"All rows are in {name}.parquet."
            sections.append(Section(name, text, tables=[as_table(table)]))
    return [*sections, *_plugin_sections(run)]


def _plugin_sections(run: SavedRun) -> list[Section]:
    """What the function that a plugin registered as `report_section` of its analyzer returns."""
    name = run.config["analyzer"]["name"]
    section = registry.report_section("analyzer", name)
    if section is None:
        return []
    content = section(run)
    if isinstance(content, str):
        return [Section(name.replace("_", " "), html=content)]
    return list(content)


def _custom_metrics(run: SavedRun) -> dict[str, float | int | None]:
    return {k: v for k, v in run.metrics.items() if not k.startswith(_COMMON)}


_CUSTOM = AnalyzerPage(
    _custom_question, _custom_findings, lambda _: [], _custom_figures, _custom_sections
)
_PAGES = {
    "capability": CAPABILITY,
    "contrast": CONTRAST,
    "probe": PROBE,
    "stats": STATS,
    "top_features": TOP_FEATURES,
}


# All analyzers


def _page(run: SavedRun) -> AnalyzerPage:
    return _PAGES.get(run.config["analyzer"]["name"], _CUSTOM)


def save_figures(folder: str | Path, figures: Mapping[str, go.Figure]) -> None:
    """Save figures that an analyzer made, so that the page can be rendered from files alone."""
    if figures:
        texts = {name: figure.to_json() for name, figure in figures.items()}
        write_text(Path(folder) / FIGURES, json.dumps(texts), option=RUN_FOLDER)


def report_figures(folder: str | Path | SavedRun) -> dict[str, go.Figure]:
    """Name -> figure, made from the run's saved tables; of a custom analyzer, those it saved.

    The run is its folder, or what was read of it.
    """
    run = _opened(folder)
    return _page(run).figures(run) | effect_figures(run)


def findings(folder: str | Path) -> list[str]:
    """The findings of the first screen, the setting, and the sentences behind the findings."""
    run = SavedRun(Path(folder))
    leads = [line for f in _first_screen(run) for line in f.sentence.splitlines()]
    return [*leads, *_details(run)]


def headline(folder: str | Path) -> str:
    """The finding in a few lines of plain text."""
    run = SavedRun(Path(folder))
    if "finding" in run.provenance:
        return "\n".join(run.provenance["finding"])
    if run.config["task"]["name"] == "train":
        return training_sentence(run)
    page = _page(run)
    if page is CONTRAST:
        sentences = [f.sentence for f in page.findings(run)]
        return "\n".join([*sentences, *context_sentences(run)])
    return "\n".join(findings(folder))


def _first_screen(run: SavedRun) -> list[Finding]:
    page = _page(run)
    # The contrast joins the effects to the latents of their direction.
    if page is CONTRAST:
        return page.findings(run)
    warning = presumed_knowledge(run)
    warnings = [] if warning is None else [Finding(warning)]
    return [*warnings, *page.findings(run), *intervention_findings(run)]


def _details(run: SavedRun) -> list[str]:
    """The setting and the numbers in words."""
    page = _page(run)
    if page is CONTRAST:
        return page.sentences(run)
    about = run.provenance
    positions = run.config["positions"]["name"].replace("_", " ")
    model = model_words(about["model"]["name"])
    setting = (
        f"{model}, {_hookpoints(run)}, {sae_words(about['sae'])}, "
        f"data set '{about['dataset']['name']}' "
        f"({counted(about['dataset']['n_examples'], 'example')}), "
        f"positions {positions}: {counted(int(run.metrics['collection/n_rows'] or 0), 'row')}."
    )
    return [setting, *knowledge_sentences(run), *page.sentences(run), *effect_sentences(run)]


def _opened(folder: str | Path | SavedRun) -> SavedRun:
    return folder if isinstance(folder, SavedRun) else SavedRun(Path(folder))


def write_report(
    folder: str | Path | SavedRun, figures: Mapping[str, go.Figure] | None = None
) -> Path:
    """Render report.html from the folder's files; returns its path.

    `figures` are those of `report_figures`, if they were made already.
    """
    run = _opened(folder)
    page = _page(run)
    return write_run_page(
        run,
        "report.html",
        report_figures(run) if figures is None else figures,
        title=_title(run),
        question=page.question(run),
        findings=_first_screen(run),
        sentences=_details(run),
        groups=dict(zip(run.provenance["groups"], GROUP_COLOURS, strict=False)),
        tile_groups=_tile_groups(run),
        layers=_layer_table(run),
        fit_head=SAE_CHECK_HEAD,
        fit=sae_check_rows(run.table("check")),
        sections=page.sections(run),
        is_contrast=page is CONTRAST,
        **effect_content(run),
    )


def _title(run: SavedRun) -> str:
    model = model_title(run.provenance["model"]["name"])
    name = run.config["analyzer"]["name"].replace("_", " ")
    subject = " against ".join(run.provenance["groups"]) if name == "contrast" else name
    sae = run.provenance["sae"]
    control = f", {sae_words(sae)}" if sae.get("control") else ""
    return f"{subject}: {model}, {_hookpoints(run)}{control}"


def _saes(run: SavedRun) -> list[dict[str, Any]]:
    return run.provenance.get("saes") or [run.provenance["sae"]]


def _hookpoints(run: SavedRun) -> str:
    saes = _saes(run)
    # A contrast of one layer may list the SAEs of the layers that interventions change.
    if len(saes) == 1 or _page(run) is CONTRAST:
        return saes[0]["hookpoint"]
    return f"{len(saes)} layers, {saes[0]['hookpoint']} to {saes[-1]['hookpoint']}"


def _tile_groups(run: SavedRun) -> list[TileGroup]:
    groups = []
    for title, text, labels in _GROUPS:
        tiles = [(label, run.metrics[k]) for k, label in labels.items() if k in run.metrics]
        if tiles:
            groups.append(TileGroup(title, text, tiles))
    return groups


def _layer_table(run: SavedRun) -> Table | None:
    """The SAE metrics of a run over several layers."""
    saes = _saes(run)
    labels = {**_SPARSITY, **_RECONSTRUCTION}
    rows = []
    for sae in saes:
        layer = sae["hookpoint"].partition(".")[0].removeprefix("layer_")
        values = [run.metrics.get(f"{key}_layer_{layer}") for key in labels]
        rows.append([sae["hookpoint"], sae["d_sae"], *map(cell, values)])
    is_empty = all(value is None for row in rows for value in row[2:])
    if len(saes) == 1 or is_empty:
        return None
    return Table(["hookpoint", "d_sae", *labels.values()], rows)
