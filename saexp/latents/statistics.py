"""Statistics of latents accumulated over rows, and their maximally activating examples."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse
from torch import Tensor

from saexp.activations import ActivationStore
from saexp.context import progress
from saexp.data.rows import PositionRows
from saexp.latents import Latents, chunk_rows
from saexp.saes import SAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Statistics of every latent over a set of rows, arrays `[d_sae]`."""

    n: int
    """Number of rows."""
    active: Int[np.ndarray, " d_sae"]
    """Number of rows where the latent is above `threshold`."""
    total: Float[np.ndarray, " d_sae"]
    maximum: Float[np.ndarray, " d_sae"]

    @property
    def frequency(self) -> Float[np.ndarray, " d_sae"]:
        """Fraction of rows where the latent is active."""
        return self.active / max(self.n, 1)

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Mean over all rows, including zeros."""
        return self.total / max(self.n, 1)


def moments(
    csr: sparse.csr_array, chosen: Bool[np.ndarray, " n_rows"], threshold: float = 1e-6
) -> Moments:
    """Moments over the chosen rows; a latent is active above `threshold` (Ferrando et al. 2024)."""
    part = csr[chosen]
    d_sae = part.shape[1]
    data = part.data.astype(np.float64)
    maximum = np.zeros(d_sae)
    np.maximum.at(maximum, part.indices, data)
    return Moments(
        n=part.shape[0],
        active=np.bincount(part.indices[data > threshold], minlength=d_sae),
        total=_sum_by_latent(part.indices, data, d_sae),
        maximum=maximum,
    )


def _sum_by_latent(
    latents: np.ndarray, weights: np.ndarray, d_sae: int
) -> Float[np.ndarray, " d_sae"]:
    # bincount returns integers where there are no entries.
    return np.bincount(latents, weights=weights, minlength=d_sae).astype(np.float64)


def equal_rows(units: Shaped[np.ndarray, " n_rows"], seed: int) -> Int[np.ndarray, " n_chosen"]:
    """Sorted indices of m rows of every unit, where m is the smallest number of rows of a unit.

    From units with more rows, m are drawn at random, so that no statistic of a unit depends on its
    number of rows.

    >>> equal_rows(np.array(["a", "a", "b", "b"]), seed=0)
    array([0, 1, 2, 3])
    """
    if not len(units):
        return np.zeros(0, dtype=np.int64)
    _, of_row, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = np.lexsort((np.random.default_rng([seed, 29]).random(len(units)), of_row))
    position = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[position < counts.min()])


def by_unit(
    csr: sparse.csr_array, units: np.ndarray
) -> tuple[sparse.csr_array, Int[np.ndarray, " n_units"]]:
    """(means over the rows of each unit `[n_units, d_sae]`, first row of each unit), in order of
    first appearance."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    of_row = rank[inverse]
    counts = np.bincount(of_row)
    averaging = sparse.csr_array(
        (1 / counts[of_row], (of_row, np.arange(len(units)))), shape=(len(counts), len(units))
    )
    return sparse.csr_array(averaging @ csr), first[order]


def active_quantile(
    csr: sparse.csr_array, latents: np.ndarray, q: float
) -> Float[np.ndarray, " n"]:
    """Quantile of each latent's nonzero values; 0 for inactive latents."""
    csc = sparse.csc_array(csr[:, latents])
    parts = [csc.data[csc.indptr[i] : csc.indptr[i + 1]] for i in range(len(latents))]
    return np.array([float(np.quantile(p, q)) if len(p) else 0.0 for p in parts])


N_BINS = 64
"""Bins of a histogram, including empty ones at its end; 33 to 64 are in use."""


@dataclass(frozen=True)
class Histogram:
    """Nonzero activations of one latent, in bins of equal width from 0."""

    width: float
    """A power of two."""
    counts: Int[np.ndarray, "n_groups n_bins"]


class Tally:
    """Statistics and examples of chosen latents, accumulated over a stream of rows.

    Call `update` with every row once, in order, before reading results. Groups are numbered from 0
    to `n_groups` - 1.
    """

    def __init__(
        self,
        latents: Int[np.ndarray, " n"],
        *,
        d_sae: int,
        n_groups: int = 1,
        n_top: int = 10,
        n_sample: int = 1000,
        correlate: bool = True,
        seed: int = 0,
    ) -> None:
        n = len(latents)
        self.latents, self.d_sae, self.n_top, self.n_sample = latents, d_sae, n_top, n_sample
        self.correlate = correlate
        self.n_rows = 0
        self.rows_of_group = np.zeros(n_groups, dtype=np.int64)
        self.active = np.zeros((n, n_groups), dtype=np.int64)
        self.total, self.maximum = np.zeros(n), np.zeros(n)
        self._bin_width = np.zeros(n)
        self._bins = np.zeros((n, n_groups, N_BINS), dtype=np.int64)
        self._top = [_empty_examples() for _ in range(n)]
        self._sample = [_empty_examples() for _ in range(n)]
        self._rng = np.random.default_rng([seed, 17])
        size = d_sae if correlate else 0
        self._sum, self._squares = np.zeros(size), np.zeros(size)
        self._products = np.zeros((n, size))

    def update(
        self,
        values: sparse.csc_array,
        texts: Int[np.ndarray, " m"],
        groups: Int[np.ndarray, " m"],
        all_latents: sparse.csr_array | None = None,
        rows: Int[np.ndarray, " m"] | None = None,
    ) -> None:
        """Add m rows: `values` of the chosen latents `[m, n]`, and the text and group of each row.

        Correlations need `all_latents`, `[m, d_sae]`. `rows` are the indices of the rows, where
        these are not consecutive.
        """
        m = len(texts)
        rows = np.arange(self.n_rows, self.n_rows + m) if rows is None else rows
        priorities = self._rng.random(m)
        self.n_rows += m
        self.rows_of_group += np.bincount(groups, minlength=len(self.rows_of_group))
        for i in range(len(self.latents)):
            inside = slice(int(values.indptr[i]), int(values.indptr[i + 1]))
            at, acts = values.indices[inside], values.data[inside].astype(np.float64)
            if not len(at):
                continue
            self.active[i] += np.bincount(groups[at], minlength=self.active.shape[1])
            self.total[i] += acts.sum()
            self.maximum[i] = max(self.maximum[i], float(acts.max()))
            self._update_histogram(i, acts, groups[at])
            self._update_examples(i, acts, rows[at], texts[at], priorities[at])
        if self.correlate:
            assert all_latents is not None, "correlations need all latents"
            self._update_products(values, all_latents)

    def _update_examples(
        self,
        i: int,
        acts: Float[np.ndarray, " k"],
        rows: Int[np.ndarray, " k"],
        texts: Int[np.ndarray, " k"],
        priorities: Float[np.ndarray, " k"],
    ) -> None:
        """Update the top examples and the sample, which has the rows of smallest priority.

        Most activations enter neither, and skipping these early saves most of the work.
        """
        top, sample = self._top[i], self._sample[i]
        worst = top["value"].iloc[-1] if len(top) == self.n_top else 0.0
        last = sample["priority"].iloc[-1] if len(sample) == self.n_sample else 1.0
        candidates = {"value": acts, "row": rows, "text": texts, "priority": priorities}
        for is_candidate, examples, choose in (
            (acts > worst, self._top, lambda t: best_of_each_text(t, self.n_top)),
            (priorities < last, self._sample, lambda t: t.nsmallest(self.n_sample, "priority")),
        ):
            if is_candidate.any():
                new = {name: column[is_candidate] for name, column in candidates.items()}
                examples[i] = choose(_concatenate(examples[i], pd.DataFrame(new)))

    def _update_histogram(
        self, i: int, acts: Float[np.ndarray, " k"], groups: Int[np.ndarray, " k"]
    ) -> None:
        # The smallest power of two with which the maximum is within the bins.
        width = float(np.ldexp(1.0, int(np.frexp(self.maximum[i] / N_BINS)[1])))
        if width > self._bin_width[i] > 0:
            # Merge this many neighbouring bins, at most all of them.
            step = min(int(width / self._bin_width[i]), N_BINS)
            merged = self._bins[i].reshape(-1, N_BINS // step, step).sum(-1)
            self._bins[i] = 0
            self._bins[i, :, : N_BINS // step] = merged
        self._bin_width[i] = width
        np.add.at(self._bins[i], (groups, (acts / width).astype(np.int64)), 1)

    def _update_products(self, values: sparse.csc_array, all_latents: sparse.csr_array) -> None:
        """Add to the sums, squares and products that `correlations_of` needs."""
        data, indices = all_latents.data.astype(np.float64), all_latents.indices
        self._sum += np.bincount(indices, weights=data, minlength=self.d_sae)
        self._squares += np.bincount(indices, weights=data**2, minlength=self.d_sae)
        exact = sparse.csr_array((data, indices, all_latents.indptr), all_latents.shape)
        self._products += (values.astype(np.float64).T @ exact).toarray()

    def histogram(self, i: int) -> Histogram:
        """Histogram of the i-th chosen latent; without bins where it is inactive."""
        width = float(self._bin_width[i])
        used = int(self.maximum[i] / width) + 1 if width else 0
        return Histogram(width, self._bins[i, :, :used])

    def top(self, i: int) -> pd.DataFrame:
        """Maximally activating rows of the i-th chosen latent, one per text, strongest first.

        Columns `value`, `row` and `text`.
        """
        return self._top[i][["value", "row", "text"]].reset_index(drop=True)

    def sample(self, i: int) -> pd.DataFrame:
        """Uniform sample of (up to `n_sample`) rows where the latent is active, weakest first."""
        ordered = self._sample[i].sort_values(["value", "row"])
        return ordered[["value", "row", "text"]].reset_index(drop=True)

    def correlations_of(self, i: int) -> Float[np.ndarray, " d_sae"]:
        """Pearson correlation of the i-th chosen latent with all latents, over all rows.

        NaN for latents that do not vary.
        """
        assert self.correlate, "constructed without correlations"
        latent, n = int(self.latents[i]), self.n_rows
        covariance = n * self._products[i] - self._sum[latent] * self._sum
        spread = np.sqrt(np.maximum(n * self._squares - self._sum**2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return covariance / (spread[latent] * spread)


def _empty_examples() -> pd.DataFrame:
    integers, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    return pd.DataFrame({"value": floats, "row": integers, "text": integers, "priority": floats})


def _concatenate(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    # pandas warns about concatenating empty tables.
    return pd.concat([first, second], ignore_index=True) if len(first) else second


def best_of_each_text(activations: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n strongest activations, one per text, strongest first; earlier rows first in ties."""
    ordered = activations.sort_values(["value", "row"], ascending=[False, True])
    return ordered.drop_duplicates("text").head(n)


def at_quantiles(
    sample: pd.DataFrame, quantiles: list[float], n: int, excluded: set[int]
) -> list[tuple[float, pd.DataFrame]]:
    """For each quantile, the n activations of the sorted sample nearest to it in rank.

    No text is used twice, and the texts in `excluded` are not used.
    """
    used, at_each = set(excluded), []
    for quantile in quantiles:
        distance = np.abs(np.arange(len(sample)) - quantile * (len(sample) - 1))
        chosen: list[int] = []
        for index in np.argsort(distance, kind="stable"):
            text = int(sample["text"].iloc[index])
            if len(chosen) == n:
                break
            if text not in used:
                used.add(text)
                chosen.append(int(index))
        at_each.append((quantile, sample.iloc[chosen].sort_values("value", ascending=False)))
    return at_each


def _sparse(acts: Float[Tensor, "m k"]) -> sparse.csr_array:
    """The activations as sparse float32, without entries for inactive latents."""
    where = acts.nonzero()
    counts = torch.bincount(where[:, 0], minlength=len(acts)).cumsum(0).cpu().numpy()
    values = acts[where[:, 0], where[:, 1]].float().cpu().numpy()
    indptr = np.concatenate([np.zeros(1, dtype=np.int64), counts])
    return sparse.csr_array((values, where[:, 1].cpu().numpy(), indptr), shape=tuple(acts.shape))


def _encoded(store: ActivationStore, sae: SAE) -> Iterator[tuple[int, sparse.csr_array]]:
    """(index of the first row, all latents `[m, d_sae]`) of each chunk."""
    with progress(store.n_rows, "encoding", "row") as bar:
        for first, acts in store.chunks(sae.hookpoint, chunk_rows(sae)):
            x = acts.to(device=sae.W_dec.device, dtype=torch.float32)
            yield first, _sparse(sae.encode(x))
            bar.update(len(x))


OfRows = Callable[[Int[np.ndarray, " m"]], Int[np.ndarray, " m"]]
"""A number for each of these rows."""


@torch.inference_mode()
def tally_store(
    store: ActivationStore,
    sae: SAE,
    texts: OfRows,
    groups: OfRows,
    tally: Tally,
    ordinary: Bool[np.ndarray, " n_rows"] | None = None,
) -> Tally:
    """Update `tally` with all (ordinary) rows of the store.

    Without correlations, only the chosen latents are encoded.
    """
    started = time.perf_counter()
    chosen = [int(f) for f in tally.latents]
    if tally.correlate:
        for rows, csr in encoded_rows(store, sae, ordinary):
            values = sparse.csc_array(csr[:, chosen])
            tally.update(values, texts(rows), groups(rows), csr, rows)
    else:
        with progress(store.n_rows, "encoding", "row") as bar:
            for first, acts in store.chunks(sae.hookpoint, chunk_rows(sae)):
                rows = _ordinary_rows(first, len(acts), ordinary)
                x = acts[torch.from_numpy(rows - first)]
                x = x.to(device=sae.W_dec.device, dtype=torch.float32)
                values = sparse.csc_array(_sparse(sae.encode_latents(x, chosen)))
                tally.update(values, texts(rows), groups(rows), rows=rows)
                bar.update(len(acts))
    seconds = time.perf_counter() - started
    log.info("%d latents over %d rows, %.1f s", len(chosen), tally.n_rows, seconds)
    return tally


def _ordinary_rows(
    first: int, n: int, ordinary: Bool[np.ndarray, " n_rows"] | None
) -> Int[np.ndarray, " m"]:
    """Indices of the (ordinary) rows among the `n` rows from `first` on."""
    rows = np.arange(first, first + n)
    return rows if ordinary is None else rows[ordinary[rows]]


def encoded_rows(
    store: ActivationStore, sae: SAE, ordinary: Bool[np.ndarray, " n_rows"] | None = None
) -> Iterator[tuple[Int[np.ndarray, " m"], sparse.csr_array]]:
    """(indices of (ordinary) rows, all latents `[m, d_sae]` there) of each chunk, in order."""
    for first, csr in _encoded(store, sae):
        n = len(csr.indptr) - 1
        rows = _ordinary_rows(first, n, ordinary)
        yield rows, csr if len(rows) == n else csr[rows - first]


@torch.inference_mode()
def count_active_rows(
    store: ActivationStore, sae: SAE, ordinary: Bool[np.ndarray, " n_rows"] | None = None
) -> Int[np.ndarray, " d_sae"]:
    """Number of (ordinary) rows on which each latent is active."""
    counts = np.zeros(sae.d_sae, dtype=np.int64)
    for _, csr in encoded_rows(store, sae, ordinary):
        counts += np.bincount(csr.indices, minlength=sae.d_sae)
    return counts


@torch.inference_mode()
def latents_at(
    store: ActivationStore, sae: SAE, rows: pd.DataFrame, chosen: Int[np.ndarray, " k"]
) -> Latents:
    """Latents of the rows at the sorted indices `chosen`; only these are held in memory."""
    assert len(rows) == store.n_rows, "rows table and store differ in length"
    parts = [sparse.csr_array((0, sae.d_sae), dtype=np.float32)]
    for first, csr in _encoded(store, sae):
        inside = chosen[(chosen >= first) & (chosen < first + len(csr.indptr) - 1)]
        parts.append(csr[inside - first])
    stacked = sparse.csr_array(sparse.vstack(parts, format="csr"))
    return Latents(stacked, rows.iloc[chosen].reset_index(drop=True))


@torch.inference_mode()
def values_at(
    store: ActivationStore, sae: SAE, rows_of: Mapping[int, Int[np.ndarray, " k"]]
) -> dict[int, Float[np.ndarray, " k"]]:
    """Latent -> its activations at the rows `rows_of[latent]`; no other rows are read."""
    latents = list(rows_of)
    column = {f: i for i, f in enumerate(latents)}
    rows = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *rows_of.values()]))
    values = {f: np.zeros(len(r), dtype=np.float32) for f, r in rows_of.items()}
    step = chunk_rows(sae)
    for first, acts in store.chunks(sae.hookpoint, 1 << 16):
        inside = rows[(rows >= first) & (rows < first + len(acts))]
        for start in range(0, len(inside), step):
            part = inside[start : start + step]
            x = acts[torch.from_numpy(part - first)]
            x = x.to(device=sae.W_dec.device, dtype=torch.float32)
            encoded = sae.encode_latents(x, latents).float().cpu().numpy()
            for latent, requested in rows_of.items():
                positions = np.flatnonzero((requested >= part[0]) & (requested <= part[-1]))
                in_part = np.searchsorted(part, requested[positions])
                values[latent][positions] = encoded[in_part, column[latent]]
    return values


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text."""

    tokens: list[str]
    rows: list[int | None]
    """Row of each token; None for tokens that are not analysed, and at high-norm positions."""
    peak: int
    """Index in `tokens` of the token that the window surrounds."""
    cut: tuple[bool, bool]
    """Whether the text continues on the left and on the right."""


class Windows:
    """Windows around a run's rows."""

    def __init__(
        self,
        positions: PositionRows,
        *,
        before: int,
        after: int,
        shown: Bool[np.ndarray, " n_rows"] | None = None,
    ) -> None:
        """Tokens whose row is not `shown` have the row None in a window."""
        self.positions, self.before, self.after = positions, before, after
        self._shown = shown

    def around(self, row: int) -> Window:
        """The row's token with `before` tokens before it and `after` tokens after it."""
        positions = self.positions
        # Rows of one example are consecutive.
        low, high = max(0, row - self.before), min(positions.n_rows, row + self.after + 1)
        near, numbers = np.arange(low, high), positions.numbers(low, high)
        text, token = (int(column[row - low]) for column in numbers[:2])
        n_tokens = len(positions.ids(text))
        first, end = max(0, token - self.before), min(n_tokens, token + self.after + 1)
        examples = positions.examples(near)
        inside = examples == examples[row - low]
        if self._shown is not None:
            inside &= self._shown[near]
        row_of_token = dict(
            zip(numbers.token_index[inside].tolist(), near[inside].tolist(), strict=True)
        )
        return Window(
            tokens=positions.pieces(text, first, end),
            rows=[row_of_token.get(i) for i in range(first, end)],
            peak=token - first,
            cut=(first > 0, end < n_tokens),
        )
