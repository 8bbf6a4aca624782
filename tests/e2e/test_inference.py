"""What the default test claims, and that nothing is claimed where there is nothing: whole runs.

A claim is a sentence of the causal test: a main condition at its chosen coefficient whose Holm
corrected rank p against its controls is at most 0.05 on the test split.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp import registry
from saexp.context import ObjectCache
from saexp.reports.analysis import headline
from saexp.results import Result

ALPHA = 0.05
QUICK = ["intervention.n_prompts=20", "intervention.n_controls=19", "coefficient=[0.6,0.9]"]
QUICK += ["intervention.n_choice_prompts=10", "intervention.n_curve_controls=4"]
QUICK += ["intervention.n_neutral=4"]
QUICK += ["intervention.max_new_tokens=12", "analyzer.n_bootstrap=0"]
QUICK += ["analyzer.n_background=1000", "analyzer.scores=false"]
FEWER = ["intervention.n_prompts=14", "intervention.n_choice_prompts=12"]
FEWER += ["intervention.max_new_tokens=12"]
"""The default's conditions, coefficients and controls on fewer prompts, with shorter answers."""
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations and generations that all runs share."""
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose(["tracker=none", "device=cpu", f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder, objects=OBJECTS)


@pytest.fixture(scope="module")
def default(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(cache, tmp_path_factory.mktemp("default") / "run", *FEWER)


def main_rows(result: Result) -> pd.DataFrame:
    """Conditions with a sentence, at their chosen coefficients on the test split."""
    summary = result.tables.get("effects_summary")
    if summary is None:
        return pd.DataFrame({"condition": [], "refusal_p_controls_holm": []})
    main = ~summary["role"].isin(["control", "baseline"]) & summary["chosen"]
    return summary[main & summary["refusal_p_controls_holm"].notna()]


def claims(result: Result) -> list[str]:
    """Conditions that the run reports an effect of."""
    rows = main_rows(result)
    return rows.loc[rows["refusal_p_controls_holm"] <= ALPHA, "condition"].tolist()


def test_the_default_run_claims_the_effect_of_the_latents_for_unknown(default: Result) -> None:
    assert claims(default) == ["unknown_group"]
    row = main_rows(default).set_index("condition").loc["unknown_group"]
    assert row["refusal_change_ci_low"] > 0.5
    assert default.path is not None
    sentences = headline(default.path).splitlines()
    assert any("'unknown'" in s and "rank p = 0.01" in s for s in sentences)
    assert any("'known'" in s and "not distinguishable from its controls" in s for s in sentences)


def test_its_p_is_the_largest_rank_p_over_the_kinds_that_are_achieved(default: Result) -> None:
    """Recomputed from the rows of single prompts, by counting."""
    row = main_rows(default).set_index("condition").loc["unknown_group"]
    controls = default.tables["controls"]
    own_controls = controls[
        (controls["of"] == "unknown_group") & (controls["coefficient"] == row["coefficient"])
    ]
    effects = default.tables["effects"]
    effects = effects[effects["split"] == "test"].astype({"refusal": float})
    at = effects[effects["coefficient"] == row["coefficient"]]
    rates = at.groupby("condition")["refusal"].mean()
    p_values = {}
    for kind, part in own_controls[own_controls["matched"]].groupby("control_kind"):
        if len(part) < 19:
            continue
        values = np.array([rates["unknown_group"], *rates[part["condition"].tolist()]])
        distance = np.abs(values - np.median(values))
        p_values[kind] = (distance >= distance[0] - 1e-12).sum() / len(values)
    assert p_values, "no kind of control is achieved"
    assert row["refusal_p_controls"] == pytest.approx(max(p_values.values()))
    assert row["refusal_p_controls_holm"] >= row["refusal_p_controls"]


def test_achieved_controls_are_as_near_as_the_calipers_say(default: Result) -> None:
    controls = default.tables["controls"]
    matched = controls[controls["matched"]]
    frequency = matched.loc[matched["control_kind"] == "frequency", "frequency_ratio"]
    assert len(frequency) == 0 or frequency.between(0.5, 2).all()
    kl = matched.loc[matched["control_kind"].isin(["disruption", "random_kl"]), "kl_ratio"]
    assert len(kl) >= 19
    assert kl.between(1 / 1.1 - 1e-6, 1.1 + 1e-6).all()
    norm = controls.loc[controls["control_kind"] == "random_norm", "norm_ratio"]
    assert np.allclose(norm, 1, rtol=1e-3)


def test_the_negative_control_model_claims_nothing(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "run", "model=tiny_control", *FEWER)
    assert claims(result) == []


def labels_permuted(file: Path, seed: int) -> None:
    """The default data set with the labels of entities permuted within type and split."""
    cfg = saexp.compose(["dataset=entities"])
    examples = registry.build("dataset", cfg.dataset).examples
    rows = pd.DataFrame(
        {
            "id": [e.id for e in examples],
            "text": [e.text for e in examples],
            "prompt": [e.prompt for e in examples],
            "answer": [list(e.answers) for e in examples],
            "entity": [e.entity for e in examples],
            "entity_type": [e.entity_type for e in examples],
            "split": [e.split for e in examples],
            "group": [e.group for e in examples],
        }
    )
    rng = np.random.default_rng(seed)
    labels = rows.groupby(["entity_type", "split"])["group"]
    rows["group"] = labels.transform(lambda g: g.to_numpy()[rng.permutation(len(g))])
    lines = [json.dumps(record, ensure_ascii=False) for record in rows.to_dict("records")]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_placebo_labels_give_no_claim(cache: Path, tmp_path: Path) -> None:
    """Each of the seeded permutations finds anything with probability at most 0.05."""
    selects = []
    for seed in range(3):
        file = tmp_path / f"placebo_{seed}.jsonl"
        labels_permuted(file, seed)
        words = ["dataset=jsonl", f"dataset.path={file}", *QUICK]
        result = run(cache, tmp_path / f"run_{seed}", *words)
        assert claims(result) == []
        selects.append(result.metrics["contrast/n_significant"] != 0)
    # P(2 or more of 3) is 0.007 at the nominal rate.
    assert sum(selects) <= 1


def test_placebo_latents_pass_no_more_often_than_the_nominal_rate(
    cache: Path, tmp_path: Path, default: Result
) -> None:
    """Active latents that the contrast did not select, drawn by seed, each in a run of its own."""
    table = default.tables["latents"]
    drawn_from = table[~table["selected"] & (table["freq_known"] + table["freq_unknown"] > 0)]
    latents = np.random.default_rng(18).choice(drawn_from["latent"].to_numpy(), 3, replace=False)
    tested = passed = 0
    for latent in latents.tolist():
        words = [f"intervention.latents=[{latent}]", *QUICK]
        rows = main_rows(run(cache, tmp_path / f"run_{latent}", *words))
        tested += len(rows) > 0
        passed += bool((rows["refusal_p_controls_holm"] <= ALPHA).any())
    assert tested == 3
    # P(2 or more of 3) is 0.007 at the nominal rate.
    assert passed <= 1
