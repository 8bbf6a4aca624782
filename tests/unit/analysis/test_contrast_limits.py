"""The contrast where there is little or nothing to contrast."""

import numpy as np
import pandas as pd
import pytest

from saexp.errors import DataError
from tests.unit.analysis.simulate import (
    D_SAE,
    KNOWN,
    LOUD,
    UNKNOWN,
    activations,
    contrast,
    rows_table,
)

ROWS = rows_table()
DENSE = activations(ROWS)


@pytest.mark.parametrize("groups", [(), ("known",), ("a", "b", "c")])
def test_no_two_groups(groups: tuple[str, ...]) -> None:
    with pytest.raises(
        DataError,
        match=f"a contrast needs two groups, but the data set has {len(groups)}; give its rows a "
        "'group', set dataset.group_rule, or type analyzer=stats",
    ):
        contrast(DENSE, ROWS, groups=groups)


def test_an_entity_in_several_splits() -> None:
    """What is chosen on its train rows would be tested on the same entity."""
    rows = ROWS.copy()
    unit = str(rows["unit"].iloc[0])
    twice = pd.concat([rows, rows.iloc[:1].assign(split="val")], ignore_index=True)
    with pytest.raises(DataError, match="^1 entity has rows in several splits, such as .* and val"):
        contrast(np.concatenate([DENSE, DENSE[:1]]), twice)
    of_unit = twice.index[twice["unit"] == unit]
    twice.loc[of_unit, "split"] = ["train", *[None] * (len(of_unit) - 1)]
    contrast(np.concatenate([DENSE, DENSE[:1]]), twice)


@pytest.mark.parametrize(
    ("split", "left", "count"), [("train", 1, "1 entity"), ("test", 0, "0 entities")]
)
def test_a_split_with_too_few_entities(split: str, left: int, count: str) -> None:
    units = ROWS.loc[(ROWS["split"] == split) & (ROWS["group"] == "unknown"), "unit"].unique()
    keep = (~ROWS["unit"].isin(units[left:])).to_numpy()
    with pytest.raises(
        DataError,
        match=f"split {split} has {count} of group 'unknown'; a contrast needs at least 2: "
        "add rows, or change dataset.split",
    ):
        contrast(DENSE[keep], ROWS[keep].reset_index(drop=True))


def test_too_few_entities_of_shared_types() -> None:
    units = ROWS.drop_duplicates("unit")
    train = units[(units["split"] == "train") & (units["group"] == "unknown")]
    other = train.loc[train["entity_type"] == "city", "unit"].tolist()[1:]
    keep = ~(
        ROWS["unit"].isin(other) | ((ROWS["entity_type"] == "movie") & (ROWS["group"] == "known"))
    )
    with pytest.raises(
        DataError,
        match=r"split train has 1 entity of group 'unknown' of the entity types that both groups "
        r"have \(city\); a contrast needs at least 2: add rows, or change dataset.split",
    ):
        contrast(DENSE[keep.to_numpy()], ROWS[keep].reset_index(drop=True))


def test_groups_of_no_row() -> None:
    with pytest.raises(
        DataError, match="split train has 0 entities of group 'a'; a contrast needs"
    ):
        contrast(DENSE, ROWS, groups=("a", "b"))


def test_two_entities_a_group_are_enough() -> None:
    in_subset = ROWS.groupby(["split", "group"])["unit"].transform(lambda u: u.isin(u.unique()[:2]))
    keep = in_subset.to_numpy(dtype=bool)
    result = contrast(DENSE[keep], ROWS[keep].reset_index(drop=True).assign(entity_type="city"))
    assert result.metrics["contrast/n_units_train"] == 4
    assert result.metrics["contrast/n_significant"] == 0


def test_rows_without_split_or_group() -> None:
    """Left out, as rows of a third group are."""
    rows = ROWS.copy()
    unsplit = rows["unit"].str.endswith("-0")
    rows.loc[unsplit, "split"] = None
    third = rows["unit"].str.endswith("-1")
    rows.loc[third, "group"] = "maybe"
    keep = ~(unsplit | third).to_numpy()
    fewer = ROWS[keep].reset_index(drop=True)
    result, expected = contrast(DENSE, rows), contrast(DENSE[keep], fewer)
    assert result.metrics["contrast/n_units_train"] == expected.metrics["contrast/n_units_train"]
    pd.testing.assert_frame_equal(result.tables["latents"], expected.tables["latents"])


def test_nothing_fires() -> None:
    result = contrast(np.zeros_like(DENSE), ROWS)
    assert result.tables["latents"].empty
    assert {"separation", "auroc_test", "q_value", "selected"} <= set(result.tables["latents"])
    for name in ("n_tested", "n_significant", "n_significant_test", "n_selected_known"):
        assert result.metrics[f"contrast/{name}"] == 0
    assert result.metrics["contrast/best_latent_known"] is None
    assert result.metrics["contrast/best_auroc_unknown_ci_low_test"] is None
    assert result.notes == [
        "no latent is associated with 'known' at a q-value <= 0.05",
        "no latent is associated with 'unknown' at a q-value <= 0.05",
    ]


def test_no_difference() -> None:
    """Noise only: a note for each group, nothing selected."""
    rows = ROWS.assign(group=np.where(ROWS["unit"].str[-1].isin(list("02468")), "known", "unknown"))
    noise = activations(ROWS.assign(group="known"))
    result = contrast(noise, rows)
    assert result.metrics["contrast/n_significant"] == 0
    assert not result.tables["latents"]["selected"].any()
    assert [n.split("'")[1] for n in result.notes] == ["known", "unknown"]


def test_groups_that_share_no_entity_type() -> None:
    """A note, and the minimum is over all entities."""
    alone = np.where(ROWS["group"] == "known", "city", "movie")
    result = contrast(DENSE, ROWS.assign(entity_type=alone))
    table = result.tables["latents"].set_index("latent")
    sign = np.where(table["direction"] == "known", 1, -1)
    for suffix in ("", "_test"):
        auroc = table[f"auroc{suffix}"]
        np.testing.assert_allclose(
            table[f"min_separation{suffix}"], sign * table[f"separation{suffix}"]
        )
        np.testing.assert_allclose(
            table[f"min_auroc{suffix}"], np.where(sign > 0, auroc, 1 - auroc)
        )
    assert not [c for c in table if c.startswith(("separation_city", "separation_movie"))]
    assert {KNOWN, UNKNOWN} <= set(table.index[table["selected"]])
    assert [note for note in result.notes if "higher train AUROC" not in note] == [
        f"split {split}: known and unknown have no entity type in common, so all entities are "
        "compared together and differences between types count as differences between the groups; "
        "min_separation and min_auroc are computed over all entities"
        for split in ("train", "test")
    ]


def test_a_type_that_one_group_lacks_is_left_out_of_the_minimum() -> None:
    lone = (ROWS["group"] == "known") & (ROWS["unit"].str[-1] == "3")
    table = contrast(DENSE, ROWS.assign(entity_type=ROWS["entity_type"].mask(lone, "song"))).tables[
        "latents"
    ]
    assert "separation_song" not in table
    both = table[["separation_city", "separation_movie"]].min(axis=1)
    np.testing.assert_allclose(table["min_separation"], both)


def test_entities_of_a_type_that_one_group_lacks_are_in_no_number() -> None:
    """As if their rows were not there, with a note that counts them."""
    lone = (ROWS["group"] == "known") & ROWS["unit"].str.endswith(("-3", "-7"))
    rows = ROWS.assign(entity_type=ROWS["entity_type"].mask(lone, "song"))
    result = contrast(DENSE, rows)
    keep = (~lone).to_numpy()
    expected = contrast(DENSE[keep], ROWS[keep].reset_index(drop=True))
    pd.testing.assert_frame_equal(result.tables["latents"], expected.tables["latents"])
    n = {
        split: rows[lone & (rows["split"] == split)]["unit"].nunique()
        for split in ("train", "test")
    }
    for split, left_out in n.items():
        assert (
            f"split {split}: {left_out} entities left out because only one group has their entity "
            f"type: {left_out} of song (known)"
        ) in result.notes


def test_groups_of_types_in_other_proportions_are_in_a_note() -> None:
    city = ROWS["entity_type"] == "city"
    known = ROWS["group"] == "known"
    last = ROWS["unit"].str.split("-").str[-1].astype(int)
    keep = (known == city) | (last % 4 == 0)
    part = ROWS[keep].reset_index(drop=True)
    (note,) = [n for n in contrast(DENSE[keep], part).notes if "entity types differ" in n]
    units = part.drop_duplicates("unit")
    share = (units["entity_type"] == "city").groupby(units["group"]).mean()
    assert f"city is {share['known']:.0%} of known and {share['unknown']:.0%} of unknown" in note
    assert not any("entity types differ" in n for n in contrast(DENSE, ROWS).notes)


def test_rows_without_a_type_are_a_type_of_their_own() -> None:
    rows = ROWS.assign(entity_type=ROWS["entity_type"].where(ROWS["entity_type"] == "city"))
    result, expected = contrast(DENSE, rows), contrast(DENSE, ROWS)
    columns = ["auroc", "p_value", "separation", "min_auroc", "ci_low", "p_value_test"]
    pd.testing.assert_frame_equal(
        result.tables["latents"][columns], expected.tables["latents"][columns]
    )
    assert result.notes == expected.notes


@pytest.mark.parametrize("missing", [None, ""])
def test_without_entity_types(missing: str | None) -> None:
    result = contrast(DENSE, ROWS.assign(entity_type=missing))
    table = result.tables["latents"].set_index("latent")
    assert not [
        c for c in table if c.startswith("separation_") and "ci" not in c and c != "separation_test"
    ]
    sign = np.where(table["direction"] == "known", 1, -1)
    np.testing.assert_allclose(table["min_separation"], sign * table["separation"])
    assert not any("entity type" in note for note in result.notes)


def test_without_background() -> None:
    from scipy import sparse

    from saexp.analysis import AnalysisInputs
    from saexp.analysis.contrast import ContrastAnalyzer
    from saexp.config import AnalyzerConfig
    from saexp.latents import Latents

    inputs = AnalysisInputs(
        latents=Latents(sparse.csr_array(DENSE), ROWS), groups=("known", "unknown"), layer=0
    )
    table = ContrastAnalyzer(AnalyzerConfig(name="contrast")).analyze(inputs)
    latents = table.tables["latents"]
    assert latents["background_freq"].isna().all()
    assert latents["selected"].sum() >= 3


def test_names_of_unequal_length_are_matched() -> None:
    """Longer unknown names: entities are dropped, counted and named in a note."""
    rng = np.random.default_rng(5)
    units = ROWS["unit"].drop_duplicates()
    length = pd.Series(rng.integers(1, 4, len(units)), index=units)
    more = pd.Series(rng.integers(0, 2, len(units)), index=units)
    tokens = ROWS["unit"].map(length) + np.where(
        ROWS["group"] == "unknown", ROWS["unit"].map(more), 0
    )
    rows = ROWS.assign(n_entity_tokens=pd.array(tokens, dtype="Int64"))
    result = contrast(DENSE, rows)
    dropped = result.metrics["contrast/n_dropped_by_matching"]
    assert isinstance(dropped, int)
    assert 0 < dropped < len(units) / 2
    assert result.metrics["contrast/token_count_p_value"] < 0.05  # type: ignore[operator]
    assert result.notes[0].endswith(
        f"{dropped} of {len(units)} entities were dropped to match them"
    )
    table = result.tables["latents"]
    assert (table["n_known"] == table["n_unknown"]).all()
    unmatched = contrast(DENSE, rows, match_tokens=False)
    assert unmatched.metrics["contrast/n_dropped_by_matching"] == 0
    assert unmatched.metrics["contrast/n_units_train"] == 120


def test_how_often_and_how_strongly_must_agree() -> None:
    """Known fires a little more often, unknown far more strongly: it speaks for neither."""
    dense = np.zeros((len(ROWS), D_SAE), dtype=np.float32)
    known = (ROWS["group"] == "known").to_numpy()
    last = ROWS["unit"].str.split("-").str[-1].astype(int).to_numpy()
    dense[:, 0] = np.where(known, 1.0, np.where(last % 10 < 9, 5.0, 0.0)) + last * 1e-3
    dense[~known & (last % 10 == 9), 0] = 0
    table = contrast(dense, ROWS).tables["latents"].set_index("latent")
    row = table.loc[0]
    assert row["separation"] > 0
    assert row["auroc"] < 0.5
    assert row["q_value"] < 0.01
    assert row["direction"] == "known"
    assert not row["selected"]


def test_with_too_few_entities_a_note_says_that_nothing_could_be_found() -> None:
    """Of 4 and 4 entities a perfect latent has p = 2/70, times the latents tested."""
    units = ROWS.drop_duplicates("unit")
    few = units.groupby(["split", "group", "entity_type"]).head(2).sort_values("unit")
    small = few.reset_index(drop=True).assign(entity_type="city")
    dense = np.ones((len(small), D_SAE), dtype=np.float32)
    dense[:, 0] = (small["group"] == "known").to_numpy()
    notes = contrast(dense, small).notes
    (note,) = [note for note in notes if "'known'" in note and "associated" in note]
    assert "; with 4 and 4 train entities none could be: a latent that is active on all " in note
    p_value = float(note.partition("has p = ")[2].partition(",")[0])
    assert p_value == pytest.approx(2 / 70, rel=0.05)
    assert note.endswith(f"and {D_SAE} latents are tested")
    quiet = contrast(np.ones_like(DENSE), ROWS).notes
    assert quiet and not any("none could" in note for note in quiet)


def test_better_latents_that_fire_on_any_text_are_named() -> None:
    """Left out of the selection by the background filter, not out of the reader's sight."""

    def density_notes(dense: np.ndarray, **options: float) -> list[str]:
        notes = contrast(dense, ROWS, **options).notes
        return [note for note in notes if "a higher train AUROC" in note]

    table = contrast(DENSE, ROWS).tables["latents"].set_index("latent")
    assert density_notes(DENSE) == [
        "1 latent with a higher train AUROC for 'known' is not selected because of being active on "
        "at least 9.8% of background tokens (analyzer.background_quantile=0.99, at least 0.02): "
        f"{LOUD} ({table.loc[LOUD, 'auroc']:.3f})"
    ]
    assert table.loc[LOUD, "auroc"] > table.loc[KNOWN, "auroc"]
    assert density_notes(DENSE, background_max=0.5) == []
    weaker = DENSE.copy()
    weaker[:, LOUD] = 0
    assert density_notes(weaker) == []


def test_perfect_separation_has_an_interval_below_1() -> None:
    dense = np.zeros_like(DENSE)
    dense[:, 3] = (ROWS["group"] == "known").to_numpy()
    metrics = contrast(dense, ROWS).metrics
    for name in ("auroc", "separation"):
        assert metrics[f"contrast/best_{name}_known_test"] == 1
        assert metrics[f"contrast/best_{name}_known_ci_high_test"] == 1
        assert 0.8 < metrics[f"contrast/best_{name}_known_ci_low_test"] < 0.96  # type: ignore[operator]


@pytest.mark.parametrize(("n", "has_interval"), [(9, False), (10, True)])
def test_few_entities_have_no_interval(n: int, has_interval: bool) -> None:
    """9 known test entities against 40 unknown."""
    units = ROWS.loc[(ROWS["split"] == "test") & (ROWS["group"] == "known"), "unit"].unique()
    keep = (~ROWS["unit"].isin(units[n:])).to_numpy()
    result = contrast(DENSE[keep], ROWS[keep].reset_index(drop=True))
    bounds = [f"{c}ci_{end}_test" for c in ("", "separation_") for end in ("low", "high")]
    assert result.tables["latents"][bounds].notna().all(axis=None) == has_interval
    assert result.tables["latents"]["ci_low"].notna().all()
    metric = result.metrics["contrast/best_auroc_known_ci_low_test"]
    assert (metric is not None) == has_interval
    note = "split test: a group has only 9 entities; intervals need at least 10"
    assert (note in result.notes) == (not has_interval)
