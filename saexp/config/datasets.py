"""Configs of data sets: lists of examples, and corpora (token streams). No torch here."""

import codecs
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.environment import at_least, one_of
from saexp.errors import ConfigError

COLUMNS = ("text", "group", "entity", "span", "entity_type", "prompt", "answer", "id", "split")
"""Columns of a data file that have a meaning; all others are kept as they are."""


MISSING_VALUES = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Texts that `pandas.read_csv` treats as missing values by default."""


@dataclass(kw_only=True)
class DatasetConfig:
    """Texts with groups, spans, answers and splits."""

    name: str = MISSING
    """Registry name."""
    path: str | None = None
    """File or folder with the data."""
    model_name: str | None = None
    """The language model: shipped entities depend on it."""
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMNS))
    """Column name of this list -> the file's column name, where they differ."""
    missing_values: list[Any] = field(default_factory=lambda: list(MISSING_VALUES))
    """Texts that count as missing values in a column (a null, NaN or empty cell always does), by
    default those of `pandas.read_csv`. Where NA is a value: 'dataset.missing_values=["null","nan"]'
    """
    groups: list[str] | None = None
    """The two groups to contrast, first against second; by default those of the file."""
    group_rule: str | None = None
    """Rule on a column that defines the groups, e.g. `matching_tokens == 0`."""
    entity_types: list[str] | None = None
    """Entity types to keep; all by default."""
    n_examples: int | None = None
    """Most examples per group and entity type (seeded choice)."""
    split: dict[str, float] = field(default_factory=lambda: {"train": 0.5, "val": 0.1, "test": 0.4})
    """Fractions of entities per split, where the data has no splits."""
    template: str | None = None
    """Template of each entity's text, with {entity} and {entity_type}."""
    prompt_template: str | None = None
    """Template of the prompt that interventions run on, with {entity} and {entity_type}."""
    hf_split: str = "train"
    """Split of a `datasets` dataset."""
    text: str | None = None
    """Text from the command line."""
    answer: str | None = None
    """Its answer."""
    foil: str | None = None
    """A wrong answer to compare with."""
    answer_space: str = "auto"
    """Whether to put a space before an answer (or foil) that has none: auto (where one belongs
    between the prompt's last character and the answer's first), always, or never."""
    background: str | None = None
    """File of neutral text for the background filter; by default the shipped one."""
    max_length: int = 512
    """Longest text in tokens, special tokens included; longer texts are truncated."""
    truncation: str = "skip"
    """Texts truncated at max_length whose end determines the analysed tokens (positions last,
    negative indices): skip (and count) them, or keep (read them at the cut, with a note)."""
    seed: int = 0
    """Seed of the split and of the choice of examples."""

    def __post_init__(self) -> None:
        at_least("dataset.max_length", self.max_length, 2)
        one_of("dataset.answer_space", self.answer_space, ("auto", "always", "never"))
        one_of("dataset.truncation", self.truncation, ("skip", "keep"))
        if not all(isinstance(text, str | int | float) for text in self.missing_values):
            raise ConfigError(
                f"dataset.missing_values={list(self.missing_values)} must be texts or numbers "
                """(null itself always is missing); quote: 'dataset.missing_values=["null","NA"]'"""
            )
        at_least("dataset.seed", self.seed, 0)
        if self.n_examples is not None:
            at_least("dataset.n_examples", self.n_examples, 1)
        for name in self.columns:
            one_of("dataset.columns", name, COLUMNS)
        for name, fraction in self.split.items():
            one_of("dataset.split", name, ("train", "val", "test"))
            at_least(f"dataset.split.{name}", fraction, 0)
        if abs(sum(self.split.values()) - 1) > 1e-6:
            raise ConfigError(
                f"dataset.split sums to {sum(self.split.values()):g}; its fractions must sum to 1"
            )


@dataclass(kw_only=True)
class CustomDatasetConfig(DatasetConfig):
    """A data set that was registered without a config class."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the data set, not validated."""


@dataclass(kw_only=True)
class WikidataConfig(DatasetConfig):
    """Entity and query files in the format of Ferrando et al. (2024)."""

    min_correct: int = 3
    """Correct sampled answers that make an attribute known."""
    min_known: int = 2
    """Known attributes that make an entity known."""
    max_unknown: int = 0
    """Largest number of known attributes of an unknown entity."""
    fetch: Any = field(default_factory=list)
    """Entity types to fetch from Wikidata into `path` first, one or a list."""
    n_fetched: int = 200
    """Entities to fetch per type."""
    endpoint: str = "https://query.wikidata.org/sparql"
    """SPARQL endpoint."""
    min_sitelinks: int = 20
    """Fewest Wikipedia articles about a fetched entity."""
    timeout: int = 60
    """Seconds that a query may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("n_fetched", 1), ("min_sitelinks", 0), ("timeout", 1)):
            at_least(f"dataset.{name}", getattr(self, name), least)


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
