"""Probes and baselines that classify rows into two groups, fitted on train rows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.analysis import AnalysisInputs
from saexp.analysis.contrast_checks import ReadText, fit_surface, read_texts, token_counts
from saexp.context import progress
from saexp.data.rows import ROW_COLUMNS
from saexp.errors import ConfigError, DataError, counted
from saexp.latents.statistics import moments
from saexp.stats.separation import Fitted, Ranked, fit_logistic, folds

log = logging.getLogger(__name__)


_TYPES = ("entity_type", "split", "token", "entity")
"""Columns of saexp that may define kinds of rows, beside all columns of the user's data."""


@dataclass(frozen=True)
class Labelled:
    """Labels of the rows of one split or data set: group, unit and kind."""

    first: Bool[np.ndarray, " n"]
    units: Shaped[np.ndarray, " n"]
    kinds: Int[np.ndarray, " n"] | None = None
    """Kind of each row as a number; None where no AUROC within kinds is computed."""
    judged_apart: Int[np.ndarray, " n"] | None = None
    """Rows with different numbers were scored by different probes and are never compared."""

    def __len__(self) -> int:
        return len(self.first)

    def permuted(self, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
        """`first` permuted between units; the rows of a unit in one group keep a common label."""
        observation = pd.factorize(self.units)[0] * 2 + self.first
        _, first_row, of_row = np.unique(observation, return_index=True, return_inverse=True)
        return rng.permutation(self.first[first_row])[of_row]

    def weights(self) -> Float[np.ndarray, " n"]:
        """Weights of the rows; those of one unit in one group sum to 1."""
        observation = pd.factorize(self.units)[0] * 2 + self.first
        return 1 / np.bincount(observation)[observation]


def rows_of(inputs: AnalysisInputs, split: str | None) -> np.ndarray:
    """Indices of the rows of both groups, in one split or (None) in all."""
    rows = inputs.latents.rows
    chosen = rows["group"].isin(inputs.groups).to_numpy(dtype=bool)
    if split is not None:
        chosen = chosen & (rows["split"] == split).fillna(False).to_numpy(dtype=bool)
    return np.flatnonzero(chosen)


def labelled(
    inputs: AnalysisInputs,
    chosen: np.ndarray,
    kinds: Sequence[str] = (),
    apart: str | None = None,
) -> Labelled:
    """Labels of the chosen rows; a kind is a combination of values of the columns `kinds`."""
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
    """`[n]` strings: the values of the columns, joined."""
    parts = [rows[c].astype(str).to_numpy(dtype=object) for c in columns]
    return np.array([repr(values) for values in zip(*parts, strict=True)], dtype=object)


def kinds_of(rows: pd.DataFrame, columns: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Kinds as numbers, in order of appearance; rows with equal values have equal numbers."""
    return pd.factorize(kind_names(rows, columns))[0].astype(np.int64)


def column_names(name: str, value: Any) -> tuple[str, ...]:
    """Columns given by the option `name`: one, several or none. Raises ConfigError."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    for column in listed:
        if not isinstance(column, str) or (column in ROW_COLUMNS and column not in _TYPES):
            raise ConfigError(
                f"analyzer.{name}={value}: type a column that groups rows by kind, such as "
                "entity_type or a column of your data"
            )
    return tuple(listed)


def check_columns(rows: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    """Raise ConfigError for a column that does not exist or has no values."""
    for column in columns:
        if column not in rows or rows[column].isna().all():
            allowed = [c for c in rows.columns if c == "entity_type" or c not in ROW_COLUMNS]
            listed = ", ".join(c for c in allowed if rows[c].notna().any()) or "none"
            raise ConfigError(f"{where} has no values in column '{column}'; it has {listed}")


CHUNK = 8192
"""Rows of one chunk of scoring."""


def threshold_of_best_accuracy(scores: np.ndarray, first: Bool[np.ndarray, " n"]) -> float:
    """Threshold with the best accuracy, halfway between two neighbouring scores."""
    values, inverse = np.unique(scores, return_inverse=True)
    of_first = np.bincount(inverse, weights=first, minlength=len(values))
    of_second = np.bincount(inverse, weights=~first, minlength=len(values))
    # Number of correct rows with the threshold below value i.
    n_correct = np.append(0, np.cumsum(of_second)) + np.append(np.cumsum(of_first[::-1])[::-1], 0)
    cut = int(n_correct.argmax())
    if cut == 0:
        return float(values[0]) - 1.0
    if cut == len(values):
        return float(values[-1])
    return float(values[cut - 1] + values[cut]) / 2


Read = Callable[[AnalysisInputs, np.ndarray], Any]
"""Inputs of a probe: (data, row indices) -> `[n, d]`, or texts for the surface baseline."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe; `name` is used in tables and metrics."""

    name: str
    read: Read
    score: Callable[[Any], np.ndarray]
    threshold: float = 0.0
    latents: tuple[int, ...] = ()
    fitted: Fitted | None = None

    def scores(self, inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        """Scores `[n]` of these rows, computed in chunks."""
        parts = [
            self.score(self.read(inputs, rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)
        ]
        return np.concatenate(parts).astype(np.float64)


def read_acts(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
    """Stored activations `[n, d_in]`, float32."""
    assert inputs.acts is not None
    chosen = inputs.acts[torch.from_numpy(rows)]
    return chosen.reshape(len(chosen), -1).float().cpu().numpy()


def latents_reader(latents: np.ndarray) -> Read:
    """A reader of the activations `[n, k]` of these latents."""

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        part = sparse.csr_array(inputs.latents.csr[rows])
        return np.asarray(part[:, latents].todense(), dtype=np.float64)

    return read


def mean_difference(dense: np.ndarray, rows: Labelled) -> Probe:
    """Projection on the difference of the groups' means, with the threshold halfway."""
    first, second = (dense[m].mean(0, dtype=np.float64) for m in (rows.first, ~rows.first))
    direction = first - second
    return Probe(
        "mean_difference",
        read_acts,
        lambda x: x @ direction,
        threshold=float((first + second) @ direction / 2),
    )


def single_latent(values: sparse.csr_array, rows: Labelled, latent: int, *, up: bool) -> Probe:
    """The activation of one latent (`up`: larger in the first group), with the threshold of best
    train accuracy."""
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
    """Predict from the kind of a row alone: the fraction of the first group among its train rows.

    A kind is a combination of values of the columns. Kinds that are missing in train get the
    fraction among all train rows.
    """

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> np.ndarray:
        return kind_names(inputs.latents.rows.iloc[rows], columns)

    first = labelled(inputs, chosen).first
    rates = pd.Series(first.astype(float)).groupby(read(inputs, chosen)).mean().to_dict()
    overall = float(first.mean())

    def score(names: np.ndarray) -> np.ndarray:
        return np.array([rates.get(name, overall) for name in names])

    return Probe("base_rate", read, score, threshold=0.5)


def surface_probe(inputs: AnalysisInputs, chosen: np.ndarray, rows: Labelled, seed: int) -> Probe:
    """The surface baseline: a probe of the text alone, without the model."""

    def read(inputs: AnalysisInputs, rows: np.ndarray) -> list[ReadText]:
        return read_texts(inputs.latents.rows.iloc[rows], inputs.texts)

    counts = token_counts(inputs.neutral_texts)
    texts = read(inputs, chosen)
    baseline = fit_surface(texts, rows.first, rows.units, counts, seed, inputs.objects)
    return Probe("surface", read, baseline.score, fitted=baseline.fitted)


def auroc_within(
    values: sparse.csr_array, first: Bool[np.ndarray, " n"], kinds: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " d"]:
    """AUROC of every latent over pairs of rows of the same kind; 0.5 without such pairs."""
    n_latents = len(sparse.csc_array(values).indptr) - 1
    n_ordered, n_pairs = np.zeros(n_latents), 0
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        n = int(first[rows].sum()) * int((~first[rows]).sum())
        if n:
            n_ordered += n * Ranked(sparse.csr_array(values[rows]), first[rows]).observed()
            n_pairs += n
    return n_ordered / n_pairs if n_pairs else np.full(n_latents, 0.5)


def majority(rows: Labelled) -> Probe:
    """Predict the group with more train units for every row; the first group in case of a tie."""
    weights = rows.weights()
    score = 1.0 if weights[rows.first].sum() >= weights[~rows.first].sum() else -1.0
    return Probe("majority", lambda _, numbers: numbers, lambda x: np.full(len(x), score))


def roc(scores: np.ndarray, first: Bool[np.ndarray, " n"], n_points: int = 201) -> np.ndarray:
    """`[n, 2]` false and true positive rates from (0, 0) to (1, 1), about `n_points` at most."""
    values, inverse = np.unique(-scores, return_inverse=True)
    hits = np.cumsum(np.bincount(inverse, weights=first, minlength=len(values)))
    false = np.cumsum(np.bincount(inverse, weights=~first, minlength=len(values)))
    points = np.stack([np.append(0, false / false[-1]), np.append(0, hits / hits[-1])], axis=1)
    if len(points) <= n_points:
        return points
    return points[np.unique(np.linspace(0, len(points) - 1, n_points).round().astype(int))]


@dataclass(frozen=True)
class Fitting:
    """Settings with which probes are fitted."""

    sizes: list[int]
    """Numbers of latents of the sparse probes, ascending."""
    strengths: list[float]
    """Inverse L2 penalties among which cross-validation chooses."""
    within: tuple[str, ...]
    """Columns that define the kinds for `base_rate` and `best_latent_within`; without columns these
    two probes are not fitted."""
    seed: int

    def fit(
        self, inputs: AnalysisInputs, train: np.ndarray
    ) -> tuple[list[Probe], pd.DataFrame, list[str]]:
        """(probes in the order of the tables, latents of the largest sparse probe, notes)."""
        notes = []
        rows = labelled(inputs, train)
        values = sparse.csr_array(inputs.latents.csr[train])
        first, second = (moments(values, m, threshold=0.0) for m in (rows.first, ~rows.first))
        difference = np.abs(first.mean - second.mean)
        aurocs = Ranked(values, rows.first).observed()
        order = np.argsort(-difference, kind="stable")
        order = order[difference[order] > 0]
        if not len(order):
            raise DataError(
                "every latent has the same mean in both groups on the train split, so no probe can "
                "be fitted; check that latents are active at these positions"
            )
        best = int(np.argmax(np.abs(aurocs - 0.5)))
        pairs = folds(rows.first, rows.units, self.seed)
        sizes = sorted({min(k, len(order)) for k in self.sizes})
        if sizes != self.sizes:
            notes.append(
                f"sparse probes have at most {len(order)} latents: the means of the others are "
                "equal in both groups on the train split"
            )
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
        unconverged = [p.name for p in probes if p.fitted is not None and not p.fitted.converged]
        if unconverged:
            notes.append(f"logistic regression did not fully converge for {', '.join(unconverged)}")
        probes += [
            mean_difference(dense, rows),
            single_latent(values, rows, best, up=bool(aurocs[best] >= 0.5)),
            majority(rows),
        ]
        if self.within:
            probes += self._within_kinds(inputs, train, values, rows)
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
        return probes, table, notes

    def permuted(
        self, inputs: AnalysisInputs, train: np.ndarray, test: np.ndarray, n: int
    ) -> Iterator[tuple[Bool[np.ndarray, " n_test"], Float[np.ndarray, " n_test"]]]:
        """(labels, scores) of the test rows, `n` times, with the labels of each split permuted.

        The scores are those of the dense probe fitted to the permuted train labels. Labels of both
        splits are permuted, as only then nothing is to be found: a probe of permuted train labels
        alone may by chance point along or against the direction of the groups. They are permuted
        between units, so that the rows of one keep a common label; the penalty is chosen anew.
        """
        splits = [labelled(inputs, chosen) for chosen in (train, test)]
        dense, dense_test = (read_acts(inputs, chosen) for chosen in (train, test))
        rng = np.random.default_rng([self.seed, 71])
        with progress(n, "fitting probes to permuted labels", "probe") as bar:
            for _ in range(n):
                first, first_of_test = (rows.permuted(rng) for rows in splits)
                pairs = folds(first, splits[0].units, self.seed)
                fitted = fit_logistic(dense, first, self.strengths, pairs)
                yield first_of_test, fitted.score(dense_test)
                bar.update(1)

    def _within_kinds(
        self, inputs: AnalysisInputs, train: np.ndarray, values: sparse.csr_array, rows: Labelled
    ) -> list[Probe]:
        """The probes `best_latent_within` and `base_rate`."""
        kinds = kinds_of(inputs.latents.rows.iloc[train], self.within)
        aurocs = auroc_within(values, rows.first, kinds)
        best = int(np.argmax(np.abs(aurocs - 0.5)))
        single = single_latent(values, rows, best, up=bool(aurocs[best] >= 0.5))
        return [
            replace(single, name="best_latent_within"),
            base_rate(inputs, train, self.within),
        ]

    def unseen(
        self,
        inputs: AnalysisInputs,
        train: np.ndarray,
        test: np.ndarray,
        column: str,
    ) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
        """(test rows, their scores minus the threshold per probe, notes).

        Every row is scored by probes fitted on train rows with other values of `column`. Values for
        which a group has fewer than two units, on the test split or among these train rows, are
        left out and counted in a note.
        """
        names = kind_names(inputs.latents.rows, [column])
        rows, scores, left_out = [], [], []
        notes: list[str] = []
        for value in dict.fromkeys(names[test]):
            of_value, others = test[names[test] == value], train[names[train] != value]
            if not all(_both_groups(inputs, part) for part in (of_value, others)):
                left_out.append(value)
                continue
            probes, _, fit_notes = self.fit(inputs, others)
            notes += fit_notes
            rows.append(of_value)
            scores.append({p.name: p.scores(inputs, of_value) - p.threshold for p in probes})
        if not rows:
            raise DataError(
                f"analyzer.unseen={column}: no value has two units of both groups on the "
                "test split while the other values have two of both on the train split"
            )
        if left_out:
            notes.append(
                f"unseen {column}: {counted(len(left_out), 'value')} left out because a group has "
                "fewer than two units there or among the other values"
            )
        in_all = set.intersection(*(set(s) for s in scores))
        joined = {p: np.concatenate([s[p] for s in scores]) for p in scores[0] if p in in_all}
        return np.concatenate(rows), joined, notes


def _both_groups(inputs: AnalysisInputs, chosen: np.ndarray) -> bool:
    """Whether both groups have at least two units among the chosen rows."""
    rows = labelled(inputs, chosen)
    return all(len(np.unique(rows.units[rows.first == group])) >= 2 for group in (True, False))
