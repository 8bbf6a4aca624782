"""Packing of tokenized documents into contexts, as sae-lens packs them.

`concat_and_batch_sequences` of sae-lens is the model: each context begins with BOS where texts do,
and a separator stands between two documents of a context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saexp.errors import ConfigError


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
            taken = tokens[start : start + self.size - self.n]
            self.partial[self.n : self.n + len(taken)] = taken
            self.n += len(taken)
            start += len(taken)
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
