"""Statistics of latents and streams on the train split, and directions derived from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import InterventionError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.sae import SparseAutoencoder
from saexp.stats.permutation import random_directions

if TYPE_CHECKING:
    from saexp.stats.logistic_probe import Fitted


@dataclass(frozen=True)
class StreamRows:
    """Stored activations of a stream, equally many rows per unit, with group and unit of each."""

    acts: Float[np.ndarray, "n d"]
    groups: Shaped[np.ndarray, " n"]
    units: Shaped[np.ndarray, " n"]
    """Entities: rows of one entity are not independent."""


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the latents of one SAE, one row of `table` per latent that was active.

    Columns latent, direction, selected, rank, frequency, norm (of the decoder row), max_act,
    p99_act, and mean_<group>.
    """

    table: pd.DataFrame
    groups: tuple[str, ...]
    median_norm: float
    """Median norm of the written stream over analysed rows of ordinary norm."""
    directions: Callable[[Sequence[int]], Tensor]
    """Latents -> `[n, d]`, what one unit of each adds to the stream (`sae.directions`)."""
    hookpoint: Hookpoint
    """What the SAE reads."""
    written: Hookpoint
    """The stream that is edited: the same, or a transcoder's output."""
    stream: Callable[[], StreamRows] | None = None
    """The written stream on the train split."""
    seed: int = 0
    """Seed of the probe's cross-validation folds."""
    n_layers: int = 1
    layers: Mapping[int, "LatentStatistics"] = field(default_factory=dict)
    """Per layer, where latents of several layers' SAEs are changed; else empty."""
    saes: Mapping[Hookpoint, SparseAutoencoder] = field(default_factory=dict)
    """SAEs of `layers` by the hookpoint that they read."""

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
        """The other one of two groups."""
        return next(g for g in self.groups if g != group)

    @cached_property
    def _rows(self) -> StreamRows:
        if self.stream is None or len(self.groups) != 2:
            raise InterventionError(
                "intervention.directions other than latents need a data set with two groups; "
                "type 'intervention.directions=[latents]'"
            )
        return self.stream()

    def group_mean(self, group: str) -> Tensor:
        """`[d]`: mean of the stream over the group's rows."""
        rows = self._rows
        mean = rows.acts[rows.groups == group].mean(0, dtype=np.float64)
        return torch.from_numpy(mean).float()

    def mean_difference(self, towards: str) -> Tensor:
        """`[d]`: mean of the stream over this group minus that over the other one."""
        return self.group_mean(towards) - self.group_mean(self.other(towards))

    @cached_property
    def probe(self) -> "Fitted":
        """The logistic probe for the first group, fitted as `analyzer=probe` fits `dense`.

        Raises DataError where a group has too few entities to cross-validate.
        """
        from saexp.stats.logistic_probe import MAX_TRAIN, STRENGTHS, fit_logistic, folds, limited

        rows = self._rows
        # Rows of a third group, or of no group, would count as the second group.
        chosen = limited(np.flatnonzero(np.isin(rows.groups, self.groups)), MAX_TRAIN, self.seed)
        first = rows.groups[chosen] == self.groups[0]
        pairs = folds(first, rows.units[chosen], self.seed)
        return fit_logistic(rows.acts[chosen], first, STRENGTHS, pairs)

    @property
    def probe_direction(self) -> Tensor:
        """`[d]`, unit: the gradient of the probe's score for the first group."""
        direction = torch.from_numpy(self.probe.direction).float()
        return direction / direction.norm()

    def check(self, latents: Sequence[int]) -> None:
        """Raise InterventionError for a latent that is not in the table."""
        for latent in latents:
            if latent not in self._places:
                raise InterventionError(
                    f"intervention.latents: latent {latent} is never active on this data set at "
                    f"{self.hookpoint.name}; choose other latents"
                )


def denoised(
    difference: Float[Tensor, " d"], rows: Float[Tensor, "k d"]
) -> tuple[Float[Tensor, " d"], float]:
    """Orthogonal projection of a difference of means on the span of decoder rows, and the fraction
    of its norm that the projection keeps.

    It is rows' w, with w the least-squares solution of rows' w = difference; rows may be dependent.
    """
    basis = orthonormal(rows).double()
    projection = (basis @ difference.double()) @ basis
    fraction = float(projection.norm() / difference.double().norm())
    return projection.float(), fraction


def orthonormal(directions: Float[Tensor, "k d"]) -> Float[Tensor, "r d"]:
    """Orthonormal rows that span the same space; there are fewer where directions are dependent."""
    _, size, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    independent = size > size.max() * 1e-6
    return rows[independent].float()


@dataclass(frozen=True)
class Direction:
    """A vector of the stream, `[d]`, with its natural length."""

    vector: Tensor
    latents: tuple[int, ...] = ()
    """Latents whose decoder rows span it, if there are any."""
    about: Mapping[str, float] = field(default_factory=dict)
    """Further numbers for the summary: `norm_kept`."""


def stream_direction(
    kind: str,
    towards: str,
    facts: LatentStatistics,
    latents: tuple[int, ...],
    cfg: InterventionConfig,
) -> tuple[Direction | None, list[str]]:
    """The direction towards a group, or None where it is undefined, and notes.

    A denoised difference is projected on the span of `latents`. A random direction has the norm of
    the difference of means.
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
    difference: Tensor, towards: str, facts: LatentStatistics, latents: tuple[int, ...]
) -> tuple[Direction | None, list[str]]:
    if not latents:
        note = "denoised_difference: no latent is selected, so there is nothing to project on"
        return None, [note]
    vector, fraction = denoised(difference, facts.directions(latents).float().cpu())
    note = (
        f"denoised_difference towards '{towards}': Q'Q(m - m'), the difference of the groups' "
        "means (train split) projected on the decoder rows of latents "
        f"{', '.join(map(str, latents))} (Q an orthonormal basis of their span), which keeps "
        f"{fraction:.2f} of its norm"
    )
    return Direction(vector, latents, {"norm_kept": fraction}), [note]


Sets = list[tuple[str, str, str, tuple[int, ...]]]
"""For one SAE: (direction, group of the prompts, role, latents)."""


@dataclass(frozen=True)
class LatentSet:
    """Latents that are changed together on the prompts of one group."""

    name: str
    direction: str
    prompts: str
    role: str
    parts: tuple[tuple[LatentStatistics, tuple[int, ...]], ...]
    """Per SAE the statistics of its latents, and the latents that are changed."""
    layered: bool = False
    """Whether latents are given by layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer of each latent, part by part; empty where latents are not given by layer."""
        if not self.layered:
            return ()
        return tuple(f.hookpoint.layer for f, latents in self.parts for _ in latents)

    @property
    def written(self) -> tuple[Hookpoint, ...]:
        """Streams that are changed; empty where it is the stream of the run's own SAE."""
        return tuple(f.written for f, _ in self.parts) if self.layered else ()


def layered_sets(
    of_layer: Mapping[int, tuple[LatentStatistics, Sets]],
) -> tuple[list[LatentSet], list[str]]:
    """Per direction the latents of all layers together, then those of each layer alone.

    The latents of a layer are those that a run at this layer would change as a group. A layer that
    has none for a direction is left out of it, with a note.
    """
    parts_of: dict[tuple[str, str], dict[int, tuple[LatentStatistics, tuple[int, ...]]]] = {}
    for layer, (facts, sets) in of_layer.items():
        for direction, prompts, _, latents in sets:
            key = ("latents" if direction == "latent" else direction, prompts)
            # The group of all latents comes before single latents.
            parts_of.setdefault(key, {}).setdefault(layer, (facts, latents))
    latent_sets, notes = [], []
    for (direction, prompts), parts in parts_of.items():
        lacking = [n for n in of_layer if n not in parts]
        if lacking:
            notes.append(f"no latent for '{direction}' at layer {', '.join(map(str, lacking))}")
        together = tuple(parts.values())
        if len(parts) > 1:
            name = f"{direction}_layers_{spans(list(parts))}"
            latent_sets.append(LatentSet(name, direction, prompts, "group", together, layered=True))
        for layer, part in parts.items():
            role = "group" if len(part[1]) > 1 else "single"
            name = f"{direction}_layer_{layer}"
            latent_sets.append(LatentSet(name, direction, prompts, role, (part,), layered=True))
    return latent_sets, notes


def spans(numbers: list[int]) -> str:
    """Numbers in ascending order with runs abbreviated: 1, 2, 3, 7 as `1-3_7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "_".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
