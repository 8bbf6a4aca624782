"""Main conditions, their chosen coefficients, and Holm's adjustment over their tests."""

import numpy as np
import pandas as pd
import pytest

from saexp.interventions.effects import claim_notes, summarised_conditions, with_claims
from saexp.stats.significance import holm

OUTCOMES = ["refusal", "logit"]


def summary() -> pd.DataFrame:
    """Two directions: one with a group and a single, one with a single latent and a direction."""
    rows = []
    for split in ("train", "test"):
        own = [("a_group", "group", "a"), ("a_3", "single", "a"), ("b_7", "single", "b")]
        own += [("b_8", "single", "b"), ("b_probe", "direction", "b")]
        rows.append((split, "baseline", "baseline", "", "", 0.0))
        for name, role, direction in own:
            for c in (1.0, 2.0):
                rows.append((split, name, role, name, direction, c))
        rows.append((split, "a_group_control_01", "control", "a_group", "a", 1.0))
    names = ["split", "condition", "role", "of", "direction", "coefficient"]
    table = pd.DataFrame(rows, columns=names).assign(group="all")
    for i, outcome in enumerate(OUTCOMES):
        p = np.where(table["role"].isin(["baseline", "control"]), np.nan, 0.01 * (i + 1))
        table[f"{outcome}_p_controls"] = p + 0.001 * np.arange(len(table))
        table[f"{outcome}_p_controls_floor"] = np.where(np.isnan(p), np.nan, 0.01)
        table[f"{outcome}_change"] = np.arange(len(table)) / 100
        table[f"{outcome}_n"] = 40
    return table


CHOSEN = {"a_group": 1.0, "a_3": 2.0, "b_7": 2.0, "b_8": 1.0, "b_probe": 1.0}


def test_groups_else_the_first_latent_and_other_directions_are_main() -> None:
    assert summarised_conditions(summary(), "refusal") == ["a_group", "b_7", "b_probe"]


def test_single_latents_of_no_group_are_beside_the_group_of_all() -> None:
    names = {"a_group": "latents", "a_3": "latent", "b_7": "latent", "b_8": "latent"}
    table = summary()
    table = table[table["condition"].isin([*names, "baseline"])]
    table["direction"] = table["condition"].map(names).fillna("")
    assert summarised_conditions(table, "refusal") == ["a_group"]
    singles = table[table["condition"] != "a_group"]
    assert summarised_conditions(singles, "refusal") == ["a_3"]


def test_a_coefficient_chosen_on_the_test_prompts_is_corrected_for() -> None:
    table = summary()
    table["refusal_p_controls"] /= 10
    table = table[table["split"] == "test"]
    claims = with_claims(table, ["refusal"], CHOSEN)
    family = claims[claims["chosen"] & claims["main"]]
    expected = np.minimum(2 * holm(family["refusal_p_controls"].to_numpy()), 1)
    assert family["refusal_p_controls_holm"].to_numpy() == pytest.approx(expected)
    assert set(claims["n_choices"]) == {2}
    assert set(with_claims(summary(), ["refusal"], CHOSEN)["n_choices"]) == {1}


def test_of_many_places_the_one_of_the_largest_change_on_train_is_main() -> None:
    table = summary()
    table = table[table["role"].isin(["baseline", "single"])].replace({"single": "place"})
    at = (table["condition"] == "b_7") & (table["split"] == "train") & (table["coefficient"] == 2)
    table.loc[at, "refusal_change"] = -3.0
    table.loc[(table["condition"] == "b_8") & (table["split"] == "test"), "refusal_change"] = 9.0
    assert summarised_conditions(table, "refusal") == ["a_3", "b_7"]
    assert summarised_conditions(table[table["split"] == "test"], "refusal") == ["a_3", "b_8"]


def test_holm_is_over_main_conditions_times_outcomes_at_the_chosen_coefficient() -> None:
    claims = with_claims(summary(), OUTCOMES, CHOSEN)
    assert set(claims.loc[claims["main"], "condition"]) == {"a_group", "b_7", "b_probe"}
    chosen = claims[claims["chosen"]]
    assert set(chosen["split"]) == {"test"}
    at = dict(zip(chosen["condition"], chosen["coefficient"], strict=True))
    assert at == CHOSEN | {"a_group_control_01": 1.0}
    family = claims[claims["chosen"] & claims["main"]]
    p = family[[f"{o}_p_controls" for o in OUTCOMES]].to_numpy()
    adjusted = claims[[f"{o}_p_controls_holm" for o in OUTCOMES]]
    np.testing.assert_array_equal(adjusted.loc[family.index].to_numpy().ravel(), holm(p.ravel()))
    assert adjusted.notna().sum().sum() == 3 * 2
    # The smallest of 6 is multiplied by 6.
    assert adjusted.min().min() == pytest.approx(6 * np.nanmin(p))


def test_outcomes_without_a_p_value_are_not_counted() -> None:
    table = summary().assign(logit_p_controls=np.nan)
    claims = with_claims(table, OUTCOMES, CHOSEN)
    assert claims["logit_p_controls_holm"].isna().all()
    assert claims["refusal_p_controls_holm"].min() == pytest.approx(
        3 * claims.loc[claims["chosen"] & claims["main"], "refusal_p_controls"].min()
    )


def test_too_few_entities_or_controls_are_noted() -> None:
    table = with_claims(summary(), OUTCOMES, CHOSEN)
    (note,) = claim_notes(table, OUTCOMES)
    assert note.startswith(
        "no effect can be significant: with 99 controls the smallest p-value is 0.01, after Holm "
        "over 6 tests 0.06; raise"
    )
    table[[f"{o}_p_controls_floor" for o in OUTCOMES]] = 1 / 200
    assert claim_notes(table, OUTCOMES) == []
    few = table.assign(refusal_n=1, logit_n=1)
    few.loc[few["role"] == "baseline", "group"] = "known"
    (note,) = claim_notes(few, OUTCOMES)
    assert note.startswith("1 entity of group known on the test split: effects on fewer than 10")
