"""Alike latents of two SAEs: cosines against scipy, phi and Jaccard against other libraries."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist, jaccard
from sklearn.metrics import matthews_corrcoef

from saexp.analysis import latent_scores
from saexp.analysis.latent_scores import (
    Firing,
    cofiring,
    cosine_by_chance,
    nearest_directions,
)

D, D_SAE, N = 16, 90, 7


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 4])
def test_the_nearest_are_those_of_scipys_cosines(
    chunk: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_scores, "_CHUNK_BYTES", 4 * D * chunk)
    directions, decoder = noise(N, D), noise(D_SAE, D, seed=1) * 3
    cosines = 1 - cdist(directions.double().numpy(), decoder.double().numpy(), "cosine")
    nearest = nearest_directions(directions, decoder, k)
    expected = np.argsort(-cosines, axis=1)[:, :k]
    assert (nearest.latents == expected).all()
    np.testing.assert_allclose(nearest.cosines, np.take_along_axis(cosines, expected, 1), atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_latent_is_not_its_own_neighbour(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_scores, "_CHUNK_BYTES", 4 * D * chunk)
    decoder = noise(D_SAE, D)
    own = np.array([4, 89, 0])
    with_itself = nearest_directions(decoder[own], decoder, 3)
    without = nearest_directions(decoder[own], decoder, 2, exclude=own)
    assert (with_itself.latents[:, 0] == own).all()
    assert (with_itself.latents[:, 1:] == without.latents).all()


def test_more_neighbours_than_latents_are_all_of_them() -> None:
    decoder = noise(5, D)
    assert nearest_directions(decoder[:2], decoder, 9).latents.shape == (2, 5)
    few = nearest_directions(decoder[:2], decoder, 9, exclude=np.array([0, 1]))
    assert few.latents.shape == (2, 4)
    assert np.isfinite(few.cosines).all()


@pytest.mark.parametrize(("d", "d_sae"), [(128, 256), (128, 4096), (768, 2048)])
def test_chance_is_what_random_directions_rarely_exceed(d: int, d_sae: int) -> None:
    """Of 4000 nearest cosines 4 are expected beyond it; more than 12 has probability 0.0003."""
    cosines = np.concatenate(
        [
            nearest_directions(noise(1000, d, seed=2 * s), noise(d_sae, d, seed=2 * s + 1)).cosines
            for s in range(4)
        ]
    )
    assert (cosines > cosine_by_chance(d, d_sae)).sum() <= 12
    assert cosine_by_chance(d, d_sae) < 1.6 * cosines.mean()


def fires(keys: list[int], latents: list[int], seed: int) -> Firing:
    rng = np.random.default_rng(seed)
    return Firing(pd.Index(keys), np.array(latents), rng.random((len(keys), len(latents))) < 0.4)


def test_cofiring_is_over_the_rows_both_have_in_whatever_order() -> None:
    first, second = fires([*range(40)], [1, 2, 3], 0), fires([*range(60, 9, -1)], [7, 8], 1)
    second.fires[:, 1] = False
    association = cofiring(first, second)
    assert association.n_rows == 30
    a, b = first.fires[10:], second.fires[::-1][:30]
    for i in range(3):
        expected = matthews_corrcoef(a[:, i], b[:, 0])
        assert association.phi[i, 0] == pytest.approx(expected)
        assert association.phi[i, 0] == pytest.approx(np.corrcoef(a[:, i], b[:, 0])[0, 1])
        assert association.jaccard[i, 0] == pytest.approx(1 - jaccard(a[:, i], b[:, 0]))
        assert np.isnan(association.phi[i, 1])
        assert association.jaccard[i, 1] == 0


def test_runs_without_a_common_row_have_no_cofiring() -> None:
    association = cofiring(fires([1, 2], [0], 0), fires([3], [0], 0))
    assert association.n_rows == 0
    assert np.isnan(association.phi).all()
    assert np.isnan(association.jaccard).all()
