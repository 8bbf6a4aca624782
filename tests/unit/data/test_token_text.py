"""Tokens as they are shown: together the text, also where a character is several tokens."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from transformers import PreTrainedTokenizerFast

from saexp.analysis import AnalysisInputs
from saexp.analysis.top_latents import TopFeaturesAnalyzer
from saexp.config import PositionsConfig, TopFeaturesConfig
from saexp.data import Example
from saexp.data.corpora import decoded_pieces
from saexp.data.positions import resolve_positions
from saexp.data.tokenization import token_pieces, token_texts, tokenize
from saexp.latents import Latents
from saexp.models.loading import LanguageModel
from saexp.registry import build
from tests.hub_tokenizers import gemma_2, gpt_2, gpt_neox, llama_3
from tests.random_models import random_hf, tokenizer

TEXTS = [
    "A family 👨‍👩‍👧‍👦 and a flag 🇪🇹, then 🙂.",
    "中国の首都は東京ではない。",
    "Crème brûlée – “naïve” café\nनमस्ते  दुनिया",
    "plain words , isn't it ?",
]


def wrapped(name: str) -> PreTrainedTokenizerFast:
    backend, settings = {
        "gpt_2": gpt_2,
        "gpt_neox": gpt_neox,
        "llama_3": llama_3,
        "gemma_2": gemma_2,
    }[name]()
    cleanup = {k: settings[k] for k in ("clean_up_tokenization_spaces",) if k in settings}
    special = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **cleanup)


TOKENIZERS = {name: wrapped(name) for name in ("gpt_2", "gpt_neox", "llama_3", "gemma_2")}
TOKENIZERS |= {"random": tokenizer(), "random, spaces kept": tokenizer(trim_offsets=False)}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


def without_special(text: Any, shown: Sequence[str]) -> str:
    added = [s and a == b for s, (a, b) in zip(text.special, text.offsets, strict=True)]
    return "".join(piece for piece, is_added in zip(shown, added, strict=True) if not is_added)


@EVERY
def test_pieces_from_ids_alone_are_those_of_the_text(name: str) -> None:
    words = TOKENIZERS[name]
    for text in tokenize(TEXTS[:3] if name.startswith("random") else TEXTS, words, 400):
        pieces = token_pieces(text, words)
        n = len(text)
        assert decoded_pieces(text.ids, words, 0, n) == pieces
        for first, end in ((0, 1), (2, 7), (5, n), (n - 1, n)):
            part = decoded_pieces(text.ids, words, first, end)
            assert len(part) == end - first
            # A window may begin within a character.
            if pieces[first]:
                assert part == pieces[first:end]


@EVERY
def test_pieces_put_together_are_the_text(name: str) -> None:
    words = TOKENIZERS[name]
    split = 0
    for text in tokenize(TEXTS, words, 400):
        pieces = token_pieces(text, words)
        assert without_special(text, pieces) == text.text
        assert not any("\ufffd" in piece for piece in pieces)
        split += sum(piece == "" for piece in pieces)
    assert split > 5, "the texts have characters of several tokens"


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30))
def test_so_they_are_for_any_text(text: str) -> None:
    for name in ("gpt_2", "llama_3"):
        (tokens,) = tokenize([text], TOKENIZERS[name], 400)
        assert without_special(tokens, token_pieces(tokens, TOKENIZERS[name])) == text


@EVERY
def test_of_some_tokens_the_first_shown_has_the_character(name: str) -> None:
    words = TOKENIZERS[name]
    (text,) = tokenize(TEXTS[:1], words, 400)
    for first in range(len(text)):
        chosen = range(first, len(text))
        shown = token_pieces(text, words, chosen)
        assert len(shown) == len(chosen)
        a, b = text.offsets[first]
        if a < b:
            assert text.text[a:b] in shown[0]
            assert "".join(shown) == text.text[a - (len(shown[0]) - (b - a)) :]


@EVERY
def test_tokens_of_the_vocabulary_are_shown_by_text_or_by_name(name: str) -> None:
    words = TOKENIZERS[name]
    texts = token_texts(words, range(len(words)))
    names = words.convert_ids_to_tokens(list(range(len(words))))
    assert not any("\ufffd" in shown for shown in texts.values())
    parts = [i for i in texts if "\ufffd" in words.decode([i])]
    assert len(parts) > 100
    assert [texts[i] for i in parts] == [names[i] for i in parts]
    # Whole characters keep their text, spaces included.
    ids = words("plain words , isn't it ?", add_special_tokens=False)["input_ids"]
    assert "".join(texts[i] for i in ids).strip() == "plain words , isn't it ?"


@pytest.mark.parametrize("positions", ["all", "random"])
def test_top_features_shows_characters_not_bytes(positions: str) -> None:
    words = TOKENIZERS["random"]
    model = LanguageModel.wrap(random_hf("llama"), words, name="random")
    examples = [Example(id=str(i), text=t) for i, t in enumerate(TEXTS)]
    where = build("positions", PositionsConfig(name=positions, n=9))
    placed = resolve_positions(examples, tokenize(TEXTS, words, 400), where, words, 0)
    n = len(placed.rows)
    # One latent a position, so that each is the strongest position of one.
    latents = Latents(sparse.csr_array(np.eye(n, dtype=np.float32)), placed.rows)
    inputs = AnalysisInputs(
        latents=latents, groups=(), layer=0, texts=placed.texts, examples=examples, model=model
    )
    cfg = TopFeaturesConfig(name="top_features", top_k=n, n_texts=1)
    tables = TopFeaturesAnalyzer(cfg).analyze(inputs).tables
    for latent, part in tables["tokens"].groupby("latent"):
        whole = "".join(part["token"])
        text = TEXTS[int(part["example"].iloc[0])]
        assert whole == text if positions == "all" else "\ufffd" not in whole
        at = int(placed.rows["token_index"].iloc[int(str(latent))])
        a, b = placed.texts[int(placed.rows["text_id"].iloc[int(str(latent))])].offsets[at]
        shown = tables["top_features"].set_index("latent").loc[latent, "token"]
        assert text[a:b] in str(shown) != ""
    # rows.parquet keeps the vocabulary's names.
    assert placed.rows["token"].tolist() == words.convert_ids_to_tokens(
        placed.rows["token_id"].tolist()
    )
    counts = [len(list(g)) for _, g in itertools.groupby(placed.rows["example_id"])]
    assert len(counts) == len(TEXTS)
