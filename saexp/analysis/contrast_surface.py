"""The surface baseline beside a contrast, on its observations, strata and definition of AUROC."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.observations import Observations
from saexp.analysis.paired_auroc import Auroc, auroc_difference, auroc_of
from saexp.analysis.strata import Split
from saexp.analysis.surface import observation_scores, read_texts, token_counts
from saexp.errors import DataError
from saexp.results import TaskResult

_KEY = "contrast/surface_auroc_test"


def beside_surface(
    inputs: AnalysisInputs,
    observed: Observations,
    train: Split,
    test: Split,
    best: Mapping[str, float | int | None],
    seed: int,
) -> TaskResult:
    """Metrics `contrast/surface_auroc_test` and `contrast/best_minus_surface_<g>_test`.

    `best` is the first selected latent of each group; its AUROC is taken in the group's direction.
    Each metric has `_ci_low` and `_ci_high`. Nothing without texts; null, with a note, where the
    train split is too small for cross-validation.
    """
    if not inputs.texts:
        return TaskResult()
    names = [_KEY, *(f"contrast/best_minus_surface_{group}_test" for group in best)]
    result = TaskResult(metrics=dict.fromkeys(_with_limits(names)))
    units = pd.concat([train.units, test.units], ignore_index=True)
    number = pd.Series(range(len(units)), index=units["observation"])
    rows = observed.rows[observed.rows["observation"].isin(number.index)]
    try:
        scores = observation_scores(
            read_texts(rows, inputs.texts),
            number[rows["observation"]].to_numpy(dtype=np.int64),
            units["unit"].to_numpy(dtype=object),
            np.append(train.first, test.first),
            np.arange(len(units)) < len(train.first),
            token_counts(inputs.neutral_texts),
            seed,
        )
    except DataError as error:
        result.notes.append(f"no surface baseline ({_KEY}): {error}")
        return result
    result.metrics |= _numbers(_KEY, auroc_of(scores, test.first, test.strata))
    for group, latent in best.items():
        if latent is None:
            continue
        is_first = group == inputs.groups[0]
        values = test.csr[:, [int(latent)]].toarray()[:, 0].astype(np.float64)
        member, other = (test.first, scores) if is_first else (~test.first, -scores)
        made = auroc_difference(values, other, member, test.strata)
        result.metrics |= _numbers(f"contrast/best_minus_surface_{group}_test", made)
    return result


def _with_limits(names: list[str]) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")]


def _numbers(name: str, auroc: Auroc) -> dict[str, float | int | None]:
    values = (auroc.value, float(auroc.interval.low), float(auroc.interval.high))
    found = zip(_with_limits([name]), values, strict=True)
    return {key: None if np.isnan(value) else value for key, value in found}
