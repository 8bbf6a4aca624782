"""What placebo labels, latents and controls would have been reported as, in words."""

from saexp.reports.saved import SavedRun

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
