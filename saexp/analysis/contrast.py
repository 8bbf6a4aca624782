"""Contrast of two groups: latents that separate them, selected on train and tested on test."""

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd

from saexp.analysis import (
    THRESHOLD,
    AnalysisInputs,
    Analyzer,
    Observations,
    Split,
    StratumMeans,
    column_means,
    difference,
    match_token_counts,
    observations,
    split_of,
    unequal_types,
)
from saexp.analysis.contrast_checks import (
    DensityLimit,
    at_chance,
    contrast_power,
    density_limit,
    observation_scores,
    placebo_labels,
    placebo_latents,
    read_texts,
    token_counts,
    too_dense,
    why_none,
)
from saexp.errors import DataError
from saexp.latents.statistics import moments
from saexp.results import Result, is_above_chance
from saexp.stats import auroc_interval, separation_interval
from saexp.stats.separation import (
    Auroc,
    Ranked,
    RankTest,
    auroc_difference,
    auroc_of,
    stratified_rank_test,
)
from saexp.stats.significance import benjamini_hochberg, difference_p_value, holm

log = logging.getLogger(__name__)


_SURFACE_METRIC = "contrast/surface_auroc_test"


def compare_with_surface(
    inputs: AnalysisInputs,
    observed: Observations,
    train: Split,
    test: Split,
    best: Mapping[str, float | int | None],
    seed: int,
) -> Result:
    """Metrics `contrast/surface_auroc_test` and `contrast/best_minus_surface_<g>_test`.

    `best` maps each group to its first selected latent, whose AUROC is taken in the direction of
    the group. Each metric has `_ci_low` and `_ci_high`, and the differences have `_p_value`, of the
    paired test of no difference (see `difference_p_value`). The result is empty without texts; the
    metrics are null, with a note, where the train split is too small for cross-validation.
    """
    if not inputs.texts:
        return Result()
    names = [_SURFACE_METRIC, *(f"contrast/best_minus_surface_{group}_test" for group in best)]
    p_values = [f"{name}_p_value" for name in names[1:]]
    result = Result(metrics=dict.fromkeys([*_with_limits(names), *p_values]))
    units = pd.concat([train.units, test.units], ignore_index=True)
    unit_index = pd.Series(range(len(units)), index=units["observation"])
    rows = observed.rows[observed.rows["observation"].isin(unit_index.index)]
    try:
        scores = observation_scores(
            read_texts(rows, inputs.texts),
            unit_index[rows["observation"]].to_numpy(dtype=np.int64),
            units["unit"].to_numpy(dtype=object),
            np.append(train.first, test.first),
            np.arange(len(units)) < len(train.first),
            token_counts(inputs.neutral_texts),
            seed,
            inputs.objects,
        )
    except DataError as error:
        result.notes.append(f"the surface baseline ({_SURFACE_METRIC}) was not fitted: {error}")
        return result
    result.metrics |= _auroc_metrics(_SURFACE_METRIC, auroc_of(scores, test.first, test.strata))
    for group, latent in best.items():
        if latent is None:
            continue
        is_first = group == inputs.groups[0]
        values = test.csr[:, [int(latent)]].toarray()[:, 0].astype(np.float64)
        member, other = (test.first, scores) if is_first else (~test.first, -scores)
        auroc = auroc_difference(values, other, member, test.strata)
        name = f"contrast/best_minus_surface_{group}_test"
        p_value = difference_p_value(auroc.value, auroc.interval)
        result.metrics |= _auroc_metrics(name, auroc)
        result.metrics[f"{name}_p_value"] = None if np.isnan(p_value) else p_value
    return result


def _with_limits(names: list[str]) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")]


def _auroc_metrics(name: str, auroc: Auroc) -> dict[str, float | int | None]:
    values = (auroc.value, float(auroc.interval.low), float(auroc.interval.high))
    names_and_values = zip(_with_limits([name]), values, strict=True)
    return {key: None if np.isnan(value) else value for key, value in names_and_values}


_WITHIN_TYPES = (
    "AUROC, separation and tests compare entities of the same type; freq_ and mean_ do not"
)


class ContrastAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `contrast`."""

    reads_acts = False
    selects_latents = True

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `contrast/…` and the table `latents`.

        Columns without a suffix describe the train split, those with `_test` the test split.
        `n_<g>`, `freq_<g>` and `mean_<g>` are computed over all units of a group. Comparisons of
        the groups are made within entity types: `separation`, `mean_difference` and `auroc`
        (P(first > second)) are means over the types with van Elteren's weights, and `p_value` is
        van Elteren's test (see RankTest). `q_value` is adjusted by Benjamini and Hochberg's method
        over the latents that are active in the split, and 1 for all others. `ci_low` and `ci_high`
        are Newcombe's method 5 for `auroc`, `separation_ci_…` his hybrid method (see
        saexp.stats); both are NaN for groups of fewer than MIN_GROUP units. `direction`
        is the group that a latent is associated with; `min_separation` and `min_auroc` are the
        smallest values over the types in this direction (over all units where the groups share no
        type). Units of types that only one group has are left out. `best_p_value_<g>_test` and
        `strongest_p_value_<g>_test` are p-values on the test split, adjusted by Holm's method over
        the leading latents of both groups. Raises DataError where a split lacks a group.
        """
        if len(inputs.groups) != 2:
            raise DataError(
                f"a contrast needs two groups, but the data set has {len(inputs.groups)}; give its "
                "rows a 'group', set dataset.group_rule, or type analyzer=stats"
            )
        inputs.check_splits()
        first, second = inputs.groups
        observed, notes = observations(inputs.latents, inputs.groups, self.cfg.seed)
        matching = match_token_counts(
            observed.units, (first, second), self.cfg.seed, resample=self.cfg.match_tokens
        )
        observed = observed.where(matching.keep)
        dropped = int((~matching.keep).sum())
        notes = [
            *matching.notes,
            *notes,
            *unequal_types(observed.units, (first, second), _WITHIN_TYPES),
        ]
        train, train_notes = split_of(observed, inputs.groups, "train", dropped)
        test, test_notes = split_of(observed, inputs.groups, "test", dropped)
        notes += [*train_notes, *test_notes]
        d_sae = inputs.latents.d_sae
        active_latents = np.flatnonzero(np.bincount(observed.csr.indices, minlength=d_sae))
        background = self._background(inputs)
        limit = density_limit(background, self.cfg)
        background = background[active_latents]
        table = self._on_train(train, active_latents, inputs.groups, background, limit)
        table.insert(1, "layer", inputs.layer)
        for name, values in self._columns(test, active_latents, inputs.groups).items():
            table[f"{name}_test"] = values
        self._per_type(table, test, active_latents, first, "_test")
        metrics, metric_notes = self._metrics(table, train, test, inputs.groups, limit)
        notes += metric_notes
        metrics["contrast/background_limit"] = limit.value
        metrics["contrast/token_count_p_value"] = matching.p_value
        metrics["contrast/n_dropped_by_matching"] = dropped
        log.info(
            "%d of %d latents active on the train split are significant",
            metrics["contrast/n_significant"],
            metrics["contrast/n_tested"],
        )
        result = Result(metrics=metrics, tables={"latents": table}, notes=notes)
        best = {g: metrics[f"contrast/best_latent_{g}"] for g in inputs.groups}
        result.merge(compare_with_surface(inputs, observed, train, test, best, self.cfg.seed))
        n_tested = int(metrics["contrast/n_tested"] or 0)
        n_leading = len(set(_leading_latents(metrics, inputs.groups).values()))
        result.merge(contrast_power(train, test, n_tested, n_leading, self.cfg.alpha))

        def claims(train: Split, test: Split) -> bool:
            if (_rank_test(train, active_latents)[1] > self.cfg.alpha).all():
                return False
            table = self._on_train(train, active_latents, inputs.groups, background, limit)
            return self._claims(table, test, inputs.groups)

        if n := self.cfg.placebo:
            result.merge(placebo_labels(claims, train, test, n, self.cfg.seed))
            result.merge(placebo_latents(table, self.cfg.alpha, n, self.cfg.seed))
        return result

    def _on_train(
        self,
        train: Split,
        latents: np.ndarray,
        groups: tuple[str, ...],
        background: np.ndarray,
        limit: DensityLimit,
    ) -> pd.DataFrame:
        """Columns of the train split, and which latents are selected on it."""
        first, second = groups
        table = pd.DataFrame({"latent": latents, **self._columns(train, latents, groups)})
        table["direction"] = np.where(_signed_direction(table) >= 0, first, second)
        self._per_type(table, train, latents, first, "")
        table["background_freq"] = background
        self._select(table, groups, limit)
        return table

    def _claims(self, table: pd.DataFrame, test: Split, groups: tuple[str, ...]) -> bool:
        """Whether one of the leading latents is above chance on the test split."""
        leading = pd.concat(
            [row for group in groups for row in self._leading_rows(table, group, groups)]
        )
        leading = leading.drop_duplicates("latent")
        if leading.empty:
            return False
        result = stratified_rank_test(test.csr[:, leading["latent"]], test.first, test.strata)
        is_first = (leading["direction"] == groups[0]).to_numpy()
        aurocs = np.where(is_first, result.auroc, 1 - result.auroc)
        pairs = zip(aurocs.tolist(), holm(result.p_value).tolist(), strict=True)
        return any(is_above_chance(auroc, p, self.cfg.alpha) for auroc, p in pairs)

    def _leading_rows(
        self, table: pd.DataFrame, group: str, groups: tuple[str, ...]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Table rows of a group's first selected latent and of its strongest one, or no rows."""
        selected = table[table["selected"] & (table["direction"] == group)]
        strongest = self._candidates(table, group, groups)
        strongest = strongest.sort_values("strength", ascending=False, kind="stable").head(1)
        return selected[selected["rank"] == 1], strongest

    def _columns(
        self, split: Split, latents: np.ndarray, groups: tuple[str, ...]
    ) -> dict[str, np.ndarray | int]:
        """Columns of the table on one split, without the names' suffix."""
        values, active = split.csr[:, latents], split.active[:, latents]
        columns: dict[str, np.ndarray | int] = {}
        for group, mask in zip(groups, (split.first, ~split.first), strict=True):
            rows = np.flatnonzero(mask)
            columns |= {
                f"n_{group}": len(rows),
                f"freq_{group}": column_means(active, rows),
                f"mean_{group}": column_means(values, rows),
            }
        means = StratumMeans.of(split, latents)
        frequencies = means.pooled(means.active)
        columns["separation"] = difference(frequencies)
        columns["mean_difference"] = difference(means.pooled(means.values))
        test, q_values = _rank_test(split, latents)
        columns |= {"auroc": test.auroc, "p_value": test.p_value, "q_value": q_values}
        n_first, n_second, weights = means.n_first, means.n_second, means.weights
        auroc = auroc_interval(test.auroc, n_first, n_second, weights, test.variance)
        columns |= {"ci_low": auroc.low, "ci_high": auroc.high}
        first, second = np.clip(frequencies, 0, 1)
        separation = separation_interval(first, second, n_first, n_second, weights)
        columns |= {"separation_ci_low": separation.low, "separation_ci_high": separation.high}
        return columns

    def _per_type(
        self, table: pd.DataFrame, split: Split, latents: np.ndarray, first: str, suffix: str
    ) -> None:
        """Add to `table` the smallest separation and AUROC over the strata, in the direction of
        each latent, and the separation of each entity type."""
        sign = np.where(table["direction"] == first, 1.0, -1.0)
        separations, aurocs = [], []
        for kind in sorted(set(split.strata)):
            chosen = split.strata == kind
            of_first = split.first[chosen]
            active = split.active[chosen][:, latents]
            pair = [column_means(active, np.flatnonzero(mask)) for mask in (of_first, ~of_first)]
            separations.append(sign * difference(np.stack(pair)))
            auroc = Ranked(split.csr[chosen][:, latents], of_first).observed()
            aurocs.append(np.where(sign > 0, auroc, 1 - auroc))
            if kind:
                table[f"separation_{kind}{suffix}"] = separations[-1]
        table[f"min_separation{suffix}"] = np.min(separations, axis=0)
        table[f"min_auroc{suffix}"] = np.min(aurocs, axis=0)

    def _background(self, inputs: AnalysisInputs) -> np.ndarray:
        """Fraction of neutral tokens on which each latent is active; NaN without neutral text."""
        if inputs.background is None:
            return np.full(inputs.latents.d_sae, np.nan)
        all_rows = np.ones(len(inputs.background), dtype=bool)
        return moments(inputs.background.csr, all_rows, THRESHOLD).frequency

    def _select(self, table: pd.DataFrame, groups: tuple[str, ...], limit: DensityLimit) -> None:
        """Mark the top_k significant latents of each direction by their smallest separation."""
        table["selected"], table["rank"] = False, pd.array([pd.NA] * len(table), dtype="Int64")
        is_sparse = ~limit.exceeded(table["background_freq"])
        eligible = table[is_sparse & (table["min_separation"] > 0)]
        for group in groups:
            candidates = self._candidates(eligible, group, groups)
            candidates = candidates.sort_values(["min_separation", "strength"], ascending=False)
            chosen = candidates.index[: self.cfg.top_k]
            table.loc[chosen, "selected"] = True
            table.loc[chosen, "rank"] = range(1, len(chosen) + 1)

    def _candidates(self, table: pd.DataFrame, group: str, groups: tuple[str, ...]) -> pd.DataFrame:
        """Significant latents of a direction on the train split, with `strength` |AUROC - 0.5|."""
        # The direction is that of the frequencies; the tested ranks must point the same way.
        agrees = (table["auroc"] > 0.5) == (group == groups[0])
        significant = table["q_value"] <= self.cfg.alpha
        candidates = table[significant & (table["direction"] == group) & agrees]
        return candidates.assign(strength=np.abs(candidates["auroc"] - 0.5))

    def _metrics(
        self,
        table: pd.DataFrame,
        train: Split,
        test: Split,
        groups: tuple[str, ...],
        limit: DensityLimit,
    ) -> tuple[dict[str, float | int | None], list[str]]:
        """Metrics and notes on the groups for which no latent, or a weak one, is selected."""
        significant = table[table["q_value"] <= self.cfg.alpha]
        q_values_test = benjamini_hochberg(significant["p_value_test"].to_numpy(dtype=float))
        same = np.sign(significant["auroc"] - 0.5) == np.sign(significant["auroc_test"] - 0.5)
        metrics: dict[str, float | int | None] = {
            "contrast/n_tested": int((table[[f"freq_{g}" for g in groups]] > 0).any(axis=1).sum()),
            "contrast/n_units_train": int(train.units["unit"].nunique()),
            "contrast/n_units_test": int(test.units["unit"].nunique()),
            **_sizes(groups, train, ""),
            **_sizes(groups, test, "_test"),
            "contrast/n_significant": len(significant),
            "contrast/n_significant_test": int(((q_values_test <= self.cfg.alpha) & same).sum()),
        }
        notes = []
        for group in groups:
            selected = table["selected"] & (table["direction"] == group)
            metrics[f"contrast/n_selected_{group}"] = int(selected.sum())
            best, strongest = self._leading_rows(table, group, groups)
            if best.empty:
                n_tested = int(metrics["contrast/n_tested"] or 0)
                labels = (train.first, train.strata)
                notes.append(why_none(significant, group, labels, n_tested, limit, self.cfg))
            else:
                notes += too_dense(significant, best, group, limit)
            first = group == groups[0]
            for kind, row in (("best", best), ("strongest", strongest)):
                leading = row.iloc[0] if len(row) else None
                metrics |= _leading_metrics(leading, kind, group, is_first=first)
        _adjust_p_values(metrics, groups)
        for group in groups:
            notes += at_chance(metrics, group, self.cfg.alpha)
        return metrics, notes


def _rank_test(split: Split, latents: np.ndarray) -> tuple[RankTest, np.ndarray]:
    """Rank test and q-value of each latent; the q-value of one inactive in the split is 1."""
    test = stratified_rank_test(split.csr[:, latents], split.first, split.strata)
    active, q_values = split.active[:, latents], np.ones(len(latents))
    is_active = column_means(active, np.arange(len(split.first))) > 0
    q_values[is_active] = benjamini_hochberg(test.p_value[is_active])
    return test, q_values


def _sizes(groups: tuple[str, ...], split: Split, suffix: str) -> dict[str, int]:
    n_first = int(split.first.sum())
    n = (n_first, len(split.first) - n_first)
    return {f"contrast/n_units_{g}{suffix}": m for g, m in zip(groups, n, strict=True)}


def _signed_direction(table: pd.DataFrame) -> np.ndarray:
    """Positive where a latent is associated with the first group: its separation, or the
    difference of the means where the separation is 0."""
    separation = table["separation"].to_numpy()
    return np.where(separation != 0, separation, table["mean_difference"].to_numpy())


def _leading_latents(
    metrics: Mapping[str, float | int | None], groups: tuple[str, ...]
) -> dict[str, int]:
    """Template of metric names ("best_{}_known") -> leading latent; without absent ones."""
    names = [f"{kind}_{{}}_{group}" for group in groups for kind in ("best", "strongest")]
    latents = {name: metrics[f"contrast/{name.format('latent')}"] for name in names}
    return {name: int(latent) for name, latent in latents.items() if latent is not None}


def _adjust_p_values(metrics: dict[str, float | int | None], groups: tuple[str, ...]) -> None:
    """Adjust the p-values of the leading latents of both groups, each latent counted once."""
    keys = {
        f"contrast/{name.format('p_value')}_test": latent
        for name, latent in _leading_latents(metrics, groups).items()
    }
    p_values = {latent: metrics[key] for key, latent in keys.items()}
    adjusted = holm(np.array(list(p_values.values()), dtype=float))
    of_latent = dict(zip(p_values, adjusted.tolist(), strict=True))
    metrics |= {key: of_latent[latent] for key, latent in keys.items()}


def _leading_metrics(
    best: pd.Series | None, kind: str, group: str, *, is_first: bool
) -> dict[str, float | int | None]:
    """Metrics of the `best` (first selected) or `strongest` latent of a group, in its direction.

    Both are chosen on the train split; metrics with `_test` describe the same latent. All are null
    where there is no such latent (`best` is None).
    """
    stem = f"contrast/{kind}"
    metrics: dict[str, float | int | None] = {
        f"{stem}_latent_{group}": None if best is None else int(best["latent"]),
        f"{stem}_background_freq_{group}": None,
    }
    if best is not None and not np.isnan(best["background_freq"]):
        metrics[f"{stem}_background_freq_{group}"] = float(best["background_freq"])
    p_value = None if best is None else float(best["p_value_test"])
    metrics[f"{stem}_p_value_{group}_test"] = p_value
    for suffix in ("", "_test"):
        for name in ("separation", "auroc", "min_separation", "min_auroc"):
            value = None
            if best is not None:
                value = float(best[f"{name}{suffix}"])
                if not is_first and name == "separation":
                    value = -value
                if not is_first and name == "auroc":
                    value = 1 - value
            metrics[f"{stem}_{name}_{group}{suffix}"] = value
        for name, column in (("auroc", ""), ("separation", "separation_")):
            low = high = None
            if best is not None and not np.isnan(best[f"{column}ci_low{suffix}"]):
                low = float(best[f"{column}ci_low{suffix}"])
                high = float(best[f"{column}ci_high{suffix}"])
                if not is_first:
                    low, high = (1 if name == "auroc" else 0) - high, (name == "auroc") - low
            metrics[f"{stem}_{name}_{group}_ci_low{suffix}"] = low
            metrics[f"{stem}_{name}_{group}_ci_high{suffix}"] = high
    return metrics
