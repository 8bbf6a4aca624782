"""The contrast of two lists of strings is that of a run on a file with the same texts."""

import json
from pathlib import Path

import pandas as pd
import pytest

import saexp
from saexp.api.model import InteractiveModel
from tests.shipped_texts import FEW_NEUTRAL, GROUPS, texts_of


@pytest.fixture(scope="module")
def groups() -> tuple[list[str], list[str]]:
    known, unknown = map(texts_of, GROUPS)
    return known, unknown


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return saexp.load_model("tiny", device="cpu")


FEWER = ["analyzer.n_background=400", "analyzer.scores=false", FEW_NEUTRAL]


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
