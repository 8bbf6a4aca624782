"""`collector=imported`: activations that another tool wrote, read without the model's weights.

`activations.activation_files` describes the formats. An array is `[n, d_model]`, one row per
analysed position in the order of the run's rows, or `[n, n_positions, d_model]`, one row per text.
Rows of texts are matched like this:

- With token ids, a row belongs to the text whose token ids it begins with (or, padded on the left,
  ends with). Only the tokens up to the last analysed position must agree, because the activations
  of a causal model do not depend on later ones. The order of rows does not matter.
- Without token ids, row i belongs to example i of the data set, and their numbers must be equal.
- Where there are token ids and `n_positions` equals their length, all tokens of a text are there.
  Otherwise the n_positions vectors of a row belong to the run's positions in that text, in order,
  and their numbers must be equal.

Every mismatch is an error.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from saexp.activations.activation_files import ActivationFiles
from saexp.activations.collector import CollectionRequest, Collector, row_ingredients
from saexp.activations.shared_prefixes import Batch
from saexp.config import CollectorConfig, ImportedConfig, StoreConfig
from saexp.data.rows import PositionTable
from saexp.digests import contents, digest_of
from saexp.errors import DataError, StoreError, counted
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel

_CHUNK_ROWS = 2048
_ANY_WIDTH = ("attn_z",)
"""Streams whose width is not d_model in every model."""
_STORED = (torch.float32, torch.bfloat16, torch.float16)


def locate(
    files: ActivationFiles, positions: PositionTable
) -> tuple[np.ndarray, np.ndarray | None]:
    """(row, column or None) in the files of each row of `positions.rows`.

    Raises DataError where they do not match; the rule is in the module's docstring.
    """
    if len(files.shape) == 1:
        return _locate_vectors(files, positions), None
    texts = _TextMatcher(files, positions)
    return texts.rows, texts.columns


def _locate_vectors(files: ActivationFiles, positions: PositionTable) -> np.ndarray:
    n, n_rows = files.shape[0], len(positions.rows)
    if n == n_rows:
        rows = np.arange(n)
    elif n == positions.n_examples and not positions.rows["example_id"].duplicated().any():
        rows = positions.example_index
    else:
        raise DataError(
            f"{files.path} holds {counted(n, 'vector')}, but the run analyses "
            f"{counted(n_rows, 'position')} of {counted(positions.n_examples, 'example')}; "
            "give one vector per analysed position, in the order of rows.parquet"
        )
    if files.token_ids is not None:
        _check_ids(files, positions, files.token_ids.reshape(-1)[rows])
    return rows


def _check_ids(files: ActivationFiles, positions: PositionTable, token_ids: np.ndarray) -> None:
    expected = positions.rows["token_id"].to_numpy()
    wrong = np.flatnonzero(token_ids != expected)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{files.path}: vector {row} is of token id {token_ids[row]}, and the run's row {row} "
            f"(example '{positions.rows['example_id'].iloc[row]}') is of {expected[row]}; the "
            "files are of other texts, positions or another tokenizer"
        )


class _TextMatcher:
    """Matches the rows `[n, n_positions]` of files to the texts of a run."""

    def __init__(self, files: ActivationFiles, positions: PositionTable) -> None:
        self.files, self.positions = files, positions
        self.n, self.n_positions = files.shape
        self.token_ids = files.token_ids
        by_example = positions.rows.groupby(positions.example_index, sort=False)
        self.ordinal = by_example.cumcount().to_numpy()
        """For each row, its number among the positions of its example."""
        self.n_chosen = by_example["row"].transform("size").to_numpy()
        has_every_token = self.token_ids is not None and self.token_ids.shape[1] == self.n_positions
        if not has_every_token:
            self._check_counts()
        if self.token_ids is None:
            self.rows, self.columns = self._by_order(), self.ordinal
            return
        matches = [self._match(text_id) for text_id in range(len(positions.texts))]
        of_text = positions.rows["text_id"].to_numpy()
        self.rows = np.array([row for row, _ in matches])[of_text]
        starts = np.array([start for _, start in matches])[of_text]
        tokens = positions.rows["token_index"].to_numpy()
        self.columns = starts + tokens if has_every_token else self.ordinal
        if not has_every_token:
            self._check_unique()

    def _check_counts(self) -> None:
        wrong = np.flatnonzero(self.n_chosen != self.n_positions)
        if len(wrong):
            example = self.positions.rows["example_id"].iloc[int(wrong[0])]
            raise DataError(
                f"{self.files.path} holds {counted(self.n_positions, 'position')} of each text, "
                f"but the run chooses {self.n_chosen[wrong[0]]} in example '{example}'; choose "
                "other positions=, or give the token ids beside activations of every token"
            )

    def _by_order(self) -> np.ndarray:
        n_examples = self.positions.n_examples
        if self.n != n_examples:
            raise DataError(
                f"{self.files.path} holds {counted(self.n, 'text')} and no token ids, but the "
                f"data set has {counted(n_examples, 'example')}; without token ids row i must be "
                "example i"
            )
        return self.positions.example_index

    @cached_property
    def _sorted_rows(self) -> list[tuple[tuple[int, ...], int]]:
        assert self.token_ids is not None
        return sorted((tuple(ids), row) for row, ids in enumerate(self.token_ids.tolist()))

    @cached_property
    def _n_read(self) -> np.ndarray:
        """Tokens of each text up to its last analysed position."""
        last = self.positions.rows.groupby("text_id")["token_index"].max()
        return last.reindex(range(len(self.positions.texts))).to_numpy() + 1

    @cached_property
    def _left_padded(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Token ids behind the padding of a row -> (row, index of their first)."""
        assert self.token_ids is not None
        starts: dict[tuple[int, ...], tuple[int, int]] = {}
        for row, ids in enumerate(self.token_ids.tolist()):
            n_pad = next((i for i, token in enumerate(ids) if token != ids[0]), 0)
            # Where padding is the BOS token, the last of them may belong to the text.
            for start in (n_pad, n_pad - 1):
                if start > 0:
                    starts.setdefault(tuple(ids[start:]), (row, start))
        return starts

    def _match(self, text_id: int) -> tuple[int, int]:
        """(row, index of the text's first token in it)."""
        text = self.positions.texts[text_id]
        prefix = text.ids[: int(self._n_read[text_id])]
        at = bisect_left(self._sorted_rows, (prefix, -1))
        if at < len(self._sorted_rows) and self._sorted_rows[at][0][: len(prefix)] == prefix:
            return self._sorted_rows[at][1], 0
        if text.ids in self._left_padded:
            return self._left_padded[text.ids]
        raise DataError(self._no_match(text.text, prefix, at))

    def _no_match(self, text: str, prefix: tuple[int, ...], at: int) -> str:
        """The error for a text that no row holds, with the row that agrees longest."""
        near = [self._sorted_rows[i] for i in (at - 1, at) if 0 <= i < len(self._sorted_rows)]
        shared = {row: _n_shared(ids, prefix) for ids, row in near}
        row = max(shared, key=lambda row: shared[row])
        n = shared[row]
        ids = next(ids for ids, number in near if number == row)
        there = ids[n] if n < len(ids) else "nothing"
        return (
            f"{self.files.path} has no row with the {len(prefix)} token ids of the text "
            f"'{text[:60]}': row {row} agrees longest and has {there} instead of {prefix[n]} at "
            f"index {n}; the files are of other texts, of another tokenizer, or differ in BOS "
            "(model.prepend_bos=)"
        )

    def _check_unique(self) -> None:
        """A row with some positions of a text belongs to one example only.

        Where rows and examples have the same order and token ids, that order decides.
        """
        assert self.token_ids is not None
        index = self.positions.example_index
        if self.n == self.positions.n_examples:
            same = (self.token_ids[self.rows] == self.token_ids[index]).all()
            if same:
                self.rows = index
                return
        examples_of_row: dict[int, int] = {}
        for row, example in zip(self.rows.tolist(), index.tolist(), strict=True):
            if examples_of_row.setdefault(row, example) != example:
                name = self.positions.rows["example_id"].iloc[int(np.argmax(index == example))]
                raise DataError(
                    f"{self.files.path}: row {row} is of the text of several examples, such as "
                    f"'{name}', and does not say of which positions; give one row per example in "
                    "the order of the data set, or activations of every token"
                )


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class ImportedCollector(Collector):
    """`collector=imported`: copies the activations of the run's positions into a store, once."""

    def __init__(self, cfg: CollectorConfig, *, model: LanguageModel, store: StoreConfig) -> None:
        super().__init__(cfg, model=model, store=store)
        assert isinstance(cfg, ImportedConfig)
        self.options = cfg
        self.files = ActivationFiles.read(cfg)
        # Called once per shard.
        self._locate = lru_cache(maxsize=1)(partial(locate, self.files))

    @property
    def dtype(self) -> torch.dtype:
        """The files' dtype where `store.dtype` is auto; float32 where a store has no such dtype."""
        if self.store.dtype != "auto":
            return getattr(torch, self.store.dtype)
        dtype = next(iter(self.files.arrays.values())).dtype
        return dtype if dtype in _STORED else torch.float32

    def ingredients(self, request: CollectionRequest) -> dict[str, Any]:
        """The digest of the files' content stands in for that of the model's weights."""
        cfg = self.options
        return {
            "collector": cfg.name,
            "model": self.model.name,
            "files": digest_of(contents(self.files.path)),
            "layout": digest_of(cfg.format, cfg.shape, cfg.layers, cfg.stream, cfg.ids_dtype),
            **row_ingredients(self.model, request.positions, request.max_length, self.dtype),
        }

    def check(self, request: CollectionRequest) -> None:
        """Raise where the files lack a hookpoint, or their rows do not match the run's."""
        for hookpoint in request.hookpoints:
            self.model.check_layer(hookpoint.layer)
            self.check_hookpoint(hookpoint)
        self._locate(request.positions)

    def check_hookpoint(self, hookpoint: Hookpoint) -> None:
        """Raise DataError where the files lack a hookpoint."""
        at, d_model = hookpoint.stored, self.model.d_model
        if at not in self.files.arrays:
            names = ", ".join(h.name for h in sorted(self.files.arrays))
            raise DataError(f"collector.path={self.files.path} has no {at.name}; it has {names}")
        width = self.files.arrays[at].shape[-1]
        if width != d_model and at.stream not in _ANY_WIDTH:
            raise DataError(
                f"collector.path={self.files.path}: {at.name} has vectors of {width} numbers, but "
                f"{self.model.name} has d_model={d_model}"
            )

    def batches(
        self, request: CollectionRequest, rows: Int[np.ndarray, " n"], hookpoints: list[Hookpoint]
    ) -> Iterator[Batch]:
        file_rows, file_columns = self._locate(request.positions)
        text_ids = request.positions.rows["text_id"].to_numpy()
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = rows[start : start + _CHUNK_ROWS]
            columns = None if file_columns is None else file_columns[part]
            values = {
                h: self.files.arrays[h.stored].take(file_rows[part], columns).to(self.dtype)
                for h in hookpoints
            }
            yield Batch(
                rows=np.arange(start, start + len(part)),
                text_ids=text_ids[part],
                host={h: (lambda v=v: v) for h, v in values.items()},
                n_tokens=0,
                n_padding=0,
            )

    def not_finite(self, hookpoint: Hookpoint, text: str, is_nan: bool) -> StoreError:  # noqa: ARG002
        return StoreError(
            f"collector.path={self.files.path}: NaN or Inf at {hookpoint.name} in the text "
            f"'{text[:60]}'; leave the text out, or write the files again in float32"
        )


def neutral_source(
    cfg: CollectorConfig, model: LanguageModel
) -> tuple[CollectorConfig | None, list[str]]:
    """(collector of the neutral text's activations, notes); None where there is no source of them.

    With imported activations they are read from `collector.neutral_path`, else computed by the
    model where its weights are on this machine.
    """
    if not isinstance(cfg, ImportedConfig):
        return cfg, []
    if cfg.neutral_path is not None:
        shape = None if cfg.shape is None else [-1, *cfg.shape[1:]]
        return replace(cfg, path=cfg.neutral_path, neutral_path=None, shape=shape), []
    if model.has_local_weights:
        note = (
            "activations of the data set are imported, those of neutral text are computed with "
            f"{model.name} (collector.neutral_path= reads them from files)"
        )
        return CollectorConfig(name="hf"), [note]
    note = (
        "there are no activations of neutral text (collector.neutral_path= is not set, and the "
        f"weights of {model.name} are not on this machine): latents are not filtered by their "
        "density on background tokens, and the SAE is not checked"
    )
    return None, [note]
