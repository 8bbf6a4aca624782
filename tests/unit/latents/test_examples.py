"""Chosen latents over a store, in chunks, against a dense loop over all activations."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import saexp.latents as encoding
from saexp.activations import ActivationStore
from saexp.data import Example
from saexp.data.rows import Chosen, PositionTable
from saexp.data.tokenization import TokenizedText, token_pieces, tokenize
from saexp.latents.statistics import (
    N_BINS,
    Tally,
    Windows,
    at_quantiles,
    best_of_each_text,
    count_active_rows,
    latents_at,
    tally_store,
    values_at,
)
from saexp.models import Hookpoint
from saexp.saes import SparseAutoencoder
from tests.random_models import TEXTS, tokenizer
from tests.unit.latents.test_encode import store_of
from tests.unit.saes.make import D_IN, points, sae

N_ROWS = 211
CHOSEN = np.array([3, 0, 39, 17])


@pytest.fixture(
    params=[("jumprelu", 50), ("topk", 1000)], ids=["shards of 50", "one shard"], scope="module"
)
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    """(architecture of the SAE, rows of a shard)."""
    return request.param


@pytest.fixture(scope="module")
def auto(case: tuple[str, int]) -> SparseAutoencoder:
    """Latent 17 never fires."""
    autoencoder = sae(case[0])
    autoencoder.b_enc[17] = -1e6
    return autoencoder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, int]) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store")
    return store_of(folder, points(N_ROWS, D_IN), Hookpoint(3, "resid_post"), case[1])


@pytest.fixture(scope="module")
def dense(auto: SparseAutoencoder) -> np.ndarray:
    return auto.encode(points(N_ROWS, D_IN)).double().numpy()


TEXT_OF = np.repeat(np.arange(60), 4)[:N_ROWS]
GROUP_OF = np.arange(N_ROWS) % 3


def tallied(store: ActivationStore, auto: SparseAutoencoder, **options: object) -> Tally:
    tally = Tally(CHOSEN, d_sae=auto.d_sae, n_groups=3, n_top=7, **options)  # pyright: ignore
    return tally_store(store, auto, TEXT_OF.__getitem__, GROUP_OF.__getitem__, tally)


@pytest.mark.parametrize(("chunk_rows", "correlate"), [(17, True), (10_000, False)])
def test_numbers_and_histograms_equal_dense_ones(
    store: ActivationStore,
    auto: SparseAutoencoder,
    dense: np.ndarray,
    chunk_rows: int,
    correlate: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * chunk_rows)
    tally = tallied(store, auto, correlate=correlate)
    assert tally.n_rows == N_ROWS
    assert tally.rows_of_group.tolist() == np.bincount(GROUP_OF).tolist()
    for i, latent in enumerate(CHOSEN):
        values = dense[:, latent]
        assert tally.active[i].tolist() == [(values[g == GROUP_OF] > 0).sum() for g in range(3)]
        assert tally.total[i] == pytest.approx(values.sum(), rel=1e-5)
        assert tally.maximum[i] == pytest.approx(values.max(), rel=1e-5)
        histogram = tally.histogram(i)
        if latent == 17:
            assert histogram.counts.shape == (3, 0)
            continue
        n_bins = histogram.counts.shape[1]
        assert N_BINS / 2 < n_bins <= N_BINS
        assert np.log2(histogram.width) % 1 == 0
        edges = np.arange(n_bins + 1) * histogram.width
        for g in range(3):
            group_values = values[(g == GROUP_OF) & (values > 0)]
            assert histogram.counts[g].tolist() == np.histogram(group_values, edges)[0].tolist()


@pytest.mark.parametrize("chunk_rows", [23, 10_000])
def test_the_strongest_examples_are_those_of_a_dense_sort_one_a_text(
    store: ActivationStore,
    auto: SparseAutoencoder,
    dense: np.ndarray,
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * chunk_rows)
    tally = tallied(store, auto)
    for i, latent in enumerate(CHOSEN):
        order = np.argsort(-dense[:, latent], kind="stable")
        seen, expected = set(), []
        for row in order[dense[order, latent] > 0]:
            if TEXT_OF[row] not in seen:
                seen.add(TEXT_OF[row])
                expected.append(int(row))
        top = tally.top(i)
        assert top["row"].tolist() == expected[:7]
        np.testing.assert_allclose(top["value"], dense[expected[:7], latent], rtol=1e-5)
        assert (top["text"].to_numpy() == TEXT_OF[expected[:7]]).all()


def test_a_small_sample_does_not_depend_on_chunks_and_a_large_one_is_all(
    store: ActivationStore,
    auto: SparseAutoencoder,
    dense: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    for chunk_rows in (17, 40, 10_000):
        monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * chunk_rows)
        tally = tallied(store, auto, n_sample=9, seed=4)
        drawn.append([tally.sample(i)["row"].tolist() for i in range(len(CHOSEN))])
    assert drawn[0] == drawn[1] == drawn[2]
    tally = tallied(store, auto)
    for i, latent in enumerate(CHOSEN):
        assert set(tally.sample(i)["row"]) == set(np.flatnonzero(dense[:, latent]).tolist())
        assert tally.sample(i)["value"].is_monotonic_increasing


def test_a_sample_is_even() -> None:
    """Every one of 40 firings is drawn about as often as any other: 20 of 40 in 50 seeds."""
    counts = np.zeros(40)
    values = sparse.csc_array(np.linspace(1, 2, 40)[:, None])
    where = np.arange(40)
    for seed in range(50):
        tally = Tally(np.array([0]), d_sae=1, n_sample=20, correlate=False, seed=seed)
        for part in (slice(0, 7), slice(7, 40)):
            chunk = sparse.csc_array(values[part])
            tally.update(chunk, where[part], np.zeros(len(where[part]), dtype=np.int64))
        counts[tally.sample(0)["row"]] += 1
    # 25 expected, standard deviation 3.5.
    assert counts.min() > 11
    assert counts.max() < 39


@pytest.mark.parametrize("chunk_rows", [17, 10_000])
def test_correlations_are_numpys(
    store: ActivationStore,
    auto: SparseAutoencoder,
    dense: np.ndarray,
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * chunk_rows)
    tally = tallied(store, auto)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(dense.T)
    for i, latent in enumerate(CHOSEN):
        np.testing.assert_allclose(tally.correlations_of(i), expected[latent], atol=1e-5)
    assert np.isnan(tally.correlations_of(3)).all()


@pytest.mark.parametrize(("chunk_rows", "correlate"), [(17, True), (10_000, False)])
def test_rows_of_high_norm_are_as_if_they_were_not_there(
    store: ActivationStore,
    auto: SparseAutoencoder,
    dense: np.ndarray,
    chunk_rows: int,
    correlate: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * chunk_rows)
    ordinary = np.ones(N_ROWS, dtype=bool)
    # The rows where the chosen latents are strongest.
    ordinary[dense[:, CHOSEN].argmax(0)] = False
    tally = Tally(CHOSEN, d_sae=auto.d_sae, n_groups=3, n_top=7, correlate=correlate)
    tally_store(store, auto, TEXT_OF.__getitem__, GROUP_OF.__getitem__, tally, ordinary)
    counts = count_active_rows(store, auto, ordinary)
    assert counts.tolist() == (dense[ordinary] != 0).sum(0).tolist()
    assert tally.n_rows == ordinary.sum()
    for i, latent in enumerate(CHOSEN):
        values = np.where(ordinary, dense[:, latent], 0)
        assert tally.maximum[i] == pytest.approx(values.max(), rel=1e-5)
        assert tally.active[i].sum() == (values != 0).sum()
        best = tally.top(i)
        np.testing.assert_allclose(best["value"], values[best["row"]], rtol=1e-5)
        if values.any():
            assert best["row"].iloc[0] == values.argmax()
        assert ordinary[tally.sample(i)["row"]].all()


def test_counts_and_chosen_values_equal_dense_ones(
    store: ActivationStore, auto: SparseAutoencoder, dense: np.ndarray
) -> None:
    assert count_active_rows(store, auto).tolist() == (dense != 0).sum(0).tolist()
    wanted = {3: np.array([0, 210, 49, 50]), 0: np.array([7]), 39: np.zeros(0, dtype=np.int64)}
    values = values_at(store, auto, wanted)
    for latent, rows in wanted.items():
        np.testing.assert_allclose(values[latent], dense[rows, latent], rtol=1e-5, atol=1e-6)


def test_latents_at_some_rows_are_those_of_all_rows(
    store: ActivationStore, auto: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 4 * auto.d_sae * 10)
    rows = pd.DataFrame({"row": np.arange(N_ROWS)})
    every, _ = encoding.encode_store(store, auto, rows)
    for chosen in (np.array([0, 9, 10, 11, 150, N_ROWS - 1]), np.zeros(0, dtype=np.int64)):
        latents = latents_at(store, auto, rows, chosen)
        assert latents.rows["row"].tolist() == chosen.tolist()
        np.testing.assert_allclose(latents.csr.toarray(), every.csr[chosen].toarray(), rtol=1e-6)


def test_examples_at_quantiles_are_the_nearest_in_rank_and_new() -> None:
    sample = pd.DataFrame({"value": np.arange(101.0), "row": np.arange(101), "text": range(101)})
    sampled = at_quantiles(sample, [0.9, 0.5], 2, {90})
    assert [(q, part["row"].tolist()) for q, part in sampled] == [(0.9, [91, 89]), (0.5, [50, 49])]
    (again,) = at_quantiles(sample.assign(text=1), [0.5], 3, set())
    assert len(again[1]) == 1
    (none,) = at_quantiles(sample.head(0), [0.5], 3, set())
    assert len(none[1]) == 0


def test_equal_values_come_in_the_order_of_rows() -> None:
    ties = pd.DataFrame({"value": [1.0, 2.0, 2.0, 1.0], "row": [0, 3, 1, 2], "text": [0, 1, 1, 2]})
    assert best_of_each_text(ties, 5)["row"].tolist() == [1, 0, 2]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_pieces_put_together_are_the_text(trim_offsets: bool) -> None:
    words = tokenizer(trim_offsets)
    for text in tokenize(TEXTS, words, 60):
        pieces = token_pieces(text, words)
        assert pieces[0] == "<bos>"
        assert TEXTS[[t == text.text for t in TEXTS].index(True)].startswith("".join(pieces[1:]))
        if not text.truncated:
            assert "".join(pieces[1:]) == text.text


def rows_of(texts: list[TokenizedText], every: int) -> PositionTable:
    """Every n-th token of each text."""
    chosen = [
        Chosen(n, Example(id=f"e{n}", text=text.text), n, list(range(1, len(text), every)), 0)
        for n, text in enumerate(texts)
    ]
    return PositionTable(chosen, texts, [], tokenizer())


@pytest.mark.parametrize("every", [1, 3])
def test_a_window_holds_the_tokens_around_a_row_and_the_rows_they_have(every: int) -> None:
    words = tokenizer()
    texts = tokenize(TEXTS, words, 60)
    positions = rows_of(texts, every)
    rows, windows = positions.rows, Windows(positions, before=4, after=2)
    for row, about in enumerate(rows.to_dict("records")):
        text, token = texts[about["text_id"]], about["token_index"]
        window = windows.around(row)
        first, after = max(0, token - 4), min(len(text), token + 3)
        assert window.tokens == token_pieces(text, words)[first:after]
        assert window.rows[window.peak] == row
        assert first + window.peak == token
        assert window.cut == (first > 0, after < len(text))
        for offset, at in enumerate(window.rows):
            looked = first + offset > 0 and (first + offset - 1) % every == 0
            assert (at is not None) == looked
            if at is not None:
                assert rows.iloc[at]["token_index"] == first + offset
                assert rows.iloc[at]["example_id"] == about["example_id"]
