"""Whether two groups' names are equally long in tokens, and resampling where they are not.

A difference in length alone can give any latent that counts tokens an AUROC of 1.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.statistics import Ranked

LEVEL = 0.05
"""p-value below which token counts count as different."""

_EXACT = 8
"""Where the smaller group has no more, and no tie, the normal approximation is not good enough."""


@dataclass(frozen=True)
class Matching:
    """Units kept, and what was found."""

    keep: np.ndarray
    """Boolean per unit."""
    p_value: float | None
    """Mann-Whitney on token counts, the smallest over entity types times their number; None where
    counts are not known."""
    notes: list[str]


def match_token_counts(
    units: pd.DataFrame, groups: tuple[str, str], seed: int, *, resample: bool
) -> Matching:
    """Compare token counts within entity types; keep equally many per (type, split, count).

    Resampling drops, by a seeded choice, units of the group that has more in a stratum. Where no
    stratum has both groups, nothing is dropped and a note says that length is not controlled.
    """
    keep = np.ones(len(units), dtype=bool)
    counts = units["n_entity_tokens"]
    if counts.isna().any():
        return Matching(keep, None, [])
    p_values = []
    for _, part in units.groupby(units["entity_type"].fillna("")):
        a, b = (part.loc[part["group"] == g, "n_entity_tokens"].astype(float) for g in groups)
        if len(a) and len(b):
            p_values.append(_mann_whitney(a.to_numpy(), b.to_numpy()))
    if not p_values:
        return Matching(keep, None, [])
    p_value = min(1.0, min(p_values) * len(p_values))
    if p_value >= LEVEL:
        return Matching(keep, p_value, [])
    found = f"token counts of {groups[0]} and {groups[1]} differ (p = {p_value:.2g})"
    if not resample:
        return Matching(keep, p_value, [f"{found} and were not matched (analyzer.match_tokens)"])
    rng = np.random.default_rng([seed, 23])
    keep[:] = False
    strata = [units[c].astype("string").fillna("") for c in ("entity_type", "split")]
    for _, places in units.groupby([*strata, counts.astype(int)]).indices.items():
        of_group = [places[(units["group"].to_numpy()[places] == g)] for g in groups]
        n = min(map(len, of_group))
        for members in of_group:
            keep[rng.permutation(members)[:n]] = True
    if not keep.any():
        keep[:] = True
        note = f"{found} and do not overlap, so this contrast cannot tell recognition from length"
        return Matching(keep, p_value, [note])
    dropped = int((~keep).sum())
    return Matching(keep, p_value, [f"{found}: {dropped} of {len(keep)} dropped to match them"])


def _mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of counts, with ties; exact for a few counts that all differ."""
    both = np.concatenate([a, b])
    if min(len(a), len(b)) <= _EXACT and len(np.unique(both)) == len(both):
        from scipy import stats

        return float(stats.mannwhitneyu(a, b, method="exact").pvalue)
    first = np.arange(len(both)) < len(a)
    # Every count is above 0, the value that is not stored.
    return float(Ranked(sparse.csr_array(both[:, None]), first).mann_whitney().p_normal[0])
