"""Directions of the stream itself: the difference of means, its part in latents' span, a probe's, a
random one; each with what it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from saexp.config import InterventionConfig
from saexp.directions import random_directions
from saexp.interventions.controls import matched_controls
from saexp.interventions.facts import LatentFacts, denoised


@dataclass(frozen=True)
class Direction:
    """A vector of the stream, `[d]`, in its natural length."""

    vector: Tensor
    latents: tuple[int, ...] = ()
    """Latents whose decoder rows span it, where it is made of some."""
    about: Mapping[str, float] = field(default_factory=dict)
    """Numbers that go beside its strength: `norm_kept`."""


def stream_directions(
    kind: str,
    towards: str,
    facts: LatentFacts,
    latents: tuple[int, ...],
    cfg: InterventionConfig,
) -> tuple[list[Direction], list[str]]:
    """The direction towards a group and then its controls, and notes.

    `latents` are those that a denoised difference is projected on. Controls are random directions
    of the same length, different ones for every stream; of a denoised difference, the same
    difference projected on the rows of matched latents and brought to the same length.
    """
    natural = facts.mean_difference(towards)
    if kind == "denoised_difference":
        return _denoised(natural, towards, facts, latents, cfg)
    notes = []
    if kind == "probe":
        unit = facts.probe_direction
        natural = unit * (unit @ natural)
        probe = facts.probe
        notes.append(
            f"probe direction: logistic regression on the train split, C = {probe.c:g} by "
            f"cross-validation over entities (log loss {probe.cv_log_loss:.3f})"
            f"{'' if probe.converged else '; it did not fully converge'}"
        )
    n_random = cfg.n_controls + (kind == "random")
    of = ("direction", facts.written.name, towards)
    noise = random_directions(n_random, len(natural), cfg.seed, *of) * natural.norm()
    return [Direction(v) for v in ([] if kind == "random" else [natural]) + list(noise)], notes


def _denoised(
    difference: Tensor,
    towards: str,
    facts: LatentFacts,
    latents: tuple[int, ...],
    cfg: InterventionConfig,
) -> tuple[list[Direction], list[str]]:
    if not latents:
        return [], ["denoised_difference: no latent is selected, so there is no span to project on"]
    controls = matched_controls(facts.table, latents, cfg.n_controls, alpha=facts.alpha)
    made = []
    for chosen in (latents, *controls.sets):
        vector, share = denoised(difference, facts.directions(chosen).float().cpu())
        if made:
            vector = vector / vector.norm() * made[0].vector.norm()
        made.append(Direction(vector, chosen, {"norm_kept": share}))
    kept, *others = (d.about["norm_kept"] for d in made)
    beside = f", of {len(others)} matched sets {min(others):.2f} to {max(others):.2f}"
    note = (
        f"denoised_difference towards '{towards}': Q'Q(m - m'), the difference of the groups' "
        "means (train split) projected on the decoder rows of latents "
        f"{', '.join(map(str, latents))} (Q an orthonormal basis of them); share of its norm kept "
        f"{kept:.2f}"
        f"{beside if others else ''}"
    )
    return made, [note, *controls.notes]
