"""A store under an SAE: sparse latents, and metrics of sparsity and reconstruction on the way.

Only one dense chunk exists at a time; memory does not grow with n_rows x d_sae.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from saexp.activations.store import ActivationStore
from saexp.context import progress
from saexp.saes.base import SAE

log = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 2**20
"""Size of one dense chunk of latents."""


@dataclass
class Latents:
    """Sparse activations of all latents at all rows."""

    csr: sparse.csr_array
    """float32 `[n_rows, d_sae]`; nothing stored where a latent is off."""
    rows: pd.DataFrame

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(cast(tuple[int, int], self.csr.shape)[1])

    def __len__(self) -> int:
        return len(self.rows)


class StreamMetrics:
    """Sparsity and reconstruction over a stream of rows, in float64 (REFERENCE.md, section 3).

    explained_variance = 1 - E|x - x^|^2 / (E|x|^2 - |E x|^2); the legacy form is the mean over rows
    of 1 - |x - x^|^2 / |x - E x|^2, with the mean over all rows. mse = E|x - x^|^2.
    """

    def __init__(self, mean: Float[Tensor, " d_in"], d_sae: int) -> None:
        self.mean = mean.double()
        self.fired = torch.zeros(d_sae, dtype=torch.bool)
        self.n = 0
        self.sums: dict[str, float] = {}
        self.max_active = 0.0

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum(dtype=torch.float64))

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        reconstruction: Float[Tensor, "n d_in"],
        acts: Float[Tensor, "n d_sae"],
    ) -> None:
        """Take in one chunk."""
        x, reconstruction = x.double().cpu(), reconstruction.double().cpu()
        error = (x - reconstruction).square().sum(-1)
        spread = (x - self.mean).square().sum(-1)
        norm = x.norm(dim=-1)
        self.n += len(x)
        self.fired |= (acts != 0).any(dim=0).cpu()
        self._add("active", (acts != 0).sum(-1))
        self._add("value", acts)
        self.max_active = max(self.max_active, float(acts.max()) if acts.numel() else 0.0)
        self._add("error", error)
        self._add("spread", spread)
        self._add("legacy", 1 - error / spread.clamp(min=1e-30))
        self._add("cosine", torch.cosine_similarity(x, reconstruction, dim=-1))
        self._add("ratio", reconstruction.norm(dim=-1) / norm.clamp(min=1e-30))

    def result(self) -> dict[str, float | None]:
        """`sparsity/…` and `reconstruction/…`, named as in metrics.json."""
        n, s = self.n, self.sums
        return {
            "sparsity/l0": s["active"] / n,
            "sparsity/mean_active": s["value"] / s["active"] if s["active"] else None,
            "sparsity/max_active": self.max_active,
            "sparsity/dead_fraction": float((~self.fired).double().mean()),
            "sparsity/n_positions": n,
            "reconstruction/explained_variance": 1 - s["error"] / s["spread"]
            if s["spread"]
            else None,
            "reconstruction/explained_variance_legacy": s["legacy"] / n if s["spread"] else None,
            "reconstruction/mse": s["error"] / n,
            "reconstruction/cosine": s["cosine"] / n,
            "reconstruction/l2_ratio": s["ratio"] / n,
        }


@torch.inference_mode()
def encode_store(
    store: ActivationStore, sae: SAE, rows: pd.DataFrame
) -> tuple[Latents, dict[str, float | None]]:
    """Latents of every row of the store, and the metrics of StreamMetrics.

    `rows` is this run's own table (its groups and splits), row by row that of the store.
    """
    assert len(rows) == store.n_rows, "rows table and store differ in length"
    return _encode(lambda n: (acts for _, acts in store.chunks(sae.hookpoint, n)), sae, rows)


@torch.inference_mode()
def encode_rows(
    acts: Float[Tensor, "n_rows d"], chosen: Int[np.ndarray, " n"], sae: SAE, rows: pd.DataFrame
) -> tuple[Latents, dict[str, float | None]]:
    """As `encode_store`, for the chosen rows of a (memory-mapped) tensor; `rows` is theirs."""
    assert len(rows) == len(chosen), "rows table and chosen rows differ in length"

    def chunks(n: int) -> Iterator[Tensor]:
        for start in range(0, len(chosen), n):
            yield acts[torch.from_numpy(chosen[start : start + n])]

    return _encode(chunks, sae, rows)


def _encode(
    chunks: Callable[[int], Iterable[Tensor]], sae: SAE, rows: pd.DataFrame
) -> tuple[Latents, dict[str, float | None]]:
    """`chunks` gives all rows in order, at most so many at once, as often as it is called."""
    began = time.perf_counter()
    n_rows = len(rows)
    chunk_rows = max(1, CHUNK_BYTES // (4 * sae.d_sae))
    total = torch.zeros(sae.d_in, dtype=torch.float64)
    for acts in chunks(8192):
        total += acts.reshape(len(acts), -1).double().sum(0)
    metrics = StreamMetrics(total / n_rows, sae.d_sae)
    indptr, indices, values = [np.zeros(1, dtype=np.int64)], [], []
    n_stored = 0
    device = sae.W_dec.device
    with progress(n_rows, "encoding", "row") as bar:
        for acts in chunks(chunk_rows):
            x = acts.to(device=device, dtype=torch.float32)
            features = sae.encode(x)
            metrics.update(x, sae.decode(features, x).float(), features)
            where = features.nonzero()
            counts = torch.bincount(where[:, 0], minlength=len(x)).cumsum(0)
            indptr.append(n_stored + counts.cpu().numpy())
            indices.append(where[:, 1].to(torch.int32).cpu().numpy())
            values.append(features[where[:, 0], where[:, 1]].float().cpu().numpy())
            n_stored += len(where)
            bar.update(len(x))
    csr = sparse.csr_array(
        (np.concatenate(values), np.concatenate(indices), np.concatenate(indptr)),
        shape=(n_rows, sae.d_sae),
    )
    seconds = time.perf_counter() - began
    log.info("encoded %d rows, %d active latents, %.1f s", n_rows, n_stored, seconds)
    return Latents(csr, rows), metrics.result()
