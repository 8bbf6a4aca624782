"""Counts, means and histograms of sparse latents, without a dense matrix."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse


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
        total=_summed(part.indices, data, d_sae),
        maximum=maximum,
    )


def _summed(latents: np.ndarray, weights: np.ndarray, d_sae: int) -> Float[np.ndarray, " d_sae"]:
    # bincount returns integers where there are no entries.
    return np.bincount(latents, weights=weights, minlength=d_sae).astype(np.float64)


def equal_rows(units: Shaped[np.ndarray, " n_rows"], seed: int) -> Int[np.ndarray, " n_chosen"]:
    """Sorted indices of m rows of every unit, where m is the smallest number of rows of a unit.

    m rows are drawn at random from units with more, so that no statistic of a unit depends on its
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
"""Bins of a histogram including empty ones at its end; 33 to 64 are used."""


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
        self._top = [_no_examples() for _ in range(n)]
        self._sample = [_no_examples() for _ in range(n)]
        self._rng = np.random.default_rng([seed, 17])
        size = d_sae if correlate else 0
        self._sum, self._squares = np.zeros(size), np.zeros(size)
        self._products = np.zeros((n, size))

    def update(
        self,
        values: sparse.csc_array,
        texts: Int[np.ndarray, " m"],
        groups: Int[np.ndarray, " m"],
        everything: sparse.csr_array | None = None,
        rows: Int[np.ndarray, " m"] | None = None,
    ) -> None:
        """Add m rows: `values` of the chosen latents `[m, n]`, and the text and group of each row.

        Correlations need `everything`, all latents `[m, d_sae]`. `rows` are the indices of the
        rows, where they are not consecutive.
        """
        m = len(texts)
        rows = np.arange(self.n_rows, self.n_rows + m) if rows is None else rows
        lots = self._rng.random(m)
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
            self._count(i, acts, groups[at])
            self._update_examples(i, acts, rows[at], texts[at], lots[at])
        if self.correlate:
            assert everything is not None, "correlations need all latents"
            self._relate(values, everything)

    def _update_examples(
        self,
        i: int,
        acts: Float[np.ndarray, " k"],
        rows: Int[np.ndarray, " k"],
        texts: Int[np.ndarray, " k"],
        lots: Float[np.ndarray, " k"],
    ) -> None:
        """Update the examples; most activations cannot enter, and skipping them saves most work."""
        top, sample = self._top[i], self._sample[i]
        worst = top["value"].iloc[-1] if len(top) == self.n_top else 0.0
        last = sample["lot"].iloc[-1] if len(sample) == self.n_sample else 1.0
        candidates = {"value": acts, "row": rows, "text": texts, "lot": lots}
        for is_candidate, examples, choose in (
            (acts > worst, self._top, lambda t: best_of_each_text(t, self.n_top)),
            (lots < last, self._sample, lambda t: t.nsmallest(self.n_sample, "lot")),
        ):
            if is_candidate.any():
                new = {name: column[is_candidate] for name, column in candidates.items()}
                examples[i] = choose(_joined(examples[i], pd.DataFrame(new)))

    def _count(self, i: int, acts: Float[np.ndarray, " k"], groups: Int[np.ndarray, " k"]) -> None:
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

    def _relate(self, values: sparse.csc_array, everything: sparse.csr_array) -> None:
        data = everything.data.astype(np.float64)
        self._sum += np.bincount(everything.indices, weights=data, minlength=self.d_sae)
        self._squares += np.bincount(everything.indices, weights=data**2, minlength=self.d_sae)
        exact = sparse.csr_array((data, everything.indices, everything.indptr), everything.shape)
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
        own, n = int(self.latents[i]), self.n_rows
        covariance = n * self._products[i] - self._sum[own] * self._sum
        spread = np.sqrt(np.maximum(n * self._squares - self._sum**2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return covariance / (spread[own] * spread)


def _no_examples() -> pd.DataFrame:
    whole = np.zeros(0, dtype=np.int64)
    return pd.DataFrame({"value": np.zeros(0), "row": whole, "text": whole, "lot": np.zeros(0)})


def _joined(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    # pandas warns about concatenating empty tables.
    return pd.concat([first, second], ignore_index=True) if len(first) else second


def best_of_each_text(activations: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n strongest activations, one per text, strongest first; earlier rows first in ties."""
    ordered = activations.sort_values(["value", "row"], ascending=[False, True])
    return ordered.drop_duplicates("text").head(n)


def at_quantiles(
    sample: pd.DataFrame, quantiles: list[float], n: int, taken: set[int]
) -> list[tuple[float, pd.DataFrame]]:
    """For each quantile, the n activations of the sorted sample nearest to it in rank.

    No text is used twice, nor are the texts in `taken`, which is not modified.
    """
    used, at_each = set(taken), []
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
