"""One dataclass per task, with the settings of that task alone, and that of SAE training.

No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.environment import at_least, is_whole, one_of, parse_width
from saexp.errors import ConfigError

CACHE_ACTIONS = ("list", "verify", "prune", "compare")
PROMPT_FORMS = ("auto", "question", "begun", "own")


@dataclass(kw_only=True)
class TaskConfig:
    """What a run does (`task=analyze` has no settings of its own)."""

    name: str = MISSING
    """Registry name: analyze, collect, evaluate, train, dashboard, label, cache,
    report, workspace."""


@dataclass(kw_only=True)
class CustomTaskConfig(TaskConfig):
    """A task that was registered without a config class."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task, not validated."""


@dataclass(kw_only=True)
class StreamsConfig(TaskConfig):
    """A task that works on several streams of a layer."""

    streams: list[str] = field(default_factory=lambda: ["resid_post"])
    """Streams that are stored at each layer: resid_post, attn_out, mlp_out, …; `train` trains on
    the first, and a transcoder predicts the second from the first."""

    def __post_init__(self) -> None:
        if not self.streams:
            raise ConfigError("task.streams=[] contains no stream; type task.streams=[resid_post]")


@dataclass(kw_only=True)
class TrainConfig(StreamsConfig):
    """Trains an SAE or a transcoder; how is set in the group `sae_trainer`."""


@dataclass(kw_only=True)
class SAETrainerConfig:
    """An SAE or a transcoder to train; sae-lens' training classes and their own options."""

    name: str = MISSING
    """Architecture: standard, gated, topk, abstopk, batchtopk, jumprelu, matryoshka_batchtopk,
    matching_pursuit; a transcoder: standard_transcoder, batchtopk_transcoder, jumprelu_transcoder,
    matryoshka_batchtopk_transcoder."""
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
    evaluate_every: int = 0
    """Steps between evaluations on held-out text (CE score and L0). 0: only at the end, and for
    stored activations never."""
    source: str | None = None
    """store: activations are collected first, and stored; stream: they are computed from a corpus
    while the SAE is trained. By default stream with dataset=corpus, else store."""
    autocast: bool | None = None
    """Whether matrix products of the training are computed in bfloat16; weights, losses, counters
    and the optimizer's state are float32. null: where the model itself is computed in bfloat16, and
    the device of the SAEs does so natively."""
    device: str | None = None
    """Where the SAEs are trained, such as cuda:1; null: on the model's device."""
    buffer_rows: int = 131_072
    """stream: activation vectors in the buffer in which contexts are mixed."""
    mix_fraction: float = 0.5
    """stream: fraction of the buffer that is kept when the rest was served."""
    variants: list[Any] = field(default_factory=list)
    """Several SAEs trained in one pass over the data: for each the settings and options in which it
    differs, such as [{k: 16}, {k: 32}] or [{name: topk}, {name: standard, seed: 1}]. A list of
    layers or widths gives one SAE for each, too."""
    seed: int = 0
    """Seed of the initial weights, the data order and the held-out texts; that of a variant, of its
    initial weights alone."""

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
        at_least("sae_trainer.evaluate_every", self.evaluate_every, 0)
        if self.source is not None:
            one_of("sae_trainer.source", self.source, ("store", "stream"))
        at_least("sae_trainer.buffer_rows", self.buffer_rows, 1)
        if not 0 <= self.mix_fraction < 1:
            raise ConfigError(
                f"sae_trainer.mix_fraction={self.mix_fraction} must be at least 0 and below 1"
            )


OF_ONE_SAE = (
    "name",
    "normalize_activations",
    "lr",
    "lr_warm_up",
    "lr_decay",
    "sparsity_warm_up",
    "dead_feature_window",
    "seed",
)
"""Settings of `sae_trainer` in which the SAEs of one pass may differ, beside their options."""


@dataclass(kw_only=True)
class CollectConfig(StreamsConfig):
    """Collects activations into the store."""

    shard: int | None = None
    """Which of the `n_shards` parts of the store this process collects; all where not given."""
    n_shards: int = 1
    """Number of parts that the work is divided into, one per process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("task.n_shards", self.n_shards, 1)
        if self.shard is not None and not 0 <= self.shard < self.n_shards:
            raise ConfigError(
                f"task.shard={self.shard} is not below task.n_shards={self.n_shards}; "
                f"type task.shard=<0 to {self.n_shards - 1}> or a larger task.n_shards="
            )


@dataclass(kw_only=True)
class CacheConfig(TaskConfig):
    """Lists, verifies, prunes or compares the activation stores of `cache_dir`."""

    action: str = "list"
    """list, verify, prune or compare."""
    max_size: str | None = None
    """prune: remove the least recently used stores until this size is left, such as 20GB."""
    max_age: str | None = None
    """prune: remove stores that were not used for this long, such as 30d."""
    stores: list[str] = field(default_factory=list)
    """compare: the keys of two stores, or prefixes of them."""

    def __post_init__(self) -> None:
        one_of("task.action", self.action, CACHE_ACTIONS)


@dataclass(kw_only=True)
class ReportConfig(TaskConfig):
    """Makes the pages of a saved run or sweep again from its files."""

    path: str | None = None
    """Folder of a run or a sweep."""
    cells: bool = True
    """Of a sweep: the pages of its finished cells too."""


@dataclass(kw_only=True)
class WorkspaceConfig(TaskConfig):
    """Saves a view of a W&B project whose panels show what its runs log."""

    path: str | None = None
    """Folder of a sweep or run, or a project `entity/project`."""
    title: str = "saexp"
    """Name of the saved view, and of the report."""
    report: bool = False
    """Save a W&B report with the same panels too."""
    dry_run: bool = False
    """Print the panels and save nothing."""


@dataclass(kw_only=True)
class DashboardConfig(TaskConfig):
    """Pages of single latents."""

    latents: Any = "top:20"
    """Latent indices such as [12,160], or top:20 for the 20 best of the run's own contrast."""
    texts: str = "auto"
    """Texts that are searched for examples: dataset, background (neutral prose, see
    `dataset.background`), or auto: the background where the data set's texts are names, else the
    data set."""
    n_top: int = 10
    """Maximally activating examples per latent."""
    n_quantile: int = 2
    """Examples at each of `quantiles`."""
    quantiles: list[float] = field(default_factory=lambda: [0.9, 0.75, 0.5, 0.25, 0.1])
    """Quantiles of a latent's nonzero activations at which examples are drawn."""
    before: int = 24
    """Tokens shown before the token with the largest activation of an example."""
    after: int = 12
    """Tokens shown after it."""
    n_tokens: int = 10
    """Promoted and suppressed output tokens; 0: the model's weights are not read."""
    n_similar: int = 6
    """Nearest decoder directions."""
    n_correlated: int = 6
    """Correlated latents; 0: only the chosen latents are encoded."""

    def __post_init__(self) -> None:
        one_of("task.texts", self.texts, ("auto", "dataset", "background"))
        for name, least in (("n_top", 1), ("n_quantile", 0), ("before", 0), ("after", 0)):
            _within(f"task.{name}", getattr(self, name), least, 10_000)
        for name in ("n_tokens", "n_similar", "n_correlated"):
            _within(f"task.{name}", getattr(self, name), 0, 10_000)
        if not all(0 <= quantile <= 1 for quantile in self.quantiles):
            raise ConfigError(f"task.quantiles={self.quantiles} must be from 0 to 1")


@dataclass(kw_only=True)
class EvaluateConfig(TaskConfig):
    """SAEs spliced in place of the activations: loss, KL, sparsity, faithfulness."""

    widths: Any = None
    """Several widths of each layer in one run, such as [16k,65k]; the run's `width` if null."""
    n_texts: int | None = None
    """Number of texts (seeded choice); all where not given."""
    batch_tokens: Any = "auto"
    """Tokens per batch of the forward pass; auto: as many as fit."""
    prepend_bos: bool | None = None
    """Whether texts start with BOS; null: as the SAE was trained."""
    splice_special: bool = False
    """Reconstruct special tokens too."""
    ablate_special: bool = False
    """Replace special tokens too by zeros or means."""
    score_special: bool = False
    """Score predictions made at and of special tokens too."""
    n_bootstrap: int = 1000
    """Resamples of the bootstrap over texts."""

    def __post_init__(self) -> None:
        for name, least in (("n_texts", 1), ("batch_tokens", 1), ("n_bootstrap", 0)):
            value = getattr(self, name)
            if value is None or (name == "batch_tokens" and value == "auto"):
                continue
            if not is_whole(value, least):
                raise ConfigError(
                    f"task.{name}={value} is not a whole number of at least {least}; type e.g. "
                    f"task.{name}=1000"
                )
        # Raises for what is not a width.
        _ = self.width_list

    @property
    def width_list(self) -> list[int] | None:
        """`widths` as numbers of latents, without repeats; None where there are none."""
        if self.widths is None:
            return None
        listed = self.widths if isinstance(self.widths, list) else [self.widths]
        widths = dict.fromkeys(parse_width(width, "task.widths") for width in listed)
        return [w for w in widths if w is not None] or None


_LABEL_COUNTS = {
    "n_samples": 0,
    "max_new_tokens": 1,
    "batch_tokens": 1,
    "min_correct": 1,
    "min_known": 1,
    "max_unknown": 0,
    "prompt_tokens": 1,
    "continuation_tokens": 1,
}
"""Setting of `task=label` -> its smallest value."""


@dataclass(kw_only=True)
class LabelConfig(TaskConfig):
    """Labels entities as known or unknown by the model's own answers; with dataset=memorization,
    texts by whether the model continues them word for word."""

    form: str = "auto"
    """What the model is prompted with: question; begun (a question and the beginning of its
    answer); own (the prompts of the data); auto: question for chat models, else begun."""
    n_samples: int = 10
    """Sampled answers per question, beside the greedy one; 0: the greedy one alone."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int = 32
    """Longest answer in tokens."""
    batch_tokens: int = 8192
    """Tokens per batch of prompts."""
    cut_at_line: bool | None = None
    """Judge only the first line of an answer; null: true for models that are not chat models."""
    min_correct: int = 3
    """Correct samples that make an attribute known."""
    min_known: int = 2
    """Known attributes that make an entity known."""
    max_unknown: int = 0
    """Largest number of known attributes of an unknown entity; with more it is dropped."""
    rules: dict[str, Any] = field(default_factory=dict)
    """How answers are judged, by entity type and attribute, such as
    task.rules.book.length.kind=number task.rules.book.length.share=0.05. Years must be exact; the
    tolerances of Ferrando et al. (2024): task.rules.player.birth_year.tolerance=5
    task.rules.movie.release_year.tolerance=2"""
    templates: dict[str, Any] = field(default_factory=dict)
    """Questions by entity type and attribute, each a text or [question, beginning of the answer]:
    "task.templates.book.creator='Who wrote the book {entity}?'\""""
    before: str = ""
    """Text before every prompt."""
    prompt_tokens: int | None = None
    """memorization: tokens of the prompt; null: 50, or as many as the shipped passages allow."""
    continuation_tokens: int | None = None
    """memorization: tokens of the continuation; null as above."""

    def __post_init__(self) -> None:
        for name, least in _LABEL_COUNTS.items():
            value = getattr(self, name)
            if value is not None and not is_whole(value, least):
                raise ConfigError(f"task.{name}={value} is not a whole number of at least {least}")
        one_of("task.form", self.form, PROMPT_FORMS)
        if self.temperature <= 0:
            raise ConfigError(f"task.temperature={self.temperature} is not a number above 0")
        for entity_type, templates in self.templates.items():
            if not isinstance(templates, Mapping):
                key = f"task.templates.{entity_type}"
                raise ConfigError(
                    f"{key}={templates} is not a mapping; type \"{key}.<attribute>='<question>'\""
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the labels, by name."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "batch_tokens")}


def _within(key: str, value: int, least: int, most: int) -> None:
    if not is_whole(value, least) or value > most:
        raise ConfigError(f"{key}={value} must be from {least} to {most}")
