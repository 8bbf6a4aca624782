"""One dataclass per config group, validated when it is built. No torch here."""

import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from saexp.config.environment import (
    at_least,
    is_whole,
    one_of,
    parse_layers,
    parse_widths,
)
from saexp.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
QUANTIZATIONS = ("4bit", "8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")


_structured = functools.cache(OmegaConf.structured)


@functools.cache
def _simple_defaults(cls: type) -> dict[str, Any]:
    """The defaults of a component's settings that are one value, not a list or mapping."""
    content = OmegaConf.to_container(_structured(cls), resolve=False)
    assert isinstance(content, dict)
    return {str(k): value for k, value in content.items() if not isinstance(value, dict | list)}


def with_defaults(cls: type) -> DictConfig:
    """The settings of a component with their defaults, as OmegaConf reads them off its class.

    A copy takes a quarter of the time of another reading.
    """
    return copy.deepcopy(_structured(cls))


def other_than_default(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a component that differ from its defaults in value or type, and all lists.

    Setting a value takes longer than this comparison, and most have their defaults.
    """
    defaults = _simple_defaults(cls)
    return {
        key: value
        for key, value in settings.items()
        if key not in defaults or (type(value), value) != (type(defaults[key]), defaults[key])
    }


@dataclass(kw_only=True)
class ModelConfig:
    """A language model and how to load it."""

    name: str = MISSING
    """Hub id, local folder, GGUF file, or a model shipped with saexp (`tiny`, `tiny_control`);
    `smollm2` is what `make real-model` makes, else its hub id."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder or hub repository `name`. It is dequantised once for each
    dtype, into `cache_dir/models`."""
    quantization: str | None = None
    """4bit (NF4) or 8bit: quantise the weights with bitsandbytes as they are loaded; needs CUDA."""
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
    """float32, bfloat16, float16, or auto: the own dtype of a checkpoint in bfloat16 or float16
    where the device computes it natively (cuda; CPUs with AVX512-BF16 or AMX), else float32. The
    shipped models are computed in float32."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            one_of("model.quantization", self.quantization, QUANTIZATIONS)


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
        parse_widths(self.width)
        if self.layer is not None:
            parse_layers(self.layer)
        one_of("sae.dtype", self.dtype, DTYPES)
        one_of("sae.check", self.check, ("warn", "error", "off"))


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
class AnalyzerConfig:
    """How latents are compared between groups."""

    name: str = MISSING
    """Registry name."""
    alpha: float = 0.05
    """False discovery rate at which a latent counts as significant."""
    n_bootstrap: int = 1000
    """Resamples of the studentised bootstrap over entities, of means (stats, capability)."""
    background_quantile: float = 0.99
    """A latent is not selected if its density on background tokens is at or above this quantile of
    the densities of all latents that are active there, and at or above 0.02."""
    background_max: float | None = None
    """Absolute limit on that density instead of the quantile (0.02 in Ferrando et al. 2024)."""
    n_background: int = 4000
    """Random background tokens."""
    top_k: int = 10
    """Latents per direction marked `selected`."""
    match_tokens: bool = True
    """Resample entities to equal token counts where those of the groups differ."""
    scores: bool = True
    """Input and output scores of the selected latents (Arad et al. 2025)."""
    attribution: bool = False
    """Effect of each latent on the answer's logit, direct and by gradient."""
    placebo: int = 0
    """Permutations of the group labels, and random latents, with which the contrast is repeated to
    estimate how often its claim would be made by chance; under analyzer=probe, permutations with
    which the dense probe is fitted and tested again (`null`). 0: none."""
    seed: int = 0
    """Seed of every random choice: rows, background tokens, folds, resamples, placebo."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"analyzer.alpha={self.alpha} is not a rate; type one such as 0.05")
        at_least("analyzer.n_bootstrap", self.n_bootstrap, 0)
        at_least("analyzer.n_background", self.n_background, 1)
        at_least("analyzer.top_k", self.top_k, 1)
        at_least("analyzer.placebo", self.placebo, 0)
        at_least("analyzer.seed", self.seed, 0)
        for name in ("background_quantile", "background_max"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"analyzer.{name}={value} is not a fraction; type 0 to 1")


@dataclass(kw_only=True)
class CustomAnalyzerConfig(AnalyzerConfig):
    """An analyzer that was registered without a config class."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the analyzer, not validated."""


@dataclass(kw_only=True)
class CapabilityConfig(AnalyzerConfig):
    """Ranks and probabilities of each prompt's answer, without and with the SAE spliced in."""

    n_top: int = 10
    """Most likely next tokens that the report shows."""
    batch_tokens: int = 8192
    """Tokens per batch of prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("analyzer.n_top", self.n_top, 1)
        at_least("analyzer.batch_tokens", self.batch_tokens, 1)


@dataclass(kw_only=True)
class ProbeConfig(AnalyzerConfig):
    """Sparse probes on k latents, beside a dense probe on the activations."""

    k: Any = field(default_factory=lambda: [1, 2, 5, 20])
    """Numbers of latents that the sparse probes use, one or a list."""
    strengths: Any = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0, 10.0])
    """Inverse L2 penalties to choose from, one or a list."""
    max_train: int = 20_000
    """Most rows that the probes are trained on (seeded choice)."""
    transfer: str | None = None
    """File of a second data set of the same two groups, on which the probes are tested too."""
    within: Any = None
    """Columns (one or a list) that define strata: AUROCs over pairs of one stratum are added."""
    unseen: Any = None
    """Column: test rows are also scored by probes trained on rows with other values of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            if not is_whole(size, 1):
                raise ConfigError(
                    f"analyzer.k={size} is not a whole number of at least 1; type e.g. analyzer.k=5"
                )
        strengths = self.strengths if isinstance(self.strengths, list) else [self.strengths]
        if not strengths or not all(
            isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in strengths
        ):
            raise ConfigError(
                f"analyzer.strengths={strengths} must be numbers above 0 (inverse L2 penalties), "
                "such as [0.01,0.1,1]"
            )
        at_least("analyzer.max_train", self.max_train, 4)

    @property
    def sizes(self) -> list[Any]:
        """`k` as a list."""
        return self.k if isinstance(self.k, list) else [self.k]

    @property
    def penalties(self) -> list[float]:
        """`strengths` as a list of floats."""
        return [
            float(c)
            for c in (self.strengths if isinstance(self.strengths, list) else [self.strengths])
        ]


@dataclass(kw_only=True)
class StatsConfig(AnalyzerConfig):
    """Sparsity, activation values and the most frequent latents of each group."""

    top_k: int = 10
    """Most frequent latents that are compared between the groups."""
    n_bins: int = 60
    """Bins of the histogram of activation values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("analyzer.n_bins", self.n_bins, 2)


RANKINGS = ("max", "mean", "frequency")


@dataclass(kw_only=True)
class TopFeaturesConfig(AnalyzerConfig):
    """The latents with the largest activations, layer by layer."""

    top_k: int = 10
    """Latents per layer."""
    by: str = "max"
    """What latents are ranked by: max, mean or frequency."""
    n_texts: int = 3
    """Texts per latent that are shown token by token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("analyzer.by", self.by, RANKINGS)
        at_least("analyzer.n_texts", self.n_texts, 1)


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics, tables and figures are sent."""

    kind: str = MISSING
    """Registry name: wandb, tensorboard, mlflow, jsonl or none."""
    kinds: dict[str, bool] = field(default_factory=dict)
    """The trackers of 'tracker=[wandb,jsonl]', where `kind` is the last of them."""
    project: str | None = None
    """W&B project or MLflow experiment; by default WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else
    saexp."""
    entity: str | None = None
    """W&B team or user; by default WANDB_ENTITY."""
    name: str | None = None
    """Name of the run; by default WANDB_NAME, else model, SAE and layer. In a sweep what varies is
    appended."""
    group: str | None = None
    """Group; in W&B by default WANDB_RUN_GROUP, else a sweep's date, time and experiment."""
    tags: list[str] = field(default_factory=list)
    """Tags; in W&B by default WANDB_TAGS."""
    notes: str | None = None
    """Notes; in W&B by default WANDB_NOTES."""
    artifacts: bool = True
    """Whether the store (by its path), the SAE and the results are recorded as artifacts."""
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
class SweepConfig:
    """How the cells of a sweep are run."""

    dry_run: bool = False
    """Print what the sweep would compute, and compute nothing."""


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
