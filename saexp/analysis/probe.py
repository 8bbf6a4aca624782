"""Probes: how well a few latents separate two groups, compared with a probe of the activations.

A sparse probe is a logistic regression on the k latents with the largest |mean+ - mean-|. This rule
prefers latents with large activations and can miss one that separates the groups perfectly at small
values; a note reports the latent with the best train AUROC where that happens. Probes are fitted on
the train split and evaluated on the test split and, optionally, on a second data set. A row is one
position. Every unit has the same number of rows, which stay together in cross-validation, and units
are the sample size of intervals (see `Judge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from saexp.analysis import AnalysisInputs, Analyzer, equally_observed, unequal_types
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
from saexp.config import ProbeConfig
from saexp.errors import ConfigError, DataError, counted
from saexp.results import Result, at_chance_words
from saexp.stats import Interval, auroc_interval, auroc_p_value, separation_interval, wilson
from saexp.stats.separation import (
    Auroc,
    difference_of_aurocs,
    limited,
    placements,
)
from saexp.stats.significance import difference_p_value, holm

_TYPES = (
    "a probe may exploit this, because AUROCs compare entities of all types; type "
    "analyzer.within=entity_type to compare within types"
)


MEASURES = ("auroc", "accuracy", "balanced_accuracy", "f1")
WITHIN = "auroc_within"
ABOVE = "minus_surface"
"""Stem of an AUROC minus that of the surface baseline."""
MIN_UNITS = 10
"""Units of each group required for an interval of the balanced accuracy or F1."""
Numbers = dict[str, float | None]
_NONE = Interval(np.array(np.nan), np.array(np.nan))


class Judge:
    """Evaluates probes on the same rows."""

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

        Intervals are 95% intervals, None where there are too few units: Newcombe's method 5 for
        AUROC, Wilson's method for accuracy, Newcombe's hybrid of the intervals of both groups'
        rates for balanced accuracy, and for F1 Wilson's interval of TP / (TP + FP + FN), of which
        it is a monotone function. `auroc_p` is the two-sided p-value of an AUROC of 0.5. Where rows
        have kinds, `auroc_within` is the AUROC over pairs of rows of the same kind, weighted by
        units, to which differences between kinds do not contribute.
        """
        predicted = scores > threshold
        strata = self.rows.judged_apart
        if strata is None:
            strata = np.zeros(len(scores), dtype=np.int64)
        auroc, interval, p_value = self._auroc(scores, strata)[:3]
        measures = {"auroc": (auroc, interval), **self._at_threshold(predicted)}
        if self.rows.kinds is not None:
            measures[WITHIN] = self._auroc(scores, self.rows.kinds)[:2]
        numbers: Numbers = {"auroc_p": p_value if np.isfinite(p_value) else None}
        for name, (value, (low, high)) in measures.items():
            numbers[name] = value
            for side, limit in (("low", low), ("high", high)):
                numbers[f"{name}_ci_{side}"] = float(limit) if np.isfinite(limit) else None
        return numbers

    def auroc(self, scores: Float[np.ndarray, " n"]) -> float:
        """AUROC over all pairs."""
        return self._auroc(scores, np.zeros(len(scores), dtype=np.int64))[0]

    def difference(
        self, scores: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]
    ) -> tuple[float, Interval, float]:
        """AUROC of `scores` minus that of `other` on these rows, its interval and paired p-value.

        The correlation of the two AUROCs is that of the units' influences on them.
        """
        strata = self.rows.judged_apart
        if strata is None:
            strata = np.zeros(len(scores), dtype=np.int64)
        (a, limits_a, _, of_a), (b, limits_b, _, of_b) = (
            self._auroc(s, strata) for s in (scores, other)
        )
        scale = np.sqrt((of_a**2).sum() * (of_b**2).sum())
        correlation = float(np.clip((of_a * of_b).sum() / scale, -1, 1)) if scale > 0 else 0.0
        interval = difference_of_aurocs(Auroc(a, limits_a), Auroc(b, limits_b), correlation)
        return a - b, interval, difference_p_value(a - b, interval)

    def _at_threshold(self, predicted: Bool[np.ndarray, " n"]) -> dict[str, tuple[float, Interval]]:
        w, first = self.weights, self.rows.first
        # Numbers of units; fractional where the rows of a unit are classified differently.
        true, false = float(w[predicted & first].sum()), float(w[predicted & ~first].sum())
        missed = self.n_first - true
        rate, false_rate = true / max(self.n_first, 1), false / max(self.n_second, 1)
        correct = float(w[predicted == first].sum() / w.sum())
        accuracy = wilson(correct * self.n_units, self.n_units) if self.n_units > 1 else _NONE
        balanced, f1 = _NONE, _NONE
        # Rounding could put rates outside [0, 1].
        mistaken = max(false + missed, 0.0)
        jaccard = true / (true + mistaken) if true + mistaken > 0 else np.nan
        if min(self.n_first, self.n_second) >= MIN_UNITS:
            balanced = self._balanced(min(rate, 1.0), min(false_rate, 1.0))
            if true + mistaken > 0:
                low, high = wilson(true, true + mistaken)
                f1 = Interval(2 * low / (1 + low), 2 * high / (1 + high))
        return {
            "accuracy": (correct, accuracy),
            "balanced_accuracy": ((1 + rate - false_rate) / 2, balanced),
            "f1": (float(2 * jaccard / (1 + jaccard)), f1),
        }

    def _balanced(self, rate: float, false_rate: float) -> Interval:
        """Interval of (1 + true positive rate - false positive rate) / 2."""
        if self.independent:
            n_first, n_second = np.array([self.n_first]), np.array([self.n_second])
            low, high = separation_interval(
                np.array(rate), np.array(false_rate), n_first, n_second, np.ones(1)
            )
            return Interval((1 + low) / 2, (1 + high) / 2)
        # The rates may be fully correlated because units have rows of both groups, so the limits
        # are added.
        a, b = (
            wilson(rate * self.n_first, self.n_first),
            wilson(false_rate * self.n_second, self.n_second),
        )
        return Interval((1 + a.low - b.high) / 2, (1 + a.high - b.low) / 2)

    def _auroc(
        self, scores: Float[np.ndarray, " n"], strata: Int[np.ndarray, " n"]
    ) -> tuple[float, Interval, float, Float[np.ndarray, " n_units"]]:
        """P(first > second) + P(equal)/2 over pairs within strata, its interval and p-value, and
        the influence of each unit on it.

        All are NaN where no stratum has rows of both groups.
        """
        first, w = self.rows.first, self.weights
        sizes, aurocs, parts = [], [], []
        for stratum in np.unique(strata):
            of_stratum = np.flatnonzero(strata == stratum)
            of_first = first[of_stratum]
            if of_first.any() and not of_first.all():
                part = w[of_stratum]
                placement = placements(scores[of_stratum], of_first, part)
                size = np.array([part[of_first].sum(), part[~of_first].sum()])
                aurocs.append(float(part[of_first] @ placement[of_first] / size[0]))
                sizes.append(size)
                parts.append((of_stratum, placement - aurocs[-1], size))
        if not parts:
            return float("nan"), _NONE, float("nan"), np.zeros(self.n_units)
        n_first, n_second = np.array(sizes).T
        pairs = n_first * n_second / (n_first * n_second).sum()
        auroc = float(pairs @ aurocs)
        # Influence of each unit on the AUROC, over all of its strata (DeLong 1988; Obuchowski 1997
        # for units with several rows).
        influence = np.zeros((2, self.n_units))
        for weight, (of_stratum, deviation, size) in zip(pairs, parts, strict=True):
            for group, mask in enumerate((first[of_stratum], ~first[of_stratum])):
                rows = of_stratum[mask]
                np.add.at(
                    influence[group],
                    self.unit[rows],
                    weight * w[rows] * deviation[mask] / size[group],
                )
        n = np.array([self.n_first, self.n_second])
        influence *= np.sqrt(n / np.maximum(n - 1, 1))[:, None]
        of_unit = influence.sum(0)
        variance = float((of_unit**2).sum())
        estimate = (auroc, n_first, n_second, pairs, variance)
        return auroc, auroc_interval(*estimate), auroc_p_value(*estimate), of_unit


class ProbeAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `probe`."""

    def __init__(self, cfg: ProbeConfig) -> None:
        super().__init__(cfg)
        self.sizes, self.strengths = sorted(set(cfg.sizes)), cfg.penalties
        self.max_train = cfg.max_train
        self.transfer = cfg.transfer
        """File of a second data set, which the pipeline collects and passes to `analyze`."""
        if self.transfer is not None and not Path(self.transfer).is_file():
            raise ConfigError(f"analyzer.transfer={self.transfer}: no such file")
        self.within = column_names("within", cfg.within)
        unseen = column_names("unseen", cfg.unseen)
        if len(unseen) > 1:
            raise ConfigError(f"analyzer.unseen={cfg.unseen}: type a single column")
        self.unseen = unseen[0] if unseen else None
        self.fitting = Fitting(self.sizes, self.strengths, self.within, cfg.seed)

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `probe/…`, tables `probes`, `probe_latents` and `roc`.

        Metrics without a suffix describe the train split (`probe/sparse_5_auroc`; of a logistic
        probe `_cv_auroc` is cross-validated there), those with
        `_test` the test split and those with `_transfer` the second data set. The latter two have
        intervals (see `Judge`) and `…_auroc_p_holm`, the p-value of an AUROC of 0.5 adjusted by
        Holm's method over the probes. The first group is the positive class. Probes:

        - `sparse_<k>`: logistic regression on k latents;
        - `dense`: logistic regression on the stored activations;
        - `mean_difference`: projection on the difference of the groups' mean activations;
        - `best_latent`: the latent with the best train AUROC, with the threshold of best train
          accuracy;
        - `majority`: predicts the group with more train units;
        - `surface`: the text alone, without the model (see `saexp.analysis.contrast_checks`), also
          reported as `contrast/surface_auroc_test`. `…_minus_surface` is the AUROC of another probe
          minus its AUROC on the same rows, with an interval, and `…_minus_surface_p_holm` the
          p-value of the paired test of no difference, adjusted over the probes;
        - `null`, with `placebo` permutations: `dense` with labels that are permuted over the units
          of each split. Its AUROC is the mean, its limits are those of 95% of the permutations.

        The option `within` names columns that define the kind of a row. It adds the probes
        `base_rate`, which knows only the kind, and `best_latent_within`, chosen by train AUROC over
        pairs of the same kind, and `…_auroc_within` over such pairs for every probe. With `unseen`,
        a column, `_unseen` metrics describe the test split with every row scored by probes whose
        latents and weights come from train rows with other values; `…_auroc_unseen` compares rows
        with the same value. Raises DataError without two groups, or with fewer than two units of a
        group in train or test.
        """
        self._check(inputs)
        (train, test), notes = self._rows(inputs, ("train", "test"))
        used = inputs.latents.rows.iloc[np.concatenate([train, test])]
        units = used.drop_duplicates(["unit", "group"])
        first, second = inputs.groups
        notes += unequal_types(units, (first, second), _TYPES)
        if len(train) > self.max_train:
            notes.append(
                f"probes are fitted on {self.max_train} of {len(train)} train rows, drawn at "
                "random (analyzer.max_train)"
            )
            train = limited(train, self.max_train, self.cfg.seed)
        probes, latents, fit_notes = self.fitting.fit(inputs, train)
        notes += fit_notes
        data_sets = {"": (inputs, train), "_test": (inputs, test)}
        if (transfer := inputs.transfer) is not None:
            check_columns(transfer.latents.rows, self.within, str(self.transfer))
            self._check_labels(transfer, None)
            chosen, transfer_notes = self._not_fitted_on(inputs, transfer, train)
            data_sets["_transfer"] = (transfer, chosen)
            notes += transfer_notes
        metrics: dict[str, float | int | None] = {}
        table, curves = [], []
        for suffix, (data, chosen) in data_sets.items():
            labels = labelled(data, chosen, self.within)
            scores = {p.name: p.scores(data, chosen) for p in probes}
            new_metrics, rows = _judged(labels, scores, probes, suffix)
            metrics |= new_metrics
            table += rows
            if suffix:
                for name, values in scores.items():
                    points = roc(values, labels.first)
                    names = {"probe": name, "data": suffix[1:]}
                    curves.append(pd.DataFrame(points, columns=["fpr", "tpr"]).assign(**names))
        if self.unseen is not None:
            chosen, scores, unseen_notes = self.fitting.unseen(inputs, train, test, self.unseen)
            labels = labelled(inputs, chosen, self.within, self.unseen)
            new_metrics, rows = _judged(labels, scores, probes, "_unseen")
            metrics |= new_metrics
            table += rows
            notes += [*unseen_notes, self._unseen_note(metrics, probes)]
        if self.cfg.placebo:
            numbers, row = self._null(inputs, train, test)
            metrics |= numbers
            table.append(row)
        metrics |= {f"probe/{p.name}": p.latents[0] for p in probes if p.name.startswith("best_")}
        metrics |= _surface_metrics(metrics)
        notes += _missed_latent(metrics, probes, latents)
        tables = {"probes": _typed(table), "probe_latents": latents, "roc": pd.concat(curves)}
        return Result(metrics=metrics, tables=tables, notes=list(dict.fromkeys(notes)))

    def _null(
        self, inputs: AnalysisInputs, train: np.ndarray, test: np.ndarray
    ) -> tuple[dict[str, float | int | None], dict[str, object]]:
        """Metrics and table row of the dense probe with permuted labels (`null`)."""
        n, rows = self.cfg.placebo, labelled(inputs, test)
        trials = self.fitting.permuted(inputs, train, test, n)
        aurocs = [Judge(replace(rows, first=first)).auroc(scores) for first, scores in trials]
        low, high = np.quantile(aurocs, (0.025, 0.975)).tolist()
        numbers = {"auroc": float(np.mean(aurocs)), "auroc_ci_low": low, "auroc_ci_high": high}
        metrics: dict[str, float | int | None] = {
            f"probe/null_{k}_test": v for k, v in numbers.items()
        }
        row = {"probe": "null", "data": "test", "n_rows": len(test), "k": pd.NA, **numbers}
        return {**metrics, "probe/n_null": n}, row

    def _unseen_note(
        self, metrics: Mapping[str, float | int | None], probes: Sequence[Probe]
    ) -> str:
        """The AUROCs of all probes on unseen values."""
        parts = []
        for probe in probes:
            numbers = [
                metrics.get(f"probe/{probe.name}_auroc{end}_unseen")
                for end in ("", "_ci_low", "_ci_high", "_p_holm")
            ]
            if isinstance(numbers[0], float) and probe.name != "majority":
                auroc, (low, high, p_value) = numbers[0], numbers[1:]
                interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
                parts.append(f"{probe.name} {auroc:.3f}{interval}{at_chance_words(auroc, p_value)}")
        return (
            f"AUROC on {metrics['probe/n_rows_unseen']} rows of the test split, scored by probes "
            f"fitted on other values of '{self.unseen}': {', '.join(parts)}"
        )

    def _check(self, inputs: AnalysisInputs) -> None:
        if len(inputs.groups) != 2:
            raise DataError(
                f"a probe needs two groups, but the data set has {len(inputs.groups)}; give its "
                "rows a 'group', set dataset.group_rule, or type analyzer=stats"
            )
        inputs.check_splits()
        assert inputs.acts is not None, "a probe needs the stored activations"
        columns = [*self.within, *([self.unseen] if self.unseen else [])]
        check_columns(inputs.latents.rows, columns, "the data set")
        for split in ("train", "test"):
            self._check_labels(inputs, split)

    def _check_labels(self, inputs: AnalysisInputs, split: str | None) -> None:
        rows = labelled(inputs, rows_of(inputs, split))
        where = f"split {split}" if split else str(self.transfer)
        for group, of_group in zip(inputs.groups, (rows.first, ~rows.first), strict=True):
            n = len(np.unique(rows.units[of_group]))
            if n < 2:
                raise DataError(
                    f"{where} has {counted(n, 'unit')} of group '{group}', but a probe needs at "
                    "least 2; add rows, or change dataset.split"
                )

    def _rows(
        self, inputs: AnalysisInputs, splits: Sequence[str]
    ) -> tuple[list[np.ndarray], list[str]]:
        """(row indices of each split, notes); units have equally many rows, as in a contrast.

        With `within` or `unseen` all rows are used, because they compare rows of a unit that differ
        in kind. Metrics weight units equally in both cases. Unequal numbers of rows affect only the
        fit, which cannot make held-out metrics of random labels differ from chance.
        """
        parts = [rows_of(inputs, split) for split in splits]
        if self.within or self.unseen is not None:
            return parts, []
        used, _, notes = equally_observed(inputs.latents.rows, inputs.groups, self.cfg.seed)
        return [np.intersect1d(part, used) for part in parts], notes

    def _not_fitted_on(
        self, inputs: AnalysisInputs, transfer: AnalysisInputs, train: np.ndarray
    ) -> tuple[np.ndarray, list[str]]:
        """(rows of the second data set with texts and entities not among the train rows, notes)."""
        chosen = rows_of(transfer, None)
        fitted, other = inputs.latents.rows.iloc[train], transfer.latents.rows.iloc[chosen]
        overlaps = other["text"].isin(set(fitted["text"])).to_numpy(dtype=bool)
        same_entity = other["entity"].notna() & other["unit"].isin(set(fitted["unit"]))
        overlaps = overlaps | same_entity.to_numpy(dtype=bool)
        if overlaps.all():
            raise DataError(
                f"analyzer.transfer={self.transfer}: all its texts or entities are among "
                "the train rows, so there is nothing to evaluate on"
            )
        notes = []
        if overlaps.any():
            n = counted(int(overlaps.sum()), "row")
            notes.append(
                f"transfer: {n} left out because the probes were fitted on the same texts "
                "or entities"
            )
        return chosen[~overlaps], notes


def _judged(
    labels: Labelled, scores: Mapping[str, np.ndarray], probes: Sequence[Probe], suffix: str
) -> tuple[dict[str, float | int | None], list[dict[str, object]]]:
    """Metrics and table rows of all probes on these rows; probes without scores are left out."""
    judge = Judge(labels)
    metrics: dict[str, float | int | None] = {
        f"probe/n_rows{suffix}": len(labels),
        f"probe/n_units{suffix}": judge.n_units,
    }
    by_value = labels.judged_apart is not None
    scored = [p for p in probes if p.name in scores]
    measures = {
        # Scores of several fits already have the threshold subtracted.
        p.name: judge.measure(scores[p.name], 0.0 if by_value else p.threshold)
        for p in scored
    }
    _adjust_p_values(measures, "auroc_p", [n for n in measures if n != "majority"])
    if suffix and "surface" in scores:
        compared = [p.name for p in scored if p.name not in ("surface", "majority")]
        for name in compared:
            measures[name] |= _above_surface(judge, scores[name], scores["surface"])
        _adjust_p_values(measures, f"{ABOVE}_p", compared)
    rows = []
    for probe in scored:
        numbers = measures[probe.name]
        if not suffix:
            # The probe was fitted on these rows, so no interval is valid.
            numbers = {name: numbers[name] for name in (*MEASURES, WITHIN) if name in numbers}
            if probe.fitted is not None:
                metrics[f"probe/{probe.name}_cv_auroc"] = probe.fitted.cv_auroc
        for name, value in numbers.items():
            metrics[f"probe/{probe.name}_{name}{suffix}"] = value
        fit = {"probe": probe.name, "k": len(probe.latents) or pd.NA} if by_value else _fit(probe)
        data = {"data": suffix[1:] or "train", "n_rows": len(labels)}
        rows.append({**fit, **data, **numbers})
    return metrics, rows


def _surface_metrics(metrics: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """Metrics of the surface baseline under the names that the contrast uses."""
    return {
        f"contrast/surface_auroc_test{end}": metrics[f"probe/surface_auroc{end}_test"]
        for end in ("", "_ci_low", "_ci_high")
        if f"probe/surface_auroc{end}_test" in metrics
    }


def _above_surface(judge: Judge, scores: np.ndarray, surface: np.ndarray) -> Numbers:
    """AUROC of a probe minus that of the surface baseline, its interval and p-value."""
    value, (low, high), p_value = judge.difference(scores, surface)
    names = ("", "_ci_low", "_ci_high", "_p")
    numbers = zip(names, (value, float(low), float(high), p_value), strict=True)
    return {f"{ABOVE}{end}": float(x) if np.isfinite(x) else None for end, x in numbers}


def _adjust_p_values(
    measures: Mapping[str, dict[str, float | None]], p: str, tested: Sequence[str]
) -> None:
    """Replace `<p>` by `<p>_holm`, adjusted over the `tested` probes."""
    p_values = {name: numbers.pop(p, None) for name, numbers in measures.items()}
    adjusted = holm(np.array([p_values[name] for name in tested], dtype=float))
    for name, p_value in zip(tested, adjusted.tolist(), strict=True):
        measures[name][f"{p}_holm"] = None if np.isnan(p_value) else p_value


def _missed_latent(
    metrics: Mapping[str, float | int | None], probes: Sequence[Probe], latents: pd.DataFrame
) -> list[str]:
    """A note where the latent with the best train AUROC is not in the largest sparse probe."""
    best = metrics["probe/best_latent_auroc"]
    largest = max((p for p in probes if p.name.startswith("sparse_")), key=lambda p: len(p.latents))
    best_in_probe = 0.5 + float((latents["auroc"] - 0.5).abs().max())
    if best is None or metrics["probe/best_latent"] in largest.latents or best <= best_in_probe:
        return []
    n = len(largest.latents)
    return [
        f"latent {metrics['probe/best_latent']} has the best train AUROC ({best:.3f}) but is not "
        f"among the {n} latents of {largest.name}, the best of which has {best_in_probe:.3f}: "
        "sparse probes select the largest |mean+ - mean-|, which misses latents that separate the "
        "groups at small activations"
    ]


def _fit(probe: Probe) -> dict[str, object]:
    fitted = probe.fitted
    return {
        "probe": probe.name,
        "k": len(probe.latents) or pd.NA,
        "latents": ", ".join(map(str, probe.latents)) or None,
        "c": None if fitted is None else fitted.c,
        "cv_log_loss": None if fitted is None else fitted.cv_log_loss,
        "cv_auroc": None if fitted is None else fitted.cv_auroc,
    }


def _typed(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    numbers = [c for c in table.columns if c.startswith((*MEASURES, ABOVE))]
    numbers += ["c", "cv_log_loss", "cv_auroc"]
    return table.astype({"k": "Int64", "latents": "string", **dict.fromkeys(numbers, float)})
