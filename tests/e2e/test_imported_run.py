"""A run on activations that another tool wrote, without the model's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import saexp
from saexp.errors import ConfigError, DataError
from saexp.models.resolution import ASSETS
from tests.shipped_texts import FEW_NEUTRAL

LAYER = 2
FIXED = [
    f"layer={LAYER}",
    "tracker=none",
    "intervention=none",
    "dataset.n_examples=20",
    "analyzer.n_bootstrap=0",
    FEW_NEUTRAL,
]
SAE = ["sae=local", f"sae.path={ASSETS / 'tiny' / 'sae' / f'layer_{LAYER}' / 'width_256'}"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that computes its activations."""
    folder = tmp_path_factory.mktemp("hf")
    words = [*FIXED, f"cache_dir={folder / 'cache'}"]
    return saexp.run(saexp.compose(words), folder / "run")


@pytest.fixture(scope="module")
def store(expected: Any) -> Any:
    """Its activations."""
    about = json.loads((expected.path / "provenance.json").read_text())
    return saexp.open_store(about["store"]["path"])


@pytest.fixture(scope="module")
def files(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`acts.dat` with one position per text, as the entity-recognition paper's code writes it."""
    folder = tmp_path_factory.mktemp("files")
    acts = np.asarray(store.acts(LAYER, "resid_post"), dtype=np.float32)
    acts[:, None, None].tofile(folder / "acts.dat")
    return folder


@pytest.fixture(scope="module")
def words(store: Any, files: Path) -> list[str]:
    """The imported run's settings; the file holds block inputs, as the paper's does."""
    shape = [store.n_rows, 1, 1, 128]
    return [
        *FIXED,
        "collector=imported",
        f"collector.path={files}",
        f"collector.shape={shape}".replace(" ", ""),
        f"collector.layers=[{LAYER + 1}]",
        "collector.stream=resid_pre",
    ]


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's config and tokenizer alone."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(ASSETS / "tiny" / "model", folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def same_contrast(actual: Any, expected: Any, columns: list[str]) -> None:
    tables = [r.tables["latents"].set_index("latent").sort_index() for r in (actual, expected)]
    pd.testing.assert_frame_equal(*(t[columns] for t in tables))


def test_imported_activations_give_the_contrast_of_computed_ones(
    words: list[str], expected: Any, tmp_path: Path
) -> None:
    result = saexp.run(saexp.compose([*words, f"cache_dir={tmp_path / 'cache'}"]), tmp_path / "run")
    columns = expected.tables["latents"].columns.drop("latent")
    same_contrast(result, expected, list(columns))
    assert any("those of neutral text are computed with tiny" in note for note in result.notes)


def test_without_weights_the_contrast_is_the_same_but_for_the_background(
    words: list[str], expected: Any, without_weights: Path, tmp_path: Path
) -> None:
    data = ASSETS / "tiny" / "entities.jsonl"
    cfg = saexp.compose(
        [
            *words,
            f"model.name={without_weights}",
            *SAE,
            f"dataset.path={data}",
            "sae.check=off",
            f"cache_dir={tmp_path / 'cache'}",
        ]
    )
    result = saexp.run(cfg, tmp_path / "run")
    same_contrast(result, expected, ["separation", "auroc", "p_value", "auroc_test"])
    assert any("there are no activations of neutral text" in note for note in result.notes)
    assert any("need the model's weights" in note for note in result.notes)
    assert result.tables["latents"]["background_freq"].isna().all()
    assert result.metrics["collection/tokens_forwarded"] == 0
    about = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert about["model"]["fingerprint"] is None
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    "setting", ["intervention=steer", "analyzer.attribution=true", "analyzer=capability"]
)
def test_what_needs_weights_is_refused_before_anything_is_read(
    setting: str, words: list[str], without_weights: Path, tmp_path: Path
) -> None:
    cfg = saexp.compose(
        [
            *words,
            setting,
            f"model.name={without_weights}",
            *SAE,
            f"dataset.path={ASSETS / 'tiny' / 'entities.jsonl'}",
            f"cache_dir={tmp_path / 'cache'}",
        ]
    )
    with pytest.raises(ConfigError, match=f"^{setting} runs the model, but the weights of"):
        saexp.run(cfg, tmp_path / "run")


def test_collecting_imported_activations_says_nothing_about_neutral_text(
    words: list[str], tmp_path: Path
) -> None:
    settings = [w for w in words if not w.startswith(("intervention", "analyzer"))]
    cfg = saexp.compose([*settings, "task=collect", f"cache_dir={tmp_path / 'cache'}"])
    result = saexp.run(cfg, tmp_path / "run")
    assert result.metrics["collection/tokens_forwarded"] == 0
    assert not any("neutral text" in note for note in result.notes)


def test_another_number_of_texts_is_one_clear_error(words: list[str], tmp_path: Path) -> None:
    cfg = saexp.compose([*words, "dataset.n_examples=10", f"cache_dir={tmp_path / 'cache'}"])
    with pytest.raises(DataError, match="and no token ids, but the data set has"):
        saexp.run(cfg, tmp_path / "run")
