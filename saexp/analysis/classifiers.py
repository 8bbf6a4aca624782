"""Classifiers of two groups, fitted on train rows."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.surface_baseline import ReadText, fit_surface, read_texts, token_counts
from saexp.context import progress
from saexp.data.positions import OWN_COLUMNS
from saexp.errors import ConfigError, DataError
from saexp.latents.statistics import moments
from saexp.stats.logistic_probe import Fitted, fit_logistic, folds
from saexp.stats.rank_tests import Ranked

log = logging.getLogger(__name__)


_TYPES = ("entity_type", "split", "token", "entity")
"""Columns of saexp's own that rows may be told apart by; the file's own columns all may."""


@dataclass(frozen=True)
class Labelled:
    """Rows of one split or data set: which are of the first group, and their units."""

    first: Bool[np.ndarray, " n"]
    units: Shaped[np.ndarray, " n"]
    kinds: Int[np.ndarray, " n"] | None = None
    """Number of the kind each row is of, where AUROC is also wanted over pairs of one kind."""
    judged_apart: Int[np.ndarray, " n"] | None = None
    """Rows with different numbers here were scored by different probes, and never form a pair."""

    def __len__(self) -> int:
        return len(self.first)

    def weights(self) -> Float[np.ndarray, " n"]:
        """Rows of one unit in one group share the weight 1."""
        observed = pd.factorize(self.units)[0] * 2 + self.first
        return 1 / np.bincount(observed)[observed]


def rows_of(inputs: AnalysisInputs, split: str | None) -> np.ndarray:
    """Numbers of the rows of both groups, of one split or of all."""
    rows = inputs.latents.rows
    mine = rows["group"].isin(inputs.groups).to_numpy(dtype=bool)
    if split is not None:
        mine = mine & (rows["split"] == split).fillna(False).to_numpy(dtype=bool)
    return np.flatnonzero(mine)


def labelled(
    inputs: AnalysisInputs,
    chosen: np.ndarray,
    kinds: Sequence[str] = (),
    apart: str | None = None,
) -> Labelled:
    """The rows of these numbers; their kinds are the combinations of values of the columns."""
    rows = inputs.latents.rows.iloc[chosen]
    first = (rows["group"] == inputs.groups[0]).to_numpy(dtype=bool)
    columns = [*kinds, *([apart] if apart else [])]
    return Labelled(
        first,
        rows["unit"].to_numpy(dtype=object),
        kinds_of(rows, columns) if kinds else None,
        kinds_of(rows, [apart]) if apart else None,
    )


def kind_names(rows: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """`[n]`, text: the values of the columns, joined."""
    parts = [rows[c].astype(str).to_numpy(dtype=object) for c in columns]
    return np.array([repr(values) for values in zip(*parts, strict=True)], dtype=object)


def kinds_of(rows: pd.DataFrame, columns: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Rows of equal values in the columns have equal numbers, in order of appearance."""
    return pd.factorize(kind_names(rows, columns))[0].astype(np.int64)


def column_names(name: str, value: Any) -> tuple[str, ...]:
    """Columns that the option `name` gives: one, several or none. Raises ConfigError."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    for column in listed:
        if not isinstance(column, str) or (column in OWN_COLUMNS and column not in _TYPES):
            raise ConfigError(
                f"analyzer.{name}={value}: type a column that rows are told apart by, such "
                "as entity_type, or one of the data's own"
            )
    return tuple(listed)


def check_columns(rows: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    """Raise ConfigError for a column that the rows lack."""
    for column in columns:
        if column not in rows or rows[column].isna().all():
            may = [c for c in rows.columns if c == "entity_type" or c not in OWN_COLUMNS]
            there = ", ".join(c for c in may if rows[c].notna().any()) or "none"
            raise ConfigError(f"{where} has no values in a column '{column}'; it has {there}")


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


@dataclass(frozen=True)
class Fitting:
    """How probes are fitted."""

    sizes: list[int]
    """Numbers of latents of the sparse probes, ascending."""
    strengths: list[float]
    """Inverse L2 penalties that cross-validation chooses from."""
    within: tuple[str, ...]
    """Columns of the kind that `base_rate` knows and `best_latent_within` is chosen within; no such
    probes without."""
    seed: int

    def fit(
        self, inputs: AnalysisInputs, train: np.ndarray, notes: list[str]
    ) -> tuple[list[Probe], pd.DataFrame]:
        """Probes in the order of the tables, and the latents of the largest sparse one."""
        rows = labelled(inputs, train)
        values = sparse.csr_array(inputs.latents.csr[train])
        first, second = (moments(values, m, threshold=0.0) for m in (rows.first, ~rows.first))
        difference = np.abs(first.mean - second.mean)
        aurocs = Ranked(values, rows.first).observed()
        order = np.argsort(-difference, kind="stable")
        order = order[difference[order] > 0]
        if not len(order):
            raise DataError(
                "every latent has the same mean in both groups on the train split, so there is "
                "nothing to probe; does any latent fire at these positions?"
            )
        best = int(np.argmax(np.abs(aurocs - 0.5)))
        pairs = folds(rows.first, rows.units, self.seed)
        sizes = sorted({min(k, len(order)) for k in self.sizes})
        if sizes != self.sizes:
            _once(notes, f"only {len(order)} latents differ on train, so no probe is larger")
        dense = read_acts(inputs, train)
        probes = []
        with progress(len(sizes) + 1, "fitting probes", "probe") as bar:
            for k in sizes:
                read = latents_reader(order[:k])
                fitted = fit_logistic(read(inputs, train), rows.first, self.strengths, pairs)
                chosen = tuple(order[:k].tolist())
                probes.append(Probe(f"sparse_{k}", read, fitted.score, 0.0, chosen, fitted))
                bar.update(1)
            fitted = fit_logistic(dense, rows.first, self.strengths, pairs)
            probes.append(Probe("dense", read_acts, fitted.score, fitted=fitted))
            bar.update(1)
        if inputs.texts:
            probes.append(surface_probe(inputs, train, rows, self.seed))
        slow = [p.name for p in probes if p.fitted is not None and not p.fitted.converged]
        if slow:
            _once(notes, f"logistic regression did not fully converge for {', '.join(slow)}")
        probes += [
            mean_difference(dense, rows),
            single_latent(values, rows, best, up=bool(aurocs[best] >= 0.5)),
            majority(rows),
        ]
        if self.within:
            kinds = kinds_of(inputs.latents.rows.iloc[train], self.within)
            aurocs_within = auroc_within(values, rows.first, kinds)
            chosen = int(np.argmax(np.abs(aurocs_within - 0.5)))
            up = bool(aurocs_within[chosen] >= 0.5)
            single = single_latent(values, rows, chosen, up=up)
            probes += [
                replace(single, name="best_latent_within"),
                base_rate(inputs, train, self.within),
            ]
        largest = sizes[-1]
        weights = {p.name: p.fitted.weights for p in probes if p.fitted is not None}
        table = pd.DataFrame(
            {
                "rank": np.arange(1, largest + 1),
                "latent": order[:largest],
                f"mean_{inputs.groups[0]}": first.mean[order[:largest]],
                f"mean_{inputs.groups[1]}": second.mean[order[:largest]],
                "auroc": aurocs[order[:largest]],
                "weight": weights[f"sparse_{largest}"],
            }
        )
        log.info("fitted %d probes on %d rows", len(probes), len(train))
        return probes, table

    def unseen(
        self,
        inputs: AnalysisInputs,
        train: np.ndarray,
        test: np.ndarray,
        column: str,
        notes: list[str],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Test rows, and their scores less the cut, by probes fitted on other values of `column`.

        Values that train or test lack a group in, or whose others do, are counted in a note.
        """
        names = kind_names(inputs.latents.rows, [column])
        rows, scores, without = [], [], []
        for value in dict.fromkeys(names[test]):
            mine, others = test[names[test] == value], train[names[train] != value]
            if not all(_both_groups(inputs, part) for part in (mine, others)):
                without.append(value)
                continue
            probes, _ = self.fit(inputs, others, notes)
            rows.append(mine)
            scores.append({p.name: p.scores(inputs, mine) - p.threshold for p in probes})
        if not rows:
            raise DataError(
                f"analyzer.unseen={column}: no value of it has both groups on the "
                "test split while the others have two units of each on the train split"
            )
        if without:
            notes.append(
                f"unseen {column}: {len(without)} values left out, a group is too small "
                "there or among the others"
            )
        everywhere = set.intersection(*(set(s) for s in scores))
        joined = {p: np.concatenate([s[p] for s in scores]) for p in scores[0] if p in everywhere}
        return np.concatenate(rows), joined


def _once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _both_groups(inputs: AnalysisInputs, chosen: np.ndarray) -> bool:
    rows = labelled(inputs, chosen)
    return all(len(np.unique(rows.units[rows.first == group])) >= 2 for group in (True, False))
