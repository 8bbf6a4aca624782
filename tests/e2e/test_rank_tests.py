"""Error rate and power of the test against controls, through the coefficient's choice, seeded."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from saexp.interventions.effects import chosen_coefficients, summarise

COEFFICIENTS = (0.3, 0.6, 0.9)
N_CURVE = 10
N_CONDITIONS = 10
"""Of a run, on the same prompts; each has controls of its own."""
N_RUNS = {19: 12, 99: 6}


def rows(rng: np.random.Generator, effect: np.ndarray, split: str, at: np.ndarray) -> pd.DataFrame:
    """Logits and answers of 30 prompts, which vary more than latents; `effect` is
    [condition, latent, c].

    `at` are the (condition, latent, coefficient index) that are run. Latent 0 is the condition's.
    """
    n = 30
    prompt = rng.normal(0, 3, n)
    changes = effect[tuple(at.T)][:, None] * (1 + rng.normal(0, 1, (len(at), n)))
    changes = np.concatenate([np.zeros((1, n)), changes])
    logit = prompt + changes + rng.normal(0, 1, changes.shape)
    conditions = [("baseline", "baseline", "", "", 0.0)]
    for number, latent, c in at:
        own = f"own_{number}"
        name = f"{own}_control_{latent:02d}" if latent else own
        role, kind = ("control", "frequency") if latent else ("group", "")
        conditions.append((name, role, own if latent else "", kind, COEFFICIENTS[c]))
    columns = ["condition", "role", "of", "control_kind", "coefficient"]
    table = pd.DataFrame(conditions, columns=columns).assign(
        split=split, group="a", direction="a", latent=""
    )
    table = table.loc[table.index.repeat(n)].reset_index(drop=True)
    unit = np.tile(np.arange(n), len(conditions))
    return table.assign(unit=unit, logit=logit.ravel(), answered=(logit.ravel() > 0).astype(float))


def p_values(seed: int, k: int, own: float = 0.0) -> np.ndarray:
    """[condition, outcome] of one run: its coefficients chosen on train prompts, its p-values on
    test prompts.

    Latents' effects are heavy-tailed, and at each coefficient half of them is another one.
    """
    rng = np.random.default_rng([seed, k])
    dose = np.array(COEFFICIENTS)
    same = rng.standard_t(4, size=(N_CONDITIONS, k + 1, 1))
    effect = dose * (same + rng.standard_t(4, size=(N_CONDITIONS, k + 1, 3))) / np.sqrt(2)
    effect[:, 0] += own * dose
    curve = np.array(list(product(range(N_CONDITIONS), range(N_CURVE + 1), range(3))))
    kinds = {"logit": "mean", "answered": "rate"}
    train = summarise(rows(rng, effect, "train", curve), kinds)
    chosen = chosen_coefficients(train, "logit", "train")
    at = np.array(
        [
            (number, latent, COEFFICIENTS.index(chosen[f"own_{number}"]))
            for number, latent in product(range(N_CONDITIONS), range(k + 1))
        ]
    )
    test = rows(rng, effect, "test", at)
    controls = test[test["role"] == "control"].drop_duplicates("condition").assign(matched=True)
    summary = summarise(test, kinds, controls=controls)
    return summary.loc[summary["role"] == "group", [f"{o}_p_controls" for o in kinds]].to_numpy()


@pytest.mark.parametrize("k", [19, 99])
def test_latents_exchangeable_with_their_controls_rarely_pass(k: int) -> None:
    p = np.concatenate([p_values(seed, k) for seed in range(N_RUNS[k])])
    assert len(p) == N_RUNS[k] * N_CONDITIONS
    error = np.sqrt(0.05 * 0.95 / len(p))
    for share in (p <= 0.05).mean(0):
        assert share <= 0.05 + 2 * error
    # Not because nothing could pass: p-values are spread out evenly.
    assert abs(p[:, 0].mean() - 0.5) < 0.1


@pytest.mark.parametrize("k", [19, 99])
def test_a_real_effect_passes(k: int) -> None:
    p = np.concatenate([p_values(seed, k, own=30.0) for seed in range(2)])
    assert ((p[:, 0] <= 1 / (k + 1)).mean()) > 0.9
