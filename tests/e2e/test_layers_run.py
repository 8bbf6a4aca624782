"""Runs that change latents of several layers at once, and denoised differences of means."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp.context import ObjectCache
from saexp.errors import SaexpError
from saexp.interventions import run as causal
from saexp.interventions.results_cache import ResultCache
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL

SMALL = ["tracker=none", "analyzer.n_bootstrap=0", "intervention.n_prompts=6", "sae.check=off"]
SMALL += ["intervention.n_choice_prompts=2", "intervention.n_controls=2", "analyzer.scores=false"]
SMALL += ["intervention.n_curve_controls=1", "intervention.max_new_tokens=6"]
SMALL += ["dataset.n_examples=80", "analyzer.n_background=500", FEW_NEUTRAL]
SMALL += ["intervention.n_neutral=3"]
FEW = ["intervention.n_prompts=2", "intervention.n_controls=1"]
PER_LAYER = ["intervention.latents=selected_per_layer", "intervention.layers=[2,3]"]
LATENT = 67
"""Of layer 1, active on known entities."""
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def ran(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose([*SMALL, f"cache_dir={cache}", "layer=2", *words])
    return saexp.run(cfg, folder, objects=OBJECTS)


@pytest.mark.parametrize("mode", ["steer", "ablate"])
def test_layers_are_changed_together_and_singly(cache: Path, tmp_path: Path, mode: str) -> None:
    outcomes = "intervention.outcomes=[refusal,answer_probability]"
    strengths = "coefficient=[0,0.6]" if mode == "steer" else "coefficient=[0,1]"
    result = ran(cache, tmp_path, f"intervention={mode}", *PER_LAYER, outcomes, strengths)
    summary = result.tables["effects_summary"].query("split == 'test'")
    conditions = summary[~summary["role"].isin(["baseline", "control"])]
    for group in ("known", "unknown"):
        assert {f"{group}_layers_2-3", f"{group}_layer_2", f"{group}_layer_3"} <= set(
            conditions["condition"]
        )
    effects = result.tables["effects"]
    both = effects[effects["of"] == "known_layers_2-3"]
    assert set(both["hookpoint"]) == {"layer_2.resid_post+layer_3.resid_post"}
    assert both["layer"].isna().all()
    assert (effects.loc[effects["of"] == "known_layer_3", "layer"] == 3).all()
    base = effects[effects["role"] == "baseline"].set_index("example_id")
    zero = effects[(effects["role"] != "baseline") & (effects["coefficient"] == 0)]
    same = base.loc[zero["example_id"]]
    assert (zero["generated_text"].to_numpy() == same["generated_text"].to_numpy()).all()
    assert (zero["answer_probability"].to_numpy() == same["answer_probability"].to_numpy()).all()
    assert conditions["answer_probability_change"].abs().max() > 0.01
    of_layer = result.tables["layer_latents"]
    label = both.loc[both["role"] == "group", "latent"].iloc[0].split("+")
    pairs = {f"{r.layer}:{r.latent}" for r in of_layer.itertuples()}
    assert set(label) <= pairs
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "known_layers_2-3" in page and label[0] in page
    about = json.loads((tmp_path / "provenance.json").read_text("utf-8"))
    assert sorted(s["hookpoint"] for s in about["saes"]) == [
        "layer_2.resid_post",
        "layer_3.resid_post",
    ]


class Ablated(NamedTuple):
    """Latents of layers 2 and 3, together and singly; and a run of layer 3; with the names under
    which results were kept."""

    several: Result
    alone: Result
    kept: list[dict[str, Any]]


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Ablated:
    folder, kept = tmp_path_factory.mktemp("ablated"), []

    class Watched(ResultCache):
        def __init__(self, cache_dir: Any, determined_by: Any) -> None:
            kept.append(dict(determined_by))
            super().__init__(cache_dir, determined_by)

    words = ["intervention=ablate", "coefficient=[0,1]"]
    words += ["intervention.outcomes=[answer_logit,attention]", "dataset.n_examples=160"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "ResultCache", Watched)
        several = ran(folder / "cache", folder / "several", *words, *PER_LAYER)
        alone = ran(folder / "cache", folder / "alone", *words, "layer=3")
    return Ablated(several, alone, kept)


def test_a_layer_s_latents_alone_are_as_in_a_run_of_that_layer(ablated: Ablated) -> None:
    several, alone, _ = ablated

    def values(result: Result, condition: str) -> pd.Series:
        table = result.tables["effects"]
        of_condition = table[(table["condition"] == condition) & (table["coefficient"] == 1)]
        return of_condition.set_index("example_id")["answer_logit"].sort_index()

    conditions = set(alone.tables["effects"]["condition"])
    own = (
        "unknown_group"
        if "unknown_group" in conditions
        else next(c for c in conditions if c.startswith("unknown_") and "control" not in c)
    )
    pd.testing.assert_series_equal(values(several, "unknown_layer_3"), values(alone, own))


def test_attention_under_latents_of_several_layers(ablated: Ablated) -> None:
    """A layer alone is as in a run of that layer; both together differ from either."""
    several, alone = (result.tables["attention"] for result in ablated[:2])

    def edited(table: pd.DataFrame, condition: str) -> np.ndarray:
        of_condition = table[(table["condition"] == condition) & (table["coefficient"] == 1)]
        return of_condition.sort_values(["layer", "head"])["edited"].to_numpy()

    names = {c for c in alone["condition"] if str(c).startswith("known")}
    assert len(edited(several, "known_layer_3")) == 20
    patterns = [edited(several, f"known_{at}") for at in ("layer_2", "layer_3", "layers_2-3")]
    assert any(np.allclose(patterns[1], edited(alone, str(n)), atol=1e-6) for n in names)
    assert np.abs(patterns[2] - patterns[0]).max() > 1e-6
    assert np.abs(patterns[2] - patterns[1]).max() > 1e-6


def test_all_layers_are_collected_in_one_pass(ablated: Ablated, tmp_path: Path) -> None:
    one = ran(tmp_path / "cache", tmp_path / "run", "intervention=none", "dataset.n_examples=160")
    name = "collection/tokens_forwarded"
    assert ablated.several.metrics[name] == one.metrics[name]
    assert ablated.alone.metrics[name] == 0


def test_latents_by_layer_are_named_on_the_command_line(cache: Path, tmp_path: Path) -> None:
    words = ["intervention=clamp", f"intervention.latents={{1:[{LATENT}],3:selected}}"]
    result = ran(cache, tmp_path / "clamp", *words, *FEW, "coefficient=1")
    conditions = set(result.tables["effects"]["condition"])
    assert {"known_layers_1_3", "known_layer_1", "known_layer_3"} < conditions
    described = ran(
        cache,
        tmp_path / "stats",
        "analyzer=stats",
        "intervention=ablate",
        *FEW,
        f"intervention.latents={{1:[{LATENT}],3:[5]}}",
        "coefficient=1",
    )
    assert "latents_layers_1_3" in set(described.tables["effects"]["condition"])


def test_results_are_kept_under_the_names_of_all_saes(ablated: Ablated) -> None:
    saes = ablated.kept[0]["saes"]
    assert len(set(saes)) == 2
    (own,) = ablated.kept[-1]["saes"]
    assert own in saes


def test_the_denoised_difference_is_reported_with_what_it_keeps(
    cache: Path, tmp_path: Path
) -> None:
    words = ["intervention.directions=[denoised_difference,mean_difference]", "coefficient=[0,0.6]"]
    result = ran(cache, tmp_path, *words, "intervention.outcomes=[answer_probability]")
    summary = result.tables["effects_summary"].query("split == 'test'")
    denoised = summary[summary["condition"] == "unknown_denoised_difference"]
    norm_kept = denoised["norm_kept"].to_numpy()
    assert (norm_kept > 0).all() and (norm_kept < 1).all()
    assert summary.loc[summary["condition"] == "unknown_mean_difference", "norm_kept"].isna().all()
    controls = result.tables["controls"].query("of == 'unknown_denoised_difference'")
    assert controls["control_kind"].tolist() == ["random_norm"] * 2 + ["random_kl"] * 2
    np.testing.assert_allclose(controls["norm_ratio"][:2], 1, rtol=1e-6)
    note = next(n for n in result.notes if n.startswith("denoised_difference towards 'unknown'"))
    assert f"which keeps {norm_kept[0]:.2f} of its norm" in note
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "unknown_denoised_difference" in page
    assert f"which keeps {norm_kept[0]:.2f} of its norm" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["intervention.latents={1:[300]}"], "latent 300, but the SAE of layer 1 has latents 0-25"),
        (["intervention.latents=[300]"], "latent 300, but the SAE of layer 2 has latents 0-255"),
        (["intervention.latents={9:[3]}"], "layer=9 is out of range: tiny has layers 0-4"),
        (["intervention=ablate", "intervention.layers=[1,2]"], "latents=selected_per_layer"),
        (
            ["intervention=splice", "intervention.layers=[1,2]"],
            "intervention=splice works at the hookpoint",
        ),
        (
            ["analyzer=stats", "intervention.latents=[3]", "intervention.min_output_score=0.1"],
            "latents have no output scores here",
        ),
    ],
)
def test_bad_input_is_one_line(cache: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(SaexpError, match=message) as error:
        ran(cache, tmp_path, *words)
    assert "\n" not in str(error.value)


def test_a_layer_without_an_sae_is_an_error_that_says_which(cache: Path, tmp_path: Path) -> None:
    folder = Path(saexp.__file__).parent / "assets" / "tiny" / "sae" / "layer_2" / "width_256"
    words = ["sae=local", f"sae.path={folder}", "intervention.latents={1:[3]}", "width=256"]
    with pytest.raises(SaexpError, match="intervention.latents names layer 1: layer=1, but") as e:
        ran(cache, tmp_path, *words)
    assert "\n" not in str(e.value)
