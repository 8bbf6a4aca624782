"""The activation store's key: what changes the stored values changes it, and nothing else does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saexp.activations import store_key
from saexp.activations.collector import ingredients
from saexp.config import ModelConfig, PositionsConfig
from saexp.data import Example
from saexp.data.positions import All, resolve_positions
from saexp.data.tokenization import tokenize
from saexp.models.loading import LanguageModel
from tests.random_models import saved_lm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_lm("llama", tmp_path / "model")
    return tmp_path / "model"


def key(
    folder: Path,
    texts: tuple[str, ...] = ("ab cd", "ef gh"),
    keep: slice = slice(None),
    max_length: int = 20,
    dtype: torch.dtype = torch.float32,
    computed: str = "float32",
    **options: Any,
) -> str:
    model = LanguageModel(ModelConfig(name=str(folder), device="cpu", dtype=computed, **options))
    examples = [Example(id=str(i), text=t) for i, t in enumerate(texts)]
    tokens = tokenize(texts, model.tokenizer, max_length)
    placement = resolve_positions(
        examples, tokens, All(PositionsConfig(name="all")), model.tokenizer, 0
    )
    placement = placement.take(np.arange(placement.n_rows)[keep])
    return store_key(ingredients(model, placement, max_length, dtype))


def weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(file).items()}, file, {"format": "pt"})


def nothing(_: Path) -> None:
    pass


CHANGES: list[tuple[str, Callable[[Path], None], dict[str, Any], bool]] = [
    ("weights", weights, {}, True),
    ("a text of as many tokens", nothing, {"texts": ("ab cd", "ef gx")}, True),
    ("order of texts", nothing, {"texts": ("ef gh", "ab cd")}, True),
    ("positions", nothing, {"keep": slice(1, None)}, True),
    ("longest text", nothing, {"max_length": 21}, True),
    ("dtype stored", nothing, {"dtype": torch.bfloat16}, True),
    ("dtype computed", nothing, {"computed": "bfloat16"}, True),
    ("path of the blocks", nothing, {"blocks": "model.layers"}, True),
    ("chat", nothing, {"chat": True}, False),
    ("default layer", nothing, {"default_layer": 2}, False),
]


@pytest.mark.parametrize(("what", "do", "options", "matters"), CHANGES, ids=[c[0] for c in CHANGES])
def test_only_what_changes_the_values_is_in_the_key(
    folder: Path, what: str, do: Callable[[Path], None], options: dict[str, Any], matters: bool
) -> None:
    before = key(folder)
    assert before == key(folder)
    do(folder)
    assert (key(folder, **options) != before) == matters, what
