"""A logistic probe of two groups; its penalty is chosen by cross-validation over entities."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saexp.errors import DataError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverse L2 penalties that cross-validation chooses from by default."""
MAX_TRAIN = 20_000
"""Most rows a probe is fitted on by default."""
MAX_ITERATIONS = 2000
N_FOLDS = 5

Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Fitted:
    """A linear probe; a row is called the first group where its score is above 0."""

    score: Callable[[Any], np.ndarray]
    """`[n, d]`, sparse where the inputs were -> `[n]`."""
    weights: np.ndarray
    """`[d]`, per standard deviation of each input on train."""
    direction: np.ndarray
    """`[d]`, per unit of each input: the score's gradient."""
    c: float
    """Inverse strength of the L2 penalty that cross-validation chose."""
    cv_log_loss: float
    converged: bool


def folds(first: Bool[np.ndarray, " n"], units: Shaped[np.ndarray, " n"], seed: int) -> Folds:
    """Up to N_FOLDS (train, validation) index pairs; a unit is never on both sides.

    Raises DataError where not even two folds have both groups on both sides.
    """
    fewest = min(len(np.unique(units[first == g])) for g in (True, False))
    for n in range(min(N_FOLDS, fewest), 1, -1):
        splitter = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        pairs = list(splitter.split(np.zeros(len(first)), first, units))
        if all(len(np.unique(first[i])) == 2 for pair in pairs for i in pair):
            return pairs
    raise DataError(
        f"{fewest} units of the smaller group on the train split are too few to cross-validate a "
        "probe; add rows, or change dataset.split"
    )


def fit_logistic(
    x: Float[np.ndarray, "n d"] | sparse.csr_array,
    first: Bool[np.ndarray, " n"],
    strengths: Sequence[float],
    pairs: Folds,
    *,
    standardise: bool = True,
) -> Fitted:
    """Logistic regression with an L2 penalty, on standardised inputs or, with `standardise=False`,
    on inputs as they are (sparse ones stay sparse).

    Its strength is the one with the smallest log loss on the validation sides of `pairs`.
    """
    scaler = StandardScaler(with_mean=standardise, with_std=standardise)
    pipeline = make_pipeline(scaler, LogisticRegression(max_iter=MAX_ITERATIONS))
    search: Any = GridSearchCV(
        pipeline,
        {"logisticregression__C": sorted(strengths)},
        scoring="neg_log_loss",
        cv=pairs,
        error_score="raise",  # pyright: ignore[reportArgumentType]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        search.fit(x, first)
    slow = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    best: Any = search.best_estimator_
    weights = best[-1].coef_[0]
    return Fitted(
        score=best.decision_function,
        weights=weights,
        direction=weights if best[0].scale_ is None else weights / best[0].scale_,
        c=float(search.best_params_["logisticregression__C"]),
        cv_log_loss=-float(search.best_score_),
        converged=not slow,
    )


def limited(rows: Int[np.ndarray, " n"], most: int, seed: int) -> Int[np.ndarray, " m"]:
    """`rows`, or a seeded choice of `most` of them in their order where there are more."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng([seed, 23]).choice(rows, most, replace=False))
