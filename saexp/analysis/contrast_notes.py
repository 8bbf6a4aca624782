"""Notes of a contrast: density limits, lengths of names, latents left out, impossible tests."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import sparse

from saexp.config import AnalyzerConfig
from saexp.stats.rank_tests import Ranked, stratified_rank_test
from saexp.wording import counted, is_above_chance, p_value_words

PAPER = 0.02
"""The limit of Ferrando et al. 2024, for SAEs of 16k latents of which about 80 are active."""


@dataclass(frozen=True)
class DensityLimit:
    """Latents of this density on background tokens or a larger one are not selected."""

    value: float | None
    """None without background tokens: every latent passes."""
    how: str
    """The options that made it, for notes."""

    def exceeded(self, densities: pd.Series) -> pd.Series:
        """Which densities are too large; an unknown one is not."""
        return densities >= (np.inf if self.value is None else self.value)


def density_limit(densities: Float[np.ndarray, " d_sae"], cfg: AnalyzerConfig) -> DensityLimit:
    """From the densities of all latents of an SAE on background tokens.

    A fixed density means different things for different SAEs: the mean density is L0 / d_sae, 0.5%
    for 80 of 16 384, 0.8% for 32 of 4096 and 5% for 12 of 256 latents, and densities are heavy-
    tailed: the few densest latents are active on any text. So the limit is the
    `background_quantile` of the densities of the latents that are active at all on background
    tokens (dead ones would lower it), but never below the 2% of the paper, which SAEs of many
    latents would otherwise fall short of. `background_max` is an absolute limit instead.
    """
    live = densities[densities > 0]
    if cfg.background_max is not None:
        return DensityLimit(cfg.background_max, f"analyzer.background_max={cfg.background_max:g}")
    if np.isnan(densities).all():
        return DensityLimit(None, "no background tokens")
    quantile = float(np.quantile(live, cfg.background_quantile)) if len(live) else 0.0
    how = f"analyzer.background_quantile={cfg.background_quantile:g}, at least {PAPER:g}"
    return DensityLimit(max(quantile, PAPER), how)


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
