"""What a reader of a contrast must know: latents left out, and tests that cannot succeed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.density import DensityLimit
from saexp.analysis.statistics import Ranked
from saexp.config import AnalyzerConfig
from saexp.wording import above_chance, chance_words, counted

_NAMED = 3
"""Latents named in a note."""


def why_none(
    significant: pd.DataFrame,
    group: str,
    first: np.ndarray,
    n_tested: int,
    limit: DensityLimit,
    cfg: AnalyzerConfig,
) -> str:
    """Why no latent is selected for a group; `first` tells the groups of the train units apart."""
    mine = significant[significant["direction"] == group]
    if mine.empty:
        note = f"no latent is associated with '{group}' at a q-value <= {cfg.alpha:g}"
        return note + _no_power(first, n_tested, cfg.alpha)
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


def _no_power(first: np.ndarray, n_tested: int, alpha: float) -> str:
    """That a latent which fires on all of one group and none of the other would not pass alone."""
    perfect = sparse.csr_array(first.astype(np.float64)[:, None])
    p_value = float(Ranked(perfect, first).mann_whitney().p_value[0])
    if p_value * n_tested <= alpha:
        return ""
    n = int(first.sum())
    return (
        f"; with {n} and {len(first) - n} train entities none could: a latent that fires on all of "
        f"one group only has p = {p_value:.2g}, and {n_tested} are tested"
    )


def no_width(best: pd.DataFrame, group: str, n_test: int) -> list[str]:
    """That the best latent's interval says nothing: perfect separation is so in any resample."""
    if best.empty or "ci_low_test" not in best:
        return []
    row = best.iloc[0]
    if row["ci_low_test"] != row["ci_high_test"] or row["auroc_test"] not in (0.0, 1.0):
        return []
    return [
        f"latent {row['latent']} separates all {n_test} held-out units, so the bootstrap interval "
        f"of its AUROC for '{group}' has no width; it does not mean certainty"
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


def at_chance(metrics: Mapping[str, float | int | None], group: str) -> list[str]:
    """That the held-out interval of a leading latent's AUROC covers 0.5."""
    notes, seen = [], set()
    for kind, words in (("best", "the first selected"), ("strongest", "the strongest on train")):
        latent = metrics[f"contrast/{kind}_latent_{group}"]
        low, high = (
            metrics[f"contrast/{kind}_auroc_{group}_ci_{end}_test"] for end in ("low", "high")
        )
        if latent in seen or above_chance(low) is not False:
            continue
        seen.add(latent)
        auroc = metrics[f"contrast/{kind}_auroc_{group}_test"]
        notes.append(
            f"latent {latent}, {words} for '{group}', has AUROC {auroc:.3f} "
            f"[{low:.3f}, {high:.3f}]{chance_words(low)}"
        )
    return notes
