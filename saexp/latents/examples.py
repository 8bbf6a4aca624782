"""Maximally activating examples of chosen latents, with the tokens around them."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from saexp.activations.store import ActivationStore
from saexp.context import progress
from saexp.data.tokenization import TokenizedText, pieces
from saexp.latents import encode
from saexp.latents.encode import Latents
from saexp.latents.statistics import Tally
from saexp.saes.sae import SAE

log = logging.getLogger(__name__)


def _chunk_rows(sae: SAE) -> int:
    return max(1, encode.CHUNK_BYTES // (4 * max(sae.d_sae, sae.d_in)))


def _sparse(acts: Float[Tensor, "m k"]) -> sparse.csr_array:
    """float32, nothing stored where a latent is off."""
    where = acts.nonzero()
    counts = torch.bincount(where[:, 0], minlength=len(acts)).cumsum(0).cpu().numpy()
    values = acts[where[:, 0], where[:, 1]].float().cpu().numpy()
    indptr = np.concatenate([np.zeros(1, dtype=np.int64), counts])
    return sparse.csr_array((values, where[:, 1].cpu().numpy(), indptr), shape=tuple(acts.shape))


def _encoded(store: ActivationStore, sae: SAE) -> Iterator[tuple[int, sparse.csr_array]]:
    """(first row, all latents `[m, d_sae]`) chunk by chunk."""
    with progress(store.n_rows, "encoding", "row") as bar:
        for first, acts in store.chunks(sae.hookpoint, _chunk_rows(sae)):
            x = acts.to(device=sae.W_dec.device, dtype=torch.float32)
            yield first, _sparse(sae.encode(x))
            bar.update(len(x))


@torch.inference_mode()
def tally_store(
    store: ActivationStore,
    sae: SAE,
    texts: Int[np.ndarray, " n_rows"],
    groups: Int[np.ndarray, " n_rows"],
    tally: Tally,
    ordinary: Bool[np.ndarray, " n_rows"] | None = None,
) -> Tally:
    """Feed every (ordinary) row of the store to `tally`; `texts` and `groups` are those of its
    `update`.

    Without correlations only the chosen latents are encoded.
    """
    began = time.perf_counter()
    chosen = [int(f) for f in tally.latents]
    if tally.correlate:
        for first, csr in _encoded(store, sae):
            kept = _kept(first, len(csr.indptr) - 1, ordinary)
            csr = csr if len(kept) == len(csr.indptr) - 1 else csr[kept - first]
            values = sparse.csc_array(csr[:, chosen])
            tally.update(values, texts[kept], groups[kept], csr, kept)
    else:
        with progress(store.n_rows, "encoding", "row") as bar:
            for first, acts in store.chunks(sae.hookpoint, _chunk_rows(sae)):
                kept = _kept(first, len(acts), ordinary)
                x = acts[torch.from_numpy(kept - first)]
                x = x.to(device=sae.W_dec.device, dtype=torch.float32)
                values = sparse.csc_array(_sparse(sae.encode_latents(x, chosen)))
                tally.update(values, texts[kept], groups[kept], rows=kept)
                bar.update(len(acts))
    seconds = time.perf_counter() - began
    log.info("%d latents over %d rows, %.1f s", len(chosen), tally.n_rows, seconds)
    return tally


def _kept(
    first: int, n: int, ordinary: Bool[np.ndarray, " n_rows"] | None
) -> Int[np.ndarray, " m"]:
    """Numbers of the (ordinary) rows among `n` from `first` on."""
    rows = np.arange(first, first + n)
    return rows if ordinary is None else rows[ordinary[rows]]


@torch.inference_mode()
def firing_counts(
    store: ActivationStore, sae: SAE, ordinary: Bool[np.ndarray, " n_rows"] | None = None
) -> Int[np.ndarray, " d_sae"]:
    """On how many (ordinary) rows each latent fires."""
    counts = np.zeros(sae.d_sae, dtype=np.int64)
    for first, csr in _encoded(store, sae):
        kept = _kept(first, len(csr.indptr) - 1, ordinary)
        counts += np.bincount(csr[kept - first].indices, minlength=sae.d_sae)
    return counts


@torch.inference_mode()
def latents_at(
    store: ActivationStore, sae: SAE, rows: pd.DataFrame, chosen: Int[np.ndarray, " k"]
) -> Latents:
    """Latents of the rows at the sorted indices `chosen`; memory grows with these alone."""
    assert len(rows) == store.n_rows, "rows table and store differ in length"
    parts = [sparse.csr_array((0, sae.d_sae), dtype=np.float32)]
    for first, csr in _encoded(store, sae):
        inside = chosen[(chosen >= first) & (chosen < first + len(csr.indptr) - 1)]
        parts.append(csr[inside - first])
    stacked = sparse.csr_array(sparse.vstack(parts, format="csr"))
    return Latents(stacked, rows.iloc[chosen].reset_index(drop=True))


@torch.inference_mode()
def values_at(
    store: ActivationStore, sae: SAE, wanted: Mapping[int, Int[np.ndarray, " k"]]
) -> dict[int, Float[np.ndarray, " k"]]:
    """Latent -> its activations at the rows wanted of it; no other row is read."""
    latents = list(wanted)
    column = {f: i for i, f in enumerate(latents)}
    rows = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *wanted.values()]))
    found = {f: np.zeros(len(r), dtype=np.float32) for f, r in wanted.items()}
    step = _chunk_rows(sae)
    for first, acts in store.chunks(sae.hookpoint, 1 << 16):
        inside = rows[(rows >= first) & (rows < first + len(acts))]
        for start in range(0, len(inside), step):
            here = inside[start : start + step]
            x = acts[torch.from_numpy(here - first)]
            x = x.to(device=sae.W_dec.device, dtype=torch.float32)
            values = sae.encode_latents(x, latents).float().cpu().numpy()
            for latent, asked in wanted.items():
                mine = np.flatnonzero((asked >= here[0]) & (asked <= here[-1]))
                places = np.searchsorted(here, asked[mine])
                found[latent][mine] = values[places, column[latent]]
    return found


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text."""

    tokens: list[str]
    rows: list[int | None]
    """Row of each token; None where the run did not look, and at high-norm positions."""
    peak: int
    """Which of them the window was made around."""
    cut: tuple[bool, bool]
    """Whether the text goes on at its left and right."""


class Windows:
    """Makes windows of a run's rows; `rows` and `texts` are those of its PositionTable."""

    def __init__(
        self,
        rows: pd.DataFrame,
        texts: Sequence[TokenizedText],
        tokenizer: Any,
        *,
        before: int,
        after: int,
        shown: Bool[np.ndarray, " n_rows"] | None = None,
    ) -> None:
        """Tokens whose row is not `shown` get none in a window."""
        self.texts, self.tokenizer, self.before, self.after = texts, tokenizer, before, after
        self._shown = shown
        self._example, _ = pd.factorize(rows["example_id"])
        self._token = rows["token_index"].to_numpy(dtype=np.int64)
        self._text = rows["text_id"].to_numpy(dtype=np.int64)

    def around(self, row: int) -> Window:
        """The tokens from `before` the row's own to `after` it."""
        text = self.texts[int(self._text[row])]
        token = int(self._token[row])
        first, end = max(0, token - self.before), min(len(text), token + self.after + 1)
        # Rows of one example stand together.
        near = np.arange(max(0, row - self.before), min(len(self._token), row + self.after + 1))
        mine = near[self._example[near] == self._example[row]]
        mine = mine if self._shown is None else mine[self._shown[mine]]
        of_token = {int(self._token[r]): int(r) for r in mine}
        return Window(
            tokens=pieces(text, self.tokenizer)[first:end],
            rows=[of_token.get(i) for i in range(first, end)],
            peak=token - first,
            cut=(first > 0, end < len(text)),
        )
