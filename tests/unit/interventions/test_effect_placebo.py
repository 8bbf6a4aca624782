"""Controls in the place of the latent, and what an effect of this size could have been found."""

import numpy as np
import pandas as pd
import pytest

from saexp.interventions.controls import effect_fraction
from saexp.pipeline.intervene import effect_power
from saexp.stats import wilson
from saexp.stats.significance import detectable_change

KINDS = {"frequency": 99, "random_norm": 39}


def tables(
    changes: dict[str, np.ndarray], own: float = 0.9, matched: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(effects_summary, controls) of one condition at two coefficients, the second one chosen."""
    rows, controls = [], []
    for coefficient in (1.0, 2.0):
        cell = {"split": "test", "group": "known", "coefficient": coefficient}
        chosen = coefficient == 2.0
        main = {"condition": "main", "role": "group", "refused_change": own, "chosen": chosen}
        rows.append({**cell, **main})
        for kind, values in changes.items():
            for i, change in enumerate(values):
                name = f"{kind}_{i}"
                about = {"condition": name, "role": "control", "chosen": False}
                # At the coefficient that was not chosen every control has the same change.
                rows.append({**cell, **about, "refused_change": change if chosen else 0.0})
                controls.append({"of": "main", "coefficient": coefficient, "condition": name})
                controls[-1] |= {"control_kind": kind, "matched": matched}
    return pd.DataFrame(rows), pd.DataFrame(controls)


def test_exchangeable_controls_pass_as_often_as_the_level_says() -> None:
    """One kind: by rank, exactly the fraction of ranks that pass."""
    values = np.random.default_rng(0).standard_normal(99)
    m = effect_fraction(*tables({"frequency": values}), "refused", 0.05).metrics
    assert m["placebo/effect_fraction_n"] == 99
    assert 0.03 <= m["placebo/effect_fraction"] <= 0.05
    low, high = wilson(round(m["placebo/effect_fraction"] * 99), 99)
    assert m["placebo/effect_fraction_ci_low"] == pytest.approx(float(low))
    assert m["placebo/effect_fraction_ci_high"] == pytest.approx(float(high))


def test_a_control_must_differ_from_every_kind() -> None:
    """Frequency controls that all have large effects pass against themselves alone no more often
    than the level says; against random directions of no effect all would."""
    rng = np.random.default_rng(1)
    kinds = {"frequency": 1 + rng.random(99), "random_norm": rng.random(39) / 100}
    m = effect_fraction(*tables(kinds), "refused", 0.05).metrics
    assert m["placebo/effect_fraction_n"] == 138
    assert m["placebo/effect_fraction"] <= 0.05


def test_of_no_effect_none_passes() -> None:
    kinds = {"frequency": np.zeros(99), "random_norm": np.zeros(39)}
    assert effect_fraction(*tables(kinds), "refused", 0.05).metrics["placebo/effect_fraction"] == 0


@pytest.mark.parametrize(("n", "matched"), [(18, True), (99, False)])
def test_kinds_that_are_not_achieved_do_not_count(n: int, matched: bool) -> None:
    inputs = tables({"frequency": np.arange(n) / n}, matched=matched)
    assert effect_fraction(*inputs, "refused", 0.05).metrics == {}


def summary(rates: dict[str, tuple[float, int]], floor: float = 0.01) -> pd.DataFrame:
    rows = []
    for group, (rate, n) in rates.items():
        cell = {"split": "test", "group": group, "refused": rate, "refused_n": n}
        none = {"refused_p_controls": np.nan, "refused_p_controls_floor": np.nan}
        rows.append({**cell, "role": "baseline", **none})
        own = {"refused_p_controls": 0.2, "refused_p_controls_floor": floor}
        rows.append({**cell, "role": "group", **own, "refused": 0.9})
    return pd.DataFrame(rows)


def test_the_group_in_which_a_change_must_be_largest_counts() -> None:
    effects = pd.DataFrame({"refused": pd.array([True, False], dtype="boolean")})
    power = effect_power(effects, summary({"known": (0.05, 40), "unknown": (0.5, 40)}))
    expected = max(detectable_change(40, rate, 0.05) or 1 for rate in (0.05, 0.5))
    assert power.metrics["power/rate_change"] == pytest.approx(expected)
    assert power.metrics["power/rate_baseline"] == 0.5
    assert power.metrics["power/rate_n"] == 40
    assert power.metrics["power/p_controls_floor"] == 0.01
    assert power.notes == []


def test_no_change_of_a_few_entities_is_found() -> None:
    effects = pd.DataFrame({"refused": [True, False]})
    power = effect_power(effects, summary({"known": (0.0, 5)}))
    assert power.metrics["power/rate_change"] is None
    assert "power/rate_change" in power.notes[0]


def test_outcomes_that_are_not_rates_have_no_detectable_change() -> None:
    effects = pd.DataFrame({"refused": [0.5, 0.1]})
    power = effect_power(effects, summary({"known": (0.0, 50)}))
    assert power.metrics == {"power/p_controls_floor": 0.01}
