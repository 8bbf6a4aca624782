"""What an analyzer is given."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from saexp.data.examples import Example
from saexp.latents.encode import Latents
from saexp.models.loading import LanguageModel
from saexp.saes.base import SparseAutoencoder


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
    acts: Tensor | None = None
    """`[n_rows, d_in]`, memory-mapped: the stored activations of the rows of `latents`."""
    examples: Sequence[Example] = ()
    model: LanguageModel | None = None
    sae: SparseAutoencoder | None = None
    max_length: int = 512
    """Longest text in tokens."""
