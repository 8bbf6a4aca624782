"""From an SAE's sums per text to its numbers, with bootstrap intervals over texts or entities.

Every number is a ratio of sums over positions, or made of such ratios; a text is drawn with all its
positions, so that texts of any length and the likeness of neighbouring tokens are allowed for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saexp.analysis.evaluation import Evaluation
from saexp.analysis.resampling import UnitBootstrap

Numbers = dict[str, float | int | None]
Sums = np.ndarray | np.floating | np.integer
ABLATIONS = {"zero": "", "mean": "_mean"}
"""What takes the stream's place -> ending of the scores that compare with it."""


def ratios(sums: Mapping[str, Sums]) -> dict[str, Any]:
    """Metric name -> value, from sums over positions (Evaluation.texts); NaN where undefined.

    Arrays of any one shape, so that many resamples are done at once. ce_loss_score =
    (CE_ablated - CE_sae) / (CE_ablated - CE_clean), undefined where the ablation costs nothing;
    kl_score = (KL_ablated - KL_sae) / KL_ablated; ablated by zeros, with the ending `_mean` by the
    mean. ce_increase = CE_sae - CE_clean. Variance is around the mean of all texts.
    """
    s = {name: np.asarray(values, dtype=np.float64) for name, values in sums.items()}
    there = {name: ending for name, ending in ABLATIONS.items() if f"ce_{name}" in s}
    with np.errstate(divide="ignore", invalid="ignore"):
        ce = {k: s[f"ce_{k}"] / s["n_scored"] for k in ("clean", "sae", *there)}
        kl = {k: s[f"kl_{k}"] / s["n_compared"] for k in ("sae", *there)}
        found = {f"reconstruction/ce_{k}": v for k, v in ce.items()}
        found |= {f"reconstruction/kl_{k}": v for k, v in kl.items()}
        found["reconstruction/ce_increase"] = ce["sae"] - ce["clean"]
        for name, ending in there.items():
            lost = ce[name] - ce["clean"]
            score = (ce[name] - ce["sae"]) / lost
            found[f"reconstruction/ce_loss_score{ending}"] = np.where(lost > 0, score, np.nan)
            score = (kl[name] - kl["sae"]) / kl[name]
            found[f"reconstruction/kl_score{ending}"] = np.where(kl[name] > 0, score, np.nan)
        n = s["n_spliced"]
        found |= {
            "reconstruction/explained_variance": 1 - s["error"] / s["spread"],
            "reconstruction/explained_variance_legacy": s["legacy"] / n,
            "reconstruction/explained_variance_all_positions": (
                1 - s["error_of_all"] / s["spread_of_all"]
            ),
            "reconstruction/high_norm_variance_fraction": s["spread_high_norm"]
            / s["spread_of_all"],
            "reconstruction/mse": s["error"] / n,
            "reconstruction/cosine": s["cosine"] / n,
            "reconstruction/l2_ratio": s["ratio"] / n,
            "reconstruction/relative_bias": s["output"] / s["product"],
            "sparsity/l0": s["active"] / n,
            "sparsity/mean_active": s["value"] / s["active"],
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
    """Every metric of one SAE, those of `ratios` with `_ci_low` and `_ci_high` (percentiles).

    Texts of one of `units` (an entity, say) are drawn together; without them every text is drawn by
    itself. The same seed draws the same texts for every SAE. A number that is not defined is NaN;
    intervals are None for fewer than two units or without resamples.
    """
    table = evaluation.texts
    values = {name: table[name].to_numpy(dtype=np.float64) for name in table.columns}
    found: Numbers = {}
    of_text = np.arange(len(table)) if units is None else np.asarray(units, dtype=object)
    intervals = _intervals(values, UnitBootstrap(of_text, n_bootstrap, seed), confidence)
    for name, value in ratios({k: v.sum() for k, v in values.items()}).items():
        low, high = intervals.get(name, (None, None))
        number = float(value) if np.isfinite(value) else float("nan")
        found |= {name: number, f"{name}_ci_low": low, f"{name}_ci_high": high}
    measured = evaluation.stream.result()
    for name in ("max_active", "dead_fraction", "n_positions"):
        found[f"sparsity/{name}"] = measured[f"sparsity/{name}"]
    for name in ("explained_variance_median", "median_norm", "n_high_norm"):
        found[f"reconstruction/{name}"] = measured[f"reconstruction/{name}"]
    found["sparsity/n_dead"] = int((evaluation.stream.n_active == 0).sum())
    found["evaluation/n_scored"] = int(values["n_scored"].sum())
    found["evaluation/n_compared"] = int(values["n_compared"].sum())
    return found


def _intervals(
    values: Mapping[str, np.ndarray], bootstrap: UnitBootstrap, confidence: float
) -> dict[str, tuple[float | None, float | None]]:
    names = list(values)
    stacked = np.stack([values[name] for name in names])
    if not bootstrap.n_resamples or bootstrap.n_units < 2:
        return {}
    drawn: dict[str, list[np.ndarray]] = {}
    for weights in bootstrap.draws():
        sums = dict(zip(names, stacked @ bootstrap.rows(weights), strict=True))
        for name, resampled in ratios(sums).items():
            drawn.setdefault(name, []).append(resampled)
    tail = (1 - confidence) / 2
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, parts in drawn.items():
        all_of = np.concatenate(parts)
        finite = all_of[np.isfinite(all_of)]
        low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (np.nan, np.nan)
        found[name] = (float(low), float(high)) if len(finite) else (None, None)
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
