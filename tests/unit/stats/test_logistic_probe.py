"""The logistic probe against scikit-learn's own grid search."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saexp.stats.separation import MAX_ITERATIONS, fit_logistic, folds

STRENGTHS = (0.01, 0.1, 1.0)


@pytest.mark.parametrize(("seed", "as_sparse"), [(0, False), (1, True)])
def test_the_probe_is_that_of_a_grid_search(seed, as_sparse):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 8)) * (rng.random((60, 8)) < 0.5)
    first = x[:, 0] + rng.normal(size=60) > 0
    pairs = folds(first, np.arange(60) // 2, seed)
    inputs = sparse.csr_array(x) if as_sparse else x
    fitted = fit_logistic(inputs, first, STRENGTHS, pairs, standardise=not as_sparse)
    scaler = StandardScaler(with_mean=not as_sparse, with_std=not as_sparse)
    search = GridSearchCV(
        make_pipeline(scaler, LogisticRegression(max_iter=MAX_ITERATIONS)),
        {"logisticregression__C": STRENGTHS},
        scoring=["neg_log_loss", "roc_auc"],
        refit="neg_log_loss",
        cv=pairs,
    ).fit(inputs, first)
    assert fitted.c == search.best_params_["logisticregression__C"]
    np.testing.assert_array_equal(fitted.weights, search.best_estimator_[-1].coef_[0])
    np.testing.assert_allclose(fitted.cv_log_loss, -search.best_score_, rtol=1e-12)
    auroc = search.cv_results_["mean_test_roc_auc"][search.best_index_]
    np.testing.assert_allclose(fitted.cv_auroc, auroc, rtol=1e-12)
    np.testing.assert_array_equal(fitted.score(inputs), search.decision_function(inputs))
