"""Control latents: inside the caliper, never twice in a position, different ones per condition."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from saexp.interventions.directions import ControlSet, any_active, frequency_matched


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frequency = np.exp(rng.uniform(np.log(0.005), np.log(0.9), n))
    return pd.DataFrame({"latent": np.arange(n) * 3, "frequency": frequency})


def matched(
    facts: pd.DataFrame, latents: tuple[int, ...], n: int, **settings: object
) -> list[ControlSet]:
    options = {"n_least": n, "caliper": 2.0, "seed": 0, **settings}
    return frequency_matched(facts, latents, n, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("latents", [(0,), (0, 3, 6)])
@pytest.mark.parametrize("caliper", [1.3, 2.0, 5.0])
def test_distances_and_calipers_are_those_of_a_plain_loop(
    latents: tuple[int, ...], caliper: float
) -> None:
    facts = table()
    frequency = dict(zip(facts["latent"], facts["frequency"], strict=True))
    control_sets = matched(facts, latents, 15, caliper=caliper)
    assert len(control_sets) == 15
    for controls in control_sets:
        product, inside = 1.0, True
        for own, other in zip(latents, controls.latents, strict=True):
            ratio = frequency[other] / frequency[own]
            product *= ratio
            inside &= 1 / caliper <= ratio <= caliper
        assert controls.frequency_ratio == pytest.approx(product ** (1 / len(latents)), rel=1e-9)
        assert controls.matched == inside
    # All that are matched come first.
    assert sorted((c.matched for c in control_sets), reverse=True) == [
        c.matched for c in control_sets
    ]


def test_the_nearest_latents_are_taken_first() -> None:
    facts = table()
    control_sets = matched(facts, (0,), 20)
    own = facts["frequency"][0]
    others = facts[facts["latent"] != 0]
    nearest = others["latent"].to_numpy()[np.argsort(np.abs(np.log(others["frequency"] / own)))]
    assert [c.latents[0] for c in control_sets] == nearest[:20].tolist()


def test_outside_the_caliper_only_as_many_are_taken_as_are_needed() -> None:
    facts = table(200)
    own = facts["frequency"][0]
    inside = int((np.abs(np.log(facts["frequency"] / own)) <= np.log(2)).sum()) - 1
    assert 19 < inside < 99
    assert len(matched(facts, (0,), 99, n_least=10)) == inside
    few = matched(facts, (0,), 99, n_least=inside + 5)
    assert [c.matched for c in few] == [True] * inside + [False] * 5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_latent_is_twice_in_a_set_or_in_one_position(k: int) -> None:
    facts = table(120)
    facts.loc[50, "frequency"] = 0.0
    own = tuple(facts["latent"][:k])
    for control_sets in (
        matched(facts, own, 99, avoid={30, 33}),
        any_active(facts, own, 99, seed=0, avoid={30, 33}),
    ):
        assert len(control_sets) > 90
        for position in range(k):
            at = [c.latents[position] for c in control_sets]
            assert len(set(at)) == len(at)
        for controls in control_sets:
            assert len(set(controls.latents)) == k
            assert not set(controls.latents) & {*own, 30, 33, 150}


def test_there_are_no_more_sets_than_candidates() -> None:
    facts = table(12)
    assert len(matched(facts, (0, 3), 99)) <= 10
    assert len(any_active(facts, (0,), 99, seed=0)) == 11
    assert matched(facts, (0,), 0) == []


def test_sets_are_a_matter_of_the_seed() -> None:
    facts = table(120)
    for choose in (
        lambda seed: matched(facts, (0, 3), 20, seed=seed, caliper=8.0),
        lambda seed: any_active(facts, (0, 3), 20, seed=seed),
    ):
        assert choose(1) == choose(1)
        assert choose(1) != choose(2)


def test_conditions_share_no_controls_while_the_caliper_has_others() -> None:
    facts = pd.DataFrame({"latent": np.arange(100), "frequency": np.linspace(0.1, 0.11, 100)})
    uses: Counter[int] = Counter()
    seen = [matched(facts, (own,), 20, uses=uses, avoid={0, 1, 2, 3}) for own in range(4)]
    used = [c.latents[0] for control_sets in seen for c in control_sets]
    assert len(set(used)) == 80
    fifth = matched(facts, (4,), 20, uses=uses, avoid={0, 1, 2, 3})
    assert len({c.latents[0] for c in fifth} - set(used)) >= 15


def test_controls_of_an_inactive_latent_are_the_rarest_and_never_matched() -> None:
    facts = table()
    facts.loc[0, "frequency"] = 0.0
    control_sets = matched(facts, (0,), 5)
    rarest = facts[facts["frequency"] > 0].sort_values("frequency")["latent"][:5]
    assert [c.latents[0] for c in control_sets] == rarest.tolist()
    assert not any(c.matched for c in control_sets)
    assert all(math.isnan(c.frequency_ratio) for c in control_sets)
