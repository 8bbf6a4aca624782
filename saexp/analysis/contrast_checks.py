"""Power of a contrast, and its placebo trials."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import sparse

from saexp.analysis.observations import Split
from saexp.config import AnalyzerConfig
from saexp.context import progress
from saexp.results import TaskResult
from saexp.stats.permutation import claim_share
from saexp.stats.power import detectable_auroc
from saexp.stats.rank_tests import stratified_rank_test, stratum_weights
from saexp.wording import counted, is_above_chance, p_value_words

log = logging.getLogger(__name__)


def contrast_power(
    train: Split, test: Split, n_tested: int, n_leading: int, alpha: float
) -> TaskResult:
    """Metrics `power/auroc_train` and `power/auroc_test`: the smallest AUROC found in 80 % of runs.

    On the train split at `alpha` divided by the number of latents tested: Bonferroni's correction,
    which is the bound that Benjamini and Hochberg's starts from; on the test split at `alpha`
    divided by the number of leading latents (one where there is none), the bound that Holm's
    correction over them starts from. Null, with a note, where even a perfect separation would not
    pass.
    """
    result = TaskResult()
    levels = {
        "train": (train, alpha / max(n_tested, 1)),
        "test": (test, alpha / max(n_leading, 1)),
    }
    for name, (split, level) in levels.items():
        auroc = detectable_auroc(_sizes(split), level)
        result.metrics[f"power/auroc_{name}"] = auroc
        if auroc is None:
            result.notes.append(
                f"split {name} is too small to find any latent (power/auroc_{name}): even one that "
                f"separates the groups perfectly has p > {level:.2g}"
            )
    return result


def _sizes(split: Split) -> list[tuple[int, int]]:
    sizes = []
    for stratum in stratum_weights(split.first, split.strata):
        chosen = split.strata == stratum
        sizes.append((int((chosen & split.first).sum()), int((chosen & ~split.first).sum())))
    return sizes


Claims = Callable[[Split, Split], bool]
"""Whether the contrast of these train and test units reports a latent above chance."""


def placebo_labels(claims: Claims, train: Split, test: Split, n: int, seed: int) -> TaskResult:
    """Metric `placebo/label_share`: permutations of the group labels in which a claim is made.

    Labels are permuted over observations within entity type and split, so that group sizes stay.
    """
    rng = np.random.default_rng([seed, 61])
    n_claims, began = 0, time.perf_counter()
    with progress(n, "contrast with permuted labels", "permutation") as bar:
        for done in range(n):
            n_claims += claims(*(permuted(split, rng) for split in (train, test)))
            if not done:
                seconds = (time.perf_counter() - began) * n
                log.info("contrast with %d permutations of the labels: about %.0f s", n, seconds)
            bar.update(1)
    return TaskResult(metrics=claim_share("placebo/label_share", n_claims, n))


def permuted(split: Split, rng: np.random.Generator) -> Split:
    """The split with its labels permuted within strata."""
    first = split.first.copy()
    for stratum in sorted(set(split.strata)):
        chosen = np.flatnonzero(split.strata == stratum)
        first[chosen] = first[rng.permutation(chosen)]
    return replace(split, first=first)


def placebo_latents(table: pd.DataFrame, alpha: float, n: int, seed: int) -> TaskResult:
    """Metric `placebo/latent_share`: latents drawn at random for which the claim would be made.

    Of those active in the train split, all where they are no more than `n`. The claim is that on
    the test split the latent separates the groups, p <= `alpha`, in the direction of the train
    split.
    """
    active = np.flatnonzero(table["auroc"] != 0.5)
    drawn = np.random.default_rng([seed, 67]).permutation(active)[:n]
    some = table.iloc[drawn]
    same = np.sign(some["auroc"] - 0.5) == np.sign(some["auroc_test"] - 0.5)
    n_claims = int((same & (some["p_value_test"] <= alpha)).sum())
    return TaskResult(metrics=claim_share("placebo/latent_share", n_claims, len(some)))


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


_NAMED = 3
"""Latents named in a note."""


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
