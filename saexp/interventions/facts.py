"""What edits need to know of latents, groups and the stream; measured on the train split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.errors import InterventionError
from saexp.interventions.ops import Op
from saexp.models.hookpoints import Hookpoint
from saexp.saes.base import SparseAutoencoder


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

    @property
    def label(self) -> str:
        """Its latents as tables name them: `12+77`, of several layers `1:12+2:53`."""
        if not self.layers:
            return "+".join(map(str, self.latents))
        return "+".join(f"{n}:{f}" for n, f in zip(self.layers, self.latents, strict=True))

    def ops(self, example_id: str, at: int) -> tuple[Op, ...] | None:
        """Operations at a coefficient; None where this prompt has none of its own."""
        if self.per_prompt:
            return self.per_prompt[example_id][at] if example_id in self.per_prompt else None
        return self.edits[at] if self.edits else ()


@dataclass(frozen=True)
class LatentFacts:
    """One row per latent that fired: `table`.

    Columns latent, direction, selected, rank, frequency, norm (of the decoder row), q_value,
    max_act, p99_act, and mean_<group>.
    """

    table: pd.DataFrame
    groups: tuple[str, ...]
    median_norm: float
    """Median norm of the written stream at the ordinary ones of the analysed rows."""
    alpha: float
    directions: Callable[[Sequence[int]], Tensor]
    """Latents -> `[n, d]`, what one unit of each adds to the stream (`sae.directions`)."""
    hookpoint: Hookpoint
    """What the SAE reads."""
    written: Hookpoint
    """What edits change: the same, or a transcoder's output."""
    stream: Callable[[], tuple[Float[np.ndarray, "n d"], np.ndarray]] | None = None
    """Train split: stored activations of the written stream, and each row's group."""
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
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        if self.stream is None or len(self.groups) != 2:
            raise InterventionError(
                "directions of the stream itself need a data set with two groups; "
                "type 'intervention.directions=[latents]'"
            )
        return self.stream()

    def group_mean(self, group: str) -> Tensor:
        """`[d]`: mean of the stream over the group's rows."""
        acts, labels = self._rows
        return torch.from_numpy(acts[labels == group].mean(0, dtype=np.float64)).float()

    def mean_difference(self, towards: str) -> Tensor:
        """`[d]`: mean of the group minus mean of the other one."""
        return self.group_mean(towards) - self.group_mean(self.other(towards))

    @cached_property
    def probe_direction(self) -> Tensor:
        """`[d]`, unit: weights of a logistic probe for the first group (L2, C by 5-fold search)."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.preprocessing import StandardScaler

        acts, labels = self._rows
        scaler = StandardScaler().fit(acts)
        strengths = {"C": np.logspace(-4, 2, 7).tolist()}
        search = GridSearchCV(
            LogisticRegression(max_iter=2000), strengths, cv=5, scoring="neg_log_loss"
        )
        search.fit(scaler.transform(acts), labels == self.groups[0])
        probe = search.best_estimator_
        weights = torch.from_numpy(probe.coef_[0] / scaler.scale_).float()
        return weights / weights.norm()

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
