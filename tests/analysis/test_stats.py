"""Sparsity and values per group, against numpy on the dense latents."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.stats import StatsAnalyzer
from saexp.config import AnalyzerConfig
from saexp.errors import ConfigError, DataError
from saexp.latents.encode import Latents
from saexp.results import TaskResult
from tests.analysis.simulate import D_SAE, GROUPS, SILENT, activations, rows_table

ROWS = rows_table()
DENSE = activations(ROWS)


def stats(
    dense: np.ndarray = DENSE,
    rows: pd.DataFrame = ROWS,
    groups: tuple[str, ...] = GROUPS,
    *,
    n_bootstrap: int = 200,
    **options: object,
) -> TaskResult:
    cfg = AnalyzerConfig(name="stats", n_bootstrap=n_bootstrap, options=options)
    return StatsAnalyzer(cfg).analyze(
        AnalysisInputs(latents=Latents(sparse.csr_array(dense), rows), groups=groups, layer=4)
    )


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_of_a_group(group: str) -> None:
    result = stats()
    part = DENSE[(ROWS["group"] == group).to_numpy()]
    m = {k.removeprefix("stats/"): v for k, v in result.metrics.items()}
    assert m[f"n_positions_{group}"] == len(part)
    assert m[f"n_units_{group}"] == ROWS.loc[ROWS["group"] == group, "unit"].nunique()
    assert m[f"l0_{group}"] == pytest.approx((part != 0).sum(1).mean())
    assert m[f"mean_active_{group}"] == pytest.approx(part[part != 0].mean())
    assert m[f"max_active_{group}"] == pytest.approx(part.max())
    assert m[f"dead_fraction_{group}"] == pytest.approx((part == 0).all(0).mean())
    assert m[f"n_dead_{group}"] == (part == 0).all(0).sum()
    row = result.tables["groups"].set_index("group").loc[group]
    for name in ("n_positions", "l0", "l0_ci_low", "mean_active", "max_active", "dead_fraction"):
        key = f"l0_{group}_ci_low" if name == "l0_ci_low" else f"{name}_{group}"
        assert row[name] == pytest.approx(m[key])


def test_lists_of_the_most_frequent_and_their_overlap() -> None:
    result = stats()
    lists = {}
    for group in GROUPS:
        part = DENSE[(ROWS["group"] == group).to_numpy()]
        active = (part != 0).sum(0)
        order = sorted(range(D_SAE), key=lambda i: (-active[i], i))[:10]
        mine = result.tables["frequent"].query("group == @group")
        assert mine["latent"].tolist() == order
        assert mine["n_active"].tolist() == active[order].tolist()
        np.testing.assert_allclose(mine["frequency"], active[order] / len(part))
        means = [part[part[:, i] != 0, i].mean() for i in order]
        np.testing.assert_allclose(mine["mean_active"], means, rtol=1e-5)
        lists[group] = set(order)
    both = lists["known"] & lists["unknown"]
    assert result.metrics["stats/n_frequent_in_both"] == len(both)
    union = lists["known"] | lists["unknown"]
    assert result.metrics["stats/frequent_jaccard"] == pytest.approx(len(both) / len(union))
    frequent = result.tables["frequent"]
    assert set(frequent.loc[frequent["n_lists"] == 2, "latent"]) == both


def test_counts_of_every_latent_that_fired() -> None:
    counts = stats().tables["counts"]
    assert SILENT not in set(counts["latent"])
    assert len(counts) == (DENSE != 0).any(0).sum()
    for group in GROUPS:
        active = (DENSE[(ROWS["group"] == group).to_numpy()] != 0).sum(0)
        assert counts[f"n_active_{group}"].tolist() == active[counts["latent"]].tolist()
    difference = counts["freq_known"] - counts["freq_unknown"]
    np.testing.assert_allclose(counts["freq_difference"], difference)
    assert (counts["layer"] == 4).all()


def test_histograms() -> None:
    result = stats(n_bins=17)
    l0, values = result.tables["l0_histogram"], result.tables["value_histogram"]
    for group in GROUPS:
        part = DENSE[(ROWS["group"] == group).to_numpy()]
        mine = l0[l0["group"] == group]
        expected = np.bincount((part != 0).sum(1))
        assert dict(zip(mine["n_active"], mine["n_positions"], strict=True)) == {
            i: n for i, n in enumerate(expected) if n
        }
        binned = values[values["group"] == group]
        n, edges = np.histogram(part[part != 0], bins=17, range=(0, DENSE.max()))
        assert binned["n"].tolist() == n.tolist()
        np.testing.assert_allclose(binned["high"], edges[1:], rtol=1e-6)
    assert values["n"].sum() == (DENSE != 0).sum()


def test_intervals_are_those_of_whole_units() -> None:
    """Two thousand draws by hand; rows of one unit come and go together."""
    result = stats(n_bootstrap=2000)
    rng = np.random.default_rng(5)
    l0 = (DENSE != 0).sum(1)
    means = {}
    for group in GROUPS:
        chosen = ROWS["group"] == group
        units = [l0[i] for i in ROWS[chosen].groupby("unit").indices.values()]
        units = [l0[chosen.to_numpy()][i] for i in ROWS[chosen].groupby("unit").indices.values()]
        draws = rng.integers(len(units), size=(2000, len(units)))
        means[group] = np.array([np.concatenate([units[i] for i in d]).mean() for d in draws])
        low, high = np.quantile(means[group], [0.025, 0.975])
        m = result.metrics
        assert m[f"stats/l0_{group}_ci_low"] == pytest.approx(low, abs=0.1 * (high - low))
        assert m[f"stats/l0_{group}_ci_high"] == pytest.approx(high, abs=0.1 * (high - low))
    low, high = np.quantile(means["known"] - means["unknown"], [0.025, 0.975])
    found = [result.metrics[f"stats/l0_difference_ci_{side}"] for side in ("low", "high")]
    np.testing.assert_allclose(found, [low, high], atol=0.1 * (high - low))


@pytest.mark.parametrize("groups", [(), ("known",)])
def test_one_group_and_none(groups: tuple[str, ...]) -> None:
    result = stats(groups=groups)
    name = groups[0] if groups else "all"
    part = DENSE[(ROWS["group"] == name).to_numpy()] if groups else DENSE
    assert result.metrics[f"stats/l0_{name}"] == pytest.approx((part != 0).sum(1).mean())
    assert "stats/n_frequent_in_both" not in result.metrics
    assert list(result.tables["counts"]) == ["layer", "latent", f"n_active_{name}", f"freq_{name}"]


def test_rows_of_other_groups_do_not_count() -> None:
    other = ROWS.assign(group=ROWS["group"].where(ROWS["entity_type"] == "city", "third"))
    kept = (other["group"] != "third").to_numpy()
    alone = stats(DENSE[kept], ROWS[kept].reset_index(drop=True))
    mixed = stats(rows=other)
    for name, value in alone.metrics.items():
        if "ci_" not in name:
            assert mixed.metrics[name] == pytest.approx(value), name


def test_latents_that_are_all_silent() -> None:
    result = stats(np.zeros_like(DENSE))
    assert result.metrics["stats/l0_known"] == 0
    assert result.metrics["stats/mean_active_known"] is None
    assert result.metrics["stats/dead_fraction_known"] == 1
    assert len(result.tables["frequent"]) == 0


def test_what_cannot_be_described() -> None:
    with pytest.raises(DataError, match="group 'absent' has no position"):
        stats(groups=("known", "absent"))
    with pytest.raises(ConfigError, match="analyzer.options.bins: .* did you mean n_bins"):
        stats(bins=3)
