"""task=evaluate on the shipped model: what it says, that sharing changes nothing, its errors."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp.context import ObjectCache
from saexp.errors import ConfigError, DataError, ModelError, SAEError, SaexpError
from saexp.tasks import evaluate as module

N_TEXTS = 40
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""
WORDS = ["task=evaluate", "tracker=none", "device=cpu"]
WORDS += ["task.n_bootstrap=50", f"task.n_texts={N_TEXTS}"]


def evaluated(folder: Path, *words: str):
    cfg = saexp.compose([*WORDS, f"cache_dir={folder}/cache", *words])
    return saexp.run(cfg, folder / "run", objects=OBJECTS)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("one"), "layer=2")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    words = ("layer=[1,2]", "task.widths=[256,512]")
    return evaluated(tmp_path_factory.mktemp("many"), *words)


def test_the_numbers_of_the_shipped_sae_are_good(one):
    m = one.metrics
    for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_loss_score", "kl_score"):
        low, high = m[f"reconstruction/{name}_ci_low"], m[f"reconstruction/{name}_ci_high"]
        assert low <= m[f"reconstruction/{name}"] <= high
    assert m["reconstruction/ce_clean"] < m["reconstruction/ce_sae"] < m["reconstruction/ce_mean"]
    assert m["reconstruction/ce_loss_score"] > 0.9
    assert m["reconstruction/kl_score"] > 0.9
    assert m["reconstruction/explained_variance"] > 0.8
    assert 0 < m["sparsity/l0"] < 64
    assert m["evaluation/n_texts"] == N_TEXTS
    assert m["sparsity/n_positions"] == m["evaluation/n_compared"]
    # Every token but a text's last has a next one.
    assert m["evaluation/n_scored"] == m["evaluation/n_compared"] - N_TEXTS
    assert m["collection/tokens_forwarded"] == m["evaluation/n_compared"] + N_TEXTS


def test_the_files_say_what_was_measured(one):
    table = pd.read_parquet(one.path / "evaluation.parquet")
    assert len(table) == 1
    assert table["ce_sae"].iloc[0] == one.metrics["reconstruction/ce_sae"]
    l0 = pd.read_parquet(one.path / "l0_histogram.parquet")
    assert np.average(l0["n_active"], weights=l0["n_positions"]) == pytest.approx(
        one.metrics["sparsity/l0"]
    )
    densities = pd.read_parquet(one.path / "densities.parquet")
    assert len(densities) == 256
    assert (densities["n_active"] == 0).mean() == one.metrics["sparsity/dead_fraction"]
    texts = pd.read_parquet(one.path / "texts.parquet")
    assert texts["ce_sae"].sum() / texts["n_scored"].sum() == pytest.approx(
        one.metrics["reconstruction/ce_sae"]
    )
    about = json.loads((one.path / "provenance.json").read_text("utf-8"))
    assert about["where"]["spliced"].startswith("all but special tokens")
    page = (one.path / "report.html").read_text("utf-8")
    assert about["finding"][1].split(",")[0] in page
    assert "all but special tokens" in page
    assert set(one.figures) == {"losses", "l0", "density"}


def test_several_saes_share_one_pass_and_say_the_same(one, many):
    assert set(many.tables["evaluation"]["sae"]) == {
        f"layer_{n}_width_{w}" for n in (1, 2) for w in (256, 512)
    }
    assert many.metrics["collection/tokens_forwarded"] == one.metrics["collection/tokens_forwarded"]
    for name in ("reconstruction/ce_sae", "reconstruction/kl_score", "sparsity/l0"):
        for ending in ("", "_ci_low", "_ci_high"):
            alone = one.metrics[name + ending]
            assert many.metrics[f"{name}{ending}_layer_2_width_256"] == pytest.approx(
                alone, rel=1e-5
            )
    assert many.metrics["reconstruction/ce_clean"] == one.metrics["reconstruction/ce_clean"]
    assert set(many.figures) == {"losses", "layers", "l0", "density"}
    assert "layer 2, width 512" in (many.path / "report.html").read_text("utf-8")


def test_what_was_finished_is_kept_when_the_rest_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", {"cpu": 1})
    with pytest.raises(SAEError):
        evaluated(tmp_path, "layer=[2]", "task.widths=[256,999]")
    table = pd.read_parquet(tmp_path / "run" / "evaluation.parquet")
    assert list(table["sae"]) == ["width_256"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert metrics["reconstruction/ce_sae_width_256"] > 0


def test_groups_of_one_say_the_same_as_one_group(many, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", {"cpu": 1})
    again = evaluated(tmp_path, "layer=[1,2]", "task.widths=[256,512]")
    ours, theirs = (
        {k: v for k, v in r.metrics.items() if not k.endswith(("seconds", "tokens_forwarded"))}
        for r in (again, many)
    )
    # What has no spread has no interval.
    none = {k for k, v in ours.items() if v is None}
    assert none == {k for k, v in theirs.items() if v is None}
    assert all("_ci_" in name for name in none)
    numbers = ({k: v for k, v in m.items() if k not in none} for m in (ours, theirs))
    assert next(numbers) == pytest.approx(next(numbers), rel=1e-5, abs=1e-7)
    assert (
        again.metrics["collection/tokens_forwarded"]
        == 4 * many.metrics["collection/tokens_forwarded"]
    )


@pytest.mark.parametrize(
    "words",
    [
        ["dataset=ioi", "dataset.n_examples=9", "task.splice_special=true"],
        ["sae=random", "width=64"],
        ["'dataset.text=My neighbour looked at a narrow lane.'"],
        ["model=tiny_control", "task.n_texts=20", "task.batch_tokens=64"],
    ],
    ids=lambda words: words[0],
)
def test_any_texts_any_sae(tmp_path, words):
    result = evaluated(tmp_path, "layer=1", *[w.strip("'") for w in words])
    assert result.metrics["reconstruction/ce_sae"] is not None
    assert (result.path / "report.html").is_file()
    if words[0] == "sae=random":
        assert result.metrics["reconstruction/ce_loss_score"] < 0.9
        assert any("explains only" in note for note in result.notes)
    if "dataset.text" in words[0]:
        assert result.metrics["reconstruction/ce_sae_ci_low"] is None
        assert "1 text alone, so no number has an interval; it takes 10" in result.notes


def test_texts_are_counted_once_cut_and_skipped_with_a_reason(tmp_path):
    file = tmp_path / "texts.txt"
    long = " ".join(["The quiet clerk looked at the deep well."] * 9)
    file.write_text(f"A clerk sang.\nA clerk sang.\n{long}\na\n", encoding="utf-8")
    result = evaluated(tmp_path, "layer=1", f"dataset.path={file}", "dataset.max_length=20")
    assert result.metrics["evaluation/n_texts"] == 2
    assert result.metrics["collection/n_skipped"] == 1
    assert {"1 repeated texts are counted once", "1 texts were cut at 20 tokens"} <= {*result.notes}
    assert "too short" in result.tables["skips"]["reason"].iloc[0]


def test_the_study_composes():
    cfg = saexp.compose(["experiment=sae_quality"])
    assert (cfg.task.name, cfg.dataset.name, cfg.layer) == ("evaluate", "text", [0, 1, 2, 3, 4])
    words = ["model=gpt2", "sae=gpt2_jb", "layer=8", "task.prepend_bos=true"]
    cfg = saexp.compose(["experiment=sae_quality", *words, "task.widths=null"])
    assert cfg.task.prepend_bos
    assert cfg.layer == 8


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["+task.n_text=3"], ConfigError, "did you mean task.n_texts"),
        (["task.n_texts=0"], ConfigError, "not a whole number of at least 1"),
        (["task.splice_special=maybe"], ConfigError, "is not true or false"),
        (["task.widths=[16q]"], ConfigError, "task.widths=16q is not an SAE width"),
        (["task.widths=[999]"], SAEError, "has no width=999"),
        (["layer=[1,9]"], ModelError, "tiny has layers 0-4; try layer=4"),
        (["dataset=jsonl", "dataset.path=none.jsonl"], SaexpError, "none.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, words, error, part):
    with pytest.raises(error) as caught:
        evaluated(tmp_path, *words)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_without_a_prediction_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match="has a token and a next token to predict"):
        evaluated(tmp_path, f"dataset.path={tmp_path}/a.txt")
