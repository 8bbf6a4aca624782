"""Encode stored activations to sparse latents, with metrics; splice in reconstructions."""

import hashlib
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from saexp.activations import ActivationStore
from saexp.activations.shard_files import StoredValues
from saexp.context import progress
from saexp.models import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.saes import SAE, SparseAutoencoder

log = logging.getLogger(__name__)


CHUNK_BYTES = 128 * 2**20
"""Largest size of a dense chunk of latents; encoding and decoding it needs up to 2.5 times as
much."""
_CPU_CHUNK_BYTES, _CPU_CHUNK_ROWS = 16 * 2**20, 256
"""On a CPU a chunk is of the larger of these sizes: more is slower, and fewer rows read the weights
too often."""
_BLOCK_ROWS = 4096
"""Rows that are in memory in float64 at a time."""


def chunk_rows(sae: SAE) -> int:
    """Rows of a dense chunk of latents."""
    row_bytes = 4 * max(sae.d_sae, sae.d_in)
    n_rows = CHUNK_BYTES // row_bytes
    if sae.W_dec.device.type == "cpu":
        n_rows = min(n_rows, max(_CPU_CHUNK_BYTES // row_bytes, _CPU_CHUNK_ROWS))
    return max(1, n_rows)


Pair = tuple[Tensor, Tensor]
"""(input of the encoder, target of the decoder); they differ for a transcoder only."""


@dataclass
class Latents:
    """Sparse activations of all latents at all rows."""

    csr: sparse.csr_array
    """float32 `[n_rows, d_sae]`; inactive latents are not stored."""
    rows: pd.DataFrame
    key: str | None = None
    """Hash of everything that determines the values, where it is known."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(cast(tuple[int, int], self.csr.shape)[1])

    def __len__(self) -> int:
        return len(self.rows)

    def dense(self) -> Float[Tensor, "n_rows d_sae"]:
        """All activations as a float32 tensor on the CPU."""
        return torch.from_numpy(self.csr.toarray())

    def where(self, chosen: Bool[np.ndarray, " n_rows"]) -> "Latents":
        """The latents of the chosen rows; this object itself where all rows are chosen."""
        if chosen.all():
            return self
        key = (
            None
            if self.key is None
            else f"{self.key}-{hashlib.sha256(chosen.tobytes()).hexdigest()}"
        )
        return Latents(self.csr[chosen], self.rows[chosen].reset_index(drop=True), key)


class StreamMetrics:
    """Sparsity and reconstruction error accumulated over rows, in float64.

    explained_variance = 1 - E|x - x^|^2 / (E|x|^2 - |E x|^2), and mse = E|x - x^|^2.
    explained_variance_legacy is the mean over rows of 1 - |x - x^|^2 / |x - E x|^2, with E x over
    all rows, and explained_variance_median the median. High-norm rows (`activations.reader`) count
    in explained_variance_all_positions only, which is relative to the mean over all rows; all other
    metrics, and `mean`, are over ordinary rows.
    """

    def __init__(
        self,
        mean: Float[Tensor, " d_in"],
        d_sae: int,
        mean_of_all: Float[Tensor, " d_in"] | None = None,
    ) -> None:
        """`mean_of_all` includes high-norm rows; None where there are none."""
        self.mean = mean.double()
        self.mean_of_all = None if mean_of_all is None else mean_of_all.double()
        self.n, self.n_high_norm = 0, 0
        self.sums: dict[str, float] = {}
        self.n_active = torch.zeros(d_sae, dtype=torch.int64)
        """Number of rows where each latent is nonzero."""
        self.totals = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of each latent's values."""
        self.maxima = torch.zeros(d_sae, dtype=torch.float64)
        """Largest value of each latent, at least 0."""
        # Arrays that grow as a whole, for the reason given in ActivationStore.norms.
        self._explained = array("d")
        """Explained fraction of each row's squared distance from the mean."""
        self._norms = array("d")

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        reconstruction: Float[Tensor, "n d_in"],
        acts: Float[Tensor, "n d_sae"],
    ) -> dict[str, Float[Tensor, " n"]]:
        """Add ordinary rows; returns each row's contribution to `sums`, float64 on the CPU."""
        # In blocks: in float64, the rows of a chunk are many times as large as the latents of a
        # narrow SAE.
        blocks = [
            self._of_rows(x_block.double().cpu(), output.double().cpu())
            for x_block, output in zip(
                x.split(_BLOCK_ROWS), reconstruction.split(_BLOCK_ROWS), strict=True
            )
        ]
        of_rows = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        norm, spread = of_rows.pop("norm"), of_rows["spread"]
        active, value = self._count_active(acts)
        rows = {"active": active, "value": value, **of_rows}
        self.n += len(x)
        if self.mean_of_all is not None:
            # |x - m'|^2 = |x - m|^2 + 2 (x - m)(m - m') + |m - m'|^2
            difference = self.mean - self.mean_of_all
            constant = difference.square().sum() - 2 * (self.mean @ difference)
            rows["error_of_all"] = rows["error"]
            rows["spread_of_all"] = spread + 2 * (x.double().cpu() @ difference) + constant
            rows["spread_high_norm"] = torch.zeros_like(spread)
        self._explained.frombytes(rows["legacy"].numpy().tobytes())
        self._norms.frombytes(norm.numpy().tobytes())
        return self._accumulate(rows)

    def _of_rows(
        self, x: Float[Tensor, "n d_in"], reconstruction: Float[Tensor, "n d_in"]
    ) -> dict[str, Float[Tensor, " n"]]:
        """The contributions of rows that depend on these vectors alone, and the norms of x."""
        error = (x - reconstruction).square().sum(-1)
        spread = (x - self.mean).square().sum(-1)
        norm, output_norm = x.norm(dim=-1), reconstruction.norm(dim=-1)
        return {
            "error": error,
            "spread": spread,
            "legacy": 1 - error / spread.clamp(min=1e-30),
            "cosine": torch.cosine_similarity(x, reconstruction, dim=-1),
            "ratio": output_norm / norm.clamp(min=1e-30),
            "output": output_norm.square(),
            "product": (x * reconstruction).sum(-1),
            "norm": norm,
        }

    def update_high_norm(
        self, x: Float[Tensor, "n d_in"], reconstruction: Float[Tensor, "n d_in"]
    ) -> dict[str, Float[Tensor, " n"]]:
        """Add high-norm rows, which count in the metrics of all rows."""
        assert self.mean_of_all is not None, "constructed without a mean over all rows"
        x, reconstruction = x.double().cpu(), reconstruction.double().cpu()
        spread = (x - self.mean_of_all).square().sum(-1)
        self.n_high_norm += len(x)
        return self._accumulate(
            {
                "error_of_all": (x - reconstruction).square().sum(-1),
                "spread_of_all": spread,
                "spread_high_norm": spread,
            }
        )

    def _accumulate(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, values in rows.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        return rows

    def _count_active(self, acts: Float[Tensor, "n d_sae"]) -> tuple[Tensor, Tensor]:
        """Per row, the number of active latents and the sum of their values."""
        where = acts.nonzero()
        values = acts[where[:, 0], where[:, 1]].cpu().double()
        row, latent = where.cpu().unbind(-1)
        d_sae = len(self.n_active)
        self.n_active += torch.bincount(latent, minlength=d_sae)
        self.totals += torch.bincount(latent, weights=values, minlength=d_sae)
        self.maxima.scatter_reduce_(0, latent, values, "amax")
        active = torch.bincount(row, minlength=len(acts)).double()
        return active, torch.bincount(row, weights=values, minlength=len(acts)).double()

    def result(self) -> dict[str, float | None]:
        """Metrics `sparsity/…` and `reconstruction/…`."""
        n, s = self.n, self.sums
        spread_of_all = s.get("spread_of_all", s["spread"])
        return {
            "sparsity/l0": s["active"] / n,
            "sparsity/mean_active": s["value"] / s["active"] if s["active"] else None,
            "sparsity/max_active": float(self.maxima.max()),
            "sparsity/dead_fraction": float((self.n_active == 0).double().mean()),
            "sparsity/n_positions": n,
            "reconstruction/explained_variance": 1 - s["error"] / s["spread"]
            if s["spread"]
            else None,
            "reconstruction/explained_variance_legacy": s["legacy"] / n if s["spread"] else None,
            "reconstruction/explained_variance_median": self.median_explained,
            "reconstruction/explained_variance_all_positions": (
                1 - s.get("error_of_all", s["error"]) / spread_of_all if spread_of_all else None
            ),
            "reconstruction/mse": s["error"] / n,
            "reconstruction/cosine": s["cosine"] / n,
            "reconstruction/l2_ratio": s["ratio"] / n,
            "reconstruction/median_norm": self.median_norm,
            "reconstruction/n_high_norm": self.n_high_norm,
            "reconstruction/high_norm_variance_fraction": (
                s.get("spread_high_norm", 0.0) / spread_of_all if spread_of_all else None
            ),
        }

    @property
    def median_explained(self) -> float | None:
        """Median explained fraction of ordinary rows; None where all rows are equal."""
        return float(np.median(np.frombuffer(self._explained))) if self.sums["spread"] else None

    @property
    def median_norm(self) -> float:
        """Median norm of the ordinary rows."""
        return float(np.median(np.frombuffer(self._norms)))


@torch.inference_mode()
def encode_store(
    store: ActivationStore,
    sae: SAE,
    rows: pd.DataFrame,
    ordinary: Bool[np.ndarray, " n_rows"] | None = None,
) -> tuple[Latents, dict[str, float | None]]:
    """Latents of every row of the store, and metrics (see `StreamMetrics`).

    `rows` is the table of this run (with its groups and splits), in the order of the store. Metrics
    are over `ordinary` rows, or over all rows where it is None. The prediction of a transcoder is
    compared with the stored activations at its `hookpoint_out`.
    """
    assert len(rows) == store.n_rows, "rows table and store differ in length"
    return _encode(_chunks_of(store, sae), sae, rows, ordinary)


@torch.inference_mode()
def measure_store(
    store: ActivationStore, sae: SAE, ordinary: Bool[np.ndarray, " n_rows"] | None = None
) -> dict[str, float | None]:
    """The metrics of `encode_store`, without holding the latents. Memory: 17 bytes a row."""
    chunks = _chunks_of(store, sae)
    metrics = _metrics_of(chunks, sae, ordinary)
    for _ in _measured(chunks, sae, store.n_rows, ordinary, metrics):
        pass
    return metrics.result()


def _chunks_of(store: ActivationStore, sae: SAE) -> Callable[[int], Iterable[Pair]]:
    """The rows of a store in chunks of at most n."""
    out = _output_of(sae)

    def chunks(n: int) -> Iterator[Pair]:
        if out is None:
            return ((acts, acts) for _, acts in store.chunks(sae.hookpoint, n))
        both = zip(store.chunks(sae.hookpoint, n), store.chunks(out, n), strict=True)
        return ((x, target) for (_, x), (_, target) in both)

    return chunks


def _output_of(sae: SAE) -> Hookpoint | None:
    return getattr(sae, "hookpoint_out", None)


@torch.inference_mode()
def encode_rows(
    acts: Float[Tensor, "n_rows d"] | StoredValues,
    chosen: Int[np.ndarray, " n"],
    sae: SAE,
    rows: pd.DataFrame,
    target: Float[Tensor, "n_rows d_out"] | StoredValues | None = None,
    ordinary: Bool[np.ndarray, " n"] | None = None,
) -> tuple[Latents, dict[str, float | None]]:
    """As `encode_store`, for chosen rows of a stream.

    `rows` and `ordinary` describe the chosen rows. `target` is the stream that a transcoder
    predicts.
    """
    assert len(rows) == len(chosen), "rows table and chosen rows differ in length"
    assert (target is None) == (_output_of(sae) is None), "a transcoder needs its target"

    def chunks(n: int) -> Iterator[Pair]:
        for start in range(0, len(chosen), n):
            indices = torch.from_numpy(chosen[start : start + n])
            x = acts[indices]
            yield x, x if target is None else target[indices]

    return _encode(chunks, sae, rows, ordinary)


def _means(
    chunks: Callable[[int], Iterable[Pair]], width: int, ordinary: Bool[np.ndarray, " n"] | None
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"] | None]:
    """(mean target of ordinary rows, mean target of all rows; None where all are ordinary)."""
    total, high_norm_total = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
    n, n_high = 0, 0
    for _, target in chunks(8192):
        x = target.reshape(len(target), -1).double()
        if ordinary is None:
            total += x.sum(0)
        else:
            is_ordinary = torch.from_numpy(ordinary[n : n + len(x)])
            total += x[is_ordinary].sum(0)
            high_norm_total += x[~is_ordinary].sum(0)
            n_high += int((~is_ordinary).sum())
        n += len(x)
    return total / (n - n_high), (total + high_norm_total) / n if n_high else None


def _encode(
    chunks: Callable[[int], Iterable[Pair]],
    sae: SAE,
    rows: pd.DataFrame,
    ordinary: Bool[np.ndarray, " n_rows"] | None,
) -> tuple[Latents, dict[str, float | None]]:
    """Encode all rows; `chunks(n)` yields them in chunks of at most n, and is called twice."""
    started = time.perf_counter()
    metrics = _metrics_of(chunks, sae, ordinary)
    # Arrays that grow as a whole, for the reason given in ActivationStore.norms.
    indptr, indices, values = array("q", [0]), array("i"), array("f")
    for features in _measured(chunks, sae, len(rows), ordinary, metrics):
        where = features.nonzero()
        counts = torch.bincount(where[:, 0], minlength=len(features)).cumsum(0)
        indptr.frombytes((len(values) + counts.cpu().numpy()).tobytes())
        indices.frombytes(where[:, 1].to(torch.int32).cpu().numpy().tobytes())
        values.frombytes(features[where[:, 0], where[:, 1]].float().cpu().numpy().tobytes())
    n_stored = len(values)
    csr = sparse.csr_array(
        tuple(np.array(part) for part in (values, indices, indptr)),
        shape=(len(rows), sae.d_sae),
    )
    seconds = time.perf_counter() - started
    log.info("encoded %d rows, %d active latents, %.1f s", len(rows), n_stored, seconds)
    return Latents(csr, rows), metrics.result()


def _metrics_of(
    chunks: Callable[[int], Iterable[Pair]], sae: SAE, ordinary: Bool[np.ndarray, " n_rows"] | None
) -> StreamMetrics:
    """Metrics of no row yet, with the means of all rows."""
    mean, mean_of_all = _means(chunks, sae.W_dec.shape[1], ordinary)
    return StreamMetrics(mean, sae.d_sae, mean_of_all)


def _measured(
    chunks: Callable[[int], Iterable[Pair]],
    sae: SAE,
    n_rows: int,
    ordinary: Bool[np.ndarray, " n_rows"] | None,
    metrics: StreamMetrics,
) -> Iterator[Float[Tensor, "m d_sae"]]:
    """Latents of each chunk of rows, after they were added to the metrics."""
    device, n_read = sae.W_dec.device, 0
    with progress(n_rows, "encoding", "row") as bar:
        for acts, target in chunks(chunk_rows(sae)):
            x = acts.to(device=device, dtype=torch.float32)
            features = sae.encode(x)
            y = x if target is acts else target.to(device=device, dtype=torch.float32)
            decoded = sae.decode(features, x).float()
            in_chunk = None if ordinary is None else ordinary[n_read : n_read + len(x)]
            if in_chunk is None or in_chunk.all():
                metrics.update(y, decoded, features)
            else:
                is_ordinary = torch.from_numpy(in_chunk).to(device)
                metrics.update(y[is_ordinary], decoded[is_ordinary], features[is_ordinary])
                metrics.update_high_norm(y[~is_ordinary], decoded[~is_ordinary])
            yield features
            n_read += len(x)
            bar.update(len(x))


ChangeLatents = Callable[[Tensor], Tensor]
"""`[n, d_sae]` -> `[n, d_sae]`."""


def replacement_edit(values: Float[Tensor, "... d"], mask: Bool[Tensor, "b t"]) -> EditFunction:
    """An edit that writes `values` where `mask` is true, and leaves other positions bit-equal.

    `values` are `[n, d]`, one per position of the mask, or `[d]` for all.
    """

    def write(stream: Tensor) -> Tensor:
        new = stream.clone()
        new[mask.to(stream.device)] = values.to(stream.device, stream.dtype)
        return new

    return write


def splice_edits(
    sae: SparseAutoencoder,
    mask: Bool[Tensor, "b t"] | None = None,
    *,
    error: bool = False,
    change: ChangeLatents | None = None,
    limits: Mapping[Hookpoint, float] | None = None,
    excluded: Callable[[int], None] | None = None,
) -> dict[Hookpoint, EditFunction]:
    """Edits that splice in the SAE's reconstruction where `mask` is true (None: everywhere).

    A transcoder reads its hookpoint and writes `hookpoint_out`. `change` is applied to the latents
    before decoding. With `error`, the reconstruction error is added back, so that only the change
    of the latents changes the stream. Positions outside the mask are bit-equal, and so are
    positions whose norm exceeds the limit of a stream that the SAE reads or predicts; `excluded` is
    called with the number of the latter.
    """
    inputs: list[Tensor] = []

    def read(stream: Tensor) -> Tensor:
        inputs[:] = [stream]
        return stream

    def write(stream: Tensor) -> Tensor:
        source = inputs.pop() if sae.is_transcoder else stream
        where = torch.ones(stream.shape[:2], dtype=torch.bool) if mask is None else mask
        where = where.to(stream.device)
        if limits:
            ordinary = where & _within(source, limits[sae.hookpoint]).to(where.device)
            if sae.hookpoint_out is not None:
                ordinary &= _within(stream, limits[sae.hookpoint_out])
            if excluded is not None:
                excluded(int((where & ~ordinary).sum()))
            where = ordinary
        x = source[where.to(source.device)].to(sae.device)
        acts = sae.encode(x)
        out = sae.decode(acts if change is None else change(acts), x).to(stream.device)
        if error:
            out = stream[where] + (out - sae.decode(acts, x).to(stream.device))
        return replacement_edit(out, where)(stream)

    if sae.hookpoint_out is None:
        return {sae.hookpoint: write}
    return {sae.hookpoint: read, sae.hookpoint_out: write}


def _within(stream: Float[Tensor, "b t d"], limit: float) -> Bool[Tensor, "b t"]:
    return stream.double().norm(dim=-1) <= limit
