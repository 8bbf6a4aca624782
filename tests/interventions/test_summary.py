"""Effects summed up: means, intervals and paired tests against scipy, and the chosen strength."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saexp.interventions.summary import Draws, chosen_coefficients, summarise, unmoved
from saexp.stats.paired import paired_difference

N = 40


def effects(seed: int = 0, n: int = N) -> pd.DataFrame:
    """A rate and a number under a baseline, a condition at two strengths, and two controls."""
    rng = np.random.default_rng(seed)
    rows = []
    for split in ("test", "train"):
        for i in range(n):
            before = rng.normal()
            cells = [("baseline_a", "baseline", "", 0.0, 0.2, 0.0)]
            for c in (0.0, 1.0, 2.0):
                cells.append(("b_group", "group", "b_group", c, 0.2 + 0.3 * c, 0.5 * c))
                for k in (1, 2):
                    name = f"b_group_control_{k:02d}"
                    cells.append((name, "control", "b_group", c, 0.2 + 0.05 * c, 0.1 * c * k))
            for condition, role, of, c, rate, shift in cells:
                rows.append(
                    {
                        "example_id": f"{split}{i}",
                        "unit": f"{split}{i}",
                        "group": "a",
                        "split": split,
                        "condition": condition,
                        "role": role,
                        "of": of,
                        "direction": "" if role == "baseline" else "b",
                        "latent": "",
                        "coefficient": c,
                        "refusal": float(rng.random() < rate),
                        "logit": before + shift + 0.1 * rng.normal(),
                    }
                )
    return pd.DataFrame(rows)


KINDS = {"refusal": "rate", "logit": "mean"}


def row(summary: pd.DataFrame, condition: str, c: float, split: str = "test") -> pd.Series:
    at = (summary["condition"] == condition) & (summary["coefficient"] == c)
    return summary[at & (summary["split"] == split)].iloc[0]


def test_means_intervals_and_changes_are_those_of_the_prompts() -> None:
    table = effects()
    summary = summarise(table, KINDS)
    found = row(summary, "b_group", 2.0)
    test = table[table["split"] == "test"]
    mine = test[(test["condition"] == "b_group") & (test["coefficient"] == 2.0)]
    before = test[test["role"] == "baseline"]
    assert found["refusal"] == mine["refusal"].mean()
    wilson = stats.binomtest(int(mine["refusal"].sum()), N).proportion_ci(method="wilson")
    assert found["refusal_ci_low"] == pytest.approx(wilson.low, abs=1e-6)
    assert found["refusal_ci_high"] == pytest.approx(wilson.high, abs=1e-6)
    difference = mine["logit"].to_numpy() - before["logit"].to_numpy()
    assert found["logit_change"] == pytest.approx(difference.mean())
    apart = paired_difference(before["logit"].to_numpy(), mine["logit"].to_numpy(), mine["unit"])
    assert found["logit_change_ci_low"] == pytest.approx(apart.ci_low, abs=0.01)
    assert found["logit_change_ci_high"] == pytest.approx(apart.ci_high, abs=0.01)


def test_the_change_beyond_controls_is_against_their_mean() -> None:
    table = effects()
    found = row(summarise(table, KINDS), "b_group", 1.0)
    test = table[(table["split"] == "test") & (table["coefficient"] == 1.0)]
    controls = test[test["role"] == "control"].groupby("example_id")["logit"].mean()
    mine = test[test["condition"] == "b_group"].set_index("example_id")["logit"]
    assert found["logit_over_controls"] == pytest.approx((mine - controls).mean())
    assert found["logit_p_controls"] < 0.001
    assert found["logit_controls_below"] == 1.0


def test_sign_flips_agree_with_scipy() -> None:
    values = np.random.default_rng(4).normal(0.25, 1.0, size=25)
    wanted = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert Draws(0).sign_flip_p(values) == pytest.approx(wanted, abs=0.02)


def test_under_the_null_small_p_values_are_as_rare_as_they_should_be() -> None:
    rng = np.random.default_rng(5)
    draws = Draws(0)
    found = np.array([draws.sign_flip_p(rng.standard_t(4, size=30)) for _ in range(400)])
    assert abs((found < 0.05).mean() - 0.05) < 0.035


def test_prompts_of_one_entity_are_one_observation() -> None:
    table = effects()
    twice = pd.concat([table, table], ignore_index=True)
    once, double = summarise(table, KINDS), summarise(twice, KINDS)
    a, b = row(once, "b_group", 2.0), row(double, "b_group", 2.0)
    assert b["logit_n"] == a["logit_n"] == N
    assert b["logit_p"] == a["logit_p"]
    # Rates of several prompts an entity are no counts, so their interval is a bootstrap's.
    assert b["refusal_ci_low"] == pytest.approx(a["refusal_ci_low"], abs=0.06)
    assert b["refusal_ci_low"] != a["refusal_ci_low"]


def test_outcomes_that_some_prompts_lack_count_those_that_have_one() -> None:
    table = effects()
    lacking = table["example_id"].isin(["test1", "test2"])
    table.loc[lacking, "logit"] = np.nan
    summary = summarise(table, KINDS)
    assert row(summary, "b_group", 1.0)["logit_n"] == N - 2
    assert row(summary, "b_group", 1.0)["refusal_n"] == N


def test_the_coefficient_is_chosen_by_the_margin_over_controls_on_one_split_only() -> None:
    table = effects()
    summary = summarise(table, KINDS)
    assert chosen_coefficients(summary, "logit", "train") == {"b_group": 2.0}
    # On train, make the largest strength do no more than its controls do.
    at = (table["split"] == "train") & (table["coefficient"] == 2.0)
    table.loc[at & (table["role"] == "control"), "logit"] += 5
    summary = summarise(table, KINDS)
    assert chosen_coefficients(summary, "logit", "train") == {"b_group": 1.0}
    assert chosen_coefficients(summary, "logit", "test") == {"b_group": 2.0}


@pytest.mark.parametrize("value", [0, 1])
def test_a_rate_that_nothing_moves_is_told(value: int) -> None:
    table = effects()
    assert unmoved(table, KINDS) == []
    table["refusal"] = pd.array([bool(value)] * len(table), dtype="boolean")
    table["logit"] = 1.0
    (note,) = unmoved(table, KINDS)
    assert note.startswith(f"refusal is {value} on every prompt with and without changes")
    assert unmoved(table.iloc[:0], KINDS) == []
