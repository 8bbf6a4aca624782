"""task=label dataset=memorization: which texts a model continues word for word, and their file."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.data.tokenization import tokenize
from saexp.errors import DataError
from saexp.models.loading import LanguageModel
from saexp.models.resolution import ASSETS
from tests.random_models import random_hf, tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def passages(cache, tmp_path_factory):
    words = ["task=label", "dataset=memorization", f"cache_dir={cache}"]
    return saexp.run(saexp.compose(words), tmp_path_factory.mktemp("passages"))


def test_the_shipped_model_goes_on_with_its_passages(passages):
    table = passages.tables["memorization"]
    shipped = pd.read_csv(ASSETS / "tiny" / "memorization.csv")
    whole = (shipped["input_text"] + shipped["generated_continuation_text"]).tolist()
    perfect = dict(zip(whole, shipped["perfect_match"], strict=True))
    assert passages.metrics["memorized/n_texts"] > 80
    exact = {True: [], False: []}
    for row in table.itertuples():
        (text,) = {t for t in whole if t.startswith(row.input_text)} or {None}
        exact[bool(perfect[text])].append(bool(row.perfect_match))
        if row.perfect_match:
            assert text.startswith(row.input_text + row.generated_continuation_text)
            assert row.matching_tokens == 18
    assert np.mean(exact[True]) == 1.0
    assert np.mean(exact[False]) < 0.1


def test_the_csv_is_read_by_dataset_memorization(passages):
    about = json.loads((passages.path / "provenance.json").read_text("utf-8"))["labels"]
    file = Path(about["path"]) / "memorization.csv"
    assert file.read_bytes() == (passages.path / "memorization.csv").read_bytes()
    assert file.read_text("utf-8").splitlines()[0] == (
        "input_text,generated_continuation_text,perfect_match,matching_tokens"
    )
    cfg = saexp.compose(["dataset=memorization", f'dataset.path="{file}"'])
    got = saexp.build("dataset", cfg.dataset)
    sizes = pd.Series([e.group for e in got.examples]).value_counts()
    assert sizes["memorized"] == passages.metrics["memorized/n_perfect"]
    assert sizes["not_memorized"] == passages.metrics["memorized/n_none"]
    page = (passages.path / "report.html").read_text("utf-8")
    assert "texts exactly for 18 tokens after 20" in page


def test_custom_texts_and_the_number_of_matching_tokens(cache, tmp_path):
    model = LanguageModel(saexp.compose(["model=tiny"]).model)
    row = pd.read_csv(ASSETS / "tiny" / "memorization.csv").iloc[0]
    whole = row["input_text"] + row["generated_continuation_text"]
    tokens = tokenize([whole], model.tokenizer, 512)[0]
    # The text as it was, then one whose 6th token after the prompt is another.
    cut = tokens.offsets[1 + 20 + 5][0]
    file = tmp_path / "texts.txt"
    file.write_text(f"{whole}\n{whole[:cut]}{' the' * 20}\ntoo short\n{whole}\n")
    words = ["task=label", "dataset=memorization", f"cache_dir={cache}", "task.n_samples=0"]
    words += ["task.prompt_tokens=20", "task.continuation_tokens=10"]
    run = saexp.run(saexp.compose([*words, f'dataset.path="{file}"']), tmp_path / "run")
    table = run.tables["memorization"]
    assert table["matching_tokens"].tolist() == [10, 5]
    assert table["perfect_match"].tolist() == [True, False]
    assert run.tables["skips"]["reason"].tolist() == ["fewer than 30 tokens"]
    n = len(table) + 1
    assert run.notes[0] == f"1 of {n} texts was skipped: fewer than 30 tokens (1)"
    words = [w.replace("=20", "=200") for w in words]
    with pytest.raises(DataError, match=r"no text has 200 \+ 10 tokens"):
        saexp.run(saexp.compose([*words, f'dataset.path="{file}"']), tmp_path / "none")


def test_labels_of_other_content_never_take_the_place_of_the_first(tmp_path):
    """Texts that begin alike and go on differently have the same prompts."""
    lines = (ROOT / "saexp/assets/tiny/background.txt").read_text("utf-8").splitlines()
    text = " ".join(lines[:4])
    places = []
    for number, end in enumerate(("", "", " and so on, as it was")):
        cut = text[: len(text) // 2]
        (tmp_path / "texts.txt").write_text(f"{cut if end else text}{end} {lines[9]}\n")
        words = ["task=label", "dataset=memorization", f"dataset.path={tmp_path}/texts.txt"]
        words += ["task.prompt_tokens=4", "task.continuation_tokens=24"]
        words += [f"cache_dir={tmp_path}/cache", "tracker=none"]
        result = saexp.run(saexp.compose(words), tmp_path / str(number))
        about = json.loads((result.path / "provenance.json").read_text("utf-8"))["labels"]
        content = (Path(about["path"]) / "memorization.csv").read_bytes()
        assert content == (result.path / "memorization.csv").read_bytes()
        places.append((about["path"], content))
    assert places[0] == places[1]
    assert (places[0][0] == places[2][0]) == (places[0][1] == places[2][1])


def test_a_text_that_is_ended_at_once_is_written_and_read_back_as_a_skip(cache, tmp_path):
    """A model that ends there: its end token is what it would go on with."""
    line = "the cat sat on the mat and ran to the dog by the old house near the lake"
    words = line.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(4)]
    hf, read, folder = random_hf("llama"), tokenizer(), tmp_path / "model"
    n_prompt = 6
    ids = [t.ids for t in tokenize(texts, read, 64, prepend_bos=True)]
    first = next(i for i, n in enumerate(ids[0]) if n not in read.all_special_ids)
    with torch.inference_mode():
        end = int(hf(torch.tensor([ids[0][: first + n_prompt]])).logits[0, -1].argmax())
    hf.generation_config.eos_token_id = hf.config.eos_token_id = end
    hf.save_pretrained(folder)
    read.save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    common = ["dataset=memorization", "model=hf", f'model.name="{folder}"', "device=cpu"]
    options = [f"task.prompt_tokens={n_prompt}", "task.continuation_tokens=4"]
    cfg = saexp.compose(
        [*common, "task=label", f"cache_dir={cache}", *options]
        + ["model.prepend_bos=true", f'dataset.path="{tmp_path / "texts.txt"}"']
    )
    run = saexp.run(cfg, tmp_path / "run")
    table = run.tables["memorization"]
    n = run.metrics["memorized/n_empty"]
    assert n == (table["generated_continuation_text"] == "").sum() >= 1
    assert n < len(table) == 4
    assert any("continuation is empty" in note for note in run.notes)
    file = run.path / "memorization.csv"
    written = pd.read_csv(file, keep_default_na=False)
    assert written["generated_continuation_text"].tolist() == (
        table["generated_continuation_text"].tolist()
    )
    # A row of each group, as two are needed.
    file.write_text(file.read_text("utf-8") + "a,b,True,4\r\n", encoding="utf-8")
    got = saexp.build("dataset", saexp.compose([*common, f'dataset.path="{file}"']).dataset)
    assert all(e.answers[0] for e in got.examples)
    n_none = int((table["matching_tokens"] == 0).sum())
    groups = pd.Series([e.group for e in got.examples]).value_counts()
    assert groups["not_memorized"] == n_none - n
    skipped = [
        note for note in got.notes if "skipped: generated_continuation_text is empty" in note
    ]
    assert len(skipped) == 1 and skipped[0].startswith(f"{n} of 5 rows")
