"""What edited weights cost on neutral text, against the model's own."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saexp.interventions.computing import batch_tokens_for, weight_divergences
from saexp.interventions.measure import Job, Measurement, cost_row
from saexp.models.weights import Original


def weight_costs(
    measurement: Measurement,
    jobs: Sequence[Job],
    neutral: Sequence[str],
    original: Original | None,
) -> list[dict[str, Any]]:
    """KL(original || edited weights) on neutral text, per condition and strength, as other costs.

    The jobs share the weights that the model has now; `original` gives it back its own for a while,
    and is None where they are its own: there the cost is 0.
    """
    cells = {
        (j.condition.name, j.coefficient): j.condition
        for j in jobs
        if j.condition.weights is not None
    }
    if not cells:
        return []
    model = measurement.model
    prompts = [text.ids for text in measurement.neutral_tokens(neutral)]
    values = np.zeros(len(prompts))
    if original is not None:
        made = weight_divergences(
            model,
            prompts,
            original,
            batch_tokens=batch_tokens_for(model, measurement.cfg.batch_tokens),
            cache=measurement.cache,
        )
        values = np.asarray(made)
    return [
        cost_row(condition, coefficient, values) for (_, coefficient), condition in cells.items()
    ]
