"""Token counts: left alone where equal, made equal where not, a note where they cannot be."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saexp.analysis import match_token_counts

GROUPS = ("known", "unknown")


def units(seed: int, mean_first: float, mean_second: float, n: int = 240) -> pd.DataFrame:
    """Entities of two types and three splits with Poisson lengths."""
    rng = np.random.default_rng(seed)
    group = rng.choice(GROUPS, n, p=[0.4, 0.6])
    means = np.where(group == "known", mean_first, mean_second)
    return pd.DataFrame(
        {
            "group": group,
            "split": rng.choice(["train", "val", "test"], n),
            "entity_type": rng.choice(["movie", "song"], n),
            "n_entity_tokens": pd.array(1 + rng.poisson(means), dtype="Int64"),
        }
    )


@pytest.mark.parametrize("resample", [True, False])
def test_equal_counts_are_left_alone(resample: bool) -> None:
    matching = match_token_counts(units(1, 2, 2), GROUPS, 0, resample=resample)
    assert matching.keep.all()
    assert matching.p_value is not None
    assert matching.p_value > 0.05
    assert matching.notes == []


def test_p_value_is_the_smallest_over_types_corrected() -> None:
    table = units(2, 1.0, 1.4)
    matching = match_token_counts(table, GROUPS, 0, resample=False)
    by_type = [
        stats.mannwhitneyu(
            part.loc[part["group"] == "known", "n_entity_tokens"].astype(float),
            part.loc[part["group"] == "unknown", "n_entity_tokens"].astype(float),
        ).pvalue
        for _, part in table.groupby("entity_type")
    ]
    assert matching.p_value == pytest.approx(min(1.0, 2 * min(by_type)))


def test_a_few_counts_that_all_differ_are_tested_exactly() -> None:
    table = pd.DataFrame(
        {
            "group": ["known"] * 3 + ["unknown"] * 4,
            "split": "train",
            "entity_type": "song",
            "n_entity_tokens": pd.array([1, 2, 3, 4, 5, 6, 7], dtype="Int64"),
        }
    )
    matching = match_token_counts(table, GROUPS, 0, resample=False)
    # One of 35 ways to choose three of seven, doubled.
    assert matching.p_value == pytest.approx(2 / 35)


def test_unequal_counts_are_made_equal_in_every_stratum() -> None:
    table = units(3, 1, 2.5)
    matching = match_token_counts(table, GROUPS, 0, resample=True)
    assert matching.p_value is not None
    assert matching.p_value < 0.05
    dropped = int((~matching.keep).sum())
    [note] = matching.notes
    assert note.startswith("token counts of known and unknown differ (p = ")
    assert note.endswith(f"{dropped} of 240 entities were dropped to match them")
    strata = ["entity_type", "split", "n_entity_tokens"]
    sizes = table.groupby([*strata, "group"]).size().unstack(fill_value=0)
    counts = table[matching.keep].groupby([*strata, "group"]).size().unstack(fill_value=0)
    assert (counts["known"] == counts["unknown"]).all()
    # No more are dropped than must be: each stratum keeps as many as its smaller group has.
    assert len(table[matching.keep]) == 2 * sizes.min(axis=1).sum()
    again = match_token_counts(
        table[matching.keep].reset_index(drop=True), GROUPS, 0, resample=True
    )
    assert again.keep.all()


def test_the_choice_is_seeded() -> None:
    table = units(3, 1, 2.5)
    one, same, other = (match_token_counts(table, GROUPS, s, resample=True) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.keep, same.keep)
    assert (one.keep != other.keep).any()
    assert one.keep.sum() == other.keep.sum()


def test_not_matched_when_not_wanted() -> None:
    matching = match_token_counts(units(3, 1, 2.5), GROUPS, 0, resample=False)
    assert matching.keep.all()
    [note] = matching.notes
    assert note.endswith("and were not matched (analyzer.match_tokens=false)")


def test_counts_that_never_meet() -> None:
    table = units(4, 1, 1)
    longer = table["group"] == "unknown"
    table.loc[longer, "n_entity_tokens"] += 20
    matching = match_token_counts(table, GROUPS, 0, resample=True)
    assert matching.keep.all()
    [note] = matching.notes
    assert note.endswith(
        "and do not overlap, so this contrast cannot separate recognition from the length of names"
    )


@pytest.mark.parametrize("case", ["counts missing", "types disjoint"])
def test_nothing_to_compare(case: str) -> None:
    table = units(3, 1, 2.5)
    if case == "counts missing":
        table.loc[5, "n_entity_tokens"] = pd.NA
    else:
        table["entity_type"] = table["group"]
    matching = match_token_counts(table, GROUPS, 0, resample=True)
    assert matching.keep.all()
    assert (matching.p_value, matching.notes) == (None, [])


def test_all_of_one_length() -> None:
    table = units(3, 1, 2.5).assign(n_entity_tokens=2)
    assert match_token_counts(table, GROUPS, 0, resample=True).p_value == 1.0


def test_without_types() -> None:
    table = units(3, 1, 2.5).assign(entity_type=None)
    matching = match_token_counts(table, GROUPS, 0, resample=True)
    counts = table[matching.keep].groupby(["split", "n_entity_tokens", "group"]).size()
    assert 0 < matching.keep.sum() < len(table)
    assert (counts.unstack()["known"] == counts.unstack()["unknown"]).all()
