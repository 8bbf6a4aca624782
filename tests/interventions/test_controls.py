"""Controls are as often active and as long as what they stand for, and tell nothing."""

import numpy as np
import pandas as pd

from saexp.interventions.controls import matched_controls


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "latent": np.arange(n) * 3,
            "frequency": rng.uniform(0.01, 0.9, n),
            "norm": rng.uniform(0.5, 2.0, n),
            "q_value": np.where(np.arange(n) % 5 == 0, 0.01, 0.7),
        }
    )


def test_the_nearest_open_latent_is_taken_first() -> None:
    facts = table()
    found = matched_controls(facts, (0,), 5, alpha=0.05)
    own = facts.set_index("latent").loc[0]
    free = facts[(facts["q_value"] > 0.05) & (facts["latent"] != 0)]
    distance = np.abs(np.log(free["frequency"] / own["frequency"])) + np.abs(
        np.log(free["norm"] / own["norm"])
    )
    nearest = free["latent"].to_numpy()[np.argsort(distance.to_numpy())[:5]]
    assert [s[0] for s in found.sets] == nearest.tolist()


def test_sets_are_disjoint_and_never_significant_or_silent() -> None:
    facts = table()
    facts.loc[7, "frequency"] = 0.0
    found = matched_controls(facts, (0, 3, 6), 10, alpha=0.05)
    used = [f for s in found.sets for f in s]
    assert len(found.sets) == 10
    assert len(used) == len(set(used)) == 30
    chosen = facts[facts["latent"].isin(used)]
    assert (chosen["q_value"] > 0.05).all()
    assert (chosen["frequency"] > 0).all()
    assert not {0, 3, 6} & set(used)


def test_too_few_latents_make_fewer_sets_and_a_note() -> None:
    found = matched_controls(table(12), (0, 3), 10, alpha=0.05)
    assert len(found.sets) == 4
    assert "only 4 of 10 control sets for latents 0+3" in found.notes[0]


def test_a_latent_whose_q_is_unknown_may_be_a_control() -> None:
    facts = table(10)
    facts["q_value"] = np.nan
    assert len(matched_controls(facts, (0,), 5, alpha=0.05).sets) == 5
