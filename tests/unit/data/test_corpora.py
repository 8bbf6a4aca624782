"""Corpora: documents read, tokenized and packed; against sae-lens and against plain loops."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from saexp.config import CorpusConfig
from saexp.data import corpora
from saexp.data.corpora import Corpus, context_size, tokenized
from saexp.data.documents import TokenizerInfo, sources
from saexp.errors import ConfigError, DataError, StoreError
from tests.random_models import tokenizer

WORDS = "the a city player was born in London Paris and he she of to".split()  # noqa: SIM905


def documents(n: int, seed: int = 0, lengths: tuple[int, ...] = (0, 1, 3, 20, 60)) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice(lengths))) for _ in range(n)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return file


def info(*, prepend_bos: bool = True) -> TokenizerInfo:
    return TokenizerInfo(tokenizer(), "fingerprint", prepend_bos)


def config(path: Path, **settings: Any) -> CorpusConfig:
    return CorpusConfig(name="corpus", path=str(path), **settings)


def contexts_of(corpus: Corpus) -> list[list[int]]:
    every = np.arange(len(corpus))
    ids, lengths = corpus.ids(every), corpus.lengths(every)
    return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("separator", ["bos", "none", "tain"])
@pytest.mark.parametrize("size", [5, 32])
def test_packed_contexts_equal_those_of_sae_lens(tmp_path, prepend_bos, separator, size):
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    texts = documents(400)
    about = info(prepend_bos=prepend_bos)
    corpus = tokenized(
        config(write_jsonl(tmp_path / "a.jsonl", texts), separator=separator),
        about,
        size,
        tmp_path / "cache",
    )
    tokens = (
        torch.tensor(about.tokenizer(t, add_special_tokens=False)["input_ids"], dtype=torch.long)
        for t in texts
    )
    expected = concat_and_batch_sequences(
        tokens,
        size,
        begin_batch_token_id=about.bos,
        sequence_separator_token_id=about.separator(separator),
    )
    assert contexts_of(corpus) == [context.tolist() for context in expected]


def test_a_separator_that_is_no_token_is_one_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(3))
    with pytest.raises(ConfigError, match=r"dataset\.separator=<none>: no such token; type bos"):
        tokenized(config(path, separator="<none>"), info(), 8, tmp_path / "cache")


@pytest.mark.parametrize(
    ("prepend_bos", "separator", "is_noted"),
    [(False, "bos", True), (True, "none", True), (True, "bos", False), (False, "tain", False)],
)
def test_a_missing_separator_is_noted(tmp_path, prepend_bos, separator, is_noted):
    path = write_jsonl(tmp_path / "a.jsonl", documents(30))
    cfg, about = config(path, separator=separator), info(prepend_bos=prepend_bos)
    notes = tokenized(cfg, about, 8, tmp_path / "cache").notes
    assert any("dataset.separator" in note for note in notes) is is_noted


def test_without_packing_each_document_is_a_context_cut_at_the_size(tmp_path):
    texts = documents(50)
    about = info()
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = tokenized(config(path, pack=False), about, 16, tmp_path / "cache")
    encoded = [about.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    expected = [[about.bos, *ids][:16] for ids in encoded if ids]
    assert contexts_of(corpus) == expected
    assert corpus.documents.tolist() == [n for n, ids in enumerate(encoded) if ids]
    n_cut = sum(len(ids) > 15 for ids in encoded)
    assert any(f"{n_cut} of 50 documents were cut" in note for note in corpus.notes)
    assert any(f"{sum(not ids for ids in encoded)} of 50" in note for note in corpus.notes)


def test_a_context_knows_the_document_in_which_it_begins(tmp_path):
    texts = [" ".join(WORDS[n % 3 : n % 3 + 7]) for n in range(30)]
    about = info(prepend_bos=False)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = tokenized(config(path, separator="none"), about, 8, tmp_path / "cache")
    lengths = [len(about.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    owner = np.repeat(np.arange(30), lengths)
    assert corpus.documents.tolist() == owner[: len(corpus) * 8 : 8].tolist()


def test_texts_are_the_same_whatever_file_holds_them(tmp_path):
    texts = [t for t in documents(120) if t]
    lines = "\n".join(texts) + "\n"
    (tmp_path / "lines.txt").write_text(lines, "utf-8")
    with gzip.open(tmp_path / "lines.txt.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "lines.txt.zst").write_bytes(pa.compress(lines.encode(), "zstd", asbytes=True))
    (tmp_path / "paragraphs.md").write_text("\n\n\n".join(texts), "utf-8")
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "latin.txt").write_text(lines, "latin-1")
    settings: dict[str, dict[str, Any]] = {
        "lines.txt": {"document": "line"},
        "lines.txt.gz": {"document": "line"},
        "lines.txt.zst": {"document": "line"},
        "paragraphs.md": {"document": "paragraph"},
        "a.parquet": {},
        "a.jsonl": {},
        "latin.txt": {"document": "line", "encoding": "latin-1"},
    }
    results = []
    for name, options in settings.items():
        cfg = config(tmp_path / name, **options)
        results.append(contexts_of(tokenized(cfg, info(), 16, tmp_path / "cache")))
        assert [t for one in sources(cfg).items for t, _ in one.documents(cfg) if t] == texts, name
    assert all(result == results[0] for result in results)


def test_a_data_set_saved_by_datasets_is_read(tmp_path):
    import datasets

    texts = documents(40, lengths=(3, 20))
    datasets.Dataset.from_dict({"content": texts}).save_to_disk(str(tmp_path / "saved"))
    cfg = config(tmp_path / "saved", text_column="content")
    corpus = tokenized(cfg, info(), 16, tmp_path / "cache")
    expected = tokenized(
        config(write_jsonl(tmp_path / "a.jsonl", texts)), info(), 16, tmp_path / "cache"
    )
    assert contexts_of(corpus) == contexts_of(expected)


@pytest.mark.parametrize("what", ["folder", "file", "text"])
def test_local_files_are_streamed_by_datasets(tmp_path, what):
    texts, folder = documents(60), tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        write_jsonl(folder / f"{number}.jsonl", texts[30 * number : 30 * number + 30])
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", "utf-8")
    path = {"folder": folder, "file": folder / "0.jsonl", "text": tmp_path / "a.txt"}[what]
    settings: dict[str, Any] = {"document": "line"}
    streamed, plain = (
        tokenized(
            config(path, streaming=streaming, n_tokens=200, **settings),
            info(),
            16,
            tmp_path / "cache",
        )
        for streaming in (True, False)
    )
    assert contexts_of(streamed) == contexts_of(plain)
    assert streamed.key != plain.key


def test_files_that_only_datasets_reads_are_streamed(tmp_path):
    texts = documents(40, lengths=(3, 9))
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "a.csv")
    with pytest.raises(DataError, match="a corpus is read from"):
        sources(config(tmp_path / "a.csv"))
    read = sources(config(tmp_path / "a.csv", streaming=True, n_tokens=10))
    [source] = read.items
    assert [text for text, _ in source.documents(config(tmp_path / "a.csv"))] == texts


def test_a_stream_that_breaks_off_is_one_line(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", documents(5))
    file.write_text(file.read_text("utf-8") + "{broken\n", "utf-8")
    cfg = config(file, streaming=True, n_tokens=1000)
    with pytest.raises(DataError, match=r"a.jsonl/train: cannot be read after row \d+ \(.*\)$"):
        tokenized(cfg, info(), 16, tmp_path / "cache")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*split.*\)$"):
        sources(config(file, streaming=True, n_tokens=9, hf_split="validation"))


def test_documents_that_end_before_the_limit_are_noted(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", documents(50))
    corpus = tokenized(config(file, n_tokens=10**6), info(), 16, tmp_path / "cache")
    [note] = [n for n in corpus.notes if "dataset.n_tokens" in n]
    assert f"after {corpus.n_tokens:,} tokens" in note
    enough = tokenized(config(file, n_tokens=32), info(), 16, tmp_path / "cache")
    assert enough.n_tokens == 32
    assert not any("dataset.n_tokens" in n for n in enough.notes)


def test_files_of_a_folder_are_read_in_order_and_others_are_reported(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    texts = documents(30, lengths=(3, 20))
    write_jsonl(folder / "a.jsonl", texts[:10])
    write_jsonl(folder / "b" / "c.jsonl", texts[10:])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    corpus = tokenized(config(folder), info(), 16, tmp_path / "cache")
    expected = tokenized(
        config(write_jsonl(tmp_path / "all.jsonl", texts)), info(), 16, tmp_path / "cache"
    )
    assert contexts_of(corpus) == contexts_of(expected)
    assert any("1 file" in note and "picture.png" in note for note in corpus.notes)


def test_the_limit_of_tokens_ends_the_corpus_at_a_context(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(200, lengths=(20,)))
    whole = tokenized(config(path), info(), 16, tmp_path / "cache")
    part = tokenized(config(path, n_tokens=100), info(), 16, tmp_path / "cache")
    assert (len(part), part.n_tokens) == (7, 112)
    assert contexts_of(part) == contexts_of(whole)[:7]


def test_a_second_call_opens_what_the_first_has_written(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50, lengths=(20,)))
    first = tokenized(config(path), info(), 16, tmp_path / "cache")
    monkeypatch.setattr(corpora, "_Tokenization", None)
    assert tokenized(config(path), info(), 16, tmp_path / "cache").key == first.key
    by_folder = tokenized(config(first.path), info(), 16, tmp_path / "cache")
    assert contexts_of(by_folder) == contexts_of(first)


def test_other_texts_settings_or_tokenizers_are_other_corpora(tmp_path):
    texts = documents(50, lengths=(20,))
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    keys = {
        tokenized(cfg, about, size, tmp_path / "cache").key
        for cfg, about, size in (
            (config(path), info(), 16),
            (config(path, separator="none"), info(), 16),
            (config(path), info(prepend_bos=False), 16),
            (config(path), info(), 8),
            (config(path), TokenizerInfo(tokenizer(), "another", True), 16),
        )
    }
    write_jsonl(path, texts[1:])
    keys.add(tokenized(config(path), info(), 16, tmp_path / "cache").key)
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", {}, r"a\.txt: is not text in utf-8 .*latin-1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', {}, r"a\.jsonl:1: has no column 'text'; .*body"),
        ("a.jsonl", b'{"text": 3}\n', {}, r"a\.jsonl:1: 'text' is int, not text"),
        ("a.jsonl", b"[1]\n", {}, r"a\.jsonl:1: is list, not an object"),
        ("a.txt.gz", b"not gzip", {}, r"a\.txt\.gz: cannot be read"),
        ("a.parquet", b"not parquet", {}, r"a\.parquet: cannot be read"),
        ("a.txt", b"", {}, r"is empty; no document has a token"),
        ("a.txt", b"a few words", {}, r"too few for a context of 16; .*dataset\.context_size="),
        ("a.doc", b"x", {}, r"a corpus is read from \.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, settings, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        tokenized(config(tmp_path / name, **settings), info(), 16, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_met_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50, lengths=(20,)))
    with pytest.raises(DataError, match="no such file or folder"):
        tokenized(config(tmp_path / "absent.txt"), info(), 16, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"takes at most 64 tokens; type dataset.context_size=64"):
        context_size(config(path, context_size=128), 64, "gpt2")
    assert context_size(config(path), 64, "gpt2") == 64
    assert context_size(config(path), None, "rwkv") == 1024
    with pytest.raises(ConfigError, match=r"dataset\.encoding=utf-99: no such encoding"):
        config(path, encoding="utf-99")
    with pytest.raises(ConfigError, match=r"dataset\.n_tokens= is reached"):
        config(path, streaming=True)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50, lengths=(20,)))
    corpus = tokenized(config(path), info(), 16, tmp_path / "cache")
    another = TokenizerInfo(tokenizer(), "another", True)
    with pytest.raises(DataError, match="was tokenized with another tokenizer"):
        tokenized(config(corpus.path), another, 16, tmp_path / "cache")
    with pytest.raises(DataError, match="contexts have 16 tokens, more than 8"):
        tokenized(config(corpus.path), info(), 8, tmp_path / "cache")


def test_a_damaged_corpus_is_reported(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50, lengths=(20,)))
    corpus = tokenized(config(path), info(), 16, tmp_path / "cache")
    with (corpus.path / "tokens.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreError, match=re.escape(str(corpus.path / "tokens.bin"))):
        Corpus.open(corpus.path)


def test_the_progress_of_a_continued_tokenization_begins_where_it_was(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(2000))
    monkeypatch.setattr(corpora, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(corpora, "_BATCHES_PER_CHECKPOINT", 1)
    bars: list[tuple[Any, ...]] = []
    progress = corpora.progress

    def recorded(*about: Any) -> Any:
        bars.append(about)
        return progress(*about)

    monkeypatch.setattr(corpora, "progress", recorded)
    about = info()
    calls = 0

    def failing(texts: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return TokenizerInfo.encode(about, texts)

    object.__setattr__(about, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        tokenized(config(path), about, 16, tmp_path / "cache")
    (state,) = (tmp_path / "cache").glob("corpora/*/progress.json")
    content = json.loads(state.read_text("utf-8"))
    lines = path.read_bytes().splitlines(keepends=True)
    n_read = sum(map(len, lines[: content["within"]]))
    assert 0 < content["n_read"] == pytest.approx(n_read, abs=8192), "read in blocks"
    # As if the megabytes of the bar were bytes.
    monkeypatch.setattr(corpora, "_BAR_BYTES", 1)
    tokenized(config(path), info(), 16, tmp_path / "cache")
    total = path.stat().st_size
    assert bars[0] == (1, "tokenizing", "MB", 0)
    assert bars[1] == (total, "tokenizing", "MB", content["n_read"])
