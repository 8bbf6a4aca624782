"""How often a control would have passed for the latent."""

import numpy as np
import pandas as pd

from saexp.results import TaskResult
from saexp.stats.exchangeable import MIN_CONTROLS, rank_p_value
from saexp.stats.placebo import claim_share


def effect_share(
    summary: pd.DataFrame, controls: pd.DataFrame, outcome: str, alpha: float
) -> TaskResult:
    """Metric `placebo/effect_share`: controls for which an effect on `outcome` would be reported.

    Each matched control of an achieved kind takes the place of the latent: its p-value is, as the
    latent's, the largest over achieved kinds of its rank among the kind's controls, itself left
    out. At each condition's chosen coefficient, on test prompts. `summary` and `controls` are the
    tables `effects_summary` and `controls`. Nothing where no kind is achieved.
    """
    tested = summary[(summary["split"] == "test") & summary[f"{outcome}_change"].notna()]
    matched = controls[controls["matched"].astype(bool)]
    p_values: list[float] = []
    for _, prompts in tested.groupby("group", sort=False, dropna=False):
        change = prompts.set_index(["condition", "coefficient"])[f"{outcome}_change"]
        chosen = prompts[prompts["chosen"].astype(bool) & (prompts["role"] != "control")]
        for condition, coefficient in zip(chosen["condition"], chosen["coefficient"], strict=True):
            own = matched[(matched["of"] == condition) & (matched["coefficient"] == coefficient)]
            kinds = [
                change.reindex([(c, coefficient) for c in names]).dropna()
                for _, names in own.groupby("control_kind", sort=False)["condition"]
            ]
            p_values += _p_values([k for k in kinds if len(k) >= MIN_CONTROLS])
    if not p_values:
        return TaskResult()
    n_claims = int((np.array(p_values) <= alpha).sum())
    return TaskResult(metrics=claim_share("placebo/effect_share", n_claims, len(p_values)))


def _p_values(achieved: list[pd.Series]) -> list[float]:
    """Of every control: the largest over kinds."""
    return [
        max(
            rank_p_value(float(own), kind.drop(name, errors="ignore").to_numpy(dtype=float))
            for kind in achieved
        )
        for values in achieved
        for name, own in values.items()
    ]
