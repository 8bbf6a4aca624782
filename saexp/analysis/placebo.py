"""How often the contrast's claim would have been made without cause: placebo labels and latents."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from saexp.analysis.strata import Split
from saexp.context import progress
from saexp.results import TaskResult
from saexp.stats.placebo import claim_share

log = logging.getLogger(__name__)

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
