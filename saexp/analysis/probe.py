"""How well few latents separate two groups, beside a dense probe on the activations themselves.

Sparse probing: logistic regression on the k latents with the largest |mean+ - mean-| (REFERENCE.md,
section 3). That rule prefers latents with large activations: one that separates the groups
perfectly at small values can be missed, so a note names the latent of best train AUROC where it is.
All is fitted on the train split and judged on the test split, and where wanted on a second data set
from elsewhere. A row is one position; every unit has as many, its rows stay together in
cross-validation, and units are the sample size of intervals (see
`Judge`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from saexp.analysis.base import AnalysisInputs
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
from saexp.analysis.observations import equally_observed, unequal_types
from saexp.config import ProbeConfig
from saexp.errors import ConfigError, DataError
from saexp.results import TaskResult
from saexp.stats.intervals import (
    Interval,
    auroc_interval,
    auroc_p_value,
    separation_interval,
    wilson,
)
from saexp.stats.logistic_probe import limited
from saexp.stats.power import holm
from saexp.stats.rank_tests import placements
from saexp.wording import at_chance_words

_TYPES = (
    "a probe may use that: every AUROC is over pairs of all types; within types with "
    "analyzer.within=entity_type"
)


MEASURES = ("auroc", "accuracy", "balanced_accuracy", "f1")
WITHIN = "auroc_within"
MIN_UNITS = 10
"""Units of each group that the interval of a balanced accuracy or F1 needs."""
Numbers = dict[str, float | None]
_NONE = Interval(np.array(np.nan), np.array(np.nan))


class Judge:
    """Measures any number of probes on the same rows."""

    def __init__(self, rows: Labelled) -> None:
        self.rows = rows
        self.weights = rows.weights()
        self.unit = pd.factorize(rows.units)[0]
        first = rows.first
        self.n_units = len(np.unique(self.unit))
        self.n_first, self.n_second = (len(np.unique(self.unit[m])) for m in (first, ~first))
        self.independent = self.n_first + self.n_second == self.n_units
        """Whether no unit has rows of both groups."""

    def measure(self, scores: Float[np.ndarray, " n"], threshold: float) -> Numbers:
        """`MEASURES`, each with `_ci_low` and `_ci_high`, and `auroc_p`; F1 is of the first group.

        Intervals are 95 %, None where there are too few units: AUROC by Newcombe's method 5,
        accuracy by Wilson's method, balanced accuracy by Newcombe's hybrid of those of both groups'
        rates, F1 by Wilson's method for TP / (TP + FP + FN), of which it is a monotone function.
        `auroc_p` is the two-sided p-value of an AUROC of 0.5. Where rows have kinds also
        `auroc_within`: over pairs of rows of one kind, every pair of units counting once, so that
        what separates kinds does not help.
        """
        called = scores > threshold
        everyone = np.zeros(len(scores), dtype=np.int64)
        apart = everyone if self.rows.judged_apart is None else self.rows.judged_apart
        auroc, interval, p_value = self._auroc(scores, apart)
        found = {"auroc": (auroc, interval), **self._at_threshold(called)}
        if self.rows.kinds is not None:
            found[WITHIN] = self._auroc(scores, self.rows.kinds)[:2]
        numbers: Numbers = {"auroc_p": p_value if np.isfinite(p_value) else None}
        for name, (value, (low, high)) in found.items():
            numbers[name] = value
            for side, limit in (("low", low), ("high", high)):
                numbers[f"{name}_ci_{side}"] = float(limit) if np.isfinite(limit) else None
        return numbers

    def _at_threshold(self, called: Bool[np.ndarray, " n"]) -> dict[str, tuple[float, Interval]]:
        w, first = self.weights, self.rows.first
        # Numbers of units, in fractions where the rows of a unit are called differently.
        true, false = float(w[called & first].sum()), float(w[called & ~first].sum())
        missed = self.n_first - true
        rate, false_rate = true / max(self.n_first, 1), false / max(self.n_second, 1)
        right = float(w[called == first].sum() / w.sum())
        accuracy = wilson(right * self.n_units, self.n_units) if self.n_units > 1 else _NONE
        balanced, f1 = _NONE, _NONE
        # Next to 0 and 1 rounding would put a rate outside.
        mistaken = max(false + missed, 0.0)
        jaccard = true / (true + mistaken) if true + mistaken > 0 else np.nan
        if min(self.n_first, self.n_second) >= MIN_UNITS:
            balanced = self._balanced(min(rate, 1.0), min(false_rate, 1.0))
            if true + mistaken > 0:
                low, high = wilson(true, true + mistaken)
                f1 = Interval(2 * low / (1 + low), 2 * high / (1 + high))
        return {
            "accuracy": (right, accuracy),
            "balanced_accuracy": ((1 + rate - false_rate) / 2, balanced),
            "f1": (float(2 * jaccard / (1 + jaccard)), f1),
        }

    def _balanced(self, rate: float, false_rate: float) -> Interval:
        """Of (1 + true positive rate - false positive rate) / 2."""
        if self.independent:
            n_first, n_second = np.array([self.n_first]), np.array([self.n_second])
            low, high = separation_interval(
                np.array(rate), np.array(false_rate), n_first, n_second, np.ones(1)
            )
            return Interval((1 + low) / 2, (1 + high) / 2)
        # Both rates are of the same units, perhaps fully correlated: the limits' sums cover then.
        a, b = (
            wilson(rate * self.n_first, self.n_first),
            wilson(false_rate * self.n_second, self.n_second),
        )
        return Interval((1 + a.low - b.high) / 2, (1 + a.high - b.low) / 2)

    def _auroc(
        self, scores: Float[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
    ) -> tuple[float, Interval, float]:
        """P(first > second) + P(equal)/2 over pairs of one stratum, its interval and p-value.

        NaN without a pair.
        """
        first, w = self.rows.first, self.weights
        sizes, aurocs, parts = [], [], []
        for stratum in np.unique(strata):
            of_stratum = np.flatnonzero(strata == stratum)
            of_first = first[of_stratum]
            if of_first.any() and not of_first.all():
                part = w[of_stratum]
                share = placements(scores[of_stratum], of_first, part)
                size = np.array([part[of_first].sum(), part[~of_first].sum()])
                aurocs.append(float(part[of_first] @ share[of_first] / size[0]))
                sizes.append(size)
                parts.append((of_stratum, share - aurocs[-1], size))
        if not parts:
            return float("nan"), _NONE, float("nan")
        n_first, n_second = np.array(sizes).T
        pairs = n_first * n_second / (n_first * n_second).sum()
        auroc = float(pairs @ aurocs)
        # What each unit adds to the deviation, over all strata that it is in (DeLong 1988, and
        # for units of several rows Obuchowski 1997).
        influence = np.zeros((2, self.n_units))
        for weight, (of_stratum, share, size) in zip(pairs, parts, strict=True):
            for group, mask in enumerate((first[of_stratum], ~first[of_stratum])):
                rows = of_stratum[mask]
                np.add.at(
                    influence[group], self.unit[rows], weight * w[rows] * share[mask] / size[group]
                )
        n = np.array([self.n_first, self.n_second])
        influence *= np.sqrt(n / np.maximum(n - 1, 1))[:, None]
        variance = float((influence.sum(0) ** 2).sum())
        about = (auroc, n_first, n_second, pairs, variance)
        return auroc, auroc_interval(*about), auroc_p_value(*about)


class ProbeAnalyzer:
    """Registry kind `analyzer`, name `probe`."""

    def __init__(self, cfg: ProbeConfig) -> None:
        self.cfg = cfg
        self.sizes, self.strengths = sorted(set(cfg.sizes)), cfg.penalties
        self.max_train = cfg.max_train
        self.transfer = cfg.transfer
        """File of a second data set; the task collects it and hands it to `analyze`."""
        if self.transfer is not None and not Path(self.transfer).is_file():
            raise ConfigError(f"analyzer.transfer={self.transfer}: no such file")
        self.within = column_names("within", cfg.within)
        unseen = column_names("unseen", cfg.unseen)
        if len(unseen) > 1:
            raise ConfigError(f"analyzer.unseen={cfg.unseen} must be one column")
        self.unseen = unseen[0] if unseen else None
        self.fitting = Fitting(self.sizes, self.strengths, self.within, cfg.seed)

    def analyze(self, inputs: AnalysisInputs, transfer: AnalysisInputs | None = None) -> TaskResult:
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
        if transfer is not None:
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
            "(analyzer.max_train)"
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
                f"analyzer.transfer={self.transfer}: every text or entity of it is one "
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
