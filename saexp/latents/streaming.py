"""Latents that are encoded anew for every pass over them, so that none is held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy import sparse

from saexp.activations.store import ActivationStore
from saexp.data.rows import CorpusRows
from saexp.latents.statistics import Moments, Tally, encoded_rows, tally_store, values_at
from saexp.saes.sae import SAE

_BLOCK_ROWS = 2**18


@dataclass(frozen=True)
class StreamedLatents:
    """Latents at the ordinary positions of a corpus."""

    store: ActivationStore
    sae: SAE
    positions: CorpusRows
    ordinary: Bool[np.ndarray, " n_rows"]
    """False for rows of high norm, which are left out."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    def __len__(self) -> int:
        return int(self.ordinary.sum())

    def chunks(self) -> Iterator[tuple[Int[np.ndarray, " m"], sparse.csr_array]]:
        """(row numbers, latents `[m, d_sae]`) in order; every call is a pass over the store."""
        with torch.inference_mode():
            yield from encoded_rows(self.store, self.sae, self.ordinary)

    def row_blocks(self) -> Iterator[Int[np.ndarray, " m"]]:
        """Row numbers in order, without encoding anything."""
        for first in range(0, len(self.ordinary), _BLOCK_ROWS):
            yield first + np.flatnonzero(self.ordinary[first : first + _BLOCK_ROWS])

    def moments(self) -> Moments:
        """Moments of all latents; one is active above 0."""
        active = np.zeros(self.d_sae, dtype=np.int64)
        total, maximum = np.zeros(self.d_sae), np.zeros(self.d_sae)
        for _, csr in self.chunks():
            data = csr.data.astype(np.float64)
            np.add.at(total, csr.indices, data)
            np.maximum.at(maximum, csr.indices, data)
            active += np.bincount(csr.indices[data > 0], minlength=self.d_sae)
        return Moments(n=len(self), active=active, total=total, maximum=maximum)

    def tally(self, latents: Int[np.ndarray, " n"], n_top: int) -> Tally:
        """The rows with the largest activations of these latents, `n_top` of different texts."""
        tally = Tally(latents, d_sae=self.d_sae, n_top=n_top, n_sample=1, correlate=False)
        text_ids = self.positions.text_ids
        return tally_store(self.store, self.sae, text_ids, np.zeros_like, tally, self.ordinary)

    def rows_of(self, text_id: int) -> Int[np.ndarray, " m"]:
        """The ordinary rows of a text."""
        rows = np.arange(*self.positions.bounds(text_id))
        return rows[self.ordinary[rows]]

    def values(self, rows_of: dict[int, Int[np.ndarray, " k"]]) -> dict[int, np.ndarray]:
        """Latent -> its activations at these rows."""
        return values_at(self.store, self.sae, rows_of)
