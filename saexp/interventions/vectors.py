"""Directions of the stream itself: the difference of means, its part in latents' span, a probe's, a
random one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from saexp.config import InterventionConfig
from saexp.directions import random_directions
from saexp.interventions.facts import LatentFacts, denoised


@dataclass(frozen=True)
class Direction:
    """A vector of the stream, `[d]`, in its natural length."""

    vector: Tensor
    latents: tuple[int, ...] = ()
    """Latents whose decoder rows span it, where it is made of some."""
    about: Mapping[str, float] = field(default_factory=dict)
    """Numbers that go beside its strength: `norm_kept`."""


def stream_direction(
    kind: str,
    towards: str,
    facts: LatentFacts,
    latents: tuple[int, ...],
    cfg: InterventionConfig,
) -> tuple[Direction | None, list[str]]:
    """The direction towards a group, and notes; none where it cannot be made.

    `latents` are those that a denoised difference is projected on. A random direction is as long
    as the difference of means.
    """
    difference = facts.mean_difference(towards)
    if kind == "denoised_difference":
        return _denoised(difference, towards, facts, latents)
    if kind == "probe":
        unit, probe = facts.probe_direction, facts.probe
        note = (
            f"probe direction: logistic regression on the train split, C = {probe.c:g} by "
            f"cross-validation over entities (log loss {probe.cv_log_loss:.3f})"
            f"{'' if probe.converged else '; it did not fully converge'}"
        )
        return Direction(unit * (unit @ difference)), [note]
    if kind == "random":
        of = ("direction", facts.written.name, towards)
        (noise,) = random_directions(1, len(difference), cfg.seed, *of)
        return Direction(noise * difference.norm()), []
    return Direction(difference), []


def _denoised(
    difference: Tensor, towards: str, facts: LatentFacts, latents: tuple[int, ...]
) -> tuple[Direction | None, list[str]]:
    if not latents:
        note = "denoised_difference: no latent is selected, so there is no span to project on"
        return None, [note]
    vector, share = denoised(difference, facts.directions(latents).float().cpu())
    note = (
        f"denoised_difference towards '{towards}': Q'Q(m - m'), the difference of the groups' "
        "means (train split) projected on the decoder rows of latents "
        f"{', '.join(map(str, latents))} (Q an orthonormal basis of them); share of its norm kept "
        f"{share:.2f}"
    )
    return Direction(vector, latents, {"norm_kept": share}), [note]
