"""Which latents separate two groups of entities: selected on train, judged on test."""

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd

from saexp.analysis.base import AnalysisInputs, Analyzer
from saexp.analysis.classifier_metrics import Auroc, auroc_difference, auroc_of
from saexp.analysis.contrast_checks import contrast_power, placebo_labels, placebo_latents
from saexp.analysis.contrast_notes import (
    DensityLimit,
    at_chance,
    density_limit,
    louder,
    match_token_counts,
    unequal_types,
    why_none,
)
from saexp.analysis.observations import (
    THRESHOLD,
    Observations,
    Split,
    StratumMeans,
    column_means,
    difference,
    observations,
    split_of,
)
from saexp.analysis.surface_baseline import observation_scores, read_texts, token_counts
from saexp.errors import DataError
from saexp.latents.statistics import moments
from saexp.results import TaskResult
from saexp.stats.intervals import separation_interval, stratified_auroc_interval
from saexp.stats.power import benjamini_hochberg, holm
from saexp.stats.rank_tests import Ranked, RankTest, stratified_rank_test
from saexp.wording import is_above_chance

log = logging.getLogger(__name__)


_KEY = "contrast/surface_auroc_test"


def beside_surface(
    inputs: AnalysisInputs,
    observed: Observations,
    train: Split,
    test: Split,
    best: Mapping[str, float | int | None],
    seed: int,
) -> TaskResult:
    """Metrics `contrast/surface_auroc_test` and `contrast/best_minus_surface_<g>_test`.

    `best` is the first selected latent of each group; its AUROC is taken in the group's direction.
    Each metric has `_ci_low` and `_ci_high`. Nothing without texts; null, with a note, where the
    train split is too small for cross-validation.
    """
    if not inputs.texts:
        return TaskResult()
    names = [_KEY, *(f"contrast/best_minus_surface_{group}_test" for group in best)]
    result = TaskResult(metrics=dict.fromkeys(_with_limits(names)))
    units = pd.concat([train.units, test.units], ignore_index=True)
    number = pd.Series(range(len(units)), index=units["observation"])
    rows = observed.rows[observed.rows["observation"].isin(number.index)]
    try:
        scores = observation_scores(
            read_texts(rows, inputs.texts),
            number[rows["observation"]].to_numpy(dtype=np.int64),
            units["unit"].to_numpy(dtype=object),
            np.append(train.first, test.first),
            np.arange(len(units)) < len(train.first),
            token_counts(inputs.neutral_texts),
            seed,
        )
    except DataError as error:
        result.notes.append(f"no surface baseline ({_KEY}): {error}")
        return result
    result.metrics |= _numbers(_KEY, auroc_of(scores, test.first, test.strata))
    for group, latent in best.items():
        if latent is None:
            continue
        is_first = group == inputs.groups[0]
        values = test.csr[:, [int(latent)]].toarray()[:, 0].astype(np.float64)
        member, other = (test.first, scores) if is_first else (~test.first, -scores)
        made = auroc_difference(values, other, member, test.strata)
        result.metrics |= _numbers(f"contrast/best_minus_surface_{group}_test", made)
    return result


def _with_limits(names: list[str]) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")]


def _numbers(name: str, auroc: Auroc) -> dict[str, float | int | None]:
    values = (auroc.value, float(auroc.interval.low), float(auroc.interval.high))
    found = zip(_with_limits([name]), values, strict=True)
    return {key: None if np.isnan(value) else value for key, value in found}


_WITHIN_TYPES = "AUROC, separation and tests compare within types, freq_ and mean_ do not"


class ContrastAnalyzer(Analyzer):
    """Registry kind `analyzer`, name `contrast`."""

    reads_acts = False
    selects_latents = True

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `contrast/…` and the table `latents`.

        Columns without suffix are of the train split, `_test` ones of the test split. `n_<g>`,
        `freq_<g>`, `mean_<g>` are plain numbers of the group's units; what compares the groups
        does so within entity types: `separation`, `mean_difference` and `auroc` (P(first >
        second)) are means over types with van Elteren's weights, `p_value` is his test (see
        RankTest), `q_value` that after Benjamini-Hochberg over every latent active in the split, 1
        for the others. `ci_low`, `ci_high` are Newcombe's method 5 for `auroc`, `separation_ci_…`
        his hybrid (see saexp.stats.intervals), NaN for groups of fewer than MIN_GROUP units.
        `direction` is the group that a latent is associated with, in which `min_separation` and
        `min_auroc` are the smallest over the types, or overall where the groups share none.
        Units of types that only one group has are left out. `best_p_value_<g>_test` and
        `strongest_…` are the test split's p-values of the leading latents after Holm over those of
        both groups. Raises DataError where a split lacks a group.
        """
        if len(inputs.groups) != 2:
            raise DataError(
                "the data set has no two groups to contrast; give its rows a 'group', set "
                "dataset.group_rule, or type task=collect"
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
        fired = np.flatnonzero(np.bincount(observed.csr.indices, minlength=inputs.latents.d_sae))
        background = self._background(inputs)
        limit = density_limit(background, self.cfg)
        table = self._on_train(train, fired, inputs.groups, background[fired], limit)
        table.insert(1, "layer", inputs.layer)
        for name, values in self._columns(test, fired, inputs.groups).items():
            table[f"{name}_test"] = values
        self._per_type(table, test, fired, first, "_test")
        metrics = self._metrics(table, train, test, inputs.groups, limit, notes)
        metrics["contrast/background_limit"] = limit.value
        metrics["contrast/token_count_p_value"] = matching.p_value
        metrics["contrast/n_dropped_by_matching"] = dropped
        log.info(
            "%d of %d latents that fired on the train split are significant",
            metrics["contrast/n_significant"],
            metrics["contrast/n_tested"],
        )
        result = TaskResult(metrics=metrics, tables={"latents": table}, notes=notes)
        best = {g: metrics[f"contrast/best_latent_{g}"] for g in inputs.groups}
        result.merge(beside_surface(inputs, observed, train, test, best, self.cfg.seed))
        n_tested = int(metrics["contrast/n_tested"] or 0)
        n_leading = len(set(_leading_latents(metrics, inputs.groups).values()))
        result.merge(contrast_power(train, test, n_tested, n_leading, self.cfg.alpha))

        def claims(train: Split, test: Split) -> bool:
            if (_tested(train, fired)[1] > self.cfg.alpha).all():
                return False
            made = self._on_train(train, fired, inputs.groups, background[fired], limit)
            return self._claims(made, test, inputs.groups)

        if self.cfg.placebo:
            about = (self.cfg.placebo, self.cfg.seed)
            result.merge(placebo_labels(claims, train, test, *about))
            result.merge(placebo_latents(table, self.cfg.alpha, *about))
        return result

    def _on_train(
        self,
        train: Split,
        fired: np.ndarray,
        groups: tuple[str, ...],
        background: np.ndarray,
        limit: DensityLimit,
    ) -> pd.DataFrame:
        """Columns of the train split, and which latents are selected on it."""
        first, second = groups
        table = pd.DataFrame({"latent": fired, **self._columns(train, fired, groups)})
        table["direction"] = np.where(_leaning(table) >= 0, first, second)
        self._per_type(table, train, fired, first, "")
        table["background_freq"] = background
        self._select(table, groups, limit)
        return table

    def _claims(self, table: pd.DataFrame, test: Split, groups: tuple[str, ...]) -> bool:
        """Whether one of the leading latents is above chance on the test split."""
        leading = pd.concat([row for group in groups for row in self._led_by(table, group, groups)])
        leading = leading.drop_duplicates("latent")
        if leading.empty:
            return False
        tested = stratified_rank_test(test.csr[:, leading["latent"]], test.first, test.strata)
        is_first = (leading["direction"] == groups[0]).to_numpy()
        aurocs = np.where(is_first, tested.auroc, 1 - tested.auroc)
        pairs = zip(aurocs.tolist(), holm(tested.p_value).tolist(), strict=True)
        return any(is_above_chance(auroc, p, self.cfg.alpha) for auroc, p in pairs)

    def _led_by(
        self, table: pd.DataFrame, group: str, groups: tuple[str, ...]
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows of a group's first selected latent and of its strongest one, or none."""
        mine = table[table["selected"] & (table["direction"] == group)]
        strongest = self._candidates(table, group, groups)
        strongest = strongest.sort_values("strength", ascending=False, kind="stable").head(1)
        return mine[mine["rank"] == 1], strongest

    def _columns(
        self, split: Split, fired: np.ndarray, groups: tuple[str, ...]
    ) -> dict[str, np.ndarray | int]:
        values, active = split.csr[:, fired], split.active[:, fired]
        columns: dict[str, np.ndarray | int] = {}
        for group, mask in zip(groups, (split.first, ~split.first), strict=True):
            rows = np.flatnonzero(mask)
            columns |= {
                f"n_{group}": len(rows),
                f"freq_{group}": column_means(active, rows),
                f"mean_{group}": column_means(values, rows),
            }
        means = StratumMeans.of(split, fired)
        frequencies = means.pooled(means.active)
        columns["separation"] = difference(frequencies)
        columns["mean_difference"] = difference(means.pooled(means.values))
        test, q_values = _tested(split, fired)
        columns |= {"auroc": test.auroc, "p_value": test.p_value, "q_value": q_values}
        n_first, n_second, weights = means.n_first, means.n_second, means.weights
        auroc = stratified_auroc_interval(test.auroc, n_first, n_second, weights, test.variance)
        columns |= {"ci_low": auroc.low, "ci_high": auroc.high}
        first, second = np.clip(frequencies, 0, 1)
        separation = separation_interval(first, second, n_first, n_second, weights)
        columns |= {"separation_ci_low": separation.low, "separation_ci_high": separation.high}
        return columns

    def _per_type(
        self, table: pd.DataFrame, split: Split, fired: np.ndarray, first: str, suffix: str
    ) -> None:
        """Add the smallest separation and AUROC over the strata, in each latent's direction."""
        sign = np.where(table["direction"] == first, 1.0, -1.0)
        separations, aurocs = [], []
        for kind in sorted(set(split.strata)):
            chosen = split.strata == kind
            of_first = split.first[chosen]
            active = split.active[chosen][:, fired]
            pair = [column_means(active, np.flatnonzero(mask)) for mask in (of_first, ~of_first)]
            separations.append(sign * difference(np.stack(pair)))
            auroc = Ranked(split.csr[chosen][:, fired], of_first).observed()
            aurocs.append(np.where(sign > 0, auroc, 1 - auroc))
            if kind:
                table[f"separation_{kind}{suffix}"] = separations[-1]
        table[f"min_separation{suffix}"] = np.min(separations, axis=0)
        table[f"min_auroc{suffix}"] = np.min(aurocs, axis=0)

    def _background(self, inputs: AnalysisInputs) -> np.ndarray:
        """Every latent's density on neutral text; NaN without any."""
        if inputs.background is None:
            return np.full(inputs.latents.d_sae, np.nan)
        everywhere = np.ones(len(inputs.background), dtype=bool)
        return moments(inputs.background.csr, everywhere, THRESHOLD).frequency

    def _select(self, table: pd.DataFrame, groups: tuple[str, ...], limit: DensityLimit) -> None:
        """Mark per direction the top_k significant latents by minimum separation, on train only."""
        table["selected"], table["rank"] = False, pd.array([pd.NA] * len(table), dtype="Int64")
        quiet = ~limit.exceeded(table["background_freq"])
        good = table[quiet & (table["min_separation"] > 0)]
        for group in groups:
            mine = self._candidates(good, group, groups)
            mine = mine.sort_values(["min_separation", "strength"], ascending=False)
            chosen = mine.index[: self.cfg.top_k]
            table.loc[chosen, "selected"] = True
            table.loc[chosen, "rank"] = range(1, len(chosen) + 1)

    def _candidates(self, table: pd.DataFrame, group: str, groups: tuple[str, ...]) -> pd.DataFrame:
        """Significant latents of a direction on the train split, with their `strength`."""
        # What it is tested for, rank, must point to the same group as how often it fires.
        agrees = (table["auroc"] > 0.5) == (group == groups[0])
        significant = table["q_value"] <= self.cfg.alpha
        mine = table[significant & (table["direction"] == group) & agrees]
        return mine.assign(strength=np.abs(mine["auroc"] - 0.5))

    def _metrics(
        self,
        table: pd.DataFrame,
        train: Split,
        test: Split,
        groups: tuple[str, ...],
        limit: DensityLimit,
        notes: list[str],
    ) -> dict[str, float | int | None]:
        significant = table[table["q_value"] <= self.cfg.alpha]
        again = benjamini_hochberg(significant["p_value_test"].to_numpy(dtype=float))
        same = np.sign(significant["auroc"] - 0.5) == np.sign(significant["auroc_test"] - 0.5)
        metrics: dict[str, float | int | None] = {
            "contrast/n_tested": int((table[[f"freq_{g}" for g in groups]] > 0).any(axis=1).sum()),
            "contrast/n_units_train": int(train.units["unit"].nunique()),
            "contrast/n_units_test": int(test.units["unit"].nunique()),
            **_sizes(groups, train, ""),
            **_sizes(groups, test, "_test"),
            "contrast/n_significant": len(significant),
            "contrast/n_significant_test": int(((again <= self.cfg.alpha) & same).sum()),
        }
        for group in groups:
            mine = table["selected"] & (table["direction"] == group)
            metrics[f"contrast/n_selected_{group}"] = int(mine.sum())
            best, strongest = self._led_by(table, group, groups)
            if best.empty:
                n_tested = int(metrics["contrast/n_tested"] or 0)
                labels = (train.first, train.strata)
                notes.append(why_none(significant, group, labels, n_tested, limit, self.cfg))
            elif note := louder(significant, best, group, limit):
                notes.append(note)
            first = group == groups[0]
            for kind, row in (("best", best), ("strongest", strongest)):
                metrics |= _leading(row.iloc[0] if len(row) else None, kind, group, sign=first)
        _adjust_p_values(metrics, groups)
        for group in groups:
            notes += at_chance(metrics, group, self.cfg.alpha)
        return metrics


def _tested(split: Split, fired: np.ndarray) -> tuple[RankTest, np.ndarray]:
    """The rank test of every latent, and its q-value among those active in the split."""
    test = stratified_rank_test(split.csr[:, fired], split.first, split.strata)
    active, q_values = split.active[:, fired], np.ones(len(fired))
    here = column_means(active, np.arange(len(split.first))) > 0
    q_values[here] = benjamini_hochberg(test.p_value[here])
    return test, q_values


def _sizes(groups: tuple[str, ...], split: Split, suffix: str) -> dict[str, int]:
    n_first = int(split.first.sum())
    n = (n_first, len(split.first) - n_first)
    return {f"contrast/n_units_{g}{suffix}": m for g, m in zip(groups, n, strict=True)}


def _leaning(table: pd.DataFrame) -> np.ndarray:
    """Positive where a latent is associated with the first group: by separation, else by mean."""
    separation = table["separation"].to_numpy()
    return np.where(separation != 0, separation, table["mean_difference"].to_numpy())


def _leading_latents(
    metrics: Mapping[str, float | int | None], groups: tuple[str, ...]
) -> dict[str, int]:
    """Names of metrics ("best_{}_known") of each leading latent -> latent, where there is one."""
    names = [f"{kind}_{{}}_{group}" for group in groups for kind in ("best", "strongest")]
    found = {name: metrics[f"contrast/{name.format('latent')}"] for name in names}
    return {name: int(latent) for name, latent in found.items() if latent is not None}


def _adjust_p_values(metrics: dict[str, float | int | None], groups: tuple[str, ...]) -> None:
    """Holm over the leading latents of both groups, each latent counted once."""
    keys = {
        f"contrast/{name.format('p_value')}_test": latent
        for name, latent in _leading_latents(metrics, groups).items()
    }
    p_values = {latent: metrics[key] for key, latent in keys.items()}
    adjusted = holm(np.array(list(p_values.values()), dtype=float))
    of_latent = dict(zip(p_values, adjusted.tolist(), strict=True))
    metrics |= {key: of_latent[latent] for key, latent in keys.items()}


def _leading(
    best: pd.Series | None, kind: str, group: str, *, sign: bool
) -> dict[str, float | int | None]:
    """Numbers of a direction's `best` (selected first) or `strongest` latent, in that direction.

    Both are chosen on the train split; `_test` twins are of the same latent.
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
                if not sign and name == "separation":
                    value = -value
                if not sign and name == "auroc":
                    value = 1 - value
            metrics[f"{stem}_{name}_{group}{suffix}"] = value
        for name, column in (("auroc", ""), ("separation", "separation_")):
            low = high = None
            if best is not None and not np.isnan(best[f"{column}ci_low{suffix}"]):
                low = float(best[f"{column}ci_low{suffix}"])
                high = float(best[f"{column}ci_high{suffix}"])
                if not sign:
                    low, high = (1 if name == "auroc" else 0) - high, (name == "auroc") - low
            metrics[f"{stem}_{name}_{group}_ci_low{suffix}"] = low
            metrics[f"{stem}_{name}_{group}_ci_high{suffix}"] = high
    return metrics
