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
from sklearn.model_selection import StratifiedGroupKFold
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        losses = _validation_losses(x, first, sorted(strengths), pairs, standardise)
        c, loss = min(losses, key=lambda pair: pair[1])
        best: Any = make_pipeline(_scaler(standardise), _regression(c)).fit(x, first)
    warned = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    weights = best[-1].coef_[0]
    return Fitted(
        score=best.decision_function,
        weights=weights,
        direction=weights if best[0].scale_ is None else weights / best[0].scale_,
        c=float(c),
        cv_log_loss=loss,
        converged=not warned,
    )


def _validation_losses(
    x: Float[np.ndarray, "n d"] | sparse.csr_array,
    first: Bool[np.ndarray, " n"],
    strengths: Sequence[float],
    pairs: Folds,
    standardise: bool,
) -> list[tuple[float, float]]:
    """(inverse penalty, mean log loss on the validation sides).

    As of GridSearchCV, which takes twice as long for few rows: it fits the scaler for every
    penalty, and clones and checks all that it calls.
    """
    losses = np.empty((len(strengths), len(pairs)))
    for fold, (train, validation) in enumerate(pairs):
        scaler = _scaler(standardise)
        of_train, of_validation = scaler.fit_transform(x[train]), scaler.transform(x[validation])
        for i, c in enumerate(strengths):
            fitted = _regression(c).fit(of_train, first[train])
            probability = fitted.predict_proba(of_validation)[:, 1]
            losses[i, fold] = _log_loss(probability, first[validation])
    return list(zip(strengths, losses.mean(1).tolist(), strict=True))


def _log_loss(probability: Float[np.ndarray, " n"], first: Bool[np.ndarray, " n"]) -> float:
    """Mean of -log of the probability of the right group, at least a rounding error from 0."""
    rounding = np.finfo(probability.dtype).eps
    right = np.where(first, probability, 1 - probability)
    return float(-np.log(np.clip(right, rounding, 1 - rounding)).mean())


def _scaler(standardise: bool) -> Any:
    return StandardScaler(with_mean=standardise, with_std=standardise)


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=MAX_ITERATIONS)


def limited(rows: Int[np.ndarray, " n"], most: int, seed: int) -> Int[np.ndarray, " m"]:
    """`rows`, or a random sample of `most` of them, in order, where there are more."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng([seed, 23]).choice(rows, most, replace=False))
