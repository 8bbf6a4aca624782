"""Whether a run's texts begin with BOS: the SAE's config decides where the user does not."""

import json
import shutil

import pandas as pd
import pytest
import torch
from tokenizers import processors

import saexp
from saexp.context import ObjectCache
from saexp.errors import ConfigError
from saexp.models.resolution import ASSETS
from tests.random_models import D_MODEL, TEXTS, random_hf, save
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.saes.make import write_saelens

FIXED = ["tracker=none", "intervention=none", "analyzer.n_bootstrap=0", "sae.check=warn"]
FIXED += [FEW_NEUTRAL]
N_BACKGROUND = "analyzer.n_background=64"


def described(folder, prepend_bos, layer=1, version=None):
    """A random SAE's folder whose config says whether it was trained with BOS, or nothing."""
    generator = torch.Generator().manual_seed(layer)
    tensors = {
        "W_enc": torch.randn(D_MODEL, 24, generator=generator),
        "W_dec": torch.randn(24, D_MODEL, generator=generator),
        "b_enc": torch.zeros(24),
        "b_dec": torch.zeros(D_MODEL),
    }
    about = {"architecture": "standard", "d_in": D_MODEL, "d_sae": 24, "dtype": "float32"}
    about["metadata"] = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    if version is not None:
        about["metadata"]["sae_lens_version"] = version
    if prepend_bos is not None:
        about["metadata"]["prepend_bos"] = prepend_bos
    return write_saelens(folder, about, tensors)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 whose tokenizer, as the real one, has a BOS token and puts none in front."""
    folder = tmp_path_factory.mktemp("gpt2")
    save(random_hf("gpt2"), folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save_pretrained(folder)
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(gpt2, cache, tmp_path):
    """A run on that model: (result, provenance, stored ids' first rows)."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")

    def one(sae, *words, name="run"):
        always = ["model=hf", f"model.name={gpt2}", "sae=local", f'sae.path="{sae}"', "layer=1"]
        always += ["dataset=text", f"dataset.path={texts}", "dataset.max_length=40"]
        always += ["analyzer=top_features", "positions=all", N_BACKGROUND, *FIXED]
        cfg = saexp.compose([*always, f"cache_dir={cache}", *words])
        result = saexp.run(cfg, tmp_path / name)
        return result, json.loads((tmp_path / name / "provenance.json").read_text("utf-8"))

    return one


def bos_notes(result):
    return [n for n in result.notes if "BOS" in n]


def test_an_sae_trained_with_bos_gets_it(run, gpt2, tmp_path):
    with_bos = described(tmp_path / "with", True)
    result, provenance = run(with_bos)
    assert result.metrics["check/begins_with_bos"] == 1
    [note] = bos_notes(result)
    assert note.startswith("texts begin with BOS, as local at layer_1.resid_post was trained")
    assert note in provenance["notes"]
    assert provenance["sae"]["prepend_bos"] is True
    rows = result.tables["rows"]
    assert rows["token_index"].min() == 1
    # What is stored is what transformers computes with that one token in front.
    model = saexp.build("model", saexp.compose(["model=hf", f"model.name={gpt2}"]).model)
    acts = saexp.open_store(provenance["store"]["path"]).acts(1, "resid_post")
    first = rows[rows["text"] == TEXTS[0]]
    ids = [model.tokenizer.bos_token_id, *model.tokenizer(TEXTS[0])["input_ids"]]
    states = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(
        acts[first["row"].tolist()].float(), states[first["token_index"].tolist()]
    )


def test_the_users_word_counts_and_the_store_is_another(run, tmp_path):
    with_bos = described(tmp_path / "with", True)
    asked, _ = run(with_bos, name="1")
    result, provenance = run(with_bos, "model.prepend_bos=false", name="2")
    assert result.metrics["check/begins_with_bos"] == 0
    [note] = bos_notes(result)
    assert note.startswith("model.prepend_bos=false was typed, though local at layer_1.resid_post")
    assert result.tables["rows"]["token_index"].min() == 0
    assert len(result.tables["rows"]) == len(asked.tables["rows"])
    others = json.loads((tmp_path / "1/provenance.json").read_text("utf-8"))
    assert others["store"]["key"] != provenance["store"]["key"]


@pytest.mark.parametrize(
    ("says", "version", "begins"),
    [(False, None, 0), (None, "6.5.0", 0), (None, None, 1), (None, "5.9.1", 1)],
)
def test_a_config_that_says_no_or_nothing(run, tmp_path, says, version, begins):
    """Before 6.0 SAELens took a config that says nothing for one with BOS, and does so still."""
    result, _ = run(described(tmp_path / "sae", says, version=version))
    assert result.metrics["check/begins_with_bos"] == begins
    assert len(bos_notes(result)) == begins


def test_saes_that_disagree_are_not_read_together(run, tmp_path):
    described(tmp_path / "sae_1", True)
    described(tmp_path / "sae_2", False, layer=2)
    both = tmp_path / "sae_{layer}"
    message = r"^local at layer_1\.resid_post reads texts that begin with BOS and local at layer_2"
    for words in (["layer=[1,2]"], ["layer=[1,2]", "task=evaluate", "dataset.path=null"]):
        with pytest.raises(ConfigError, match=message) as caught:
            run(both, *words)
        assert "\n" not in str(caught.value)
    result, _ = run(both, "layer=[1,2]", "model.prepend_bos=true")
    assert result.metrics["check/begins_with_bos"] == 1


@pytest.mark.parametrize("asked", [None, False])
def test_evaluate_follows_the_sae_too(run, tmp_path, asked):
    words = [] if asked is None else [f"task.prepend_bos={str(asked).lower()}"]
    sae = described(tmp_path / "sae", True)
    result, _ = run(sae, "task=evaluate", "task.n_bootstrap=0", *words)
    assert result.metrics["check/begins_with_bos"] == (asked is None)
    [note] = [n for n in bos_notes(result) if "counts as any other" not in n]
    key = "task.prepend_bos=false was typed" if asked is False else "texts begin with BOS"
    assert note.startswith(key)


def test_a_tokenizer_without_the_token(gpt2, cache, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(gpt2, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    sae = described(tmp_path / "sae", True)
    words = ["model=hf", f"model.name={folder}", "sae=local", f"sae.path={sae}", "layer=1"]
    words += ["dataset=text", 'dataset.text="A line of text."', "analyzer=top_features"]
    words += ["positions=all", N_BACKGROUND, "dataset.max_length=40", *FIXED]
    words += [f"cache_dir={cache}"]
    result = saexp.run(saexp.compose(words), tmp_path / "run")
    assert result.metrics["check/begins_with_bos"] == 0
    assert [n for n in bos_notes(result) if "has none: texts are read without" in n]
    with pytest.raises(ConfigError, match="^model.prepend_bos=true, but the tokenizer of "):
        saexp.run(saexp.compose([*words, "model.prepend_bos=true"]), tmp_path / "run")


def test_on_the_tiny_model_only_an_sae_that_says_no_changes_anything(cache, tmp_path):
    """Its tokenizer adds BOS and its SAEs want it; what one run settles is not the next one's."""
    shipped_sae = ASSETS / "tiny/sae/layer_2/width_256"
    cfg = json.loads((shipped_sae / "cfg.json").read_text("utf-8"))
    words = ["layer=2", "analyzer=stats", N_BACKGROUND, f"cache_dir={cache}", *FIXED]
    words += ["dataset.n_examples=20"]
    objects = ObjectCache()

    def run(name, *more):
        saexp.run(saexp.compose([*words, *more]), tmp_path / name, objects=objects)
        about = json.loads((tmp_path / name / "provenance.json").read_text("utf-8"))
        return about, pd.read_parquet(tmp_path / name / "rows.parquet")

    shipped, rows = run("shipped")
    for value in (False, None):
        folder = tmp_path / f"sae_{value}"
        shutil.copytree(shipped_sae, folder)
        cfg["metadata"]["prepend_bos"] = value
        (folder / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
        about, own_rows = run(str(value), "sae=local", f"sae.path={folder}")
        if value is False:
            assert (own_rows["token_index"] == rows["token_index"] - 1).all()
            assert about["store"]["key"] != shipped["store"]["key"]
            assert [n for n in about["notes"] if n.startswith("texts are read without the BOS")]
        else:
            assert about["store"]["key"] == shipped["store"]["key"]
            assert own_rows["token_index"].max() == rows["token_index"].max()
            assert not [n for n in about["notes"] if "BOS" in n]
