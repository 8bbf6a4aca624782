"""Classifiers of two groups, fitted on train rows.

Shapes: n rows, d numbers a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.probe_rows import Labelled, kind_names, labelled
from saexp.analysis.statistics import Ranked
from saexp.analysis.surface import ReadText, fit_surface, read_texts, token_counts
from saexp.probes import Fitted

CHUNK = 8192
"""Rows scored at once."""


def threshold_of_best_accuracy(scores: np.ndarray, first: Bool[np.ndarray, " n"]) -> float:
    """Where to cut so that most rows are right, between two neighbouring scores."""
    values, inverse = np.unique(scores, return_inverse=True)
    of_first = np.bincount(inverse, weights=first, minlength=len(values))
    of_second = np.bincount(inverse, weights=~first, minlength=len(values))
    # Right with the cut below value i: the second group before it, the first group from it on.
    right = np.append(0, np.cumsum(of_second)) + np.append(np.cumsum(of_first[::-1])[::-1], 0)
    cut = int(right.argmax())
    if cut == 0:
        return float(values[0]) - 1.0
    if cut == len(values):
        return float(values[-1])
    return float(values[cut - 1] + values[cut]) / 2


Read = Callable[[AnalysisInputs, np.ndarray], Any]
"""Inputs of a probe for some rows: (data, row numbers) -> `[n, d]`, or texts of the surface one."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe under its name in tables and metrics."""

    name: str
    read: Read
    score: Callable[[Any], np.ndarray]
    threshold: float = 0.0
    latents: tuple[int, ...] = ()
    fitted: Fitted | None = None

    def scores(self, inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        """`[n]`, a chunk of rows at a time."""
        parts = [
            self.score(self.read(inputs, rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)
        ]
        return np.concatenate(parts).astype(np.float64)


def read_acts(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
    """`[n, d_in]`, float32: the stored activations."""
    assert inputs.acts is not None
    chosen = inputs.acts[torch.from_numpy(rows)]
    return chosen.reshape(len(chosen), -1).float().cpu().numpy()


def latents_reader(latents: np.ndarray) -> Read:
    """Reads these latents, `[n, k]`."""

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        part = sparse.csr_array(inputs.latents.csr[rows])
        return np.asarray(part[:, latents].todense(), dtype=np.float64)

    return read


def mean_difference(dense: np.ndarray, rows: Labelled) -> Probe:
    """Projection on the difference of the groups' means, cut midway."""
    first, second = (dense[m].mean(0, dtype=np.float64) for m in (rows.first, ~rows.first))
    direction = first - second
    return Probe(
        "mean_difference",
        read_acts,
        lambda x: x @ direction,
        threshold=float((first + second) @ direction / 2),
    )


def single_latent(values: sparse.csr_array, rows: Labelled, latent: int, *, up: bool) -> Probe:
    """One latent's value as it is (`up`: large in the first group), cut where accuracy is best."""
    sign = 1.0 if up else -1.0
    scores = sign * np.asarray(values[:, [latent]].todense(), dtype=np.float64)[:, 0]
    return Probe(
        "best_latent",
        latents_reader(np.array([latent])),
        lambda x: sign * x[:, 0],
        threshold=threshold_of_best_accuracy(scores, rows.first),
        latents=(latent,),
    )


def base_rate(inputs: AnalysisInputs, chosen: np.ndarray, columns: Sequence[str]) -> Probe:
    """What a row's kind says alone: the first group's share among train rows of that kind.

    A kind is a combination of values of the columns; one that train lacks gets the share of all.
    """

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        return kind_names(inputs.latents.rows.iloc[rows], columns)

    first = labelled(inputs, chosen).first
    share = pd.Series(first.astype(float)).groupby(read(inputs, chosen)).mean().to_dict()
    overall = float(first.mean())

    def score(names: np.ndarray) -> np.ndarray:
        return np.array([share.get(name, overall) for name in names])

    return Probe("base_rate", read, score, threshold=0.5)


def surface_probe(inputs: AnalysisInputs, chosen: np.ndarray, rows: Labelled, seed: int) -> Probe:
    """The surface baseline: what the text alone says, without the model."""

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> list[ReadText]:
        return read_texts(inputs.latents.rows.iloc[rows], inputs.texts)

    counts = token_counts(inputs.neutral_texts)
    made = fit_surface(read(inputs, chosen), rows.first, rows.units, counts, seed)
    return Probe("surface", read, made.score, fitted=made.fitted)


def auroc_within(
    values: sparse.csr_array, first: Bool[np.ndarray, " n"], kinds: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " d"]:
    """AUROC of every latent over pairs of rows of one kind; 0.5 where there is no such pair."""
    n_latents = len(sparse.csc_array(values).indptr) - 1
    won, pairs = np.zeros(n_latents), 0
    for kind in np.unique(kinds):
        mine = np.flatnonzero(kinds == kind)
        n = int(first[mine].sum()) * int((~first[mine]).sum())
        if n:
            won += n * Ranked(sparse.csr_array(values[mine]), first[mine]).observed()
            pairs += n
    return won / pairs if pairs else np.full(n_latents, 0.5)


def majority(rows: Labelled) -> Probe:
    """Calls every row the group that has more units on train, the first where neither has."""
    weights = rows.weights()
    score = 1.0 if weights[rows.first].sum() >= weights[~rows.first].sum() else -1.0
    return Probe("majority", lambda _, numbers: numbers, lambda x: np.full(len(x), score))


def roc(scores: np.ndarray, first: Bool[np.ndarray, " n"], n_points: int = 201) -> np.ndarray:
    """`[n, 2]` false and true positive rates from (0, 0) to (1, 1), thinned to about `n_points`."""
    values, inverse = np.unique(-scores, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, weights=first, minlength=len(values)))
    false = np.cumsum(np.bincount(inverse, weights=~first, minlength=len(values)))
    points = np.stack([np.append(0, false / false[-1]), np.append(0, hits / hits[-1])], axis=1)
    if len(points) <= n_points:
        return points
    return points[np.unique(np.linspace(0, len(points) - 1, n_points).round().astype(int))]
