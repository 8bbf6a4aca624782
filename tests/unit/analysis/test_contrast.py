"""The whole contrast on simulated entities: what it finds, and that its numbers are pandas'."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from saexp.results import Result
from saexp.stats.separation import FEW
from tests.unit.analysis.simulate import (
    ALWAYS,
    D_SAE,
    GROUPS,
    KNOWN,
    LOUD,
    ONE_TYPE,
    SILENT,
    TYPES,
    UNKNOWN,
    activations,
    contrast,
    rows_table,
)

ROWS = rows_table()
DENSE = activations(ROWS)
PROMISED = [
    *(f"{n}_{g}" for n in ("n", "freq", "mean") for g in GROUPS),
    *("separation", "auroc", "p_value", "q_value", "ci_low", "ci_high"),
]
TWINS = [*PROMISED, "mean_difference", "min_separation", "min_auroc"]
TWINS += ["separation_ci_low", "separation_ci_high", *(f"separation_{t}" for t in TYPES)]


@pytest.fixture(scope="module")
def result() -> Result:
    return contrast(DENSE, ROWS)


@pytest.fixture(scope="module")
def table(result: Result) -> pd.DataFrame:
    return result.tables["latents"].set_index("latent")


def test_columns_of_the_contract(result: Result) -> None:
    """CONTRACT.md: latents.parquet."""
    columns = set(result.tables["latents"].columns)
    assert {"latent", "layer", "background_freq", "selected", *PROMISED} <= columns
    assert {f"{name}_test" for name in TWINS} <= columns
    assert (result.tables["latents"]["layer"] == 4).all()


def test_one_row_per_latent_that_fired(table: pd.DataFrame, result: Result) -> None:
    assert table.index.tolist() == [i for i in range(D_SAE) if i != SILENT]
    assert result.metrics["contrast/n_tested"] == D_SAE - 1


def test_planted_latents_are_found(table: pd.DataFrame, result: Result) -> None:
    assert table[table["selected"]].index.tolist() == [KNOWN, UNKNOWN]
    assert table["direction"][[KNOWN, UNKNOWN, ALWAYS, ONE_TYPE]].tolist() == [
        "known",
        "unknown",
        "known",
        "known",
    ]
    assert table["rank"][[KNOWN, UNKNOWN]].tolist() == [1, 1]
    assert table["rank"].isna().sum() == len(table) - 2
    planted = table.loc[[KNOWN, UNKNOWN, LOUD, ALWAYS, ONE_TYPE]]
    assert (planted["q_value"] < 0.05).all()
    assert (planted["q_value"].drop(ONE_TYPE) < 1e-6).all()
    assert (planted["q_value_test"].drop(ONE_TYPE) < 1e-3).all()
    others = table.drop(index=planted.index)
    assert (others["q_value"] > 0.05).all()
    assert result.metrics["contrast/n_significant"] == 5
    assert result.metrics["contrast/n_significant_test"] == 5
    (note,) = result.notes
    assert note.startswith("1 latent with a higher train AUROC for 'known' is not selected")


def test_why_the_others_are_not_selected(table: pd.DataFrame) -> None:
    assert table["min_separation"][ONE_TYPE] < 0 < table["separation"][ONE_TYPE]
    assert table["min_separation"][ALWAYS] == 0 == table["separation"][ALWAYS]
    assert table["min_separation"][LOUD] > table["min_separation"][KNOWN]
    assert table["background_freq"][LOUD] == 0.1


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.019, []), (0.0191, [KNOWN]), (0.2, [LOUD, KNOWN])]
)
def test_background_filter(limit: float, expected: list[int]) -> None:
    """At the limit or above is out: KNOWN fires on 1.9 % of background rows, LOUD on 10 %."""
    latents = contrast(DENSE, ROWS, background_max=limit).tables["latents"]
    chosen = latents[latents["selected"] & (latents["direction"] == "known")].sort_values("rank")
    assert chosen["latent"].tolist() == expected


def test_top_k() -> None:
    latents = contrast(DENSE, ROWS, background_max=0.2, top_k=1).tables["latents"]
    assert latents[latents["selected"]]["latent"].tolist() == [UNKNOWN, LOUD]


LABELS = ["unit", "group", "split", "entity_type"]


def frame_of(split: str) -> pd.DataFrame:
    frame = pd.concat([ROWS[LABELS], pd.DataFrame(DENSE.astype(np.float64))], axis=1)
    return frame[frame["split"] == split]


def by_entity(split: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """(means per entity, whether known, type), by pandas alone."""
    means = frame_of(split).groupby(LABELS, sort=False).mean()
    known = means.index.get_level_values("group") == "known"
    return means, np.asarray(known), means.index.get_level_values("entity_type").to_numpy()


def auroc_of(values: pd.DataFrame, known: np.ndarray) -> np.ndarray:
    """Of every column, by scipy's U."""
    u = stats.mannwhitneyu(values[known], values[~known], method="asymptotic").statistic
    return u / (known.sum() * (~known).sum())


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_are_those_of_pandas(table: pd.DataFrame, split: str) -> None:
    means, known, kind = by_entity(split)
    suffix = "_test" if split == "test" else ""
    fired = table.index
    on = (frame_of(split).set_index(LABELS) > 1e-6).groupby(LABELS, sort=False).mean()
    expected = pd.DataFrame(index=fired)
    for group, chosen in (("known", known), ("unknown", ~known)):
        expected[f"n_{group}"] = int(chosen.sum())
        expected[f"freq_{group}"] = on[chosen].mean()[fired]
        expected[f"mean_{group}"] = means[chosen].mean()[fired]
    expected["separation"] = expected["freq_known"] - expected["freq_unknown"]
    expected["mean_difference"] = expected["mean_known"] - expected["mean_unknown"]
    sign = np.where(table["direction"] == "known", 1, -1)
    for name in TYPES:
        a, b = on[known & (kind == name)].mean(), on[~known & (kind == name)].mean()
        expected[f"separation_{name}"] = sign * (a - b)[fired]
    expected["min_separation"] = expected[[f"separation_{t}" for t in TYPES]].min(axis=1)
    aurocs = [auroc_of(means[kind == t][fired], known[kind == t]) for t in TYPES]
    # As many entities of each group in either type, so the types' weights are equal.
    expected["auroc"] = np.mean(aurocs, axis=0)
    oriented = np.where(sign > 0, aurocs, 1 - np.array(aurocs))
    expected["min_auroc"] = oriented.min(axis=0)
    actual = table[[f"{c}{suffix}" for c in expected]]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
    p = stratified_p(means, known, kind, fired)
    common = (means > 0).sum()[fired] >= FEW
    assert 0 < (~common).sum() < len(p) / 2
    found_p = table[f"p_value{suffix}"]
    assert (found_p >= p * (1 - 1e-6)).all()
    assert (found_p[common] < 1.5 * p[common] + 1e-12).mean() > 0.9
    q = stats.false_discovery_control(table[f"p_value{suffix}"])
    np.testing.assert_allclose(table[f"q_value{suffix}"], q)
    assert (table[f"ci_low{suffix}"] <= expected["auroc"]).mean() > 0.95
    assert (table[f"ci_high{suffix}"] >= expected["auroc"]).mean() > 0.95


def stratified_p(
    means: pd.DataFrame, known: np.ndarray, kind: np.ndarray, latents: pd.Index
) -> pd.Series:
    """Van Elteren's test of types of equal sizes, normal approximation: U summed over them."""
    p_values = {}
    for latent in latents:
        deviation = variance = 0.0
        for name in TYPES:
            values, first = means[latent][kind == name].to_numpy(), known[kind == name]
            n, m = len(values), int(first.sum())
            ranks = stats.rankdata(values)
            deviation += ranks[first].sum() - m * (n + 1) / 2
            variance += m * (n - m) / n * ranks.var(ddof=1)
        z = (abs(deviation) - 0.5) / np.sqrt(variance)
        p_values[latent] = min(1.0, 2 * stats.norm.sf(z))
    return pd.Series(p_values)


def changed(split: str) -> pd.DataFrame:
    """The table after other activations on one split's rows."""
    dense, chosen = DENSE.copy(), (ROWS["split"] == split).to_numpy()
    dense[chosen] = activations(ROWS, seed=99)[chosen]
    dense[chosen, SILENT] = 1
    return contrast(dense, ROWS).tables["latents"].set_index("latent")


def test_train_columns_know_nothing_of_test_rows(table: pd.DataFrame) -> None:
    """Nor do the choice, its order and the q-values, whatever else fires on test."""
    other = changed("test").drop(index=SILENT)
    columns = [*TWINS, "direction", "selected", "rank", "background_freq"]
    pd.testing.assert_frame_equal(other[columns], table[columns])
    assert (other["auroc_test"] != table["auroc_test"]).mean() > 0.9


def test_test_columns_know_nothing_of_train_rows(table: pd.DataFrame) -> None:
    """Where the direction, which is the train split's, stays as it was."""
    other = changed("train").drop(index=SILENT)
    same = table.index[other["direction"] == table["direction"]]
    columns = [f"{name}_test" for name in TWINS]
    pd.testing.assert_frame_equal(other.loc[same, columns], table.loc[same, columns])
    assert len(same) > D_SAE / 3
    assert (other["auroc"] != table["auroc"]).mean() > 0.9


def test_val_rows_are_for_neither(table: pd.DataFrame) -> None:
    other = changed("val")
    pd.testing.assert_frame_equal(other.drop(index=SILENT), table)
    assert other["p_value"][SILENT] == other["q_value"][SILENT] == 1


def test_rows_of_an_entity_are_averaged_first(table: pd.DataFrame) -> None:
    """One row an entity, holding the mean of its rows, gives the same ranks, p-values and means."""
    means = pd.concat([by_entity(split)[0] for split in ("train", "val", "test")])
    rows = means.index.to_frame(index=False).assign(n_entity_tokens=2)
    single = contrast(means.to_numpy(), rows).tables["latents"].set_index("latent")
    columns = [
        f"{n}{s}" for n in ("auroc", "p_value", "ci_low", "mean_known") for s in ("", "_test")
    ]
    pd.testing.assert_frame_equal(single[columns], table[columns], rtol=1e-5)


def test_a_latent_is_active_on_a_fraction_of_an_entitys_rows() -> None:
    """Not on all of it where any row is."""
    dense = np.zeros((len(ROWS), 3), dtype=np.float32)
    once = ~ROWS["unit"].duplicated().to_numpy()
    dense[once, 0] = 1
    dense[:, 1] = 1
    latents = contrast(dense, ROWS).tables["latents"].set_index("latent")
    assert latents["freq_known"].tolist() == [0.5, 1.0]
    assert latents["freq_unknown_test"].tolist() == [0.5, 1.0]


def test_metrics_are_of_the_first_ranked(table: pd.DataFrame, result: Result) -> None:
    """In each direction's own orientation, intervals too."""
    metrics = {k.removeprefix("contrast/"): v for k, v in result.metrics.items()}
    assert metrics["n_units_train"] == 120
    assert metrics["n_units_test"] == 80
    assert metrics["n_units_known"] == metrics["n_units_unknown"] == 60
    assert metrics["n_units_known_test"] == metrics["n_units_unknown_test"] == 40
    assert metrics["n_selected_known"] == metrics["n_selected_unknown"] == 1
    for group, latent, flipped in (("known", KNOWN, False), ("unknown", UNKNOWN, True)):
        row = table.loc[latent]
        assert metrics[f"best_latent_{group}"] == latent
        for suffix in ("", "_test"):
            sep, auroc = row[f"separation{suffix}"], row[f"auroc{suffix}"]
            ci = [row[f"ci_low{suffix}"], row[f"ci_high{suffix}"]]
            sci = [row[f"separation_ci_low{suffix}"], row[f"separation_ci_high{suffix}"]]
            if flipped:
                sep, auroc = -sep, 1 - auroc
                ci, sci = [1 - ci[1], 1 - ci[0]], [-sci[1], -sci[0]]
            values = [
                metrics[f"best_{name}_{group}{end}{suffix}"]
                for name in ("auroc", "separation")
                for end in ("", "_ci_low", "_ci_high")
            ]
            assert values == pytest.approx([auroc, *ci, sep, *sci])
            assert 0.5 < ci[0] <= auroc <= ci[1]
            assert metrics[f"best_min_separation_{group}{suffix}"] == row[f"min_separation{suffix}"]
            assert metrics[f"best_min_auroc_{group}{suffix}"] == row[f"min_auroc{suffix}"]
    assert metrics["n_dropped_by_matching"] == 0
    assert metrics["token_count_p_value"] == 1


def test_p_values_of_the_leading_latents_are_corrected_by_holm(
    table: pd.DataFrame, result: Result
) -> None:
    """Over the latents named, each once: ALWAYS, the strongest for known, is a third."""
    plain = table.loc[[KNOWN, UNKNOWN, ALWAYS], "p_value_test"].to_numpy()
    adjusted = multipletests(plain, method="holm")[1]
    expected = dict(zip([KNOWN, UNKNOWN, ALWAYS], adjusted, strict=True))
    for group, best, strongest in (("known", KNOWN, ALWAYS), ("unknown", UNKNOWN, UNKNOWN)):
        for kind, latent in (("best", best), ("strongest", strongest)):
            assert result.metrics[f"contrast/{kind}_latent_{group}"] == latent
            p_value = result.metrics[f"contrast/{kind}_p_value_{group}_test"]
            assert p_value == pytest.approx(expected[latent])


def test_an_entity_of_both_groups_counts_in_each() -> None:
    """As if its rows in either group were another entity's, and it is said."""
    mixed = ROWS.assign(unit=ROWS["unit"].str.replace("-unknown-", "-known-"))
    mixed_result = contrast(DENSE, mixed)
    mixed_notes = [note for note in mixed_result.notes if "rows of both groups" in note]
    assert mixed_notes and mixed_notes[0].startswith(str(mixed["unit"].nunique()))
    parted = contrast(DENSE, ROWS)
    pd.testing.assert_frame_equal(mixed_result.tables["latents"], parted.tables["latents"])
    for m, n in ((mixed_result.metrics, 60), (parted.metrics, 120)):
        assert m["contrast/n_units_train"] == n
        assert m["contrast/n_units_known"] == m["contrast/n_units_unknown"] == 60
    assert not any("rows of both groups" in note for note in parted.notes)
