"""How well few latents tell two groups apart, beside a dense probe on the activations themselves.

Sparse probing: logistic regression on the k latents with the largest |mean+ - mean-| (REFERENCE.md,
section 3). All is fitted on the train split and judged on the test split, and where wanted on a
second data set from elsewhere. A row is one position; rows of a unit stay together in
cross-validation and in the bootstrap.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.options import read_options, whole
from saexp.analysis.probing import (
    MEASURES,
    Judge,
    Labelled,
    Probe,
    fit_logistic,
    folds,
    latents_reader,
    mean_difference,
    read_acts,
    roc,
    single_latent,
)
from saexp.analysis.statistics import Ranked
from saexp.config import AnalyzerConfig
from saexp.context import progress
from saexp.errors import ConfigError, DataError
from saexp.latents.summary import moments
from saexp.results import TaskResult

log = logging.getLogger(__name__)

_DEFAULTS = {
    "k": [1, 2, 5, 20],
    "strengths": [0.001, 0.01, 0.1, 1.0, 10.0],
    "max_train": 20_000,
    "transfer": None,
}


class ProbeAnalyzer:
    """Registry kind `analyzer`, name `probe`."""

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg
        options = read_options(cfg, _DEFAULTS)
        sizes, strengths = options["k"], options["strengths"]
        sizes = sizes if isinstance(sizes, list) else [sizes]
        self.sizes = sorted({whole("k", k) for k in sizes})
        strengths = strengths if isinstance(strengths, list) else [strengths]
        if not strengths or not all(
            isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in strengths
        ):
            raise ConfigError(
                f"analyzer.options.strengths={strengths} must be numbers above 0 (inverse L2 "
                "penalties), such as [0.01,0.1,1]"
            )
        self.strengths = [float(c) for c in strengths]
        self.max_train = whole("max_train", options["max_train"], 4)
        self.transfer: str | None = options["transfer"]
        """File of a second data set; the task collects it and hands it to `analyze`."""
        if self.transfer is not None and not Path(str(self.transfer)).is_file():
            raise ConfigError(f"analyzer.options.transfer={self.transfer}: no such file")

    def analyze(self, inputs: AnalysisInputs, transfer: AnalysisInputs | None = None) -> TaskResult:
        """Metrics `probe/…`, tables `probes`, `probe_latents` and `roc`.

        Metrics without suffix are of the train split (`probe/sparse_5_auroc`), `_test` ones of the
        test split, `_transfer` ones of the second data set. Probes: `sparse_<k>`; `dense`, logistic
        on the stored activations; `mean_difference`, the projection on the difference of the
        groups' mean activations, cut midway; `best_latent`, the latent of best train AUROC as it
        is, cut where train accuracy is best. The first group is the positive one. Raises DataError
        without two groups, or with fewer than two units of a group in train or test.
        """
        self._check(inputs)
        notes: list[str] = []
        train = self._some(_rows_of(inputs, "train"), notes)
        rows = _labelled(inputs, train)
        probes, latents = self._fit(inputs, train, rows, notes)
        places = {"": (inputs, train), "_test": (inputs, _rows_of(inputs, "test"))}
        if transfer is not None:
            self._check_labels(transfer, None)
            places["_transfer"] = (transfer, self._unseen(inputs, transfer, train, notes))
        metrics: dict[str, float | int | None] = {}
        table, curves = [], []
        for suffix, (data, chosen) in places.items():
            labels = _labelled(data, chosen)
            judge = Judge(labels, self.cfg.n_bootstrap if suffix else 0, self.cfg.seed)
            part = suffix[1:] or "train"
            metrics[f"probe/n_rows{suffix}"] = len(chosen)
            metrics[f"probe/n_units{suffix}"] = judge.bootstrap.n_units
            for probe in probes:
                scores = probe.scores(data, chosen)
                found = judge.measure(scores, probe.threshold)
                for name, value in found.items():
                    if suffix or name in MEASURES:
                        metrics[_metric(probe.name, name, suffix)] = value
                table.append({**_about(probe), "data": part, "n_rows": len(chosen), **found})
                if suffix:
                    points = roc(scores, labels.first)
                    names = {"probe": probe.name, "data": part}
                    curves.append(pd.DataFrame(points, columns=["fpr", "tpr"]).assign(**names))
        best = next(p for p in probes if p.name == "best_latent")
        metrics["probe/best_latent"] = best.latents[0]
        tables = {"probes": _typed(table), "probe_latents": latents}
        return TaskResult(metrics=metrics, tables={**tables, "roc": pd.concat(curves)}, notes=notes)

    def _check(self, inputs: AnalysisInputs) -> None:
        if len(inputs.groups) != 2:
            raise DataError(
                "a probe needs two groups to tell apart and the data set has none; give its rows a "
                "'group', set dataset.group_rule, or type analyzer=stats"
            )
        assert inputs.acts is not None, "a probe needs the stored activations"
        for split in ("train", "test"):
            self._check_labels(inputs, split)

    def _check_labels(self, inputs: AnalysisInputs, split: str | None) -> None:
        rows = _labelled(inputs, _rows_of(inputs, split))
        where = f"split {split}" if split else str(self.transfer)
        for group, mine in zip(inputs.groups, (rows.first, ~rows.first), strict=True):
            n = len(np.unique(rows.units[mine]))
            if n < 2:
                raise DataError(
                    f"{where} has {n} units of group '{group}'; a probe needs at least 2: add "
                    "rows, or change dataset.split"
                )

    def _some(self, train: np.ndarray, notes: list[str]) -> np.ndarray:
        if len(train) <= self.max_train:
            return train
        notes.append(
            f"probes are fitted on {self.max_train} of {len(train)} train rows, a seeded choice "
            "(analyzer.options.max_train)"
        )
        rng = np.random.default_rng([self.cfg.seed, 23])
        return np.sort(rng.choice(train, self.max_train, replace=False))

    def _unseen(
        self,
        inputs: AnalysisInputs,
        transfer: AnalysisInputs,
        train: np.ndarray,
        notes: list[str],
    ) -> np.ndarray:
        """Rows of the second data set whose text and entity are in none of the rows fitted on."""
        chosen = _rows_of(transfer, None)
        own, other = inputs.latents.rows.iloc[train], transfer.latents.rows.iloc[chosen]
        known = other["text"].isin(set(own["text"])).to_numpy(dtype=bool)
        named = other["entity"].notna() & other["unit"].isin(set(own["unit"]))
        known = known | named.to_numpy(dtype=bool)
        if known.all():
            raise DataError(
                f"analyzer.options.transfer={self.transfer}: every text or entity of it is one "
                "that the probes are fitted on"
            )
        if known.any():
            notes.append(
                f"transfer: {known.sum()} rows left out, their texts or entities are trained on"
            )
        return chosen[~known]

    def _fit(
        self, inputs: AnalysisInputs, train: np.ndarray, rows: Labelled, notes: list[str]
    ) -> tuple[list[Probe], pd.DataFrame]:
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
        pairs = folds(rows, self.cfg.seed)
        sizes = sorted({min(k, len(order)) for k in self.sizes})
        if sizes != self.sizes:
            notes.append(f"only {len(order)} latents differ on train, so no probe is larger")
        dense = read_acts(inputs, train)
        probes = []
        with progress(len(sizes) + 1, "fitting probes", "probe") as bar:
            for k in sizes:
                read = latents_reader(order[:k])
                fitted = fit_logistic(read(inputs, train), rows, self.strengths, pairs)
                chosen = tuple(order[:k].tolist())
                probes.append(Probe(f"sparse_{k}", read, fitted.score, 0.0, chosen, fitted))
                bar.update(1)
            fitted = fit_logistic(dense, rows, self.strengths, pairs)
            probes.append(Probe("dense", read_acts, fitted.score, fitted=fitted))
            bar.update(1)
        slow = [p.name for p in probes if p.fitted is not None and not p.fitted.converged]
        if slow:
            notes.append(f"logistic regression did not fully converge for {', '.join(slow)}")
        probes += [
            mean_difference(dense, rows),
            single_latent(values, rows, best, up=bool(aurocs[best] >= 0.5)),
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


def _rows_of(inputs: AnalysisInputs, split: str | None) -> np.ndarray:
    """Numbers of the rows of both groups, of one split or of all."""
    rows = inputs.latents.rows
    mine = rows["group"].isin(inputs.groups).to_numpy(dtype=bool)
    if split is not None:
        mine = mine & (rows["split"] == split).fillna(False).to_numpy(dtype=bool)
    return np.flatnonzero(mine)


def _labelled(inputs: AnalysisInputs, chosen: np.ndarray) -> Labelled:
    rows = inputs.latents.rows.iloc[chosen]
    first = (rows["group"] == inputs.groups[0]).to_numpy(dtype=bool)
    return Labelled(first, rows["unit"].to_numpy(dtype=object))


def _metric(probe: str, measure: str, suffix: str) -> str:
    return f"probe/{probe}_{measure}{suffix}"


def _about(probe: Probe) -> dict[str, object]:
    fitted = probe.fitted
    return {
        "probe": probe.name,
        "k": len(probe.latents) or pd.NA,
        "latents": ", ".join(map(str, probe.latents)) or None,
        "c": None if fitted is None else fitted.c,
        "cv_log_loss": None if fitted is None else fitted.cv_log_loss,
    }


def _typed(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    numbers = [c for c in table.columns if c.startswith(MEASURES)] + ["c", "cv_log_loss"]
    return table.astype({"k": "Int64", "latents": "string", **dict.fromkeys(numbers, float)})
