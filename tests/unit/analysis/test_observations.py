"""What counts as one observation of a contrast, and which of its rows."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from saexp.analysis import observations, used_rows
from saexp.latents import Latents

GROUPS = ("known", "unknown")


def table(*rows: tuple[str, str | None, str | None]) -> pd.DataFrame:
    """Rows of (unit, group, split), numbered."""
    frame = pd.DataFrame(rows, columns=["unit", "group", "split"])
    return frame.assign(row=np.arange(len(rows)))


ROWS = table(
    *[("a", "known", "train")] * 3,
    *[("b", "unknown", "train")] * 2,
    *[("c", "known", "test"), ("c", "unknown", "test")] * 2,
    ("d", "maybe", "train"),
    ("e", "known", None),
)


def latents(rows: pd.DataFrame, seed: int = 0) -> Latents:
    rng = np.random.default_rng(seed)
    dense = rng.gamma(2, 1, (len(rows), 5)) * (rng.random((len(rows), 5)) < 0.5)
    return Latents(sparse.csr_array(dense), rows)


def test_every_observation_has_as_many_rows_as_the_one_with_fewest() -> None:
    """Also in the split where there are more; an entity of both groups is two observations."""
    observed, notes = observations(latents(ROWS), GROUPS, seed=0)
    assert observed.units[["unit", "group"]].to_numpy().tolist() == [
        ["a", "known"],
        ["b", "unknown"],
        ["c", "known"],
        ["c", "unknown"],
    ]
    assert notes == [
        "1 of 9 rows left out: every entity contributes 2 rows (drawn at random), as many as the "
        "entity with the fewest rows",
        "1 entity has rows of both groups: these count once in each group, although the two "
        "observations are not independent",
    ]
    used = used_rows(ROWS, GROUPS, seed=0)
    assert len(used) == 8
    assert used[2:].tolist() == [3, 4, 5, 6, 7, 8]
    assert set(used[:2].tolist()) < {0, 1, 2}


@pytest.mark.parametrize("seed", range(4))
def test_values_are_means_and_activity_the_fraction_of_the_rows(seed: int) -> None:
    every = latents(ROWS, seed)
    dense = every.csr.toarray()
    observed, _ = observations(every, GROUPS, seed)
    used = used_rows(ROWS, GROUPS, seed)
    keys = ROWS.loc[used, "unit"] + ROWS.loc[used, "group"]
    for index, key in enumerate(dict.fromkeys(keys)):
        rows = used[(keys == key).to_numpy()]
        np.testing.assert_allclose(observed.csr.toarray()[index], dense[rows].mean(0))
        np.testing.assert_array_equal(
            observed.active.toarray()[index], (dense[rows] > 1e-6).mean(0)
        )


def test_the_rows_used_are_enough() -> None:
    """A table of these alone has the same observations, and no row left out."""
    every, used = latents(ROWS), used_rows(ROWS, GROUPS, seed=3)
    whole, _ = observations(every, GROUPS, seed=3)
    alone = Latents(every.csr[used], ROWS.iloc[used].reset_index(drop=True))
    part, notes = observations(alone, GROUPS, seed=3)
    np.testing.assert_array_equal(part.csr.toarray(), whole.csr.toarray())
    np.testing.assert_array_equal(part.active.toarray(), whole.active.toarray())
    pd.testing.assert_frame_equal(part.units, whole.units)
    assert not any("left out" in note for note in notes)


def test_repeats_that_depend_on_the_group_are_in_a_note() -> None:
    four = [(f"k{i}", "known", "train") for i in range(3) for _ in range(4)]
    one = [(f"u{i}", "unknown", "train") for i in range(3)]
    _, notes = observations(latents(table(*four, *one)), GROUPS, seed=0)
    (note,) = [n for n in notes if "mean number" in n]
    assert note.startswith(
        "before that, the mean number of rows per entity was 4.0 (known) and 1.0 (unknown);"
    )
    _, notes = observations(latents(table(*four[:8], *four[:8])), GROUPS, seed=0)
    assert not any("mean number" in n for n in notes)
