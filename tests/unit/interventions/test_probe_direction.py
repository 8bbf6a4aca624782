"""The probe direction of interventions is the dense probe of `analyzer=probe`."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saexp.analysis import AnalysisInputs
from saexp.analysis.classifiers import rows_of
from saexp.analysis.probe import ProbeAnalyzer
from saexp.config import ProbeConfig
from saexp.errors import DataError
from saexp.interventions.directions import LatentStatistics, StreamRows
from saexp.latents import Latents
from saexp.models import Hookpoint
from saexp.stats.separation import STRENGTHS

N_UNITS, PER_UNIT, D = 60, 8, 40
GROUPS = ("known", "unknown")
AT = Hookpoint(1, "resid_post")


def table(n_units: int = N_UNITS) -> pd.DataFrame:
    """Rows of entities that come in fours: two of each group."""
    unit = np.repeat(np.arange(n_units), PER_UNIT)
    rows = pd.DataFrame({"unit": [f"entity {u}" for u in unit]})
    return rows.assign(group=np.where(unit % 2 == 0, *GROUPS), split="train", entity_type="thing")


def stream(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """A weak signal, and much that every row of an entity shares: rows can be learned by heart."""
    rng = np.random.default_rng(seed)
    codes, _ = pd.factorize(rows["unit"])
    own = rng.normal(size=(codes.max() + 1, D)) * 2
    acts = own[codes] + 0.1 * rng.normal(size=(len(rows), D))
    acts[:, 0] += np.where(rows["group"] == GROUPS[0], 1.0, -1.0)
    return (acts * np.geomspace(0.2, 5, D)).astype(np.float32)


def facts(rows: pd.DataFrame, acts: np.ndarray) -> LatentStatistics:
    read = StreamRows(acts, rows["group"].to_numpy(object), rows["unit"].to_numpy(object))
    return LatentStatistics(
        table=pd.DataFrame({"latent": []}),
        groups=GROUPS,
        median_norm=1.0,
        directions=lambda _: torch.zeros(0, D),
        hookpoint=AT,
        written=AT,
        stream=lambda: read,
    )


@cache
def searched(splitter: object) -> GridSearchCV:
    """scikit-learn's own search over `ROWS`, entities handed over as its groups."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    grid = {"logisticregression__C": list(STRENGTHS)}
    search = GridSearchCV(pipeline, grid, scoring="neg_log_loss", cv=splitter)  # type: ignore[arg-type]
    groups = None if splitter is ROW_FOLDS else ROWS["unit"]
    return search.fit(ACTS, ROWS["group"] == GROUPS[0], groups=groups)


ROW_FOLDS = KFold(5, shuffle=True, random_state=0)
ENTITY_FOLDS = StratifiedGroupKFold(5, shuffle=True, random_state=0)
ROWS = table()
ACTS = stream(ROWS)


@pytest.fixture(scope="module")
def of_rows() -> LatentStatistics:
    """Of `ROWS`; its probe is fitted once."""
    return facts(ROWS, ACTS)


def test_the_penalty_is_scikit_learns_choice_over_entities(of_rows: LatentStatistics) -> None:
    fit, wanted = of_rows.probe, searched(ENTITY_FOLDS)
    assert fit.c == wanted.best_params_["logisticregression__C"]
    over_rows = searched(ROW_FOLDS)
    assert fit.c < over_rows.best_params_["logisticregression__C"]


def test_the_direction_is_the_gradient_of_scikit_learns_score(of_rows: LatentStatistics) -> None:
    direction = of_rows.probe_direction.numpy()
    wanted = searched(ENTITY_FOLDS)
    origin = np.zeros((1, D), dtype=np.float32)
    steps = wanted.decision_function(np.eye(D, dtype=np.float32)) - wanted.decision_function(origin)
    np.testing.assert_allclose(direction, steps / np.linalg.norm(steps), atol=1e-5)


def test_it_is_the_dense_probe_of_the_analyzer(of_rows: LatentStatistics) -> None:
    test = table(20).assign(split="test")
    test["unit"] = "test " + test["unit"]
    both = pd.concat([ROWS, test], ignore_index=True).assign(text="", entity=None)
    latents = np.abs(np.random.default_rng(1).normal(size=(len(both), 3))).astype(np.float32)
    inputs = AnalysisInputs(
        latents=Latents(sparse.csr_array(latents), both),
        groups=GROUPS,
        layer=1,
        acts=torch.from_numpy(np.concatenate([ACTS, stream(test, 1)])),
    )
    analyzer = ProbeAnalyzer(ProbeConfig(name="probe", k=[1]))
    probes, _, _ = analyzer.fitting.fit(inputs, rows_of(inputs, "train"))
    dense = next(p.fitted for p in probes if p.name == "dense")
    own = of_rows.probe
    assert dense is not None and dense.c == own.c
    np.testing.assert_array_equal(dense.direction, own.direction)


def test_rows_of_neither_group_do_not_count(of_rows: LatentStatistics) -> None:
    other = table(30).assign(group=["third", None] * (30 * PER_UNIT // 2))
    other["unit"] = "other " + other["unit"]
    rows = pd.concat([ROWS, other], ignore_index=True)
    more = facts(rows, np.concatenate([ACTS, stream(other, 2)])).probe
    np.testing.assert_array_equal(more.direction, of_rows.probe.direction)


def test_too_few_entities_are_an_error_though_there_are_many_rows() -> None:
    rows = table(3)
    with pytest.raises(DataError, match="the smaller group has 1 on the train split"):
        _ = facts(rows, stream(rows)).probe
