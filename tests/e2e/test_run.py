"""The whole main job on the shipped model: its files, its finding, its second run.

And what the causal test claims: nothing where there is nothing. A claim is a sentence of it: a main
condition at its chosen coefficient whose Holm corrected rank p against its controls is at most 0.05
on the test split.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp import registry
from saexp.context import ObjectCache
from saexp.reports.analysis import headline
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL

ALPHA = 0.05
OVERLAY = ["intervention.n_prompts=14", "analyzer.n_bootstrap=100", "coefficient=[0,0.6,0.9]"]
OVERLAY += ["intervention.n_controls=49", "intervention.n_choice_prompts=12"]
OVERLAY += ["intervention.n_neutral=4", "intervention.max_new_tokens=12"]
"""The default's conditions and kinds of controls on fewer prompts, with shorter answers."""
QUICK = ["intervention.n_prompts=14", "intervention.n_controls=19", "coefficient=[0.6,0.9]"]
QUICK += ["intervention.n_choice_prompts=10", "intervention.n_curve_controls=4"]
QUICK += ["intervention.n_neutral=2", "intervention.max_new_tokens=12"]
QUICK += ["analyzer.n_bootstrap=0", "analyzer.n_background=1000", "analyzer.scores=false"]
FILES = ("metrics.json", "latents.parquet", "rows.parquet", "effects.parquet")
FILES += ("report.html", "provenance.json")
OBJECTS = ObjectCache()
"""Shared by some runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    cfg = saexp.compose(["tracker=jsonl", f"cache_dir={folder}/cache", *OVERLAY])
    return saexp.run(cfg, folder / "first", command="a test", objects=OBJECTS)


def run(cache: Path, folder: Path, *words: str) -> Result:
    cfg = saexp.compose(["tracker=none", "device=cpu", f"cache_dir={cache}", *words])
    return saexp.run(cfg, folder, objects=OBJECTS)


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    """Activations and generations that all runs share."""
    return folder / "cache"


def test_files_of_the_contract(result: Result) -> None:
    assert result.path is not None
    for name in FILES:
        assert (result.path / name).stat().st_size > 0, name


def test_columns_of_the_contract(result: Result) -> None:
    assert result.path is not None
    latents = pd.read_parquet(result.path / "latents.parquet")
    columns = ["latent", "layer", "separation", "auroc", "p_value", "q_value", "ci_low", "ci_high"]
    columns += ["background_freq", "selected"]
    for group in ("known", "unknown"):
        columns += [f"{c}_{group}" for c in ("n", "freq", "mean")]
        columns += [f"{c}_{group}_test" for c in ("n", "freq", "mean")]
    columns += [f"{c}_test" for c in ("separation", "auroc", "p_value", "q_value", "ci_low")]
    assert set(columns) <= set(latents.columns)
    rows = pd.read_parquet(result.path / "rows.parquet")
    columns = ["row", "example_id", "group", "split", "entity_type", "text", "token_index"]
    assert {*columns, "token_id", "token"} <= set(rows.columns)
    effects = pd.read_parquet(result.path / "effects.parquet")
    assert {"condition", "latent", "coefficient", "refusal", "generated_text"} <= set(effects)


def test_metrics_are_flat_numbers_with_the_contracts_names(result: Result) -> None:
    assert result.path is not None
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert all(v is None or isinstance(v, int | float) for v in metrics.values())
    names = [f"collection/{n}" for n in ("n_rows", "n_skipped", "tokens_forwarded", "seconds")]
    names += [f"sparsity/{n}" for n in ("l0", "mean_active", "max_active", "dead_fraction")]
    names += [
        f"reconstruction/{n}"
        for n in ("explained_variance", "explained_variance_legacy", "mse", "cosine", "l2_ratio")
    ]
    for group in ("known", "unknown"):
        names += [f"contrast/best_{n}_{group}" for n in ("separation", "auroc")]
        names += [f"contrast/best_{n}_{group}_test" for n in ("separation", "auroc")]
    assert set(names) | {"contrast/n_significant"} <= set(metrics)
    assert metrics["collection/n_rows"] == 960
    assert metrics["collection/tokens_forwarded"] > 0
    for name, value in metrics.items():
        assert value is not None or any(name in note for note in result.notes), name


def test_rows_hold_the_tokens_at_their_positions(result: Result) -> None:
    model = saexp.build("model", saexp.compose([]).model)
    for row in result.tables["rows"].sample(40, random_state=0).to_dict("records"):
        ids = model.tokenizer(row["text"])["input_ids"]
        assert ids[row["token_index"]] == row["token_id"]
        assert row["text"].endswith(model.tokenizer.decode([row["token_id"]]))


def test_the_finding_holds_on_held_out_entities(result: Result) -> None:
    m = result.metrics
    for group in ("known", "unknown"):
        assert (m[f"contrast/best_auroc_{group}_test"] or 0) >= 0.95
        assert (m[f"contrast/best_min_auroc_{group}_test"] or 0) >= 0.9
    summary = result.tables["effects_summary"]
    at = summary[summary["chosen"]]
    steered = at[at["condition"] == "unknown_group"].iloc[0]
    controls = at[(at["of"] == "unknown_group") & (at["role"] == "control")]
    assert steered["refusal_change"] >= 0.7
    assert steered["refusal_p_controls_holm"] <= 0.05
    assert controls["refusal"].max() < steered["refusal"]


def test_coefficient_zero_is_the_baseline_text_by_text(result: Result) -> None:
    effects = result.tables["effects"]
    base = effects[effects["role"] == "baseline"].set_index("example_id")["generated_text"]
    zero = effects[(effects["role"] != "baseline") & (effects["coefficient"] == 0)]
    assert len(zero) > 100
    assert (zero["generated_text"] == base.loc[zero["example_id"]].to_numpy()).all()


@pytest.mark.usefixtures("result")
def test_moving_latents_to_the_known_side_ends_refusals(folder: Path) -> None:
    cfg = saexp.compose(
        ["tracker=none", f"cache_dir={folder}/cache", "intervention=clamp", "coefficient=[0,1.5]"]
        + ["intervention.n_prompts=14", "analyzer.n_bootstrap=0", "intervention.n_controls=2"]
        + ["intervention.n_choice_prompts=2", "intervention.max_new_tokens=12"]
        + ["intervention.n_neutral=2", "intervention.top_k=1"]
    )
    summary = saexp.run(cfg, folder / "clamp", objects=OBJECTS).tables["effects_summary"]
    at = summary[(summary["coefficient"] == 1.5) & (summary["split"] == "test")]
    moved = at[at["condition"] == "known_group"].iloc[0]
    assert moved["refusal_change"] <= -0.5
    assert at.loc[at["of"] == "known_group", "refusal_change"].drop(moved.name).min() > -0.1


def test_the_second_run_forwards_and_generates_nothing_and_finds_the_same(
    folder: Path, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model generated")

    monkeypatch.setattr("saexp.interventions.generation._generate_batch", never)
    cfg = saexp.compose(["tracker=none", f"cache_dir={folder}/cache", *OVERLAY])
    again = saexp.run(cfg, folder / "second")
    assert again.metrics["collection/tokens_forwarded"] == 0
    pd.testing.assert_frame_equal(again.tables["effects"], result.tables["effects"])
    pd.testing.assert_frame_equal(again.tables["latents"], result.tables["latents"])


def test_the_report_needs_no_other_file(result: Result) -> None:
    assert result.path is not None
    page = (result.path / "report.html").read_text("utf-8")
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", body)
    assert "held-out entities" in body
    assert "matched controls" in body
    assert page.count("Plotly.newPlot(place") == 1
    for name in result.figures:
        assert f'id="fig-{name}"' in body


@pytest.mark.usefixtures("result")
def test_a_finished_run_is_reused_on_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it ran again")

    cfg = saexp.compose(["tracker=jsonl", f"cache_dir={folder}/cache", *OVERLAY, "resume=true"])
    monkeypatch.setattr("saexp.pipeline.collect_examples", never)
    again = saexp.run(cfg, folder / "resumed")
    saved = json.loads((folder / "resumed/metrics.json").read_text())
    assert again.metrics == saved
    assert (folder / "resumed/report.html").is_file()
    assert len(again.tables["effects"]) > 1000


def test_nothing_is_steered_where_nothing_is_significant(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = Path(__file__).parents[2] / "saexp/assets/tiny/entities.jsonl"
    rows = [json.loads(x) for x in source.read_text("utf-8").splitlines()][:60]
    for row in rows:
        row["group"] = str(rng.choice(["a", "b"]))
    path = tmp_path / "shuffled.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    cfg = saexp.compose(
        ["tracker=none", f"cache_dir={folder}/cache", "dataset=jsonl", f"dataset.path={path}"]
        + ["analyzer.n_bootstrap=20"]
    )
    result = saexp.run(cfg, tmp_path / "run")
    assert result.metrics["contrast/n_significant"] == 0
    assert any("nothing was steered" in note for note in result.notes)
    assert "No latent for" in (tmp_path / "run/report.html").read_text("utf-8")


def test_real_entities_serve_any_other_model(tmp_path: Path) -> None:
    from tests.random_models import random_hf, save

    save(random_hf("llama"), tmp_path / "model")
    cfg = saexp.compose(
        ["model=hf", f"model.name={tmp_path / 'model'}", "layer=1", "sae=random", "width=128"]
        + ["tracker=none", f"cache_dir={tmp_path}/cache", "analyzer.n_bootstrap=0"]
        + ["dataset.max_length=60", "intervention.n_prompts=2", "intervention.max_new_tokens=2"]
        + ["analyzer.n_background=300", FEW_NEUTRAL, "intervention.n_controls=1"]
        + ["intervention.n_choice_prompts=1", "intervention.n_neutral=1", "intervention.top_k=1"]
    )
    result = saexp.run(cfg, tmp_path / "run")
    rows = result.tables["rows"]
    assert set(rows["group"]) == {"known", "unknown"}
    assert set(rows["entity_type"]) == {"player", "movie", "city", "song"}


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['saexp', '--help']\n"
        "from saexp.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'sae_lens', 'pandas', 'wandb'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in out.stdout
    for word in ("layer ", "width ", "coefficient ", "gemmascope", "entity_last", "tiny_control"):
        assert word in out.stdout
    assert out.stdout.count("python -m saexp") >= 5


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


def test_the_default_run_claims_the_effect_of_the_latents_for_unknown(result: Result) -> None:
    assert claims(result) == ["unknown_group"]
    row = main_rows(result).set_index("condition").loc["unknown_group"]
    assert row["refusal_change_ci_low"] > 0.5
    assert result.path is not None
    sentences = headline(result.path).splitlines()
    assert any("'unknown'" in s and "rank p = 0.02" in s for s in sentences)
    assert any("'known'" in s and "not distinguishable from its controls" in s for s in sentences)


def test_its_p_is_the_largest_rank_p_over_the_kinds_that_are_achieved(result: Result) -> None:
    """Recomputed from the rows of single prompts, by counting."""
    row = main_rows(result).set_index("condition").loc["unknown_group"]
    controls = result.tables["controls"]
    own_controls = controls[
        (controls["of"] == "unknown_group") & (controls["coefficient"] == row["coefficient"])
    ]
    effects = result.tables["effects"]
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


def test_achieved_controls_are_as_near_as_the_calipers_say(result: Result) -> None:
    controls = result.tables["controls"]
    matched = controls[controls["matched"]]
    frequency = matched.loc[matched["control_kind"] == "frequency", "frequency_ratio"]
    assert len(frequency) == 0 or frequency.between(0.5, 2).all()
    kl = matched.loc[matched["control_kind"].isin(["disruption", "random_kl"]), "kl_ratio"]
    assert len(kl) >= 19
    assert kl.between(1 / 1.1 - 1e-6, 1.1 + 1e-6).all()
    norm = controls.loc[controls["control_kind"] == "random_norm", "norm_ratio"]
    assert np.allclose(norm, 1, rtol=1e-3)


def test_the_negative_control_model_claims_nothing(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "run", "model=tiny_control", *OVERLAY)
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
    """The seeded permutation finds anything with probability at most 0.05."""
    file = tmp_path / "placebo.jsonl"
    labels_permuted(file, 0)
    result = run(cache, tmp_path / "run", "dataset=jsonl", f"dataset.path={file}", *QUICK)
    assert result.metrics["contrast/n_significant"] == 0
    assert claims(result) == []


def test_placebo_latents_give_no_claim(cache: Path, tmp_path: Path, result: Result) -> None:
    """Active latents that the contrast did not select, drawn by seed: they are claimed to have an
    effect with probability at most 0.05."""
    table = result.tables["latents"]
    drawn_from = table[~table["selected"] & (table["freq_known"] + table["freq_unknown"] > 0)]
    latents = np.random.default_rng(18).choice(drawn_from["latent"].to_numpy(), 2, replace=False)
    words = [f"intervention.latents=[{','.join(map(str, latents))}]", *QUICK]
    placebo = run(cache, tmp_path, *words)
    assert len(main_rows(placebo))
    assert claims(placebo) == []
