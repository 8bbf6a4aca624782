"""The contrast of two lists of strings is that of a run on a file with the same texts."""

import json
from pathlib import Path

import pandas as pd
import pytest

import saexp
from saexp.api.model import InteractiveModel
from saexp.errors import ConfigError, SAEError
from saexp.models.loading import ASSETS
from tests.random_models import random_hf, tokenizer

_FILE = ASSETS / "tiny" / "entities.jsonl"
_ENTITIES = [json.loads(line) for line in _FILE.read_text("utf-8").splitlines()]


def texts_of(group: str, n: int = 40) -> list[str]:
    return [e["text"] for e in _ENTITIES if e["group"] == group][:n]


@pytest.fixture(scope="module")
def groups() -> tuple[list[str], list[str]]:
    one, two = sorted({e["group"] for e in _ENTITIES})[:2]
    return texts_of(one), texts_of(two)


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return saexp.load_model("tiny", device="cpu")


FEWER = ["analyzer.n_background=400", "analyzer.scores=false"]


def test_contrast_equals_a_run_on_a_file_of_the_same_texts(
    tmp_path: Path, model: InteractiveModel, groups: tuple[list[str], list[str]]
) -> None:
    sae = saexp.load_sae("tiny", layer=2, device="cpu")
    with saexp.steer(model, sae, 3, 5.0), saexp.edit(model, {1: lambda x: 0 * x}):
        result = saexp.contrast(
            *groups,
            model=model,
            sae=sae,
            folder=tmp_path / "run",
            overrides=[f"cache_dir={tmp_path}/cache", *FEWER],
        )
    lines = [
        json.dumps({"text": text, "group": name, "id": f"{name}_{i}"})
        for name, texts in zip("ab", groups, strict=True)
        for i, text in enumerate(texts)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    cfg = saexp.compose(
        [
            "layer=2",
            "device=cpu",
            "dataset=jsonl",
            f"dataset.path={tmp_path}/texts.jsonl",
            "dataset.groups=[a,b]",
            "positions=last",
            "intervention=none",
            "tracker=none",
            f"cache_dir={tmp_path}/other",
            *FEWER,
        ]
    )
    expected = saexp.run(cfg, tmp_path / "expected")
    pd.testing.assert_frame_equal(result.tables["latents"], expected.tables["latents"])
    timed = "collection/seconds"
    assert {k: v for k, v in result.metrics.items() if k != timed} == {
        k: v for k, v in expected.metrics.items() if k != timed
    }
    assert result.notes == expected.notes
    assert isinstance(result, saexp.Result)
    assert result.path == tmp_path / "run"
    assert (tmp_path / "run" / "report.html").is_file()
    assert model.prepend_bos is None


def test_contrast_works_for_objects_in_memory(
    tmp_path: Path, groups: tuple[list[str], list[str]]
) -> None:
    from tests.unit.interventions.test_engine import made_sae

    model = saexp.load_model(random_hf("llama", max_position_embeddings=512), tokenizer=tokenizer())
    result = saexp.contrast(
        *groups,
        model=model,
        sae=made_sae(),
        positions=[-1],
        names=("known", "unknown"),
        overrides=[f"cache_dir={tmp_path}/cache", *FEWER],
    )
    assert {"freq_known", "freq_unknown"} <= set(result.tables["latents"])
    assert result.path is not None


def test_errors_of_contrast_are_one_line(model: InteractiveModel) -> None:
    sae = saexp.load_sae("tiny", layer=2, device="cpu")
    with pytest.raises(ConfigError, match="lists of strings"):
        saexp.contrast("one text", ["another"], model=model, sae=sae)
    with pytest.raises(ConfigError, match="different names"):
        saexp.contrast(["a"], ["b"], model=model, sae=sae, names=("x", "x"))
    other = saexp.load_model(random_hf("llama"), tokenizer=tokenizer())
    with pytest.raises(SAEError, match="d_model=32"):
        saexp.contrast(["a"], ["b"], model=other, sae=sae)
