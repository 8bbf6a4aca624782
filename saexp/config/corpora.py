"""The config of corpora: token streams instead of lists of examples. No torch here."""

import codecs
from dataclasses import dataclass

from saexp.config.components import DatasetConfig
from saexp.config.environment import at_least, one_of
from saexp.errors import ConfigError

DOCUMENTS = ("file", "paragraph", "line")


@dataclass(kw_only=True)
class CorpusConfig(DatasetConfig):
    """Documents tokenized once, and packed into contexts of equal length (`dataset=corpus`)."""

    context_size: int | None = None
    """Tokens per context; by default the model's maximum, at most 1024."""
    pack: bool = True
    """Concatenate documents into full contexts; false: a context per document, cut at the size."""
    separator: str = "bos"
    """Token between two documents of a context: bos (as sae-lens), eos, none, or the text of a
    token of the vocabulary, such as <|endoftext|>. A model whose texts do not begin with BOS gets
    none in place of bos, with a note."""
    text_column: str = "text"
    """Column of the texts in JSONL, Parquet and data sets."""
    document: str = "file"
    """What is a document in a text file: the file, a paragraph (between blank lines), or a line."""
    encoding: str = "utf-8"
    """Encoding of text files and JSONL."""
    subset: str | None = None
    """Configuration of a data set of the hub, such as 20231101.en."""
    streaming: bool = False
    """Fetch a data set of the hub while it is tokenized, up to `n_tokens`."""
    n_tokens: int | None = None
    """Stop after the context that reaches this number of tokens; all by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("dataset.document", self.document, DOCUMENTS)
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ConfigError(
                f"dataset.encoding={self.encoding}: no such encoding; type utf-8 or latin-1"
            ) from error
        if self.context_size is not None:
            at_least("dataset.context_size", self.context_size, 2)
        if self.n_tokens is not None:
            at_least("dataset.n_tokens", self.n_tokens, 1)
        if self.streaming and self.n_tokens is None:
            raise ConfigError(
                "dataset.streaming=true reads until dataset.n_tokens= is reached; type a number"
            )
