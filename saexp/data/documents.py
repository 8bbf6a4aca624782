"""Documents of a corpus, read one after another from files or a data set, and their packing."""

import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saexp.config.groups import CorpusConfig
from saexp.digests import content_name
from saexp.errors import ConfigError, DataError
from saexp.hub import hub, is_path, snapshot, why_absent

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Ending of a compressed file -> pyarrow's name of the compression."""
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
"""Ending of a file, without that of a compression -> how it is read."""
_PARQUET_ROWS = 1000
LARGEST_DOCUMENT = 2**20
"""Characters; a longer document is cut at the last line end before, and read as several."""


@dataclass
class Source:
    """The documents of a file or a data set."""

    name: str
    """File name, or hub id and split, for messages and notes."""
    n_bytes: int
    """Size on disk; 0 where it is not known."""
    identity: tuple[str, ...]
    """Determines the documents: name and digest of a file, id, revision and split of a data set."""
    kind: str
    """text, jsonl, parquet, or dataset."""
    path: Path | None = None
    rows: Any = None
    """The rows of a data set."""

    def documents(self, cfg: CorpusConfig) -> Iterator[tuple[str, int]]:
        """(text, bytes of the source that were read so far).

        Raises DataError where the source cannot be read, or lacks the column of the texts.
        """
        if self.kind == "dataset":
            for number, row in enumerate(self._read(), 1):
                yield _text_of(row, cfg.text_column, f"{self.name}, row {number}"), 0
            return
        assert self.path is not None
        try:
            yield from _READERS[self.kind](self.path, cfg)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: is not text in {cfg.encoding} ({error.reason}); convert the file, "
                "or type dataset.encoding=, such as latin-1"
            ) from error
        except (OSError, EOFError, zlib.error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path}: cannot be read ({reason})") from error

    def _read(self) -> Iterator[Any]:
        """The rows of a data set; those of a stream are fetched, or parsed, here."""
        from datasets.exceptions import DatasetsError

        rows, number = iter(self.rows), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, DatasetsError) as error:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"{self.name}: cannot be read after row {number} ({reason})"
                ) from error
            number += 1
            yield row


@dataclass
class Sources:
    """All sources of a corpus."""

    items: list[Source]
    skipped: list[str] = field(default_factory=list)
    """Names of files of other kinds in the folder, which are not read."""

    @property
    def n_bytes(self) -> int:
        """Size of all sources; 0 where the size of one is not known."""
        sizes = [source.n_bytes for source in self.items]
        return sum(sizes) if all(sizes) else 0

    @property
    def identity(self) -> list[tuple[str, ...]]:
        """What determines the documents."""
        return [source.identity for source in self.items]


def sources(cfg: CorpusConfig) -> Sources:
    """The sources that `dataset.path` names: a file, a folder of files, or a data set.

    Raises DataError where there is none.
    """
    if not cfg.path:
        raise ConfigError(
            "dataset=corpus needs texts: type dataset.path=FILE, a folder, or the id of a data set"
        )
    path = Path(cfg.path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return Sources([_saved(path, cfg)])
    if cfg.streaming and path.exists():
        return Sources([_streamed(path, cfg)])
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        read = [f for f in files if _kind(f)]
        if not read:
            raise DataError(f"dataset.path={cfg.path}: has no file that ends in {_endings()}")
        skipped = [f.relative_to(path).as_posix() for f in files if not _kind(f)]
        return Sources([_file(f, f.relative_to(path).as_posix()) for f in read], skipped)
    if path.is_file():
        if not _kind(path):
            raise DataError(f"dataset.path={cfg.path}: a corpus is read from {_endings()}")
        return Sources([_file(path, path.name)])
    if is_path(cfg.path):
        raise DataError(f"dataset.path={cfg.path}: no such file or folder")
    return Sources([_hub(cfg)])


def corpus(cfg: CorpusConfig, **_: Any) -> Sources:
    """Registry builder of `dataset=corpus`."""
    return sources(cfg)


_SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that `datasets` saved."""


def _endings() -> str:
    return f"{', '.join(KINDS)} (or these with {' or '.join(COMPRESSED)})"


def _kind(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix in COMPRESSED else file
    return KINDS.get(name.suffix.lower())


def _file(file: Path, name: str) -> Source:
    kind = _kind(file)
    assert kind is not None
    return Source(name, file.stat().st_size, (name, content_name(file)), kind, path=file)


def _saved(path: Path, cfg: CorpusConfig) -> Source:
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            rows = rows[cfg.hf_split]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"dataset.path={path}: cannot be loaded ({error})") from error
    identity = (path.name, cfg.hf_split, str(rows._fingerprint), str(len(rows)))
    return Source(f"{path.name}/{cfg.hf_split}", 0, identity, "dataset", rows=rows)


_BUILDERS = {".csv": "csv", ".arrow": "arrow", ".txt": "text"}
"""Ending of a file -> the builder of `datasets` that reads it, where it is not called as here."""


def _streamed(path: Path, cfg: CorpusConfig) -> Source:
    """A local file, or a folder as `datasets` reads it, whose rows are parsed while they are read.

    Kinds of files that only `datasets` reads, such as CSV, become documents in this way.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    name = str(path)
    settings: dict[str, Any] = {}
    if path.is_file():
        kind = _kind(path)
        name = _BUILDERS.get(path.suffix.lower()) or {"jsonl": "json"}.get(str(kind), kind)
        if name is None:
            raise DataError(
                f"dataset.path={path}: is streamed from {_endings()}, .csv and .arrow, or a folder"
            )
        settings = {"data_files": str(path)}
        if name == "text":
            settings["sample_by"] = "document" if cfg.document == "file" else cfg.document
    try:
        rows: Any = datasets.load_dataset(
            name, cfg.subset, split=cfg.hf_split, streaming=True, **settings
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"dataset.path={path}: cannot be loaded ({reason})") from error
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    contents = [part for f in files for part in (f.name, content_name(f))]
    where = "/".join(part for part in (path.name, cfg.subset, cfg.hf_split) if part)
    return Source(where, 0, ("streamed", where, *contents), "dataset", rows=rows)


def _hub(cfg: CorpusConfig) -> Source:
    """A data set of the hub; with `dataset.streaming` its rows are fetched while they are read."""
    import datasets
    from datasets.exceptions import DatasetsError

    assert cfg.path is not None
    try:
        with hub():
            rows: Any = datasets.load_dataset(
                cfg.path, cfg.subset, split=cfg.hf_split, streaming=cfg.streaming
            )
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"dataset.path={cfg.path}: cannot be loaded ({why_absent(error)})"
        ) from error
    state = str(snapshot(cfg.path, kind="dataset")) if cfg.streaming else str(rows._fingerprint)
    name = "/".join(part for part in (cfg.path, cfg.subset, cfg.hf_split) if part)
    return Source(name, 0, (name, state), "dataset", rows=rows)


def _opened(file: Path) -> tuple[Any, Any]:
    """(a stream of the decompressed content, the file itself, whose position is the progress)."""
    import pyarrow as pa

    raw = file.open("rb")
    kind = COMPRESSED.get(file.suffix)
    # pyarrow closes `raw` with the stream.
    stream: Any = pa.input_stream(raw, compression=kind) if kind else raw
    return (io.BufferedReader(stream) if kind else raw), raw


def _lines(file: Path, encoding: str) -> Iterator[tuple[str, int]]:
    """(line without its end, bytes read); only a line feed, with a carriage return, ends a line."""
    stream, raw = _opened(file)
    # Skips a byte order mark.
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    with io.TextIOWrapper(stream, encoding=name, newline="\n") as lines:
        for line in lines:
            yield line.rstrip("\n").rstrip("\r"), raw.tell()


def _text_file(file: Path, cfg: CorpusConfig) -> Iterator[tuple[str, int]]:
    """The file, its paragraphs (between blank lines) or its lines, each as a document."""
    parts: list[str] = []
    n_characters = n_read = 0
    for line, n_read in _lines(file, cfg.encoding):
        if cfg.document == "line":
            yield line, n_read
            continue
        ends = cfg.document == "paragraph" and not line.strip()
        if ends or n_characters + len(line) > LARGEST_DOCUMENT:
            yield "\n".join(parts), n_read
            parts, n_characters = [], 0
        if not ends:
            parts.append(line)
            n_characters += len(line) + 1
    if parts:
        yield "\n".join(parts), n_read


def _jsonl_file(file: Path, cfg: CorpusConfig) -> Iterator[tuple[str, int]]:
    for number, (line, n_read) in enumerate(_lines(file, cfg.encoding), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON ({error})") from error
        yield _text_of(row, cfg.text_column, where), n_read


def _parquet_file(file: Path, cfg: CorpusConfig) -> Iterator[tuple[str, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if cfg.text_column not in table.schema_arrow.names:
            raise _no_column(cfg.text_column, table.schema_arrow.names, str(file))
        size, n_rows, number = file.stat().st_size, max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[cfg.text_column]):
            for value in batch.column(0).to_pylist():
                number += 1
                row = {cfg.text_column: value}
                text = _text_of(row, cfg.text_column, f"{file}, row {number}")
                yield text, size * number // n_rows
    except pa.ArrowException as error:
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error


_READERS = {"text": _text_file, "jsonl": _jsonl_file, "parquet": _parquet_file}


def _no_column(column: str, names: Sequence[str], where: str) -> DataError:
    return DataError(
        f"{where}: has no column '{column}'; type dataset.text_column= one of {', '.join(names)}"
    )


def _text_of(row: Any, column: str, where: str) -> str:
    """The row's text; empty where it is null."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {type(row).__name__}, not an object with '{column}'")
    if column not in row:
        raise _no_column(column, list(row), where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: '{column}' is {type(text).__name__}, not text")
    return text


@dataclass(frozen=True)
class TokenizerInfo:
    """What of a tokenizer decides the contexts."""

    tokenizer: Any
    fingerprint: str
    prepend_bos: bool
    """Whether texts begin with BOS."""

    @property
    def bos(self) -> int | None:
        """Token that begins a context; None where texts do not begin with BOS."""
        return self.tokenizer.bos_token_id if self.prepend_bos else None

    def separator(self, name: str) -> int | None:
        """Token between two documents; None for none.

        `name` is bos, eos, none, or the text of a token. Raises ConfigError where the tokenizer
        lacks it.
        """
        if name == "none" or (name == "bos" and not self.prepend_bos):
            return None
        if name not in ("bos", "eos"):
            token = self.tokenizer.get_vocab().get(name)
            if token is None:
                special = ", ".join(map(repr, self.tokenizer.all_special_tokens)) or "none"
                raise ConfigError(
                    f"dataset.separator={name}: no such token; type bos, eos, none or a token of "
                    f"the vocabulary (special tokens: {special})"
                )
            return int(token)
        token = getattr(self.tokenizer, f"{name}_token_id")
        if token is None:
            raise ConfigError(
                f"dataset.separator={name}: the tokenizer has no {name.upper()} token; type "
                "dataset.separator=none"
            )
        return int(token)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds all token ids."""
        return np.dtype("<u2" if len(self.tokenizer) <= 2**16 else "<u4")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, on all cores where the tokenizer can."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


class Packer:
    """Packs documents into contexts of `size` tokens.

    With `pack` false, each document is a context, cut at `size` tokens.
    """

    def __init__(
        self, size: int, bos: int | None, separator: int | None, dtype: np.dtype, *, pack: bool
    ) -> None:
        self.size, self.bos, self.separator, self.pack = size, bos, separator, pack
        self.dtype = dtype
        self.partial = np.empty(size, dtype)
        """The context in progress, of which the first `n` tokens are set."""
        self.n = 0
        self.first_document = 0
        self.contexts: list[np.ndarray] = []
        """Finished contexts that were not taken yet."""
        self.documents: list[int] = []
        """Number of the document in which each of them begins."""
        self.n_cut = 0
        """Documents of which a part was cut off."""

    def add(self, ids: Sequence[int], document: int) -> None:
        """Add a document of at least one token."""
        tokens = np.asarray(ids, dtype=self.dtype)
        if self.pack:
            self._add_packed(tokens, document)
            return
        if self.bos is not None and tokens[0] != self.bos:
            tokens = np.concatenate([np.asarray([self.bos], dtype=self.dtype), tokens])
        self.n_cut += len(tokens) > self.size
        self.contexts.append(tokens[: self.size])
        self.documents.append(document)

    def _add_packed(self, tokens: np.ndarray, document: int) -> None:
        start = 0
        while start < len(tokens):
            if self.n == 0:
                self.first_document = document
                if self.bos is not None and tokens[start] != self.bos:
                    self._append(self.bos)
            elif start == 0 and self.separator is not None and tokens[0] != self.separator:
                # May be the context's last token; the document then begins the next context.
                self._append(self.separator)
            chunk = tokens[start : start + self.size - self.n]
            self.partial[self.n : self.n + len(chunk)] = chunk
            self.n += len(chunk)
            start += len(chunk)
            if self.n == self.size:
                self.contexts.append(self.partial)
                self.documents.append(self.first_document)
                self.partial, self.n = np.empty(self.size, self.dtype), 0

    def _append(self, token: int) -> None:
        self.partial[self.n] = token
        self.n += 1

    @property
    def state(self) -> dict[str, Any]:
        """What continues the packing after the contexts taken so far."""
        unfinished = self.partial[: self.n].tolist()
        return {"partial": unfinished, "first": self.first_document, "n_cut": self.n_cut}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.n, self.first_document, self.n_cut = (
            len(state["partial"]),
            state["first"],
            state["n_cut"],
        )
        self.partial[: self.n] = state["partial"]
