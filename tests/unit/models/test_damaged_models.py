"""Models whose files are damaged, hostile or of other types: one line each, and no code is run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saexp.config import ModelConfig
from saexp.data.tokenization import format_prompts
from saexp.errors import InterventionError, ModelError
from saexp.interventions.cached_generation import generate
from saexp.interventions.generation import greedy_tokens, last_logits
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import D_MODEL, random_hf, random_lm, save, tokenizer

LOADED = "type a hub id that is reachable or cached, or a local folder"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("sound") / "model"
    save(random_hf("llama"), saved)
    return saved


@pytest.fixture()
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def load(folder: Path, **options: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(folder), device="cpu", **options))


def line_of(make: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as error:
        make()
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    return str(error.value)


def change(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text())
    config |= {key: value for key, value in changes.items() if value is not ...}
    for key in (key for key, value in changes.items() if value is ...):
        del config[key]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "x"}, "Field 'vocab_size' expected int, got str (value: 'x'))"),
        ({"num_hidden_layers": 0}, "its config has num_hidden_layers=0, not a positive integer"),
        ({"num_hidden_layers": -1}, "its config has num_hidden_layers=-1, not a positive integer"),
        ({"num_hidden_layers": 2.5}, "Field 'num_hidden_layers' expected int, got float"),
        ({"num_hidden_layers": 10**9}, "saexp loads models of up to 10,000 layers"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 10**9},
            "its config has num_hidden_layers=1000000000; saexp loads models of up to 10,000 la",
        ),
        ({"hidden_size": 0}, "its config has hidden_size=0, not a positive integer"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"model_type": ...}, "its config cannot be loaded (Unrecognized model in"),
        (
            {"num_attention_heads": 0},
            "cannot be loaded (ZeroDivisionError: integer modulo by zero)",
        ),
        ({"dtype": "floaty"}, "its config cannot be loaded (AttributeError: module 'torch' has no"),
        ({"quantization_config": 3}, "its config cannot be loaded (AttributeError: 'int' object"),
        ({"eos_token_id": "x"}, "Field 'eos_token_id'"),
    ],
)
def test_configs_with_impossible_values(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change(folder / "config.json", **changes)
    line = line_of(lambda: load(folder))
    assert line.startswith(f"model.name={folder}: its config ")
    assert message in line


@pytest.mark.parametrize("changes", [{"hidden_act": "nope"}, {"num_hidden_layers": ...}])
def test_configs_that_fit_no_weights(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "config.json", **changes)
    line = line_of(lambda: load(folder).hf)
    assert line.startswith(f"model.name={folder}: its weights cannot be loaded (")
    assert line.endswith(f"); {LOADED}")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"3", b"\xff\xfe\x00", b'{"a', b"{}"])
@pytest.mark.parametrize(
    ("name", "what", "use"),
    [
        ("config.json", "config", lambda model: model.n_layers),
        ("tokenizer.json", "tokenizer", lambda model: model.tokenizer),
        ("tokenizer_config.json", "tokenizer", lambda model: model.tokenizer),
        ("generation_config.json", "generation_config.json", lambda model: model.eos_ids),
    ],
)
def test_small_files_that_are_damaged(
    folder: Path, name: str, what: str, use: Callable[[LanguageModel], Any], content: bytes
) -> None:
    (folder / name).write_bytes(content)
    if content == b"{}" and name in ("tokenizer_config.json", "generation_config.json"):
        use(load(folder))
        return
    line = line_of(lambda: use(load(folder)))
    assert line.startswith(f"model.name={folder}: its {what} cannot be loaded (")


def test_a_damaged_generation_config_is_not_ignored_once_weights_are_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    model = load(folder)
    assert model.hf is not None
    assert "its generation_config.json cannot be loaded (" in line_of(lambda: model.eos_ids)
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_ids == (2,)


@pytest.mark.parametrize("value", ["x", [1, "x"], 1.5, [[2]], -1, True])
def test_end_tokens_of_another_type(folder: Path, value: Any) -> None:
    change(folder / "generation_config.json", eos_token_id=value)
    line = line_of(lambda: load(folder).eos_ids)
    assert "eos_token_id" in line or "generation_config.json" in line


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_hostile_and_damaged_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    proof, file = tmp_path / "it ran", folder / "pytorch_model.bin"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, file)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(load(folder).hf(ids).logits, random_hf("llama")(ids).logits)
    whole = file.read_bytes()
    torch.save({**weights, "x": Hostile(proof)}, file)
    hostile = file.read_bytes()
    unopened = "a pickle that is damaged or holds more than tensors, so it is not opened"
    for content, reason in (
        (hostile, unopened),
        (pickle.dumps(Hostile(proof)), unopened),
        (b"garbage" * 30, unopened),
        (b"", unopened),
        (whole[:5000], ""),
    ):
        file.write_bytes(content)
        line = line_of(lambda: load(folder).hf)
        assert line.startswith(f"model.name={folder}: its weights cannot be loaded ({reason}")
    for bad_content in ([1, 2], {"model.embed_tokens.weight": 3}):
        torch.save(bad_content, file)
        assert "its weights cannot be loaded (" in line_of(lambda: load(folder).hf)
    assert not proof.exists()


@pytest.mark.parametrize("cut", [0, 7, 100, -100])
def test_truncated_weights(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    assert "its weights cannot be loaded (" in line_of(lambda: load(folder).hf)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": null}', "model.safetensors.index.json has no weight_map"),
        ("{", "Expecting property name"),
        ('{"weight_map": {"a": 3}}', "model.safetensors.index.json lists the file 3"),
        ('{"weight_map": {"a": "../x"}}', "model.safetensors.index.json lists the file '../x'"),
        ('{"weight_map": {"a": "/etc/x"}}', "model.safetensors.index.json lists the file '/etc/x'"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "no file named absent.safetensors"),
    ],
)
def test_damaged_indices_of_weights(folder: Path, content: str, reason: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    line = line_of(lambda: load(folder).fingerprint)
    assert line.startswith(f"model.name={folder}: its weights cannot be loaded ({reason}")


TEMPLATES: list[tuple[Any, str]] = [
    ("{% if %}", "its chat template fails (TemplateSyntaxError: Expected an expression"),
    ("{{ nothing.at.all }}", "its chat template fails (UndefinedError: 'nothing' is undefined)"),
    ("{{ foo() }}", "its chat template fails (UndefinedError: 'foo' is undefined)"),
    ("{{ raise_exception('System role\nneeded') }}", "(TemplateError: System role needed)"),
    ("{{ 1 / 0 }}", "its chat template fails (ZeroDivisionError: division by zero)"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its chat template fails (RecursionError"),
    ("{{ messages[0].content.__class__.__mro__ }}", "its chat template fails (SecurityError"),
    (3, "its chat template fails (TypeError"),
    ({"rag": "{{ messages[0].content }}"}, "its chat template fails (ValueError: This model has"),
    ("Hello", "its chat template leaves out the user's message"),
    ("{{ messages[0].content[:3] }}", "its chat template leaves out the user's message"),
    (" ", "its chat template leaves out the user's message"),
]


@pytest.mark.parametrize(("template", "message"), TEMPLATES)
def test_faulty_chat_templates(template: Any, message: str) -> None:
    model = LanguageModel.wrap(
        random_hf("llama"),
        type(tokenizer())(tokenizer_object=tokenizer()._tokenizer, bos_token="<bos>"),
        name="mine",
    )
    model.cfg.chat = True
    model.tokenizer.chat_template = template
    line = line_of(lambda: format_prompts(model, ["Who?"]))
    assert line.startswith("mine: ")
    assert message in line
    assert line.endswith("; set model.chat=false")


def test_templates_that_change_the_letters_are_used() -> None:
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(), name="mine")
    model.__dict__["tokenizer"] = type(tokenizer())(tokenizer_object=tokenizer()._tokenizer)
    model.tokenizer.chat_template = "user: {{ messages[0].content | upper }}"
    model.cfg.chat = True
    (prompt,) = format_prompts(model, ["Who?"])
    assert prompt.text == "user: WHO?"


def test_nan_in_weights_is_reported_where_nothing_is_collected(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = tuple(tokenizer()("The player Fenlet").input_ids)
    line = line_of(lambda: last_logits(load(folder), [Row(ids)]))
    assert line == (
        f"NaN or Inf in the logits of {folder} after the prompt that ends '<bos>The player Fenlet'"
        ", in float32: check the model's weights"
    )


def test_an_intervention_that_overflows_is_reported_where_the_argmax_hides_it() -> None:
    model, ids = random_lm("llama"), tuple(tokenizer()("The player Fenlet").input_ids)
    much = Add(Hookpoint(1, "resid_post"), Vector(torch.full((D_MODEL,), 3e38)), 1e3)
    rows = [Row(ids), Row(ids, (much,), positions=tuple(range(len(ids))), generated=True)]
    # Values that are read are NaN themselves.
    assert bool(last_logits(model, rows)[1].isnan().any())
    with pytest.raises(InterventionError, match="in float32, under intervention: a smaller coeff"):
        generate(model, rows, max_new_tokens=2, batch_tokens=100)


def test_an_overflow_that_begins_with_generated_tokens_is_reported() -> None:
    model, ids = random_lm("llama"), tuple(tokenizer()("The player Fenlet").input_ids)
    much = Add(Hookpoint(1, "resid_post"), Vector(torch.full((D_MODEL,), 3e38)), 1e3)
    row = Row(ids, (much,), generated=True)
    message = "Fenlet', in float32, under intervention: a smaller coefficient"
    with pytest.raises(InterventionError, match=message):
        generate(model, [row], max_new_tokens=2, batch_tokens=100)
    # Where a guess of its text is checked, too.
    with pytest.raises(InterventionError, match="under intervention"):
        greedy_tokens(model, [row.followed_by([5, 6])], {}, [2])
