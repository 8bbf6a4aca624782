"""The controls and tests of each condition."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.interventions.batching import Add, Op, Project, Vector
from saexp.interventions.conditions import LatentIntervention
from saexp.interventions.controls import ControlSet, any_active, equal_kl_scales, frequency_matched
from saexp.interventions.latent_values import Condition, direction_of_set, orthonormal
from saexp.results import TaskResult
from saexp.stats.intervals import MIN_N
from saexp.stats.permutation import derived_seed, random_directions
from saexp.stats.power import ALPHA, detectable_change, holm
from saexp.wording import counted

NeutralKL = Callable[[Sequence[tuple[Op, ...]]], Float[np.ndarray, " n"]]
"""Edits -> KL per token of neutral text of each."""


def main_conditions(conditions: Sequence[Condition]) -> list[Condition]:
    """Those that a run's sentences are about: per direction its latents together (else the first
    single one), every other direction, and every place."""
    found = {c.name for c in conditions if c.role in ("direction", "place")}
    of_direction: dict[str, list[Condition]] = {}
    for condition in conditions:
        if condition.role in ("group", "single"):
            key = direction_of_set(condition.direction)
            of_direction.setdefault(key, []).append(condition)
    for some in of_direction.values():
        found.add(min(some, key=lambda c: c.role != "group").name)
    return [c for c in conditions if c.name in found]


class ControlDesign:
    """Controls of all conditions of a causal test."""

    def __init__(
        self,
        intervention: object,
        planned: Sequence[Condition],
        coefficients: Sequence[float],
        cfg: InterventionConfig,
    ) -> None:
        """`planned` are the conditions, among them controls that the intervention made itself."""
        self.intervention, self.coefficients, self.cfg = intervention, coefficients, cfg
        self.own = [c for c in planned if c.role != "control"]
        self.given = [c for c in planned if c.role == "control"]
        self.main = main_conditions(self.own)
        self.n_curve = min(cfg.n_curve_controls, cfg.n_controls)
        self._sets: dict[tuple[str, str], list[tuple[ControlSet, ...]]] = {}
        uses: dict[str, Counter[int]] = {}
        for condition in self.own if cfg.n_controls else []:
            for kind in ("frequency", "disruption"):
                if kind in self.kinds(condition):
                    self._sets[condition.name, kind] = self._select(condition, kind, uses)

    def kinds(self, condition: Condition) -> list[str]:
        """Kinds of control that a condition can have, of those asked for."""
        if not isinstance(self.intervention, LatentIntervention) or not self.cfg.n_controls:
            return []
        ops = [op for edit in condition.edits for op in edit]
        adds = bool(ops) and all(isinstance(op, Add) for op in ops)
        removes = condition.weights is not None or (
            bool(ops) and all(isinstance(op, Project) for op in ops)
        )
        possible = {
            "frequency": bool(condition.parts),
            "disruption": bool(condition.parts) and adds,
            "random_norm": adds or removes,
            "random_kl": adds,
        }
        return [kind for kind in self.cfg.control_kinds if possible[kind]]

    def curve(self) -> list[Condition]:
        """Stage 1: controls at every coefficient, random directions at all but 0 and not for the
        single latents beside a group, which are exploratory."""
        numbers = range(1, self.n_curve + 1)
        changing = tuple(k for k, c in enumerate(self.coefficients) if c)
        made = [c for c in self.given if c.number <= self.n_curve]
        for own in self.own:
            made += self._on_latents(own, "frequency", numbers, None)
            if self._is_main(own) or own.role == "group":
                made += self._random(own, "random_norm", numbers, changing)
        return made

    def at_chosen(
        self, chosen: Mapping[str, float], neutral_kl: NeutralKL
    ) -> tuple[list[Condition], dict[tuple[str, float], float]]:
        """Stage 2: the remaining controls of the main conditions, each at its chosen coefficient.

        Beside them the KL per token of neutral text by (condition, coefficient), of those that
        were measured.
        """
        rest = range(self.n_curve + 1, self.cfg.n_controls + 1)
        everyone = range(1, self.cfg.n_controls + 1)
        made: list[Condition] = []
        scaled: list[tuple[Condition, Condition]] = []
        for own in self.main:
            if not chosen[own.name]:
                continue
            at = (list(self.coefficients).index(chosen[own.name]),)
            made += [
                replace(c, at=at)
                for c in self.given
                if c.of == own.name and c.number > self.n_curve
            ]
            made += self._on_latents(own, "frequency", rest, at)
            made += self._random(own, "random_norm", rest, at)
            of_kl = self._on_latents(own, "disruption", everyone, at)
            of_kl += self._random(own, "random_kl", everyone, at)
            scaled += [(own, control) for control in of_kl]
        at_equal_kl, kl = self._at_equal_kl(scaled, neutral_kl)
        return made + at_equal_kl, kl

    def _is_main(self, condition: Condition) -> bool:
        return any(condition.name == c.name for c in self.main)

    def _select(
        self, condition: Condition, kind: str, uses: dict[str, Counter[int]]
    ) -> list[tuple[ControlSet, ...]]:
        """Sets of control latents, matched within each SAE; as many as that with fewest has."""
        n = self.cfg.n_controls if self._is_main(condition) else self.n_curve
        of_part = []
        for facts, latents in condition.parts:
            at = facts.hookpoint.name
            seed = derived_seed(self.cfg.seed, "controls", kind, at, condition.name)
            avoid = self._same_hypothesis(condition, at)
            if kind == "frequency":
                sets = frequency_matched(
                    facts.table,
                    latents,
                    n,
                    n_least=self.n_curve,
                    caliper=self.cfg.frequency_caliper,
                    seed=seed,
                    avoid=avoid,
                    uses=uses.setdefault(at, Counter()),
                )
            else:
                sets = any_active(facts.table, latents, n, seed=seed, avoid=avoid)
            of_part.append(sets)
        return list(zip(*of_part, strict=False))

    def _same_hypothesis(self, condition: Condition, at: str) -> set[int]:
        """Latents of an SAE that are selected or changed for the condition's direction."""
        found: set[int] = set()
        for other in self.own:
            for facts, latents in other.parts:
                if facts.hookpoint.name != at or other.direction != condition.direction:
                    continue
                table = facts.table
                same = table["selected"] & (table["direction"] == condition.direction)
                found |= {*latents, *table.loc[same, "latent"].tolist()}
        return found

    def _on_latents(
        self, own: Condition, kind: str, numbers: Iterable[int], at: tuple[int, ...] | None
    ) -> list[Condition]:
        """The edit made along control latents."""
        if kind not in self.kinds(own):
            return []
        assert isinstance(self.intervention, LatentIntervention)
        sets, made = self._sets[own.name, kind], []
        for number in numbers:
            if number > len(sets):
                break
            parts = sets[number - 1]
            control = replace(_control(own, kind, number, at), parts=own.parts)
            control = self.intervention.written_along(
                control, [p.latents for p in parts], self.coefficients
            )
            sizes = [len(p.latents) for p in parts]
            logs = np.log([p.frequency_ratio for p in parts])
            made.append(
                replace(
                    control,
                    parts=(),
                    frequency_ratio=float(np.exp(np.average(logs, weights=sizes))),
                    matched=all(p.matched for p in parts),
                )
            )
        return made

    def _random(
        self, own: Condition, kind: str, numbers: Iterable[int], at: tuple[int, ...] | None
    ) -> list[Condition]:
        """The edit with random directions in place of its vectors; the first are alike in both
        kinds, which differ in scale."""
        numbers = list(numbers)
        if kind not in self.kinds(own) or not numbers:
            return []
        noise = _random_vectors(own, max(numbers), self.cfg.seed)
        made = []
        for number in numbers:
            instead = noise[number - 1]
            control = _control(own, kind, number, at)
            edits = tuple(
                tuple(_with_vector(op, instead) for op in ops) if control.tried(k) else ()
                for k, ops in enumerate(own.edits)
            )
            weights = own.weights
            made.append(
                replace(
                    control,
                    latents=(),
                    layers=(),
                    edits=edits,
                    strengths=tuple(
                        {u: s[u] for u in ("length", "resid_norm") if u in s} for s in own.strengths
                    ),
                    weights=None if weights is None else instead[Vector(weights).digest].values,
                )
            )
        return made

    def _at_equal_kl(
        self, pairs: Sequence[tuple[Condition, Condition]], neutral_kl: NeutralKL
    ) -> tuple[list[Condition], dict[tuple[str, float], float]]:
        """Controls scaled to the KL of their conditions (in pairs with them)."""
        if not pairs:
            return [], {}
        at = [c.at[0] if c.at else 0 for _, c in pairs]
        unlike = {own.name: own.edits[k] for (own, _), k in zip(pairs, at, strict=True)}
        own_kl = dict(zip(unlike, neutral_kl(list(unlike.values())), strict=True))
        target = np.array([own_kl[own.name] for own, _ in pairs])

        def measure(which: Sequence[int], scales: Sequence[float]) -> Float[np.ndarray, " n"]:
            return neutral_kl(
                [
                    tuple(_scaled(op, s) for op in pairs[i][1].edits[at[i]])
                    for i, s in zip(which, scales, strict=True)
                ]
            )

        alike = [(own.name, control.control_kind) for own, control in pairs]
        found = equal_kl_scales(measure, target, self.cfg.kl_caliper, alike)
        made, kl = [], {}
        for (own, control), k, scale, value, matched in zip(
            pairs, at, found.scales, found.kl, found.matched, strict=True
        ):
            edit = tuple(_scaled(op, float(scale)) for op in control.edits[k])
            edits = tuple(edit if i == k else () for i in range(len(control.edits)))
            strengths = tuple(
                {u: v * float(scale) for u, v in s.items()} if i == k else {}
                for i, s in enumerate(control.strengths)
            )
            made.append(replace(control, edits=edits, strengths=strengths, matched=bool(matched)))
            kl[control.name, self.coefficients[k]] = float(value)
            kl[own.name, self.coefficients[k]] = float(own_kl[own.name])
        return made, kl


def _control(own: Condition, kind: str, number: int, at: tuple[int, ...] | None) -> Condition:
    return replace(
        own,
        name=f"{own.name}_{kind}_{number:02d}",
        role="control",
        of=own.name,
        parts=(),
        control_kind=kind,
        number=number,
        at=at,
    )


def _random_vectors(own: Condition, n: int, seed: int) -> list[dict[str, Vector]]:
    """For each of `n` controls what stands in place of each vector or basis, by its digest.

    Added vectors keep their norm; bases and the weights' directions become orthonormal random ones
    of the same rank. A vector that is written at several layers is replaced by one and the same.
    """
    vectors: dict[str, tuple[str, Tensor, bool]] = {}
    for op in (op for ops in own.edits for op in ops):
        if isinstance(op, Add):
            vectors.setdefault(op.vector.digest, (op.hookpoint.name, op.vector.values, True))
        elif isinstance(op, Project):
            vectors.setdefault(op.basis.digest, (op.hookpoint.name, op.basis.values, False))
    if own.weights is not None:
        vectors.setdefault(Vector(own.weights).digest, ("weights", own.weights, False))
    made: list[dict[str, Vector]] = [{} for _ in range(n)]
    for digest, (at, values, added) in vectors.items():
        rows = values.reshape(-1, values.shape[-1])
        noise = random_directions(
            n * len(rows), rows.shape[-1], seed, "control", at, own.name
        ).reshape(n, *rows.shape)
        for number, directions in enumerate(noise):
            vector = directions[0] * rows[0].norm() if added else orthonormal(directions)
            made[number][digest] = Vector(vector)
    return made


def _with_vector(op: Op, instead: Mapping[str, Vector]) -> Op:
    if isinstance(op, Add):
        return replace(op, vector=instead[op.vector.digest])
    assert isinstance(op, Project)
    return replace(op, basis=instead[op.basis.digest])


def _scaled(op: Op, factor: float) -> Op:
    """An addition, so much longer."""
    return replace(op, coefficient=op.coefficient * factor)


def summarised_conditions(summary: pd.DataFrame, outcome: str) -> list[str]:
    """Conditions that a run's sentences are about.

    Per direction its latents together (else the first alone), and its other directions; of many
    places the one of the largest change on train prompts (test prompts where there are none).
    Single latents beside a group are exploratory.
    """
    names: list[str] = []
    own = summary[~summary["role"].isin(["baseline", "control"])]
    for _, part in own.groupby(own["direction"].map(direction_of_set), sort=False):
        of_role = {r: list(p["condition"].unique()) for r, p in part.groupby("role")}
        names += (of_role.get("group") or of_role.get("single") or [])[:1]
        names += of_role.get("direction", [])
        places = of_role.get("place", [])
        names += [_strongest(summary, places, outcome)] if len(places) > 1 else places
    return names


def _strongest(summary: pd.DataFrame, conditions: Sequence[str], outcome: str) -> str:
    where = summary["split"] == ("train" if (summary["split"] == "train").any() else "test")
    part = summary[where & summary["condition"].isin(conditions)]
    sizes = part[f"{outcome}_change"].abs().sort_values(ascending=False, kind="stable")
    return str(part.loc[sizes.index[0], "condition"])


def with_claims(
    summary: pd.DataFrame, outcomes: Sequence[str], chosen: Mapping[str, float]
) -> pd.DataFrame:
    """With columns `chosen`, `main`, `n_choices`, and per outcome `_p_controls_holm`.

    `chosen` marks rows of the test split at the coefficient chosen for their condition, its
    controls included. The family of Holm's adjustment is the run's main conditions times its
    outcomes, each at the chosen coefficient on the test split; elsewhere it is NaN. Where the
    coefficient was chosen among several on the test prompts themselves, for want of train prompts,
    it is multiplied by their number (Bonferroni).
    """
    main = summarised_conditions(summary, outcomes[0])
    marked = np.array(
        [
            r["split"] == "test" and chosen.get(r["of"] or r["condition"]) == r["coefficient"]
            for r in summary.to_dict("records")
        ],
        dtype=bool,
    )
    is_main = summary["condition"].isin(main).to_numpy()
    family = np.flatnonzero(marked & is_main)
    p_values = summary[[f"{o}_p_controls" for o in outcomes]].to_numpy(dtype=float)
    adjusted = np.full_like(p_values, np.nan)
    corrected = holm(p_values[family].ravel()).reshape(len(family), len(outcomes))
    adjusted[family] = np.minimum(corrected * n_choices(summary), 1)
    columns = {f"{o}_p_controls_holm": adjusted[:, i] for i, o in enumerate(outcomes)}
    about = {"chosen": marked, "main": is_main, "n_choices": n_choices(summary), **columns}
    return pd.concat([summary, pd.DataFrame(about, index=summary.index)], axis=1)


def n_choices(summary: pd.DataFrame) -> int:
    """Coefficients that the reported one was chosen among on test prompts, else 1."""
    if (summary["split"] == "train").any():
        return 1
    coefficients = summary.loc[summary["role"] != "baseline", "coefficient"]
    return max(1, int(coefficients[coefficients != 0].nunique()))


def claim_notes(summary: pd.DataFrame, outcomes: Sequence[str]) -> list[str]:
    """Where entities or controls are too few for any effect to be shown."""
    test = summary[summary["split"] == "test"]
    notes = []
    for row in test[test["role"] == "baseline"].to_dict("records"):
        n = max(int(row[f"{o}_n"]) for o in outcomes)
        if n < MIN_N:
            prompts = "" if row["group"] == "all" else f" of group {row['group']}"
            notes.append(
                f"{counted(n, 'entity', 'entities')}{prompts} on the test split: effects on fewer "
                f"than {MIN_N} are reported without interval and p-value; add rows, or raise "
                "intervention.n_prompts"
            )
    family = test[test["chosen"] & test["main"]]
    floors = family[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    floors = floors[~np.isnan(floors)]
    n_tests = len(floors) * n_choices(summary)
    if len(floors) and floors.min() * n_tests > ALPHA:
        notes.append(
            f"no effect can be significant: with {round(1 / floors.min()) - 1} controls the "
            f"smallest p-value is {floors.min():.2g}, after Holm over "
            f"{counted(n_tests, 'test')} {min(1.0, floors.min() * n_tests):.2g}; raise "
            "intervention.n_controls, or test fewer outcomes"
        )
    return notes


def effect_power(effects: pd.DataFrame, summary: pd.DataFrame) -> TaskResult:
    """Metrics `power/rate_change` and `power/p_controls_floor`, from the tables of that name.

    `power/rate_change` is the smallest change of the first rate that the paired test over entities
    finds in 80 % of runs: from the unsteered rate on test prompts (`power/rate_baseline`), with as
    many entities (`power/rate_n`), of the group of prompts for which it is largest. Null, with a
    note, where no change would be found. `power/p_controls_floor` is the smallest value that the
    rank p-values against controls can take. Nothing without rates or without controls.
    """
    result = TaskResult()
    rates = [c for c in effects if str(effects[c].dtype) in ("bool", "boolean")]
    tested = summary[summary["split"] == "test"]
    ending = "_p_controls"
    outcomes = [c.removesuffix(ending) for c in map(str, tested) if c.endswith(ending)]
    rate = next((o for o in outcomes if o in rates), None)
    if rate is not None:
        _rate(tested[tested["role"] == "baseline"], rate, result)
    floors = tested[[f"{o}_p_controls_floor" for o in outcomes]].to_numpy(dtype=float)
    if np.isfinite(floors).any():
        result.metrics["power/p_controls_floor"] = float(np.nanmax(floors))
    return result


def _rate(baselines: pd.DataFrame, rate: str, result: TaskResult) -> None:
    worst: tuple[float, float, int] | None = None
    for row in baselines[baselines[rate].notna()].to_dict("records"):
        start, n = float(row[rate]), int(row[f"{rate}_n"])
        change = detectable_change(n, start, ALPHA)
        size = float("inf") if change is None else abs(change)
        if worst is None or size > worst[0]:
            worst = size, start, n
    if worst is None:
        return
    size, start, n = worst
    result.metrics |= {
        "power/rate_change": None if np.isinf(size) else size,
        "power/rate_baseline": start,
        "power/rate_n": n,
    }
    if np.isinf(size):
        result.notes.append(
            f"no change of {rate.replace('_', ' ')} from {start:.2f} is found in 80% of runs with "
            f"{n} entities (power/rate_change)"
        )
