"""What a model says about itself before and after its weights are read, and its errors."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from saexp.config import ModelConfig
from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel, load_model
from saexp.models.resolution import SHIPPED, pick_device
from tests.random_models import D_MODEL, N_LAYERS, random_hf, random_lm, save, tokenizer

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture()
def folder(tmp_path):
    save(random_hf("llama"), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(folder, **options):
    return LanguageModel(ModelConfig(name=str(folder), device="cpu", **options))


def message_of(make) -> str:
    with pytest.raises(ModelError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shape_and_names_need_no_weights(folder):
    (folder / "model.safetensors").unlink()
    model = load(folder)
    assert (model.n_layers, model.d_model) == (N_LAYERS, D_MODEL)
    assert model.pad_id == 0
    assert model.tokenizer("The city").input_ids == tokenizer()("The city").input_ids
    model.check_layer(2)
    assert not model.loaded


def test_weights_are_read_on_first_use_frozen_and_in_eval_mode(folder):
    model = load(folder)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model.hf(ids).logits, random_hf("llama")(ids).logits)
    assert model.loaded
    assert not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())


def test_the_registry_builder_takes_runtime_objects(folder):
    assert load_model(ModelConfig(name=str(folder), device="cpu"), layer=3).d_model == D_MODEL


def test_shipped_models_are_found_by_name():
    tiny = LanguageModel(ModelConfig(name="tiny", device="cpu"))
    assert (tiny.n_layers, tiny.d_model, tiny.name) == (5, 128, "tiny")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_read_without_their_classes_say_the_same(name):
    """Before the weights are read, a plain config and tokenizer stand for the architecture's."""
    model = LanguageModel(ModelConfig(name=name, device="cpu"))
    own = AutoConfig.from_pretrained(model.source)
    assert type(own) is not type(model.config)
    facts = json.loads((Path(model.source) / "config.json").read_text("utf-8"))
    # Of its defaults none is missing, and nothing is read in another way.
    lacking = {k for k, v in own.to_dict().items() if v is not None} - set(facts)
    assert lacking <= set(PreTrainedConfig().to_dict()) | {"_name_or_path"}
    for key in set(facts) - {"transformers_version", "dtype", "use_cache"}:
        assert getattr(model.config, key) == getattr(own, key), key
    theirs = AutoTokenizer.from_pretrained(model.source)
    assert theirs.get_vocab() == model.tokenizer.get_vocab()
    assert theirs.special_tokens_map == model.tokenizer.special_tokens_map
    texts = ["The player Fenlet Baszad plays for", "Ünïcode, tabs\tand 123  spaces"]
    for asked in ({}, {"add_special_tokens": False}, {"return_offsets_mapping": True}):
        assert dict(theirs(texts, **asked)) == dict(model.tokenizer(texts, **asked))
    ids = theirs(texts)["input_ids"]
    assert theirs.batch_decode(ids) == model.tokenizer.batch_decode(ids)
    assert type(model.hf.config) is type(own)
    assert model.config is model.text_config is model.hf.config


@NO_CUDA
def test_auto_is_cpu_and_float32_without_an_accelerator(folder):
    model = LanguageModel(ModelConfig(name=str(folder)))
    there = "mps" if torch.backends.mps.is_available() else "cpu"
    assert (model.device.type, model.dtype) == (there, torch.float32)


def test_the_weights_come_in_the_dtype_asked_for(folder):
    assert load(folder, dtype="bfloat16").hf.lm_head.weight.dtype == torch.bfloat16


@NO_CUDA
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(name):
    message = f"device={name} is not on this machine; try device=auto"
    assert message_of(lambda: pick_device(name)) == message
    assert message_of(lambda: LanguageModel(ModelConfig(name="tiny", device=name))) == message


@pytest.mark.parametrize("name", ["nobody/nothing", "no-such-folder/model", "nothing"])
def test_a_wrong_name(name):
    message = message_of(lambda: LanguageModel(ModelConfig(name=name, device="cpu")))
    assert message.startswith(f"model.name={name}: its config cannot be loaded (")
    assert message.endswith("); type a hub id that is reachable or cached, or a local folder")


@pytest.mark.parametrize("name", ["not a name!", "owner/", "owner/na me"])
def test_a_name_that_the_hub_cannot_have(name):
    message = f"model.name={name} is neither a folder here nor a hub id such as google/gemma-2-2b"
    assert message_of(lambda: LanguageModel(ModelConfig(name=name, device="cpu"))) == message


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    start = f"model.name={folder}: its weights cannot be loaded ("
    assert message_of(lambda: load(folder).hf).startswith(start + "Error no file named")
    assert message_of(lambda: load(folder).fingerprint).startswith(
        start + "no file named model.safetensors or pytorch_model.bin)"
    )


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    start = f"^model.name={re.escape(str(folder))}: its weights cannot be loaded \\(.*header"
    assert re.match(start, message_of(lambda: load(folder).hf))


def test_weights_of_another_size(folder):
    change_config(folder, intermediate_size=40)
    assert "its weights cannot be loaded (" in message_of(lambda: load(folder).hf)


def test_weights_that_lack_a_part_are_not_made_up(folder):
    change_config(folder, num_hidden_layers=N_LAYERS + 1)
    assert (
        "its weights cannot be loaded (9 are missing in its files, such as "
        "model.layers.3.input_layernorm.weight)"
    ) in message_of(lambda: load(folder).hf)


def test_tied_embeddings_do_not_count_as_lacking(tmp_path):
    hf = random_hf("gemma2")
    assert hf.config.tie_word_embeddings
    ids = torch.tensor([[1, 5, 9]])
    model = LanguageModel(save(hf, tmp_path))
    assert torch.equal(model.hf(ids).logits, hf(ids).logits)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert f"model.name={folder}: its tokenizer cannot be loaded (" in message_of(
        lambda: load(folder).tokenizer
    )


@pytest.mark.parametrize(("layer", "better"), [(99, 2), (3, 2), (-1, 0)])
def test_a_layer_that_is_not_there(folder, layer, better):
    message = f"layer={layer} is out of range: model has layers 0-2; try layer={better}"
    model = load(folder)
    assert message_of(lambda: model.check_layer(layer)) == message
    assert not model.loaded


def test_a_hookpoint_of_a_layer_that_is_not_there():
    message = "layer=3 is out of range: random-gpt2 has layers 0-2; try layer=2"
    assert message_of(lambda: random_lm("gpt2").module(Hookpoint(3, "mlp_out"))) == message


def test_end_tokens_come_from_configs_and_tokenizer(folder):
    model = load(folder)
    model.hf.generation_config.eos_token_id = [2, 7]
    assert model.eos_ids == (2, 7)


def test_without_a_pad_token_an_end_token_pads():
    model = LanguageModel.wrap(random_hf("llama"), tokenizer())
    without = type(tokenizer())(tokenizer_object=tokenizer()._tokenizer, eos_token="<eos>")
    model.__dict__["tokenizer"] = without
    assert without.pad_token is None
    assert model.pad_id == 2


def test_chat_text_is_the_template_with_the_prompt_to_be_answered():
    model = LanguageModel.wrap(random_hf("llama"), tokenizer(chat=True))
    assert model.chat_text("Who?") == "<bos>user: Who?\nmodel:"


def test_chat_without_a_template():
    message = "random-llama has no chat template; set model.chat=false"
    assert message_of(lambda: random_lm("llama").chat_text("Who?")) == message


def test_a_view_with_another_bos_shares_weights_that_are_loaded_later(tmp_path):
    model = LanguageModel(save(random_hf("llama"), tmp_path / "model"))
    view = model.with_bos(True)
    assert (model.prepend_bos, view.prepend_bos, view.with_bos(None).prepend_bos) == (
        None,
        True,
        None,
    )
    assert view.hf is model.hf
    assert view.blocks is model.blocks
    with pytest.raises(AttributeError, match=r"use model.with_bos\(...\)"):
        model.prepend_bos = True


def test_weights_that_are_not_there_have_no_fingerprint(tmp_path):
    cfg = save(random_hf("llama"), tmp_path / "model")
    assert LanguageModel(cfg).known_fingerprint == LanguageModel(cfg).fingerprint
    (tmp_path / "model" / "model.safetensors").unlink()
    assert LanguageModel(cfg).known_fingerprint is None
    assert LanguageModel.wrap(random_hf("llama")).has_local_weights


def test_the_head_reads_selected_positions_as_a_contiguous_copy(folder):
    """PyTorch is many times slower on a view, and in bfloat16 copies the weights for every row."""
    model = load(folder)
    are_contiguous = []
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _, args: are_contiguous.append(args[0].is_contiguous())
    )
    ids = torch.arange(12).view(3, 4)
    with torch.inference_mode():
        every = model.hf(input_ids=ids).logits
        last = model.hf(input_ids=ids, logits_to_keep=2).logits
    handle.remove()
    assert are_contiguous == [True, True]
    torch.testing.assert_close(last, every[:, -2:])
