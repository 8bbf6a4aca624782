"""Checks of a contrast: power, placebo trials, and a baseline from the surface of the prompts."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.analysis import Split
from saexp.config import AnalyzerConfig
from saexp.context import ObjectCache, progress
from saexp.data.tokenization import TokenizedText
from saexp.digests import digest_of
from saexp.errors import counted
from saexp.results import Result, is_above_chance, p_value_words
from saexp.stats.separation import stratified_rank_test, stratum_weights
from saexp.stats.significance import claim_fraction, detectable_auroc

log = logging.getLogger(__name__)


if TYPE_CHECKING:
    from saexp.stats.separation import Fitted

WINDOW = 64
"""Number of tokens up to the position (included) from which n-grams are taken."""
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse L2 penalties among which cross-validation chooses."""
MAX_TRAIN = 5000
"""Limit on the number of train rows."""
CHUNK = 4096
"""Rows of one chunk of scoring, because the n-grams of all rows may not fit in memory."""
_MAX_FEATURES = 20_000
"""Limit on the n-grams of a block; the most frequent ones on train are used."""
_TOKENS, _CHARACTERS = range(1, 3), range(2, 5)
_START, _END = "\x02", "\x03"
"""Markers of the ends of a name, so that its first and last characters are features."""


@dataclass(frozen=True)
class ReadText:
    """The text that precedes the position of a row, which is included."""

    ids: tuple[int, ...]
    """Tokens up to and including the position."""
    text: str
    """Their characters."""
    entity_ids: tuple[int, ...]
    """Tokens of the last mention of the entity, up to the position."""
    entity: str
    """Characters of this mention, up to the position."""


def read_texts(rows: pd.DataFrame, texts: Sequence[TokenizedText]) -> list[ReadText]:
    """The text before each row's position; `rows` has text_id, token_index and entity."""
    columns = zip(rows["text_id"], rows["token_index"], rows["entity"], strict=True)
    return [
        _read(texts[int(text)], int(index), entity if isinstance(entity, str) else "")
        for text, index, entity in columns
    ]


def _read(tokens: TokenizedText, index: int, entity: str) -> ReadText:
    offsets = tokens.offsets[: index + 1]
    # Special tokens outside the text have the offsets (0, 0).
    end = max(b for _, b in offsets)
    begins = tokens.text.rfind(entity, 0, end - 1 + len(entity)) if entity else -1
    stops = begins + len(entity)
    inside = [i for i, (a, b) in enumerate(offsets) if begins < b and a < stops]
    return ReadText(
        ids=tokens.ids[: index + 1],
        text=tokens.text[:end],
        entity_ids=tuple(tokens.ids[i] for i in inside) if begins >= 0 else (),
        entity=tokens.text[begins : min(end, stops)] if begins >= 0 else "",
    )


def token_counts(texts: Sequence[TokenizedText]) -> Counter[int]:
    """Number of occurrences of each token id in the texts."""
    return Counter(i for text in texts for i in text.ids)


@dataclass(frozen=True)
class SurfaceBaseline:
    """The fitted baseline."""

    features: "_Features"
    fitted: "Fitted"

    def score(self, read: Sequence[ReadText]) -> Float[np.ndarray, " n"]:
        """Log odds of the first group, computed in chunks of rows."""
        parts = [
            np.asarray(self.fitted.score(self.features(read[i : i + CHUNK])), dtype=np.float64)
            for i in range(0, len(read), CHUNK)
        ]
        return np.concatenate(parts)

    @property
    def n_bytes(self) -> int:
        """Approximate size: the n-grams, about 100 bytes each with their weights."""
        n_grams = sum(len(block.vocabulary_) for block in self.features.blocks)
        return 100 * (n_grams + len(self.features.counts))


def fit_surface(
    read: Sequence[ReadText],
    first: Bool[np.ndarray, " n"],
    units: Shaped[np.ndarray, " n"],
    counts: Mapping[int, int],
    seed: int,
    objects: ObjectCache | None = None,
) -> SurfaceBaseline:
    """Fit the baseline to these train rows; `counts` are token counts of neutral text.

    The result does not depend on the order of rows. Runs that share `objects` fit it once for the
    same rows: no latent is read, so that the cells of a sweep over layers have the same baseline.
    Raises DataError where a group has too few units for cross-validation.
    """
    from saexp.stats.separation import fit_logistic, folds, limited

    rows = list(zip(map(astuple, read), first.tolist(), map(str, units), strict=True))
    key = digest_of("surface baseline", rows, sorted(counts.items()), seed)
    known = None if objects is None else objects.get(key)
    if known is not None:
        return known
    keys = [(str(u), r.text, len(r.ids)) for u, r in zip(units, read, strict=True)]
    order = np.array(sorted(range(len(read)), key=lambda i: (keys[i], bool(first[i]))))
    chosen = order[limited(np.arange(len(order)), MAX_TRAIN, seed)]
    first, units = first[chosen], units[chosen]
    features, matrix = _Features.fit([read[i] for i in chosen], counts)
    pairs = folds(first, units, seed)
    fitted = fit_logistic(matrix, first, STRENGTHS, pairs, standardise=False)
    baseline = SurfaceBaseline(features, fitted)
    if objects is not None:
        objects.put(key, baseline, baseline.n_bytes)
    return baseline


def observation_scores(
    read: Sequence[ReadText],
    of_row: Int[np.ndarray, " n_rows"],
    entities: Shaped[np.ndarray, " n_units"],
    first: Bool[np.ndarray, " n_units"],
    train: Bool[np.ndarray, " n_units"],
    counts: Mapping[int, int],
    seed: int,
    objects: ObjectCache | None = None,
) -> Float[np.ndarray, " n_held_out"]:
    """Scores of the observations not in `train`, by a baseline fitted on those in `train`.

    The score of an observation is the mean over its rows; `of_row` is the index of each row's
    observation. Rows of one of `entities` are never on both sides of a fold. Raises DataError as
    `fit_surface` does.
    """
    rows, others = np.flatnonzero(train[of_row]), np.flatnonzero(~train[of_row])
    units = of_row[rows]
    baseline = fit_surface(
        [read[i] for i in rows.tolist()], first[units], entities[units], counts, seed, objects
    )
    scores = baseline.score([read[i] for i in others.tolist()])
    sums = np.bincount(of_row[others], weights=scores, minlength=len(first))
    return (sums / np.maximum(np.bincount(of_row, minlength=len(first)), 1))[~train]


class _Features:
    """Features with the vocabularies, inverse document frequencies and scales of the train rows.

    Each block of n-grams is scaled to unit length per row, and the numeric features to a comparable
    length, so that no block dominates because of its size.
    """

    def __init__(
        self, blocks: Sequence[Any], numbers: Float[np.ndarray, "n k"], counts: Mapping[int, int]
    ) -> None:
        self.blocks, self.counts = blocks, counts
        self.mean, spread = numbers.mean(0), numbers.std(0)
        self.varies = spread > 1e-9
        self.scale = spread * np.sqrt(max(self.varies.sum(), 1))

    @classmethod
    def fit(
        cls, read: Sequence[ReadText], counts: Mapping[int, int]
    ) -> "tuple[_Features, sparse.csr_array]":
        """The features of train rows, and their values for these rows."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        blocks: list[Any] = []
        parts = []
        for grams in (_text_tokens, _entity_tokens, _text_characters, _entity_characters):
            if any(map(grams, read)):
                settings: Any = {"analyzer": grams, "max_features": _MAX_FEATURES}
                block = TfidfVectorizer(**settings, sublinear_tf=True)
                parts.append(block.fit_transform(read))
                blocks.append(block)
        numbers = _numbers(read, counts)
        features = cls(blocks, numbers, counts)
        return features, features._joined(parts, numbers)

    def __call__(self, read: Sequence[ReadText]) -> sparse.csr_array:
        return self._joined([b.transform(read) for b in self.blocks], _numbers(read, self.counts))

    def _joined(self, parts: Sequence[object], numbers: np.ndarray) -> sparse.csr_array:
        scaled = ((numbers - self.mean)[:, self.varies]) / self.scale[self.varies]
        return sparse.csr_array(sparse.hstack([*parts, sparse.csr_array(scaled)]))


def _numbers(read: Sequence[ReadText], counts: Mapping[int, int]) -> Float[np.ndarray, "n k"]:
    return np.array([_numbers_of(r, counts) for r in read], dtype=np.float64)


def _numbers_of(read: ReadText, counts: Mapping[int, int]) -> tuple[object, ...]:
    text = np.log1p([counts.get(i, 0) for i in read.ids[-WINDOW:]])
    entity = np.log1p([counts.get(i, 0) for i in read.entity_ids] or [0])
    return (
        np.log(len(read.ids)),
        np.log1p(len(read.text)),
        len(read.entity_ids),
        len(read.entity),
        text.mean(),
        text[-1],
        entity.mean(),
        entity.min(),
        entity[0],
    )


def _text_tokens(read: ReadText) -> list[str]:
    # The token at the position is a feature of its own, in addition to being part of the text.
    return [*_tokens(read.ids[-WINDOW:]), f"at {read.ids[-1]}"]


def _entity_tokens(read: ReadText) -> list[str]:
    return _tokens(read.entity_ids)


def _tokens(ids: Sequence[int]) -> list[str]:
    words = list(map(str, ids))
    return [" ".join(words[i : i + n]) for n in _TOKENS for i in range(len(words) - n + 1)]


def _text_characters(read: ReadText) -> list[str]:
    return _characters(read.text[-4 * WINDOW :])


def _entity_characters(read: ReadText) -> list[str]:
    return _characters(f"{_START}{read.entity}{_END}") if read.entity else []


def _characters(text: str) -> list[str]:
    return [text[i : i + n] for n in _CHARACTERS for i in range(len(text) - n + 1)]


def contrast_power(
    train: Split, test: Split, n_tested: int, n_leading: int, alpha: float
) -> Result:
    """Metrics `power/auroc_<split>`: the smallest AUROC that is detected with a power of 80%.

    The level on the train split is `alpha` divided by the number of latents tested (Bonferroni's
    correction, with which Benjamini and Hochberg's method starts); on the test split it is `alpha`
    divided by the number of leading latents (or by 1), with which Holm's method starts. Null, with
    a note, where even a perfect separation would not be significant.
    """
    result = Result()
    levels = {
        "train": (train, alpha / max(n_tested, 1)),
        "test": (test, alpha / max(n_leading, 1)),
    }
    for name, (split, level) in levels.items():
        auroc = detectable_auroc(_sizes(split), level)
        result.metrics[f"power/auroc_{name}"] = auroc
        if auroc is None:
            result.notes.append(
                f"split {name} is too small to detect any latent (power/auroc_{name}): even a "
                f"latent that separates the groups perfectly would have p > {level:.2g}"
            )
    return result


def _sizes(split: Split) -> list[tuple[int, int]]:
    sizes = []
    for stratum in stratum_weights(split.first, split.strata):
        chosen = split.strata == stratum
        sizes.append((int((chosen & split.first).sum()), int((chosen & ~split.first).sum())))
    return sizes


Claims = Callable[[Split, Split], bool]
"""(train, test) -> whether the contrast reports a latent above chance."""


def placebo_labels(claims: Claims, train: Split, test: Split, n: int, seed: int) -> Result:
    """Metric `placebo/label_fraction`: fraction of label permutations with which a claim is made.

    Labels are permuted over observations of the same entity type and split, so that group sizes
    do not change.
    """
    rng = np.random.default_rng([seed, 61])
    n_claims, start = 0, time.perf_counter()
    with progress(n, "contrast with permuted labels", "permutation") as bar:
        for n_done in range(n):
            n_claims += claims(*(permuted(split, rng) for split in (train, test)))
            if not n_done:
                seconds = (time.perf_counter() - start) * n
                log.info("%d contrasts with permuted labels will take about %.0f s", n, seconds)
            bar.update(1)
    return Result(metrics=claim_fraction("placebo/label_fraction", n_claims, n))


def permuted(split: Split, rng: np.random.Generator) -> Split:
    """The split with its labels permuted within strata."""
    first = split.first.copy()
    for stratum in sorted(set(split.strata)):
        chosen = np.flatnonzero(split.strata == stratum)
        first[chosen] = first[rng.permutation(chosen)]
    return replace(split, first=first)


def placebo_latents(table: pd.DataFrame, alpha: float, n: int, seed: int) -> Result:
    """Metric `placebo/latent_fraction`: fraction of random latents for which a claim is made.

    `n` latents are drawn from those active in the train split (all of them where they are fewer).
    The claim is that the latent separates the groups on the test split with p <= `alpha`, in the
    same direction as on the train split.
    """
    active = np.flatnonzero(table["auroc"] != 0.5)
    drawn = table.iloc[np.random.default_rng([seed, 67]).permutation(active)[:n]]
    same = np.sign(drawn["auroc"] - 0.5) == np.sign(drawn["auroc_test"] - 0.5)
    n_claims = int((same & (drawn["p_value_test"] <= alpha)).sum())
    return Result(metrics=claim_fraction("placebo/latent_fraction", n_claims, len(drawn)))


PAPER_LIMIT = 0.02
"""Limit of Ferrando et al. 2024, for SAEs of 16k latents of which about 80 are active."""


@dataclass(frozen=True)
class DensityLimit:
    """Latents with this density on background tokens, or a larger one, are not selected."""

    value: float | None
    """Fraction of background tokens; None without background tokens: every latent passes."""
    source: str
    """The options that determine the limit, for notes."""

    def exceeded(self, densities: pd.Series) -> pd.Series:
        """Which densities are too large; unknown densities (NaN) are not."""
        return densities >= (np.inf if self.value is None else self.value)


def density_limit(densities: Float[np.ndarray, " d_sae"], cfg: AnalyzerConfig) -> DensityLimit:
    """The limit for an SAE, from the densities of all its latents on background tokens.

    A fixed density means different things for different SAEs: the mean density is L0 / d_sae, 0.5%
    for 80 of 16 384, 0.8% for 32 of 4096 and 5% for 12 of 256 latents. Densities are also heavy-
    tailed: the few densest latents are active on any text. The limit is therefore the
    `background_quantile` of the densities of those latents that are active on background tokens
    (dead latents would lower it), and at least 2% as in the paper, below which the quantile falls
    for wide SAEs. `background_max` sets an absolute limit instead.
    """
    live = densities[densities > 0]
    if cfg.background_max is not None:
        return DensityLimit(cfg.background_max, f"analyzer.background_max={cfg.background_max:g}")
    if np.isnan(densities).all():
        return DensityLimit(None, "no background tokens")
    quantile = float(np.quantile(live, cfg.background_quantile)) if len(live) else 0.0
    source = f"analyzer.background_quantile={cfg.background_quantile:g}, at least {PAPER_LIMIT:g}"
    return DensityLimit(max(quantile, PAPER_LIMIT), source)


_N_LISTED = 3
"""Latents listed in a note."""


def why_none(
    significant: pd.DataFrame,
    group: str,
    labels: tuple[np.ndarray, np.ndarray],
    n_tested: int,
    limit: DensityLimit,
    cfg: AnalyzerConfig,
) -> str:
    """Note on why no latent is selected for a group.

    `labels` are, per train unit, whether it belongs to the first group and its stratum.
    """
    of_group = significant[significant["direction"] == group]
    if of_group.empty:
        note = f"no latent is associated with '{group}' at a q-value <= {cfg.alpha:g}"
        return note + _no_power(*labels, n_tested, cfg.alpha)
    n_dense = int(limit.exceeded(of_group["background_freq"]).sum())
    dense = ""
    if limit.value is not None:
        dense = (
            f"{counted(n_dense, 'is', 'are')} active on at least {limit.value:.1%} of background "
            f"tokens ({limit.source}), and "
        )
    n_other = len(of_group) - n_dense
    return (
        f"none of {counted(len(of_group), 'significant latent')} for '{group}' is selected: "
        f"{dense}{counted(n_other, 'points', 'point')} to the other group for some entity type or "
        "by the rank test"
    )


def _no_power(first: np.ndarray, strata: np.ndarray, n_tested: int, alpha: float) -> str:
    """Says that even a latent active on all of one group only would not be significant."""
    perfect = sparse.csr_array(first.astype(np.float64)[:, None])
    p_value = float(stratified_rank_test(perfect, first, strata).p_value[0])
    if p_value * n_tested <= alpha:
        return ""
    n = int(first.sum())
    return (
        f"; with {n} and {len(first) - n} train entities none could be: a latent that is active on "
        f"all entities of one group only has p = {p_value:.2g}, and {n_tested} latents are tested"
    )


def too_dense(
    significant: pd.DataFrame, best: pd.DataFrame, group: str, limit: DensityLimit
) -> list[str]:
    """A note on latents that separate the groups better than the best selected one (`best`, one
    row) but exceed the density limit. AUROCs are of the train split, in the group's direction."""
    dense = significant[
        (significant["direction"] == group) & limit.exceeded(significant["background_freq"])
    ]
    dense = dense.assign(strength=(dense["auroc"] - 0.5).abs())
    strength_of_best = abs(float(best["auroc"].iloc[0]) - 0.5)
    dense = dense[dense["strength"] > strength_of_best].sort_values("strength", ascending=False)
    if dense.empty or limit.value is None:
        return []
    listed = ", ".join(
        f"{row['latent']} ({0.5 + row['strength']:.3f})"
        for row in dense.head(_N_LISTED).to_dict("records")
    )
    more = f" and {len(dense) - _N_LISTED} more" if len(dense) > _N_LISTED else ""
    return [
        f"{counted(len(dense), 'latent')} with a higher train AUROC for '{group}' "
        f"{'is' if len(dense) == 1 else 'are'} not selected because of being active on at least "
        f"{limit.value:.1%} of background tokens ({limit.source}): {listed}{more}"
    ]


def at_chance(metrics: Mapping[str, float | int | None], group: str, alpha: float) -> list[str]:
    """Notes on the leading latents of a group that are not above chance on the test split."""
    notes, seen = [], set()
    for kind, words in (("best", "the first selected"), ("strongest", "the strongest on train")):
        latent = metrics[f"contrast/{kind}_latent_{group}"]
        auroc, p_value = (
            metrics[f"contrast/{kind}_{name}_{group}_test"] for name in ("auroc", "p_value")
        )
        if latent is None or latent in seen or auroc is None or p_value is None:
            continue
        seen.add(latent)
        if is_above_chance(auroc, p_value, alpha):
            continue
        low, high = (
            metrics[f"contrast/{kind}_auroc_{group}_ci_{end}_test"] for end in ("low", "high")
        )
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        notes.append(
            f"latent {latent}, {words} for '{group}', has AUROC {auroc:.3f}{interval} "
            f"(not above chance on held-out entities; Holm-adjusted p {p_value_words(p_value)})"
        )
    return notes
