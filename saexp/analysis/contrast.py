"""Which latents tell two groups of entities apart: chosen on train, judged on test.

The study of Ferrando et al. 2024 (arXiv 2411.14257, section 4): separation of known = f_known -
f_unknown, the reverse for unknown, f the share of entities whose latent fires (> 1e-6); a general
latent has a high minimum over the entity types. On top: tests, correction, intervals, held-out
entities; and beside the most selective latent of each group the strongest one, which may be active
on any text. One observation is one entity: rows of the same entity are averaged first.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.base import AnalysisInputs
from saexp.analysis.contrast_notes import at_chance, louder, no_width, why_none
from saexp.analysis.density import DensityLimit, density_limit
from saexp.analysis.matching import match_token_counts
from saexp.analysis.statistics import Ranked, welch_t
from saexp.config import AnalyzerConfig
from saexp.errors import DataError
from saexp.latents.summary import by_unit, moments
from saexp.results import TaskResult
from saexp.stats.multiplicity import benjamini_hochberg
from saexp.wording import counted

log = logging.getLogger(__name__)

THRESHOLD = 1e-6


@dataclass
class _Split:
    """Units of one split."""

    csr: sparse.csr_array
    units: pd.DataFrame
    first: np.ndarray
    """Whether a unit is of the first group."""


class ContrastAnalyzer:
    """Registry kind `analyzer`, name `contrast`."""

    def __init__(self, cfg: AnalyzerConfig) -> None:
        self.cfg = cfg

    def analyze(self, inputs: AnalysisInputs) -> TaskResult:
        """Metrics `contrast/…` and the table `latents`.

        Columns without suffix are of the train split, `_test` ones of the test split. `auroc` is
        P(first > second); `p_value` its Mann-Whitney test (see RankTest), `q_value` that after
        Benjamini-Hochberg over every latent that fired in the split, 1 for the others; `ci_low`,
        `ci_high` a bootstrap interval of `auroc`; `direction` the group that a latent is
        associated with, in which `min_separation` and `min_auroc` are the smallest over the entity
        types that both groups have, or overall where they share none. Raises DataError where a
        split lacks a group.
        """
        if len(inputs.groups) != 2:
            raise DataError(
                "the data set has no two groups to contrast; give its rows a 'group', set "
                "dataset.group_rule, or type task=collect"
            )
        inputs.check_splits()
        first, second = inputs.groups
        # Rows of a third group, or of none, would count as second.
        mine = inputs.latents.rows["group"].isin(inputs.groups).to_numpy(dtype=bool)
        rows = inputs.latents.rows[mine]
        observed, both = _observed(rows)
        csr, where = by_unit(inputs.latents.csr[mine], observed)
        units = rows.iloc[where].reset_index(drop=True)
        matching = match_token_counts(
            units, (first, second), self.cfg.seed, resample=self.cfg.match_tokens
        )
        csr, units = csr[matching.keep], units[matching.keep].reset_index(drop=True)
        dropped = int((~matching.keep).sum())
        train = self._split(csr, units, inputs.groups, "train", dropped)
        test = self._split(csr, units, inputs.groups, "test", dropped)
        fired = np.flatnonzero(np.bincount(csr.indices, minlength=csr.shape[1]))
        table = pd.DataFrame({"latent": fired, "layer": inputs.layer})
        table = table.assign(**self._columns(train, fired, inputs.groups))
        table["direction"] = np.where(_leaning(table, first, second) >= 0, first, second)
        for name, values in self._columns(test, fired, inputs.groups).items():
            table[f"{name}_test"] = values
        notes = list(matching.notes)
        if both:
            notes.append(
                f"{counted(both, 'entity has', 'entities have')} rows of both groups; each counts "
                "once in either, though the two are not independent"
            )
        for split, suffix in ((train, ""), (test, "_test")):
            if not self._per_type(table, split, fired, first, suffix):
                name = "test" if suffix else "train"
                notes.append(
                    f"split {name}: {first} and {second} share no entity type, so min_separation "
                    "and min_auroc are over all entities"
                )
        background = self._background(inputs)
        table["background_freq"] = background[fired]
        limit = density_limit(background, self.cfg)
        self._select(table, inputs.groups, limit)
        metrics = self._metrics(table, train, test, inputs.groups, limit, notes)
        metrics["contrast/background_limit"] = limit.value
        metrics["contrast/token_count_p_value"] = matching.p_value
        metrics["contrast/n_dropped_by_matching"] = dropped
        log.info(
            "%d of %d latents that fired on the train split are significant",
            metrics["contrast/n_significant"],
            metrics["contrast/n_tested"],
        )
        return TaskResult(metrics=metrics, tables={"latents": table}, notes=notes)

    def _split(
        self,
        csr: sparse.csr_array,
        units: pd.DataFrame,
        groups: tuple[str, ...],
        name: str,
        dropped: int,
    ) -> _Split:
        """One split; `dropped` is how many entities matching of token counts left out of all."""
        chosen = (units["split"] == name).fillna(False).to_numpy(dtype=bool)
        part = units[chosen].reset_index(drop=True)
        sizes = {g: int((part["group"] == g).sum()) for g in groups}
        for group, size in sizes.items():
            if size < 2:
                why = (
                    f" after {dropped} were dropped to match the groups' token counts; type "
                    "analyzer.match_tokens=false to keep them"
                    if dropped
                    else ""
                )
                raise DataError(
                    f"split {name} has {counted(size, 'entity', 'entities')} of group '{group}'"
                    f"{why}; a contrast needs at least 2: add rows, or change dataset.split"
                )
        first = (part["group"] == groups[0]).to_numpy(dtype=bool)
        return _Split(csr[chosen], part, first)

    def _columns(
        self, split: _Split, fired: np.ndarray, groups: tuple[str, ...]
    ) -> dict[str, np.ndarray | int]:
        values = sparse.csr_array(split.csr[:, fired])
        a, b = moments(values, split.first, THRESHOLD), moments(values, ~split.first, THRESHOLD)
        columns: dict[str, np.ndarray | int] = {}
        for group, m in zip(groups, (a, b), strict=True):
            columns |= {f"n_{group}": m.n, f"freq_{group}": m.frequency, f"mean_{group}": m.mean}
        columns["separation"] = a.frequency - b.frequency
        columns["mean_difference"] = a.mean - b.mean
        t, p = welch_t(a.mean, a.variance, a.n, b.mean, b.variance, b.n)
        columns |= {"welch_t": t, "welch_p": p}
        ranked = Ranked(values, split.first)
        test = ranked.mann_whitney()
        columns |= {"auroc": test.auroc, "p_value": test.p_value}
        here, q = a.active + b.active > 0, np.ones(len(fired))
        q[here] = benjamini_hochberg(test.p_value[here])
        columns["q_value"] = q
        if self.cfg.n_bootstrap:
            active = values.copy()
            active.data = (values.data > THRESHOLD).astype(np.float64)
            auroc, separation = ranked.bootstrap(active, self.cfg.n_bootstrap, self.cfg.seed)
            columns |= {"ci_low": auroc[0], "ci_high": auroc[1]}
            columns |= {"separation_ci_low": separation[0], "separation_ci_high": separation[1]}
        return columns

    def _per_type(
        self, table: pd.DataFrame, split: _Split, fired: np.ndarray, first: str, suffix: str
    ) -> bool:
        """Add the smallest separation and AUROC over entity types, in each latent's direction.

        False where no type has both groups; the values are those of all units then.
        """
        sign = np.where(table["direction"] == first, 1.0, -1.0)
        separations, aurocs = [], []
        types = split.units["entity_type"].fillna("").to_numpy()
        both = sorted(set(types[split.first]) & set(types[~split.first]))
        for kind in both or [None]:
            chosen = np.ones(len(types), dtype=bool) if kind is None else types == kind
            of_first = split.first[chosen]
            values = sparse.csr_array(split.csr[chosen][:, fired])
            a, b = moments(values, of_first, THRESHOLD), moments(values, ~of_first, THRESHOLD)
            separations.append(sign * (a.frequency - b.frequency))
            auroc = Ranked(values, of_first).observed()
            aurocs.append(np.where(sign > 0, auroc, 1 - auroc))
            if kind:
                table[f"separation_{kind}{suffix}"] = separations[-1]
        table[f"min_separation{suffix}"] = np.min(separations, axis=0)
        table[f"min_auroc{suffix}"] = np.min(aurocs, axis=0)
        return bool(both)

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
        train: _Split,
        test: _Split,
        groups: tuple[str, ...],
        limit: DensityLimit,
        notes: list[str],
    ) -> dict[str, float | int | None]:
        significant = table[table["q_value"] <= self.cfg.alpha]
        again = benjamini_hochberg(significant["p_value_test"].to_numpy(dtype=float))
        same = np.sign(significant["auroc"] - 0.5) == np.sign(significant["auroc_test"] - 0.5)
        metrics: dict[str, float | int | None] = {
            "contrast/n_tested": int((table[[f"freq_{g}" for g in groups]] > 0).any(axis=1).sum()),
            "contrast/n_units_train": len(train.units),
            "contrast/n_units_test": len(test.units),
            "contrast/n_significant": len(significant),
            "contrast/n_significant_test": int(((again <= self.cfg.alpha) & same).sum()),
        }
        for group in groups:
            mine = table[table["selected"] & (table["direction"] == group)]
            metrics[f"contrast/n_selected_{group}"] = len(mine)
            best = mine[mine["rank"] == 1]
            if best.empty:
                n_tested = int(metrics["contrast/n_tested"] or 0)
                notes.append(why_none(significant, group, train.first, n_tested, limit, self.cfg))
            elif note := louder(significant, best, group, limit):
                notes.append(note)
            notes += no_width(best, group, len(test.units))
            strongest = self._candidates(table, group, groups)
            strongest = strongest.sort_values("strength", ascending=False, kind="stable").head(1)
            first = group == groups[0]
            for kind, row in (("best", best), ("strongest", strongest)):
                metrics |= _leading(row.iloc[0] if len(row) else None, kind, group, sign=first)
            notes += at_chance(metrics, group)
        return metrics


def _leaning(table: pd.DataFrame, first: str, second: str) -> np.ndarray:
    """Positive where a latent is associated with the first group: by separation, else by mean."""
    means = table[f"mean_{first}"] - table[f"mean_{second}"]
    separation = table["separation"].to_numpy()
    return np.where(separation != 0, separation, means.to_numpy())


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
            if best is not None and f"{column}ci_low{suffix}" in best:
                low = float(best[f"{column}ci_low{suffix}"])
                high = float(best[f"{column}ci_high{suffix}"])
                if not sign:
                    low, high = (1 if name == "auroc" else 0) - high, (name == "auroc") - low
            metrics[f"{stem}_{name}_{group}_ci_low{suffix}"] = low
            metrics[f"{stem}_{name}_{group}_ci_high{suffix}"] = high
    return metrics


def _observed(rows: pd.DataFrame) -> tuple[np.ndarray, int]:
    """(what is one observation, per row; how many entities have rows of both groups).

    An observation is an entity, or an entity in one group where it has rows of both.
    """
    both = rows.groupby("unit")["group"].transform("nunique") > 1
    if not both.any():
        return rows["unit"].to_numpy(), 0
    parted = rows["unit"].astype(str).where(~both, rows["unit"].astype(str) + "\n" + rows["group"])
    return parted.to_numpy(), int(rows.loc[both, "unit"].nunique())
