"""The rows of a run: the analysed positions as numbers, to which strings are joined when needed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from saexp.config import PositionsConfig
from saexp.data import Example, Skip
from saexp.data.corpora import Corpus, decoded_pieces
from saexp.data.tokenization import TokenizedText, token_pieces
from saexp.digests import digest_of
from saexp.errors import ConfigError, DataError

ROW_COLUMNS = (
    "row",
    "example_id",
    "unit",
    "group",
    "split",
    "entity",
    "entity_type",
    "text",
    "text_id",
    "token_index",
    "token_id",
    "token",
    "n_entity_tokens",
)
"""Columns of every rows table. A column of the data file with such a name is renamed to
`<name>_in_file`."""


_GROUP_ROWS = 65_536
"""Rows per group of rows.parquet."""


class Numbers(NamedTuple):
    """What identifies positions, each `[n]` int64."""

    text_id: Int[np.ndarray, " n"]
    token_index: Int[np.ndarray, " n"]
    token_id: Int[np.ndarray, " n"]


class RowLabels(NamedTuple):
    """What a position is called where it is shown."""

    example_id: str
    """Of a corpus, the number of the context."""
    group: str | None
    split: str | None


class PositionRows(ABC):
    """The analysed positions, one row each: numbers, to which strings are joined when asked for.

    `skips` are the examples without a position.
    """

    skips: Sequence[Skip] = ()
    n_truncated = 0
    """Texts that were truncated at the maximum length and of which only the rest is read."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Number of positions."""

    @property
    @abstractmethod
    def n_texts(self) -> int:
        """Number of distinct texts; `text_id` counts them."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Tokens of all texts."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens up to the last position of the text where it is largest."""

    @abstractmethod
    def numbers(self, first: int, end: int) -> Numbers:
        """The numbers of rows [first, end)."""

    @abstractmethod
    def ids(self, text_id: int) -> tuple[int, ...]:
        """Token ids of a text, special tokens included."""

    @abstractmethod
    def text(self, text_id: int) -> str:
        """A text, for messages."""

    @abstractmethod
    def pieces(self, text_id: int, first: int, end: int) -> list[str]:
        """The text of tokens [first, end) of a text, as `tokenization.token_pieces`."""

    @abstractmethod
    def text_ids(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The text of each of these rows."""

    @abstractmethod
    def examples(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number of each row's example, of a corpus its context."""

    @abstractmethod
    def labels(self, row: int) -> RowLabels:
        """What a row is called."""

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Hashes `texts` (token ids) and `positions`, which determine the rows."""

    @abstractmethod
    def frame(self, first: int, end: int) -> pd.DataFrame:
        """Rows [first, end) of the table `rows`."""

    @abstractmethod
    def at(self, rows: Int[np.ndarray, " n"]) -> pd.DataFrame:
        """These rows, ascending, of the table `rows`."""

    @property
    def rows(self) -> pd.DataFrame:
        """All rows with their strings: ROW_COLUMNS, then the file's other columns."""
        return self.frame(0, self.n_rows)

    @property
    def _schema(self) -> pa.Schema:
        """Arrow's types of the columns, the same for every part of the rows."""
        return pa.Schema.from_pandas(self.frame(0, 1), preserve_index=False)

    def write(self, file: Path) -> None:
        """Write `rows` as parquet, row group by row group; memory does not grow with the rows."""
        schema = self._schema
        with pq.ParquetWriter(file, schema) as writer:
            for first in range(0, self.n_rows, _GROUP_ROWS):
                part = self.frame(first, min(first + _GROUP_ROWS, self.n_rows))
                writer.write_table(pa.Table.from_pandas(part, schema, preserve_index=False))

    def equals(self, file: Path) -> bool:
        """Whether a parquet file holds these rows; read part by part."""
        n_read = 0
        with pq.ParquetFile(file) as opened:
            if opened.metadata.num_rows != self.n_rows:
                return False
            for batch in opened.iter_batches(_GROUP_ROWS):
                saved = pa.Table.from_batches([batch]).to_pandas()
                if not saved.equals(self.frame(n_read, n_read + len(saved))):
                    return False
                n_read += len(saved)
        return True


class PositionTable(PositionRows):
    """Positions in examples.

    Memory: 32 bytes a row, and what the examples and their tokens need.
    """

    def __init__(
        self,
        chosen: Sequence["Chosen"],
        texts: list[TokenizedText],
        skips: list[Skip],
        tokenizer: Any,
        *,
        n_truncated: int = 0,
        n_examples: int = 0,
    ) -> None:
        self.texts, self.skips, self.tokenizer = texts, skips, tokenizer
        """`texts` are distinct; `text_id` is an index into them."""
        self.n_truncated, self.n_examples = n_truncated, n_examples
        counts = [len(one.indices) for one in chosen]
        self._of_chosen = np.repeat(np.arange(len(chosen)), counts)
        number, text_id = (
            np.asarray([values[i] for values in map(Chosen.numbers, chosen)], dtype=np.int64)
            for i in (0, 1)
        )
        self.example_index = number[self._of_chosen]
        """`[n_rows]`: index of each row's example in the data set."""
        tokens = np.asarray([i for one in chosen for i in one.indices], dtype=np.int64)
        ids = [texts[one.text_id].ids[i] for one in chosen for i in one.indices]
        self._numbers = Numbers(text_id[self._of_chosen], tokens, np.asarray(ids, dtype=np.int64))
        self._strings = _strings(chosen)

    def take(self, rows: Int[np.ndarray, " n"]) -> "PositionTable":
        """The same texts with these rows, in this order; a row may occur twice."""
        part = copy(self)
        vars(part).pop("rows", None)
        part._of_chosen, part.example_index = self._of_chosen[rows], self.example_index[rows]
        part._numbers = Numbers(*(column[rows] for column in self._numbers))
        return part

    @cached_property
    def rows(self) -> pd.DataFrame:
        return self.frame(0, self.n_rows)

    @property
    def n_rows(self) -> int:
        return len(self._of_chosen)

    @property
    def _schema(self) -> pa.Schema:
        # Of all examples: a column may be empty in the first rows and not in others.
        first_rows = np.unique(self._of_chosen, return_index=True)[1]
        return pa.Schema.from_pandas(self.at(first_rows), preserve_index=False)

    @property
    def n_texts(self) -> int:
        return len(self.texts)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.texts))

    @property
    def longest(self) -> int:
        return int(self._numbers.token_index.max()) + 1

    def numbers(self, first: int, end: int) -> Numbers:
        return Numbers(*(column[first:end] for column in self._numbers))

    def ids(self, text_id: int) -> tuple[int, ...]:
        return self.texts[text_id].ids

    def text(self, text_id: int) -> str:
        return self.texts[text_id].text

    def pieces(self, text_id: int, first: int, end: int) -> list[str]:
        return token_pieces(self.texts[text_id], self.tokenizer)[first:end]

    def text_ids(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._numbers.text_id[rows]

    def examples(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.example_index[rows]

    def labels(self, row: int) -> RowLabels:
        about = self._strings.iloc[self._of_chosen[row]]
        group, split = (None if pd.isna(about[c]) else str(about[c]) for c in ("group", "split"))
        return RowLabels(str(about["example_id"]), group, split)

    def digests(self) -> dict[str, str]:
        texts, rows = hashlib.sha256(), hashlib.sha256()
        for text in self.texts:
            texts.update(np.asarray([len(text), *text.ids], dtype="<i8").tobytes())
        for column in self._numbers[:2]:
            rows.update(column.astype("<i8").tobytes())
        return {"texts": texts.hexdigest(), "positions": rows.hexdigest()}

    def frame(self, first: int, end: int) -> pd.DataFrame:
        return self.at(np.arange(first, min(end, self.n_rows)))

    def at(self, rows: Int[np.ndarray, " n"]) -> pd.DataFrame:
        """These rows with their strings, in any order."""
        numbers = Numbers(*(column[rows] for column in self._numbers))
        ids, which = np.unique(numbers.token_id, return_inverse=True)
        tokens = np.asarray(self.tokenizer.convert_ids_to_tokens(ids.tolist()), dtype=object)
        table = self._strings.take(self._of_chosen[rows]).reset_index(drop=True)
        table.insert(0, "row", rows)
        columns = {**numbers._asdict(), "token": pd.Series(tokens[which], dtype=_TOKEN_DTYPE)}
        for name, values in columns.items():
            table.insert(ROW_COLUMNS.index(name), name, values)
        return table


class Chosen(NamedTuple):
    """An example with positions."""

    number: int
    """Index in the data set."""
    example: Example
    text_id: int
    indices: list[int]
    n_entity_tokens: int

    def numbers(self) -> tuple[int, int]:
        """(index in the data set, id of the text)."""
        return self.number, self.text_id


def _strings(chosen: Sequence[Chosen]) -> pd.DataFrame:
    """A row per example: the columns that do not depend on the position."""
    table = pd.DataFrame(
        [
            {
                "example_id": one.example.id,
                "unit": one.example.unit,
                "group": one.example.group,
                "split": one.example.split,
                "entity": one.example.entity,
                "entity_type": one.example.entity_type,
                "text": one.example.text,
                # Unknown for an entity that truncation removed.
                "n_entity_tokens": one.n_entity_tokens or None,
                **{_free_name(k): _plain(v) for k, v in one.example.extra.items()},
            }
            for one in chosen
        ]
    )
    for column in ("group", "split", "entity", "entity_type"):
        table[column] = table[column].astype("string")
    table["n_entity_tokens"] = table["n_entity_tokens"].astype("Int64")
    for column in table.columns[_N_STRINGS:]:
        table[column] = _one_type(table[column])
    return table


_N_STRINGS = 8
"""Columns of `_strings` before those of the file."""
_TOKEN_DTYPE = pd.Series(["a"]).dtype


def _free_name(column: str) -> str:
    return f"{column}_in_file" if column in ROW_COLUMNS else column


def _one_type(column: pd.Series) -> pd.Series:
    """The column, as text where it mixes types or has integers of more than 64 bits."""
    if column.dtype != object or all(isinstance(v, bool) for v in column.dropna()):
        return column
    return column.map(str, na_action="ignore").astype("string")


def _plain(value: Any) -> Any:
    """A value of the data file as parquet can hold it; nested values become text."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


_BLOCK = 1024
"""Contexts that are looked at together; random positions are drawn per block."""
CORPUS_POSITIONS = ("all", "last", "random", "middle", "indices")
"""Kinds of positions that a corpus has."""


class CorpusRows(PositionRows):
    """Positions in the contexts of a corpus, computed from the token ids when they are needed.

    Memory: 8 bytes per context. Special tokens are left out unless `positions.include_special`.
    """

    def __init__(self, corpus: Corpus, cfg: PositionsConfig, tokenizer: Any) -> None:
        """Raises ConfigError for positions that a corpus does not have, DataError for none."""
        if cfg.name not in CORPUS_POSITIONS:
            raise ConfigError(
                f"positions={cfg.name}: a corpus has no entities and no prompts; type positions="
                f"all (or {', '.join(CORPUS_POSITIONS[1:])})"
            )
        if cfg.name == "indices" and not cfg.indices:
            raise ConfigError("positions=indices needs indices: type 'positions.indices=[0,-1]'")
        self.corpus, self.cfg, self.tokenizer = corpus, cfg, tokenizer
        self._special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        blocks = (self._chosen(b, 0, _BLOCK) for b in range(self._n_blocks))
        counts = [np.count_nonzero(chosen, axis=1) for _, chosen in blocks]
        self._ends = np.cumsum(np.concatenate(counts), dtype=np.int64)
        if not self.n_rows:
            raise DataError(f"{corpus.path}: no context has the requested positions")

    @property
    def _n_blocks(self) -> int:
        return -(-len(self.corpus) // _BLOCK)

    def _chosen(
        self, block: int, first: int, end: int
    ) -> tuple[Int[np.ndarray, "n t"], Bool[np.ndarray, "n t"]]:
        """(token ids, which of them are positions) of contexts [first, end) of a block."""
        if self.cfg.name == "random":
            # Drawn for the block as a whole.
            ids, chosen = self._positions(block, 0, _BLOCK)
            return ids[first:end], chosen[first:end]
        return self._positions(block, first, end)

    def _positions(
        self, block: int, first: int, end: int
    ) -> tuple[Int[np.ndarray, "n t"], Bool[np.ndarray, "n t"]]:
        start = block * _BLOCK
        contexts = np.arange(start + first, min(start + end, len(self.corpus)))
        ids, cfg = self.corpus.ids(contexts), self.cfg
        ordinary = np.arange(ids.shape[1]) < self.corpus.lengths(contexts)[:, None]
        if not cfg.include_special:
            ordinary &= ~np.isin(ids, self._special)
        if cfg.name == "all":
            return ids, ordinary
        n = ordinary.sum(axis=1, keepdims=True)
        rank = np.cumsum(ordinary, axis=1) - 1
        if cfg.name == "last":
            return ids, ordinary & (rank >= n - cfg.n)
        if cfg.name == "middle":
            return ids, ordinary & (rank == (n - 1) // 2)
        if cfg.name == "indices":
            at = [rank == (i if i >= 0 else n + i) for i in cfg.indices or ()]
            return ids, ordinary & np.logical_or.reduce(at)
        keys = np.random.default_rng([cfg.seed, block]).random(ids.shape)
        order = np.argsort(np.where(ordinary, keys, np.inf), axis=1)
        drawn = np.zeros_like(ordinary)
        np.put_along_axis(drawn, order[:, : cfg.n], True, axis=1)
        return ids, ordinary & drawn

    @property
    def n_rows(self) -> int:
        return int(self._ends[-1])

    @property
    def n_texts(self) -> int:
        return len(self.corpus)

    @property
    def n_tokens(self) -> int:
        return self.corpus.n_tokens

    @property
    def longest(self) -> int:
        return self.corpus.context_size

    def numbers(self, first: int, end: int) -> Numbers:
        if first >= end:
            return Numbers(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
        # The contexts in which the first and the last row are.
        low, high = map(int, np.searchsorted(self._ends, [first, end - 1], side="right"))
        parts = []
        for block in range(low // _BLOCK, high // _BLOCK + 1):
            start = block * _BLOCK
            begin = max(low - start, 0)
            ids, chosen = self._chosen(block, begin, min(high + 1 - start, _BLOCK))
            context, token = np.nonzero(chosen)
            parts.append((context + start + begin, token, ids[context, token]))
        skipped = first - (int(self._ends[low - 1]) if low else 0)
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Numbers(*(column[skipped : skipped + end - first] for column in columns))

    def ids(self, text_id: int) -> tuple[int, ...]:
        return tuple(self.corpus.ids(np.asarray([text_id]))[0].tolist())

    def text(self, text_id: int) -> str:
        return str(self.tokenizer.decode(self.ids(text_id), skip_special_tokens=True))

    def pieces(self, text_id: int, first: int, end: int) -> list[str]:
        return decoded_pieces(self.ids(text_id), self.tokenizer, first, end)

    def bounds(self, text_id: int) -> tuple[int, int]:
        """[first, end) rows of a context."""
        first = int(self._ends[text_id - 1]) if text_id else 0
        return first, int(self._ends[text_id])

    def text_ids(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.searchsorted(self._ends, rows, side="right")

    def examples(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.text_ids(rows)

    def labels(self, row: int) -> RowLabels:
        return RowLabels(str(self.text_ids(np.asarray([row]))[0]), None, None)

    def digests(self) -> dict[str, str]:
        cfg = self.cfg
        settings = [cfg.name, cfg.n, cfg.indices, cfg.include_special, cfg.seed]
        return {"texts": self.corpus.key, "positions": digest_of(settings)}

    def frame(self, first: int, end: int) -> pd.DataFrame:
        numbers = self.numbers(first, end)
        return _narrow(np.arange(first, first + len(numbers.text_id)), numbers)

    def at(self, rows: Int[np.ndarray, " n"]) -> pd.DataFrame:
        block, parts = self.text_ids(rows) // _BLOCK, []
        for some in np.split(rows, np.flatnonzero(np.diff(block)) + 1):
            if len(some):
                numbers = self.numbers(int(some[0]), int(some[-1]) + 1)
                parts.append(_narrow(some, Numbers(*(c[some - some[0]] for c in numbers))))
        return pd.concat(parts, ignore_index=True) if parts else self.frame(0, 0)


def _narrow(rows: Int[np.ndarray, " n"], numbers: Numbers) -> pd.DataFrame:
    columns = {name: column.astype(np.int32) for name, column in numbers._asdict().items()}
    return pd.DataFrame({"row": rows, **columns})
