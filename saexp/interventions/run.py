"""The causal test: all conditions of an intervention on prompts, their outcomes and statistics."""

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import InterventionConfig, parse_coefficients
from saexp.data import Example
from saexp.errors import InterventionError, duration_words
from saexp.interventions.attention import AttentionTest
from saexp.interventions.conditions import Condition, Prompts, position_prompts, tested_examples
from saexp.interventions.controls import (
    ControlDesign,
    control_notes,
    control_table,
    missing_kinds_note,
)
from saexp.interventions.directions import LatentStatistics
from saexp.interventions.effects import (
    chosen_coefficients,
    claim_notes,
    described,
    effect_metrics,
    numeric_outcomes,
    summarise,
    with_claims,
    with_strengths,
)
from saexp.interventions.measure import (
    BASELINE_COLUMNS,
    Job,
    Measurement,
    constant_note,
    constant_rates,
    fitting,
    jobs_by_weights,
    knowledge,
    weight_costs,
    with_texts,
)
from saexp.interventions.outcomes import (
    constant_rate_notes,
    has_value,
    outcome_objects,
    rounding_notes,
    tested_kinds,
)
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.interventions.stream_edits import Vector
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import Original, orthogonalized
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import sae_identity
from saexp.stats.significance import MIN_CONTROLS

log = logging.getLogger(__name__)
_MIN_ESTIMATED = 100
"""Fewer edited prompts are run without an estimate of their time, unless it is known."""
_N_TIMED = 8
"""Prompts on which the time of outcomes is measured."""


def run_intervention(
    intervention: Any,
    facts: LatentStatistics,
    model: LanguageModel,
    sae: SparseAutoencoder,
    examples: Sequence[Example],
    neutral: Sequence[str],
    max_length: int,
    cache_dir: str | Path,
) -> Result:
    """Run an intervention's conditions on prompts of the test and the train split.

    Tables: `effects` (one row per prompt, condition and coefficient), `effects_summary` (see
    `summarise`; `chosen` marks the coefficient chosen on train prompts), `controls` (see
    `control_table`), and with the outcomes `neutral_kl` and `attention` also `costs` and
    `attention`. Metrics of the test split: see `effect_metrics`. Prompts without the positions of
    `intervention.where` are left out; notes count them by reason.
    """
    return CausalTest(intervention, facts, model, sae, max_length, cache_dir).run(examples, neutral)


class CausalTest:
    """The causal test of one intervention on one model."""

    def __init__(
        self,
        intervention: Any,
        facts: LatentStatistics,
        model: LanguageModel,
        sae: SparseAutoencoder,
        max_length: int,
        cache_dir: str | Path,
    ) -> None:
        self.intervention, self.facts, self.model, self.sae = intervention, facts, model, sae
        self.saes = facts.saes or {sae.hookpoint: sae}
        self.cfg: InterventionConfig = intervention.cfg
        self.max_length, self.cache_dir = max_length, cache_dir
        self.outcomes = outcome_objects(self.cfg.outcomes)
        self.kinds = tested_kinds(self.outcomes)
        self.coefficients = parse_coefficients(self.cfg.coefficient)
        self.seconds_per_prompt: float | None = None
        """Of the outcomes `timed`, without intervention; None where their results were stored."""
        self.timed: tuple[str, ...] = ()

    def with_outcomes(self, outcomes: Sequence[Any]) -> "CausalTest":
        """The same test of other outcomes."""
        other = copy.copy(self)
        other.outcomes, other.kinds = list(outcomes), tested_kinds(outcomes)
        return other

    def run(self, examples: Sequence[Example], neutral: Sequence[str]) -> Result:
        """Run the whole test; see `run_intervention`."""
        chosen = tested_examples(self.cfg, examples)
        prompts = position_prompts(chosen, self.model, self.cfg, self.max_length)
        if not prompts.of_group:
            raise InterventionError(
                f"no prompt can be steered ({'; '.join(prompts.notes()) or 'there are no prompts'})"
            )
        planned, notes = self.intervention.plan(self.facts, self.coefficients, prompts, self.model)
        if not planned:
            return Result(notes=["no latent is selected, so nothing was steered", *notes])
        design = ControlDesign(self.intervention, planned, self.coefficients, self.cfg)
        result = Result(notes=[*notes, *prompts.notes()])
        test = self._of_varying_outcomes(design, prompts, chosen, result)
        is_left = test.kinds or any(o.source == "heads" for o in test.outcomes)
        if is_left or not self.kinds:
            measured = test._measurable(prompts, result)
            if len(measured.of_group) < len(prompts.of_group):
                planned = [c for c in planned if measured.on(c.prompts)]
                design = ControlDesign(self.intervention, planned, self.coefficients, self.cfg)
                chosen = [e for e in chosen if str(e.group) in measured.of_group]
            if planned:
                test._run(design, measured, chosen, neutral, result)
        return result

    def _measurable(self, prompts: Prompts, result: Result) -> Prompts:
        """The groups of prompts on which an outcome can have a value; a note names the others."""
        on_prompts = [o for o in self.outcomes if o.source != "cost"]
        if not on_prompts:
            return prompts
        tokenizer = self.model.tokenizer
        measured = prompts.of_groups(
            lambda p: any(has_value(o, p.example, tokenizer) for o in on_prompts)
        )
        lacking = [g for g in prompts.of_group if g not in measured.of_group]
        if lacking:
            n = " and ".join(f"{len(prompts.of_group[g])} {g}" for g in lacking)
            verb = "has" if len(on_prompts) == 1 else "have"
            result.notes.append(
                f"nothing is changed on {n} prompts, because "
                f"{' and '.join(o.name for o in on_prompts)} {verb} no value on any of them (the "
                "data have no answers for them)"
            )
        return measured

    def _run(
        self,
        design: ControlDesign,
        prompts: Prompts,
        chosen: Sequence[Example],
        neutral: Sequence[str],
        result: Result,
    ) -> None:
        """All conditions of the design; tables, metrics and notes are added to `result`."""
        at_every = [*design.own, *design.curve()]
        self._log_size(design, at_every, prompts, chosen)
        parts = [self._measured(at_every, prompts, chosen, neutral, result, with_baseline=True)]
        strongest = max(self.coefficients, key=abs)
        best = self._choose(parts[0], result.notes)
        of_main = {c.name: best.get(c.name, strongest) for c in design.main}
        further, kl = self._further(design, of_main, neutral, result)
        tested = prompts.of_split("test")
        if further and tested.of_group:
            parts.append(self._measured(further, tested, chosen, neutral, result))
        conditions = [*at_every, *further]
        effects = with_texts(self._together(parts), result.tables.get("baselines"))
        result.tables["effects"] = effects
        result.notes += constant_rate_notes(effects, self.kinds)
        result.notes += rounding_notes(self.outcomes, self.model.dtype)
        self._controls(result, design, conditions, of_main, kl)
        if self.kinds:
            summary = summarise(
                numeric_outcomes(effects, self.kinds),
                self.kinds,
                self.cfg.seed,
                controls=result.tables.get("controls"),
                prediction_test=self.cfg.prediction_test,
            )
            summary = with_claims(summary, list(self.kinds), best)
            result.notes += claim_notes(summary, list(self.kinds))
            result.tables["effects_summary"] = with_strengths(
                summary, conditions, self.coefficients
            )
            tested_rows = summary[summary["split"] == "test"]
            result.metrics |= effect_metrics(tested_rows, list(self.kinds))
        if any(o.source == "heads" for o in self.outcomes):
            self._attention(result, at_every, prompts)

    def _of_varying_outcomes(
        self,
        design: ControlDesign,
        prompts: Prompts,
        chosen: Sequence[Example],
        result: Result,
    ) -> "CausalTest":
        """The test of those outcomes that can show an effect, from the unsteered generations.

        Adds the table `baselines`, and what the model knows, to `result`. Default outcomes that are
        constant are replaced (see `InterventionConfig.alternatives`), with one note.
        """
        rates = [o for o in self.outcomes if o.source == "text" and o.kind == "rate"]
        if not rates:
            return self
        baselines, seconds = self.with_outcomes(rates)._baselines(prompts, chosen)
        correct, metrics = knowledge(baselines, {p.example.id: p.example for p in prompts.all()})
        result.tables["baselines"] = baselines.assign(is_correct=correct)
        result.metrics |= metrics
        names = [o.name for o in rates]
        constant = constant_rates(baselines, names) if self.cfg.replaces_constant else {}
        test = self.with_outcomes([o for o in self.outcomes if o.name not in constant])
        test.seconds_per_prompt, test.timed = seconds, tuple(names)
        if not constant:
            return test
        alternatives: list[Any] = []
        if not test.kinds and self.cfg.alternatives:
            others = self.with_outcomes(outcome_objects(self.cfg.alternatives))
            values, test.seconds_per_prompt = others._baselines(prompts, chosen)
            alternatives = fitting(values, others.outcomes)
            test.timed = tuple(o.name for o in others.outcomes)
            test.outcomes, test.kinds = [*alternatives, *test.outcomes], tested_kinds(alternatives)
        summary = summarise(
            numeric_outcomes(baselines, tested_kinds(rates)), tested_kinds(rates), self.cfg.seed
        )
        tested_rows = summary[summary["split"] == "test"]
        result.metrics |= effect_metrics(tested_rows, list(constant))
        null = [f"effect/{o}/{design.names[c.name]}" for o in constant for c in design.main]
        result.metrics |= dict.fromkeys(null)
        instead = [o.name for o in alternatives] or list(test.kinds)
        result.notes.append(constant_note(constant, instead, baselines, null))
        return test

    def _baselines(
        self, prompts: Prompts, chosen: Sequence[Example], *, store: bool = True
    ) -> tuple[pd.DataFrame, float | None]:
        """(outcomes without intervention, seconds per prompt); the latter None if not computed."""
        jobs = self._jobs([], prompts, with_baseline=True)
        began = time.perf_counter()
        with self._measuring(None) as (measurement, _):
            if measurement.cache is not None:
                measurement.cache.stores = store
            columns = measurement.outcomes(jobs, prompts, chosen)
            cache = measurement.cache
        seconds = time.perf_counter() - began
        n_computed = len(jobs)
        if cache is not None:
            n_computed = len(jobs) * cache.n_computed / max(cache.n_rows, 1)
        table = described(jobs, self.cfg, self.facts)[list(BASELINE_COLUMNS)].assign(**columns)
        for name, kind in self.kinds.items():
            table[name] = table[name].astype("boolean" if kind == "rate" else "float64")
        return table, seconds / n_computed if 2 * n_computed > len(jobs) else None

    def _further(
        self,
        design: ControlDesign,
        chosen: Mapping[str, float],
        neutral: Sequence[str],
        result: Result,
    ) -> tuple[list[Condition], dict[tuple[str, float], float]]:
        """The controls of the second stage and their KL; empty where no outcome is tested."""
        if not self.kinds:
            return [], {}
        with self._measuring(None) as (measurement, _):
            controls = design.at_chosen(
                chosen, lambda edits: measurement.neutral_kl(edits, neutral).mean(axis=1)
            )
            result.notes += [n for n in measurement.notes if n not in result.notes]
        return controls

    def _log_size(
        self,
        design: ControlDesign,
        at_every: Sequence[Condition],
        prompts: Prompts,
        chosen: Sequence[Example],
    ) -> None:
        """Log the number of edited prompts before the first is run, and about how long they take.

        The estimate is an upper limit for greedy generations, as rows of one prompt share drafts.
        """
        first, second = design.n_edited(at_every, prompts)
        second = second if self.kinds else 0
        seconds = self._seconds_per_prompt(prompts, chosen, first + second)
        rate = "" if seconds is None else _time_words(first + second, seconds)
        log.info(
            "causal test: %d prompts at all coefficients, then at most %d controls at the "
            "coefficients chosen%s",
            first,
            second,
            rate,
        )
        if second:
            log.info(
                "intervention.n_controls=%d of each kind and n_prompts=%d per group: fewer take "
                "less time, and a p-value needs %d controls",
                self.cfg.n_controls,
                self.cfg.n_prompts,
                MIN_CONTROLS,
            )

    def _seconds_per_prompt(
        self, prompts: Prompts, chosen: Sequence[Example], n_edited: int
    ) -> float | None:
        """Of all outcomes without intervention; None where the results are stored, and where so
        few prompts follow that no estimate is needed.

        Outcomes that were not timed before are measured on some prompts. These results are not
        stored: rows in batches of another size differ in the last bits.
        """
        generates = any(o.source == "text" for o in self.outcomes if o.name in self.timed)
        untimed = [
            o
            for o in self.outcomes
            if o.name in self.kinds
            and o.name not in self.timed
            and not (generates and o.source == "text")
        ]
        if not untimed or n_edited < _MIN_ESTIMATED:
            return self.seconds_per_prompt
        every = max(len(prompts.all()) // _N_TIMED, 1)
        some = {p.example.id for p in prompts.all()[::every]}
        test = self.with_outcomes(untimed)
        part = prompts.of_prompts(lambda p: p.example.id in some)
        seconds = test._baselines(part, [e for e in chosen if e.id in some], store=False)[1]
        known = [s for s in (self.seconds_per_prompt, seconds) if s is not None]
        return sum(known) if known else None

    def _measured(
        self,
        conditions: Sequence[Condition],
        prompts: Prompts,
        examples: Sequence[Example],
        neutral: Sequence[str],
        result: Result,
        *,
        with_baseline: bool = False,
    ) -> pd.DataFrame:
        """The effects of conditions on prompts; costs and notes are added to `result`."""
        jobs = self._jobs(conditions, prompts, with_baseline=with_baseline)
        effects = described(jobs, self.cfg, self.facts)
        costs: list[dict[str, Any]] = []
        columns: dict[str, list[Any]] = {}
        for weights, indices in jobs_by_weights(jobs).items():
            some_jobs = [jobs[i] for i in indices]
            with self._measuring(weights) as (measurement, original):
                for name, values in measurement.outcomes(some_jobs, prompts, examples).items():
                    column = columns.setdefault(name, [None] * len(jobs))
                    for i, value in zip(indices, values, strict=True):
                        column[i] = value
                if measurement.wants("cost"):
                    costs += measurement.costs(some_jobs, neutral)
                    costs += weight_costs(measurement, some_jobs, neutral, original)
                result.notes += [n for n in measurement.notes if n not in result.notes]
        if costs:
            earlier = [result.tables["costs"]] if "costs" in result.tables else []
            result.tables["costs"] = pd.concat([*earlier, pd.DataFrame(costs)], ignore_index=True)
        return effects.assign(**columns)

    def _together(self, parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """The effects of all stages; a prompt without a value in one stage gets none in any."""
        effects = pd.concat(parts, ignore_index=True)
        if self.facts.saes:
            effects["layer"] = effects["layer"].astype("Int64")
        for name, kind in self.kinds.items():
            values = effects[name].astype("boolean" if kind == "rate" else "float64")
            if name != "perplexity":
                lacking = effects.loc[values.isna(), "example_id"].unique()
                values = values.mask(effects["example_id"].isin(lacking))
            effects[name] = values
        return effects

    def _controls(
        self,
        result: Result,
        design: ControlDesign,
        conditions: Sequence[Condition],
        chosen: Mapping[str, float],
        kl: dict[tuple[str, float], float],
    ) -> None:
        """Add the table `controls` and notes on it."""
        if not any(c.role == "control" for c in conditions):
            return
        costs = result.tables.get("costs")
        if costs is not None:
            names = zip(costs["condition"], costs["coefficient"], strict=True)
            kl = dict(zip(names, costs["neutral_kl"], strict=True)) | kl
        table = control_table(conditions, self.coefficients, kl)
        result.tables["controls"] = table
        result.notes += control_notes(table, design.main, chosen, self.cfg)
        kinds = [design.kinds(c) for c in design.main]
        result.notes += missing_kinds_note(kinds, self.cfg)

    def _jobs(
        self, conditions: Sequence[Condition], prompts: Prompts, *, with_baseline: bool
    ) -> list[Job]:
        jobs = []
        for group, placed in prompts.of_group.items() if with_baseline else ():
            baseline = Condition(
                name="baseline" if group == "None" else f"baseline_{group}",
                role="baseline",
                direction="",
                prompts=group,
                latents=(),
                of="",
                edits=((),),
            )
            jobs += [Job(p.example, baseline, 0, 0.0) for p in placed]
        for condition in conditions:
            for prompt in prompts.on(condition.prompts):
                for at, coefficient in enumerate(self.coefficients):
                    if condition.ops(prompt.example.id, at) is not None:
                        jobs.append(Job(prompt.example, condition, at, coefficient))
        return jobs

    @contextmanager
    def _measuring(self, weights: Vector | None) -> Iterator[tuple[Measurement, Original | None]]:
        """(measurement, context with the model's own weights) with directions removed from the
        weights; (measurement, None) for `weights=None`, where nothing is removed."""
        cache = self._cache(weights)
        try:
            measurement = Measurement(
                self.model, self.saes, self.outcomes, self.cfg, self.max_length, cache
            )
            if weights is None:
                yield measurement, None
            else:
                embedding = self.cfg.embedding
                with orthogonalized(self.model, weights.values, embedding=embedding) as original:
                    measurement.original = original
                    yield measurement, original
        finally:
            if cache is not None:
                cache.close()

    def _cache(self, weights: Vector | None) -> ResultCache | None:
        """Cache of results of these weights; None where an SAE's weights have no known identity."""
        saes = [sae_identity(sae) for sae in self.saes.values()]
        if None in saes:
            return None
        determined_by = {
            **model_ingredients(self.model),
            "weights": repr(weights) + (" embedding" if weights and self.cfg.embedding else ""),
            "saes": sorted(map(str, saes)),
        }
        return ResultCache(self.cache_dir, determined_by)

    def _choose(self, effects: pd.DataFrame, notes: list[str]) -> dict[str, float]:
        """The coefficient of each condition, chosen on train prompts if there are any."""
        if not self.kinds:
            return {}
        trained = "train" if (effects["split"] == "train").any() else "test"
        if trained == "test" and len(self.coefficients) > 1:
            notes.append(
                "no train prompts to choose the coefficient on: it was chosen on the test prompts "
                "that it is reported for"
            )
        seen = numeric_outcomes(effects[effects["split"] == trained], self.kinds)
        first = next(iter(self.kinds))
        summary = summarise(seen, {first: self.kinds[first]}, self.cfg.seed)
        return chosen_coefficients(summary, first, trained)

    def _attention(self, result: Result, conditions: Sequence[Condition], prompts: Prompts) -> None:
        summary = result.tables.get("effects_summary")
        chosen = (
            {}
            if summary is None
            else dict(
                summary.loc[summary["chosen"], ["condition", "coefficient"]].itertuples(index=False)
            )
        )
        test = AttentionTest(self.model, self.saes, self.cfg, prompts, self.coefficients, chosen)
        tables, metrics = test.tables(conditions)
        result.tables |= tables
        result.metrics |= metrics


def _time_words(n_prompts: int, seconds_per_prompt: float) -> str:
    """The time for prompts at the rate of the unsteered ones, in words."""
    return (
        f": at most about {duration_words(n_prompts * seconds_per_prompt)}, at "
        f"{1 / max(seconds_per_prompt, 1e-9):.3g} prompts/s without intervention"
    )
