"""One dataclass per config group, validated when it is built. No torch here."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.environment import at_least, one_of, parse_layers, parse_width
from saexp.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class ModelConfig:
    """A language model and how to load it."""

    name: str = MISSING
    """Hub id, local folder, or a model shipped with saexp (`tiny`, `tiny_control`)."""
    loader: str = "hf"
    """Registry name of the loader."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device_map: str | None = None
    """How to spread a model over several devices (`auto`, as accelerate does it)."""
    default_layer: int | None = None
    """Layer used when `layer` is not given."""
    chat: bool = False
    """Wrap prompts in the tokenizer's chat template."""
    prepend_bos: bool | None = None
    """Whether texts begin with the BOS token; null: as the SAE was trained, or, where its files do
    not say, as the tokenizer does."""
    trust_remote_code: bool = False
    """Whether to run code from the hub repository."""
    blocks: str | None = None
    """Module path of the list of blocks, for architectures that are not recognised."""
    device: str = "auto"
    """cuda, mps, cpu, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto (bfloat16 on cuda, else float32)."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, DTYPES)


@dataclass(kw_only=True)
class SAEConfig:
    """A sparse autoencoder and where its files are."""

    name: str = MISSING
    """Name in reports and paths."""
    loader: str = MISSING
    """`release` (sae-lens' catalogue), `path` (a folder) or `random` (control)."""
    release: str | None = None
    """Release in sae-lens' catalogue; may contain {model}, see conf/sae/gemmascope.yaml."""
    id: str | None = None
    """SAE id in the release; by default determined by layer and width."""
    path: str | None = None
    """Folder with the SAE's files; may contain {layer} and {width}."""
    layer: Any = None
    """0-based block index whose stream it reads."""
    width: Any = None
    """d_sae, as `16k` or a plain integer."""
    default_width: Any = None
    """Width used when `width` is not given."""
    l0: int | None = None
    """Target average L0 where a release has several; the canonical one by default."""
    model_name: str | None = None
    """The language model it is used with."""
    architecture: str | None = None
    """Architecture (`random` only)."""
    stream: str | None = None
    """Stream it reads (`resid_post`, …), where its files do not say; an error if they disagree."""
    check: str = "warn"
    """What to do if the SAE does not fit the stream it reads: warn, error, or off (not checked)."""
    d_in: int | None = None
    """Input size (`random` only); the model's d_model by default."""
    device: str = "auto"
    """cuda, mps, cpu, or auto."""
    dtype: str = "float32"
    """dtype of its weights."""
    seed: int = 0
    """Seed (`random` only)."""
    norm_factor: Any = None
    """Factor that inputs are multiplied by, where the files do not say: a number, or `estimate`
    (sqrt(d_in) over the mean norm of ordinary positions of the run's neutral text)."""

    def __post_init__(self) -> None:
        factor = self.norm_factor
        number = isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0
        if factor is not None and factor != "estimate" and not number:
            raise ConfigError(
                f"sae.norm_factor={factor} is not a factor; type a number above 0, or estimate"
            )
        parse_width(self.width)
        if self.layer is not None:
            parse_layers(self.layer)
        one_of("sae.dtype", self.dtype, DTYPES)
        one_of("sae.check", self.check, ("warn", "error", "off"))


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


@dataclass(kw_only=True)
class PositionsConfig:
    """Which tokens of each text are analysed."""

    name: str = MISSING
    """Registry name."""
    n: int = 1
    """Number of tokens (`entity_last_n`, `last`, `random`, `after_entity`)."""
    indices: list[int] | None = None
    """Indices into the text's tokens, negative ones from the end (`indices`)."""
    substring: str | None = None
    """Text whose tokens are analysed (`substring`)."""
    include_special: bool = False
    """Whether special tokens (BOS, …) can be chosen."""
    max_norm_ratio: float | None = 5.0
    """Positions whose norm exceeds this multiple of the stream's median norm (attention sinks) are
    excluded from training and from reconstruction metrics; null: none are."""
    seed: int = 0
    """Seed of `random`."""

    def __post_init__(self) -> None:
        at_least("positions.n", self.n, 1)
        at_least("positions.seed", self.seed, 0)
        ratio = self.max_norm_ratio
        if ratio is not None and not ratio > 1:
            raise ConfigError(
                f"positions.max_norm_ratio={ratio} would exclude ordinary positions; type a "
                "number above 1 such as 5, or null to keep every position"
            )


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics, tables and figures are sent."""

    name: str = MISSING
    """Registry name: wandb, jsonl or none."""
    project: str = "saexp"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    group: str | None = None
    """W&B group; by default the name of the sweep's folder."""
    mode: str | None = None
    """online, offline or disabled; by default online if a key is set and the server answers."""


@dataclass(kw_only=True)
class CollectorConfig:
    """Where activations come from."""

    name: str = MISSING
    """Registry name: hf, imported, transformer_lens or nnsight."""


FORMATS = ("auto", "memmap", "npy", "npz", "safetensors", "saelens")


@dataclass(kw_only=True)
class ImportedConfig(CollectorConfig):
    """Activations that another tool wrote (`collector=imported`)."""

    path: str | None = None
    """File or folder with the activations of the data set."""
    neutral_path: str | None = None
    """The same for the neutral text (`dataset.background`); without it the background filter and
    the SAE's check have nothing to read, unless the model's weights are there to compute it."""
    format: str = "auto"
    """memmap (a folder with `acts.dat` and perhaps `ids.dat`), npy, npz, safetensors (a folder) or
    saelens (a cached-activation dataset); auto recognises each."""
    shape: list[int] | None = None
    """memmap: shape of `acts.dat`, `[n, n_layers, n_positions, d_model]`, float32."""
    layers: list[int] | None = None
    """Blocks along the layer axis, 0-based; all from 0 where not given. An array without a layer
    axis has one block."""
    stream: str = "resid_post"
    """Stream of arrays that are not called after a hookpoint; `resid_pre` for block inputs."""
    ids_dtype: str = "int32"
    """memmap: dtype of `ids.dat`, int32, int64 or float32."""

    def __post_init__(self) -> None:
        one_of("collector.format", self.format, FORMATS)
        one_of("collector.ids_dtype", self.ids_dtype, ("int32", "int64", "float32"))
        if self.shape is not None and len(self.shape) not in (3, 4):
            raise ConfigError(
                f"collector.shape={list(self.shape)} must have four numbers; type "
                "'collector.shape=[n,n_layers,n_positions,d_model]'"
            )
        for n in self.layers or ():
            at_least("collector.layers", n, 0)


@dataclass(kw_only=True)
class StoreConfig:
    """How activations are collected and stored."""

    batch_tokens: Any = "auto"
    """Tokens per batch of the forward pass, padding included; auto: as many as fit."""
    shard_rows: int = 65536
    """Rows per shard file."""
    dtype: str = "auto"
    """dtype on disk: auto (the model's own), float32, bfloat16, float16."""
    share_prefixes: bool = True
    """Compute a long prefix shared by many texts only once; equal up to rounding."""

    def __post_init__(self) -> None:
        if self.batch_tokens != "auto":
            if not str(self.batch_tokens).isdecimal():
                raise ConfigError(
                    f"store.batch_tokens={self.batch_tokens} is not a number; type auto, or 4096"
                )
            at_least("store.batch_tokens", int(self.batch_tokens), 1)
        at_least("store.shard_rows", self.shard_rows, 1)
        one_of("store.dtype", self.dtype, DTYPES)


@dataclass(kw_only=True)
class SAETrainerConfig:
    """An SAE or a transcoder to train; sae-lens' training classes and their own options."""

    name: str = MISSING
    """Architecture: standard, gated, topk, batchtopk, jumprelu, matryoshka_batchtopk; a transcoder:
    standard_transcoder, batchtopk_transcoder, jumprelu_transcoder, matryoshka_batchtopk_transcoder.
    """
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the architecture as sae-lens names them: k, l1_coefficient, l0_coefficient …; a
    transcoder has skip too. Not fields of this class: sae-lens defines them, differently for each
    architecture and version, and they are validated against its classes before training starts."""
    normalize_activations: str = "expected_average_only_in"
    """Scaling of the streams while training (folded into the weights at the end), or `none`."""
    n_samples: int = 2_000_000
    """Activation vectors seen in training; the store is reread in a new order as often as
    needed."""
    batch_size: int = 1024
    """Activation vectors per step."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    lr_warm_up: float = 0.05
    """Fraction of the steps during which the learning rate rises from 0."""
    lr_decay: float = 0.2
    """Fraction of the steps, at the end, during which it falls to 0."""
    sparsity_warm_up: float = 0.1
    """Fraction of the steps during which the sparsity coefficient, if any, rises from 0."""
    dead_feature_window: int = 500
    """Steps without activation after which a latent counts as dead."""
    held_out: float = 0.1
    """Fraction of the texts that is held out; every reported number is measured on these."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed training resumes from the last one."""
    log_every: int = 25
    """Steps between logged numbers."""
    seed: int = 0
    """Seed of the initial weights, the data order and the held-out texts."""

    def __post_init__(self) -> None:
        scalings = ("none", "expected_average_only_in")
        one_of("sae_trainer.normalize_activations", self.normalize_activations, scalings)
        for name in ("n_samples", "batch_size", "checkpoint_every", "log_every"):
            at_least(f"sae_trainer.{name}", getattr(self, name), 1)
        for name in ("lr_warm_up", "lr_decay", "sparsity_warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"sae_trainer.{name}={getattr(self, name)} is not a fraction of the steps"
                )
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"sae_trainer.held_out={self.held_out} leaves nothing to train on or to measure; "
                "type a fraction such as 0.1"
            )
