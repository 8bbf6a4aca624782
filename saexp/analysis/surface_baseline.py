"""Surface baseline: how well the text alone, without the model, separates two groups."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse

from saexp.data.tokenization import TokenizedText

if TYPE_CHECKING:
    from saexp.stats.logistic_probe import Fitted

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


def fit_surface(
    read: Sequence[ReadText],
    first: Bool[np.ndarray, " n"],
    units: Shaped[np.ndarray, " n"],
    counts: Mapping[int, int],
    seed: int,
) -> SurfaceBaseline:
    """Fit the baseline to these train rows; `counts` are token counts of neutral text.

    The result does not depend on the order of rows. Raises DataError where a group has too few
    units for cross-validation.
    """
    from saexp.stats.logistic_probe import fit_logistic, folds, limited

    keys = [(str(u), r.text, len(r.ids)) for u, r in zip(units, read, strict=True)]
    order = np.array(sorted(range(len(read)), key=lambda i: (keys[i], bool(first[i]))))
    chosen = order[limited(np.arange(len(order)), MAX_TRAIN, seed)]
    first, units = first[chosen], units[chosen]
    features = _Features([read[i] for i in chosen], counts)
    pairs = folds(first, units, seed)
    fitted = fit_logistic(features.matrix, first, STRENGTHS, pairs, standardise=False)
    return SurfaceBaseline(features, fitted)


def observation_scores(
    read: Sequence[ReadText],
    of_row: Int[np.ndarray, " n_rows"],
    entities: Shaped[np.ndarray, " n_units"],
    first: Bool[np.ndarray, " n_units"],
    train: Bool[np.ndarray, " n_units"],
    counts: Mapping[int, int],
    seed: int,
) -> Float[np.ndarray, " n_held_out"]:
    """Scores of the observations not in `train`, by a baseline fitted on those in `train`.

    The score of an observation is the mean over its rows; `of_row` is the index of each row's
    observation. Rows of one of `entities` are never on both sides of a fold. Raises DataError as
    `fit_surface` does.
    """
    rows, others = np.flatnonzero(train[of_row]), np.flatnonzero(~train[of_row])
    units = of_row[rows]
    baseline = fit_surface(
        [read[i] for i in rows.tolist()], first[units], entities[units], counts, seed
    )
    scores = baseline.score([read[i] for i in others.tolist()])
    sums = np.bincount(of_row[others], weights=scores, minlength=len(first))
    return (sums / np.maximum(np.bincount(of_row, minlength=len(first)), 1))[~train]


class _Features:
    """Features with the vocabularies, inverse document frequencies and scales of the train rows.

    Each block of n-grams is scaled to unit length per row, and the numeric features to a comparable
    length, so that no block dominates because of its size.
    """

    def __init__(self, read: Sequence[ReadText], counts: Mapping[int, int]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.counts = counts
        self.blocks: list[Any] = []
        parts = []
        for grams in (_text_tokens, _entity_tokens, _text_characters, _entity_characters):
            if any(map(grams, read)):
                settings: Any = {"analyzer": grams, "max_features": _MAX_FEATURES}
                block = TfidfVectorizer(**settings, sublinear_tf=True)
                parts.append(block.fit_transform(read))
                self.blocks.append(block)
        numbers = _numbers(read, counts)
        self.mean, spread = numbers.mean(0), numbers.std(0)
        self.varies = spread > 1e-9
        self.scale = spread * np.sqrt(max(self.varies.sum(), 1))
        self.matrix = self._joined(parts, numbers)

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
