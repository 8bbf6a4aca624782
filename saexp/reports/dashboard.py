"""dashboard.html: one self-contained page of single latents, rendered from dashboard.json."""

import json
from pathlib import Path
from typing import Any

from saexp.errors import StoreError
from saexp.files import RUN_FOLDER, write_text
from saexp.reports.fit import HEAD, fit_rows
from saexp.reports.html import environment, provenance_rows
from saexp.reports.saved import SavedRun

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
