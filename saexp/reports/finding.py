"""The finding of a run in sentences with intervals, its baseline, power and placebo trials."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saexp.reports.effects import effect_sentences
from saexp.reports.saved import SavedRun
from saexp.wording import counted, is_above_chance, p_value_words, sae_words

_WORDS = {
    "label_share": "with permuted group labels, a latent is reported as above chance in {} of {} "
    "permutations",
    "latent_share": "of latents drawn at random among the active ones, {} of {} would be reported "
    "as above chance",
    "effect_share": "of controls in the place of the latent, {} of {} would be reported to have "
    "an effect",
}


def placebo_sentences(run: SavedRun) -> list[str]:
    """One sentence; nothing where no placebo was asked for."""
    parts = []
    for name, words in _WORDS.items():
        n, fraction = (run.metrics.get(f"placebo/{name}{end}") for end in ("_n", ""))
        if n is None or fraction is None:
            continue
        low, high = (run.metrics[f"placebo/{name}_ci_{end}"] for end in ("low", "high"))
        counted = words.format(round(fraction * n), n)
        parts.append(f"{counted} ({fraction:.1%} [{low:.1%}, {high:.1%}])")
    return [f"Placebo: {'; '.join(parts)}."] if parts else []


def power_sentences(run: SavedRun) -> list[str]:
    """The smallest AUROC and change of a rate that would have been found; of what is known."""
    return [*_contrast_power(run), *_effects(run)]


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


def _contrast_power(run: SavedRun) -> list[str]:
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


_KEY = "contrast/surface_auroc_test"
Metrics = Mapping[str, float | int | None]


def surface_sentences(run: SavedRun) -> list[str]:
    """What the text alone says; nothing for a run that has no such baseline."""
    auroc = run.metrics.get(_KEY)
    if auroc is None:
        return []
    chance = "" if _is_above_chance(run.metrics) else ", not above chance"
    return [
        "The surface baseline (tokens and n-grams of the text, no model) has AUROC "
        f"{auroc:.3f}{_interval(run.metrics, _KEY)}{chance}."
    ]


def _is_above_chance(metrics: Metrics) -> bool:
    low = metrics.get(f"{_KEY}_ci_low")
    return low is not None and low > 0.5


def above_surface(metrics: Metrics, group: str) -> str:
    """ " It is 0.526 [0.47, 0.58] above the surface baseline.", or that it is not; "" without.

    Also "" above a baseline that is not above chance itself: how far would say nothing.
    """
    key = f"contrast/best_minus_surface_{group}_test"
    difference, low = metrics.get(key), metrics.get(f"{key}_ci_low")
    if difference is None:
        return ""
    interval = _interval(metrics, key)
    if low is None:
        return f" Its AUROC less the surface baseline's is {difference:+.3f}, without an interval."
    if low > 0 and not _is_above_chance(metrics):
        return ""
    if low > 0:
        return f" Its AUROC is {difference:.3f}{interval} above the surface baseline's."
    return (
        " It is not distinguishable from surface cues: its AUROC less the surface baseline's is "
        f"{difference:+.3f}{interval}."
    )


def _interval(metrics: Metrics, key: str) -> str:
    low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def headline(folder: str | Path) -> str:
    """The finding in a few lines of plain text."""
    return "\n".join(sentences(SavedRun(Path(folder))))


def sentences(run: SavedRun) -> list[str]:
    """One sentence on the setting, one per direction of the contrast, one per causal effect."""
    if "finding" in run.provenance:
        return list(run.provenance["finding"])
    if run.config["task"]["name"] == "train":
        return [training_sentence(run)]
    if run.latents is None:
        return ["This run compared no groups."]
    found = [_contrast(run, g) for g in run.groups]
    beside = [*placebo_sentences(run), *(power_sentences(run) if found_nothing(run) else [])]
    return [_setting(run), *surface_sentences(run), *found, *beside, *effect_sentences(run)]


def _setting(run: SavedRun) -> str:
    metrics, about = run.metrics, run.provenance
    first, second = run.groups
    of_group = [f"{metrics[f'contrast/n_units_{g}_test']} {g}" for g in run.groups]
    return (
        f"{about['model']['name']}, {about['sae']['hookpoint']}, {sae_words(about['sae'])}: "
        f"{metrics['contrast/n_significant']} of {metrics['contrast/n_tested']} active latents "
        f"separate {first} from {second} (Benjamini-Hochberg q <= "
        f"{run.config['analyzer']['alpha']:g} over them, train split); numbers below are of "
        f"{metrics['contrast/n_units_test']} held-out {run.unit_word} ({', '.join(of_group)}), "
        "p-values after Holm over the latents named."
    )


def _contrast(run: SavedRun, group: str) -> str:
    m = {k.removeprefix("contrast/"): v for k, v in run.metrics.items()}
    latent, strongest = m[f"best_latent_{group}"], m.get(f"strongest_latent_{group}")
    beside = ""
    if strongest is not None and strongest != latent:
        density = m[f"strongest_background_freq_{group}"]
        active = "" if density is None else f", active on {density:.1%} of background tokens"
        beside = (
            f" The strongest on the train split is latent {strongest}{active}: "
            f"{_numbers(run, m, 'strongest', group)}."
        )
    if latent is None:
        return f"No latent for '{group}' is selected.{beside}"
    most = ", the most selective," if beside else ""
    surface = above_surface(run.metrics, group)
    return f"{group}: latent {latent}{most} has {_numbers(run, m, 'best', group)}.{surface}{beside}"


def _numbers(run: SavedRun, m: dict[str, Any], kind: str, group: str) -> str:
    """Held-out AUROC and separation of a leading latent, in the group's direction."""
    auroc, p_value = (m[f"{kind}_{name}_{group}_test"] for name in ("auroc", "p_value"))
    low, high = m[f"{kind}_auroc_{group}_ci_low_test"], m[f"{kind}_auroc_{group}_ci_high_test"]
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    p_words = f"p {p_value_words(p_value)}"
    if not is_above_chance(auroc, p_value, run.config["analyzer"]["alpha"]):
        p_words = f"not above chance on held-out {run.unit_word}, {p_words}"
    words = (
        f"AUROC {auroc:.3f}{interval} ({p_words}), "
        f"separation {m[f'{kind}_separation_{group}_test']:.2f}"
    )
    if len(run.entity_types) > 1:
        words += (
            f"; smallest over {len(run.entity_types)} entity types: AUROC "
            f"{m[f'{kind}_min_auroc_{group}_test']:.3f}, separation "
            f"{m[f'{kind}_min_separation_{group}_test']:.2f}"
        )
    return words


def training_sentence(run: SavedRun) -> str:
    """What `task=train` made, in one sentence of held-out numbers."""
    m, about = run.metrics, run.provenance
    explained = m["reconstruction/explained_variance"]
    shown = "not defined" if explained is None else f"{explained:.3f}"
    return (
        f"{run.config['sae_trainer']['name']} SAE of {about['sae']['d_sae']} latents on "
        f"{about['sae']['hookpoint']} of {about['model']['name']}: explained variance {shown}, L0 "
        f"{m['sparsity/l0']:.1f}, {m['sparsity/dead_fraction']:.0%} of the latents silent on "
        f"{about['n_measured']:,} held-out positions; trained on {about['n_trained_on']:,}."
    )


HEAD = ["at", "quantity", "here", "said to be", "allowed", "verdict"]


def fit_rows(run: SavedRun) -> list[list[Any]]:
    """Rows of check.parquet for reading; none where the run did not look."""
    table = run.table("check")
    if table is None:
        return []
    shown = []
    for row in table.to_dict("records"):
        other = row["verdict"] == "other reading"
        known = row["expected"] == row["expected"]
        said = row["expected"] if known else ("" if other else "unknown")
        words = [row["tolerance"], row["verdict"]]
        shown.append([row["hookpoint"], row["quantity"], row["here"], said, *words])
    return shown
