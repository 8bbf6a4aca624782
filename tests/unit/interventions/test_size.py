"""intervention.size: fewer prompts and controls for large models on a CPU."""

from types import SimpleNamespace

import pytest
import torch

import saexp
from saexp.config.groups import SMALL
from saexp.errors import ConfigError
from saexp.pipeline.intervene import _at_size
from saexp.registry import build


@pytest.mark.parametrize(("size", "is_small"), [("auto", False), ("full", False), ("small", True)])
def test_a_small_test_replaces_defaults_only(size: str, is_small: bool) -> None:
    """The tiny model is below the limit of auto."""
    words = [f"intervention.size={size}", "intervention.n_prompts=70", "intervention.n_neutral=3"]
    cfg = saexp.compose(words)
    model = build("model", cfg.model)
    sized, notes = _at_size(cfg, model)
    edit = sized.intervention
    assert (edit.n_prompts, edit.n_neutral) == (70, 3)
    assert edit.n_controls == (79 if is_small else 99)
    assert edit.control_kinds == (SMALL if is_small else vars(cfg.intervention))["control_kinds"]
    assert bool(notes) == is_small
    if is_small:
        assert "n_controls 79 (not 99)" in notes[0]
        assert "n_prompts" not in notes[0].partition("with")[2]


@pytest.mark.parametrize("prefix", ["", "++"])
def test_a_typed_number_is_kept_although_it_is_the_default(prefix: str) -> None:
    words = ["intervention.size=small", f"{prefix}intervention.n_prompts=100"]
    words.append("intervention.control_kinds=[frequency,disruption,random_norm,random_kl]")
    edit, changed = saexp.compose(words).intervention.smaller()
    assert edit.n_prompts == 100
    assert len(edit.control_kinds) == 4
    assert edit.n_controls == 79
    assert set(changed) == set(SMALL) - {"n_prompts", "control_kinds"}
    with pytest.raises(ConfigError, match="intervention.keep"):
        saexp.compose(["intervention.keep=[outcomes]"])


def test_a_test_of_a_large_model_on_a_cpu_is_small_by_default() -> None:
    cfg = saexp.compose(["device=cpu"])
    large = SimpleNamespace(device=torch.device("cpu"), n_layers=30, d_model=576)
    sized, notes = _at_size(cfg, large)  # pyright: ignore[reportArgumentType]
    assert sized.intervention.n_prompts == 30
    assert "a model of 119 million parameters is slow on a CPU" in notes[0]
    large.device = torch.device("cuda")
    assert _at_size(cfg, large) == (cfg, [])  # pyright: ignore[reportArgumentType]
