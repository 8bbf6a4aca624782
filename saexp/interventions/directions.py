"""Directions that steer, and latents matched to the selected ones as controls."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.errors import InterventionError
from saexp.models import Hookpoint
from saexp.saes import SparseAutoencoder
from saexp.stats.significance import random_directions

if TYPE_CHECKING:
    from saexp.stats.separation import Fitted


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
        from saexp.stats.separation import MAX_TRAIN, STRENGTHS, fit_logistic, folds, limited

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


@dataclass(frozen=True)
class ControlSet:
    """Control latents, one for each latent of the condition."""

    latents: tuple[int, ...]
    frequency_ratio: float
    """Geometric mean of the members' frequencies over those of the latents; NaN where a latent is
    never active."""
    matched: bool
    """Whether every member is within the caliper."""


class _Candidates:
    """Log ratios of frequencies, `[k, n]`, of candidates to each latent of a set."""

    def __init__(
        self, table: pd.DataFrame, latents: tuple[int, ...], avoid: Collection[int]
    ) -> None:
        usable = (table["frequency"] > 0) & ~table["latent"].isin([*latents, *avoid])
        self.latents: Int[np.ndarray, " n"] = table.loc[usable, "latent"].to_numpy(dtype=np.int64)
        frequency = table.loc[usable, "frequency"].to_numpy(dtype=float)
        target_frequency = (
            table.set_index("latent").loc[list(latents), "frequency"].to_numpy(dtype=float)
        )
        self.log_ratios: Float[np.ndarray, "k n"] = np.log(frequency) - np.log(
            target_frequency.clip(min=1e-12)
        ).reshape(-1, 1)
        self.own_active = bool((target_frequency > 0).all())

    def control_set(self, members: Sequence[int], caliper: float) -> ControlSet:
        """The set of these candidates, one for each latent in order."""
        logs = self.log_ratios[range(len(members)), list(members)]
        return ControlSet(
            latents=tuple(int(self.latents[i]) for i in members),
            frequency_ratio=float(np.exp(logs.mean())) if self.own_active else float("nan"),
            matched=bool((np.abs(logs) <= math.log(caliper) + 1e-9).all()),
        )


def frequency_matched(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    n_least: int,
    caliper: float,
    seed: int,
    avoid: Collection[int] = (),
    uses: Counter[int] | None = None,
) -> list[ControlSet]:
    """At most `n` sets whose members' frequencies are within a factor `caliper` of the latents'.

    Within the caliper, candidates that the fewest conditions use (`uses`, which is updated) come
    first; among these the nearest for a single latent, a random order for several. If there are
    fewer than `n_least` sets, the nearest ones outside the caliper are added with `matched` false.
    `table` has the columns latent and frequency. Decoder norms are not matched, because added
    vectors are rescaled to equal norm.
    """
    candidates = _Candidates(table, latents, avoid)
    distance = np.abs(candidates.log_ratios)
    inside = distance <= math.log(caliper) + 1e-9
    used = np.array([(uses or {}).get(int(f), 0) for f in candidates.latents])
    ties = np.random.default_rng(seed).random(distance.shape)
    near = distance if len(latents) == 1 else np.where(inside, 0.0, distance)
    orders = [
        np.lexsort((tie, d, np.where(i, used, 0), ~i))
        for tie, d, i in zip(ties, near, inside, strict=True)
    ]
    sets = [candidates.control_set(m, caliper) for m in _one_of_each(orders, n)]
    matched = [s for s in sets if s.matched]
    others = [s for s in sets if not s.matched]
    if uses is not None:
        uses.update(f for s in matched for f in s.latents)
    return matched + others[: max(n_least - len(matched), 0)]


def any_active(
    table: pd.DataFrame,
    latents: tuple[int, ...],
    n: int,
    *,
    seed: int,
    avoid: Collection[int] = (),
) -> list[ControlSet]:
    """A seeded choice of at most `n` sets of candidates of any frequency."""
    candidates = _Candidates(table, latents, avoid)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(candidates.latents)) for _ in latents]
    return [candidates.control_set(m, math.inf) for m in _one_of_each(orders, n)]


def _one_of_each(orders: Sequence[Int[np.ndarray, " n"]], n: int) -> list[tuple[int, ...]]:
    """At most `n` sets of different candidates, one from each order, the first candidates first.

    No candidate occurs twice in the same position; otherwise sets that share the member with the
    largest weight would count as independent comparisons.
    """
    queues = [order.tolist() for order in orders]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < n:
        members: list[int] = []
        for queue in queues:
            usable = next((i for i in queue if i not in members), None)
            if usable is None:
                return chosen
            queue.remove(usable)
            members.append(usable)
        chosen.append(tuple(members))
    return chosen


_MOST_ROUNDS = 8
"""Maximum number of measurements of an edit; it ends once the edit is within the caliper."""
_LARGEST_STEP = math.log(6)
"""Largest step of one round, of the log scale."""
_LARGEST_SCALE = math.log(1000)
_FLAT = 0.25
"""Lower bound of the slope of log KL against log scale; for small edits the slope is 2."""
_N_FIRST = 6
"""Edits of a kind whose scales are determined first, as starting points for the others."""
Measure = Callable[[Sequence[int], Sequence[float]], Float[np.ndarray, " m"]]
"""(indices of edits, scales) -> KL of each."""


@dataclass(frozen=True)
class Scales:
    """Per edit the scale whose KL is nearest to its target."""

    scales: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    matched: Bool[np.ndarray, " n"]
    """Whether KL and target differ by at most the caliper's factor."""


def equal_kl_scales(
    measure: Measure,
    target: Float[np.ndarray, " n"],
    caliper: float,
    alike: Sequence[Hashable] = (),
) -> Scales:
    """Scales at which the KL of each of n edits is its target, within a factor `caliper`.

    `measure(which, scales)` gives the KL of some edits, by index. All unmatched edits are measured
    together: first at scale 1, then where the secant of log KL against log scale (initial slope 2,
    as for small edits) meets the target, within the current bracket. Among edits with equal
    `alike`, a few are solved first, and the others start from their median scale and slope. An edit
    whose target is 0, or that cannot reach it, stays unmatched.
    """
    search = _Search(measure, target, caliper)
    families: dict[Hashable, list[int]] = {}
    for i in np.flatnonzero(np.isfinite(search.goal)).tolist():
        families.setdefault(alike[i] if alike else i, []).append(i)
    search.run([i for some in families.values() for i in some[:_N_FIRST]])
    for some in families.values():
        search.start_from(some[:_N_FIRST], some[_N_FIRST:])
    search.run([i for some in families.values() for i in some[_N_FIRST:]])
    return Scales(np.exp(search.best_at), search.best_kl, search.best_gap <= math.log(caliper))


class _Search:
    """The search of every edit; positions and goals are logarithms."""

    def __init__(self, measure: Measure, target: Float[np.ndarray, " n"], caliper: float) -> None:
        n = len(target)
        self.measure, self.within = measure, math.log(caliper)
        with np.errstate(divide="ignore"):
            self.goal = np.log(target)
        self.at, self.slope = np.zeros(n), np.full(n, 2.0)
        self.low, self.high = np.full(n, -_LARGEST_SCALE), np.full(n, _LARGEST_SCALE)
        self.last_at, self.last_log = np.full(n, np.nan), np.full(n, np.nan)
        self.best_at, self.best_kl = np.zeros(n), np.full(n, np.nan)
        self.best_gap = np.full(n, np.inf)

    def start_from(self, first: Sequence[int], others: Sequence[int]) -> None:
        """Start other edits from the medians of those that were solved first."""
        if others:
            self.at[others] = np.median(self.best_at[first])
            self.slope[others] = np.median(self.slope[first])

    def run(self, which: Sequence[int]) -> None:
        """Measure edits until each is matched, at most _MOST_ROUNDS times."""
        for _ in range(_MOST_ROUNDS):
            if not which:
                return
            kl = self.measure(which, np.exp(self.at[which]).tolist())
            for i, value in zip(which, kl.tolist(), strict=True):
                self._take(i, value)
            which = [i for i in which if self.best_gap[i] > self.within]

    def _take(self, i: int, kl: float) -> None:
        """Record a measured KL and determine the next scale of the edit."""
        at, log_kl = self.at[i], math.log(max(kl, 1e-12))
        gap = log_kl - self.goal[i]
        if abs(gap) < self.best_gap[i]:
            self.best_at[i], self.best_kl[i], self.best_gap[i] = at, kl, abs(gap)
        if gap < 0:
            self.low[i] = max(self.low[i], at)
        else:
            self.high[i] = min(self.high[i], at)
        if abs(at - self.last_at[i]) > 1e-9:
            slope = (log_kl - self.last_log[i]) / (at - self.last_at[i])
            self.slope[i] = max(slope, _FLAT)
        self.last_at[i], self.last_log[i] = at, log_kl
        following = at + float(np.clip(-gap / self.slope[i], -_LARGEST_STEP, _LARGEST_STEP))
        if not self.low[i] < following < self.high[i]:
            following = (self.low[i] + self.high[i]) / 2
        self.at[i] = following
