"""The contrast of two lists of strings: objects in memory, and errors in one line."""

from pathlib import Path

import pytest

import saexp
from saexp.api.model import InteractiveModel
from saexp.errors import ConfigError, SAEError
from tests.random_models import random_hf, tokenizer
from tests.shipped_texts import FEW_NEUTRAL, GROUPS, texts_of


@pytest.fixture(scope="module")
def groups() -> tuple[list[str], list[str]]:
    known, unknown = (texts_of(group, 16) for group in GROUPS)
    return known, unknown


@pytest.fixture(scope="module")
def model() -> InteractiveModel:
    return saexp.load_model("tiny", device="cpu")


FEWER = ["analyzer.n_background=100", "analyzer.scores=false", FEW_NEUTRAL]


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
