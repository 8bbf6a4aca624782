"""All scenarios in the order of the table: what is measured, and what it should be."""

from collections.abc import Callable
from dataclasses import dataclass

import coverage
import null_runs
import numpy as np
import shipped

Measure = Callable[[np.random.Generator, int], dict[str, float]]


@dataclass(frozen=True)
class Scenario:
    """One line of the CSV."""

    name: str
    kind: str
    """`error rate` (nominal 0.05), `bias` (0) or `coverage` (0.95)."""
    measure: Measure
    n_runs: int


def scenarios() -> list[Scenario]:
    """Error rates, biases, coverages."""
    return [*_error_rates(), *_biases(), *_coverages()]


def _error_rates() -> list[Scenario]:
    contrasts = {
        "contrast: random labels": null_runs.random_labels,
        "contrast: 4 rows an entity against 1": null_runs.unequal_rows,
        "contrast: 5 questions an entity, labels per question": null_runs.several_questions,
        "contrast: types 80/20 against 20/80": null_runs.types_imbalanced,
    }
    null_scenarios = [
        Scenario(name, "error rate", null_runs.contrast_errors(world), 200)
        for name, world in contrasts.items()
    ]
    four = ("frequency", "disruption", "random_norm", "random_kl")
    effects: dict[str, Measure] = {
        "effect beyond 19 exchangeable controls": null_runs.exchangeable(19),
        "effect beyond 99 exchangeable controls": null_runs.exchangeable(99),
        "effect beyond 4 kinds of 19 controls": null_runs.exchangeable(19, four),
        "sentences of 2 conditions, coefficient chosen on train": null_runs.chosen_sentence,
    }
    null_scenarios.append(
        Scenario(
            "contrast of the shipped model's latents, shuffled labels",
            "error rate",
            shipped.shuffled_labels,
            200,
        )
    )
    null_scenarios += [Scenario(n, "error rate", measure, 200) for n, measure in effects.items()]
    return null_scenarios + [
        Scenario(
            f"change against unsteered prompts, {n} prompt{'s' * (n > 1)} an entity",
            "error rate",
            null_runs.unsteered(n),
            1000,
        )
        for n in (1, 5)
    ]


def _biases() -> list[Scenario]:
    return [
        Scenario(
            "AUROC of the best latent, train split", "bias", null_runs.best_latent_bias("train"), 60
        ),
        Scenario(
            "AUROC of the best latent, test split", "bias", null_runs.best_latent_bias("test"), 60
        ),
        Scenario("rate in a sweep's sentence, 12 equal cells", "bias", null_runs.sweep_bias, 200),
    ]


def _coverages() -> list[Scenario]:
    measures: dict[str, tuple[Measure, int]] = {}
    for n in coverage.SIZES:
        for v in coverage.VALUES:
            at = f"n={n}, value={v}"
            measures[f"AUROC, 1 type; {at}"] = coverage.auroc(n, v), 500
            measures[f"AUROC, 4 types; {at}"] = coverage.auroc(n, v, 4), 500
            measures[f"AUROC of latents that are often 0; {at}"] = (
                coverage.auroc(n, v, ties=True),
                500,
            )
            measures[f"separation, 1 type; {at}"] = coverage.separation(n, v), 500
            measures[f"separation, 4 types; {at}"] = coverage.separation(n, v, 4), 500
            measures[f"rate; {at}"] = coverage.rate(n, v), 300
            measures[f"rate, 5 prompts an entity; {at}"] = coverage.rate(n, v, 5), 300
            measures[f"change of a rate; {at}"] = coverage.change(n, v), 300
            measures[f"change of a rate, 5 prompts an entity; {at}"] = coverage.change(n, v, 5), 300
            measures[f"AUROC less that of the surface baseline; {at}"] = (
                coverage.less_surface(n, v),
                300,
            )
            measures[f"probe AUROC; {at}"] = coverage.probe_auroc(n, v), 50
            if n < 200:
                measures[f"probe AUROC, 4 rows an entity; {at}"] = (
                    coverage.probe_auroc(n, v, 4),
                    100,
                )
        measures[f"rate that stays 0.03; n={n}"] = coverage.change(n, None), 300
        for name in ("exponential", "lognormal"):
            measures[f"mean of {name} outcomes; n={n}"] = coverage.mean(n, name), 300
    return [Scenario(name, "coverage", m, n_runs) for name, (m, n_runs) in measures.items()]
