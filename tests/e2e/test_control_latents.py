"""Selected latents that are like all others seldom stand out among frequency-matched controls."""

import numpy as np
import pytest

from saexp.stats.significance import rank_p_value
from tests.unit.interventions.test_controls import matched, table


@pytest.mark.parametrize(("n", "n_latents", "k"), [(19, 400, 3), (99, 700, 1)])
def test_a_latent_drawn_among_its_candidates_is_seldom_extreme(
    n: int, n_latents: int, k: int
) -> None:
    """Effects that depend on frequency, on the latent, and on prompts that all conditions share;
    the first latent of a set dominates it. Of 200 runs with p at most 0.05 expected in at most 10;
    more than 19 would be a chance of 0.2 %."""
    hits = floors = 0
    for seed in range(200):
        rng = np.random.default_rng([seed, n, k])
        facts = table(n_latents, seed)
        effect = dict(
            zip(
                facts["latent"],
                0.2 * np.log(facts["frequency"]) + rng.standard_t(3, n_latents),
                strict=True,
            )
        )
        middle = facts.loc[facts["frequency"].between(0.02, 0.2), "latent"].to_numpy()
        own = tuple(rng.choice(middle, k, replace=False).tolist())
        controls = matched(facts, own, n, n_least=0, seed=seed)
        assert len(controls) == n and all(c.matched for c in controls)
        weights = 4.0 ** -np.arange(k)
        sums = [
            sum(w * effect[f] for w, f in zip(weights, s, strict=True))
            for s in (own, *(c.latents for c in controls))
        ]
        # Finitely many prompts: what is measured of each, with noise.
        measured = rng.binomial(50, 1 / (1 + np.exp(-np.array(sums)))) / 50
        p = rank_p_value(float(measured[0]), measured[1:])
        hits += p <= 0.05
        floors += p <= 1.5 / (n + 1)
    assert hits <= 19
    assert floors <= (19 if n == 19 else 7)
