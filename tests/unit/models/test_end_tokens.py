"""Tokens that end a generation are known without reading weights, and the same with them."""

import json
from pathlib import Path

from saexp.config import ModelConfig
from saexp.models.loading import LanguageModel
from tests.random_models import random_hf, save


def test_end_tokens_need_no_weights_and_come_from_all_three_places(tmp_path: Path) -> None:
    cfg = save(random_hf("llama"), tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))
    settings["eos_token_id"] = [2, 7]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    unread, read = LanguageModel(cfg), LanguageModel(cfg)
    assert unread.eos_ids == (2, 7)
    assert not unread.loaded
    assert read.hf is not None
    assert read.eos_ids == (2, 7)


def test_without_a_generation_config_the_others_do(tmp_path: Path) -> None:
    cfg = save(random_hf("llama"), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = LanguageModel(ModelConfig(name=cfg.name, device="cpu"))
    assert model.eos_ids == (2,)
    assert not model.loaded
