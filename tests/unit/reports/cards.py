"""Dashboards of made-up latents for tests of the page."""

import json
from pathlib import Path
from typing import Any

from saexp.reports.latents import write_dashboard
from tests.unit.reports.written import NASTY, run, write_json


def example(value: float, n_tokens: int = 37) -> dict[str, Any]:
    tokens = [f" tok{i}" for i in range(n_tokens)]
    values = [round(value * i / n_tokens, 3) for i in range(n_tokens)]
    tokens[3], values[3:5] = NASTY, [0.0, None]
    about = {"peak": n_tokens - 1, "cut": [True, False], "value": value}
    return {"tokens": tokens, "values": values, **about, "id": "a", "group": None, "split": "test"}


def card(latent: int, **more: Any) -> dict[str, Any]:
    return {
        "latent": latent,
        "n_active": 500 + latent,
        "density": 0.01,
        "active_of_group": [300, 200 + latent],
        "mean_active": 1.5,
        "max": 3.75,
        "histogram": {"width": 0.0625, "counts": [[100 - i for i in range(60)]] * 2},
        "top": [example(3.75 - i / 10) for i in range(10)],
        "quantiles": [
            {"quantile": q, "examples": [example(q), example(q)]}
            for q in (0.9, 0.75, 0.5, 0.25, 0.1)
        ],
        "promoted": [[f" word{i}", 1 - i / 10] for i in range(10)],
        "suppressed": [[f" not{i}", i / 10 - 1] for i in range(10)],
        "similar": [[i, 0.5] for i in range(6)],
        "correlated": [[i, 0.4] for i in range(6)],
        "contrast": None,
        "neuronpedia": None,
        **more,
    }


def content(cards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "how_chosen": "as named",
        "groups": ["known", "unknown"],
        "rows_of_group": [5000, 5000],
        "n_rows": 10000,
        "positions": "all",
        "norm": "as it is",
        "n_sample": 1000,
        "neuronpedia_list": None,
        "embed": "embed=true",
        "latents": cards,
    }


def written(folder: Path, cards: list[dict[str, Any]]) -> Path:
    """A run's folder with these cards; its page."""
    run(folder, causal=False, notes=("a note & <i>",))
    about = json.loads((folder / "provenance.json").read_text("utf-8"))
    write_json(folder / "provenance.json", {**about, "finding": [f"found {NASTY}"]})
    write_json(folder / "dashboard.json", content(cards))
    return write_dashboard(folder)
