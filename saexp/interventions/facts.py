"""What edits need to know of latents, groups and the stream; measured on the train split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saexp.errors import InterventionError
from saexp.interventions.ops import Op
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder

if TYPE_CHECKING:
    from saexp.probes import Fitted


@dataclass(frozen=True)
class Condition:
    """One thing that is done to prompts of one group, at every coefficient."""

    name: str
    role: str
    """single, group, direction, place or control."""
    direction: str
    """Group the latents speak for, or towards which the prompts are moved."""
    prompts: str
    """Group whose prompts it is tried on."""
    latents: tuple[int, ...]
    """Latents whose directions are written; none for other directions."""
    of: str
    """For a control: the condition it belongs to; else its own name."""
    edits: tuple[tuple[Op, ...], ...]
    """Operations, one tuple per coefficient."""
    strengths: tuple[Mapping[str, float], ...] = ()
    """Per coefficient what it is in every unit."""
    per_prompt: Mapping[str, tuple[tuple[Op, ...], ...]] = field(default_factory=dict)
    """Example id -> operations per coefficient, where they differ between prompts."""
    weights: Tensor | None = None
    """`[k, d]`: directions that the model's weights may not write while it runs."""
    layers: tuple[int, ...] = ()
    """Layer of each of `latents`, where they are of several layers' SAEs."""
    written: tuple[Hookpoint, ...] = ()
    """Streams that it changes, where they are not that of the run's own SAE."""
    parts: "tuple[tuple[LatentFacts, tuple[int, ...]], ...]" = ()
    """Of a condition on latents, per SAE its facts and the latents: what controls are made from."""
    control_kind: str = ""
    """For a control: one of `controls.CONTROL_KINDS`, or `controls.OWN_GROUP`."""
    number: int = 0
    """For a control: which of its kind, from 1."""
    at: tuple[int, ...] | None = None
    """Coefficients at which it is tried, by number; None: all."""
    frequency_ratio: float = float("nan")
    """For a control on latents: its frequency over its condition's."""
    norm_ratio: float = float("nan")
    """For a control whose added norm no strength gives: that over its condition's, where known."""
    matched: bool = True
    """For a control: whether its caliper is met."""

    @property
    def label(self) -> str:
        """Its latents as tables name them: `12+77`, of several layers `1:12+2:53`."""
        if not self.layers:
            return "+".join(map(str, self.latents))
        return "+".join(f"{n}:{f}" for n, f in zip(self.layers, self.latents, strict=True))

    def tried(self, at: int) -> bool:
        """Whether it is tried at a coefficient."""
        return self.at is None or at in self.at

    def ops(self, example_id: str, at: int) -> tuple[Op, ...] | None:
        """Operations at a coefficient; None where it, or this prompt, has none of its own."""
        if not self.tried(at):
            return None
        if self.per_prompt:
            return self.per_prompt[example_id][at] if example_id in self.per_prompt else None
        return self.edits[at] if self.edits else ()


def direction_of_set(direction: str) -> str:
    """The direction of a condition's set: a single latent of no group belongs to `latents`."""
    return "latents" if direction == "latent" else direction


@dataclass(frozen=True)
class StreamRows:
    """Stored activations of a stream, as many rows of every unit, with what each row is of."""

    acts: Float[np.ndarray, "n d"]
    groups: Shaped[np.ndarray, " n"]
    units: Shaped[np.ndarray, " n"]
    """Entities: rows of one are not independent."""


@dataclass(frozen=True)
class LatentFacts:
    """One row per latent that fired: `table`.

    Columns latent, direction, selected, rank, frequency, norm (of the decoder row), max_act,
    p99_act, and mean_<group>.
    """

    table: pd.DataFrame
    groups: tuple[str, ...]
    median_norm: float
    """Median norm of the written stream at the ordinary ones of the analysed rows."""
    directions: Callable[[Sequence[int]], Tensor]
    """Latents -> `[n, d]`, what one unit of each adds to the stream (`sae.directions`)."""
    hookpoint: Hookpoint
    """What the SAE reads."""
    written: Hookpoint
    """What edits change: the same, or a transcoder's output."""
    stream: Callable[[], StreamRows] | None = None
    """The written stream on the train split."""
    seed: int = 0
    """Seed of the probe's folds."""
    n_layers: int = 1
    layers: Mapping[int, "LatentFacts"] = field(default_factory=dict)
    """Facts of every layer whose SAE's latents are changed; none: this SAE's alone are."""
    saes: Mapping[Hookpoint, SparseAutoencoder] = field(default_factory=dict)
    """SAEs of `layers`, by the hookpoint that they read."""

    @cached_property
    def _places(self) -> dict[int, int]:
        return {int(latent): i for i, latent in enumerate(self.table["latent"])}

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    def numbers(self, latents: Sequence[int], column: str) -> Float[np.ndarray, " n"]:
        """A column's values for these latents, in their order."""
        if column not in self._columns:
            self._columns[column] = self.table[column].to_numpy(dtype=float)
        return self._columns[column][[self._places[latent] for latent in latents]]

    def other(self, group: str) -> str:
        """The group that is not this one."""
        return next(g for g in self.groups if g != group)

    @cached_property
    def _rows(self) -> StreamRows:
        if self.stream is None or len(self.groups) != 2:
            raise InterventionError(
                "directions of the stream itself need a data set with two groups; "
                "type 'intervention.directions=[latents]'"
            )
        return self.stream()

    def group_mean(self, group: str) -> Tensor:
        """`[d]`: mean of the stream over the group's rows."""
        rows = self._rows
        mean = rows.acts[rows.groups == group].mean(0, dtype=np.float64)
        return torch.from_numpy(mean).float()

    def mean_difference(self, towards: str) -> Tensor:
        """`[d]`: mean of the group minus mean of the other one."""
        return self.group_mean(towards) - self.group_mean(self.other(towards))

    @cached_property
    def probe(self) -> "Fitted":
        """The logistic probe for the first group, fitted exactly as `analyzer=probe` fits `dense`.

        Raises DataError where a group has too few entities to cross-validate.
        """
        from saexp.probes import MAX_TRAIN, STRENGTHS, fit_logistic, folds, limited

        rows = self._rows
        # Rows of a third group, or of none, would count as second.
        mine = limited(np.flatnonzero(np.isin(rows.groups, self.groups)), MAX_TRAIN, self.seed)
        first = rows.groups[mine] == self.groups[0]
        pairs = folds(first, rows.units[mine], self.seed)
        return fit_logistic(rows.acts[mine], first, STRENGTHS, pairs)

    @property
    def probe_direction(self) -> Tensor:
        """`[d]`, unit: the gradient of the probe's score for the first group."""
        direction = torch.from_numpy(self.probe.direction).float()
        return direction / direction.norm()

    def check(self, latents: Sequence[int]) -> None:
        """Raise InterventionError for a latent of which nothing is known."""
        for latent in latents:
            if latent not in self._places:
                raise InterventionError(
                    f"intervention.latents: latent {latent} never fires on this data set at "
                    f"{self.hookpoint.name}, so nothing is known of it; choose others"
                )


def denoised(
    difference: Float[Tensor, " d"], rows: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, " d"], float]:
    """The part of a difference of means that lies in the span of decoder rows.

    Its orthogonal projection: rows' w with w the least-squares solution of rows' w = difference;
    dependent rows do no harm. Beside it the share of the difference's norm that is kept.
    """
    basis = orthonormal(rows).double()
    kept = (basis @ difference.double()) @ basis
    share = float(kept.norm() / difference.double().norm())
    return kept.float(), share


def orthonormal(directions: Float[Tensor, "k d"]) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span the same space; dependent directions fall away."""
    _, size, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    kept = size > size.max() * 1e-6
    return rows[kept].float()
