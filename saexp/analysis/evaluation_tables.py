"""Several SAEs' numbers side by side: metrics, tables, and what a reader must know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saexp.analysis.evaluation import Evaluation
from saexp.analysis.evaluation_numbers import ABLATIONS, Numbers, densities, l0_table, numbers
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.saes.check import POOR


@dataclass
class Part:
    """One SAE's share of the result."""

    about: dict[str, Any]
    layer: int
    numbers: Numbers
    densities: pd.DataFrame
    l0: pd.DataFrame
    texts: pd.DataFrame
    resumed: bool
    notes: list[str]


def part_of(
    sae: SparseAutoencoder,
    one: Evaluation,
    n_bootstrap: int,
    seed: int,
    ids: Sequence[str],
    units: Sequence[str] | None = None,
) -> Part:
    """Everything that is kept of one SAE's evaluation; `ids` and `units` are the texts' own."""
    about = {
        "name": sae.metadata.get("name", "the SAE"),
        "architecture": sae.architecture,
        "hookpoint": sae.hookpoint.name,
        "writes": (sae.hookpoint_out or sae.hookpoint).name,
        "d_sae": sae.d_sae,
        "control": sae.metadata.get("control"),
        "fingerprint": sae.metadata.get("fingerprint"),
    }
    texts = one.texts.copy()
    texts.insert(0, "example_id", list(ids))
    return Part(
        about=about,
        layer=sae.hookpoint.layer,
        numbers=numbers(one, n_bootstrap, seed, units=units),
        densities=densities(one),
        l0=l0_table(one),
        texts=texts,
        resumed=one.resumed,
        notes=one.notes,
    )


def label(part: Part, many_layers: bool, many_widths: bool) -> str:
    """What tells it from the other SAEs, as the ending of its metrics: `layer_2_width_256`."""
    words = [f"layer_{part.layer}"] if many_layers or not many_widths else []
    words += [f"width_{part.about['d_sae']}"] if many_widths else []
    return "_".join(words)


def side_by_side(parts: Sequence[Part], *, many_layers: bool, many_widths: bool) -> TaskResult:
    """Metrics, with the SAE's label as ending where there are many, and tables `evaluation` (a row
    per SAE), `densities`, `l0_histogram` and `texts`, each with the label in column `sae`."""
    result, rows = TaskResult(), []
    labels = [label(p, many_layers, many_widths) for p in parts]
    for part, name in zip(parts, labels, strict=True):
        ending = f"_{name}" if many_layers or many_widths else ""
        for metric, value in part.numbers.items():
            # What the unchanged model does is the same for all.
            shared = metric.startswith(("reconstruction/ce_clean", "evaluation/"))
            result.metrics[metric if shared else metric + ending] = value
        values = {metric.partition("/")[2]: value for metric, value in part.numbers.items()}
        rows.append({"sae": name, "layer": part.layer, **part.about, **values})
        result.notes += _remarks(part, name if ending else str(part.about["name"]))
    table = pd.DataFrame(rows)
    empty = [c for c in table.columns if table[c].isna().all()]
    result.tables["evaluation"] = table.astype(dict.fromkeys(empty, float))
    of_parts = {
        "densities": [p.densities for p in parts],
        "l0_histogram": [p.l0 for p in parts],
        "texts": [p.texts for p in parts],
    }
    for name, tables in of_parts.items():
        named = [t.assign(sae=of) for t, of in zip(tables, labels, strict=True)]
        result.tables[name] = pd.concat(named, ignore_index=True)
    return result


def _remarks(part: Part, name: str) -> list[str]:
    found, told = part.numbers, [f"{name}: {note}" for note in part.notes]
    explained = found["reconstruction/explained_variance"]
    if explained is not None and explained < POOR:
        told.append(
            f"{name} explains only {explained:.2f} of the variance of {part.about['writes']} here: "
            "is it an SAE of this very model and stream, and of such texts?"
        )
    for ablation, ending in ABLATIONS.items():
        if np.isnan(found[f"reconstruction/ce_loss_score{ending}"] or 0.0):
            told.append(f"{name}: no score against {ablation} ablation, which costs no loss here")
    if not part.resumed:
        told.append(
            f"{name}: this model's blocks carry more than the residual stream, so every pass was "
            "run from the token ids"
        )
    return told
