"""What a causal test of this size could have found."""

import numpy as np
import pandas as pd

from saexp.results import TaskResult
from saexp.stats.multiplicity import ALPHA
from saexp.stats.power import detectable_change


def effect_power(effects: pd.DataFrame, summary: pd.DataFrame) -> TaskResult:
    """Metrics `power/rate_change` and `power/p_controls_floor`, from the tables of that name.

    `power/rate_change` is the smallest change of the first rate that the paired test over entities
    finds in 80 % of runs: from the unsteered rate on test prompts (`power/rate_baseline`), with as
    many entities (`power/rate_n`), of the group of prompts for which it is largest. Null, with a
    note, where no change would be found. `power/p_controls_floor` is the smallest value that the
    rank p-values against controls can take. Nothing without rates or without controls.
    """
    result = TaskResult()
    rates = [c for c in effects if str(effects[c].dtype) in ("bool", "boolean")]
    tested = summary[summary["split"] == "test"]
    ending = "_p_controls"
    outcomes = [c.removesuffix(ending) for c in map(str, tested) if c.endswith(ending)]
    rate = next((o for o in outcomes if o in rates), None)
    if rate is not None:
        _rate(tested[tested["role"] == "baseline"], rate, result)
    floors = tested[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    if np.isfinite(floors).any():
        result.metrics["power/p_controls_floor"] = float(np.nanmax(floors))
    return result


def _rate(baselines: pd.DataFrame, rate: str, result: TaskResult) -> None:
    worst: tuple[float, float, int] | None = None
    for row in baselines[baselines[rate].notna()].to_dict("records"):
        start, n = float(row[rate]), int(row[f"{rate}_n"])
        change = detectable_change(n, start, ALPHA)
        size = float("inf") if change is None else abs(change)
        if worst is None or size > worst[0]:
            worst = size, start, n
    if worst is None:
        return
    size, start, n = worst
    result.metrics |= {
        "power/rate_change": None if np.isinf(size) else size,
        "power/rate_baseline": start,
        "power/rate_n": n,
    }
    if np.isinf(size):
        result.notes.append(
            f"no change of {rate.replace('_', ' ')} from {start:.2f} is found in 80% of runs with "
            f"{n} entities (power/rate_change)"
        )
