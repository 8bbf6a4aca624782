"""Which latents count as too active on neutral text: relative to their own SAE, or absolutely."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis import AnalysisInputs
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.analysis.contrast_checks import density_limit
from saexp.config import AnalyzerConfig
from saexp.errors import ConfigError
from saexp.latents import Latents
from saexp.results import Result

D_SAE, N_BACKGROUND = 600, 2000
RIGHT, RARE, GENERAL = 17, 23, 41
"""Latents: active on most known entities and on 4% of neutral text; on a few known entities of the
train split by chance; on nearly any text, and a bit more on known entities."""
GROUPS = ("known", "unknown")


def heavy_tailed(d_sae: int, l0: float, seed: int = 0) -> np.ndarray:
    """Densities of an SAE: log-normal, of this sum."""
    drawn = np.random.default_rng(seed).lognormal(sigma=1.3, size=d_sae)
    return np.minimum(drawn / drawn.sum() * l0, 1.0)


def rows() -> pd.DataFrame:
    """120 entities of each group in train, as many in test."""
    n = np.arange(480)
    table = pd.DataFrame({"unit": [f"entity {i}" for i in n]})
    table["group"] = np.where(n % 2 == 0, *GROUPS)
    table["split"] = np.where(n < 240, "train", "test")
    return table.assign(entity_type="city", n_entity_tokens=pd.array([2] * 480, dtype="Int64"))


def contrast(**options: object) -> Result:
    rng = np.random.default_rng(1)
    table = rows()
    known = (table["group"] == "known").to_numpy()
    train = (table["split"] == "train").to_numpy()
    density = heavy_tailed(D_SAE, 5.0)
    density[[RIGHT, RARE, GENERAL]] = 0.04, 0.001, 0.9
    rates = np.tile(density, (len(table), 1))
    rates[:, RIGHT] = np.where(known, 0.75, 0.2)
    rates[:, RARE] = np.where(known & train, 0.25, 0.05)
    rates[:, GENERAL] = np.where(known, 1.0, 0.8)
    dense = np.where(rng.random(rates.shape) < rates, rng.gamma(3, 1, rates.shape), 0)
    neutral = np.where(rng.random((N_BACKGROUND, D_SAE)) < density, 1.0, 0.0)
    cfg = AnalyzerConfig(name="contrast", n_bootstrap=300, **options)  # type: ignore[arg-type]
    return ContrastAnalyzer(cfg).analyze(
        AnalysisInputs(
            latents=Latents(sparse.csr_array(dense.astype(np.float32)), table),
            groups=GROUPS,
            layer=2,
            background=Latents(
                sparse.csr_array(neutral.astype(np.float32)),
                pd.DataFrame({"row": range(N_BACKGROUND)}),
            ),
        )
    )


def test_the_relative_limit_selects_what_the_absolute_one_left_out() -> None:
    relative, absolute = contrast().metrics, contrast(background_max=0.02).metrics
    assert relative["contrast/best_latent_known"] == RIGHT
    assert absolute["contrast/best_latent_known"] == RARE
    low = absolute["contrast/best_auroc_known_ci_low_test"]
    assert low is not None and low < 0.5
    chosen = contrast().tables["latents"].query("selected")["latent"].tolist()
    assert GENERAL not in chosen
    limit = relative["contrast/background_limit"]
    assert limit is not None and 0.04 < limit < 0.9
    assert absolute["contrast/background_limit"] == 0.02


def test_the_strongest_latent_is_reported_whatever_the_limit() -> None:
    result = contrast(background_max=0.02)
    table = result.tables["latents"].set_index("latent")
    assert result.metrics["contrast/strongest_latent_known"] == RIGHT
    assert not table.loc[RIGHT, "selected"]
    for suffix in ("", "_test"):
        for metric, column in (("auroc", "auroc"), ("auroc", "ci_low"), ("separation", "ci_high")):
            end = "" if column == metric else f"_{column}"
            column = f"{metric}_{column}" if metric == "separation" else column
            value = result.metrics[f"contrast/strongest_{metric}_known{end}{suffix}"]
            assert value == table.loc[RIGHT, f"{column}{suffix}"]
    # Chosen on train: the test split may have a stronger one.
    significant = table[(table["q_value"] <= 0.05) & (table["direction"] == "known")]
    assert significant["auroc"].idxmax() == RIGHT
    assert contrast().metrics["contrast/strongest_latent_known"] == RIGHT


def test_a_latent_at_chance_is_called_that() -> None:
    notes = [n for n in contrast(background_max=0.02).notes if "not above chance" in n]
    assert len(notes) == 1
    assert notes[0].startswith(f"latent {RARE}, the first selected for 'known', has AUROC 0.5")
    assert notes[0].endswith("(not above chance on held-out entities; Holm-adjusted p = 0.76)")
    assert not any("not above chance" in n for n in contrast().notes)


@pytest.mark.parametrize(
    ("d_sae", "l0", "between"),
    [(256, 12, (0.15, 0.6)), (4096, 32, (0.03, 0.09)), (16384, 80, (0.02, 0.06))],
)
def test_the_limit_follows_the_saes_own_densities(
    d_sae: int, l0: float, between: tuple[float, float]
) -> None:
    """12 of 256, 32 of 4096, 80 of 16 384 active: some 1% of latents are above it."""
    densities = heavy_tailed(d_sae, l0)
    limit = density_limit(densities, AnalyzerConfig(name="contrast"))
    assert limit.value is not None and between[0] < limit.value < between[1]
    above = limit.exceeded(pd.Series(densities)).mean()
    assert above == pytest.approx(0.01, abs=0.005)


def test_dead_latents_do_not_lower_it() -> None:
    densities, cfg = heavy_tailed(4096, 32), AnalyzerConfig(name="contrast")
    dead = np.concatenate([densities, np.zeros(12_000)])
    assert density_limit(dead, cfg).value == density_limit(densities, cfg).value


def test_it_is_never_stricter_than_the_paper() -> None:
    densities = heavy_tailed(2**17, 60)
    assert density_limit(densities, AnalyzerConfig(name="contrast")).value == 0.02
    assert np.quantile(densities, 0.99) < 0.02


def test_what_is_not_a_fraction_is_refused() -> None:
    with pytest.raises(ConfigError, match="background_quantile=99 is not a fraction; type 0 to 1"):
        AnalyzerConfig(name="contrast", background_quantile=99)
    with pytest.raises(ConfigError, match="background_max=-1 is not a fraction"):
        AnalyzerConfig(name="contrast", background_max=-1)
