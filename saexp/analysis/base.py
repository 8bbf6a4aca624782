"""What an analyzer is given."""

from dataclasses import dataclass

from saexp.latents.encode import Latents


@dataclass(kw_only=True)
class AnalysisInputs:
    """Latents of the analysed rows, the groups, and neutral text for comparison.

    `latents.rows` has the columns unit, group, split, entity_type and n_entity_tokens.
    """

    latents: Latents
    groups: tuple[str, ...]
    """Labels contrasted, first against second."""
    layer: int
    background: Latents | None = None
    """Latents at random positions of neutral text, for the background filter."""
