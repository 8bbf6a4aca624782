"""What a run found, in sentences with their intervals."""

from pathlib import Path
from typing import Any

from saexp.reports.effects import effect_sentences
from saexp.reports.placebo import placebo_sentences
from saexp.reports.power import found_nothing, power_sentences
from saexp.reports.saved import SavedRun
from saexp.reports.surface import above_surface, surface_sentences
from saexp.wording import is_above_chance, p_value_words, sae_words


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
