"""What a run found, in sentences with their intervals."""

from pathlib import Path

from saexp.reports.effects import effect_sentences
from saexp.reports.saved import SavedRun


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
    return [_setting(run), *(_contrast(run, g) for g in run.groups), *effect_sentences(run)]


def _setting(run: SavedRun) -> str:
    metrics, about = run.metrics, run.provenance
    n = metrics["contrast/n_units_test"]
    return (
        f"{about['model']['name']}, {about['sae']['hookpoint']}, SAE of {about['sae']['d_sae']} "
        f"latents: {metrics['contrast/n_significant']} of {metrics['contrast/n_tested']} latents "
        f"that fired tell {run.groups[0]} from {run.groups[1]} "
        f"(q <= {run.config['analyzer']['alpha']:g}, train split); "
        f"numbers below are of {n} held-out {run.unit_word}."
    )


def _contrast(run: SavedRun, group: str) -> str:
    m = {k.removeprefix("contrast/"): v for k, v in run.metrics.items()}
    latent = m[f"best_latent_{group}"]
    if latent is None:
        return f"No latent for '{group}' is selected."
    low, high = m[f"best_auroc_{group}_ci_low_test"], m[f"best_auroc_{group}_ci_high_test"]
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    parts = (
        f"{group}: latent {latent} has AUROC {m[f'best_auroc_{group}_test']:.3f}{interval}, "
        f"separation {m[f'best_separation_{group}_test']:.2f}"
    )
    if len(run.entity_types) > 1:
        parts += (
            f"; smallest over {len(run.entity_types)} entity types: AUROC "
            f"{m[f'best_min_auroc_{group}_test']:.3f}, separation "
            f"{m[f'best_min_separation_{group}_test']:.2f}"
        )
    return f"{parts}."


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
