"""What each intervention does to which prompts: latents, directions, controls, units."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saexp.config.groups import InterventionConfig
from saexp.errors import ConfigError, InterventionError
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
from saexp.interventions.controls import ControlDesign
from saexp.interventions.directions import LatentStatistics, StreamRows, denoised, orthonormal
from saexp.interventions.stream_edits import Add, Move, Project
from saexp.models import Hookpoint
from tests.random_models import random_lm

D, N_LATENTS = 16, 40
AT = Hookpoint(1, "resid_post")


def facts(
    groups: tuple[str, ...] = ("known", "unknown"), *, stream: bool = True
) -> LatentStatistics:
    rng = np.random.default_rng(0)
    decoder = torch.from_numpy(rng.normal(size=(N_LATENTS, D))).float()
    selected = np.isin(np.arange(N_LATENTS), [2, 3, 5])
    table = pd.DataFrame(
        {
            "latent": np.arange(N_LATENTS),
            "direction": np.where(np.arange(N_LATENTS) % 2, groups[0], groups[-1]),
            "selected": selected,
            "rank": pd.array([{3: 1, 5: 2, 2: 1}.get(i) for i in range(N_LATENTS)], dtype="Int64"),
            "q_value": np.where(selected, 0.001, 0.8),
            "frequency": rng.uniform(0.1, 0.5, N_LATENTS),
            "norm": decoder.norm(dim=-1).numpy(),
            "max_act": rng.uniform(4, 6, N_LATENTS),
            "p99_act": rng.uniform(2, 3, N_LATENTS),
            **{f"mean_{g}": rng.uniform(0, 2, N_LATENTS) for g in groups},
        }
    )
    acts = rng.normal(size=(60, D)) + np.repeat([[0.0], [2.0]], 30, axis=0) * np.eye(D)[0]
    labels = np.repeat(np.array(["known", "unknown"]), 30)
    return LatentStatistics(
        table=table,
        groups=groups,
        median_norm=7.0,
        directions=lambda chosen: decoder[list(chosen)],
        hookpoint=AT,
        written=AT,
        stream=(lambda: StreamRows(acts, labels, np.arange(60))) if stream else None,
        n_layers=3,
    )


def planned(
    kind: type, coefficients: Sequence[float] = (0.0, 1.0), **settings: Any
) -> list[Condition]:
    about = settings.pop("facts", None) or facts()
    name = {"ProjectOut": "project_out"}.get(kind.__name__, kind.__name__.lower())
    cfg = InterventionConfig(name=name, **{"n_controls": 2, **settings})
    return with_controls(kind(cfg), about, coefficients)


def with_controls(
    intervention: Any, about: LatentStatistics, coefficients: Sequence[float], prompts: Any = None
) -> list[Condition]:
    """All conditions and the controls that each has at every coefficient."""
    conditions, _ = intervention.plan(
        about, list(coefficients), prompts or Prompts(), random_lm("llama")
    )
    design = ControlDesign(intervention, conditions, coefficients, intervention.cfg)
    return [*design.own, *design.curve()]


def one(conditions: list[Condition], name: str) -> Condition:
    return next(c for c in conditions if c.name == name)


def test_steering_goes_on_the_other_group_singly_and_together_with_controls() -> None:
    conditions = planned(Steer)
    tested = [(c.name, c.prompts, c.latents) for c in conditions if c.role != "control"]
    assert tested == [
        ("known_group", "unknown", (3, 5)),
        ("known_3", "unknown", (3,)),
        ("known_5", "unknown", (5,)),
        ("unknown_2", "known", (2,)),
    ]
    controls = [c for c in conditions if c.role == "control"]
    kinds = [(c.of, c.control_kind) for c in controls]
    assert Counter(kinds) == {
        **{(name, "frequency"): 2 for name, *_ in tested},
        **{(name, "random_norm"): 2 for name in ("known_group", "unknown_2")},
    }
    for control in controls:
        same = {3, 5} if control.direction == "known" else {2}
        assert not set(control.latents) & same


@pytest.mark.parametrize("unit", ["raw", "max_act", "p99_act", "resid_norm"])
def test_a_single_latent_is_added_in_its_unit(unit: str) -> None:
    about = facts()
    condition = one(planned(Steer, (2.0,), unit=unit, facts=about), "known_3")
    (op,) = condition.edits[0]
    assert isinstance(op, Add) and op.hookpoint == AT and op.coefficient == 2.0
    row, direction = about.table.set_index("latent").loc[3], about.directions([3])[0]
    scale = {"raw": 1.0, "resid_norm": 7.0 / float(direction.norm())}.get(unit)
    scale = float(row[unit]) if scale is None else scale
    torch.testing.assert_close(op.vector.values, scale * direction)
    strength = condition.strengths[0]
    assert strength[unit] == pytest.approx(2.0, rel=1e-5)
    assert strength["raw"] == pytest.approx(2 * scale, rel=1e-5)
    assert strength["max_act"] == pytest.approx(2 * scale / row["max_act"], rel=1e-5)


def test_controls_are_as_long_as_what_they_stand_for() -> None:
    for unit in ("raw", "max_act", "resid_norm"):
        conditions = planned(Steer, (1.0,), unit=unit)
        own = one(conditions, "known_3").edits[0][0]
        for number in (1, 2):
            control = one(conditions, f"known_3_frequency_{number:02d}").edits[0][0]
            assert isinstance(own, Add) and isinstance(control, Add)
            a, b = own.vector.values.norm(), control.vector.values.norm()
            assert float(a) == pytest.approx(float(b), rel=1e-5)


def test_other_directions_are_the_difference_of_means_a_probe_and_random_ones() -> None:
    about = facts()
    conditions = planned(
        Steer, (1.0,), directions=["mean_difference", "probe", "random"], unit="raw", facts=about
    )
    read = about.stream()  # type: ignore[misc]
    acts, labels = read.acts, read.groups
    difference = acts[labels == "known"].mean(0) - acts[labels == "unknown"].mean(0)
    op = one(conditions, "known_mean_difference").edits[0][0]
    assert isinstance(op, Add)
    np.testing.assert_allclose(op.vector.values.numpy(), difference, atol=1e-5)
    assert one(conditions, "known_mean_difference").prompts == "unknown"
    probe = one(conditions, "unknown_probe").edits[0][0]
    assert isinstance(probe, Add)
    unit = torch.nn.functional.normalize(probe.vector.values, dim=0)
    assert unit.abs().argmax() == 0 and unit[0] > 0, "the groups differ along the first axis"
    noise = [c for c in conditions if c.of == "known_random"]
    assert [c.role for c in noise] == ["direction", "control", "control"]
    lengths = {round(float(c.edits[0][0].vector.values.norm()), 4) for c in noise}  # type: ignore[union-attr]
    assert lengths == {round(float(np.linalg.norm(difference)), 4)}


@pytest.mark.parametrize(
    ("kind", "of"), [(Steer, "known_random"), (SpliceReconstruction, "known_splice")]
)
def test_random_directions_differ_between_layers_and_groups(kind: type, of: str) -> None:
    """In 4096 dimensions unrelated directions have cosines of about 0.016."""

    def vectors(layer: int, n_controls: int = 3, of: str = of) -> torch.Tensor:
        at, wide = Hookpoint(layer, "resid_post"), torch.randn(N_LATENTS, 4096)
        acts = np.repeat(np.eye(2, 4096), 30, axis=0)
        read = StreamRows(acts, np.repeat(["known", "unknown"], 30), np.arange(60))
        about = replace(
            facts(),
            hookpoint=at,
            written=at,
            stream=lambda: read,
            directions=lambda chosen: wide[list(chosen)],
        )
        cfg = InterventionConfig(name="x", directions=["random"], n_controls=n_controls)
        groups = Prompts(of_group={"known": [], "unknown": []})
        conditions = with_controls(kind(cfg), about, [1.0], groups)
        ops = [c.edits[0][0] for c in conditions if c.of == of and c.role != "place"]
        edit_vectors = [op.vector if isinstance(op, Add) else op.instead for op in ops]  # type: ignore[union-attr]
        return torch.nn.functional.normalize(torch.stack([v.values for v in edit_vectors]), dim=-1)

    one = vectors(1)
    assert len(one) >= 3
    assert torch.equal(one, vectors(1))
    assert torch.equal(one, vectors(1, 5)[: len(one)])
    for other in (vectors(2), vectors(1, of=of.replace("known", "unknown"))):
        assert float((one @ other.T).abs().max()) < 0.1


def least_squares(
    about: LatentStatistics, latents: Sequence[int], target: np.ndarray
) -> np.ndarray:
    """The part of a vector that the latents' decoder rows make up, by numpy's least squares."""
    rows = about.directions(list(latents)).numpy().astype(np.float64)
    return np.linalg.lstsq(rows.T, target, rcond=None)[0] @ rows


def test_the_denoised_difference_is_the_least_squares_part_of_it() -> None:
    about = facts()
    settings = {"directions": ["denoised_difference"], "unit": "raw", "facts": about}
    conditions = planned(Steer, (1.0,), **settings)
    read = about.stream()  # type: ignore[misc]
    acts, labels = read.acts, read.groups
    difference = acts[labels == "known"].mean(0) - acts[labels == "unknown"].mean(0)
    main = one(conditions, "known_denoised_difference")
    wanted = least_squares(about, (2, 3, 5), difference)
    vector = main.edits[0][0].vector.values.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(vector, wanted, atol=1e-5)
    share = np.linalg.norm(wanted) / np.linalg.norm(difference)
    assert main.strengths[0]["norm_kept"] == pytest.approx(share, rel=1e-5)
    assert 0 < share < 1
    assert sorted(main.latents) == [2, 3, 5] and main.prompts == "unknown"
    other = one(conditions, "unknown_denoised_difference").edits[0][0]
    np.testing.assert_allclose(other.vector.values.numpy(), -vector, atol=1e-5)  # type: ignore[union-attr]
    controls = [c for c in conditions if c.of == main.name and c.role == "control"]
    assert [c.control_kind for c in controls] == ["random_norm"] * 2
    for control in controls:
        length = control.edits[0][0].vector.values.norm()  # type: ignore[union-attr]
        assert float(length) == pytest.approx(np.linalg.norm(wanted), rel=1e-5)
        assert not control.latents and "norm_kept" not in control.strengths[0]


def test_dependent_decoder_rows_do_a_denoised_difference_no_harm() -> None:
    about = facts()
    rows, target = about.directions([2, 3, 5]), torch.arange(float(D))
    twice, share = denoised(target, torch.cat([rows, 2 * rows]))
    np.testing.assert_allclose(
        twice.numpy(), least_squares(about, (2, 3, 5), target.numpy()), atol=1e-4
    )
    assert share == pytest.approx(float(twice.norm() / target.norm()), rel=1e-5)


def test_the_denoised_difference_is_taken_out_of_the_stream_too() -> None:
    about = facts()
    conditions = planned(ProjectOut, (1.0,), directions=["denoised_difference"], facts=about)
    op = one(conditions, "known_denoised_difference").edits[0][0]
    assert isinstance(op, Project)
    difference = about.mean_difference("known").numpy()
    wanted = least_squares(about, (2, 3, 5), difference)
    cosine = op.basis.values[0].numpy() @ wanted / np.linalg.norm(wanted)
    assert abs(cosine) == pytest.approx(1, abs=1e-5)


def test_without_selected_latents_there_is_no_denoised_difference() -> None:
    about = facts()
    about.table["selected"] = False
    cfg = InterventionConfig(name="steer", directions=["denoised_difference"])
    conditions, notes = Steer(cfg).plan(about, [1.0], Prompts(), random_lm("llama"))
    assert not conditions
    assert notes == [
        "denoised_difference: no latent is selected, so there is nothing to project on"
    ]


def test_clamping_reads_its_latents_and_aims_at_the_other_group_s_mean() -> None:
    about = facts()
    conditions = planned(Clamp, (1.0,), rule="at_least", facts=about)
    op = one(conditions, "unknown_group").edits[0][0]
    assert isinstance(op, Move) and op.rule == "at_least"
    assert op.read == op.write == (3, 2, 5) or sorted(op.read) == [2, 3, 5]
    wanted = about.table.set_index("latent").loc[list(op.read), "mean_unknown"]
    assert op.targets == pytest.approx(wanted.tolist())
    assert one(conditions, "unknown_group").prompts == "known"
    norms = about.table.set_index("latent")["norm"]
    moves = one(conditions, "unknown_group_frequency_01").edits[0]
    assert len(moves) == 3 and not {f for m in moves for f in m.write} & {2, 3, 5}  # type: ignore[union-attr]
    for latent, target, move in zip(op.read, op.targets, moves, strict=True):
        assert isinstance(move, Move) and move.rule == "at_least"
        assert (move.read, move.targets) == ((latent,), (target,))
        added = move.coefficient * norms[move.write[0]]
        assert added == pytest.approx(op.coefficient * norms[latent], rel=1e-6)


def test_clamping_named_latents_to_given_values_needs_no_groups() -> None:
    op = one(
        planned(Clamp, (1.0,), latents=[7, 4], values=[3.0, 0.5], facts=facts(("a",))),
        "latents_group",
    ).edits[0][0]
    assert isinstance(op, Move)
    assert dict(zip(op.read, op.targets, strict=True)) == {7: 3.0, 4: 0.5}
    with pytest.raises(ConfigError, match="type intervention.values"):
        planned(Clamp, latents=[7], facts=facts(("a",)))


def test_scaling_and_silencing_are_on_the_group_s_own_prompts() -> None:
    scale = one(planned(Scale, (1.5,)), "known_3")
    assert scale.prompts == "known"
    op = scale.edits[0][0]
    assert isinstance(op, Move) and (op.targets, op.coefficient) == ((0.0,), -1.5)
    silenced = one(planned(Ablate, (1.0,)), "known_3").edits[0][0]
    assert isinstance(silenced, Move) and (silenced.targets, silenced.coefficient) == ((0.0,), 1.0)
    control = one(planned(Ablate, (1.0,)), "known_3_frequency_01").edits[0][0]
    assert isinstance(control, Move) and control.read == control.write != (3,)


def test_directions_are_removed_at_every_layer_asked_for() -> None:
    about = facts()
    condition = one(planned(ProjectOut, (1.0,), layers="all", facts=about), "known_group")
    ops = condition.edits[0]
    assert [op.hookpoint.layer for op in ops] == [0, 1, 2]
    assert isinstance(ops[0], Project)
    basis = ops[0].basis.values
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=0)
    directions = about.directions([3, 5])
    torch.testing.assert_close(directions @ basis.T @ basis, directions, atol=1e-4, rtol=1e-4)


def test_orthogonalised_weights_have_directions_and_no_strengths_between() -> None:
    conditions = planned(Orthogonalize, (0.0, 1.0))
    weights = one(conditions, "known_3").weights
    assert weights is not None and weights.shape == (1, D)
    with pytest.raises(ConfigError, match=r"coefficient=0.5: .*type 'coefficient=\[0,1\]'"):
        planned(Orthogonalize, (0.5,))


def test_dependent_directions_fall_away() -> None:
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    assert len(orthonormal(torch.cat([rows, rows[:2] * 3]))) == 3


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Clamp, {"directions": ["probe"]}, "'probe' in .* is not a latent"),
        (Ablate, {"layers": "all"}, "works at the SAE's own layer"),
        (
            Steer,
            {"directions": ["probe"], "unit": "max_act"},
            "type intervention.unit=resid_norm or raw",
        ),
    ],
)
def test_what_does_not_go_together_is_said(kind: type, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(kind, (1.0,), **settings)


def test_a_latent_without_statistics_is_reported() -> None:
    with pytest.raises(InterventionError, match="latent 4000 is never active on this data set"):
        planned(Steer, latents=[4000])
    with pytest.raises(InterventionError, match="two groups"):
        planned(Steer, directions=["mean_difference"], facts=facts(stream=False))
