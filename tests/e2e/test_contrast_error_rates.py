"""How often the contrast finds latents that have nothing to do with the groups.

Every design is one in which a test that ignores it finds many: the same data under that test is
asserted to fail, so that a simulation without the trap cannot pass.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from saexp.stats.separation import Ranked
from tests.unit.analysis.simulate import D_SAE, GROUPS, contrast

N_RUNS = 20
LEVEL = 0.05

Design = tuple[np.ndarray, pd.DataFrame]


def table(unit: np.ndarray, known: np.ndarray, kind: np.ndarray | str = "city") -> pd.DataFrame:
    """Rows of `rows.parquet`; half of the entities are of either split."""
    split = np.where(unit % 2 == 0, "train", "test")
    columns = {"unit": unit.astype(str), "group": np.where(known, *GROUPS), "split": split}
    return pd.DataFrame(columns).assign(entity_type=kind, n_entity_tokens=2)


def latents_of(
    rng: np.random.Generator, unit: np.ndarray, rates: np.ndarray, own: float
) -> np.ndarray:
    """`[n_rows, D_SAE]`: active at `rates`, as the entity's other rows with chance 1 - `own`."""
    of_entity = rng.random((unit.max() + 1, D_SAE))[unit]
    of_row = rng.random((len(unit), D_SAE))
    drawn = np.where(rng.random((len(unit), 1)) < own, of_row, of_entity)
    return np.where(drawn < rates, rng.gamma(3, 1, drawn.shape), 0).astype(np.float32)


def four_rows_against_one(rng: np.random.Generator) -> Design:
    """Entities of a random group, with four rows in one of them."""
    known = rng.random(120) < 0.5
    unit = np.repeat(np.arange(120), np.where(known, 4, 1))
    rates = rng.uniform(0.05, 0.6, D_SAE)
    return latents_of(rng, unit, rates, own=1.0), table(unit, known[unit])


def several_questions(rng: np.random.Generator) -> Design:
    """Five questions on every entity, of which four in five are known, whatever the entity."""
    unit = np.repeat(np.arange(100), 5)
    rates = rng.uniform(0.05, 0.6, D_SAE)
    return latents_of(rng, unit, rates, own=0.7), table(unit, rng.random(500) < 0.8)


def questions_on_known_and_unknown_entities(rng: np.random.Generator) -> Design:
    """Some entities are known far better than others, and most latents are of the entity."""
    unit = np.repeat(np.arange(160), 5)
    chance = rng.choice([0.02, 0.5, 0.98], 160)[unit]
    rates = rng.uniform(0.05, 0.6, D_SAE)
    return latents_of(rng, unit, rates, own=0.1), table(unit, rng.random(800) < chance)


def types_in_other_proportions(rng: np.random.Generator) -> Design:
    """Types 80/20 in one group and 20/80 in the other; latents depend on the type alone."""
    unit = np.arange(240)
    known = rng.random(240) < 0.5
    city = rng.random(240) < np.where(known, 0.8, 0.2)
    of_type = rng.uniform(0.05, 0.9, (2, D_SAE))
    dense = latents_of(rng, unit, of_type[city.astype(int)], own=1.0)
    return dense, table(unit, known, np.where(city, "city", "movie"))


def per_row(dense: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """p-values of a test for which every row of the train split is an observation."""
    train = (rows["split"] == "train").to_numpy()
    first = (rows["group"] == "known").to_numpy()[train]
    return Ranked(sparse.csr_array(dense[train]), first).mann_whitney().p_value


def per_entity(dense: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Those of one for which an entity is active in a group where any of its rows is."""
    train = (rows["split"] == "train").to_numpy()
    labels = [rows.loc[train, column].to_numpy() for column in ("unit", "group")]
    means = pd.DataFrame(dense[train]).groupby(labels).mean()
    known = means.index.get_level_values(1) == "known"
    active = sparse.csr_array((means.to_numpy() > 1e-6).astype(float))
    return Ranked(active, np.asarray(known)).mann_whitney().p_value


@pytest.mark.parametrize(
    ("design", "naive"),
    [
        (four_rows_against_one, per_entity),
        (several_questions, per_entity),
        (questions_on_known_and_unknown_entities, per_row),
        (types_in_other_proportions, per_row),
    ],
)
def test_at_most_5_percent_of_null_runs_find_anything(
    design: Callable[[np.random.Generator], Design],
    naive: Callable[[np.ndarray, pd.DataFrame], np.ndarray],
) -> None:
    finds, rejected, naively = [], [], []
    for seed in range(N_RUNS):
        dense, rows = design(np.random.default_rng([seed, 61]))
        result = contrast(dense, rows)
        latents = result.tables["latents"]
        finds.append(int((latents["q_value"] <= LEVEL).any()))
        rejected.append((latents["p_value"] <= LEVEL).mean())
        naively.append((naive(dense, rows) <= LEVEL).mean())
    assert np.mean(finds) <= LEVEL
    # Of single tests, over latents that share the labels of a run.
    assert np.mean(rejected) <= LEVEL + 2 * stats.sem(rejected)
    assert np.mean(naively) > 0.1


@pytest.mark.parametrize("design", [four_rows_against_one, types_in_other_proportions])
def test_a_latent_of_the_group_is_found_in_the_same_data(
    design: Callable[[np.random.Generator], Design],
) -> None:
    """On 85 % of known entities' rows and 15 % of the others'."""
    significant = []
    for seed in range(6):
        rng = np.random.default_rng([seed, 67])
        dense, rows = design(rng)
        rate = np.where(rows["group"] == "known", 0.85, 0.15)
        dense[:, 0] = rng.random(len(rows)) < rate
        latents = contrast(dense, rows).tables["latents"].set_index("latent")
        significant.append(latents.loc[0, "q_value"] <= LEVEL)
    assert np.mean(significant) >= 0.9
