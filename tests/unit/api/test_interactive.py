"""Activations, logits and generation of the interactive API against plain Hugging Face calls."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import saexp
from saexp.api.model import InteractiveModel
from saexp.errors import ConfigError, DataError, ModelError
from tests.random_models import STORED, TEXTS, hooks_left, random_lm, tokenizer

SHORT = [" ".join(text.split()[:6]) for text in TEXTS]


@pytest.fixture(params=STORED)
def model(request: pytest.FixtureRequest) -> InteractiveModel:
    return saexp.load_model(random_lm(request.param).hf, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def tiny() -> InteractiveModel:
    return saexp.load_model("tiny", device="cpu")


def ids_of(model: InteractiveModel, text: str) -> Tensor:
    return torch.tensor([model.tokenizer(text)["input_ids"]])


@torch.inference_mode()
def test_activations_equal_the_hidden_states_of_the_model(model: InteractiveModel) -> None:
    # The last entry of hidden_states is after the final norm, so the last block is left out.
    for layer in range(model.n_layers - 1):
        all_acts = model.activations(SHORT, layer)
        for text, acts in zip(SHORT, all_acts, strict=True):
            out = model.hf(ids_of(model, text), output_hidden_states=True)
            torch.testing.assert_close(acts, out.hidden_states[layer + 1][0], atol=1e-4, rtol=1e-4)
    assert not hooks_left(model.hf)


@torch.inference_mode()
def test_logits_equal_those_of_the_model(model: InteractiveModel) -> None:
    for text, logits in zip(SHORT, model.logits(SHORT), strict=True):
        expected = model.hf(ids_of(model, text)).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_greedy_generation_equals_that_of_transformers(model: InteractiveModel) -> None:
    continuations = model.generate(SHORT, max_new_tokens=6)
    for text, generated in zip(SHORT, continuations, strict=True):
        ids = ids_of(model, text)
        whole = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        expected = model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert generated == expected


def test_a_string_gives_one_result_and_a_list_a_list(tiny: InteractiveModel) -> None:
    model, text = tiny, "The player scored twice."
    assert torch.equal(model.logits(text), model.logits([text])[0])
    assert torch.equal(model.activations(text, 1), model.activations([text], 1)[0])
    assert model.generate(text) == model.generate([text])[0]
    assert model.logits([]) == model.activations([], 1) == model.generate([]) == []


def test_samples_depend_on_the_seed_and_not_on_the_other_texts(tiny: InteractiveModel) -> None:
    one, two = "The player", "The city of"

    def sample(texts: str | list[str], seed: int) -> object:
        return tiny.generate(texts, max_new_tokens=8, temperature=1.0, seed=seed)

    alone = sample(one, 3)
    assert sample([two, one], 3) == [sample(two, 3), alone]
    assert any(sample(one, seed) != alone for seed in range(4, 8))


def test_positions_choose_tokens(tiny: InteractiveModel) -> None:
    acts = tiny.activations("The player scored.", 1)
    assert torch.equal(tiny.activations("The player scored.", 1, positions="last"), acts[-1:])
    assert torch.equal(tiny.activations("The player scored.", 1, positions=[-2]), acts[-2:-1])


def test_chat_applies_the_template() -> None:
    hf = random_lm("llama").hf
    model = saexp.load_model(hf, tokenizer=tokenizer(chat=True))
    ids = torch.tensor(
        [model.tokenizer("<bos>user: Hi\nmodel:", add_special_tokens=False).input_ids]
    )
    with torch.inference_mode():
        expected = hf(ids).logits[0]
    torch.testing.assert_close(model.logits("Hi", chat=True), expected, atol=1e-4, rtol=1e-4)
    assert len(model.logits("Hi")) < len(expected)


def test_errors_are_one_line(tiny: InteractiveModel) -> None:
    model = tiny
    with pytest.raises(ModelError, match="layer=99"):
        model.activations("a", 99)
    with pytest.raises(ModelError, match="resid_psot"):
        model.activations("a", 1, stream="resid_psot")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        model.generate("a", max_new_tokens=0)
    with pytest.raises(DataError, match="text 1 is a int"):
        model.logits(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="revison"):
        saexp.load_model("tiny", revison="main")
    with pytest.raises(ModelError):
        saexp.load_model("no/such/folder")


def test_a_text_that_is_too_long_is_an_error_that_names_arguments() -> None:
    model = saexp.load_model(random_lm("gpt2").hf, tokenizer=tokenizer())
    text = " ".join(TEXTS * 9)
    for call in (model.logits, model.generate, lambda text: model.activations(text, 1)):
        with pytest.raises(
            ModelError, match=r"text 0: .* positions of in-memory; shorten the text"
        ):
            call(text)
    with pytest.raises(ModelError, match=r"text 0: .* new ones .* pass max_new_tokens=\d+, or"):
        model.generate(TEXTS[0], max_new_tokens=64)


def test_objects_show_as_html(tiny: InteractiveModel) -> None:
    sae = saexp.load_sae("tiny", layer=2)
    assert "<table>" in tiny._repr_html_() and "tiny" in repr(tiny)
    assert "layer_2.resid_post" in sae._repr_html_()
    assert "Result in memory" in saexp.Result(notes=["a < b"])._repr_html_()
    assert "a &lt; b" in saexp.Result(notes=["a < b"])._repr_html_()


REFUSED = """
import sys, saexp
print(*dir(saexp))
from saexp.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def test_importing_saexp_and_refusing_a_command_imports_no_torch_and_lists_every_name() -> None:
    words = [sys.executable, "-c", REFUSED, "layr=3"]
    listing = subprocess.run(words, capture_output=True, text=True, check=False)
    (line,) = listing.stderr.splitlines()
    assert line.startswith("saexp: no key 'layr'; did you mean layer")
    assert listing.returncode == 1
    assert set(saexp.__all__) <= set(listing.stdout.split())
    for name in saexp.__all__:
        assert getattr(saexp, name) is not None
