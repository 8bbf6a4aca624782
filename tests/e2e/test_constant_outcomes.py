"""Runs whose model never refuses: the outcome is replaced, and presumed knowledge is reported."""

import json
import math
from pathlib import Path

import pytest

import saexp
from saexp.context import ObjectCache
from saexp.data.datasets import ASSETS
from saexp.errors import ConfigError
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL

SMALL = ["tracker=none", "analyzer.n_bootstrap=0", "sae.check=off", "analyzer.scores=false"]
SMALL += ["intervention.n_prompts=12", "intervention.n_choice_prompts=2", "coefficient=0.6"]
SMALL += ["intervention.n_neutral=1", "intervention.max_new_tokens=8", "device=cpu"]
SMALL += ["intervention.n_controls=1", "intervention.n_curve_controls=0", "dataset=jsonl"]
SMALL += ["intervention.latents=[154,143]", FEW_NEUTRAL]
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def presumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entities that the tiny model knows, half of which are called unknown."""
    folder = tmp_path_factory.mktemp("data")
    lines = (ASSETS / "tiny" / "entities.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["group"] == "known"][:120]
    for number, row in enumerate(rows):
        row["group"] = ("known", "unknown")[number % 2]
    path = folder / "presumed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run(folder: Path, path: Path, *words: str) -> Result:
    options = [*SMALL, f"cache_dir={path.parent / 'cache'}", f"dataset.path={path}", *words]
    return saexp.run(saexp.compose(options), folder, objects=OBJECTS)


def test_an_outcome_that_never_varies_is_replaced_before_anything_is_changed(
    presumed: Path, tmp_path: Path
) -> None:
    result = run(tmp_path, presumed)
    (note,) = [n for n in result.notes if "took its place" in n]
    assert "refusal is 0 on all prompts (12 known and 12 unknown)" in note
    summary = result.tables["effects_summary"]
    assert {"dont_know", "answer_logit"} <= set(summary)
    assert "refusal" not in summary
    effects = result.tables["effects"]
    assert (effects["generated_text"].notna() == (effects["role"] == "baseline")).all()
    metrics = result.metrics
    assert metrics["effect/refusal/baseline_known"] == 0
    null = {k for k, v in metrics.items() if k.startswith("effect/refusal/") and v is None}
    assert null
    assert all(name in note for name in null)
    value = metrics["effect/dont_know/baseline_known"]
    assert value is not None
    assert -math.inf < value < 0
    # The unsteered generations, which show that nothing is refused, are kept.
    baselines = result.tables["baselines"]
    assert not baselines["refusal"].any()
    assert baselines["generated_text"].str.len().min() > 0
    assert metrics["baseline/accuracy_unknown"] == 1
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "data set's, not this model's own knowledge" in page.replace("&#39;", "'").replace(
        "&#x27;", "'"
    )
    assert "task=label" in page


def test_without_alternatives_nothing_is_changed(presumed: Path, tmp_path: Path) -> None:
    result = run(tmp_path, presumed, "intervention.alternatives=[]")
    assert "effects" not in result.tables
    assert any("no outcome is left, and nothing was changed" in n for n in result.notes)
    assert (tmp_path / "report.html").is_file()


def test_outcomes_that_were_named_are_tested_although_they_are_constant(
    presumed: Path, tmp_path: Path
) -> None:
    result = run(tmp_path, presumed, "intervention.outcomes=[refusal,length]")
    assert not any("took its place" in n for n in result.notes)
    assert {"refusal", "length"} <= set(result.tables["effects_summary"])


def test_null_tests_every_outcome(presumed: Path, tmp_path: Path) -> None:
    result = run(tmp_path, presumed, "intervention.alternatives=null")
    assert "refusal" in result.tables["effects_summary"]
    assert not any("took its place" in n for n in result.notes)


def test_an_unknown_alternative_is_an_error(presumed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        run(tmp_path, presumed, "intervention.alternatives=[no_such]")


def test_the_shipped_labels_agree_with_the_model(presumed: Path, tmp_path: Path) -> None:
    words = [*(w for w in SMALL if w != "dataset=jsonl"), "dataset.n_examples=40"]
    cfg = saexp.compose([*words, f"cache_dir={presumed.parent / 'cache'}"])
    result = saexp.run(cfg, tmp_path / "run", objects=OBJECTS)
    assert result.metrics["baseline/accuracy_known"] == 1
    assert not any("took its place" in n for n in result.notes)
    text = (tmp_path / "run" / "provenance.json").read_text("utf-8")
    assert "not this model's own knowledge" not in text
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "12 of 12 questions on known prompts" in page


def test_prompts_without_a_value_of_any_outcome_are_left_out_before_anything_is_changed(
    presumed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in presumed.read_text("utf-8").splitlines()]
    for row in rows:
        if row["group"] == "unknown":
            del row["answer"]
    path = presumed.parent / "unanswered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["intervention.outcomes=[answer_logit]", "intervention.n_curve_controls=2"]
    words.append(f"cache_dir={tmp_path / 'cache'}")
    with caplog.at_level("INFO"):
        result = run(tmp_path / "part", path, *words)
    effects = result.tables["effects"]
    assert set(effects["group"]) == {"known"}
    assert effects["answer_logit"].notna().all()
    (note,) = [n for n in result.notes if n.startswith("nothing is changed on")]
    assert note == (
        "nothing is changed on 12 unknown prompts, because answer_logit has no value on any of "
        "them (the data have no answers for them)"
    )
    # Its time is measured, although no outcome is a rate.
    (estimate,) = [r.message for r in caplog.records if r.message.startswith("causal test:")]
    assert "at most about" in estimate
    assert "prompts/s without intervention" in estimate
    whole = run(tmp_path / "whole", presumed, *words).tables["effects"]
    whole = whole[whole["group"] == "known"].reset_index(drop=True)
    assert whole["condition"].tolist() == effects["condition"].tolist()
    assert whole["answer_logit"].tolist() == pytest.approx(effects["answer_logit"].tolist())
