"""The latents that are most active, and where."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.group_statistics import CorpusAnalyzer, CorpusInputs
from saexp.config import TopFeaturesConfig
from saexp.data.rows import CorpusRows
from saexp.data.tokenization import token_pieces
from saexp.errors import counted
from saexp.latents.encode import Latents
from saexp.latents.statistics import Moments, moments
from saexp.results import Result


class TopFeaturesAnalyzer(CorpusAnalyzer):
    """Registry kind `analyzer`, name `top_features`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: TopFeaturesConfig) -> None:
        super().__init__(cfg)
        self.top_k, self.n_texts, self.by = cfg.top_k, cfg.n_texts, cfg.by

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `top_features/…`, tables `top_features` and `tokens`.

        Statistics are over all ordinary positions, whatever their group: `max`, `mean` (including
        zeros), `frequency` (fraction of positions where a latent is active) and `background_freq`
        (the same on neutral text). Only active latents are ranked, ties by the lower index.
        `tokens` holds all positions of the `n_texts` texts with the largest activation of each top
        latent.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        rows = inputs.latents.rows
        csr = inputs.latents.csr
        of_rows = moments(csr, np.ones(len(rows), dtype=bool), threshold=0.0)
        table, top, result = self._ranked(of_rows, inputs.layer, inputs.background)
        columns = sparse.csc_array(csr[:, top])
        strongest, tokens = [], []
        examples = rows["example_id"].to_numpy()
        rows = rows.assign(token=_token_texts(inputs))
        for column, latent in enumerate(top.tolist()):
            values = np.asarray(columns[:, [column]].todense()).ravel()
            strongest.append(int(values.argmax()))
            tokens.append(self._tokens(rows, examples, values, latent, inputs.layer))
        table["example"] = examples[strongest]
        table["token"] = [_token_text(inputs, row) for row in strongest]
        empty = self._tokens(rows.iloc[:0], examples[:0], np.zeros(0), 0, inputs.layer)
        result.tables = {"top_features": table, "tokens": pd.concat(tokens or [empty])}
        return result

    def analyze_corpus(self, inputs: CorpusInputs) -> Result:
        """As `analyze`; the examples are contexts."""
        latents, positions = inputs.latents, inputs.latents.positions
        table, top, result = self._ranked(latents.moments(), inputs.layer, inputs.background)
        tally = latents.tally(top, self.n_texts)
        strongest = [tally.top(i) for i in range(len(top))]
        rows_of = {
            latent: np.concatenate([latents.rows_of(int(text)) for text in of_latent["text"]])
            for latent, of_latent in zip(top.tolist(), strongest, strict=True)
        }
        shown = [_described(positions, at["row"].to_numpy()[:1]) for at in strongest]
        tokens = []
        for latent, values in latents.values(rows_of).items():
            of_latent = {"layer": inputs.layer, "latent": latent}
            part = _described(positions, rows_of[latent]).assign(value=values.astype(np.float64))
            tokens.append(part.assign(**of_latent)[[*of_latent, *part.columns]])
        for column in ("example", "token"):
            table[column] = [one[column].iloc[0] for one in shown]
        empty = pd.DataFrame(
            columns=["layer", "latent", "example", "token", "token_index", "value"]
        )
        result.tables = {"top_features": table, "tokens": pd.concat(tokens or [empty])}
        return result

    def _ranked(
        self, of_rows: Moments, layer: int, background: Latents | None
    ) -> tuple[pd.DataFrame, Int[np.ndarray, " n_top"], Result]:
        """(the table without examples, the top latents, metrics and notes)."""
        rankings = {"max": of_rows.maximum, "mean": of_rows.mean, "frequency": of_rows.frequency}
        key = rankings[self.by]
        active = np.flatnonzero(of_rows.active)
        top = active[np.argsort(-key[active], kind="stable")][: self.top_k]
        table = pd.DataFrame(
            {
                "layer": layer,
                "rank": np.arange(1, len(top) + 1),
                "latent": top,
                "max": of_rows.maximum[top],
                "mean": of_rows.mean[top],
                "frequency": of_rows.frequency[top],
                "n_active": of_rows.active[top],
                "background_freq": _background(background, len(of_rows.active))[top],
            }
        )
        metrics: dict[str, float | int | None] = {
            "top_features/n_positions": of_rows.n,
            "top_features/n_fired": len(active),
            "top_features/best_latent": int(top[0]) if len(top) else None,
            f"top_features/best_{self.by}": float(key[top[0]]) if len(top) else None,
        }
        notes = []
        if len(top) < self.top_k:
            n = counted(len(top), "latent is", "latents are") if len(top) else "no latent is"
            only = "only " if len(top) else ""
            notes.append(f"layer {layer}: {only}{n} active at the analysed positions")
        return table, top, Result(metrics=metrics, notes=notes)

    def _tokens(
        self,
        rows: pd.DataFrame,
        examples: np.ndarray,
        values: np.ndarray,
        latent: int,
        layer: int,
    ) -> pd.DataFrame:
        """Activations of one latent at all positions of the texts with its largest maxima."""
        codes, names = pd.factorize(examples)
        highest = np.zeros(len(names))
        np.maximum.at(highest, codes, values)
        order = np.argsort(-highest, kind="stable")[: self.n_texts]
        texts = order[highest[order] > 0]
        rank = np.full(len(names), -1)
        rank[texts] = np.arange(len(texts))
        chosen = np.flatnonzero(rank[codes] >= 0) if len(names) else np.zeros(0, dtype=int)
        chosen = chosen[np.argsort(rank[codes[chosen]], kind="stable")]
        part: dict[str, Any] = {
            "layer": layer,
            "latent": latent,
            "example": examples[chosen],
            "token": rows["token"].to_numpy()[chosen],
            "token_index": rows["token_index"].to_numpy()[chosen],
            "value": values[chosen].astype(np.float64),
        }
        return pd.DataFrame(part)


def _token_texts(inputs: AnalysisInputs) -> pd.Series:
    """Each position's part of its text; without texts, the token as the vocabulary spells it."""
    rows = inputs.latents.rows
    if inputs.model is None or not inputs.texts:
        return rows["token"]
    texts = np.empty(len(rows), dtype=object)
    indices = rows["token_index"].to_numpy()
    text_ids = rows["text_id"].to_numpy()
    for group in rows.groupby(["text_id", "example_id"], sort=False).indices.values():
        of_text = np.asarray(group)
        chosen, which = np.unique(indices[of_text], return_inverse=True)
        text = inputs.texts[int(text_ids[of_text[0]])]
        parts = token_pieces(text, inputs.model.tokenizer, chosen.tolist())
        texts[of_text] = np.array(parts, dtype=object)[which]
    return pd.Series(texts, index=rows.index)


def _token_text(inputs: AnalysisInputs, row: int) -> str:
    """One position's part of its text; a part of a character is shown as the whole character."""
    position = inputs.latents.rows.iloc[row]
    if inputs.model is None or not inputs.texts:
        return str(position["token"])
    text = inputs.texts[int(position["text_id"])]
    return token_pieces(text, inputs.model.tokenizer, [int(position["token_index"])])[0]


def _described(positions: CorpusRows, rows: Int[np.ndarray, " n"]) -> pd.DataFrame:
    """Context, token and its index of these rows."""
    table = []
    for row in rows.tolist():
        [text], [index], _ = positions.numbers(row, row + 1)
        [token] = positions.pieces(int(text), int(index), int(index) + 1)
        table.append({"example": str(text), "token": token, "token_index": int(index)})
    return pd.DataFrame(table, columns=["example", "token", "token_index"])


def _background(neutral: Latents | None, d_sae: int) -> np.ndarray:
    """Fraction of neutral tokens on which each latent is active; NaN without neutral text."""
    if neutral is None:
        return np.full(d_sae, np.nan)
    return moments(neutral.csr, np.ones(len(neutral), dtype=bool), threshold=0.0).frequency
