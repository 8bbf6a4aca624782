"""The content of a dashboard's cards as plain values."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.analysis.latent_scores import nearest_directions
from saexp.config import DashboardConfig
from saexp.data.tokenization import token_texts
from saexp.errors import ModelError
from saexp.latents.examples import Window, Windows, tally_store, values_at
from saexp.latents.statistics import Tally, at_quantiles
from saexp.models.loading import LanguageModel
from saexp.models.weights import ADDED, Unembedding
from saexp.pipeline.collect import Gathered
from saexp.saes.sae import SparseAutoencoder

OTHER = "other rows"
"""Label of rows that are of neither group."""
N_SAMPLE = 1000
"""Firings per latent that quantile examples are drawn from."""
TREATED = (
    "The decoder row, read by each token's unembedding through the final norm's linear part (its "
    "gain, and a LayerNorm's subtraction of the mean): the direct path alone. The norm's division "
    "by the stream's size is left out, one positive factor for all tokens, so ranks are exact and "
    "values are relative. The norm's bias and a cap on the logits are left out too; they change no "
    "rank of the direction's own part."
)


def _labels(gathered: Gathered) -> tuple[list[str], np.ndarray]:
    """(labels, label number of each row); one label where the data has no groups."""
    rows, groups = gathered.placement.rows, list(gathered.examples.groups)
    if not groups:
        return ["all rows"], np.zeros(len(rows), dtype=np.int64)
    number = rows["group"].map({g: i for i, g in enumerate(groups)})
    of_row = number.fillna(len(groups)).to_numpy(dtype=np.int64)
    return [*groups, *([OTHER] if (of_row == len(groups)).any() else [])], of_row


def tallied(
    latents: list[int],
    sae: SparseAutoencoder,
    gathered: Gathered,
    options: DashboardConfig,
    seed: int,
) -> tuple[list[str], Tally]:
    """(labels of the groups, the chosen latents over all ordinary rows)."""
    labels, of_row = _labels(gathered)
    tally = Tally(
        np.array(latents, dtype=np.int64),
        d_sae=sae.d_sae,
        n_groups=len(labels),
        n_top=options.n_top,
        n_sample=N_SAMPLE,
        correlate=options.n_correlated > 0,
        seed=seed,
    )
    texts = gathered.placement.rows["text_id"].to_numpy(dtype=np.int64)
    ordinary = gathered.ordinary(sae.hookpoints).mask
    return labels, tally_store(gathered.store, sae, texts, of_row, tally, ordinary)


def numbers(tally: Tally, i: int) -> dict[str, Any]:
    n, histogram = int(tally.active[i].sum()), tally.histogram(i)
    return {
        "latent": int(tally.latents[i]),
        "n_active": n,
        "density": n / tally.n_rows,
        "active_of_group": tally.active[i].tolist(),
        "mean_active": float(tally.total[i]) / n if n else None,
        "max": float(tally.maximum[i]),
        "histogram": {"width": histogram.width, "counts": histogram.counts.tolist()},
    }


def examples(
    tally: Tally,
    sae: SparseAutoencoder,
    gathered: Gathered,
    model: LanguageModel,
    options: DashboardConfig,
) -> list[dict[str, Any]]:
    """Per latent the strongest examples and those at quantiles, every ordinary token with its
    value."""
    placement = gathered.placement
    windows = Windows(
        placement.rows,
        placement.texts,
        model.tokenizer,
        before=options.before,
        after=options.after,
        shown=gathered.ordinary(sae.hookpoints).mask,
    )
    wanted: dict[int, np.ndarray] = {}
    shown: list[list[tuple[float | None, list[tuple[int, Window]]]]] = []
    for i, latent in enumerate(tally.latents):
        top = tally.top(i)
        parts = at_quantiles(
            tally.sample(i), options.quantiles, options.n_quantile, set(top["text"])
        )
        mine: list[tuple[float | None, list[tuple[int, Window]]]] = []
        for quantile, part in [(None, top), *parts]:
            mine.append((quantile, [(int(r), windows.around(int(r))) for r in part["row"]]))
        shown.append(mine)
        rows = {r for _, part in mine for _, w in part for r in w.rows if r is not None}
        wanted[int(latent)] = np.array(sorted(rows), dtype=np.int64)
    found = values_at(gathered.store, sae, wanted)
    examples = []
    for latent, mine in zip(tally.latents, shown, strict=True):
        value = dict(zip(wanted[int(latent)].tolist(), found[int(latent)].tolist(), strict=True))
        parts = [(q, [_example(placement.rows, r, w, value) for r, w in part]) for q, part in mine]
        at = [{"quantile": q, "examples": part} for q, part in parts[1:] if part]
        examples.append({"top": parts[0][1], "quantiles": at})
    return examples


def _example(
    rows: pd.DataFrame, row: int, window: Window, value: dict[int, float]
) -> dict[str, Any]:
    about = rows.iloc[row]
    return {
        "tokens": window.tokens,
        "values": [None if r is None else _short(value[r]) for r in window.rows],
        "peak": window.peak,
        "cut": list(window.cut),
        "value": _short(value[row]),
        "id": str(about["example_id"]),
        "group": None if pd.isna(about["group"]) else str(about["group"]),
        "split": None if pd.isna(about["split"]) else str(about["split"]),
    }


def _short(value: float) -> float:
    """Four digits, as the page shows it."""
    return float(f"{value:.4g}")


def tokens(
    latents: list[int],
    sae: SparseAutoencoder,
    model: LanguageModel,
    options: DashboardConfig,
    notes: list[str],
) -> tuple[list[dict[str, Any]], str | None]:
    """(promoted and suppressed tokens per latent, how the norm was treated).

    Where they cannot be told, nothing of each, and a note.
    """
    none: list[dict[str, Any]] = [{} for _ in latents]
    if not options.n_tokens:
        return none, None
    written = sae.hookpoint_out or sae.hookpoint
    if written.stream not in ADDED:
        notes.append(
            f"promoted tokens are not shown: {written.stream} is not what the residual stream is "
            "made of"
        )
        return none, None
    try:
        out = Unembedding(model)
    except ModelError as error:
        notes.append(f"promoted tokens are not shown: {error}")
        return none, None
    directions = sae.directions(latents).detach().float()
    found: list[dict[str, Any]] = [{} for _ in latents]
    for side, sign in (("promoted", 1), ("suppressed", -1)):
        ids = _tokens_of(model.tokenizer, out, sign * directions, options.n_tokens)
        shown = token_texts(model.tokenizer, [t for one in ids for t in one])
        for i, one in enumerate(ids):
            read = out.readout(torch.tensor(one)).cpu()
            values = (read @ directions[i].cpu().to(read.dtype)).tolist()
            pairs = zip(one, values, strict=True)
            found[i][side] = [[shown[t], _short(v)] for t, v in pairs]
    return found, TREATED


def _tokens_of(tokenizer: Any, out: Unembedding, directions: Tensor, k: int) -> list[list[int]]:
    """The k tokens each direction raises most, of those that the tokenizer has."""
    n = len(tokenizer)
    padding = max(0, len(out.weight) - n)
    ranked = out.top_tokens(directions, k + padding).tolist()
    return [[t for t in one if t < n][:k] for one in ranked]


def alike(tally: Tally, sae: SparseAutoencoder, options: DashboardConfig) -> list[dict[str, Any]]:
    """Per latent those of similar direction, and those that rise and fall with it."""
    latents = tally.latents
    directions = sae.directions(latents.tolist())
    near = nearest_directions(directions, sae.W_dec, options.n_similar, exclude=latents)
    found = []
    for i, latent in enumerate(latents):
        row = tally.correlations_of(i) if tally.correlate else np.zeros(0)
        found.append(
            {
                "similar": _pairs(near.latents[i], near.cosines[i]),
                "correlated": _strongest(row, int(latent), options.n_correlated),
            }
        )
    return found


def _pairs(latents: np.ndarray, values: np.ndarray) -> list[list[Any]]:
    return [[int(f), _short(float(v))] for f, v in zip(latents, values, strict=True)]


def _strongest(row: np.ndarray, own: int, n: int) -> list[list[Any]]:
    """The n latents with the largest correlation, itself and those that never vary left out."""
    if not len(row):
        return []
    order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")
    kept = order[(order != own) & ~np.isnan(row[order])][:n]
    return _pairs(kept, row[kept])
