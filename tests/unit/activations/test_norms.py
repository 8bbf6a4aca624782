"""Positions of high norm are found by their norm at each stream, and against the right median."""

from pathlib import Path

import numpy as np
import pytest
import torch

import saexp
from saexp.activations import ActivationStore
from saexp.activations.reader import OrdinaryRows, norm_limit, norm_limits
from saexp.errors import ConfigError
from saexp.models import Hookpoint
from tests.unit.latents.test_encode import store_of

AT = Hookpoint(3, "resid_post")
BELOW = Hookpoint(2, "mlp_out")
N, D = 203, 16


def rows(*high: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) + 1
    x[list(high)] *= 100
    return x


def written(folder: Path, **streams: torch.Tensor) -> ActivationStore:
    store = store_of(folder, streams["at"], AT, 50)
    if "below" in streams:
        for index, (first, end) in enumerate(store.shard_bounds):
            store.write_shard(BELOW, index, streams["below"][first:end])
    return store


def ordinary(store: ActivationStore, *at: Hookpoint, ratio: float | None = 5.0) -> OrdinaryRows:
    return OrdinaryRows(store, norm_limits(store, at, ratio), ratio)


def test_high_norms_are_found_wherever_they_are(tmp_path: Path) -> None:
    x = rows(0, 1, 77, 202)
    ordinary_rows = ordinary(written(tmp_path, at=x), AT)
    norms = np.sqrt((x.double().numpy() ** 2).sum(1))
    expected = norms <= 5 * np.median(norms)
    assert np.flatnonzero(~expected).tolist() == [0, 1, 77, 202]
    assert ordinary_rows.mask.tolist() == expected.tolist()
    assert ordinary_rows.median_norm(AT) == pytest.approx(np.median(norms[expected]))
    distances = ((x.double().numpy() - x.double().numpy().mean(0)) ** 2).sum(1)
    fraction = distances[~expected].sum() / distances.sum()
    assert ordinary_rows.variance_fraction == pytest.approx(fraction)
    (note,) = ordinary_rows.notes("training leaves them out")
    assert note.startswith(
        "4 of 203 positions (1.97%) at layer_3.resid_post have a norm above 5 times the median and "
        f"hold {fraction:.1%} of the variance"
    )
    assert "training leaves them out" in note


def test_values_that_overflowed_are_left_out_and_reported(tmp_path: Path) -> None:
    x = rows(0)
    x[7] = float("inf")
    ordinary_rows = ordinary(written(tmp_path, at=x), AT)
    assert np.flatnonzero(~ordinary_rows.mask).tolist() == [0, 7]
    assert np.isnan(ordinary_rows.variance_fraction) and np.isfinite(ordinary_rows.median_norm(AT))
    (note,) = ordinary_rows.notes("training leaves them out")
    assert "are not all finite, so that their fraction of the variance is unknown" in note


def test_a_position_must_be_ordinary_at_every_stream(tmp_path: Path) -> None:
    store = written(tmp_path, at=rows(3), below=0.01 * rows(9, seed=1))
    assert np.flatnonzero(~ordinary(store, AT).mask).tolist() == [3]
    assert np.flatnonzero(~ordinary(store, BELOW).mask).tolist() == [9]
    assert np.flatnonzero(~ordinary(store, AT, BELOW).mask).tolist() == [3, 9]


def test_the_reference_decides_where_most_positions_are_high(tmp_path: Path) -> None:
    neutral = norm_limits(written(tmp_path / "neutral", at=rows(5)), [AT], 5.0)
    many = rows(*range(150))
    store = written(tmp_path / "own", at=many)
    assert OrdinaryRows(store, neutral, 5.0).mask.tolist() == [n >= 150 for n in range(N)]
    # Without one ordinary position there is nothing else to measure.
    store = written(tmp_path / "all", at=rows(*range(N)))
    ordinary_rows = OrdinaryRows(store, neutral, 5.0)
    assert (ordinary_rows.mask.all(), ordinary_rows.variance_fraction) == (True, 0.0)
    assert ordinary_rows.median_norm(AT) == pytest.approx(np.median(rows(5).double().norm(dim=-1)))
    (note,) = ordinary_rows.notes("…")
    assert note.startswith("all 203 positions at layer_3.resid_post have a norm above 5 times")


@pytest.mark.parametrize("ratio", [None, 5.0])
def test_without_a_limit_or_without_high_norms_all_are_ordinary(
    tmp_path: Path, ratio: float | None
) -> None:
    high = () if ratio else (0, 1)
    ordinary_rows = ordinary(written(tmp_path, at=rows(*high)), AT, ratio=ratio)
    assert (ordinary_rows.mask.all(), ordinary_rows.n_excluded, ordinary_rows.notes("…")) == (
        True,
        0,
        [],
    )


def test_a_median_of_zero_limits_nothing() -> None:
    assert norm_limit(np.array([0.0, 0.0, 3.0]), 5.0) == float("inf")
    assert norm_limit(np.array([1.0, 2.0, 900.0]), 5.0) == 10.0


@pytest.mark.parametrize("value", ["0.5", "1", "-3"])
def test_a_ratio_that_ordinary_positions_exceed_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="positions.max_norm_ratio=.*type a number above 1"):
        saexp.compose([f"positions.max_norm_ratio={value}"])


def test_without_a_ratio_every_norm_is_ordinary() -> None:
    assert saexp.compose(["positions.max_norm_ratio=null"]).positions.max_norm_ratio is None
