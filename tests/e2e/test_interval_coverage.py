"""Coverage of the contrast's intervals over group sizes, strata, laws and true values."""

import numpy as np
import pytest
from scipy import sparse, special

from saexp.stats import auroc_interval, separation_interval
from saexp.stats.separation import stratified_rank_test, stratum_weights

N_SAMPLES = 700
VALUES = [0.5, 0.8, 0.97, 0.99]


def divided(n: int, n_strata: int) -> np.ndarray:
    """Sizes that sum to n and differ by one at most."""
    return n // n_strata + (np.arange(n_strata) < n % n_strata)


def design(n_first: int, n_second: int, n_strata: int) -> tuple[np.ndarray, np.ndarray]:
    """(whether of the first group, stratum) of every unit."""
    sizes = divided(n_first, n_strata), divided(n_second, n_strata)[::-1]
    strata = [np.repeat(np.arange(n_strata), size) for size in sizes]
    first = np.arange(n_first + n_second) < n_first
    return first, np.concatenate(strata)


def drawn(rng: np.random.Generator, first: np.ndarray, law: str, auroc: float) -> np.ndarray:
    """Latents, one a column, of which all have this true AUROC in every stratum."""
    shape = (len(first), N_SAMPLES)
    if law == "mostly inactive":
        # Where both are active they are so with equal values.
        rate_second = 0.05 if auroc < 0.95 else 0.0
        rate_first = 2 * (auroc - 0.5) + rate_second
        rates = np.where(first, rate_first, rate_second)[:, None]
        return rng.exponential(1, shape) * (rng.random(shape) < rates)
    spread = 3 if law == "unequal spread" else 1
    shift = np.sqrt(1 + spread**2) * special.ndtri(auroc)
    centre, scale = np.where(first, shift, 0), np.where(first, spread, 1)
    return np.exp(rng.normal(centre[:, None], scale[:, None], shape))


def auroc_coverage(
    n_first: int, n_second: int, n_strata: int, law: str, auroc: float
) -> tuple[float, np.ndarray]:
    """Share of samples whose interval covers, and the intervals' widths."""
    rng = np.random.default_rng([n_first, n_second, n_strata, len(law), int(100 * auroc)])
    first, strata = design(n_first, n_second, n_strata)
    test = stratified_rank_test(sparse.csr_array(drawn(rng, first, law, auroc)), first, strata)
    weights = stratum_weights(first, strata)
    sizes = [np.array([((strata == s) & g).sum() for s in weights]) for g in (first, ~first)]
    low, high = auroc_interval(
        test.auroc, sizes[0], sizes[1], np.array(list(weights.values())), test.variance
    )
    return float(((low <= auroc) & (auroc <= high)).mean()), high - low


@pytest.mark.parametrize("auroc", VALUES)
@pytest.mark.parametrize("n_strata", [1, 4])
@pytest.mark.parametrize("law", ["normal", "mostly inactive", "unequal spread"])
@pytest.mark.parametrize("n", [10, 30, 200])
def test_a_stratified_auroc_is_covered(n: int, law: str, n_strata: int, auroc: float) -> None:
    covered, width = auroc_coverage(n, n, n_strata, law, auroc)
    assert covered >= 0.92
    assert (width > 0).all()


@pytest.mark.parametrize("auroc", VALUES)
@pytest.mark.parametrize("law", ["normal", "mostly inactive"])
@pytest.mark.parametrize(("n_first", "n_second"), [(10, 30), (30, 10), (10, 200)])
def test_an_auroc_of_groups_of_unequal_size_is_covered(
    n_first: int, n_second: int, law: str, auroc: float
) -> None:
    """With the variance of the sizes alone: 81 to 91 % for 10 units often inactive against 200."""
    assert auroc_coverage(n_first, n_second, 1, law, auroc)[0] >= 0.92


def separation_coverage(
    n_first: int, n_second: int, n_strata: int, rates: tuple[float, float], apart: float
) -> tuple[float, np.ndarray]:
    """Of units with one row; strata differ in their rates by `apart` around the two given."""
    rng = np.random.default_rng([n_first, n_second, n_strata, int(1000 * rates[0])])
    first, strata = design(n_first, n_second, n_strata)
    weights = stratum_weights(first, strata)
    means, sizes = np.zeros((2, N_SAMPLES)), np.zeros((2, n_strata), dtype=int)
    for index, (stratum, weight) in enumerate(weights.items()):
        shift = apart * (-1) ** index if n_strata > 1 else 0.0
        for group, mask in enumerate((first, ~first)):
            n = int(((strata == stratum) & mask).sum())
            sizes[group, index] = n
            means[group] += weight * rng.binomial(n, rates[group] + shift, N_SAMPLES) / n
    w = np.array(list(weights.values()))
    low, high = separation_interval(*np.clip(means, 0, 1), *sizes, w)
    truth = rates[0] - rates[1]
    return float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean()), high - low


@pytest.mark.parametrize("separation", [0.0, *VALUES])
@pytest.mark.parametrize("n_strata", [1, 4])
@pytest.mark.parametrize("at", ["top", "middle", "bottom"])
@pytest.mark.parametrize(
    ("n_first", "n_second"), [(10, 10), (30, 30), (200, 200), (10, 200), (30, 10)]
)
def test_a_stratified_separation_is_covered(
    n_first: int, n_second: int, at: str, n_strata: int, separation: float
) -> None:
    margin = (1 - separation) / 2
    rates = {
        "top": (1.0, 1 - separation),
        "middle": (1 - margin, margin),
        "bottom": (separation, 0.0),
    }[at]
    apart = 0.9 * margin if at == "middle" else 0.0
    covered, width = separation_coverage(n_first, n_second, n_strata, rates, apart)
    assert covered >= 0.92
    assert (width > 0).all()
