"""Keys of generations.sqlite: whatever changes a result changes its key, and nothing else does."""

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import saexp
from saexp.config import InterventionConfig, ModelConfig, SAEConfig
from saexp.data import Example
from saexp.data.tokenization import tokenize
from saexp.interventions.attention import AttentionTest, _attention
from saexp.interventions.conditions import Condition, PositionedPrompt, Prompts
from saexp.interventions.outcomes import AnswerLogit, AnswerRank, reader_kind
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.interventions.stream_edits import Add, Patch, Row, Sampling, Vector
from saexp.models import Hookpoint
from saexp.models.hooks import attention_to
from saexp.models.loading import LanguageModel
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import sae_identity
from tests.random_models import TEXTS, random_lm, saved_lm

AT = Hookpoint(1, "resid_post")
BASE = Row(
    (1, 2, 3), (Add(AT, Vector(torch.ones(4)), 2.0),), (1,), True, Sampling(1.0, 3), about=(5,)
)
ADD = BASE.ops[0]
ROWS = {
    "token ids": replace(BASE, ids=(1, 2, 4)),
    "positions": replace(BASE, positions=(2,)),
    "generated tokens changed": replace(BASE, generated=False),
    "temperature": replace(BASE, sample=Sampling(0.5, 3)),
    "sample": replace(BASE, sample=Sampling(1.0, 4)),
    "greedy": replace(BASE, sample=None),
    "tokens compared": replace(BASE, about=(6,)),
    "vector": replace(BASE, ops=(replace(ADD, vector=Vector(torch.zeros(4))),)),
    "hookpoint": replace(BASE, ops=(replace(ADD, hookpoint=Hookpoint(2, "resid_post")),)),
    "coefficient": replace(BASE, ops=(replace(ADD, coefficient=2.5),)),
    "operation": replace(BASE, ops=(Patch(AT, Vector(torch.ones(4)), 2.0),)),
    "two operations": replace(BASE, ops=(ADD, ADD)),
}


def key(row: Row, kind: str = "tokens 5", **of: Any) -> bytes:
    empty_cache = ResultCache.__new__(ResultCache)
    empty_cache.prefix = (2, sorted({"model": "a", "eos": (1,), **of}.items()))
    return empty_cache.key(kind, row.key)


@pytest.mark.parametrize("what", ROWS)
def test_every_part_of_a_row_is_in_its_key(what: str) -> None:
    assert key(ROWS[what]) != key(BASE)
    assert key(replace(BASE)) == key(BASE)


def test_what_is_computed_and_of_what_model_is_in_the_key() -> None:
    keys = [key(BASE), key(BASE, "tokens 50"), key(BASE, model="b"), key(BASE, eos=(2,))]
    assert len(set(keys)) == len(keys)


def test_parts_of_a_key_cannot_run_into_one_another(tmp_path: Path) -> None:
    one, other = (ResultCache(tmp_path, {"a": text}) for text in ("x", "x'), ('b', 'y"))
    assert one.key("k", ((1,),)) != other.key("k", ((1,),))
    assert one.key("k(1,)", ((2,),)) != one.key("k", ((1,), (2,)))


def test_a_key_is_the_digest_of_all_its_parts(tmp_path: Path) -> None:
    """Results that earlier versions of this code stored are found again."""
    cache = ResultCache(tmp_path, {"model": "a"})
    whole = repr((cache.prefix, "tokens 5", BASE.key)).encode()
    assert cache.key("tokens 5", BASE.key) == hashlib.sha256(whole).digest()


def change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {n: t + 1 for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def change_end(folder: Path) -> None:
    file = folder / "generation_config.json"
    about = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**about, "eos_token_id": [3, 7]}))


def change_nothing_read(folder: Path) -> None:
    (folder / "README.md").write_text("a page")


MODELS: list[tuple[str, Callable[[Path], None], dict[str, Any], bool]] = [
    ("weights", change_weights, {}, True),
    ("end tokens", change_end, {}, True),
    ("dtype", change_nothing_read, {"dtype": "bfloat16"}, True),
    ("path of the blocks", change_nothing_read, {"blocks": "model.layers"}, True),
    ("chat", change_nothing_read, {"chat": True}, False),
    ("a page beside it", change_nothing_read, {}, False),
]


@pytest.mark.parametrize(("what", "do", "options", "matters"), MODELS, ids=[m[0] for m in MODELS])
def test_all_that_decides_of_a_model_what_a_row_gives(
    tmp_path: Path, what: str, do: Callable[[Path], None], options: dict[str, Any], matters: bool
) -> None:
    saved_lm("llama", tmp_path)
    settings = {"name": str(tmp_path), "device": "cpu"}
    before = model_ingredients(LanguageModel(ModelConfig(**settings)))
    do(tmp_path)
    after = model_ingredients(LanguageModel(ModelConfig(**settings, **options)))
    assert (before != after) == matters, what


def shipped(folder: Path, **words: str) -> Any:
    import shutil

    source = Path(saexp.__file__).parent / "assets" / "tiny" / "sae" / "layer_1" / "width_256"
    if not folder.exists():
        shutil.copytree(source, folder)
    return saexp.build("sae", replace(local_sae(**words), path=str(folder)))


@cache
def local_sae(**words: str) -> SAEConfig:
    settings = {"sae.path": "its folder", "layer": "1", "width": "null", **words}
    return saexp.compose(["sae=local", *(f"{k}={v}" for k, v in settings.items())]).sae


def edit_config(folder: Path, **about: Any) -> None:
    file = folder / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **about}), encoding="utf-8")


def edit_weights(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    tensors["b_dec"][0] += 1
    save_file(tensors, file)


SAES: list[tuple[str, Callable[[Path], None], dict[str, str], bool]] = [
    ("weights", edit_weights, {}, True),
    ("its config", lambda f: edit_config(f, apply_b_dec_to_input=False), {}, True),
    ("a config value no attribute shows", lambda f: edit_config(f, threshold_note=1), {}, True),
    ("dtype", lambda _: None, {"sae.dtype": "bfloat16"}, True),
    ("device batch, check, name", lambda _: None, {"sae.check": "off"}, False),
]


@pytest.mark.parametrize(("what", "do", "words", "matters"), SAES, ids=[s[0] for s in SAES])
def test_all_that_decides_what_an_sae_makes_of_its_input(
    tmp_path: Path, what: str, do: Callable[[Path], None], words: dict[str, str], matters: bool
) -> None:
    before = sae_identity(shipped(tmp_path / "sae"))
    assert before == sae_identity(shipped(tmp_path / "sae")) is not None
    do(tmp_path / "sae")
    assert (sae_identity(shipped(tmp_path / "sae", **words)) != before) == matters, what


def test_an_estimated_factor_is_part_of_an_sae_and_one_without_weights_has_no_name(
    tmp_path: Path,
) -> None:
    one = shipped(tmp_path / "sae")
    before = sae_identity(one)
    assert sae_identity(one.with_factor(0.5)) != before
    assert sae_identity(one.with_metadata(fingerprint=None)) is None


OUTCOME = """
from saexp.interventions.outcomes import NextToken

class Mine(NextToken):
    name = "mine"

    def tokens(self, example, tokenizer):
        return [1], []

    def value(self, logits, first, second):
        return float(logits[first[0]]) * FACTOR
"""


def test_what_an_outcome_reads_is_kept_under_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = []
    for number, factor in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "my_outcome.py").write_text(OUTCOME.replace("FACTOR", str(factor)))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(__import__("sys").modules, "my_outcome", raising=False)
        kinds.append(reader_kind(importlib.import_module("my_outcome").Mine()))
    assert kinds[0] == kinds[1] != kinds[2]
    assert reader_kind(AnswerLogit()) != reader_kind(AnswerRank())
    with_option = AnswerLogit()
    with_option.option = 3  # type: ignore[attr-defined]
    assert reader_kind(with_option) != reader_kind(AnswerLogit())
    typed = type("Typed", (AnswerLogit,), {"__module__": "typed_into_a_notebook"})
    assert reader_kind(typed()) is None


def test_layers_in_another_order_are_the_same_results(tmp_path: Path) -> None:
    from saexp.interventions.run import CausalTest

    model = saved_lm("llama", tmp_path / "model")
    one = shipped(tmp_path / "sae")
    settings = replace(one.settings, hookpoint=Hookpoint(2, "resid_post"))
    saes = [one, SparseAutoencoder(dict(one.named_buffers()), settings, one.metadata)]
    prefixes = []
    for chosen in (saes, saes[::-1], saes[:1]):
        test = CausalTest.__new__(CausalTest)
        test.model, test.cache_dir = model, tmp_path
        test.cfg = InterventionConfig(name="steer", coefficient=1.0)
        test.saes = {sae.hookpoint: sae for sae in chosen}
        cache = test._cache(None)
        assert cache is not None
        prefixes.append(cache.prefix)
    assert prefixes[0] == prefixes[1] != prefixes[2]


def test_attention_to_two_entities_of_one_prompt_is_measured_for_each() -> None:
    model = random_lm("llama")
    (tokens,) = tokenize([TEXTS[0]], model.tokenizer, 20)
    width = len(tokens)
    rows = [Row(tokens.ids, about=(at,)) for at in (0, 1, 2)]
    attention = _attention(model, rows, {}, {})
    ids = torch.tensor([tokens.ids])
    for row, values in zip(rows, attention, strict=True):
        keys = torch.zeros(1, width, dtype=torch.bool)
        keys[0, row.about[0]] = True
        alone = attention_to(model, ids, torch.ones_like(ids), keys)[0]
        np.testing.assert_allclose(values, alone.numpy(), atol=1e-6)


def test_two_entities_of_one_prompt_have_attention_of_their_own() -> None:
    model, text = random_lm("llama"), "ab cd ef gh"
    (tokens,) = tokenize([text], model.tokenizer, 20)
    prompts = Prompts()
    for name, span in (("ab", (0, 2)), ("ef", (6, 8))):
        example = Example(id=name, text=text, group="g", spans=(span,), entity=name, split="test")
        prompts.of_group.setdefault("g", []).append(
            PositionedPrompt(example, tokens, (len(tokens) - 1,))
        )
    add = Add(AT, Vector(torch.zeros(model.d_model)), 1.0)
    condition = Condition("c", "group", "g", "g", (1,), "c", ((add,),))
    cfg = InterventionConfig(name="steer", coefficient=1.0, where="last")
    test = AttentionTest(model, {}, cfg, prompts, [1.0], {})
    tables, _ = test.tables([condition])
    ids = torch.tensor([tokens.ids])
    alone = []
    for placed in prompts.all():
        (start, end), keys = placed.example.spans[0], torch.zeros(1, len(tokens), dtype=torch.bool)
        for i, (a, b) in enumerate(tokens.offsets):
            keys[0, i] = a < end and b > start and not tokens.special[i]
        alone.append(attention_to(model, ids, torch.ones_like(ids), keys)[0].mean())
    mean = tables["attention_summary"]["original"].iloc[0]
    assert mean == pytest.approx(float(torch.stack(alone).mean()), abs=1e-6)
