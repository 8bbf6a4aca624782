"""What a contrast of this size could have found."""

from saexp.analysis.statistics import stratum_weights
from saexp.analysis.strata import Split
from saexp.results import TaskResult
from saexp.stats.power import detectable_auroc


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
