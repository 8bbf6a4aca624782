"""The base class of analyzers, and their inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from saexp.config import AnalyzerConfig
from saexp.data.examples import Example
from saexp.data.tokenization import TokenizedText
from saexp.errors import DataError
from saexp.latents.encode import Latents
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes.sae import SparseAutoencoder
from saexp.wording import counted


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
    texts: Sequence[TokenizedText] = ()
    """As the model read them; the column `text_id` of `latents.rows` counts them."""
    neutral_texts: Sequence[TokenizedText] = ()
    """Neutral text as the model read it, for token frequencies."""
    examples: Sequence[Example] = ()
    model: LanguageModel | None = None
    sae: SparseAutoencoder | None = None
    max_length: int = 512
    """Longest text in tokens."""
    ordinary: Bool[np.ndarray, " n_rows"] | None = None
    """False for rows of high norm (`activations.norms`); None: every row is ordinary."""
    norm_limits: Mapping[Hookpoint, float] = field(default_factory=dict)
    """The largest norm of an ordinary position, at each stream that the SAE reads or predicts."""
    transfer: "AnalysisInputs | None" = None
    """The analyzer's second data set, where it names one (`Analyzer.transfer`)."""

    @property
    def ordinary_latents(self) -> Latents:
        """The latents of ordinary rows."""
        return self.latents if self.ordinary is None else self.latents.where(self.ordinary)

    def check_splits(self) -> None:
        """Raise DataError where an entity of the groups is in several splits.

        What is chosen on its train rows would be tested on the same entity.
        """
        rows = self.latents.rows
        rows = rows[rows["group"].isin(self.groups)]
        splits = rows.dropna(subset="split").groupby("unit", sort=False)["split"].unique()
        several = splits[splits.map(len) > 1]
        if len(several):
            raise DataError(
                f"{counted(len(several), 'entity has', 'entities have')} rows in several splits, "
                f"such as {str(several.index[0]).lstrip(':')} in "
                f"{' and '.join(sorted(several.iloc[0]))}; an entity belongs to one: give all its "
                "rows the same split, or none"
            )


class Analyzer:
    """Base class of analyzers (registry kind `analyzer`).

    Class attributes declare what the analyzer needs; an analyzer may set them per instance.

    Example:
        >>> @saexp.register("analyzer", "loudest")
        ... class Loudest(Analyzer):
        ...     def analyze(self, inputs):
        ...         return Result(metrics={"loudest/max": float(inputs.latents.csr.max())})
    """

    several_layers: bool = False
    """Whether `layer` may be a list. Tables then get a column `layer`, and the metrics of several
    layers end in `_layer_<n>`."""
    reads_acts: bool = True
    """Whether `inputs.acts` holds the stored activations."""
    ordinary_only: bool = False
    """Whether the analyzer leaves out the high-norm rows (`inputs.ordinary`); the notes say so."""
    selects_latents: bool = False
    """Whether its table `latents` has the columns of the contrast, so that an intervention can
    change the latents that it selects."""
    transfer: str | None = None
    """Path of a second data set with the same groups, given to `analyze` as `inputs.transfer`."""

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics, tables, figures and notes of one layer."""
        raise NotImplementedError


class UndeclaredAnalyzer(Analyzer):
    """A component with an `analyze` method that is not derived from `Analyzer`.

    Attributes that it does not declare have the defaults of `Analyzer`.
    """

    def __init__(self, component: Any) -> None:
        self.component = component
        for name in Analyzer.__annotations__:
            if hasattr(component, name):
                setattr(self, name, getattr(component, name))

    def analyze(self, inputs: AnalysisInputs) -> Any:
        """The component's method; the run checks what it returns."""
        return self.component.analyze(inputs)


def as_analyzer(component: Any) -> Analyzer:
    """The component, or one with the defaults of `Analyzer` where it is not derived from it."""
    return component if isinstance(component, Analyzer) else UndeclaredAnalyzer(component)
