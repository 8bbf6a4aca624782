"""The latents most active on texts, layer by layer, and their values token by token."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.base import AnalysisInputs, read_options, whole
from saexp.config import AnalyzerConfig
from saexp.data.tokenization import pieces
from saexp.errors import ConfigError
from saexp.latents.statistics import moments
from saexp.registry import did_you_mean
from saexp.results import TaskResult

RANKINGS = ("max", "mean", "frequency")


class TopFeaturesAnalyzer:
    """Registry kind `analyzer`, name `top_features`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg
        options = read_options(cfg, {"top_k": 10, "by": "max", "n_texts": 3})
        self.top_k = whole("top_k", options["top_k"])
        self.n_texts = whole("n_texts", options["n_texts"])
        self.by = str(options["by"])
        if self.by not in RANKINGS:
            raise ConfigError(f"analyzer.options.by={self.by}: {did_you_mean(self.by, RANKINGS)}")

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `top_features/…`, tables `top_features` and `tokens`.

        Over all ordinary positions chosen, whatever their group: `max`, `mean` (zeros included) and
        `frequency` (share of positions where it is on); `background_freq` the same share on neutral
        text. Only latents that fire at all are ranked, ties by the lower index. `tokens` has every
        chosen position of the `n_texts` texts in which each top latent is strongest.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        rows = inputs.latents.rows
        csr = inputs.latents.csr
        about = moments(csr, np.ones(len(rows), dtype=bool), threshold=0.0)
        key = {"max": about.maximum, "mean": about.mean, "frequency": about.frequency}[self.by]
        fired = np.flatnonzero(about.active)
        top = fired[np.argsort(-key[fired], kind="stable")][: self.top_k]
        table = pd.DataFrame(
            {
                "layer": inputs.layer,
                "rank": np.arange(1, len(top) + 1),
                "latent": top,
                "max": about.maximum[top],
                "mean": about.mean[top],
                "frequency": about.frequency[top],
                "n_active": about.active[top],
                "background_freq": _background(inputs)[top],
            }
        )
        columns = sparse.csc_array(csr[:, top])
        strongest, tokens = [], []
        examples = rows["example_id"].to_numpy()
        rows = rows.assign(token=_readable(inputs))
        for place, latent in enumerate(top.tolist()):
            values = np.asarray(columns[:, [place]].todense()).ravel()
            strongest.append(int(values.argmax()))
            tokens.append(self._tokens(rows, examples, values, latent, inputs.layer))
        table["example"] = examples[strongest]
        table["token"] = [_alone(inputs, row) for row in strongest]
        empty = self._tokens(rows.iloc[:0], examples[:0], np.zeros(0), 0, inputs.layer)
        metrics: dict[str, float | int | None] = {
            "top_features/n_positions": len(rows),
            "top_features/n_fired": len(fired),
            "top_features/best_latent": int(top[0]) if len(top) else None,
            f"top_features/best_{self.by}": float(key[top[0]]) if len(top) else None,
        }
        notes = [] if len(top) else [f"layer {inputs.layer}: no latent fires at any position"]
        if 0 < len(top) < self.top_k:
            notes.append(f"layer {inputs.layer}: only {len(top)} latents fire at any position")
        return TaskResult(
            metrics=metrics,
            tables={"top_features": table, "tokens": pd.concat(tokens or [empty])},
            notes=notes,
        )

    def _tokens(
        self,
        rows: pd.DataFrame,
        examples: np.ndarray,
        values: np.ndarray,
        latent: int,
        layer: int,
    ) -> pd.DataFrame:
        """One latent at all positions of the texts in which its maximum is largest."""
        codes, names = pd.factorize(examples)
        highest = np.zeros(len(names))
        np.maximum.at(highest, codes, values)
        order = np.argsort(-highest, kind="stable")[: self.n_texts]
        wanted = order[highest[order] > 0]
        place = np.full(len(names), -1)
        place[wanted] = np.arange(len(wanted))
        chosen = np.flatnonzero(place[codes] >= 0) if len(names) else np.zeros(0, dtype=int)
        chosen = chosen[np.argsort(place[codes[chosen]], kind="stable")]
        part: dict[str, Any] = {
            "layer": layer,
            "latent": latent,
            "example": examples[chosen],
            "token": rows["token"].to_numpy()[chosen],
            "token_index": rows["token_index"].to_numpy()[chosen],
            "value": values[chosen].astype(np.float64),
        }
        return pd.DataFrame(part)


def _readable(inputs: AnalysisInputs) -> pd.Series:
    """Each position's piece of its text; the vocabulary's own spelling without the texts."""
    rows = inputs.latents.rows
    if inputs.model is None or not inputs.texts:
        return rows["token"]
    found = np.empty(len(rows), dtype=object)
    indices = rows["token_index"].to_numpy()
    text_ids = rows["text_id"].to_numpy()
    for group in rows.groupby(["text_id", "example_id"], sort=False).indices.values():
        places = np.asarray(group)
        chosen, which = np.unique(indices[places], return_inverse=True)
        text = inputs.texts[int(text_ids[places[0]])]
        shown = pieces(text, inputs.model.tokenizer, chosen.tolist())
        found[places] = np.array(shown, dtype=object)[which]
    return pd.Series(found, index=rows.index)


def _alone(inputs: AnalysisInputs, row: int) -> str:
    """One position's piece by itself: part of a character is shown as the character."""
    about = inputs.latents.rows.iloc[row]
    if inputs.model is None or not inputs.texts:
        return str(about["token"])
    text = inputs.texts[int(about["text_id"])]
    return pieces(text, inputs.model.tokenizer, [int(about["token_index"])])[0]


def _background(inputs: AnalysisInputs) -> np.ndarray:
    """Share of neutral positions on which each latent fires; NaN without any."""
    neutral = inputs.background
    if neutral is None:
        return np.full(inputs.latents.d_sae, np.nan)
    return moments(neutral.csr, np.ones(len(neutral), dtype=bool), threshold=0.0).frequency
