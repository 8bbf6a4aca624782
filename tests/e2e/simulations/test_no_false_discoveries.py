"""Where group labels mean nothing, the contrast says so: real latents, shuffled labels."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import saexp
from saexp.analysis import AnalysisInputs, Split
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.analysis.contrast_checks import placebo_labels
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache
from saexp.latents import Latents, encode_store
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.results import Result
from saexp.stats import wilson
from saexp.stats.separation import Ranked, stratified_rank_test
from saexp.stats.significance import benjamini_hochberg
from tests.simulated import split
from tests.unit.analysis.simulate import activations, contrast, rows_table

GROUPS = ("known", "unknown")
COLUMNS = ["unit", "group", "split", "entity_type", "n_entity_tokens"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """The shipped model's entities under its SAE of layer 2, as task=analyze reads them."""
    cache: Path = tmp_path_factory.mktemp("cache")
    cfg = saexp.compose(["model=tiny", "layer=2", f"cache_dir={cache}", "device=cpu"])
    objects = ObjectCache()
    model = language_model(cfg, objects)
    sae = sparse_autoencoder(cfg, model, objects)
    collected = collect_examples(cfg, model, [sae.hookpoint])
    encoded, _ = encode_store(collected.store, sae, collected.placement.rows)
    assert collected.examples.groups == GROUPS
    used = (encoded.rows["split"] != "val").to_numpy()
    return Latents(encoded.csr[used], encoded.rows.loc[used, COLUMNS].reset_index(drop=True))


def contrast_of(latents: Latents, rows: pd.DataFrame) -> Result:
    cfg = AnalyzerConfig(name="contrast", n_bootstrap=0)
    return ContrastAnalyzer(cfg).analyze(
        AnalysisInputs(latents=Latents(latents.csr, rows), groups=GROUPS, layer=2)
    )


def shuffled(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same labels on other entities."""
    of_unit = rows.drop_duplicates("unit").set_index("unit")["group"]
    order = np.random.default_rng(seed).permutation(len(of_unit))
    other = pd.Series(of_unit.to_numpy()[order], index=of_unit.index)
    return rows.assign(group=rows["unit"].map(other))


def redrawn(rows: pd.DataFrame, seed: int, share: float) -> pd.DataFrame:
    """Labels of very unequal frequency."""
    units = rows["unit"].unique()
    known = np.random.default_rng(seed).random(len(units)) < share
    label = pd.Series(np.where(known, *GROUPS), index=units)
    return rows.assign(group=rows["unit"].map(label))


def test_the_true_labels_are_found(latents: Latents) -> None:
    """So that what follows isn't for want of power."""
    metrics = contrast_of(latents, latents.rows).metrics
    assert metrics["contrast/n_significant"] > 5  # type: ignore[operator]
    assert metrics["contrast/n_significant_test"] > 5  # type: ignore[operator]


@pytest.mark.parametrize("share", [None, 0.06])
def test_shuffled_labels(latents: Latents, share: float | None) -> None:
    """No latent at q <= 0.05 in 10 shuffles, and in 10 draws of very unequal groups, where the
    plain normal approximation finds something in most of them."""
    for seed in range(10):
        rows = shuffled(latents.rows, seed) if share is None else redrawn(latents.rows, seed, share)
        assert contrast_of(latents, rows).metrics["contrast/n_significant"] == 0


LEVEL = 0.05


def test_the_share_of_permuted_labels_is_the_error_rate_of_the_claim() -> None:
    """Though the labels themselves have an effect: a claim on one latent's p-value."""
    train, test = split(1, 3.0), split(2, 3.0)

    def claims(_: Split, test: Split) -> bool:
        return stratified_rank_test(test.csr[:, :1], test.first, test.strata).p_value[0] <= LEVEL

    assert claims(train, test)
    m = placebo_labels(claims, train, test, 800, 0).metrics
    assert m["placebo/label_fraction_n"] == 800
    low, high = m["placebo/label_fraction_ci_low"], m["placebo/label_fraction_ci_high"]
    assert low - 0.01 <= LEVEL <= high + 0.01
    k = round(m["placebo/label_fraction"] * 800)
    assert (low, high) == pytest.approx(tuple(map(float, wilson(k, 800))))


def test_the_whole_contrast_finds_nothing_in_permuted_labels() -> None:
    """Planted latents are found with the true labels, and the numbers are those without placebo."""
    rows = rows_table()
    dense = activations(rows)
    plain, placebo = (contrast(dense, rows, placebo=n) for n in (0, 150))
    m = placebo.metrics
    assert m["placebo/label_fraction"] <= LEVEL
    assert m["placebo/label_fraction_n"] == 150
    pd.testing.assert_frame_equal(plain.tables["latents"], placebo.tables["latents"])
    assert plain.metrics == {k: v for k, v in m.items() if not k.startswith("placebo/")}
    assert plain.notes == placebo.notes


@pytest.mark.parametrize(("n_first", "n_second"), [(10, 190), (100, 100), (450, 50)])
def test_no_discoveries_where_there_are_none(n_first: int, n_second: int) -> None:
    """At most 5 % of data sets without any difference have a latent at q <= 0.05.

    The plain normal approximation finds one in most of those with unequal groups.
    """
    any_found = {"p_value": 0, "p_normal": 0}
    first = np.arange(n_first + n_second) < n_first
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rates = np.minimum(1, rng.pareto(1.0, 1000) * 0.007)
        on = rng.random((len(first), 1000)) < rates
        values = sparse.csr_array(on * rng.gamma(2, 1, on.shape))
        rank_test = Ranked(values, first).mann_whitney()
        here = on.any(0)
        for name in any_found:
            any_found[name] += benjamini_hochberg(getattr(rank_test, name)[here]).min() <= 0.05
    assert any_found["p_value"] <= 2
    assert (any_found["p_normal"] > 20) == (n_first != n_second)
