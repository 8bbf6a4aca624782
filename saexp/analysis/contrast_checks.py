"""Power of a contrast, and its placebo trials."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from saexp.analysis.observations import Split
from saexp.context import progress
from saexp.results import TaskResult
from saexp.stats.permutation import claim_share
from saexp.stats.power import detectable_auroc
from saexp.stats.rank_tests import stratum_weights

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
