"""Values of latents, groups and streams on the train split, and directions made of them."""

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
        from saexp.stats.logistic_probe import MAX_TRAIN, STRENGTHS, fit_logistic, folds, limited

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


Sets = list[tuple[str, str, str, tuple[int, ...]]]
"""Of one SAE: (direction, group of the prompts, role, latents)."""


@dataclass(frozen=True)
class LatentSet:
    """Latents that are changed together on the prompts of one group."""

    name: str
    direction: str
    prompts: str
    role: str
    parts: tuple[tuple[LatentFacts, tuple[int, ...]], ...]
    """Per SAE what is known of its latents, and those that are changed."""
    layered: bool = False
    """Whether latents are named by layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer of each latent, part by part; none where latents are not named by layer."""
        if not self.layered:
            return ()
        return tuple(f.hookpoint.layer for f, latents in self.parts for _ in latents)

    @property
    def written(self) -> tuple[Hookpoint, ...]:
        """Streams that are changed; none where that is the run's own SAE's."""
        return tuple(f.written for f, _ in self.parts) if self.layered else ()


def layered_sets(
    of_layer: Mapping[int, tuple[LatentFacts, Sets]],
) -> tuple[list[LatentSet], list[str]]:
    """Per direction the latents of all layers together, then each layer's alone.

    Latents of one layer are those that its own SAE's test would change as a group. A layer that has
    none for a direction is left out there, with a note.
    """
    found: dict[tuple[str, str], dict[int, tuple[LatentFacts, tuple[int, ...]]]] = {}
    for layer, (facts, sets) in of_layer.items():
        for direction, prompts, _, latents in sets:
            key = ("latents" if direction == "latent" else direction, prompts)
            # Together they come before each by itself.
            found.setdefault(key, {}).setdefault(layer, (facts, latents))
    made, notes = [], []
    for (direction, prompts), parts in found.items():
        lacking = [n for n in of_layer if n not in parts]
        if lacking:
            notes.append(f"no latent for '{direction}' at layer {', '.join(map(str, lacking))}")
        together = tuple(parts.values())
        if len(parts) > 1:
            name = f"{direction}_layers_{spans(list(parts))}"
            made.append(LatentSet(name, direction, prompts, "group", together, layered=True))
        for layer, part in parts.items():
            role = "group" if len(part[1]) > 1 else "single"
            name = f"{direction}_layer_{layer}"
            made.append(LatentSet(name, direction, prompts, role, (part,), layered=True))
    return made, notes


def spans(numbers: list[int]) -> str:
    """Numbers in rising order, neighbours drawn together: 1, 2, 3, 7 as `1-3_7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "_".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
