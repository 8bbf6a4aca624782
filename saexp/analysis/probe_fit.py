"""All probes of an analysis, fitted on train rows, or on those of other values of a column."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.probe_rows import kind_names, kinds_of, labelled
from saexp.analysis.probing import (
    Probe,
    auroc_within,
    base_rate,
    latents_reader,
    majority,
    mean_difference,
    read_acts,
    single_latent,
    surface_probe,
)
from saexp.analysis.statistics import Ranked
from saexp.context import progress
from saexp.errors import DataError
from saexp.latents.summary import moments
from saexp.probes import fit_logistic, folds

log = logging.getLogger(__name__)


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
                f"analyzer.options.unseen={column}: no value of it has both groups on the "
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
