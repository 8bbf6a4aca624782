"""The strongest latents of a text, against a loop over the dense latents."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.analysis import AnalysisInputs
from saexp.analysis.top_latents import TopFeaturesAnalyzer
from saexp.config import TopFeaturesConfig
from saexp.context import ObjectCache
from saexp.data.tokenization import token_texts
from saexp.errors import ConfigError
from saexp.latents import Latents, encode_store
from saexp.pipeline.collect import collect_examples
from saexp.pipeline.objects import language_model, sparse_autoencoder
from saexp.results import Result

TEXTS = ["The player Fenlet Baszad scored twice.", "When Laura went to the shops, Tom slept."]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> AnalysisInputs:
    folder: Path = tmp_path_factory.mktemp("texts")
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    cfg = saexp.compose(
        ["dataset=text", f"dataset.path={folder}/texts.txt", "positions=all", "layer=1"]
        + [f"cache_dir={folder}/cache", "device=cpu"]
    )
    objects = ObjectCache()
    model = language_model(cfg, objects)
    sae = sparse_autoencoder(cfg, model, objects)
    collected = collect_examples(cfg, model, [sae.hookpoint])
    latents, _ = encode_store(collected.store, sae, collected.placement.rows)
    texts = collected.placement.texts
    return AnalysisInputs(latents=latents, groups=(), layer=1, texts=texts, model=model, sae=sae)


def top_features(inputs: AnalysisInputs, **options: object) -> Result:
    cfg = TopFeaturesConfig(name="top_features", **options)  # type: ignore[arg-type]
    return TopFeaturesAnalyzer(cfg).analyze(inputs)


@pytest.fixture(scope="module")
def dense(inputs: AnalysisInputs) -> np.ndarray:
    """Every latent at every token, from the model's own hidden states."""
    model, sae = inputs.model, inputs.sae
    assert model is not None and sae is not None
    parts = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            stream = model.hf(ids, output_hidden_states=True).hidden_states[2][0]
            parts.append(sae.encode(stream[1:]))
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("by", ["max", "mean", "frequency"])
def test_against_a_loop(inputs: AnalysisInputs, dense: np.ndarray, by: str) -> None:
    table = top_features(inputs, by=by, top_k=7).tables["top_features"]
    numbers = []
    for latent in range(dense.shape[1]):
        values = dense[:, latent]
        strengths = {"max": values.max(), "mean": values.mean(), "frequency": (values > 0).mean()}
        numbers.append((-strengths[by], latent, strengths))
    best = sorted(numbers, key=lambda n: (round(n[0], 6), n[1]))[:7]
    assert table["rank"].tolist() == list(range(1, 8))
    for row, (_, latent, strengths) in zip(table.to_dict("records"), best, strict=True):
        assert row["latent"] == latent
        for name, value in strengths.items():
            assert row[name] == pytest.approx(value, rel=1e-4)
        assert row["n_active"] == (dense[:, latent] > 0).sum()


def test_tokens_are_shown_where_they_are(inputs: AnalysisInputs, dense: np.ndarray) -> None:
    result = top_features(inputs, top_k=3, n_texts=1)
    tokens, table = result.tables["tokens"], result.tables["top_features"]
    assert list(tokens) == ["layer", "latent", "example", "token", "token_index", "value"]
    lengths = [len(inputs.model.tokenizer(t)["input_ids"]) - 1 for t in TEXTS]  # type: ignore[union-attr]
    for row in table.to_dict("records"):
        latent_tokens = tokens[tokens["latent"] == row["latent"]]
        peak = int(dense[:, row["latent"]].argmax())
        which = int(peak >= lengths[0])
        assert set(latent_tokens["example"]) == {str(which + 1)} == {row["example"]}
        assert "".join(latent_tokens["token"]) == TEXTS[which]
        part = dense[: lengths[0]] if which == 0 else dense[lengths[0] :]
        np.testing.assert_allclose(
            latent_tokens["value"], part[:, row["latent"]], rtol=1e-6, atol=1e-4
        )
        assert (
            latent_tokens["token"].iloc[int(latent_tokens["value"].to_numpy().argmax())]
            == row["token"]
        )


def test_metrics_name_the_first(inputs: AnalysisInputs) -> None:
    result = top_features(inputs, by="mean")
    first = result.tables["top_features"].iloc[0]
    assert result.metrics["top_features/best_latent"] == first["latent"]
    assert result.metrics["top_features/best_mean"] == pytest.approx(first["mean"])
    assert np.isnan(first["background_freq"])


def test_neutral_text_is_set_beside(inputs: AnalysisInputs) -> None:
    beside = AnalysisInputs(
        latents=inputs.latents, groups=(), layer=1, background=inputs.latents, model=inputs.model
    )
    table = top_features(beside).tables["top_features"]
    np.testing.assert_allclose(table["background_freq"], table["frequency"])


def test_fewer_latents_than_requested_are_reported(inputs: AnalysisInputs) -> None:
    csr = inputs.latents.csr.copy()
    csr.data[:] = 0
    csr.eliminate_zeros()
    silent = AnalysisInputs(latents=Latents(csr, inputs.latents.rows), groups=(), layer=1)
    result = top_features(silent)
    assert len(result.tables["top_features"]) == 0
    assert list(result.tables["tokens"])[:2] == ["layer", "latent"]
    assert result.metrics["top_features/best_latent"] is None
    assert "no latent is active at the analysed positions" in result.notes[0]
    many = top_features(inputs, top_k=250)
    assert any("only" in n and "latents are active" in n for n in many.notes)


def test_invalid_settings_are_refused() -> None:
    for word, message in (
        ("analyzer.by=maximum", "analyzer.by=maximum is not known; did you mean max"),
        ("analyzer.topk=3", "no key 'analyzer.topk'; did you mean analyzer.top_k"),
        ("analyzer.top_k=many", "top_k=many is not a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            saexp.compose(["analyzer=top_features", word])


def test_a_tokens_text_keeps_its_space(inputs: AnalysisInputs) -> None:
    assert inputs.model is not None
    words = inputs.model.tokenizer
    ids = words("The player Fenlet", add_special_tokens=False)["input_ids"]
    texts = token_texts(words, ids)
    assert "".join(texts[i] for i in ids) == "The player Fenlet"

    class Pieces:
        """Decodes one token as SentencePiece does: without the space before it."""

        def decode(self, ids: list[int], **_: object) -> str:
            return {1: "the", 2: "s"}[ids[0]]

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return {1: "▁the", 2: "s"}[token_id]

    assert token_texts(Pieces(), [1, 2, 2]) == {1: " the", 2: "s"}
    assert isinstance(inputs.latents.rows, pd.DataFrame)
