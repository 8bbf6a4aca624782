"""Corpora: documents tokenized once, and kept as contexts in a memory-mapped array on disk."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from saexp.config.groups import CorpusConfig
from saexp.context import progress
from saexp.data.documents import Packer, Sources, TokenizerInfo, sources
from saexp.digests import checksums, digest_of, has_intact_seal, sealed
from saexp.errors import ConfigError, DataError, StoreError, counted
from saexp.files import cannot_write, locked, sync, write_json

log = logging.getLogger(__name__)


_CONTEXT = 3
"""Characters or words before a token that are decoded with it, since decoders treat the first token
of a text specially."""
_BEFORE = 32
"""Tokens before the first one at which decoding begins, so that it is not within a character."""
_LONGEST_CHARACTER = 8
"""Tokens that may make up one character; UTF-8 has at most four bytes."""
_UNDECODED = "\ufffd"


def decoded_pieces(ids: Sequence[int], tokenizer: Any, first: int, end: int) -> list[str]:
    """The text of tokens [first, end), in context; special tokens are their names.

    As `tokenization.token_pieces` of the text that was tokenized: concatenated, the pieces are the
    text. Where several tokens make up one character, the first has it and the others are empty.

    >>> decoded_pieces(tokenizer("A café").input_ids, tokenizer, 1, 3)   # doctest: +SKIP
    ['A', ' café']
    """
    special = set(tokenizer.all_special_ids)
    start = at = max(0, first - _BEFORE)
    pieces: list[str] = []
    begins: list[int] = []
    """First tokens of the pieces since the last special token."""
    while at < end:
        if ids[at] in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(ids[at])))
            at, begins = at + 1, []
            continue
        begins = [*begins[-_CONTEXT:], at]
        before = _decode(tokenizer, ids[begins[0] : at])
        last = min(len(ids), at + _LONGEST_CHARACTER)
        stop = at
        piece = _UNDECODED
        while piece.endswith(_UNDECODED) and stop < last and ids[stop] not in special:
            stop += 1
            piece = _decode(tokenizer, ids[begins[0] : stop])[len(before) :]
        pieces += [piece, *[""] * (stop - at - 1)]
        at = stop
    return pieces[first - start : end - start]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


VERSION = 1
MANIFEST, TOKENS, ENDS, DOCUMENTS = "corpus.json", "tokens.bin", "ends.bin", "documents.bin"
_PROGRESS = "progress.json"
_BATCH_CHARACTERS = 2**20
"""Characters of the documents that are tokenized in one call."""
_BAR_BYTES = 10**6
"""Bytes of a unit of the progress bar."""
_BATCHES_PER_CHECKPOINT = 32
DEFAULT_CONTEXT = 1024


@dataclass(frozen=True, eq=False)
class Corpus:
    """Contexts of token ids on disk.

    Indexing reads from disk: memory does not grow with the corpus.

    >>> corpus.ids(np.arange(2)).shape   # doctest: +SKIP
    (2, 128)
    """

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Open a tokenized corpus. Raises StoreError where it is unfinished or damaged."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        if manifest is None:
            raise StoreError(f"{folder}: is not a finished corpus, or {MANIFEST} is damaged")
        for name, about in manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != about["bytes"]:
                raise StoreError(
                    f"{folder / name}: is missing or has another size; remove {folder}"
                )
        return cls(folder, manifest)

    @property
    def key(self) -> str:
        """Hash of what determines the contexts: documents, tokenizer, packing."""
        return self.manifest["key"]

    @property
    def context_size(self) -> int:
        """Tokens per context; with `pack` false, of the longest possible one."""
        return self.manifest["context_size"]

    def __len__(self) -> int:
        return self.manifest["n_contexts"]

    @property
    def n_tokens(self) -> int:
        """Tokens of all contexts, special tokens included."""
        return self.manifest["n_tokens"]

    @property
    def is_packed(self) -> bool:
        """Whether all contexts have `context_size` tokens."""
        return self.manifest["pack"]

    @cached_property
    def _tokens(self) -> UInt[np.ndarray, " n_tokens"]:
        return np.memmap(self.path / TOKENS, dtype=self.manifest["dtype"], mode="r")

    @cached_property
    def documents(self) -> Int[np.ndarray, " n_contexts"]:
        """Number of the document in which each context begins, memory-mapped."""
        return np.memmap(self.path / DOCUMENTS, dtype="<i8", mode="r")

    @cached_property
    def _ends(self) -> Int[np.ndarray, " n_contexts"]:
        return np.memmap(self.path / ENDS, dtype="<i8", mode="r")

    def bounds(self, contexts: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """(first, end) of each context in the array of all tokens."""
        numbers = np.asarray(contexts, dtype=np.int64)
        if self.is_packed:
            return numbers * self.context_size, (numbers + 1) * self.context_size
        first = np.where(numbers > 0, self._ends[np.maximum(numbers - 1, 0)], 0)
        return first, np.asarray(self._ends[numbers])

    def lengths(self, contexts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Number of tokens of each context."""
        first, end = self.bounds(contexts)
        return end - first

    def ids(self, contexts: Int[np.ndarray, " n"], pad: int = 0) -> Int[np.ndarray, "n longest"]:
        """Token ids, int64, padded on the right where contexts have different lengths."""
        first, end = self.bounds(contexts)
        longest = int((end - first).max(initial=0))
        columns = np.arange(longest)
        inside = columns < (end - first)[:, None]
        at = np.where(inside, first[:, None] + columns, first[:, None])
        return np.where(inside, self._tokens[at].astype(np.int64), pad)

    @property
    def notes(self) -> list[str]:
        """How many documents were cut, and how many had no tokens."""
        about, notes = self.manifest, []
        n, budget = about["n_documents"], about["settings"].get("n_tokens")
        if budget is not None and self.n_tokens < budget:
            notes.append(
                f"the documents end before dataset.n_tokens={budget}, after {self.n_tokens:,} "
                "tokens in full contexts"
            )
        if about["n_cut"]:
            notes.append(
                f"{about['n_cut']:,} of {counted(n, 'document')} were cut at dataset.context_size="
                f"{self.context_size} tokens; nothing beyond the cut is read"
            )
        if about["n_empty"]:
            notes.append(f"{about['n_empty']:,} of {counted(n, 'document')} had no token")
        if about["n_unused"]:
            notes.append(
                f"the last {about['n_unused']:,} tokens did not fill a context and are left out"
            )
        if about["skipped_files"]:
            first = about["skipped_files"][0]
            notes.append(
                f"{counted(len(about['skipped_files']), 'file')} of dataset.path "
                f"of other kinds were not read ({first}, …)"
            )
        if about["settings"]["pack"] and about["settings"]["separator"] is None:
            notes.append(
                "no token stands between two documents of a context; dataset.separator=eos, or "
                "the text of a token, puts one there"
            )
        return notes


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and has_intact_seal(manifest) else None


def context_size(cfg: CorpusConfig, limit: int | None, model: str) -> int:
    """`dataset.context_size`, by default the model's maximum `limit`, at most 1024.

    Raises ConfigError where it exceeds the limit.
    """
    if cfg.context_size is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and cfg.context_size > limit:
        raise ConfigError(
            f"dataset.context_size={cfg.context_size}: {model} takes at most {limit} tokens; type "
            f"dataset.context_size={limit}"
        )
    return cfg.context_size


def tokenized(cfg: CorpusConfig, about: TokenizerInfo, size: int, cache_dir: str | Path) -> Corpus:
    """The corpus of `dataset.path` for this tokenizer; it is tokenized unless that was done before.

    A process that was killed is continued from its last checkpoint. `dataset.path` may also name
    the folder of a tokenized corpus. Raises DataError for documents that cannot be read, for none
    with a token, and for a corpus that another tokenizer made; StoreError for a full disk.
    """
    if cfg.path and (Path(cfg.path) / MANIFEST).is_file():
        return _opened(Path(cfg.path), about, size, cfg)
    read = sources(cfg)
    settings = {
        "version": VERSION,
        "sources": read.identity,
        "tokenizer": about.fingerprint,
        "bos": about.bos,
        "separator": about.separator(cfg.separator) if cfg.pack else None,
        "context_size": size,
        "pack": cfg.pack,
        "text_column": cfg.text_column,
        "document": cfg.document,
        "encoding": cfg.encoding,
        "n_tokens": cfg.n_tokens,
    }
    folder = Path(cache_dir) / "corpora" / digest_of(settings)[:24]
    if _read_manifest(folder) is None:
        with locked(folder.with_suffix(".lock")):
            if _read_manifest(folder) is None:
                _Tokenization(cfg, about, read, settings, folder).run()
    return Corpus.open(folder)


def _opened(folder: Path, about: TokenizerInfo, size: int, cfg: CorpusConfig) -> Corpus:
    corpus = Corpus.open(folder)
    settings = corpus.manifest["settings"]
    if settings["tokenizer"] != about.fingerprint or settings["bos"] != about.bos:
        raise DataError(
            f"dataset.path={folder}: was tokenized with another tokenizer (or another "
            "model.prepend_bos) than this model's; type the path of its texts"
        )
    if corpus.context_size > size:
        raise DataError(
            f"dataset.path={folder}: its contexts have {corpus.context_size} tokens, more than "
            f"{size}; type the path of its texts"
        )
    if cfg.n_tokens is not None and cfg.n_tokens < corpus.n_tokens:
        raise ConfigError("dataset.n_tokens applies to texts, not to a tokenized corpus")
    return corpus


class _Tokenization:
    """Tokenizes and packs all documents of the sources into a folder."""

    def __init__(
        self,
        cfg: CorpusConfig,
        about: TokenizerInfo,
        read: Sources,
        settings: dict[str, Any],
        folder: Path,
    ) -> None:
        self.cfg, self.about, self.read = cfg, about, read
        self.settings, self.folder = settings, folder
        self.packer = Packer(
            settings["context_size"],
            settings["bos"],
            settings["separator"],
            about.dtype,
            pack=cfg.pack,
        )
        self.n_documents = self.n_empty = self.n_contexts = self.n_tokens = 0
        self.source = self.within = 0
        """Source and document in it that come next."""
        self.n_read = 0
        """Bytes of the sources before that document, about."""

    @property
    def _names(self) -> list[str]:
        return [TOKENS, DOCUMENTS, *([] if self.cfg.pack else [ENDS])]

    def run(self) -> None:
        """Tokenize what is left, and write the manifest."""
        # The tokenizer reads this when it is called.
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self._tokenize()
            if not self.n_contexts:
                raise self._nothing()
            self._finish()
        except OSError as error:
            raise cannot_write(self.folder / TOKENS, error) from error
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before

    def _nothing(self) -> DataError:
        if not self.n_documents or self.n_empty == self.n_documents:
            return DataError(f"dataset.path={self.cfg.path}: is empty; no document has a token")
        return DataError(
            f"dataset.path={self.cfg.path}: has {self.packer.n} tokens, too few for a context of "
            f"{self.packer.size}; type a smaller dataset.context_size="
        )

    def _resume(self) -> None:
        """Continue after the last checkpoint; what was written after it is cut off."""
        try:
            state = json.loads((self.folder / _PROGRESS).read_text("utf-8"))
            sizes = {n: (self.folder / n).stat().st_size for n in self._names}
        except (OSError, ValueError):
            state, sizes = {}, {}
        sound = isinstance(state, dict) and has_intact_seal(state)
        if sound and all(sizes[name] >= n for name, n in state["bytes"].items()):
            for name, n in state["bytes"].items():
                os.truncate(self.folder / name, n)
            self.n_documents, self.n_empty = state["n_documents"], state["n_empty"]
            self.n_contexts, self.n_tokens = state["n_contexts"], state["n_tokens"]
            self.source, self.within = state["source"], state["within"]
            self.n_read = state.get("n_read", 0)
            self.packer.resume(state["packer"])
            log.info("tokenization continues after %s", counted(self.n_documents, "document"))
            return
        for name in self._names:
            (self.folder / name).write_bytes(b"")

    @property
    def _is_enough(self) -> bool:
        return self.cfg.n_tokens is not None and self.n_tokens >= self.cfg.n_tokens

    def _tokenize(self) -> None:
        unit, shown, total = "document", self.n_documents, None
        if self.read.n_bytes:
            unit, shown = "MB", self.n_read // _BAR_BYTES
            total = max(self.read.n_bytes // _BAR_BYTES, 1)
        with ExitStack() as stack:
            files = [stack.enter_context((self.folder / n).open("ab")) for n in self._names]
            bar = stack.enter_context(progress(total, "tokenizing", unit, shown))
            pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="saexp-tokenize"))
            waiting: deque[tuple[_DocumentBatch, Future[list[list[int]]]]] = deque()
            n_batches = 0
            for batch in self._batches():
                waiting.append((batch, pool.submit(self.about.encode, batch.texts)))
                # One batch is tokenized while the next is read.
                if len(waiting) > 1:
                    shown = self._pack(*waiting.popleft(), files, bar, shown)
                    n_batches += 1
                    if n_batches % _BATCHES_PER_CHECKPOINT == 0:
                        self._checkpoint(files)
                if self._is_enough:
                    break
            while waiting and not self._is_enough:
                shown = self._pack(*waiting.popleft(), files, bar, shown)
            self._checkpoint(files)

    def _batches(self) -> Iterator["_DocumentBatch"]:
        """Documents after those that are done, in batches."""
        batch, n_before, skip = _DocumentBatch(self.source, self.within), 0, self.within
        for number in range(self.source, len(self.read.items)):
            one, within, n_read = self.read.items[number], 0, 0
            for text, n_read in one.documents(self.cfg):
                within += 1
                if within <= skip:
                    continue
                batch.add(text, number, within, n_before + n_read)
                if batch.n_characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch = _DocumentBatch(number, within)
            n_before, skip = n_before + one.n_bytes, 0
        if batch.texts:
            yield batch

    def _pack(
        self,
        batch: "_DocumentBatch",
        encoded: "Future[list[list[int]]]",
        files: Sequence[Any],
        bar: Any,
        shown: int,
    ) -> int:
        """Pack and write a batch; returns how much of the progress bar is shown."""
        for ids in encoded.result():
            if len(ids):
                self.packer.add(ids, self.n_documents)
            else:
                self.n_empty += 1
            self.n_documents += 1
        self.source, self.within, self.n_read = batch.source, batch.within, batch.n_read
        contexts, documents = self.packer.contexts, self.packer.documents
        self.packer.contexts, self.packer.documents = [], []
        if self.cfg.n_tokens is not None:
            lengths = np.cumsum([len(c) for c in contexts])
            n = int(np.searchsorted(lengths, self.cfg.n_tokens - self.n_tokens)) + 1
            contexts, documents = contexts[:n], documents[:n]
        if contexts:
            lengths = np.asarray([len(c) for c in contexts], dtype="<i8")
            arrays = [np.concatenate(contexts), np.asarray(documents, dtype="<i8")]
            arrays += [] if self.cfg.pack else [self.n_tokens + np.cumsum(lengths)]
            for file, array in zip(files, arrays, strict=True):
                file.write(array.tobytes())
            self.n_contexts += len(contexts)
            self.n_tokens += int(lengths.sum())
        now = self.n_read // _BAR_BYTES if self.read.n_bytes else self.n_documents
        bar.update(now - shown)
        return now

    def _checkpoint(self, files: Sequence[Any]) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        state = {
            "bytes": {name: (self.folder / name).stat().st_size for name in self._names},
            "n_documents": self.n_documents,
            "n_empty": self.n_empty,
            "n_contexts": self.n_contexts,
            "n_tokens": self.n_tokens,
            "source": self.source,
            "within": self.within,
            "n_read": self.n_read,
            "packer": self.packer.state,
        }
        write_json(self.folder / _PROGRESS, sealed(state))

    def _finish(self) -> None:
        manifest = {
            "key": self.folder.name,
            "settings": self.settings,
            "dtype": self.about.dtype.str,
            "context_size": self.packer.size,
            "pack": self.cfg.pack,
            "n_contexts": self.n_contexts,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "n_empty": self.n_empty,
            "n_cut": self.packer.n_cut,
            "n_unused": self.packer.n,
            "skipped_files": self.read.skipped,
            "files": checksums(self.folder, self._names),
        }
        write_json(self.folder / MANIFEST, sealed(manifest))
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        sync(self.folder)
        log.info(
            "tokenized %s: %s in %s",
            counted(self.n_documents, "document"),
            counted(self.n_tokens, "token"),
            counted(self.n_contexts, "context"),
        )


class _DocumentBatch:
    """Documents that are tokenized together, and what was read of the sources with them."""

    def __init__(self, source: int, within: int) -> None:
        self.texts: list[str] = []
        self.source, self.within = source, within
        """The source, and the number of its documents read with the last document."""
        self.n_read = self.n_characters = 0

    def add(self, text: str, source: int, within: int, n_read: int) -> None:
        """Add the next document."""
        self.texts.append(text)
        self.source, self.within, self.n_read = source, within, n_read
        self.n_characters += len(text) + 1
