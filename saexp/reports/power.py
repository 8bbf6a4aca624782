"""What a run of its size could have found, in words."""

from saexp.reports.saved import SavedRun
from saexp.wording import counted, is_above_chance


def power_sentences(run: SavedRun) -> list[str]:
    """The smallest AUROC and change of a rate that would have been found; of what is known."""
    return [*_contrast(run), *_effects(run)]


def found_nothing(run: SavedRun) -> bool:
    """Whether no leading latent is above chance on the test split, Holm-adjusted."""
    m = run.metrics
    alpha = run.config["analyzer"]["alpha"]
    for group in run.groups:
        for kind in ("best", "strongest"):
            auroc, p_value = (
                m.get(f"contrast/{kind}_{name}_{group}_test") for name in ("auroc", "p_value")
            )
            if auroc is None or p_value is None:
                continue
            if is_above_chance(auroc, p_value, alpha):
                return False
    return True


def _contrast(run: SavedRun) -> list[str]:
    m = run.metrics
    train, test = m.get("power/auroc_train"), m.get("power/auroc_test")
    if train is None or test is None:
        return []
    alpha = run.config["analyzer"]["alpha"]
    leading = {m.get(f"contrast/{k}_latent_{g}") for k in ("best", "strongest") for g in run.groups}
    n_leading = max(len(leading - {None}), 1)
    return [
        f"With these numbers of {run.unit_word} a latent is found on the train split in 80% of "
        f"runs if its AUROC is {train:.3f} or more (level {alpha:g}, Bonferroni over "
        f"{m['contrast/n_tested']} latents), and confirmed on the test split if it is {test:.3f} "
        f"or more (level {alpha:g}, Bonferroni over {counted(n_leading, 'latent')})."
    ]


def _effects(run: SavedRun) -> list[str]:
    m = run.metrics
    change, n = m.get("power/rate_change"), m.get("power/rate_n")
    words = []
    if change is not None and n is not None:
        words.append(
            f"With {n} {run.unit_word} a change of a rate by {change:.2f} or more from its "
            f"unsteered value of {m['power/rate_baseline']:.2f} is found in 80% of runs (level "
            "0.05, paired)."
        )
    floor = m.get("power/p_controls_floor")
    if floor is not None:
        words.append(
            f"p-values against controls are ranks and cannot be below {floor:.2g}, whatever the "
            "effect."
        )
    return words
