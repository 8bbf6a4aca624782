"""Self-contained pages rendered from a run's saved files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from saexp.errors import StoreError
from saexp.files import RUN_FOLDER, write_text
from saexp.reports.effect_tables import attribution_tables, effect_content
from saexp.reports.effects import place_words
from saexp.reports.figures import colours, run_figures
from saexp.reports.finding import HEAD, fit_rows, power_sentences, sentences
from saexp.reports.saved import SavedRun
from saexp.stats.power import holm
from saexp.wording import counted, is_above_chance, sae_words

TEMPLATES = Path(__file__).parent / "templates"
N_LATENTS, N_ROWS = 15, 8

CAPTIONS = {
    "frequencies": "Fraction of held-out entities (of their rows) on which each latent is active, "
    "by group. Latents that separate the groups lie far from the dotted line.",
    "values": "Activations of the leading latents on held-out rows; the bar at 0 is where the "
    "latent is silent.",
    "types": "Separation of the leading latents for each entity type, held-out entities. A general "
    "latent is high for all of them.",
}


def number(value: Any, digits: int = 3) -> str:
    """A number for reading: scientific where tiny, a dash where there is none."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    size = abs(float(value))
    return f"{value:.1e}" if size < 1e-3 else f"{value:.{digits}f}" if size < 10 else f"{value:.1f}"


def environment() -> jinja2.Environment:
    """Templates with everything escaped that is not said to be markup."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["number"] = number
    return made


def figure_json(figure: go.Figure) -> str:
    """A figure's data and layout for a <script>; '<' is escaped so that no text can end it."""
    return (figure.to_json() or "{}").replace("<", "\\u003c")


def write_page(path: Path, template: str, figures: Mapping[str, go.Figure], **content: Any) -> Path:
    """Render a template with its figures and plotly itself inside; returns the path.

    Raises StoreError where it cannot be written.
    """
    page = (
        environment()
        .get_template(template)
        .render(
            figures={name: figure_json(figure) for name, figure in figures.items()},
            plotly=get_plotlyjs(),
            **content,
        )
    )
    write_text(path, page, option=RUN_FOLDER)
    return path


def write_report(folder: str | Path, figures: Mapping[str, go.Figure] | None = None) -> Path:
    """Render report.html from the folder's files; returns its path.

    `figures` are those of `run_figures`, where they were made already.
    """
    run = SavedRun(Path(folder))
    figures = run_figures(folder) if figures is None else figures
    return write_page(
        Path(folder) / "report.html",
        "report.html",
        figures,
        title=_title(run),
        groups=colours(run),
        finding=sentences(run),
        notes=run.provenance["notes"],
        asked=_asked(run),
        captions=CAPTIONS,
        stream=_stream(run),
        power=power_sentences(run),
        fit_head=HEAD,
        fit=fit_rows(run),
        tables=_latent_tables(run),
        attribution=attribution_tables(run),
        **effect_content(run),
        rows=_example_rows(run),
        skips=run.provenance["skips"],
        provenance=provenance_rows(run),
        config=run.config_text,
    )


def _title(run: SavedRun) -> str:
    short = run.provenance["model"]["name"].rpartition("/")[2]
    first, second = run.groups
    sae = run.provenance["sae"]
    control = f", {sae_words(sae)}" if "control" in sae else ""
    return f"{first} against {second}: {short}, {sae['hookpoint']}{control}"


def _asked(run: SavedRun) -> str:
    """What the run was to find out."""
    cfg, about = run.config, run.provenance
    first, second = run.groups
    causal = cfg["intervention"]
    words = (
        f"Which latents of the SAE {about['sae'].get('name', cfg['sae']['name'])} tell {first} "
        f"from {second} in the data set '{about['dataset']['name']}' "
        f"({about['dataset']['n_examples']} examples), at "
        f"{place_words(cfg['positions']['name'])}?"
    )
    if causal["name"] == "none":
        return words
    asked = ", ".join(causal["outcomes"]).replace("_", " ")
    test = f"intervention {causal['name'].replace('_', ' ')}"
    if causal["name"] != "orthogonalize":
        test += f" at {place_words(causal['where'])}"
    return f"{words} Do they cause it? Tested by {test}, judged by {asked}."


_STREAM = (
    ("collection/n_rows", "rows"),
    ("collection/n_skipped", "skipped"),
    ("collection/tokens_forwarded", "tokens forwarded"),
    ("sparsity/l0", "L0"),
    ("sparsity/mean_active", "mean active value"),
    ("sparsity/dead_fraction", "share of latents never fired"),
    ("reconstruction/explained_variance", "explained variance, these positions"),
    ("reconstruction/explained_variance_legacy", "… by the legacy formula"),
    ("reconstruction/explained_variance_median", "… at the median position"),
    ("reconstruction/explained_variance_all_positions", "… with high-norm positions"),
    ("reconstruction/n_high_norm", "high-norm positions"),
    ("reconstruction/cosine", "cosine"),
    ("contrast/n_tested", "latents tested"),
    ("contrast/n_significant", "significant (train)"),
    ("contrast/n_significant_test", "… again on test"),
    ("contrast/token_count_p_value", "p of equal token counts"),
)


def _stream(run: SavedRun) -> list[tuple[str, Any]]:
    return [(label, run.metrics[key]) for key, label in _STREAM if key in run.metrics]


def _latent_tables(run: SavedRun) -> list[dict[str, Any]]:
    """Per direction the selected latents with their numbers on the test split."""
    tables = []
    for group in run.groups:
        chosen = run.selected(group).head(N_LATENTS)
        first = group == run.groups[0]
        scores = [c for c in ("input_score", "output_score") if c in chosen]
        rows = []
        for row in chosen.to_dict("records"):
            auroc, low, high = (row.get(c) for c in ("auroc_test", "ci_low_test", "ci_high_test"))
            if not first:
                auroc = 1 - row["auroc_test"]
                low, high = (None if x is None else 1 - x for x in (high, low))
            cells = [row["latent"], row["layer"], auroc, low, high, row["min_auroc_test"]]
            cells += [row[f"freq_{g}_test"] for g in run.groups]
            cells += [row[f"mean_{g}_test"] for g in run.groups]
            cells += [row["min_separation_test"], row["q_value"], row["q_value_test"]]
            cells.append(row["background_freq"])
            rows.append([*cells, *(row[c] for c in scores)])
        head = ["latent", "layer", "AUROC", "low", "high", "min over types"]
        head += [f"fires, {g}" for g in run.groups] + [f"mean, {g}" for g in run.groups]
        head += ["min separation", "q train", "q test", "background"]
        head += [c.replace("_", " ") for c in scores]
        tables.append({"group": group, "title": _selected(run, group), "head": head, "rows": rows})
    return tables


def _selected(run: SavedRun, group: str) -> str:
    """How many latents a direction has, and which of them the causal test changes."""
    told = counted(len(run.selected(group)), "selected latent")
    if len(run.selected(group)) == run.config["analyzer"].get("top_k"):
        told += " (as many as analyzer.top_k lets in)"
    if len(run.selected(group)) > N_LATENTS:
        told += f", the first {N_LATENTS}"
    if at_chance := _at_chance(run, group):
        told += (
            f"; not above chance on held-out {run.unit_word} (Holm over the selected): "
            f"{', '.join(at_chance)}"
        )
    summary = run.effects_summary
    if summary is None:
        return told
    mine = summary[(summary["direction"] == group) & summary["role"].isin(["single", "group"])]
    # In runs of several layers a latent is named with its layer.
    names = {name for label in mine["latent"].astype(str) for name in label.split("+")}
    rows = run.selected(group).to_dict("records")
    changed = [
        str(row["latent"])
        for row in rows
        if {str(row["latent"]), f"{row['layer']}:{row['latent']}"} & names
    ]
    return f"{told}; changed below: {', '.join(changed)}" if changed else told


def _at_chance(run: SavedRun, group: str) -> list[str]:
    """Selected latents not above chance on the test split, after Holm over those of both groups."""
    chosen = pd.concat([run.selected(g) for g in run.groups])
    if chosen.empty:
        return []
    own = np.where(chosen["direction"] == run.groups[0], 1, -1)
    aurocs = 0.5 + own * (chosen["auroc_test"].to_numpy(dtype=float) - 0.5)
    rows = zip(
        chosen["latent"],
        chosen["direction"],
        aurocs,
        holm(chosen["p_value_test"].to_numpy(dtype=float)),
        strict=True,
    )
    alpha = run.config["analyzer"]["alpha"]
    return [
        str(latent)
        for latent, direction, auroc, p_value in rows
        if direction == group and not is_above_chance(auroc, p_value, alpha)
    ]


def _example_rows(run: SavedRun) -> list[dict[str, Any]]:
    """Texts on which the first latent of each direction is strongest, held-out rows."""
    activations = run.table("activations")
    if activations is None or not len(activations):
        return []
    blocks = []
    for group in run.groups:
        chosen = run.selected(group)
        if chosen.empty:
            continue
        latent = int(chosen.iloc[0]["latent"])
        mine = activations[(activations["latent"] == latent) & (activations["split"] == "test")]
        top = mine.sort_values("value", ascending=False, kind="stable").head(N_ROWS)
        rows = top[["text", "group", "value"]].to_numpy().tolist()
        blocks.append({"group": group, "latent": latent, "rows": rows})
    return blocks


def provenance_rows(run: SavedRun) -> list[tuple[str, str]]:
    """What the run was made of, as (name, value)."""
    about = run.provenance
    sae, model, machine = about["sae"], about["model"], about["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in about["seconds"].items())
    return [
        ("command", about["command"]),
        ("started", about["started"]),
        ("model", f"{model['name']} (revision {model.get('revision') or 'default'})"),
        ("model weights", model["fingerprint"]),
        ("SAE", f"{sae.get('name')} ({sae.get('architecture')}, d_sae {sae['d_sae']})"),
        ("SAE weights", str(sae.get("fingerprint"))),
        ("activation store", about["store"]["key"]),
        ("seed", str(about["seed"])),
        ("machine", f"{machine['system']}, {machine['cores']} cores, {machine['device']}"),
        ("seconds", seconds),
        ("versions", versions),
    ]


DATA, PAGE = "dashboard.json", "dashboard.html"


def read_dashboard(folder: str | Path) -> dict[str, Any]:
    """What the page shows. Raises StoreError where the folder holds none."""
    content = SavedRun(Path(folder)).object(DATA)
    if content is None:
        raise StoreError(f"{folder} holds no dashboard ({DATA} is missing)")
    return content


def write_dashboard(folder: str | Path) -> Path:
    """Render the page from the folder's files; returns its path.

    Histograms are drawn by the page itself, so plotly is not in it. Nothing is loaded from
    elsewhere; Neuronpedia's own view of a latent is, once a reader opens it.
    """
    run, content = SavedRun(Path(folder)), read_dashboard(folder)
    about = run.provenance
    short = about["model"]["name"].rpartition("/")[2]
    page = (
        environment()
        .get_template("dashboard.html")
        .render(
            title=f"{len(content['latents'])} latents: {short}, {about['sae']['hookpoint']}",
            finding=about["finding"],
            notes=about["notes"],
            norm=content["norm"],
            n_rows=content["n_rows"],
            n_sample=content["n_sample"],
            positions=content["positions"].replace("_", " "),
            neuronpedia_list=content["neuronpedia_list"],
            # '<' is escaped so that no text can end the script.
            data=json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"),
            fit_head=HEAD,
            fit=fit_rows(run),
            provenance=provenance_rows(run),
            config=run.config_text,
        )
    )
    path = Path(folder) / PAGE
    write_text(path, page, option=RUN_FOLDER)
    return path
