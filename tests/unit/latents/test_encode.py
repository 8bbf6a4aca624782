"""A store under an SAE: sparse equals dense, metrics equal their formulas, chunks don't matter."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import Tensor

import saexp.latents as encoding
from saexp.activations import ActivationStore
from saexp.latents import StreamMetrics, encode_store
from saexp.models import Hookpoint
from saexp.saes import SparseAutoencoder
from tests.unit.saes.make import D_IN, D_SAE, points, sae

N_ROWS = 103


def store_of(folder: Path, acts: Tensor, hookpoint: Hookpoint, shard_rows: int) -> ActivationStore:
    rows = pd.DataFrame({"row": range(len(acts))})
    activation_store = ActivationStore.create_or_open(
        folder, {"test": str(folder)}, rows, shard_rows=shard_rows
    )
    for index, (first, end) in enumerate(activation_store.shard_bounds):
        activation_store.write_shard(hookpoint, index, acts[first:end])
    return activation_store


def sae_with_dead_latents(**options: Any) -> SparseAutoencoder:
    autoencoder = sae("jumprelu", **options)
    autoencoder.threshold[[4, 17, 30]] = 1e6
    return autoencoder


@pytest.fixture(params=[1000, 40, 7], ids=["one shard", "shards of 40", "shards of 7"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> ActivationStore:
    """103 points at block 3's output."""
    return store_of(tmp_path, points(N_ROWS, D_IN), Hookpoint(3, "resid_post"), request.param)


def formulas(x: Tensor, reconstruction: Tensor, acts: Tensor) -> dict[str, float]:
    """REFERENCE.md, section 3, in numpy and float64."""
    a, y, z = (t.double().numpy() for t in (x, reconstruction, acts))
    error = ((a - y) ** 2).sum(1)
    mean = a.mean(0)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(y, axis=1)
    return {
        "sparsity/l0": (z != 0).sum(1).mean(),
        "sparsity/mean_active": z[z != 0].mean(),
        "sparsity/max_active": z.max(),
        "sparsity/dead_fraction": (~(z != 0).any(0)).mean(),
        "sparsity/n_positions": len(a),
        "reconstruction/explained_variance": 1
        - error.mean() / ((a**2).sum(1).mean() - (mean**2).sum()),
        "reconstruction/explained_variance_legacy": np.mean(1 - error / ((a - mean) ** 2).sum(1)),
        "reconstruction/explained_variance_median": np.median(1 - error / ((a - mean) ** 2).sum(1)),
        "reconstruction/explained_variance_all_positions": 1
        - error.mean() / ((a**2).sum(1).mean() - (mean**2).sum()),
        "reconstruction/median_norm": np.median(norms[0]),
        "reconstruction/n_high_norm": 0,
        "reconstruction/high_norm_variance_fraction": 0.0,
        "reconstruction/mse": error.mean(),
        "reconstruction/cosine": ((a * y).sum(1) / (norms[0] * norms[1])).mean(),
        "reconstruction/l2_ratio": (norms[1] / norms[0]).mean(),
    }


OPTIONS = ({}, {"normalize_activations": "layer_norm"}, {"centre": True})
CHUNK_ROWS = (1, 10, 10_000)


@pytest.mark.parametrize(
    ("store", "chunk_rows", "options"),
    [
        (shard_rows, CHUNK_ROWS[chunk], OPTIONS[(shard + chunk) % 3])
        for shard, shard_rows in enumerate((1000, 40, 7))
        for chunk in range(3)
    ],
    indirect=["store"],
)
def test_equals_dense(
    store: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", chunk_rows * 4 * D_SAE)
    autoencoder, x = sae_with_dead_latents(**options), points(N_ROWS, D_IN)
    rows = store.rows.assign(group="a")
    latents, metrics = encode_store(store, autoencoder, rows)
    dense = autoencoder.encode(x)
    assert latents.rows is rows
    assert (len(latents), latents.d_sae, latents.csr.shape) == (N_ROWS, D_SAE, (N_ROWS, D_SAE))
    np.testing.assert_allclose(latents.csr.toarray(), dense.numpy(), rtol=1e-5, atol=1e-5)
    assert latents.csr.nnz == int((dense != 0).sum())
    assert latents.csr.dtype == np.float32
    expected = formulas(x, autoencoder.decode(dense, x), dense)
    assert expected["sparsity/dead_fraction"] >= 3 / D_SAE
    assert metrics == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 10, 10_000])
def test_metrics_are_of_ordinary_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    """As if the others were not there, but for what is named to be of all positions."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", chunk_rows * 4 * D_SAE)
    x = points(N_ROWS, D_IN)
    high = np.isin(np.arange(N_ROWS), [0, 1, 57])
    x[high] *= 300
    store = store_of(tmp_path, x, Hookpoint(3, "resid_post"), 40)
    autoencoder = sae_with_dead_latents()
    latents, metrics = encode_store(store, autoencoder, store.rows, ~high)
    dense = autoencoder.encode(x)
    np.testing.assert_allclose(latents.csr.toarray(), dense.numpy(), rtol=1e-5, atol=1e-5)
    some, again = x[~high], autoencoder.decode(dense)
    expected = formulas(some, again[~high], dense[~high])
    distances = ((x - x.mean(0)) ** 2).sum(1).double().numpy()
    lost = ((x - again) ** 2).sum(1).double().numpy()
    name = "reconstruction/explained_variance_all_positions"
    expected[name] = 1 - lost.sum() / distances.sum()
    expected["reconstruction/n_high_norm"] = 3
    fraction = distances[high].sum() / distances.sum()
    expected["reconstruction/high_norm_variance_fraction"] = fraction
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert fraction > 0.9
    assert abs(expected[name] - expected["reconstruction/explained_variance"]) > 0.1


def test_rows_are_sorted_csr(store: ActivationStore) -> None:
    csr = encode_store(store, sae_with_dead_latents(), store.rows)[0].csr
    assert isinstance(csr, sparse.csr_array)
    assert (csr.data != 0).all()
    for row in range(N_ROWS):
        columns = csr.indices[csr.indptr[row] : csr.indptr[row + 1]]
        assert (np.diff(columns) > 0).all()
    fresh = sparse.csr_array((csr.data, csr.indices, csr.indptr), shape=csr.shape)
    assert fresh.has_sorted_indices
    assert fresh.has_canonical_format


def test_no_dense_matrix_of_all_rows(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by CHUNK_BYTES, whatever the number of rows."""
    autoencoder, seen = sae_with_dead_latents(), []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return SparseAutoencoder.encode(autoencoder, x)

    monkeypatch.setattr(autoencoder, "encode", watched)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 9 * 4 * D_SAE + 3)
    encode_store(store, autoencoder, store.rows)
    assert max(seen) == min(9, int(store.manifest["shard_rows"]))
    assert sum(seen) == N_ROWS
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 1)
    seen.clear()
    encode_store(store, autoencoder, store.rows)
    assert seen == [1] * N_ROWS


def test_reads_the_sae_own_hookpoint(tmp_path: Path) -> None:
    """An SAE on a block's input reads the block below's output."""
    x = points(20, D_IN)
    below = store_of(tmp_path, x, Hookpoint(2, "resid_post"), 20)
    autoencoder = sae("jumprelu", hookpoint=Hookpoint(3, "resid_pre"))
    csr = encode_store(below, autoencoder, below.rows)[0].csr
    np.testing.assert_allclose(csr.toarray(), autoencoder.encode(x).numpy(), rtol=1e-5, atol=1e-5)


def test_half_precision_stores(tmp_path: Path) -> None:
    x = points(20, D_IN).bfloat16()
    half = store_of(tmp_path, x, Hookpoint(3, "resid_post"), 20)
    autoencoder = sae_with_dead_latents()
    latents, metrics = encode_store(half, autoencoder, half.rows)
    dense = autoencoder.encode(x.float())
    np.testing.assert_allclose(latents.csr.toarray(), dense.numpy(), rtol=1e-5, atol=1e-5)
    assert metrics == pytest.approx(formulas(x, autoencoder.decode(dense), dense), rel=1e-6)


def test_nothing_fires(tmp_path: Path) -> None:
    autoencoder = sae("jumprelu")
    autoencoder.threshold[:] = 1e6
    silent = store_of(tmp_path, points(20, D_IN), Hookpoint(3, "resid_post"), 8)
    latents, metrics = encode_store(silent, autoencoder, silent.rows)
    assert (latents.csr.nnz, latents.csr.shape) == (0, (20, D_SAE))
    assert metrics["sparsity/l0"] == metrics["sparsity/max_active"] == 0
    assert metrics["sparsity/mean_active"] is None
    assert metrics["sparsity/dead_fraction"] == 1


def test_points_that_do_not_vary() -> None:
    """No variance to explain: null, not a division by zero."""
    x = torch.ones(5, D_IN)
    metrics = StreamMetrics(x.mean(0).double(), D_SAE)
    metrics.update(x, x + 1, torch.ones(5, D_SAE))
    result = metrics.result()
    assert result["reconstruction/explained_variance"] is None
    assert result["reconstruction/explained_variance_legacy"] is None
    assert result["reconstruction/mse"] == pytest.approx(D_IN)


def test_sums_are_of_double_precision() -> None:
    """A million small errors beside one large value are lost in float32."""
    x = torch.zeros(2, D_IN)
    x[0, 0] = 1e4
    metrics = StreamMetrics(torch.zeros(D_IN), 3)
    for _ in range(200):
        metrics.update(x, x + 1e-3, torch.tensor([[1e8, 0, 0], [1, 0, 0]]))
    result = metrics.result()
    assert result["sparsity/mean_active"] == pytest.approx((1e8 + 1) / 2, rel=1e-12)
    x64 = x.double()
    error = ((x64 - (x + 1e-3).double()) ** 2).sum(1).mean()
    assert result["reconstruction/mse"] == pytest.approx(float(error), rel=1e-12)
