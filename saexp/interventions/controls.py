"""The controls of each condition, and tables and notes about them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from saexp.config import InterventionConfig
from saexp.interventions.conditions import (
    Condition,
    LatentIntervention,
    Prompts,
)
from saexp.interventions.directions import (
    ControlSet,
    any_active,
    equal_kl_scales,
    frequency_matched,
    orthonormal,
)
from saexp.interventions.outcomes import direction_of_set, metric_names
from saexp.interventions.stream_edits import Add, Op, Project, Vector
from saexp.results import CONTROL_WORDS, Result
from saexp.stats.significance import (
    MIN_CONTROLS,
    claim_fraction,
    derived_seed,
    random_directions,
    rank_p_value,
)

OWN_GROUP = "own_group"
"""Control kind of patches: activations of other prompts of the same group."""
NeutralKL = Callable[[Sequence[tuple[Op, ...]]], Float[np.ndarray, " n"]]
"""Edits -> KL per token of neutral text for each."""


def main_conditions(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions that a report's sentences are about: per direction its latents together (or
    the first single latent), every other direction, and every patched location."""
    names = {c.name for c in conditions if c.role in ("direction", "place")}
    of_direction: dict[str, list[Condition]] = {}
    for condition in conditions:
        if condition.role in ("group", "single"):
            key = direction_of_set(condition.direction)
            of_direction.setdefault(key, []).append(condition)
    for some in of_direction.values():
        names.add(min(some, key=lambda c: c.role != "group").name)
    return [c for c in conditions if c.name in names]


class ControlDesign:
    """Controls of all conditions of a causal test."""

    def __init__(
        self,
        intervention: object,
        planned: Sequence[Condition],
        coefficients: Sequence[float],
        cfg: InterventionConfig,
    ) -> None:
        """`planned` holds the conditions, and the controls that the intervention makes itself."""
        self.intervention, self.coefficients, self.cfg = intervention, coefficients, cfg
        self.own = [c for c in planned if c.role != "control"]
        self.planned_controls = [c for c in planned if c.role == "control"]
        self.main = main_conditions(self.own)
        self.names = metric_names(c.described for c in self.own)
        self.n_curve = min(cfg.n_curve_controls, cfg.n_controls)
        self._sets: dict[tuple[str, str], list[tuple[ControlSet, ...]]] = {}
        uses: dict[str, Counter[int]] = {}
        for condition in self.own if cfg.n_controls else []:
            for kind in ("frequency", "disruption"):
                if kind in self.kinds(condition):
                    self._sets[condition.name, kind] = self._select(condition, kind, uses)

    def kinds(self, condition: Condition) -> list[str]:
        """Kinds of `intervention.control_kinds` that a condition can have."""
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
        """Stage 1: controls at every coefficient. Random directions are left out at coefficient 0
        and for single latents that also belong to a group, which are exploratory."""
        numbers = range(1, self.n_curve + 1)
        changing = tuple(k for k, c in enumerate(self.coefficients) if c)
        controls = [c for c in self.planned_controls if c.number <= self.n_curve]
        for condition in self.own:
            controls += self._on_latents(condition, "frequency", numbers, None)
            if self._is_main(condition) or condition.role == "group":
                controls += self._random(condition, "random_norm", numbers, changing)
        return controls

    def at_chosen(
        self, chosen: Mapping[str, float], neutral_kl: NeutralKL
    ) -> tuple[list[Condition], dict[tuple[str, float], float]]:
        """Stage 2: the remaining controls of the main conditions, each at the chosen coefficient,
        and the measured KL per token of neutral text by (condition, coefficient)."""
        rest = range(self.n_curve + 1, self.cfg.n_controls + 1)
        everyone = range(1, self.cfg.n_controls + 1)
        controls: list[Condition] = []
        scaled: list[tuple[Condition, Condition]] = []
        for condition in self.main:
            if not chosen[condition.name]:
                continue
            at = (list(self.coefficients).index(chosen[condition.name]),)
            controls += [
                replace(c, at=at)
                for c in self.planned_controls
                if c.of == condition.name and c.number > self.n_curve
            ]
            controls += self._on_latents(condition, "frequency", rest, at)
            controls += self._random(condition, "random_norm", rest, at)
            of_kl = self._on_latents(condition, "disruption", everyone, at)
            of_kl += self._random(condition, "random_kl", everyone, at)
            scaled += [(condition, control) for control in of_kl]
        at_equal_kl, kl = self._at_equal_kl(scaled, neutral_kl)
        return controls + at_equal_kl, kl

    def n_edited(self, at_every: Sequence[Condition], prompts: Prompts) -> tuple[int, int]:
        """Numbers of prompts with changed activations: at all coefficients, and at most, of the
        controls of the second stage.

        Coefficient 0 repeats the prompts without intervention and does not count.
        """
        changing = [k for k, c in enumerate(self.coefficients) if c]
        first = sum(sum(map(c.tried, changing)) * len(prompts.on(c.prompts)) for c in at_every)
        test = prompts.of_split("test")
        second = sum(
            len(self.kinds(c)) * self.cfg.n_controls * len(test.on(c.prompts)) for c in self.main
        )
        return first, second

    def _is_main(self, condition: Condition) -> bool:
        return any(condition.name == c.name for c in self.main)

    def _select(
        self, condition: Condition, kind: str, uses: dict[str, Counter[int]]
    ) -> list[tuple[ControlSet, ...]]:
        """Sets of control latents, matched within each SAE; as many as every SAE has."""
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
        excluded: set[int] = set()
        for other in self.own:
            for facts, latents in other.parts:
                if facts.hookpoint.name != at or other.direction != condition.direction:
                    continue
                table = facts.table
                same = table["selected"] & (table["direction"] == condition.direction)
                excluded |= {*latents, *table.loc[same, "latent"].tolist()}
        return excluded

    def _on_latents(
        self, condition: Condition, kind: str, numbers: Iterable[int], at: tuple[int, ...] | None
    ) -> list[Condition]:
        """Controls whose edit is written along control latents."""
        if kind not in self.kinds(condition):
            return []
        assert isinstance(self.intervention, LatentIntervention)
        sets, controls = self._sets[condition.name, kind], []
        for number in numbers:
            if number > len(sets):
                break
            parts = sets[number - 1]
            control = replace(_control(condition, kind, number, at), parts=condition.parts)
            control = self.intervention.written_along(
                control, [p.latents for p in parts], self.coefficients
            )
            sizes = [len(p.latents) for p in parts]
            logs = np.log([p.frequency_ratio for p in parts])
            controls.append(
                replace(
                    control,
                    parts=(),
                    frequency_ratio=float(np.exp(np.average(logs, weights=sizes))),
                    matched=all(p.matched for p in parts),
                )
            )
        return controls

    def _random(
        self, condition: Condition, kind: str, numbers: Iterable[int], at: tuple[int, ...] | None
    ) -> list[Condition]:
        """Controls with random directions instead of the edit's vectors. Both kinds use the same
        directions, at different scales."""
        numbers = list(numbers)
        if kind not in self.kinds(condition) or not numbers:
            return []
        noise = _random_vectors(condition, max(numbers), self.cfg.seed)
        controls = []
        for number in numbers:
            replacement = noise[number - 1]
            control = _control(condition, kind, number, at)
            edits = tuple(
                tuple(_with_vector(op, replacement) for op in ops) if control.tried(k) else ()
                for k, ops in enumerate(condition.edits)
            )
            weights = condition.weights
            controls.append(
                replace(
                    control,
                    latents=(),
                    layers=(),
                    edits=edits,
                    strengths=tuple(
                        {u: s[u] for u in ("length", "resid_norm") if u in s}
                        for s in condition.strengths
                    ),
                    weights=None if weights is None else replacement[Vector(weights).digest].values,
                )
            )
        return controls

    def _at_equal_kl(
        self, pairs: Sequence[tuple[Condition, Condition]], neutral_kl: NeutralKL
    ) -> tuple[list[Condition], dict[tuple[str, float], float]]:
        """Controls, given as (condition, control), scaled to the KL of their conditions."""
        if not pairs:
            return [], {}
        at = [c.at[0] if c.at else 0 for _, c in pairs]
        edit_of = {
            condition.name: condition.edits[k] for (condition, _), k in zip(pairs, at, strict=True)
        }
        kl_of = dict(zip(edit_of, neutral_kl(list(edit_of.values())), strict=True))
        target = np.array([kl_of[condition.name] for condition, _ in pairs])

        def measure(which: Sequence[int], scales: Sequence[float]) -> Float[np.ndarray, " n"]:
            return neutral_kl(
                [
                    tuple(_scaled(op, s) for op in pairs[i][1].edits[at[i]])
                    for i, s in zip(which, scales, strict=True)
                ]
            )

        alike = [(condition.name, control.control_kind) for condition, control in pairs]
        search = equal_kl_scales(measure, target, self.cfg.kl_caliper, alike)
        controls, kl = [], {}
        for (condition, control), k, scale, value, matched in zip(
            pairs, at, search.scales, search.kl, search.matched, strict=True
        ):
            edit = tuple(_scaled(op, float(scale)) for op in control.edits[k])
            edits = tuple(edit if i == k else () for i in range(len(control.edits)))
            strengths = tuple(
                {u: v * float(scale) for u, v in s.items()} if i == k else {}
                for i, s in enumerate(control.strengths)
            )
            controls.append(
                replace(control, edits=edits, strengths=strengths, matched=bool(matched))
            )
            kl[control.name, self.coefficients[k]] = float(value)
            kl[condition.name, self.coefficients[k]] = float(kl_of[condition.name])
        return controls, kl


def _control(condition: Condition, kind: str, number: int, at: tuple[int, ...] | None) -> Condition:
    return replace(
        condition,
        name=f"{condition.name}_{kind}_{number:02d}",
        role="control",
        of=condition.name,
        parts=(),
        control_kind=kind,
        number=number,
        at=at,
    )


def _random_vectors(condition: Condition, n: int, seed: int) -> list[dict[str, Vector]]:
    """For each of `n` controls the replacement of every vector or basis, by its digest.

    Replacements of added vectors have the same norm; those of bases and of directions of weights
    are random orthonormal ones of the same rank. A vector that is written at several layers has one
    replacement.
    """
    vectors: dict[str, tuple[str, Tensor, bool]] = {}
    for op in (op for ops in condition.edits for op in ops):
        if isinstance(op, Add):
            vectors.setdefault(op.vector.digest, (op.hookpoint.name, op.vector.values, True))
        elif isinstance(op, Project):
            vectors.setdefault(op.basis.digest, (op.hookpoint.name, op.basis.values, False))
    if condition.weights is not None:
        vectors.setdefault(Vector(condition.weights).digest, ("weights", condition.weights, False))
    replacements: list[dict[str, Vector]] = [{} for _ in range(n)]
    for digest, (at, values, added) in vectors.items():
        rows = values.reshape(-1, values.shape[-1])
        noise = random_directions(
            n * len(rows), rows.shape[-1], seed, "control", at, condition.name
        ).reshape(n, *rows.shape)
        for number, directions in enumerate(noise):
            vector = directions[0] * rows[0].norm() if added else orthonormal(directions)
            replacements[number][digest] = Vector(vector)
    return replacements


def _with_vector(op: Op, replacement: Mapping[str, Vector]) -> Op:
    if isinstance(op, Add):
        return replace(op, vector=replacement[op.vector.digest])
    assert isinstance(op, Project)
    return replace(op, basis=replacement[op.basis.digest])


def _scaled(op: Op, factor: float) -> Op:
    """The operation with its coefficient multiplied."""
    return replace(op, coefficient=op.coefficient * factor)


def control_table(
    conditions: Sequence[Condition],
    coefficients: Sequence[float],
    kl: Mapping[tuple[str, float], float],
) -> pd.DataFrame:
    """One row per control and coefficient; not for 0, where a control equals the baseline.

    Columns of, condition, control_kind, coefficient (its condition's, also where the control is
    scaled), latents, frequency_ratio, norm_ratio (added norm; NaN where it depends on the prompt),
    kl, kl_own, kl_ratio (per token of neutral text; NaN where not measured), matched. `kl` is by
    (condition, coefficient).
    """
    condition_of = {c.name: c for c in conditions if c.role != "control"}
    rows = [
        {
            "of": c.of,
            "condition": c.name,
            "control_kind": c.control_kind,
            "coefficient": coefficient,
            "latents": c.label,
            "frequency_ratio": c.frequency_ratio,
            "norm_ratio": _norm_ratio(c, condition_of[c.of], k),
            "kl": kl.get((c.name, coefficient), np.nan),
            "kl_own": kl.get((c.of, coefficient), np.nan),
            "matched": c.matched,
        }
        for c in conditions
        for k, coefficient in enumerate(coefficients)
        if c.role == "control" and c.tried(k) and coefficient
    ]
    names = ["of", "condition", "control_kind", "coefficient", "latents", "frequency_ratio"]
    names += ["norm_ratio", "kl", "kl_own", "matched"]
    table = pd.DataFrame(rows, columns=names)
    ratio = table["kl"] / table["kl_own"].where(table["kl_own"] > 0)
    table.insert(names.index("matched"), "kl_ratio", ratio.astype(float))
    return table


def _norm_ratio(control: Condition, condition: Condition, k: int) -> float:
    lengths = [c.strengths[k].get("length") if c.strengths else None for c in (control, condition)]
    if lengths[0] is None or not lengths[1]:
        return control.norm_ratio
    return lengths[0] / lengths[1]


def control_notes(
    table: pd.DataFrame,
    main: Sequence[Condition],
    chosen: Mapping[str, float],
    cfg: InterventionConfig,
) -> list[str]:
    """A note per kind with too few matched controls for some main condition at its coefficient."""
    notes = []
    calipers = {"frequency": cfg.frequency_caliper, "disruption": cfg.kl_caliper}
    calipers["random_kl"] = cfg.kl_caliper
    for kind, caliper in calipers.items():
        parts = []
        for condition in main:
            of = (table["of"] == condition.name) & (table["control_kind"] == kind)
            part = table[of & (table["coefficient"] == chosen.get(condition.name))]
            n = int(part["matched"].sum())
            if len(part) and n < min(MIN_CONTROLS, cfg.n_controls):
                parts.append(f"{condition.name} {n} of {len(part)}")
        if parts:
            notes.append(
                f"{CONTROL_WORDS[kind]}, within a factor of {caliper:g}: {', '.join(parts)}; a "
                f"p-value uses a kind of control of which at least {MIN_CONTROLS} are matched"
            )
    return notes


def missing_kinds_note(kinds: Sequence[Sequence[str]], cfg: InterventionConfig) -> list[str]:
    """A note on requested kinds that no main condition can have; `kinds` are those of each."""
    had = {kind for some in kinds for kind in some}
    lacking = [kind for kind in cfg.control_kinds if kind not in had]
    if not had or not lacking:
        return []
    reasons = []
    if "frequency" in lacking:
        reasons.append("the intervention does not change latents")
    if "random_kl" in lacking:
        reasons.append("nothing is added that could be scaled to equal KL")
    if "random_norm" in lacking:
        reasons.append("the change depends on the latents' own activations")
    return [
        f"intervention={cfg.name} has no controls of kind {', '.join(lacking)} here: "
        f"{'; '.join(reasons)}"
    ]


def effect_fraction(
    summary: pd.DataFrame, controls: pd.DataFrame, outcome: str, alpha: float
) -> Result:
    """Metric `placebo/effect_fraction`: controls for which an effect on `outcome` is reported.

    Each matched control of an achieved kind is treated as if it were the condition: its p-value is
    the largest, over achieved kinds, of its rank p-values among the kind's other controls. Computed
    at each condition's chosen coefficient on test prompts, from the tables `effects_summary` and
    `controls`. Empty where no kind is achieved.
    """
    tested = summary[(summary["split"] == "test") & summary[f"{outcome}_change"].notna()]
    matched = controls[controls["matched"].astype(bool)]
    p_values: list[float] = []
    for _, prompts in tested.groupby("group", sort=False, dropna=False):
        change = prompts.set_index(["condition", "coefficient"])[f"{outcome}_change"]
        chosen = prompts[prompts["chosen"].astype(bool) & (prompts["role"] != "control")]
        for condition, coefficient in zip(chosen["condition"], chosen["coefficient"], strict=True):
            of_condition = matched[
                (matched["of"] == condition) & (matched["coefficient"] == coefficient)
            ]
            kinds = [
                change.reindex([(c, coefficient) for c in names]).dropna()
                for _, names in of_condition.groupby("control_kind", sort=False)["condition"]
            ]
            p_values += _p_values([k for k in kinds if len(k) >= MIN_CONTROLS])
    if not p_values:
        return Result()
    n_claims = int((np.array(p_values) <= alpha).sum())
    return Result(metrics=claim_fraction("placebo/effect_fraction", n_claims, len(p_values)))


def _p_values(achieved: list[pd.Series]) -> list[float]:
    """For every control its largest p-value over kinds."""
    return [
        max(
            rank_p_value(float(change), kind.drop(name, errors="ignore").to_numpy(dtype=float))
            for kind in achieved
        )
        for values in achieved
        for name, change in values.items()
    ]
