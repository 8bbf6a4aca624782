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
from saexp.pipeline.collect import Collected
from saexp.saes.sae import SparseAutoencoder

OTHER = "other rows"
"""Label of rows that are of neither group."""
N_SAMPLE = 1000
"""Activations per latent that quantile examples are sampled from."""
TREATED = (
    "The decoder row, read by each token's unembedding through the final norm's linear part (its "
    "gain, and a LayerNorm's subtraction of the mean): the direct path alone. The norm's division "
    "by the stream's size is left out, one positive factor for all tokens, so ranks are exact and "
    "values are relative. The norm's bias and a cap on the logits are left out too; they change no "
    "rank of the direction's own part."
)


def _labels(collected: Collected) -> tuple[list[str], np.ndarray]:
    """(labels, label number of each row); one label where the data has no groups."""
    rows, groups = collected.placement.rows, list(collected.examples.groups)
    if not groups:
        return ["all rows"], np.zeros(len(rows), dtype=np.int64)
    number = rows["group"].map({g: i for i, g in enumerate(groups)})
    of_row = number.fillna(len(groups)).to_numpy(dtype=np.int64)
    return [*groups, *([OTHER] if (of_row == len(groups)).any() else [])], of_row


def tally_latents(
    latents: list[int],
    sae: SparseAutoencoder,
    collected: Collected,
    options: DashboardConfig,
    seed: int,
) -> tuple[list[str], Tally]:
    """(group labels, statistics of the chosen latents over all ordinary rows)."""
    labels, of_row = _labels(collected)
    tally = Tally(
        np.array(latents, dtype=np.int64),
        d_sae=sae.d_sae,
        n_groups=len(labels),
        n_top=options.n_top,
        n_sample=N_SAMPLE,
        correlate=options.n_correlated > 0,
        seed=seed,
    )
    texts = collected.placement.rows["text_id"].to_numpy(dtype=np.int64)
    ordinary = collected.ordinary(sae.hookpoints).mask
    return labels, tally_store(collected.store, sae, texts, of_row, tally, ordinary)


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
    collected: Collected,
    model: LanguageModel,
    options: DashboardConfig,
) -> list[dict[str, Any]]:
    """Per latent, the examples of highest activation and those at quantiles.

    Every ordinary token comes with its activation.
    """
    placement = collected.placement
    windows = Windows(
        placement.rows,
        placement.texts,
        model.tokenizer,
        before=options.before,
        after=options.after,
        shown=collected.ordinary(sae.hookpoints).mask,
    )
    rows_of: dict[int, np.ndarray] = {}
    shown: list[list[tuple[float | None, list[tuple[int, Window]]]]] = []
    for i, latent in enumerate(tally.latents):
        top = tally.top(i)
        parts = at_quantiles(
            tally.sample(i), options.quantiles, options.n_quantile, set(top["text"])
        )
        windows_of: list[tuple[float | None, list[tuple[int, Window]]]] = []
        for quantile, part in [(None, top), *parts]:
            windows_of.append((quantile, [(int(r), windows.around(int(r))) for r in part["row"]]))
        shown.append(windows_of)
        rows = {r for _, part in windows_of for _, w in part for r in w.rows if r is not None}
        rows_of[int(latent)] = np.array(sorted(rows), dtype=np.int64)
    values_of = values_at(collected.store, sae, rows_of)
    examples = []
    for latent, windows_of in zip(tally.latents, shown, strict=True):
        rows, values = rows_of[int(latent)].tolist(), values_of[int(latent)].tolist()
        value = dict(zip(rows, values, strict=True))
        parts = [
            (q, [_example(placement.rows, r, w, value) for r, w in part]) for q, part in windows_of
        ]
        at = [{"quantile": q, "examples": part} for q, part in parts[1:] if part]
        examples.append({"top": parts[0][1], "quantiles": at})
    return examples


def _example(
    rows: pd.DataFrame, row: int, window: Window, value: dict[int, float]
) -> dict[str, Any]:
    columns = rows.iloc[row]
    return {
        "tokens": window.tokens,
        "values": [None if r is None else _short(value[r]) for r in window.rows],
        "peak": window.peak,
        "cut": list(window.cut),
        "value": _short(value[row]),
        "id": str(columns["example_id"]),
        "group": None if pd.isna(columns["group"]) else str(columns["group"]),
        "split": None if pd.isna(columns["split"]) else str(columns["split"]),
    }


def _short(value: float) -> float:
    """Rounded to the four digits that the page shows."""
    return float(f"{value:.4g}")


def tokens(
    latents: list[int],
    sae: SparseAutoencoder,
    model: LanguageModel,
    options: DashboardConfig,
) -> tuple[list[dict[str, Any]], str | None, list[str]]:
    """(promoted and suppressed tokens per latent, how the final norm was treated, notes).

    Where the SAE does not read a part of the residual stream, or the model has no linear readout,
    a note says so and nothing is shown.
    """
    cards: list[dict[str, Any]] = [{} for _ in latents]
    if not options.n_tokens:
        return cards, None, []
    written = sae.hookpoint_out or sae.hookpoint
    if written.stream not in ADDED:
        note = (
            f"promoted tokens are not shown: {written.stream} is not what the residual stream is "
            "made of"
        )
        return cards, None, [note]
    try:
        out = Unembedding(model)
    except ModelError as error:
        return cards, None, [f"promoted tokens are not shown: {error}"]
    directions = sae.directions(latents).detach().float()
    for side, sign in (("promoted", 1), ("suppressed", -1)):
        ids = _tokens_of(model.tokenizer, out, sign * directions, options.n_tokens)
        shown = token_texts(model.tokenizer, [t for one in ids for t in one])
        for i, one in enumerate(ids):
            read = out.readout(torch.tensor(one)).cpu()
            values = (read @ directions[i].cpu().to(read.dtype)).tolist()
            pairs = zip(one, values, strict=True)
            cards[i][side] = [[shown[t], _short(v)] for t, v in pairs]
    return cards, TREATED, []


def _tokens_of(tokenizer: Any, out: Unembedding, directions: Tensor, k: int) -> list[list[int]]:
    """The k tokens whose logits each direction raises most, of those that the tokenizer has."""
    n = len(tokenizer)
    padding = max(0, len(out.weight) - n)
    ranked = out.top_tokens(directions, k + padding).tolist()
    return [[t for t in one if t < n][:k] for one in ranked]


def similar_latents(
    tally: Tally, sae: SparseAutoencoder, options: DashboardConfig
) -> list[dict[str, Any]]:
    """Per latent, those with a similar direction, and those with correlated activations."""
    latents = tally.latents
    directions = sae.directions(latents.tolist())
    near = nearest_directions(directions, sae.W_dec, options.n_similar, exclude=latents)
    cards = []
    for i, latent in enumerate(latents):
        row = tally.correlations_of(i) if tally.correlate else np.zeros(0)
        cards.append(
            {
                "similar": _pairs(near.latents[i], near.cosines[i]),
                "correlated": _most_correlated(row, int(latent), options.n_correlated),
            }
        )
    return cards


def _pairs(latents: np.ndarray, values: np.ndarray) -> list[list[Any]]:
    return [[int(f), _short(float(v))] for f, v in zip(latents, values, strict=True)]


def _most_correlated(row: np.ndarray, own: int, n: int) -> list[list[Any]]:
    """The n latents with the largest correlation, without itself and those that never vary."""
    if not len(row):
        return []
    order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")
    largest = order[(order != own) & ~np.isnan(row[order])][:n]
    return _pairs(largest, row[largest])
