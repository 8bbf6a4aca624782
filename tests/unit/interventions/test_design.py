"""Which controls each condition has at which stage, and what they add or remove."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from saexp.config.groups import InterventionConfig
from saexp.errors import ConfigError
from saexp.interventions import (
    Ablate,
    Clamp,
    Orthogonalize,
    ProjectOut,
    Scale,
    SpliceReconstruction,
    Steer,
)
from saexp.interventions.conditions import Condition, Prompts
from saexp.interventions.controls import (
    ControlDesign,
    control_notes,
    control_table,
    main_conditions,
    missing_kinds_note,
)
from saexp.interventions.directions import LatentStatistics
from saexp.interventions.stream_edits import Add, Op, Project
from tests.random_models import random_lm
from tests.unit.interventions.test_edits import facts

NAMES = {"ProjectOut": "project_out", "SpliceReconstruction": "splice"}


def designed(
    kind: type, coefficients: Sequence[float] = (0.0, 0.5, 1.0), **settings: Any
) -> ControlDesign:
    about: LatentStatistics = settings.pop("facts", None) or facts()
    name = NAMES.get(kind.__name__, kind.__name__.lower())
    cfg = InterventionConfig(
        name=name, **{"n_controls": 5, "n_curve_controls": 2, "frequency_caliper": 8.0, **settings}
    )
    prompts = Prompts(of_group={"known": [], "unknown": []})
    intervention = kind(cfg)
    planned, _ = intervention.plan(about, list(coefficients), prompts, random_lm("llama"))
    return ControlDesign(intervention, planned, coefficients, cfg)


def kl_of(edits: Sequence[tuple[Op, ...]]) -> np.ndarray:
    """A KL that grows with what is added, more for some directions than for others."""
    costs = []
    for ops in edits:
        (op,) = ops
        assert isinstance(op, Add)
        added = op.vector.values.double() * op.coefficient
        costs.append(float((added**2 * torch.linspace(0.01, 0.3, len(added))).sum()))
    return np.log1p(np.array(costs))


def second_stage(
    design: ControlDesign, at: float = 1.0
) -> tuple[list[Condition], dict[tuple[str, float], float]]:
    return design.at_chosen({c.name: at for c in design.main}, kl_of)


def added(condition: Condition, at: int) -> torch.Tensor:
    (op,) = condition.edits[at]
    assert isinstance(op, Add)
    return op.vector.values.double() * op.coefficient


def test_main_conditions_are_groups_else_the_first_single_one_and_every_direction() -> None:
    design = designed(Steer, directions=["latents", "mean_difference"])
    assert [c.name for c in main_conditions(design.own)] == [
        "known_group",
        "unknown_2",
        "known_mean_difference",
        "unknown_mean_difference",
    ]


def test_the_first_stage_has_few_controls_at_every_coefficient_the_second_all_at_one() -> None:
    design = designed(Steer)
    first = Counter((c.of, c.control_kind) for c in design.curve())
    assert first == {
        ("known_group", "frequency"): 2,
        ("known_group", "random_norm"): 2,
        ("known_3", "frequency"): 2,
        ("known_5", "frequency"): 2,
        ("unknown_2", "frequency"): 2,
        ("unknown_2", "random_norm"): 2,
    }
    staged, kl = second_stage(design)
    second = Counter((c.of, c.control_kind) for c in staged)
    assert second == {
        (of, kind): n
        for of in ("known_group", "unknown_2")
        for kind, n in (("frequency", 3), ("disruption", 5), ("random_norm", 3), ("random_kl", 5))
    }
    names = [c.name for c in (*design.curve(), *staged)]
    assert len(set(names)) == len(names)
    assert {"known_group_frequency_01", "known_group_random_kl_05"} < set(names)
    for control in staged:
        assert [control.tried(k) for k in range(3)] == [False, False, True]
        assert control.ops("x", 1) is None and control.ops("x", 2)
    measured = {name for name, _ in kl}
    assert measured == {c.name for c in staged if c.control_kind in ("disruption", "random_kl")} | {
        "known_group",
        "unknown_2",
    }


def test_at_coefficient_zero_only_latents_are_controls() -> None:
    for control in designed(Steer).curve():
        assert control.tried(0) == (control.control_kind == "frequency")
        assert all(op.coefficient == 0 for op in control.edits[0])
    staged, kl = second_stage(designed(Steer), at=0.0)
    assert not staged and not kl


@pytest.mark.parametrize("unit", ["raw", "max_act", "resid_norm"])
def test_what_random_directions_and_latents_add_has_exactly_the_norm(unit: str) -> None:
    design = designed(Steer, unit=unit, layers="all")
    staged, _ = ControlDesign(
        design.intervention, design.own, design.coefficients, replace_kinds(design.cfg)
    ).at_chosen({c.name: 0.5 for c in design.main}, kl_of)
    own = {c.name: c for c in design.own}
    seen = 0
    for control in (*design.curve(), *staged):
        at = 2 if control.tried(2) else 1
        pairs = list(zip(control.edits[at], own[control.of].edits[at], strict=True))
        assert len(pairs) == 3
        assert len({op.vector for op, _ in pairs}) == 1  # type: ignore[union-attr]
        for op, other in pairs:
            assert isinstance(op, Add) and isinstance(other, Add)
            assert (op.hookpoint, op.coefficient) == (other.hookpoint, other.coefficient)
            norms = [float(o.vector.values.double().norm()) for o in (op, other)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)
            seen += 1
    assert seen > 30


def replace_kinds(cfg: InterventionConfig) -> InterventionConfig:
    return replace(cfg, control_kinds=["frequency", "random_norm"])


def test_scaled_controls_have_the_kl_of_their_condition_and_their_norm_is_reported() -> None:
    design = designed(Steer)
    staged, kl = second_stage(design)
    own = {c.name: c for c in design.own}
    table = control_table([*design.own, *design.curve(), *staged], design.coefficients, kl)
    assert not (table["coefficient"] == 0).any()
    rows = table.set_index(["condition", "coefficient"])
    n = 0
    for control in staged:
        row = rows.loc[(control.name, 1.0)]
        ratio = float(added(control, 2).norm() / added(own[control.of], 2).norm())
        assert row["norm_ratio"] == pytest.approx(ratio, rel=1e-5)
        if control.control_kind not in ("disruption", "random_kl"):
            assert np.isnan(row["kl"])
            continue
        wanted, measured = kl_of([own[control.of].edits[2], control.edits[2]])
        assert row["kl"] == pytest.approx(measured) and row["kl_own"] == pytest.approx(wanted)
        assert row["kl_ratio"] == pytest.approx(measured / wanted)
        assert row["matched"] and abs(np.log(measured / wanted)) <= np.log(1.1)
        n += 1
    assert n == 20
    for control in staged:
        if control.control_kind == "random_kl":
            twin = next(
                c
                for c in (*design.curve(), *staged)
                if c.name == control.name.replace("_kl_", "_norm_")
            )
            cosine = torch.cosine_similarity(added(control, 2), added(twin, 2), dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-6)
    everywhere = {c.name: 1.0 for c in design.main}
    assert not control_notes(table, design.main, everywhere, design.cfg)
    scaled = table["control_kind"].isin(["disruption", "random_kl"])
    missed = table.assign(matched=table["matched"] & ~scaled)
    notes = control_notes(missed, design.main, everywhere, design.cfg)
    assert len(notes) == 2
    assert notes[0].startswith("latents scaled to equal KL, within a factor of 1.1: ")
    assert "known_group 0 of 5" in notes[0] and "at least 19 are matched" in notes[0]


def test_random_directions_are_different_ones_for_every_condition_and_seed() -> None:
    def vectors(seed: int, of: str) -> torch.Tensor:
        conditions = designed(Steer, seed=seed).curve()
        rows = [added(c, 2) for c in conditions if c.control_kind == "random_norm" and c.of == of]
        return torch.stack(rows)

    one = vectors(0, "known_group")
    assert torch.equal(one, vectors(0, "known_group"))
    for other in (vectors(1, "known_group"), vectors(0, "unknown_2"), one.flip(0)):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("kind", "settings", "kinds"),
    [
        (Steer, {}, ["frequency", "disruption", "random_norm", "random_kl"]),
        (Steer, {"directions": ["mean_difference"]}, ["random_norm", "random_kl"]),
        (Steer, {"directions": ["denoised_difference"]}, ["random_norm", "random_kl"]),
        (Steer, {"directions": ["probe"]}, ["random_norm", "random_kl"]),
        (Steer, {"control_kinds": ["random_kl", "frequency"]}, ["frequency", "random_kl"]),
        (Clamp, {}, ["frequency"]),
        (Scale, {}, ["frequency"]),
        (Ablate, {}, ["frequency"]),
        (ProjectOut, {}, ["frequency", "random_norm"]),
        (ProjectOut, {"directions": ["mean_difference"]}, ["random_norm"]),
        (Orthogonalize, {"coefficients": (0.0, 1.0)}, ["frequency", "random_norm"]),
    ],
)
def test_kinds_are_those_that_an_edit_can_have(
    kind: type, settings: dict[str, Any], kinds: list[str]
) -> None:
    design = designed(kind, **settings)
    assert all(design.kinds(c) == kinds for c in design.main)
    staged, _ = second_stage(design)
    per_kind = Counter(
        c.control_kind for c in (*design.curve(), *staged) if c.of in {m.name for m in design.main}
    )
    assert per_kind == dict.fromkeys(kinds, 5 * len(design.main))
    none = designed(kind, **{**settings, "n_controls": 0})
    assert not none.curve() and not second_stage(none)[0]


@pytest.mark.parametrize(
    ("kind", "settings", "note_text"),
    [
        (Steer, {}, None),
        (
            Steer,
            {"directions": ["probe"]},
            "frequency, disruption here: the intervention does not change",
        ),
        (ProjectOut, {}, "disruption, random_kl here: nothing is added that could be scaled"),
        (Scale, {}, "disruption, random_norm, random_kl here: nothing is added"),
        (Scale, {"control_kinds": ["frequency"]}, None),
        (SpliceReconstruction, {}, None),
    ],
)
def test_kinds_that_are_left_out_are_noted(
    kind: type, settings: dict[str, Any], note_text: str | None
) -> None:
    design = designed(kind, **settings)
    notes = missing_kinds_note([design.kinds(c) for c in design.main], design.cfg)
    assert len(notes) == (note_text is not None)
    assert not note_text or f"has no controls of kind {note_text}" in notes[0]


@pytest.mark.parametrize("kind", [ProjectOut, Orthogonalize])
def test_as_many_random_directions_are_removed(kind: type) -> None:
    design = designed(kind, (0.0, 1.0))
    own = next(c for c in design.own if c.name == "known_group")
    controls = [c for c in design.curve() if c.of == own.name and c.control_kind == "random_norm"]
    bases = []
    for control in controls:
        basis = control.weights
        if kind is ProjectOut:
            (op,) = control.edits[1]
            assert isinstance(op, Project) and op.coefficient == 1
            basis = op.basis.values
        assert basis is not None and basis.shape == (2, 16)
        torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=0)
        bases.append(basis)
    assert not torch.allclose(bases[0], bases[1])


def test_an_intervention_s_own_controls_are_staged_alike() -> None:
    design = designed(SpliceReconstruction)
    first = [c for c in design.curve() if c.of == "known_splice"]
    assert [(c.control_kind, c.number) for c in first] == [("random_norm", 1), ("random_norm", 2)]
    staged, _ = second_stage(design)
    rest = [c for c in staged if c.of == "known_splice"]
    assert [c.number for c in rest] == [3, 4, 5]
    assert all(c.ops("x", 1) is None for c in rest)


def test_other_latents_of_the_direction_are_no_controls_those_of_the_other_are() -> None:
    about = facts()
    about.table.loc[7, "selected"] = True
    design = designed(Steer, top_k=2, facts=about, frequency_caliper=50.0, n_controls=40)
    staged, _ = second_stage(design)
    used = {
        direction: {
            f for c in (*design.curve(), *staged) if c.direction == direction for f in c.latents
        }
        for direction in ("known", "unknown")
    }
    assert used["known"] == set(range(40)) - {3, 5, 7}
    assert used["unknown"] == set(range(40)) - {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_kinds": []}, "control_kinds is empty; choose from frequency"),
        ({"control_kinds": ["random"]}, "intervention.control_kinds=random is not known"),
        ({"frequency_caliper": 1.0}, "frequency_caliper=1.0 is not a factor above 1"),
        ({"kl_caliper": float("inf")}, "kl_caliper=inf is not a factor above 1; type e.g"),
        ({"n_curve_controls": -1}, "n_curve_controls=-1 is too small"),
        ({"n_controls": -1}, "n_controls=-1 is too small"),
    ],
)
def test_options_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InterventionConfig(name="steer", **settings)
