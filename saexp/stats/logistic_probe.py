"""Logistic regression of two groups, with the penalty chosen by cross-validation over units."""

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
"""Default inverse L2 penalties among which cross-validation chooses."""
MAX_TRAIN = 20_000
"""Default limit on the number of rows that a probe is fitted on."""
MAX_ITERATIONS = 2000
N_FOLDS = 5

Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Fitted:
    """A linear probe; rows with a score above 0 are classified as the first group."""

    score: Callable[[Any], np.ndarray]
    """`[n, d]` (sparse if the training inputs were sparse) -> `[n]`."""
    weights: np.ndarray
    """`[d]`, per standard deviation of each input on the train rows."""
    direction: np.ndarray
    """`[d]`, per unit of each input: the gradient of the score."""
    c: float
    """Inverse L2 penalty chosen by cross-validation."""
    cv_log_loss: float
    cv_auroc: float
    """Mean AUROC over the validation sides of the folds, with the penalty `c`."""
    converged: bool


def folds(first: Bool[np.ndarray, " n"], units: Shaped[np.ndarray, " n"], seed: int) -> Folds:
    """Up to N_FOLDS pairs of (train, validation) indices; all rows of a unit are on one side.

    Raises DataError where even two folds would not have both groups on both sides.
    """
    fewest = min(len(np.unique(units[first == g])) for g in (True, False))
    for n in range(min(N_FOLDS, fewest), 1, -1):
        splitter = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        pairs = list(splitter.split(np.zeros(len(first)), first, units))
        if all(len(np.unique(first[i])) == 2 for pair in pairs for i in pair):
            return pairs
    raise DataError(
        "too few units to cross-validate a probe: the smaller group has "
        f"{fewest} on the train split; add rows, or change dataset.split"
    )


def fit_logistic(
    x: Float[np.ndarray, "n d"] | sparse.csr_array,
    first: Bool[np.ndarray, " n"],
    strengths: Sequence[float],
    pairs: Folds,
    *,
    standardise: bool = True,
) -> Fitted:
    """Logistic regression with an L2 penalty.

    Inputs are standardised unless `standardise` is false, in which case sparse inputs stay sparse.
    The penalty is the one with the smallest log loss on the validation sides of `pairs`.
    """
    scaler = StandardScaler(with_mean=standardise, with_std=standardise)
    pipeline = make_pipeline(scaler, LogisticRegression(max_iter=MAX_ITERATIONS))
    search: Any = GridSearchCV(
        pipeline,
        {"logisticregression__C": sorted(strengths)},
        scoring=["neg_log_loss", "roc_auc"],
        refit="neg_log_loss",  # pyright: ignore[reportArgumentType]
        cv=pairs,
        error_score="raise",  # pyright: ignore[reportArgumentType]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        search.fit(x, first)
    warned = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    best: Any = search.best_estimator_
    weights = best[-1].coef_[0]
    return Fitted(
        score=best.decision_function,
        weights=weights,
        direction=weights if best[0].scale_ is None else weights / best[0].scale_,
        c=float(search.best_params_["logisticregression__C"]),
        cv_log_loss=-float(search.best_score_),
        cv_auroc=float(search.cv_results_["mean_test_roc_auc"][search.best_index_]),
        converged=not warned,
    )


def limited(rows: Int[np.ndarray, " n"], most: int, seed: int) -> Int[np.ndarray, " m"]:
    """`rows`, or a random sample of `most` of them, in order, where there are more."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng([seed, 23]).choice(rows, most, replace=False))
