"""Sparsity and values per group, against numpy on the dense latents."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis import AnalysisInputs
from saexp.analysis.group_statistics import StatsAnalyzer
from saexp.config import StatsConfig
from saexp.errors import DataError
from saexp.latents import Latents
from saexp.results import Result
from saexp.stats import MIN_N, mean_interval
from tests.unit.analysis.simulate import D_SAE, GROUPS, SILENT, activations, rows_table

ROWS = rows_table()
DENSE = activations(ROWS)


def stats(
    dense: np.ndarray = DENSE,
    rows: pd.DataFrame = ROWS,
    groups: tuple[str, ...] = GROUPS,
    *,
    n_bootstrap: int = 200,
    **options: object,
) -> Result:
    cfg = StatsConfig(name="stats", n_bootstrap=n_bootstrap, **options)  # type: ignore[arg-type]
    return StatsAnalyzer(cfg).analyze(
        AnalysisInputs(latents=Latents(sparse.csr_array(dense), rows), groups=groups, layer=4)
    )


def of_units(values: np.ndarray, group: str | None = None) -> np.ndarray:
    """Means over the rows of each unit of a group, a loop over units."""
    rows = ROWS if group is None else ROWS[ROWS["group"] == group]
    return np.array([values[rows.index[rows["unit"] == u]].mean(0) for u in rows["unit"].unique()])


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_of_a_group(group: str) -> None:
    result = stats()
    part = DENSE[(ROWS["group"] == group).to_numpy()]
    m = {k.removeprefix("stats/"): v for k, v in result.metrics.items()}
    assert m[f"n_positions_{group}"] == len(part)
    assert m[f"n_units_{group}"] == ROWS.loc[ROWS["group"] == group, "unit"].nunique()
    l0 = of_units((DENSE != 0).sum(1), group)
    assert m[f"l0_{group}"] == pytest.approx(l0.mean())
    low, high = mean_interval(l0[:, None], 0, n_resamples=200)
    assert (m[f"l0_{group}_ci_low"], m[f"l0_{group}_ci_high"]) == pytest.approx((low[0], high[0]))
    values = of_units(DENSE, group).mean(0).sum()
    assert m[f"mean_active_{group}"] == pytest.approx(values / l0.mean())
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
        active, frequency = (part != 0).sum(0), of_units(DENSE != 0, group).mean(0)
        order = sorted(range(D_SAE), key=lambda i: (-frequency[i].round(12), i))[:10]
        frequent_rows = result.tables["frequent"].query("group == @group")
        assert frequent_rows["latent"].tolist() == order
        assert frequent_rows["n_active"].tolist() == active[order].tolist()
        np.testing.assert_allclose(frequent_rows["frequency"], frequency[order])
        means = of_units(DENSE, group).mean(0)[order] / frequency[order]
        np.testing.assert_allclose(frequent_rows["mean_active"], means, rtol=1e-5)
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
        frequency = of_units(DENSE != 0, group).mean(0)[counts["latent"]]
        np.testing.assert_allclose(counts[f"freq_{group}"], frequency)
    difference = counts["freq_known"] - counts["freq_unknown"]
    np.testing.assert_allclose(counts["freq_difference"], difference)
    assert (counts["layer"] == 4).all()


def test_histograms() -> None:
    result = stats(n_bins=17)
    l0, values = result.tables["l0_histogram"], result.tables["value_histogram"]
    for group in GROUPS:
        part = DENSE[(ROWS["group"] == group).to_numpy()]
        l0_rows = l0[l0["group"] == group]
        expected = np.bincount((part != 0).sum(1))
        assert dict(zip(l0_rows["n_active"], l0_rows["n_positions"], strict=True)) == {
            i: n for i, n in enumerate(expected) if n
        }
        binned = values[values["group"] == group]
        n, edges = np.histogram(part[part != 0], bins=17, range=(0, DENSE.max()))
        assert binned["n"].tolist() == n.tolist()
        np.testing.assert_allclose(binned["high"], edges[1:], rtol=1e-6)
    assert values["n"].sum() == (DENSE != 0).sum()


def table_of(kinds: dict[str, tuple[int, int]], n_rows: tuple[int, int] = (1, 1)) -> pd.DataFrame:
    """Units of each type, per group, and rows per unit of each group."""
    rows = [
        (f"{group}-{kind}-{i}", group, "train", kind)
        for index, group in enumerate(GROUPS)
        for kind, sizes in kinds.items()
        for i in range(sizes[index])
        for _ in range(n_rows[index])
    ]
    return pd.DataFrame(rows, columns=["unit", "group", "split", "entity_type"])


def l0_of(values: np.ndarray) -> np.ndarray:
    """Dense latents with so many active per row."""
    return (np.arange(D_SAE) < values[:, None]).astype(np.float32)


def test_types_and_numbers_of_rows_are_no_difference_of_the_groups() -> None:
    """Types 80/20 against 20/80 with an L0 6 higher in one, eight rows a unit against one."""
    rows = table_of({"city": (40, 10), "movie": (10, 40)}, (8, 1))
    city = (rows["entity_type"] == "city").to_numpy()
    covered, plain, n_runs = 0, 0, 30
    for seed in range(n_runs):
        rng = np.random.default_rng(seed)
        of_unit = pd.Series(rng.poisson(5, rows["unit"].nunique()), rows["unit"].unique())
        l0 = rows["unit"].map(of_unit).to_numpy() + 6 * city + rng.poisson(2, len(rows))
        result = stats(l0_of(l0), rows)
        m = result.metrics
        covered += m["stats/l0_difference_ci_low"] <= 0 <= m["stats/l0_difference_ci_high"]
        plain += m["stats/l0_known"] - m["stats/l0_unknown"] > 1
        assert any(
            "city is 80% of known and 20% of unknown; l0_difference" in note
            for note in result.notes
        )
    assert covered >= 25, "28.5 expected; fewer than 25 has probability 0.003"
    assert plain == n_runs


def test_types_of_one_group_are_left_out_of_the_difference() -> None:
    rows = table_of({"city": (20, 20), "song": (15, 0)})
    song = (rows["entity_type"] == "song").to_numpy()
    l0 = 5 + 9 * song + np.random.default_rng(0).poisson(3, len(rows))
    result = stats(l0_of(l0), rows)
    known = (rows["group"] == "known").to_numpy()
    expected = l0[known & ~song].mean() - l0[~known].mean()
    assert result.metrics["stats/l0_difference"] == pytest.approx(expected)
    assert any("leaves out 15 units of entity types" in note for note in result.notes)
    alone = stats(l0_of(l0), rows.assign(entity_type=rows["group"]))
    expected = l0[known].mean() - l0[~known].mean()
    assert alone.metrics["stats/l0_difference"] == pytest.approx(expected)
    assert any("have no entity type in common" in note for note in alone.notes)


def test_few_units_have_no_interval() -> None:
    rows = table_of({"city": (MIN_N - 1, MIN_N)}, (3, 3))
    result = stats(l0_of(np.random.default_rng(0).poisson(5, len(rows))), rows)
    m = result.metrics
    assert m["stats/l0_known_ci_low"] is None
    assert m["stats/l0_difference_ci_low"] is None
    assert m["stats/l0_unknown_ci_low"] < m["stats/l0_unknown"]  # type: ignore[operator]
    assert "the L0 of known has no interval: it has 9 units, and 10 are needed" in result.notes


def test_an_l0_that_does_not_vary_has_no_interval_and_a_note() -> None:
    """TopK SAEs have it at every position."""
    result = stats(np.ones_like(DENSE))
    assert result.metrics["stats/l0_difference"] == 0
    assert result.metrics["stats/l0_difference_ci_low"] is None
    assert [n for n in result.notes if n.startswith("l0_difference has no interval")]
    assert not any("has no interval" in n for n in stats().notes)


@pytest.mark.parametrize("groups", [(), ("known",)])
def test_one_group_and_none(groups: tuple[str, ...]) -> None:
    result = stats(groups=groups)
    name = groups[0] if groups else "all"
    l0 = of_units((DENSE != 0).sum(1), name if groups else None).mean()
    assert result.metrics[f"stats/l0_{name}"] == pytest.approx(l0)
    assert "stats/n_frequent_in_both" not in result.metrics
    assert list(result.tables["counts"]) == ["layer", "latent", f"n_active_{name}", f"freq_{name}"]


def test_rows_of_other_groups_do_not_count() -> None:
    other = ROWS.assign(group=ROWS["group"].where(ROWS["entity_type"] == "city", "third"))
    in_groups = (other["group"] != "third").to_numpy()
    alone = stats(DENSE[in_groups], ROWS[in_groups].reset_index(drop=True))
    mixed = stats(rows=other)
    for name, value in alone.metrics.items():
        if "ci_" not in name:
            assert mixed.metrics[name] == pytest.approx(value), name


def test_groups_in_which_all_latents_are_inactive() -> None:
    result = stats(np.zeros_like(DENSE))
    assert result.metrics["stats/l0_known"] == 0
    assert result.metrics["stats/mean_active_known"] is None
    assert result.metrics["stats/dead_fraction_known"] == 1
    assert len(result.tables["frequent"]) == 0


def test_what_cannot_be_described() -> None:
    with pytest.raises(DataError, match="group 'absent' has no position"):
        stats(groups=("known", "absent"))
