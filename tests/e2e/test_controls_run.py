"""Runs with all kinds of control: their tables, their KL by hand, and what stays as it was."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import saexp
from saexp.context import ObjectCache
from saexp.data.datasets import background_texts
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.models.loading import LanguageModel
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.stats.significance import random_directions
from tests.shipped_texts import FEW_NEUTRAL

SMALL = ["tracker=none", "analyzer.n_bootstrap=0", "sae.check=off", "analyzer.scores=false"]
SMALL += ["intervention.n_prompts=5", "intervention.n_choice_prompts=3", "intervention.n_neutral=3"]
SMALL += [
    "analyzer.n_background=500",
    FEW_NEUTRAL,
    "intervention.max_new_tokens=4",
    "intervention.top_k=1",
    "device=cpu",
]
N, N_CURVE = 4, 2
CONTROLS = [f"intervention.n_controls={N}", f"intervention.n_curve_controls={N_CURVE}"]
CONTROLS += ["coefficient=[0,0.4,0.8]"]
KINDS = ["frequency", "disruption", "random_norm", "random_kl"]
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@dataclass(frozen=True)
class Ran:
    result: Result
    model: LanguageModel
    sae: SparseAutoencoder
    texts: list[TokenizedText]

    def table(self, name: str) -> pd.DataFrame:
        return self.result.tables[name]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *words: str) -> Result:
    return saexp.run(saexp.compose([*SMALL, f"cache_dir={cache}", *words]), folder, objects=OBJECTS)


@pytest.fixture(scope="module")
def ran(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    result = run(cache, tmp_path_factory.mktemp("run"), *CONTROLS)
    cfg = saexp.compose(SMALL)
    model, sae = saexp.build("model", cfg.model), saexp.build("sae", cfg.sae)
    texts = tokenize(background_texts(cfg.dataset)[:3], model.tokenizer, 48, model.prepend_bos)
    return Ran(result, model, sae, texts)


def kl_by_hand(ran: Ran, step: Tensor) -> float:
    """Mean over texts of the mean KL per token, each text alone, by a hand-written hook."""
    kls = []
    for text in ran.texts:
        ordinary = [i for i, special in enumerate(text.special) if not special]

        def hook(_module: Any, _args: Any, output: Any, ordinary: list[int] = ordinary) -> Any:
            stream = (output if isinstance(output, Tensor) else output[0]).clone()
            stream[0, ordinary] += step
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        ids = torch.tensor([list(text.ids)])
        with torch.inference_mode():
            before = ran.model.hf(ids).logits[0, 1:].double().log_softmax(-1)
            handle = ran.model.blocks[ran.sae.hookpoint.layer].register_forward_hook(hook)
            try:
                after = ran.model.hf(ids).logits[0, 1:].double().log_softmax(-1)
            finally:
                handle.remove()
        kls.append(float((before.exp() * (before - after)).sum(-1).mean()))
    return float(np.mean(kls))


def mains(ran: Ran) -> list[str]:
    """Conditions that have controls scaled to equal KL."""
    controls = ran.table("controls")
    return controls.loc[controls["control_kind"] == "random_kl", "of"].unique().tolist()


def test_every_kind_is_there_on_test_prompts_at_one_coefficient(ran: Ran) -> None:
    effects, controls = ran.table("effects"), ran.table("controls")
    assert set(effects.loc[effects["role"] != "control", "control_kind"]) == {""}
    assert len(mains(ran)) == 2
    for of in mains(ran):
        of_condition = controls[controls["of"] == of]
        at = of_condition[
            of_condition["coefficient"]
            == of_condition.loc[of_condition["control_kind"] == "random_kl", "coefficient"].iloc[0]
        ]
        assert sorted(at["control_kind"].unique()) == sorted(KINDS)
        counts = at["control_kind"].value_counts()
        assert counts["disruption"] == counts["random_norm"] == counts["random_kl"] == N
        assert N_CURVE <= counts["frequency"] <= N
        for kind in ("disruption", "random_kl"):
            rows = effects[(effects["of"] == of) & (effects["control_kind"] == kind)]
            assert set(rows["split"]) == {"test"} and rows["coefficient"].nunique() == 1
            assert len(rows) == N * 5
        curve = effects[(effects["of"] == of) & (effects["control_kind"] == "random_norm")]
        assert set(curve["split"]) == {"train", "test"}
        assert set(curve["coefficient"]) == {0.4, 0.8}


def test_tables_agree_on_what_controls_are(ran: Ran) -> None:
    controls, costs = ran.table("controls"), ran.table("costs")
    assert controls.columns.tolist() == [
        "of", "condition", "control_kind", "coefficient", "latents", "frequency_ratio",
        "norm_ratio", "kl", "kl_own", "kl_ratio", "matched",
    ]  # fmt: skip
    assert not controls.duplicated(["of", "coefficient", "condition"]).any()
    assert controls["norm_ratio"].gt(0).all() and controls["kl"].gt(0).all()
    plain = controls["control_kind"].isin(["frequency", "random_norm"])
    np.testing.assert_allclose(controls.loc[plain, "norm_ratio"], 1, rtol=1e-6)
    on_latents = controls["control_kind"].isin(["frequency", "disruption"])
    assert (controls["latents"] != "").equals(on_latents)
    assert controls["frequency_ratio"].notna().equals(on_latents)
    merged = controls.merge(costs, on=["condition", "coefficient", "of", "control_kind"])
    assert len(merged) == len(controls)
    np.testing.assert_allclose(merged["kl"], merged["neutral_kl"], rtol=1e-6)
    np.testing.assert_allclose(controls["kl_ratio"], controls["kl"] / controls["kl_own"])


def test_frequency_ratios_are_those_of_the_latent_table(ran: Ran) -> None:
    latents = ran.table("latents").set_index("latent")
    frequency = latents[["freq_known", "freq_unknown"]].mean(axis=1)
    controls = ran.table("controls").query("control_kind == 'frequency'")
    own = ran.table("effects").drop_duplicates("condition").set_index("condition")["latent"]
    for row in controls.to_dict("records"):
        ratio = frequency[int(row["latents"])] / frequency[int(own[row["of"]])]
        assert row["frequency_ratio"] == pytest.approx(ratio, rel=1e-9)
        assert row["matched"] == (0.5 <= ratio <= 2)


def test_scaled_controls_cost_as_much_as_their_condition_by_hand(ran: Ran) -> None:
    summary = ran.table("effects_summary").query("split == 'test'")
    lengths = summary.set_index(["condition", "coefficient"])["added_norm"]
    latents = summary.drop_duplicates("condition").set_index("condition")["latent"]
    controls = ran.table("controls")
    unit = torch.nn.functional.normalize
    d = ran.model.d_model
    n_matched = 0
    for of in mains(ran):
        of_condition = controls[controls["of"] == of].query(
            "control_kind in ['disruption', 'random_kl']"
        )
        at = of_condition["coefficient"].iloc[0]
        row = unit(ran.sae.directions([int(latents[of])])[0].float(), dim=0)
        own = kl_by_hand(ran, row * lengths[of, at])
        noise = random_directions(N, d, 0, "control", ran.sae.hookpoint.name, of)
        for control in of_condition.to_dict("records"):
            if control["control_kind"] == "disruption":
                direction = unit(ran.sae.directions([int(control["latents"])])[0].float(), dim=0)
            else:
                direction = noise[int(control["condition"][-2:]) - 1]
            kl = kl_by_hand(ran, direction * lengths[control["condition"], at])
            assert kl == pytest.approx(control["kl"], rel=1e-3)
            assert own == pytest.approx(control["kl_own"], rel=1e-3)
            inside = abs(np.log(kl / own)) <= np.log(1.1) * 1.01
            assert inside or not control["matched"]
            n_matched += control["matched"]
    assert n_matched >= 12


def test_coefficient_zero_and_conditions_do_not_depend_on_controls(
    ran: Ran, cache: Path, tmp_path: Path
) -> None:
    without = run(cache, tmp_path, "intervention.n_controls=0", "coefficient=[0,0.4,0.8]")
    assert "controls" not in without.tables
    effects, bare = ran.table("effects"), without.tables["effects"]
    assert set(bare["role"]) == {"baseline", "single"}
    main = effects[effects["role"] != "control"].reset_index(drop=True)
    pd.testing.assert_frame_equal(main, bare)
    texts = effects[effects["role"] == "baseline"].set_index("example_id")["generated_text"]
    zero = effects[(effects["coefficient"] == 0) & (effects["role"] != "baseline")]
    assert set(zero["control_kind"]) == {"", "frequency"}
    assert (zero["generated_text"] == texts.loc[zero["example_id"]].to_numpy()).all()
    costs = ran.table("costs")
    assert (costs.loc[costs["coefficient"] == 0, "neutral_kl"] == 0).all()


def test_one_coefficient_needs_no_choice(cache: Path, tmp_path: Path) -> None:
    words = ["intervention.n_controls=3", "intervention.n_curve_controls=1", "coefficient=0.8"]
    result = run(cache, tmp_path, *words, "intervention.outcomes=[answer_probability]")
    controls, effects = result.tables["controls"], result.tables["effects"]
    assert set(effects["split"]) == {"test"}
    assert set(controls["coefficient"]) == {0.8}
    assert controls.groupby(["of", "control_kind"]).size().drop("frequency", level=1).eq(3).all()
    # The KL of controls is known from scaling them, though no cost is asked for.
    scaled = controls["control_kind"].isin(["disruption", "random_kl"])
    assert controls.loc[scaled, "kl"].notna().all() and "costs" not in result.tables
    saved = pd.read_parquet(tmp_path / "controls.parquet")
    assert len(saved) == len(controls)
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))


def test_the_second_time_nothing_is_computed_and_the_size_of_both_stages_is_logged_beforehand(
    ran: Ran, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="saexp"):
        again = run(cache, tmp_path, *CONTROLS)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith(".cached_generation")]
    lines = [line for line in lines if " computed, " in line]
    assert len(lines) > 5 and all(", 0 computed, " in line for line in lines)
    pd.testing.assert_frame_equal(again.tables["controls"], ran.table("controls"))
    logged = [r.getMessage() for r in caplog.records if r.name == "saexp.interventions.run"]
    numbers = [
        int(n)
        for message in logged
        for n in re.findall(r"(?<= )\d+(?= (?:prompts|controls at))", message)
    ]
    effects = again.tables["effects"]
    n_at = effects.groupby("condition")["coefficient"].transform("nunique")
    is_second = (effects["role"] == "control") & (n_at == 1)
    # Baselines are measured before, and coefficient 0 repeats them.
    is_changed = (effects["role"] != "baseline") & (effects["coefficient"] != 0)
    assert numbers[0] == (~is_second & is_changed).sum()
    assert is_second.sum() <= numbers[1] == 2 * 5 * len(KINDS) * N


def test_without_an_outcome_per_prompt_there_is_no_second_stage(
    cache: Path, tmp_path: Path
) -> None:
    words = [f"intervention.n_controls={N}", f"intervention.n_curve_controls={N_CURVE}"]
    result = run(cache, tmp_path, *words, "intervention.outcomes=[attention]")
    controls = result.tables["controls"]
    assert set(controls["control_kind"]) == {"frequency", "random_norm"}
    assert set(result.tables["attention_summary"]["control_kind"]) == {
        "",
        *controls["control_kind"],
    }
    assert (controls.groupby(["of", "control_kind"])["condition"].nunique() <= N_CURVE).all()


def test_notes_report_what_was_achieved(ran: Ran) -> None:
    table = ran.result.tables["controls"]
    kind = table[(table["control_kind"] == "frequency") & (table["of"] == "unknown_143")]
    matched = kind.drop_duplicates("condition")["matched"]
    (note,) = [n for n in ran.result.notes if n.startswith("frequency-matched latents, within")]
    assert f"unknown_143 {matched.sum()} of {len(matched)}" in note


def test_kinds_that_an_edit_cannot_have_are_noted(cache: Path, tmp_path: Path) -> None:
    words = ["intervention=ablate", "intervention.n_controls=2"]
    notes = run(cache, tmp_path, *words).notes
    (note,) = [n for n in notes if "has no controls of kind" in n]
    assert note.startswith(
        "intervention=ablate has no controls of kind disruption, random_norm, random_kl"
    )


def test_named_latents_without_a_contrast_are_described_on_the_train_split(
    cache: Path, tmp_path: Path
) -> None:
    words = ["analyzer=stats", "intervention.latents=[154]", "intervention.n_controls=3"]
    result = run(cache, tmp_path / "stats", *words, "coefficient=[0,0.8]")
    contrast = run(cache, tmp_path / "contrast", "intervention=none").tables["latents"]
    frequency = contrast.set_index("latent")[["freq_known", "freq_unknown"]].mean(axis=1)
    assert len(result.tables["controls"])
    for row in result.tables["controls"].query("control_kind == 'frequency'").to_dict("records"):
        ratio = frequency[int(row["latents"])] / frequency[154]
        assert row["frequency_ratio"] == pytest.approx(ratio, rel=1e-9)
