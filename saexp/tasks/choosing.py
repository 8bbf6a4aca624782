"""Latents that a dashboard is of: those named, the contrast's best, or the most frequent."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from saexp import registry
from saexp.analysis.base import AnalysisInputs
from saexp.analysis.observations import equally_observed
from saexp.config import PositionsConfig, RunConfig
from saexp.errors import ConfigError, DataError
from saexp.latents.examples import firing_counts, latents_at
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.tasks.gathering import Gathered, gather
from saexp.tasks.shared import encoded_neutral
from saexp.wording import is_above_chance


@dataclass(frozen=True)
class Chosen:
    """Latents in the order in which they are shown, and how they were found."""

    latents: list[int]
    how: str
    contrast: pd.DataFrame | None = None
    """The contrast's table, where the data has two groups."""
    groups: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def contrast_of(self, latent: int, alpha: float) -> dict[str, Any] | None:
        """The contrast's numbers of it on the test split, in the latent's own direction.

        `is_above_chance` is at level `alpha` of the test split's q-value. None where there is no
        contrast, or the latent was never active in it.
        """
        if self.contrast is None:
            return None
        rows = self.contrast[self.contrast["latent"] == latent]
        if rows.empty:
            return None
        row = rows.iloc[0]
        own = row["direction"] == self.groups[0]
        low, high = row["ci_low_test"], row["ci_high_test"]
        auroc, separation = float(row["auroc_test"]), float(row["separation_test"])
        if not own:
            auroc, separation = 1 - auroc, -separation
            low, high = 1 - high, 1 - low
        q_value = float(row["q_value_test"])
        numbers: dict[str, Any] = {
            "direction": str(row["direction"]),
            "selected": bool(row["selected"]),
            "auroc": auroc,
            "ci_low": float(low),
            "ci_high": float(high),
            "separation": separation,
            "min_separation": float(row["min_separation_test"]),
            "q_value": float(row["q_value"]),
            "q_value_test": q_value,
            "is_above_chance": is_above_chance(auroc, q_value, alpha),
            "background_freq": float(row["background_freq"]),
        }
        for group in self.groups:
            numbers[f"freq_{group}"] = float(row[f"freq_{group}_test"])
            numbers[f"mean_{group}"] = float(row[f"mean_{group}_test"])
        return {k: None if pd.isna(v) else v for k, v in numbers.items()}


def choose(
    asked: list[int] | int,
    cfg: RunConfig,
    model: LanguageModel,
    sae: SparseAutoencoder,
    gathered: Gathered,
    neutral: Gathered,
) -> Chosen:
    """`asked` are latents, or how many of the best. Raises ConfigError for one the SAE lacks.

    The contrast is made as task=analyze makes it, with room for as many latents as are asked for.
    """
    if isinstance(asked, list):
        wrong = next((f for f in asked if f >= sae.d_sae), None)
        if wrong is not None:
            raise ConfigError(
                f"latents={asked}: {sae.metadata.get('name', 'the SAE')} has latents "
                f"0-{sae.d_sae - 1}, not {wrong}"
            )
    groups = gathered.examples.groups
    table, where, notes = None, cfg.positions.name, []
    if len(groups) == 2:
        at, where = _contrast_rows(cfg, model, sae, gathered)
        others = [n for n in at.examples.notes if n not in gathered.examples.notes]
        try:
            made = _contrast(cfg, sae, at, neutral, 0 if isinstance(asked, list) else asked)
            table, others = made.tables["latents"], [*others, *made.notes]
        except DataError as error:
            if not isinstance(asked, list):
                raise
            notes = [f"no contrast is shown: {error}"]
        notes = [*(f"contrast at {where}: {note}" for note in others), *notes]
    if isinstance(asked, list):
        return Chosen(asked, "as named", table, groups, notes)
    if table is not None:
        best = table[table["selected"]].sort_values(["rank", "q_value"])["latent"].tolist()[:asked]
        if 0 < len(best) < asked:
            notes += [f"the contrast selects {len(best)} latents, not the {asked} asked for"]
        if best:
            how = f"the contrast's best at {where.replace('_', ' ')}"
            return Chosen([int(f) for f in best], how, table, groups, notes)
    why = "the contrast selects no latent" if len(groups) == 2 else "the data set has no groups"
    counts = firing_counts(gathered.store, sae, gathered.ordinary(sae.hookpoints).mask)
    order = np.argsort(-counts, kind="stable")[:asked]
    notes += [f"{why}, so these are the latents that fire on most positions"]
    return Chosen([int(f) for f in order], "the most frequent", table, groups, notes)


def _contrast_rows(
    cfg: RunConfig, model: LanguageModel, sae: SparseAutoencoder, gathered: Gathered
) -> tuple[Gathered, str]:
    """(activations, their positions): where all tokens are shown, the entity's last token, which is
    what task=analyze looks at by default; the run's own positions otherwise."""
    if cfg.positions.name != "all" or not any(e.spans for e in gathered.examples.examples):
        return gathered, cfg.positions.name
    positions = PositionsConfig(name="entity_last", seed=cfg.positions.seed)
    return gather(replace(cfg, positions=positions), model, sae.hookpoints), positions.name


def _contrast(
    cfg: RunConfig, sae: SparseAutoencoder, at: Gathered, neutral: Gathered, n: int
) -> TaskResult:
    """As task=analyze makes it, without encoding the rows that it leaves out."""
    most = max(n, cfg.analyzer.top_k)
    analyzer = replace(cfg.analyzer, name="contrast", top_k=most, placebo=0, options={})
    rows = at.placement.rows
    used, _, notes = equally_observed(rows, at.examples.groups, analyzer.seed)
    inputs = AnalysisInputs(
        latents=latents_at(at.store, sae, rows, used),
        groups=at.examples.groups,
        layer=sae.hookpoint.layer,
        background=encoded_neutral(neutral, sae),
    )
    made: TaskResult = registry.build("analyzer", analyzer).analyze(inputs)
    made.notes = list(dict.fromkeys([*notes, *made.notes]))
    return made
