"""Latents of several layers' SAEs in one condition: what is planned, and what it does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from saexp.config.groups import InterventionConfig
from saexp.errors import ConfigError, InterventionError
from saexp.interventions import Ablate, Clamp, Orthogonalize, ProjectOut, Scale, Steer
from saexp.interventions.conditions import Condition, Prompts
from saexp.interventions.controls import ControlDesign
from saexp.interventions.directions import LatentStatistics, orthonormal, spans
from saexp.interventions.generation import last_logits
from saexp.interventions.stream_edits import Add, Move, Project, Row
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes import SAESettings, SparseAutoencoder
from tests.random_models import D_MODEL, TEXTS, random_lm

D_SAE = 48
GROUPS = ("known", "unknown")
LATENTS: dict[int, Any] = {0: [3, 8], 1: [5]}
KINDS = {"steer": Steer, "clamp": Clamp, "scale": Scale, "ablate": Ablate}
KINDS |= {"project_out": ProjectOut, "orthogonalize": Orthogonalize}


def made_sae(layer: int, kind: str = "standard") -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(layer + 1)
    decoder = torch.randn(D_SAE, D_MODEL, generator=generator)
    decoder = decoder / decoder.norm(dim=-1, keepdim=True) * (1 + layer)
    transcoder = kind == "transcoder"
    return SparseAutoencoder(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.full((D_SAE,), 0.3),
            "b_dec": torch.zeros(D_MODEL),
        },
        SAESettings(
            architecture="topk" if kind == "topk" else "standard",
            k=12 if kind == "topk" else None,
            hookpoint=Hookpoint(layer, "mlp_in" if transcoder else "resid_post"),
            hookpoint_out=Hookpoint(layer, "mlp_out") if transcoder else None,
        ),
    )


def facts_of(sae: SparseAutoencoder) -> LatentStatistics:
    rng = np.random.default_rng(sae.hookpoint.layer)
    selected = np.isin(np.arange(D_SAE), [3, 5, 8])
    table = pd.DataFrame(
        {
            "latent": np.arange(D_SAE),
            "direction": np.where(np.arange(D_SAE) % 2, *GROUPS),
            "selected": selected,
            "rank": pd.array([{3: 1, 5: 2, 8: 1}.get(i) for i in range(D_SAE)], dtype="Int64"),
            "q_value": np.where(selected, 0.001, 0.8),
            "frequency": rng.uniform(0.1, 0.5, D_SAE),
            "norm": sae.directions(list(range(D_SAE))).norm(dim=-1).numpy(),
            "max_act": rng.uniform(4, 6, D_SAE),
            "p99_act": rng.uniform(2, 3, D_SAE),
            **{f"mean_{g}": rng.uniform(0, 2, D_SAE) for g in GROUPS},
        }
    )
    return LatentStatistics(
        table=table,
        groups=GROUPS,
        median_norm=7.0 + sae.hookpoint.layer,
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=sae.hookpoint_out or sae.hookpoint,
        n_layers=3,
    )


def layered(kind: str = "standard", layers: tuple[int, ...] = (0, 1)) -> LatentStatistics:
    saes = [made_sae(n, kind) for n in layers]
    facts = {n: facts_of(sae) for n, sae in zip(layers, saes, strict=True)}
    return replace(facts[layers[0]], layers=facts, saes={s.hookpoint: s for s in saes})


def planned(
    name: str,
    facts: LatentStatistics,
    coefficients: tuple[float, ...] = (0.0, 1.0),
    **settings: Any,
) -> dict[str, Condition]:
    cfg = InterventionConfig(name=name, **{"n_controls": 2, "latents": LATENTS, **settings})
    intervention = KINDS[name](cfg)
    conditions, _ = intervention.plan(facts, list(coefficients), Prompts(), random_lm("llama"))
    design = ControlDesign(intervention, conditions, coefficients, cfg)
    return {c.name: c for c in [*design.own, *design.curve()]}


def test_all_layers_together_come_first_then_each_by_itself() -> None:
    conditions = planned("steer", layered())
    tested = [
        (c.name, c.role, c.prompts, c.label) for c in conditions.values() if c.role != "control"
    ]
    assert tested == [
        ("known_layers_0-1", "group", "unknown", "0:3+1:5"),
        ("known_layer_0", "single", "unknown", "0:3"),
        ("known_layer_1", "single", "unknown", "1:5"),
        ("unknown_layer_0", "single", "known", "0:8"),
    ]
    written = conditions["known_layers_0-1"].written
    assert [h.name for h in written] == ["layer_0.resid_post", "layer_1.resid_post"]


def test_selected_latents_are_each_layer_s_own() -> None:
    conditions = planned("ablate", layered(), latents="selected_per_layer", layers=[0, 1])
    assert conditions["known_layers_0-1"].label == "0:3+0:5+1:3+1:5"
    assert conditions["unknown_layers_0-1"].label == "0:8+1:8"
    mixed = planned("ablate", layered(), latents={"0": "selected", 1: [7]})
    assert mixed["known_layers_0-1"].label == "0:3+0:5+1:7"


@pytest.mark.parametrize("name", KINDS)
def test_controls_are_matched_within_each_layer_and_edited_at_the_same_layers(name: str) -> None:
    facts = layered()
    latents = {0: [3, 9], 1: [5]}
    conditions = planned(name, facts, latents=latents)
    # Orthogonalised weights hold no latent in place; all other kinds have operations.
    main = next(c for c in conditions.values() if c.layers == (0, 0, 1) and c.role == "group")
    controls = [
        c for c in conditions.values() if c.of == main.name and c.control_kind == "frequency"
    ]
    assert len(controls) == 2
    for control in controls:
        assert control.layers == main.layers
        ops, own = control.edits[1], main.edits[1]
        assert {op.hookpoint for op in ops} == {op.hookpoint for op in own}
    logs = []
    for layer, chosen in ((0, (3, 9)), (1, (5,))):
        frequency = facts.layers[layer].table.set_index("latent")["frequency"]
        used = [
            [f for f, n in zip(c.latents, c.layers, strict=True) if n == layer] for c in controls
        ]
        assert not {f for some in used for f in some} & {3, 5, *chosen}
        logs.append([np.log(frequency[some].to_numpy() / frequency[[*chosen]]) for some in used])
    for control, *ratios in zip(controls, *logs, strict=True):
        log_ratios = np.concatenate(ratios)
        assert control.frequency_ratio == pytest.approx(np.exp(log_ratios.mean()), rel=1e-9)
        assert control.matched == (np.abs(log_ratios) <= np.log(2)).all()


def test_as_many_control_sets_as_the_layer_with_fewest_has() -> None:
    facts = layered()
    some = np.isin(np.arange(D_SAE), [5, 20])
    facts.layers[1].table["frequency"] = np.where(some, 0.2, 0.0)
    cfg = InterventionConfig(name="ablate", n_controls=3, latents={0: [3], 1: [5]})
    intervention = Ablate(cfg)
    conditions, _ = intervention.plan(facts, [1.0], Prompts(), random_lm("llama"))
    controls = ControlDesign(intervention, conditions, [1.0], cfg).curve()
    assert [c.label.split("+")[1] for c in controls if c.of == "known_layers_0-1"] == ["1:20"]


def test_a_layer_without_latents_is_left_out_with_a_note() -> None:
    facts = layered()
    facts.layers[1].table["selected"] = False
    cfg = InterventionConfig(name="ablate", latents="selected_per_layer", layers=[0, 1])
    conditions, notes = Ablate(cfg).plan(facts, [1.0], Prompts(), random_lm("llama"))
    assert {c.of for c in conditions} == {"known_layer_0", "unknown_layer_0"}
    assert "no latent for 'known' at layer 1" in notes


def test_strength_is_the_sum_over_layers() -> None:
    conditions = planned("steer", layered(), (0.5,), latents={0: [3], 1: [5]})
    both = conditions["known_layers_0-1"].strengths[0]
    assert both["resid_norm"] == pytest.approx(1.0)
    assert both["length"] == pytest.approx(0.5 * 7 + 0.5 * 8)
    assert conditions["known_layer_1"].strengths[0]["resid_norm"] == pytest.approx(0.5)


def test_targets_go_to_their_own_layer() -> None:
    conditions = planned(
        "clamp", layered(), (1.0,), latents={0: [3, 9], 1: [3]}, values=[1, 2, 4.5]
    )
    first, second = conditions["known_layers_0-1"].edits[0]
    assert isinstance(first, Move) and isinstance(second, Move)
    assert dict(zip(first.read, first.targets, strict=True)) == {3: 1.0, 9: 2.0}
    assert (second.read, second.targets) == ((3,), (4.5,))


def test_weights_lose_the_directions_of_all_layers() -> None:
    facts = layered()
    weights = planned("orthogonalize", facts, latents={0: [3], 1: [5]})["known_layers_0-1"].weights
    assert weights is not None
    rows = torch.cat([facts.layers[0].directions([3]), facts.layers[1].directions([5])])
    torch.testing.assert_close(rows @ weights.T @ weights, rows, atol=1e-4, rtol=1e-4)
    assert len(weights) == 2


def by_hand(model: LanguageModel, ids: tuple[int, ...], hooks: list[tuple[Any, Any]]) -> Tensor:
    """Next-token logits of one prompt under plain forward hooks, no cache."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with torch.inference_mode():
            return model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def changing(change: Callable[[Tensor, Tensor], Tensor], places: tuple[int, ...]) -> Any:
    """Hook: `change(output, input)` of the module, at these tokens."""
    chosen = list(places)

    def hook(_m: Any, args: Any, out: Any) -> Any:
        stream = (out if isinstance(out, Tensor) else out[0]).clone()
        stream[0, chosen] = change(stream[0, chosen], args[0][0, chosen])
        return stream if isinstance(out, Tensor) else (stream, *out[1:])

    return hook


def formula(
    name: str,
    sae: SparseAutoencoder,
    facts: LatentStatistics,
    latents: list[int],
    coefficient: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """What an intervention does to (stream that is written, stream that the SAE reads)."""
    rows, of_latent = sae.W_dec[latents], facts.table.set_index("latent")
    if name == "steer":
        return lambda out, _: out + coefficient * rows.sum(0)
    if name == "project_out":
        basis = orthonormal(rows)
        return lambda out, _: out - coefficient * (out @ basis.T) @ basis
    targets = torch.zeros(len(latents))
    if name == "clamp":
        targets = torch.tensor(of_latent.loc[latents, "mean_known"].to_numpy()).float()
    gain = -coefficient if name == "scale" else coefficient

    def moved(out: Tensor, read: Tensor) -> Tensor:
        acts = sae.encode(out if sae.hookpoint_out is None else read)[:, latents]
        return out + gain * (targets - acts) @ rows

    return moved


# A norm follows the MLP of gemma2, so a plain hook on it would be at another place than mlp_out.
@pytest.mark.parametrize(
    ("name", "kind", "architecture"),
    [
        ("steer", "standard", "llama"),
        ("steer", "topk", "gemma2"),
        ("steer", "transcoder", "gpt2"),
        ("clamp", "standard", "gpt2"),
        ("clamp", "topk", "gemma2"),
        ("clamp", "transcoder", "llama"),
        ("scale", "standard", "gemma2"),
        ("scale", "topk", "llama"),
        ("scale", "transcoder", "gpt2"),
        ("ablate", "standard", "gemma2"),
        ("ablate", "topk", "gpt2"),
        ("ablate", "transcoder", "llama"),
        ("project_out", "standard", "gemma2"),
        ("project_out", "topk", "llama"),
        ("project_out", "transcoder", "gpt2"),
    ],
)
def test_two_layers_at_once_equal_plain_hooks(name: str, kind: str, architecture: str) -> None:
    """The second layer's latents are read from the stream as the first layer's edit left it."""
    model, facts = random_lm(architecture), layered(kind)
    latents = {0: [3, 9], 1: [5, 7]}
    conditions = planned(name, facts, (0.0, 0.7), latents=latents, unit="raw")
    main = conditions["known_layers_0-1"]
    ids = [tuple(model.tokenizer(t)["input_ids"][:12]) for t in TEXTS[:3]]
    rows = [Row(i, main.edits[1], (len(i) - 4, len(i) - 2)) for i in ids]
    logits = last_logits(model, rows, facts.saes)[:, -1]
    without: list[list[float]] = [[], []]
    for row, seen in zip(rows, logits, strict=True):
        hooks = []
        for (at, sae), chosen in zip(facts.saes.items(), latents.values(), strict=True):
            block = model.blocks[at.layer]
            change = formula(name, sae, facts.layers[at.layer], chosen, 0.7)
            module = block if kind != "transcoder" else block.mlp
            hooks.append((module, changing(change, row.positions)))
        torch.testing.assert_close(seen, by_hand(model, row.ids, hooks), atol=5e-4, rtol=1e-4)
        for hook, gaps in zip(hooks, without, strict=True):
            gaps.append(float((seen - by_hand(model, row.ids, [hook])).abs().max()))
    assert min(max(gaps) for gaps in without) > 1e-3, "either layer's edit matters"
    plain = last_logits(model, [Row(i) for i in ids], facts.saes)
    nothing = [Row(i, main.edits[0], (len(i) - 4, len(i) - 2)) for i in ids]
    assert torch.equal(last_logits(model, nothing, facts.saes), plain)


def test_operations_are_at_each_sae_s_own_place() -> None:
    ops = planned("steer", layered("transcoder"), (1.0,))["known_layers_0-1"].edits[0]
    assert [op.hookpoint.name for op in ops] == ["layer_0.mlp_out", "layer_1.mlp_out"]
    assert all(isinstance(op, Add) for op in ops)
    ops = planned("project_out", layered(), (1.0,))["known_layers_0-1"].edits[0]
    assert [op.hookpoint.layer for op in ops if isinstance(op, Project)] == [0, 1]


def test_numbers_of_layers_are_drawn_together() -> None:
    assert spans([1, 2, 3, 7]) == "1-3_7"
    assert spans([4]) == "4"
    assert spans([5, 0, 4]) == "0_4-5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": {}}, "contains no latents"),
        ({"latents": {1: []}}, "contains no latents"),
        ({"latents": {"a": [1]}}, "contains no latents; type selected, a list such as"),
        ({"latents": ["1:12"]}, r"latents by layer, '\{1:\[12,77\],2:selected\}'"),
        ({"latents": "selected_per_layer"}, r"needs layers; type 'intervention.layers=\[1,2\]'"),
        ({"latents": {1: [2]}, "layers": [1]}, "lists its own layers; leave out"),
        ({"latents": {1: [2]}, "directions": ["latents", "probe"]}, "several layers, which need"),
        ({"latents": {1: [2, 3]}, "values": [1.0]}, "1 targets for 2 listed latents"),
        ({"latents": {1: [2], 2: "selected"}, "values": [1.0]}, "leaves some to be selected"),
        ({"name": "patch", "latents": {1: [2]}}, "intervention=patch changes no latents"),
    ],
)
def test_what_does_not_go_together_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        InterventionConfig(**{"name": "clamp", **settings})
    assert "\n" not in str(error.value)


def test_a_latent_of_which_nothing_is_known_is_named_with_its_layer() -> None:
    facts = layered()
    second = facts.layers[1]
    silent = replace(second, table=second.table.drop(index=5))
    facts = replace(facts, layers={0: facts.layers[0], 1: silent})
    with pytest.raises(InterventionError, match="latent 5 is never active .* layer_1.resid_post"):
        planned("steer", facts)
