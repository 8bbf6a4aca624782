"""Latents scaled or silenced, directions taken out of the stream or of the weights."""

from torch import Tensor

from saexp.errors import ConfigError
from saexp.interventions.facts import LatentFacts, orthonormal
from saexp.interventions.ops import Move, Op, Project, Vector
from saexp.interventions.planning import LatentIntervention


class Scale(LatentIntervention):
    """Multiply latents by 1 + coefficient: 0 leaves them, -1 silences, 1 doubles; error kept.

    Latents are scaled on prompts of the group they are selected for. Controls are frequency-matched
    latents, scaled themselves; there is no vector that a random direction could replace.
    """

    own_prompts = True

    def edit(
        self,
        latents: tuple[int, ...],  # noqa: ARG002
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """x + coefficient * a * direction."""
        return (Move(facts.hookpoint, write, write, (0.0,) * len(write), -coefficient),)


class Ablate(Scale):
    """Take latents out, the error kept: x - coefficient * a * direction."""

    def edit(
        self,
        latents: tuple[int, ...],
        write: tuple[int, ...],
        prompts: str,
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Coefficient 1 puts the latents to zero."""
        return super().edit(latents, write, prompts, -coefficient, facts)


class ProjectOut(LatentIntervention):
    """Remove directions from the stream: x - coefficient * Q'Q x, Q an orthonormal basis of them.

    At every layer of `intervention.layers` (Arditi et al. 2024, arXiv 2406.11717, section 2.4), the
    SAE's own by default, on prompts of the group that the latents are selected for. Controls remove
    the directions of frequency-matched latents, or as many random directions.
    """

    own_prompts = True
    vectors = True

    def edit(
        self,
        latents: tuple[int, ...],  # noqa: ARG002
        write: tuple[int, ...],
        prompts: str,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,
    ) -> tuple[Op, ...]:
        """Controls remove control latents' directions."""
        return self._removed(facts.directions(write).float().cpu(), coefficient, facts)

    def write(self, vector: Tensor, coefficient: float, facts: LatentFacts) -> tuple[Op, ...]:
        """The one direction."""
        return self._removed(vector[None], coefficient, facts)

    def _removed(
        self, directions: Tensor, coefficient: float, facts: LatentFacts
    ) -> tuple[Op, ...]:
        basis = Vector(orthonormal(directions))
        return tuple(Project(at, basis, coefficient) for at in self._places(facts))


class Orthogonalize(ProjectOut):
    """Remove directions from the weights that write to the stream, for as long as the test runs."""

    def weights(self, directions: Tensor, facts: LatentFacts) -> Tensor | None:  # noqa: ARG002
        """All directions of the condition."""
        return orthonormal(directions.float().cpu())

    def _removed(
        self,
        directions: Tensor,  # noqa: ARG002
        coefficient: float,
        facts: LatentFacts,  # noqa: ARG002
    ) -> tuple[Op, ...]:
        if coefficient not in (0, 1):
            raise ConfigError(
                f"coefficient={coefficient:g}: orthogonalised weights are or are not; type "
                "'coefficient=[0,1]'"
            )
        return ()
