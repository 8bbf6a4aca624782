"""Effects summed up: means, intervals and tests against scipy and loops; chosen coefficients."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saexp.interventions.effects import (
    chosen_coefficients,
    effect_curve,
    effect_metrics,
    matched_by_kind,
    summarise,
)
from saexp.interventions.outcomes import constant_rate_notes, metric_names
from saexp.stats import paired_difference_interval
from saexp.stats.significance import paired_difference, prediction_p_value, rank_p_value

N = 40
KINDS = {"refusal": "rate", "logit": "mean"}
CONTROLS = {"frequency": 20, "random_norm": 24, "random_kl": 3}


def effects(n: int = N) -> pd.DataFrame:
    """A rate and a number under a baseline, a condition at three coefficients, and controls."""
    return _effects(n).copy()


@cache
def _effects(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for split in ("test", "train"):
        for i in range(n):
            before = rng.normal()
            cells = [("baseline_a", "baseline", "", "", 0.0, 0.2, 0.0)]
            for c in (0.0, 1.0, 2.0):
                cells.append(("b_group", "group", "b_group", "", c, 0.2 + 0.3 * c, 0.5 * c))
                for kind, k in CONTROLS.items():
                    for j in range(k):
                        shift = (j / k - 0.5) * c * (0.1 if kind == "frequency" else 0.3)
                        name = f"b_group_{kind}_{j:02d}"
                        cells.append((name, "control", "b_group", kind, c, 0.2, shift))
            for condition, role, of, kind, c, rate, shift in cells:
                rows.append(
                    {
                        "example_id": f"{split}{i}",
                        "unit": f"{split}{i}",
                        "group": "a",
                        "split": split,
                        "condition": condition,
                        "role": role,
                        "control_kind": kind,
                        "of": of,
                        "direction": "" if role == "baseline" else "b",
                        "latent": "",
                        "coefficient": c,
                        "refusal": float(rng.random() < rate),
                        "logit": before + shift + 0.05 * rng.normal(),
                    }
                )
    return pd.DataFrame(rows)


@cache
def _summary() -> pd.DataFrame:
    return summarise(_effects(N), KINDS, controls=controls_of(_effects(N)))


def controls_of(table: pd.DataFrame) -> pd.DataFrame:
    """The table `controls`: all are matched but the first of each kind."""
    part = table[table["role"] == "control"]
    controls = part[["of", "condition", "control_kind", "coefficient"]].drop_duplicates()
    return controls.assign(matched=~controls["condition"].str.endswith("_00"))


def row(summary: pd.DataFrame, condition: str, c: float, split: str = "test") -> pd.Series:
    at = (summary["condition"] == condition) & (summary["coefficient"] == c)
    return summary[at & (summary["split"] == split)].iloc[0]


def test_means_intervals_and_changes_are_those_of_the_prompts() -> None:
    table = effects()
    summary_row = row(summarise(table, KINDS), "b_group", 2.0)
    test = table[table["split"] == "test"]
    own = test[(test["condition"] == "b_group") & (test["coefficient"] == 2.0)]
    before = test[test["role"] == "baseline"]
    assert summary_row["refusal"] == own["refusal"].mean()
    wilson = stats.binomtest(int(own["refusal"].sum()), N).proportion_ci(method="wilson")
    assert summary_row["refusal_ci_low"] == pytest.approx(wilson.low, abs=1e-6)
    assert summary_row["refusal_ci_high"] == pytest.approx(wilson.high, abs=1e-6)
    pairs = pd.crosstab(own["refusal"].to_numpy(), before["refusal"].to_numpy())
    counts = [pairs.get(b, {}).get(a, 0) for a in (1.0, 0.0) for b in (1.0, 0.0)]
    assert (
        summary_row["refusal_change_ci_low"],
        summary_row["refusal_change_ci_high"],
    ) == pytest.approx(paired_difference_interval(*counts))
    difference = own["logit"].to_numpy() - before["logit"].to_numpy()
    assert summary_row["logit_change"] == pytest.approx(difference.mean())
    apart = paired_difference(before["logit"].to_numpy(), own["logit"].to_numpy(), own["unit"])
    assert summary_row["logit_change_ci_low"] == pytest.approx(apart.ci_low, abs=0.01)
    assert summary_row["logit_change_ci_high"] == pytest.approx(apart.ci_high, abs=0.01)
    assert summary_row["logit_p"] == pytest.approx(apart.p_value, abs=3e-4)


def test_p_values_are_ranks_among_matched_controls_of_each_kind() -> None:
    table = effects()
    summary = summarise(table, KINDS, controls=controls_of(table), prediction_test=True)
    summary_row = row(summary, "b_group", 1.0)
    at = summary[(summary["split"] == "test") & (summary["coefficient"] == 1.0)]
    at = at[(at["role"] == "control") & ~at["condition"].str.endswith("_00")]
    for outcome in KINDS:
        own, prediction = summary_row[f"{outcome}_change"], []
        for kind, k in CONTROLS.items():
            changes = at.loc[at["control_kind"] == kind, f"{outcome}_change"].to_numpy()
            assert summary_row[f"{outcome}_n_{kind}"] == len(changes) == k - 1
            assert summary_row[f"{outcome}_p_{kind}"] == rank_p_value(own, changes)
            prediction.append(prediction_p_value(own, changes))
        # Of random directions of equal KL there are too few, so their p-value is not used.
        used = [summary_row[f"{outcome}_p_{kind}"] for kind in ("frequency", "random_norm")]
        assert summary_row[f"{outcome}_p_controls"] == max(used)
        assert summary_row[f"{outcome}_p_controls_floor"] == 1 / 20
        assert summary_row[f"{outcome}_p_prediction"] == max(prediction[:2])
        assert np.isnan(summary_row[f"{outcome}_p_disruption"])
        assert summary_row[f"{outcome}_n_disruption"] == 0
    assert summary_row["logit_p_controls"] == 1 / 20
    assert np.isnan(summary.loc[summary["role"] == "control", "logit_p_controls"]).all()
    assert "logit_p_prediction" not in _summary()


def test_controls_that_are_not_matched_give_no_p_value() -> None:
    table = effects()
    nothing = controls_of(table).assign(matched=False)
    for controls in (None, nothing):
        summary_row = row(summarise(table, KINDS, controls=controls), "b_group", 1.0)
        assert np.isnan(summary_row["logit_p_controls"])
        assert summary_row["logit_n_frequency"] == 0
        assert matched_by_kind(controls) == {}


def test_prompts_of_one_entity_are_one_observation() -> None:
    table = effects()
    twice = pd.concat([table, table], ignore_index=True)
    once, double = summarise(table, KINDS), summarise(twice, KINDS)
    a, b = row(once, "b_group", 2.0), row(double, "b_group", 2.0)
    assert b["logit_n"] == a["logit_n"] == N
    assert (a["logit_n_prompts"], b["logit_n_prompts"]) == (N, 2 * N)
    numbers = [c for c in once if c.startswith(("refusal", "logit")) and "n_prompts" not in c]
    pd.testing.assert_frame_equal(once[numbers], double[numbers])


def test_an_entitys_mean_rate_counts_as_a_fraction_of_a_success() -> None:
    table = effects()
    half = table.assign(refusal=1 - table["refusal"])
    summary = summarise(pd.concat([table, half], ignore_index=True), KINDS)
    summary_row = row(summary, "b_group", 2.0)
    wilson = stats.binomtest(N // 2, N).proportion_ci(method="wilson")
    assert summary_row["refusal"] == 0.5
    assert summary_row["refusal_ci_low"] == pytest.approx(wilson.low, abs=1e-6)
    assert summary_row["refusal_change_ci_low"] < 0 < summary_row["refusal_change_ci_high"]


def test_no_interval_has_zero_width() -> None:
    table = effects()
    table["refusal"], table["logit"] = 1.0, 2.0
    summary = summarise(table, KINDS, controls=controls_of(table))
    test = summary[(summary["split"] == "test") & (summary["role"] == "group")]
    for name in ("refusal", "refusal_change"):
        assert (test[f"{name}_ci_high"] - test[f"{name}_ci_low"] > 0.05).all()
    for name in ("logit", "logit_change"):
        assert test[f"{name}_ci_low"].isna().all()
    assert (test["logit_p"] == 1).all()
    assert row(summary, "b_group", 1.0)["refusal_p_controls"] == 1


@pytest.mark.parametrize("n", [1, 9])
def test_few_entities_have_neither_interval_nor_p_value(n: int) -> None:
    table = effects(n=n)
    summary = summarise(table, KINDS, controls=controls_of(table))
    assert summary["refusal_n"].eq(n).all()
    for outcome in KINDS:
        assert summary[f"{outcome}"].notna().all()
        for suffix in ("ci_low", "ci_high", "change_ci_low", "change_ci_high", "p"):
            assert summary[f"{outcome}_{suffix}"].isna().all(), suffix
        assert summary[f"{outcome}_p_controls"].isna().all()


def test_controls_have_means_and_changes_alone() -> None:
    summary = summarise(effects(), KINDS)
    controls = summary[summary["role"] == "control"]
    for outcome in KINDS:
        assert controls[[outcome, f"{outcome}_change"]].notna().all(axis=None)
        for suffix in ("ci_low", "change_ci_high", "p"):
            assert controls[f"{outcome}_{suffix}"].isna().all()


def test_outcomes_that_some_prompts_lack_count_those_that_have_one() -> None:
    table = effects()
    lacking = table["example_id"].isin(["test1", "test2"])
    table.loc[lacking, "logit"] = np.nan
    summary = summarise(table, KINDS)
    summary_row = row(summary, "b_group", 1.0)
    assert (summary_row["logit_n"], summary_row["logit_n_prompts"]) == (N - 2, N - 2)
    assert summary_row["refusal_n"] == N
    table.loc[table["condition"] == "b_group", "logit"] = np.nan
    summary_row = row(summarise(table, KINDS, controls=controls_of(table)), "b_group", 1.0)
    assert summary_row["logit_n"] == 0
    assert np.isnan(summary_row[["logit", "logit_change", "logit_p_controls"]].astype(float)).all()


def written(changes: dict[tuple[str, float], float]) -> pd.DataFrame:
    """A summary of a condition `a` and its controls, from their changes."""
    rows = [
        {
            "split": "train",
            "condition": name,
            "role": "group" if name == "a" else "control",
            "of": "a",
            "coefficient": c,
            "logit_change": change,
        }
        for (name, c), change in changes.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({("a", 1.0): 0.5, ("a", 2.0): 1.0, ("c", 1.0): 0.1, ("c", 2.0): 0.2}, 2.0),
        ({("a", 1.0): -0.5, ("a", 2.0): 0.3, ("c", 1.0): 0.1, ("c", 2.0): 0.1}, 1.0),
        # A control with a large change in the other direction is as extreme.
        ({("a", 1.0): 0.5, ("a", 2.0): 0.9, ("c", 1.0): 0.1, ("c", 2.0): -0.8}, 1.0),
        # The rule treats it and its controls alike.
        ({("c", 1.0): 0.5, ("c", 2.0): 1.0, ("a", 1.0): 0.1, ("a", 2.0): 0.2}, 2.0),
        ({("a", 1.0): 0.1, ("a", 2.0): 0.1, ("c", 1.0): 0.9, ("c", 2.0): 0.5}, 1.0),
        # Of equal gaps the smallest coefficient; 0 never, and no change is not a value.
        ({("a", 0.0): 0.0, ("a", -1.0): 0.3, ("a", 2.0): 0.3}, -1.0),
        ({("a", 1.0): 0.1, ("a", 2.0): np.nan, ("c", 1.0): np.nan}, 1.0),
        ({("a", 0.0): 0.0, ("a", 2.0): np.nan}, None),
    ],
)
def test_the_coefficient_with_the_largest_gap_to_its_controls_is_chosen(
    changes: dict[tuple[str, float], float], wanted: float | None
) -> None:
    chosen = chosen_coefficients(written(changes), "logit", "train")
    assert chosen == ({} if wanted is None else {"a": wanted})
    assert chosen_coefficients(written(changes), "logit", "test") == {}


def test_a_condition_on_prompts_of_two_groups_is_not_compared_with_itself() -> None:
    rows = written({("a", 1.0): 0.5, ("a", 2.0): 0.6, ("c", 1.0): 0.1, ("c", 2.0): 0.4})
    other = rows.assign(group="h")
    assert chosen_coefficients(pd.concat([rows, other]), "logit", "train") == {"a": 1.0}


def summarised(table: pd.DataFrame | None = None, chosen: float | None = None) -> pd.DataFrame:
    """The summary of `table`, or of `effects`."""
    if table is None:
        summary = _summary().copy()
    else:
        summary = summarise(table, KINDS, controls=controls_of(table))
    summary["logit_p_controls_holm"] = summary["refusal_p_controls_holm"] = np.nan
    marked = (summary["coefficient"] == chosen) & (summary["role"] != "baseline")
    return summary.assign(chosen=marked & (summary["split"] == "test"))


def test_metrics_of_a_condition_on_prompts_of_two_groups_are_apart() -> None:
    table = effects()
    names = table["condition"].replace("baseline_a", "baseline_h")
    other = table.assign(group="h", condition=names, logit=table["logit"] + 5)
    both = pd.concat([table, other])
    summary = summarised(both)
    test = summary[summary["split"] == "test"]
    metrics = effect_metrics(test, list(KINDS))
    for group in test["group"].unique():
        part = test[test["group"] == group].set_index(["condition", "coefficient"])["logit"]
        assert metrics[f"effect/logit/b_group_on_{group}"] == part["b_group", 2.0]
        of_controls = part[[c.startswith("b_group_") for c, _ in part.index]]
        most = of_controls[of_controls.index.get_level_values(1) == 2.0].max()
        assert metrics[f"effect/logit/b_group_on_{group}_control_max"] == most
    assert {"effect/logit/baseline_a", "effect/logit/baseline_h"} <= set(metrics)


@pytest.mark.parametrize(("chosen", "selected"), [(None, 2.0), (1.0, 1.0), (2.0, 2.0)])
def test_metrics_are_those_of_the_selected_coefficient(
    chosen: float | None, selected: float
) -> None:
    summary = summarised(chosen=chosen)
    summary.loc[summary["condition"] == "b_group", "logit_p_controls_holm"] = 0.1
    test = summary[summary["split"] == "test"]
    metrics = effect_metrics(test, list(KINDS))
    summary_row = row(summary, "b_group", selected)
    assert metrics["intervention/coefficient_b_group"] == selected
    assert metrics["effect/logit/baseline_a"] == row(summary, "baseline_a", 0.0)["logit"]
    assert metrics["effect/logit/b_group"] == summary_row["logit"]
    assert metrics["effect/logit/b_group_p_controls"] == summary_row["logit_p_controls"]
    assert metrics["effect/logit/b_group_p_controls_holm"] == 0.1
    assert "effect/refusal/b_group_p_controls_holm" not in metrics
    controls = test[(test["role"] == "control") & (test["coefficient"] == selected)]["logit"]
    assert metrics["effect/logit/b_group_control_max"] == controls.max()
    assert metrics["effect/logit/b_group_control_min"] == controls.min()
    assert metrics["effect/logit/b_group_control_mean"] == pytest.approx(controls.mean())
    # The only condition: the mean over all controls is that over its own.
    assert metrics["effect/logit/control_mean"] == metrics["effect/logit/b_group_control_mean"]


def test_the_curve_has_the_metrics_at_every_coefficient() -> None:
    summary = summarised(chosen=1.0)
    curve = effect_curve(summary)
    assert [point["coefficient"] for point in curve] == [0.0, 1.0, 2.0]
    for point in curve:
        summary_row = row(summary, "b_group", point["coefficient"])
        assert point["effect/logit/b_group"] == summary_row["logit"]
    metrics = effect_metrics(summary[summary["split"] == "test"], list(KINDS))
    assert curve[1].items() - {("coefficient", 1.0)} <= metrics.items()


def test_names_in_metrics_hold_no_latent() -> None:
    rows = [("known_group", "group", "known", "7+154"), ("known_154", "single", "known", "154")]
    rows += [("known_7", "single", "known", "7"), ("unknown_7", "single", "unknown", "7")]
    rows += [("latent_9", "single", "latent", "9"), ("known_layer_2", "single", "known", "2:9")]
    rows += [("known_mean_difference", "direction", "known", "")]
    rows += [("known_patch_resid_post_2", "place", "known", "")]
    rows += [(f"unknown_patch_resid_post_{n}", "place", "unknown", "") for n in (1, 2)]
    assert list(metric_names(rows).values()) == [
        *("known_group", "known_top1", "known_top2", "unknown_top1", "latents_top1"),
        *("known_layer_2", "known_mean_difference", "known_patch"),
        *("unknown_patch_resid_post_1", "unknown_patch_resid_post_2"),
    ]
    assert metric_names([]) == {}


@pytest.mark.parametrize("value", [0, 1])
def test_a_rate_that_nothing_moves_is_noted(value: int) -> None:
    table = effects()
    assert constant_rate_notes(table, KINDS) == []
    table["refusal"] = pd.array([bool(value)] * len(table), dtype="boolean")
    table["logit"] = 1.0
    (note,) = constant_rate_notes(table, KINDS)
    assert note.startswith(f"refusal is {value} on every prompt with and without intervention")
    assert constant_rate_notes(table.iloc[:0], KINDS) == []
