"""Metrics and tables of an evaluation, with intervals over texts or entities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saexp.analysis.evaluation import Evaluation
from saexp.results import Result
from saexp.saes.sae import SparseAutoencoder
from saexp.saes.validation import POOR
from saexp.stats.intervals import ratio_interval

Numbers = dict[str, float | int | None]
Sums = np.ndarray | np.floating | np.integer
ABLATIONS = {"zero": "", "mean": "_mean"}
"""What takes the stream's place -> ending of the scores that compare with it."""


def fractions(sums: Mapping[str, Sums]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric name -> (numerator, denominator), from sums over positions (Evaluation.texts).

    Both are linear in the sums, which are arrays of any one shape: those of single texts add up to
    those of all. ce_loss_score = (CE_ablated - CE_sae) / (CE_ablated - CE_clean); kl_score =
    (KL_ablated - KL_sae) / KL_ablated; ablated by zeros, with the ending `_mean` by the mean.
    ce_increase = CE_sae - CE_clean. Variance is around the mean of all texts.
    """
    s = {name: np.asarray(values, dtype=np.float64) for name, values in sums.items()}
    there = {name: ending for name, ending in ABLATIONS.items() if f"ce_{name}" in s}
    found = {f"reconstruction/ce_{k}": (s[f"ce_{k}"], s["n_scored"]) for k in ("clean", "sae")}
    found |= {f"reconstruction/ce_{k}": (s[f"ce_{k}"], s["n_scored"]) for k in there}
    found |= {f"reconstruction/kl_{k}": (s[f"kl_{k}"], s["n_compared"]) for k in ("sae", *there)}
    found["reconstruction/ce_increase"] = (s["ce_sae"] - s["ce_clean"], s["n_scored"])
    for name, ending in there.items():
        ce, kl = s[f"ce_{name}"], s[f"kl_{name}"]
        found[f"reconstruction/ce_loss_score{ending}"] = (ce - s["ce_sae"], ce - s["ce_clean"])
        found[f"reconstruction/kl_score{ending}"] = (kl - s["kl_sae"], kl)
    n, spread, spread_of_all = s["n_spliced"], s["spread"], s["spread_of_all"]
    found |= {
        "reconstruction/explained_variance": (spread - s["error"], spread),
        "reconstruction/explained_variance_legacy": (s["legacy"], n),
        "reconstruction/explained_variance_all_positions": (
            spread_of_all - s["error_of_all"],
            spread_of_all,
        ),
        "reconstruction/high_norm_variance_fraction": (s["spread_high_norm"], spread_of_all),
        "reconstruction/mse": (s["error"], n),
        "reconstruction/cosine": (s["cosine"], n),
        "reconstruction/l2_ratio": (s["ratio"], n),
        "reconstruction/relative_bias": (s["output"], s["product"]),
        "sparsity/l0": (s["active"], n),
        "sparsity/mean_active": (s["value"], s["active"]),
    }
    return found


def numbers(
    evaluation: Evaluation,
    n_bootstrap: int,
    seed: int,
    confidence: float = 0.95,
    *,
    units: Sequence[str] | None = None,
) -> Numbers:
    """Every metric of one SAE, those of `fractions` with `_ci_low` and `_ci_high`.

    Intervals are by the studentised bootstrap of the ratio (`ratio_interval`) over `units`, each
    with the sums of its texts; without units every text is one. A score is NaN where the ablation
    costs nothing, as is every number that is not defined. Intervals are None for fewer than `MIN_N`
    units, without resamples, and for a number that has no spread.
    """
    table = evaluation.texts
    of_text = (
        np.arange(len(table)) if units is None else pd.factorize(np.asarray(units, dtype=object))[0]
    )
    of_unit = table.groupby(of_text, sort=False).sum()
    values = {str(name): of_unit[name].to_numpy(dtype=np.float64) for name in of_unit.columns}
    parts = fractions(values)
    above, below = (np.stack([pair[i] for pair in parts.values()], axis=1) for i in (0, 1))
    low, high = ratio_interval(above, below, seed, n_resamples=n_bootstrap, confidence=confidence)
    found: Numbers = {}
    for i, (name, (numerator, denominator)) in enumerate(parts.items()):
        total = denominator.sum()
        defined = total > 0 if "score" in name else total != 0
        found[name] = float(numerator.sum() / total) if defined else float("nan")
        for side, limit in (("low", low[i]), ("high", high[i])):
            is_number = defined and np.isfinite(limit)
            found[f"{name}_ci_{side}"] = float(limit) if is_number else None
    measured = evaluation.stream.result()
    for name in ("max_active", "dead_fraction", "n_positions"):
        found[f"sparsity/{name}"] = measured[f"sparsity/{name}"]
    for name in ("explained_variance_median", "median_norm", "n_high_norm"):
        found[f"reconstruction/{name}"] = measured[f"reconstruction/{name}"]
    found["sparsity/n_dead"] = int((evaluation.stream.n_active == 0).sum())
    found["evaluation/n_units"] = len(of_unit)
    found["evaluation/n_scored"] = int(values["n_scored"].sum())
    found["evaluation/n_compared"] = int(values["n_compared"].sum())
    return found


def densities(evaluation: Evaluation) -> pd.DataFrame:
    """Per latent: positions and share of spliced positions where it fires, mean there, maximum."""
    stream = evaluation.stream
    n_active = stream.n_active.numpy()
    return pd.DataFrame(
        {
            "latent": np.arange(len(n_active)),
            "n_active": n_active,
            "frequency": n_active / stream.n,
            "mean_active": stream.totals.numpy() / np.maximum(n_active, 1),
            "max_active": stream.maxima.numpy(),
        }
    )


def l0_table(evaluation: Evaluation) -> pd.DataFrame:
    """Per number of active latents, at how many spliced positions there are so many."""
    counts = evaluation.l0_histogram
    return pd.DataFrame({"n_active": np.arange(len(counts)), "n_positions": counts})


@dataclass
class Part:
    """Results of one SAE."""

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
    """Suffix of the metrics that identifies the SAE among several, such as `layer_2_width_256`."""
    words = [f"layer_{part.layer}"] if many_layers or not many_widths else []
    words += [f"width_{part.about['d_sae']}"] if many_widths else []
    return "_".join(words)


def side_by_side(parts: Sequence[Part], *, many_layers: bool, many_widths: bool) -> Result:
    """Metrics, with the SAE's label as ending where there are many, and tables `evaluation` (a row
    per SAE), `densities`, `l0_histogram` and `texts`, each with the label in column `sae`."""
    result, rows = Result(), []
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
    numbers, notes = part.numbers, [f"{name}: {note}" for note in part.notes]
    explained = numbers["reconstruction/explained_variance"]
    if explained is not None and explained < POOR:
        notes.append(
            f"{name} explains only {explained:.2f} of the variance of {part.about['writes']}; "
            "check that it was trained on this model, this stream and similar texts"
        )
    for ablation, ending in ABLATIONS.items():
        if np.isnan(numbers[f"reconstruction/ce_loss_score{ending}"] or 0.0):
            notes.append(
                f"{name}: no score relative to {ablation} ablation, which does not raise the loss"
            )
    if not part.resumed:
        notes.append(
            f"{name}: the blocks of this model pass on more than the residual stream, so every "
            "pass was run from the token ids"
        )
    return notes
