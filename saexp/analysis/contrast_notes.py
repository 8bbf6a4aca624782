"""What a reader of a contrast must know: latents left out, and tests that cannot succeed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.density import DensityLimit
from saexp.analysis.matching import LEVEL
from saexp.analysis.statistics import stratified_rank_test
from saexp.config import AnalyzerConfig
from saexp.wording import counted, is_above_chance, p_value_words

_NAMED = 3
"""Latents or types named in a note."""
_UNEQUAL = 0.1
"""A difference in a type's fraction of either group below which no note is made."""


def why_none(
    significant: pd.DataFrame,
    group: str,
    labels: tuple[np.ndarray, np.ndarray],
    n_tested: int,
    limit: DensityLimit,
    cfg: AnalyzerConfig,
) -> str:
    """Why no latent is selected for a group; `labels` are (whether of the first group, stratum) of
    the train units."""
    mine = significant[significant["direction"] == group]
    if mine.empty:
        note = f"no latent is associated with '{group}' at a q-value <= {cfg.alpha:g}"
        return note + _no_power(*labels, n_tested, cfg.alpha)
    loud = int(limit.exceeded(mine["background_freq"]).sum())
    left_out = ""
    if limit.value is not None:
        left_out = (
            f"{counted(loud, 'is', 'are')} active on {limit.value:.1%} or more of background "
            f"tokens ({limit.how}), "
        )
    return (
        f"none of {counted(len(mine), 'significant latent')} for '{group}' is selected: {left_out}"
        f"{counted(len(mine) - loud, 'points', 'point')} the other way for some entity type or in "
        "their ranks"
    )


def _no_power(first: np.ndarray, strata: np.ndarray, n_tested: int, alpha: float) -> str:
    """That a latent which fires on all of one group and none of the other would not pass alone."""
    perfect = sparse.csr_array(first.astype(np.float64)[:, None])
    p_value = float(stratified_rank_test(perfect, first, strata).p_value[0])
    if p_value * n_tested <= alpha:
        return ""
    n = int(first.sum())
    return (
        f"; with {n} and {len(first) - n} train entities none could: a latent that fires on all of "
        f"one group only has p = {p_value:.2g}, and {n_tested} are tested"
    )


def unshared(
    units: pd.DataFrame, shared: list[str], groups: tuple[str, ...], split: str
) -> list[str]:
    """Units of a split left out because one group alone has their type, or that none is shared."""
    first, second = groups
    types = units["entity_type"].fillna("")
    if not shared:
        return [
            f"split {split}: {first} and {second} share no entity type, so all entities are "
            "compared at once and a difference between types counts as one between the groups; "
            "min_separation and min_auroc are over all entities"
        ]
    alone = units[~types.isin(shared)]
    if alone.empty:
        return []
    pairs = alone.assign(entity_type=types[alone.index].replace("", "no type"))
    counts = pairs.groupby(["entity_type", "group"], sort=True).size()
    keys = counts.index.to_frame(index=False).assign(n=counts.to_numpy()).head(_NAMED)
    named = [f"{r['n']} of {r['entity_type']} ({r['group']})" for r in keys.to_dict("records")]
    more = f" and {len(counts) - _NAMED} more types" if len(counts) > _NAMED else ""
    return [
        f"split {split}: {counted(len(alone), 'entity', 'entities')} left out, of entity types "
        f"that only one group has: {', '.join(named)}{more}"
    ]


def unequal_types(units: pd.DataFrame, groups: tuple[str, str], what_follows: str) -> list[str]:
    """That the groups are made up of types in different proportions, of those both have.

    `what_follows` says in words which numbers that affects.
    """
    first, second = groups
    types = units["entity_type"].fillna("")
    table = pd.crosstab(types, units["group"]).reindex(columns=list(groups), fill_value=0)
    table = table[(table > 0).all(axis=1)]
    if len(table) < 2:
        return []
    from scipy import stats

    counts = table.to_numpy()
    fractions = counts / counts.sum(axis=0)
    difference = np.abs(fractions[:, 0] - fractions[:, 1])
    p_value = float(stats.chi2_contingency(counts).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    if p_value >= LEVEL or difference.max() < _UNEQUAL:
        return []
    place = int(difference.argmax())
    return [
        f"entity types differ between the groups (p = {p_value:.2g}): "
        f"{table.index[place] or 'no type'} is {fractions[place, 0]:.0%} of {first} and "
        f"{fractions[place, 1]:.0%} of {second}; {what_follows}"
    ]


def louder(significant: pd.DataFrame, best: pd.DataFrame, group: str, limit: DensityLimit) -> str:
    """Latents that separate the groups better than the best one selected, but are too dense.

    Empty where there are none. Numbers are of the train split, in the group's own direction.
    """
    mine = significant[
        (significant["direction"] == group) & limit.exceeded(significant["background_freq"])
    ]
    mine = mine.assign(strength=(mine["auroc"] - 0.5).abs())
    bar = 0.0 if best.empty else abs(float(best["auroc"].iloc[0]) - 0.5)
    mine = mine[mine["strength"] > bar].sort_values("strength", ascending=False)
    if best.empty or mine.empty or limit.value is None:
        return ""
    named = ", ".join(
        f"{row['latent']} ({0.5 + row['strength']:.3f})"
        for row in mine.head(_NAMED).to_dict("records")
    )
    more = f" and {len(mine) - _NAMED} more" if len(mine) > _NAMED else ""
    return (
        f"{counted(len(mine), 'latent')} of higher train AUROC for '{group}' "
        f"{'is' if len(mine) == 1 else 'are'} left out, active on {limit.value:.1%} or more of "
        f"background tokens ({limit.how}): {named}{more}"
    )


def at_chance(metrics: Mapping[str, float | int | None], group: str, alpha: float) -> list[str]:
    """That a leading latent is not above chance on the test split."""
    notes, seen = [], set()
    for kind, words in (("best", "the first selected"), ("strongest", "the strongest on train")):
        latent = metrics[f"contrast/{kind}_latent_{group}"]
        auroc, p_value = (
            metrics[f"contrast/{kind}_{name}_{group}_test"] for name in ("auroc", "p_value")
        )
        if latent is None or latent in seen or auroc is None or p_value is None:
            continue
        seen.add(latent)
        if is_above_chance(auroc, p_value, alpha):
            continue
        low, high = (
            metrics[f"contrast/{kind}_auroc_{group}_ci_{end}_test"] for end in ("low", "high")
        )
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        notes.append(
            f"latent {latent}, {words} for '{group}', has AUROC {auroc:.3f}{interval} "
            f"(not above chance on held-out entities; Holm-adjusted p {p_value_words(p_value)})"
        )
    return notes
