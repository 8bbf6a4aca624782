"""Error rates where there is nothing to find, and the bias of numbers that were chosen."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import worlds
from effects import summary_of

from saexp.interventions.effects import chosen_coefficients, with_claims
from saexp.reports.sweep import effect_findings

N_LATENTS = 200
N_PROMPTS = 40
N_CURVE, N_CONTROLS = 10, 99
COEFFICIENTS = (0.3, 0.6, 0.9)
Values = dict[str, float]
Null = Callable[[np.random.Generator], tuple[pd.DataFrame, np.ndarray]]


def contrast_errors(world: Null) -> Callable[[np.random.Generator, int], Values]:
    """Share of null runs in which any latent is significant, and mean share of latents."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        significant, shares = [], []
        for _ in range(n_runs):
            result = worlds.contrast(*world(rng), intervals=False)
            q = result.tables["latents"]["q_value"].to_numpy()
            significant.append(bool((q <= 0.05).any()))
            shares.append(float((q <= 0.05).mean()))
        return {"value": float(np.mean(significant)), "share_of_latents": float(np.mean(shares))}

    return measure


def random_labels(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    rows = worlds.both_splits(60, 30)
    return rows, worlds.mixed_latents(rng, len(rows), N_LATENTS)


def unequal_rows(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Entities of one group have 4 rows, those of the other 1."""
    rows = worlds.both_splits(60, 30)
    rows = worlds.repeated(rows, np.where(rows["group"] == "known", 4, 1))
    return rows, worlds.mixed_latents(rng, len(rows), N_LATENTS)


def several_questions(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Entities with 5 questions each; 8 of 10 answers, drawn at random, are labelled known."""
    rows = pd.concat(
        [worlds.entities(s, n, 0, worlds.TYPES) for s, n in (("train", 80), ("test", 40))],
        ignore_index=True,
    )
    base = rng.normal(0, 0.7, (len(rows), N_LATENTS)) + rng.uniform(-3.5, 1.0, N_LATENTS)
    rates = np.repeat(1 / (1 + np.exp(-base)), 5, axis=0)
    rows = worlds.repeated(rows, np.full(len(rows), 5))
    rows["group"] = np.where(rng.random(len(rows)) < 0.8, *worlds.GROUPS)
    return rows, worlds.activated(rng, rates)


def types_imbalanced(rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Types 80/20 against 20/80; latents depend on the type alone."""
    rows = worlds.both_splits(100, 50)
    for group, share in zip(worlds.GROUPS, (0.8, 0.2), strict=True):
        for split in ("train", "test"):
            chosen = np.flatnonzero((rows["group"] == group) & (rows["split"] == split))
            n = round(share * len(chosen))
            kinds = ["city"] * n + ["movie"] * (len(chosen) - n)
            rows.loc[chosen, "entity_type"] = kinds
    rate = {kind: rng.uniform(0.05, 0.95, N_LATENTS) for kind in ("city", "movie")}
    return rows, worlds.activated(rng, np.stack([rate[k] for k in rows["entity_type"]]))


def exchangeable(
    n_controls: int, kinds: tuple[str, ...] = ("frequency",)
) -> Callable[[np.random.Generator, int], Values]:
    """Share of latents with p <= 0.05 among latents drawn as their controls are.

    The effects of latents are heavy-tailed, and prompts differ. Each group of prompts is a run.
    """

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        p_values, step = [], 20
        for start in range(0, n_runs, step):
            runs = [f"run{i}" for i in range(min(step, n_runs - start))]
            summary = summary_of(_one_coefficient(rng, runs, n_controls, kinds), {"logit": "mean"})
            own = summary[summary["role"] == "group"]
            p_values += own["logit_p_controls"].tolist()
        return {"value": float((np.array(p_values) <= 0.05).mean())}

    return measure


def _one_coefficient(
    rng: np.random.Generator, runs: list[str], n_controls: int, kinds: tuple[str, ...]
) -> pd.DataFrame:
    units = np.array([f"{r}:{i}" for r in runs for i in range(N_PROMPTS)])
    group = np.repeat(runs, N_PROMPTS)
    base = rng.normal(size=len(units))

    def cell(condition: str, role: str, of: str, kind: str = "") -> pd.DataFrame:
        effect = np.repeat(rng.standard_t(4, len(runs)), N_PROMPTS)
        if role == "baseline":
            effect = np.zeros(len(units))
        values = base + effect + rng.normal(0, 0.5, len(units))
        return worlds.effect_rows(
            {"logit": values},
            unit=units,
            condition=condition,
            role=role,
            of=of,
            group=group,
            control_kind=kind,
        )

    parts = [cell("baseline", "baseline", ""), cell("unknown_group", "group", "unknown_group")]
    for kind in kinds:
        for i in range(n_controls):
            name = f"unknown_group_{kind}_{i + 1:02d}"
            parts.append(cell(name, "control", "unknown_group", kind))
    return pd.concat(parts, ignore_index=True)


def chosen_sentence(rng: np.random.Generator, n_runs: int) -> Values:
    """The default run's design, with two conditions that are exchangeable with their controls.

    The coefficient is chosen on train prompts with 10 controls of two kinds; at it, test prompts
    have 99 of each. Value: share of runs in which any sentence would report an effect.
    """
    significant = []
    for _ in range(n_runs):
        conditions = _slopes(rng)
        first = summary_of(_stage(rng, conditions, "train", N_CURVE), {"refusal": "rate"})
        chosen = chosen_coefficients(first, "refusal", "train")
        test = _stage(rng, conditions, "test", N_CONTROLS, chosen)
        claims = with_claims(summary_of(test, {"refusal": "rate"}), ["refusal"], chosen)
        significant.append(bool((claims["refusal_p_controls_holm"] <= 0.05).any()))
    return {"value": float(np.mean(significant))}


def _slopes(rng: np.random.Generator) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Effects at each coefficient, by condition and (its own or a control's name, kind)."""
    conditions = {}
    for of in ("known_group", "unknown_group"):
        names = [(of, "")]
        for kind in ("frequency", "random_norm"):
            names += [(f"{of}_{kind}_{i + 1:02d}", kind) for i in range(N_CONTROLS)]
        slope = rng.standard_t(4, (len(names), 1))
        effects = slope * np.array(COEFFICIENTS) + rng.normal(0, 0.5, (len(names), 3))
        conditions[of] = dict(zip(names, effects, strict=True))
    return conditions


def _stage(
    rng: np.random.Generator,
    conditions: dict[str, dict[tuple[str, str], np.ndarray]],
    split: str,
    n_controls: int,
    chosen: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Refusals of one split, with the first `n_controls` of each kind, at the chosen coefficient or
    at all."""
    columns = ["condition", "role", "of", "control_kind", "coefficient", "shift"]
    cells: list[tuple[str, str, str, str, float, float]] = [("baseline", "baseline", "", "", 0, 0)]
    for of, effects in conditions.items():
        for (name, kind), shifts in effects.items():
            if kind and int(name.rsplit("_", 1)[1]) > n_controls:
                continue
            role = "control" if kind else "group"
            cells += [
                (name, role, of, kind, coefficient, 2 * shift)
                for coefficient, shift in zip(COEFFICIENTS, shifts, strict=True)
                if not chosen or chosen[of] == coefficient
            ]
    table = pd.DataFrame(cells, columns=columns)
    rows = table.loc[table.index.repeat(N_PROMPTS)].reset_index(drop=True)
    ease = np.tile(rng.normal(-2, 1.0, N_PROMPTS), len(table))
    rate = 1 / (1 + np.exp(-ease - rows.pop("shift").to_numpy(dtype=float)))
    units = np.tile([f"{split}:{i}" for i in range(N_PROMPTS)], len(table))
    return rows.assign(
        unit=units,
        example_id=units,
        group="known",
        split=split,
        direction=rows["of"].str.removesuffix("_group"),
        latent="",
        refusal=(rng.random(len(rows)) < rate).astype(float),
    )


def unsteered(prompts_per_entity: int) -> Callable[[np.random.Generator, int], Values]:
    """Share of conditions without any effect whose `_p` against unsteered prompts is <= 0.05."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        group = np.repeat([f"run{i}" for i in range(n_runs)], 20 * prompts_per_entity)
        of_run = np.tile(np.repeat(np.arange(20), prompts_per_entity), n_runs)
        units = np.array([f"{g}:{u}" for g, u in zip(group, of_run, strict=True)])
        entity = rng.standard_t(4, n_runs * 20).repeat(prompts_per_entity)
        parts = [
            worlds.effect_rows(
                {"logit": shift + rng.normal(0, 1, len(units))},
                unit=units,
                condition=name,
                role=role,
                group=group,
            )
            for name, role, shift in (("baseline", "baseline", 0.0), ("a", "group", entity))
        ]
        summary = summary_of(pd.concat(parts, ignore_index=True), {"logit": "mean"})
        p_values = summary.loc[summary["role"] == "group", "logit_p"].to_numpy(dtype=float)
        return {"value": float((p_values <= 0.05).mean())}

    return measure


def best_latent_bias(split: str) -> Callable[[np.random.Generator, int], Values]:
    """Mean of (reported AUROC less the true one) of the first selected latent."""

    def measure(rng: np.random.Generator, n_runs: int) -> Values:
        suffix, errors = "" if split == "train" else "_test", []
        for _ in range(n_runs):
            rows = worlds.both_splits(60, 60)
            truth = rng.uniform(0.5, 0.8, N_LATENTS)
            known = (rows["group"] == "known").to_numpy()
            shift = np.where(known[:, None], truth - 0.5, 0.5 - truth)
            values = worlds.activated(rng, 0.5 + shift)
            m = worlds.contrast(rows, values, intervals=False).metrics
            latent = m["contrast/best_latent_known"]
            if latent is not None:
                errors.append(float(m[f"contrast/best_auroc_known{suffix}"]) - truth[int(latent)])  # type: ignore[arg-type]
        return {"value": float(np.mean(errors))}

    return measure


def sweep_bias(rng: np.random.Generator, n_runs: int) -> Values:
    """Mean of (highest rate less the true 0.20) in a sweep's sentence on 12 equal cells."""
    errors = []
    for _ in range(n_runs):
        sentence, *_ = effect_findings(sweep_cells(rng))
        rates = re.findall(r"(?:to|at) (\d\.\d+) \(n = ", sentence)
        errors.append(max(map(float, rates)) - 0.20)
    return {"value": float(np.mean(errors))}


def sweep_cells(rng: np.random.Generator) -> pd.DataFrame:
    """Effects of twelve cells with 40 train and 100 test prompts and the same true rate, 0.20."""
    test = rng.binomial(100, 0.2, 12) / 100
    cells = pd.DataFrame({"layer": range(12), "width": 256, "outcome": "refusal"})
    return cells.assign(
        intervention="steer",
        prompts="known",
        direction="unknown",
        coefficient=0.6,
        chosen=True,
        value=test,
        change=test,
        n=100,
        ci_low=np.nan,
        ci_high=np.nan,
        controls_min=0.1,
        controls_max=0.3,
        p_controls=0.5,
        p_floor=0.01,
        gap_train=rng.binomial(40, 0.2, 12) / 40 - 0.3,
    )
