"""How well few latents separate two groups, beside a dense probe on the activations themselves.

Sparse probing: logistic regression on the k latents with the largest |mean+ - mean-| (REFERENCE.md,
section 3). That rule prefers latents with large activations: one that separates the groups
perfectly at small values can be missed, so a note names the latent of best train AUROC where it is.
All is fitted on the train split and judged on the test split, and where wanted on a second data set
from elsewhere. A row is one position; every unit has as many, its rows stay together in
cross-validation, and units are the sample size of intervals (see
`saexp.analysis.classifier_metrics`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from saexp.analysis.base import AnalysisInputs, Analyzer, read_options, whole
from saexp.analysis.classifier_metrics import MEASURES, WITHIN, Judge
from saexp.analysis.classifiers import (
    Fitting,
    Labelled,
    Probe,
    check_columns,
    column_names,
    labelled,
    roc,
    rows_of,
)
from saexp.analysis.contrast_notes import unequal_types
from saexp.analysis.observations import equally_observed
from saexp.config import AnalyzerConfig
from saexp.errors import ConfigError, DataError
from saexp.results import TaskResult
from saexp.stats.logistic_probe import MAX_TRAIN, STRENGTHS, limited
from saexp.stats.power import holm
from saexp.wording import at_chance_words

_DEFAULTS = {
    "k": [1, 2, 5, 20],
    "strengths": list(STRENGTHS),
    "max_train": MAX_TRAIN,
    "transfer": None,
    "within": None,
    "unseen": None,
}


_TYPES = (
    "a probe may use that: every AUROC is over pairs of all types; within types with "
    "analyzer.options.within=entity_type"
)


class ProbeAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `probe`."""

    def __init__(self, cfg: AnalyzerConfig) -> None:
        super().__init__(cfg)
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
        self.transfer = options["transfer"]
        if self.transfer is not None and not Path(str(self.transfer)).is_file():
            raise ConfigError(f"analyzer.options.transfer={self.transfer}: no such file")
        self.within = column_names("within", options["within"])
        unseen = column_names("unseen", options["unseen"])
        if len(unseen) > 1:
            raise ConfigError(f"analyzer.options.unseen={options['unseen']} must be one column")
        self.unseen = unseen[0] if unseen else None
        self.fitting = Fitting(self.sizes, self.strengths, self.within, cfg.seed)

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `probe/…`, tables `probes`, `probe_latents` and `roc`.

        Metrics without suffix are of the train split (`probe/sparse_5_auroc`), `_test` ones of the
        test split, `_transfer` ones of the second data set; the latter two have intervals (see
        `Judge`) and `…_auroc_p_holm`, the p-value of an AUROC of 0.5 after Holm over the probes.
        Probes: `sparse_<k>`; `dense`, logistic on the stored activations; `mean_difference`, the
        projection on the difference of the groups' mean activations, cut midway; `best_latent`, the
        latent of best train AUROC as it is, cut where train accuracy is best; `majority`, which
        calls every row the group with more units on train; `surface`, what the text says without
        the model (see `saexp.analysis.surface_baseline`), also as
        `contrast/surface_auroc_test`. The first group is the positive one.

        With the option `within`, columns that say of which kind a row is, there are a probe
        `base_rate` that knows the kind only, `best_latent_within`, chosen by train AUROC over pairs
        of one kind, and for every probe `…_auroc_within` over such pairs. With
        `unseen`, a column, `_unseen` metrics are of the test split again, each row under probes
        (latents included) fitted on train rows of other values; `…_auroc_unseen` is over pairs of
        one value. Raises DataError without two groups, or with fewer than two units of a group in
        train or test.
        """
        self._check(inputs)
        notes: list[str] = []
        train, test = self._rows(inputs, ("train", "test"), notes)
        used = inputs.latents.rows.iloc[np.concatenate([train, test])]
        units = used.drop_duplicates(["unit", "group"])
        first, second = inputs.groups
        notes += unequal_types(units, (first, second), _TYPES)
        train = self._some(train, notes)
        probes, latents = self.fitting.fit(inputs, train, notes)
        places = {"": (inputs, train), "_test": (inputs, test)}
        if (transfer := inputs.transfer) is not None:
            check_columns(transfer.latents.rows, self.within, str(self.transfer))
            self._check_labels(transfer, None)
            places["_transfer"] = (transfer, self._not_fitted_on(inputs, transfer, train, notes))
        metrics: dict[str, float | int | None] = {}
        table, curves = [], []
        for suffix, (data, chosen) in places.items():
            labels = labelled(data, chosen, self.within)
            scores = {p.name: p.scores(data, chosen) for p in probes}
            self._judge(labels, scores, probes, suffix, metrics, table)
            if suffix:
                for name, values in scores.items():
                    points = roc(values, labels.first)
                    names = {"probe": name, "data": suffix[1:]}
                    curves.append(pd.DataFrame(points, columns=["fpr", "tpr"]).assign(**names))
        if self.unseen is not None:
            chosen, scores = self.fitting.unseen(inputs, train, test, self.unseen, notes)
            labels = labelled(inputs, chosen, self.within, self.unseen)
            self._judge(labels, scores, probes, "_unseen", metrics, table)
            notes.append(self._unseen_note(metrics, probes))
        metrics |= {f"probe/{p.name}": p.latents[0] for p in probes if p.name.startswith("best_")}
        metrics |= _surface_metrics(metrics)
        notes += _missed(metrics, probes, latents)
        tables = {"probes": _typed(table), "probe_latents": latents}
        return TaskResult(metrics=metrics, tables={**tables, "roc": pd.concat(curves)}, notes=notes)

    def _judge(
        self,
        labels: Labelled,
        scores: Mapping[str, np.ndarray],
        probes: Sequence[Probe],
        suffix: str,
        metrics: dict[str, float | int | None],
        table: list[dict[str, object]],
    ) -> None:
        """Add what the probes do on these rows; a probe that is not in `scores` is left out."""
        judge = Judge(labels)
        metrics[f"probe/n_rows{suffix}"] = len(labels)
        metrics[f"probe/n_units{suffix}"] = judge.n_units
        apart = labels.judged_apart is not None
        judged = {
            p.name: judge.measure(scores[p.name], 0.0 if apart else p.threshold)
            for p in probes
            if p.name in scores
        }
        _adjust_p_values(judged)
        for probe in (p for p in probes if p.name in scores):
            found = judged[probe.name]
            if not suffix:
                # The probe was fitted on these rows, so no interval is valid.
                found = {name: found[name] for name in (*MEASURES, WITHIN) if name in found}
            for name, value in found.items():
                metrics[f"probe/{probe.name}_{name}{suffix}"] = value
            about = {"probe": probe.name, "k": len(probe.latents) or pd.NA} if apart else None
            data = {"data": suffix[1:] or "train", "n_rows": len(labels)}
            table.append({**(about or _about(probe)), **data, **found})

    def _unseen_note(
        self, metrics: Mapping[str, float | int | None], probes: Sequence[Probe]
    ) -> str:
        parts = []
        for probe in probes:
            numbers = [
                metrics.get(f"probe/{probe.name}_auroc{end}_unseen")
                for end in ("", "_ci_low", "_ci_high", "_p_holm")
            ]
            if isinstance(numbers[0], float) and probe.name != "majority":
                auroc, (low, high, p_value) = numbers[0], numbers[1:]
                between = "" if low is None else f" [{low:.3f}, {high:.3f}]"
                parts.append(f"{probe.name} {auroc:.3f}{between}{at_chance_words(auroc, p_value)}")
        return (
            f"AUROC on the test split's {metrics['probe/n_rows_unseen']} rows, each under probes "
            f"and latents chosen on other values of '{self.unseen}': {', '.join(parts)}"
        )

    def _check(self, inputs: AnalysisInputs) -> None:
        if len(inputs.groups) != 2:
            raise DataError(
                "a probe needs two groups to separate and the data set has none; give its rows a "
                "'group', set dataset.group_rule, or type analyzer=stats"
            )
        inputs.check_splits()
        assert inputs.acts is not None, "a probe needs the stored activations"
        named = [*self.within, *([self.unseen] if self.unseen else [])]
        check_columns(inputs.latents.rows, named, "the data set")
        for split in ("train", "test"):
            self._check_labels(inputs, split)

    def _check_labels(self, inputs: AnalysisInputs, split: str | None) -> None:
        rows = labelled(inputs, rows_of(inputs, split))
        where = f"split {split}" if split else str(self.transfer)
        for group, mine in zip(inputs.groups, (rows.first, ~rows.first), strict=True):
            n = len(np.unique(rows.units[mine]))
            if n < 2:
                raise DataError(
                    f"{where} has {n} units of group '{group}'; a probe needs at least 2: add "
                    "rows, or change dataset.split"
                )

    def _rows(
        self, inputs: AnalysisInputs, splits: Sequence[str], notes: list[str]
    ) -> list[np.ndarray]:
        """Numbers of each split's rows, as many of every unit as a contrast compares.

        With `within` or `unseen` all rows: those compare rows of one unit that differ in kind.
        The numbers judged weight units equally in any case; more rows of a unit change the fit
        alone, and no fit makes a held-out number of labels without meaning differ from chance.
        """
        parts = [rows_of(inputs, split) for split in splits]
        if self.within or self.unseen is not None:
            return parts
        used, _, row_notes = equally_observed(inputs.latents.rows, inputs.groups, self.cfg.seed)
        notes += row_notes
        return [np.intersect1d(part, used) for part in parts]

    def _some(self, train: np.ndarray, notes: list[str]) -> np.ndarray:
        if len(train) <= self.max_train:
            return train
        notes.append(
            f"probes are fitted on {self.max_train} of {len(train)} train rows, a seeded choice "
            "(analyzer.options.max_train)"
        )
        return limited(train, self.max_train, self.cfg.seed)

    def _not_fitted_on(
        self,
        inputs: AnalysisInputs,
        transfer: AnalysisInputs,
        train: np.ndarray,
        notes: list[str],
    ) -> np.ndarray:
        """Rows of the second data set whose text and entity are in none of the rows fitted on."""
        chosen = rows_of(transfer, None)
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


def _surface_metrics(metrics: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """The surface baseline's numbers under the name that they have in a contrast, too."""
    return {
        f"contrast/surface_auroc_test{end}": metrics[f"probe/surface_auroc{end}_test"]
        for end in ("", "_ci_low", "_ci_high")
        if f"probe/surface_auroc{end}_test" in metrics
    }


def _adjust_p_values(judged: Mapping[str, dict[str, float | None]]) -> None:
    """`auroc_p_holm` in place of `auroc_p`: Holm over the probes, without the majority baseline."""
    p_values = {name: found.pop("auroc_p") for name, found in judged.items()}
    tested = [name for name in judged if name != "majority"]
    adjusted = holm(np.array([p_values[name] for name in tested], dtype=float))
    for name, p_value in zip(tested, adjusted.tolist(), strict=True):
        judged[name]["auroc_p_holm"] = None if np.isnan(p_value) else p_value


def _missed(
    metrics: Mapping[str, float | int | None], probes: Sequence[Probe], latents: pd.DataFrame
) -> list[str]:
    """A note on a latent that alone separates the groups better on train than those selected."""
    best = metrics["probe/best_latent_auroc"]
    largest = max((p for p in probes if p.name.startswith("sparse_")), key=lambda p: len(p.latents))
    alone = 0.5 + float((latents["auroc"] - 0.5).abs().max())
    if best is None or metrics["probe/best_latent"] in largest.latents or best <= alone:
        return []
    n = len(largest.latents)
    return [
        f"latent {metrics['probe/best_latent']} has the best train AUROC, {best:.3f}, and is not "
        f"among the {n} of {largest.name}, of which the best has {alone:.3f} ({best - alone:.3f} "
        "less): sparse probes select the largest |mean+ - mean-|, which misses latents that "
        "separate the groups at small values"
    ]


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
