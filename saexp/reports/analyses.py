"""report.html of every analyzer but the contrast, from a run's saved files."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go

from saexp import registry
from saexp.files import RUN_FOLDER, write_text
from saexp.reports import (
    analyses_capability,
    analyses_generic,
    analyses_probe,
    analyses_stats,
    analyses_top_features,
)
from saexp.reports.analyses_generic import FIGURES, Section, Table, cell
from saexp.reports.effect_figures import effect_figures
from saexp.reports.effect_tables import effect_content
from saexp.reports.effects import effect_sentences
from saexp.reports.finding import HEAD, fit_rows
from saexp.reports.html import provenance_rows, write_page
from saexp.reports.saved import SavedRun
from saexp.reports.style import GROUP_COLOURS
from saexp.wording import sae_words

_PAGES: dict[str, ModuleType] = {
    "capability": analyses_capability,
    "probe": analyses_probe,
    "stats": analyses_stats,
    "top_features": analyses_top_features,
}
"""Each has `asked`, `figures`, `sentences` and `sections`, all from a SavedRun."""
_TILES = (
    ("collection/n_rows", "positions"),
    ("collection/n_skipped", "examples skipped"),
    ("collection/tokens_forwarded", "tokens forwarded"),
)
_STREAM = (
    ("sparsity/l0", "L0"),
    ("sparsity/mean_active", "mean active value"),
    ("sparsity/dead_fraction", "never fired here"),
    ("reconstruction/explained_variance", "explained variance"),
    ("reconstruction/explained_variance_legacy", "… legacy definition"),
    ("reconstruction/explained_variance_median", "… median position"),
    ("reconstruction/explained_variance_all_positions", "… with high-norm positions"),
    ("reconstruction/n_high_norm", "high-norm positions"),
    ("reconstruction/cosine", "cosine"),
    ("check/explained_variance", "explained variance, neutral text"),
)


def _page(run: SavedRun) -> ModuleType:
    return _PAGES.get(run.config["analyzer"]["name"], analyses_generic)


def save_figures(folder: str | Path, figures: Mapping[str, go.Figure]) -> None:
    """Keep figures that an analyzer made itself, so that the page needs no live object."""
    if figures:
        texts = {name: figure.to_json() for name, figure in figures.items()}
        write_text(Path(folder) / FIGURES, json.dumps(texts), option=RUN_FOLDER)


def analysis_figures(folder: str | Path) -> dict[str, go.Figure]:
    """Name -> figure, made from the run's saved tables; of one's own analyzer, those it saved."""
    run = SavedRun(Path(folder))
    return _page(run).figures(run) | effect_figures(run)


def findings(folder: str | Path) -> list[str]:
    """One sentence on the setting, then the analyzer's own."""
    run = SavedRun(Path(folder))
    about, cfg = run.provenance, run.config
    positions = cfg["positions"]["name"].replace("_", " ")
    n = about["dataset"]["n_examples"]
    setting = (
        f"{about['model']['name']}, {_place(run)}, {sae_words(about['sae'])}, data "
        f"set '{about['dataset']['name']}' ({n:,} example{'s' * (n != 1)}), "
        f"positions {positions}: {run.metrics['collection/n_rows']:,} rows."
    )
    return [setting, *_page(run).sentences(run), *effect_sentences(run)]


def write_analysis_report(
    folder: str | Path, figures: Mapping[str, go.Figure] | None = None
) -> Path:
    """Render report.html from the folder's files; returns its path.

    `figures` are those of `analysis_figures`, where they were made already.
    """
    run = SavedRun(Path(folder))
    page = _page(run)
    made: Mapping[str, go.Figure] = analysis_figures(folder) if figures is None else figures
    title = f"{run.config['analyzer']['name'].replace('_', ' ')}: "
    title += f"{run.provenance['model']['name'].rpartition('/')[2]}, {_place(run)}"
    return write_page(
        Path(folder) / "report.html",
        "analysis.html",
        made,
        title=title,
        asked=page.asked(run),
        finding=run.provenance["finding"],
        notes=run.provenance["notes"],
        tiles=_tiles(run),
        layers=_layer_table(run),
        fit_head=HEAD,
        fit=fit_rows(run),
        skips=run.provenance["skips"],
        sections=[*page.sections(run), *_plugin_sections(run)],
        groups=dict(zip(run.provenance["groups"], GROUP_COLOURS, strict=False)),
        **effect_content(run),
        provenance=provenance_rows(run),
        config=run.config_text,
    )


def _plugin_sections(run: SavedRun) -> list[Section]:
    """What the function that a plugin registered as `report_section` of its analyzer returns."""
    name = run.config["analyzer"]["name"]
    section = registry.report_section("analyzer", name)
    if section is None:
        return []
    content = section(run)
    if isinstance(content, str):
        return [Section(title=name.replace("_", " "), html=content)]
    return list(content)


def _place(run: SavedRun) -> str:
    saes = run.provenance["saes"]
    if len(saes) == 1:
        return saes[0]["hookpoint"]
    return f"{len(saes)} layers, {saes[0]['hookpoint']} to {saes[-1]['hookpoint']}"


def _tiles(run: SavedRun) -> list[tuple[str, Any]]:
    """Of several layers, the numbers per layer stand in a table of their own."""
    return [(label, run.metrics[k]) for k, label in (*_TILES, *_STREAM) if k in run.metrics]


def _layer_table(run: SavedRun) -> Table | None:
    saes = run.provenance["saes"]
    if len(saes) == 1:
        return None
    rows = []
    for sae in saes:
        layer = sae["hookpoint"].partition(".")[0].removeprefix("layer_")
        values = [run.metrics.get(f"{key}_layer_{layer}") for key, _ in _STREAM]
        rows.append([sae["hookpoint"], sae["d_sae"], *map(cell, values)])
    return Table(["hookpoint", "d_sae", *(label for _, label in _STREAM)], rows)
