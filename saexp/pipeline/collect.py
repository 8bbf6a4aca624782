"""Examples, tokens, positions and activations of a run, and whether its texts begin with BOS."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from saexp import registry
from saexp.activations import ActivationStore
from saexp.activations.collection import collect
from saexp.activations.collector import CollectionRequest, CollectionStats, Part
from saexp.activations.imported import neutral_source
from saexp.activations.reader import OrdinaryRows, norm_limits
from saexp.analysis import Analyzer
from saexp.config import CorpusConfig, DatasetConfig, ImportedConfig, PositionsConfig, RunConfig
from saexp.config.environment import as_typed
from saexp.data import Example, ExampleSet, skip_notes
from saexp.data.corpora import Corpus, context_size, tokenized
from saexp.data.datasets import background_texts
from saexp.data.documents import TokenizerInfo
from saexp.data.positions import resolve_positions
from saexp.data.rows import CorpusRows, PositionRows, PositionTable
from saexp.data.tokenization import adds_bos, format_prompts, tokenize_prompts, tokenize_texts
from saexp.errors import ConfigError, DataError, ModelError, counted
from saexp.models import Hookpoint
from saexp.models.forward import context_limit
from saexp.models.loading import LanguageModel
from saexp.pipeline.run_folder import skips_table
from saexp.results import Result
from saexp.saes import SparseAutoencoder

BOS = "check/begins_with_bos"
"""Metric: 1 where texts begin with BOS, else 0."""
BosPreference = tuple[str, bool | None]
"""(SAE, whether it was trained on texts that begin with BOS; None where its files do not say)."""


def bos_preference(sae: SparseAutoencoder) -> BosPreference:
    """The name of an SAE, and `prepend_bos` of its files."""
    value = sae.metadata.get("prepend_bos")
    name = f"{sae.metadata.get('name', 'the SAE')} at {sae.hookpoint.name}"
    return name, None if value is None else bool(value)


def begins_with_bos(model: LanguageModel) -> bool:
    """Whether texts begin with BOS."""
    return adds_bos(model.tokenizer) if model.prepend_bos is None else model.prepend_bos


def resolve_bos(
    cfg: RunConfig,
    model: LanguageModel,
    saes: Iterable[SparseAutoencoder | BosPreference],
    requested: bool | None = None,
    key: str = "model.prepend_bos",
) -> tuple[LanguageModel, Result]:
    """The model with `prepend_bos` as the run's texts need it, and a metric and notes about it.

    `requested`, the value of the setting `key`, decides, or else the setting `model.prepend_bos`;
    without either the SAEs do, and the tokenizer for those whose files do not say. Raises
    ConfigError where the SAEs disagree, and where a BOS is requested that the tokenizer lacks.
    """
    adds = adds_bos(model.tokenizer)
    has_bos = getattr(model.tokenizer, "bos_token_id", None) is not None
    if requested is None:
        requested, key = cfg.model.prepend_bos, "model.prepend_bos"
    if requested and not has_bos:
        raise ConfigError(f"{key}=true, but the tokenizer of {model.name} has no BOS token")
    preferences = [one if isinstance(one, tuple) else bos_preference(one) for one in saes]
    values = [
        adds if preferred is None or (preferred and not has_bos) else preferred
        for _, preferred in preferences
    ]
    if requested is None and len(set(values)) > 1:
        raise _disagreement(preferences, values)
    begins = requested if requested is not None else next(iter(values), adds)
    by_sae = None if begins == adds else begins
    model = model.with_bos(requested if requested is not None else by_sae)
    if requested is not None:
        notes = _requested_notes(preferences, key, requested=requested)
    else:
        notes = _sae_notes(model, preferences, adds=adds, has_bos=has_bos)
    notes = [*notes, *_chat_notes(model, begins_with_bos=begins)]
    return model, Result(metrics={BOS: int(begins)}, notes=notes)


_TEMPLATE_TOKENS = 2048
"""More than a chat template with a message of one character has."""


def _chat_notes(model: LanguageModel, *, begins_with_bos: bool) -> list[str]:
    """A note where chat prompts and texts differ in whether they begin with BOS.

    None where the template's BOS marks each role, as in ChatML: it says nothing about texts then.
    """
    tokenizer = model.tokenizer
    if not model.cfg.chat or not getattr(tokenizer, "chat_template", None):
        return []
    [tokens] = tokenize_prompts(model, format_prompts(model, ["a"]), _TEMPLATE_TOKENS)
    if not begins_with_bos and tokens.ids.count(tokenizer.bos_token_id) > 1:
        return []
    if (tokens.ids[:1] == (tokenizer.bos_token_id,)) == begins_with_bos:
        return []
    prompts, texts = ("without", "with") if begins_with_bos else ("with", "without")
    note = (
        f"prompts in chat begin {prompts} BOS, as the chat template of {model.name} has them, and "
        f"texts {texts}"
    )
    if begins_with_bos:
        return [f"{note}; model.prepend_bos=true makes prompts begin like texts"]
    return [note]


def _disagreement(preferences: Sequence[BosPreference], values: Sequence[bool]) -> ConfigError:
    with_bos, without = (preferences[values.index(value)][0] for value in (True, False))
    return ConfigError(
        f"{with_bos} reads texts that begin with BOS and {without} texts that do not (as they were "
        "trained, or as the tokenizer has it), so one run cannot read both; run them apart, or "
        "type model.prepend_bos=true (or false) for all"
    )


def _requested_notes(
    preferences: Sequence[BosPreference], key: str, *, requested: bool
) -> list[str]:
    """A note where the setting contradicts how an SAE was trained."""
    others = [name for name, preferred in preferences if preferred is (not requested)]
    if not others:
        return []
    return [
        f"{key}={str(requested).lower()} was typed, though {others[0]} was trained "
        f"{'without' if requested else 'with'} BOS in front of its texts"
    ]


def _sae_notes(
    model: LanguageModel, preferences: Sequence[BosPreference], *, adds: bool, has_bos: bool
) -> list[str]:
    """A note where an SAE changes what the tokenizer does by itself, or cannot be satisfied."""
    wanting = [name for name, preferred in preferences if preferred is True]
    if wanting and not has_bos:
        return [
            f"{wanting[0]} was trained on texts that begin with BOS, and the tokenizer of "
            f"{model.name} has none: texts are read without"
        ]
    if model.prepend_bos is None:
        return []
    name = next(name for name, preferred in preferences if preferred is (not adds))
    if model.prepend_bos:
        return [
            f"texts begin with BOS, as {name} was trained (prepend_bos in its config); the "
            "tokenizer puts none there by itself; model.prepend_bos=false leaves it out"
        ]
    return [
        f"texts are read without the BOS that the tokenizer puts in front, as {name} was trained "
        "(prepend_bos=false in its config); model.prepend_bos=true keeps it"
    ]


Prefetch = Sequence[tuple[int, str | None]]
"""(layer, stream) to store in the same pass; a stream of None is that of the run's own SAE."""

_TEXT_SETTINGS = (
    "path",
    "text",
    "template",
    "groups",
    "group_rule",
    "entity_types",
    "missing_values",
    "n_examples",
    "hf_split",
    "truncation",
    "seed",
)
"""Settings of a data set that decide which texts it has."""
_POSITION_SETTINGS = ("n", "indices", "substring", "include_special", "seed")


def truncation_notes(placement: PositionRows, dataset: str, max_length: int) -> list[str]:
    """One line on the texts that exceed the maximum length; none where all fit."""
    n = placement.n_truncated
    if not n:
        return []
    return [
        f"{dataset}: {n:,} of {counted(placement.n_texts, 'text')} {'was' if n == 1 else 'were'}"
        f" cut at dataset.max_length={max_length} tokens; nothing beyond the cut is read"
    ]


@dataclass(frozen=True)
class Collected:
    """Examples with their stored activations."""

    examples: ExampleSet
    placement: PositionRows
    store: ActivationStore
    stats: CollectionStats
    max_norm_ratio: float | None = None
    """Largest norm of an ordinary position over the median norm; None: all are ordinary."""
    neutral: "Collected | None" = None
    """Neutral text, whose median norm is the reference; None: these positions are."""

    @property
    def table(self) -> PositionTable:
        """The positions of examples. Raises ConfigError for a corpus, which has none."""
        if not isinstance(self.placement, PositionTable):
            raise ConfigError(f"dataset={self.examples.name} has no examples; type dataset=text")
        return self.placement

    def ordinary(self, hookpoints: Sequence[Hookpoint]) -> OrdinaryRows:
        """Which positions have no high norm at any of these hookpoints."""
        reference = self.store if self.neutral is None else self.neutral.store
        limits = norm_limits(reference, hookpoints, self.max_norm_ratio)
        return OrdinaryRows(self.store, limits, self.max_norm_ratio)

    def with_notes(self, notes: Sequence[str]) -> "Collected":
        """The same with notes appended to those of the examples."""
        examples = replace(self.examples, notes=[*self.examples.notes, *notes])
        return replace(self, examples=examples)

    @property
    def is_corpus(self) -> bool:
        """Whether these are positions in a corpus rather than in examples."""
        return not isinstance(self.placement, PositionTable)

    @property
    def _n_examples(self) -> int:
        return self.placement.n_texts if self.is_corpus else len(self.examples)

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """`collection/…`."""
        return {
            "collection/n_rows": self.stats.n_rows,
            "collection/n_skipped": self.stats.n_skipped,
            "collection/tokens_forwarded": self.stats.tokens_forwarded,
            "collection/padding_fraction": self.stats.padding_fraction,
            "collection/seconds": self.stats.seconds,
        }

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """`rows` and `skips`; without `rows` for a corpus, whose rows are in the store alone."""
        placement = self.placement
        rows = {"rows": placement.rows} if isinstance(placement, PositionTable) else {}
        return {**rows, "skips": skips_table(placement.skips)}

    @property
    def provenance(self) -> dict[str, Any]:
        """Store, tokens forwarded, groups and data set, for provenance.json."""
        return {
            "store": {"key": self.store.path.name, "path": str(self.store.path)},
            "tokens_forwarded": self.stats.tokens_forwarded,
            "groups": list(self.examples.groups),
            "dataset": {"name": self.examples.name, "n_examples": self._n_examples},
        }


def collect_examples(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    prefetch: Prefetch = (),
    part: Part | None = None,
) -> Collected:
    """Activations of the data set at the configured positions; what is stored is not recomputed.

    Where the model must run, the `prefetch` hookpoints are stored in the same pass; with `part`,
    only that part of the store is considered. The examples' notes count skipped examples.
    """
    if isinstance(cfg.dataset, CorpusConfig):
        return collect_corpus(cfg, model, hookpoints, prefetch, part)
    examples, request = examples_request(cfg, model, hookpoints, prefetch, part)
    collected = _stored(cfg, model, examples, request)
    return collected.with_notes(skip_notes(collected.placement.skips, len(examples)))


def examples_request(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    prefetch: Prefetch = (),
    part: Part | None = None,
) -> tuple[ExampleSet, CollectionRequest]:
    """The data set's examples, and what `collect_examples` stores of them."""
    examples = registry.build("dataset", cfg.dataset)
    if not isinstance(examples, ExampleSet):
        kind = type(examples).__name__
        raise DataError(f"dataset={cfg.dataset.name} gave {kind}; it must give an ExampleSet")
    own = vars(cfg.dataset).keys() - vars(DatasetConfig()).keys()
    settings = _changed_settings(cfg.dataset, type(cfg.dataset)(), [*_TEXT_SETTINGS, *sorted(own)])
    return _request(
        cfg,
        model,
        hookpoints,
        examples,
        cfg.positions,
        settings=settings,
        prefetch=prefetch,
        part=part,
    )


def open_corpus(cfg: RunConfig, model: LanguageModel) -> Corpus:
    """The tokenized corpus of `dataset=corpus`, with contexts that the model can read."""
    assert isinstance(cfg.dataset, CorpusConfig)
    tokenizer = TokenizerInfo(model.tokenizer, model.tokenizer_fingerprint, begins_with_bos(model))
    short = model.name.rpartition("/")[2]
    size = context_size(cfg.dataset, context_limit(model), short)
    return tokenized(cfg.dataset, tokenizer, size, cfg.cache_dir)


def collect_corpus(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    prefetch: Prefetch = (),
    part: Part | None = None,
) -> Collected:
    """As `collect_examples`, of the contexts of a corpus. Memory does not grow with the corpus."""
    corpus = open_corpus(cfg, model)
    rows = CorpusRows(corpus, cfg.positions, model.tokenizer)
    notes = [f"{counted(len(corpus), 'context')} of {corpus.context_size} tokens", *corpus.notes]
    examples = ExampleSet(name=cfg.dataset.name, examples=[], notes=notes)
    own = vars(cfg.dataset).keys() - vars(DatasetConfig()).keys()
    settings = _changed_settings(cfg.dataset, type(cfg.dataset)(), [*_TEXT_SETTINGS, *sorted(own)])
    request = CollectionRequest(
        positions=rows,
        hookpoints=hookpoints,
        max_length=corpus.context_size,
        prefetch=hookpoints_in_model(model, hookpoints, prefetch),
        part=part,
        about=_about(model, examples, rows, cfg.positions, settings),
    )
    return _stored(cfg, model, examples, request)


def check_weights(cfg: RunConfig, model: LanguageModel, analyzer: Analyzer | None) -> None:
    """Raise ConfigError where imported activations are analysed with a model that lacks weights.

    Interventions, attribution and analyzers with `runs_model` need the weights.
    """
    if not isinstance(cfg.collector, ImportedConfig) or cfg.task.name != "analyze":
        return
    if cfg.intervention.name != "none":
        setting, instead = f"intervention={cfg.intervention.name}", "intervention=none"
    elif cfg.analyzer.name == "contrast" and cfg.analyzer.attribution:
        setting, instead = "analyzer.attribution=true", "analyzer.attribution=false"
    elif analyzer is not None and analyzer.runs_model:
        setting, instead = f"analyzer={cfg.analyzer.name}", "another analyzer, e.g. contrast"
    else:
        return
    if not model.has_local_weights:
        raise ConfigError(
            f"{setting} runs the model, but the weights of {model.name} are not on this machine; "
            f"type {instead}, or download them"
        )


def collect_neutral(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    n_positions: int,
    prefetch: Prefetch = (),
) -> Collected:
    """Activations at random positions of neutral text; the examples' notes count cut texts.

    Raises ConfigError where there is no source of them (`activations.imported.neutral_source`).
    """
    return _stored(*neutral_request(cfg, model, hookpoints, n_positions, prefetch))


def neutral_request(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    n_positions: int,
    prefetch: Prefetch = (),
) -> tuple[RunConfig, LanguageModel, ExampleSet, CollectionRequest]:
    """The config of the collector, the model and the texts, and what `collect_neutral` stores."""
    collector, notes = neutral_source(cfg.collector, model)
    if collector is None:
        raise ConfigError(f"{notes[0]}; type collector.neutral_path=PATH")
    lines = list(dict.fromkeys(background_texts(cfg.dataset)))
    examples = ExampleSet(
        name="background", examples=[Example(id=str(i), text=t) for i, t in enumerate(lines)]
    )
    n = max(1, -(-n_positions // len(lines)))
    positions = PositionsConfig(name="random", n=n, seed=cfg.analyzer.seed)
    path = cfg.dataset.background
    settings = {} if path is None else {"background": path}
    cfg = replace(cfg, collector=collector)
    examples, request = _request(
        cfg, model, hookpoints, examples, positions, settings=settings, prefetch=prefetch
    )
    return cfg, model, examples, request


def _request(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    examples: ExampleSet,
    positions: PositionsConfig,
    *,
    settings: Mapping[str, Any],
    prefetch: Prefetch = (),
    part: Part | None = None,
) -> tuple[ExampleSet, CollectionRequest]:
    data = cfg.dataset
    tokenized = tokenize_texts(model, [e.text for e in examples.examples], data.max_length)
    placement = resolve_positions(
        examples.examples,
        tokenized,
        registry.build("positions", positions),
        model.tokenizer,
        positions.seed,
        data.truncation,
    )
    notes = [*examples.notes, *truncation_notes(placement, examples.name, data.max_length)]
    examples = replace(examples, notes=notes)
    request = CollectionRequest(
        positions=placement,
        hookpoints=hookpoints,
        max_length=data.max_length,
        n_skipped=len(placement.skips),
        prefetch=hookpoints_in_model(model, hookpoints, prefetch),
        part=part,
        about=_about(model, examples, placement, positions, settings),
    )
    return examples, request


def _about(
    model: LanguageModel,
    examples: ExampleSet,
    rows: PositionRows,
    positions: PositionsConfig,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Names for people in a store's manifest."""
    return {
        "dataset": examples.name,
        "positions": positions.name,
        "n_texts": rows.n_texts,
        "n_tokens": rows.n_tokens,
        "dataset_settings": as_typed(settings, "dataset."),
        "positions_settings": as_typed(
            _changed_settings(positions, PositionsConfig(), _POSITION_SETTINGS), "positions."
        ),
        "begins_with_bos": begins_with_bos(model),
    }


def _stored(
    cfg: RunConfig, model: LanguageModel, examples: ExampleSet, request: CollectionRequest
) -> Collected:
    """Collect what the store lacks."""
    store, stats = collect(
        registry.build("collector", cfg.collector, model=model, store=cfg.store),
        request,
        cache_dir=cfg.cache_dir,
        verify=cfg.verify,
        must_persist=cfg.task.name == "collect",
    )
    return Collected(examples, request.positions, store, stats, cfg.positions.max_norm_ratio)


def _changed_settings(cfg: Any, default: Any, keys: Sequence[str]) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    values = {key: getattr(cfg, key) for key in keys}
    return {k: v for k, v in values.items() if v != getattr(default, k)}


def hookpoints_in_model(
    model: LanguageModel, hookpoints: list[Hookpoint], prefetch: Prefetch
) -> list[Hookpoint]:
    """Hookpoints to store in the same pass, without those that the model lacks.

    The cell that needs a hookpoint which does not exist reports that error itself. A stream of None
    is that of the run's own SAE, or both streams of its transcoder.
    """
    first_layer = hookpoints[0].layer
    own_streams = [h.stream for h in hookpoints if h.layer == first_layer]
    result = []
    for layer, stream in prefetch:
        for name in [stream] if stream else own_streams:
            # The stream may not exist, or not at this layer.
            with suppress(ModelError):
                result.append(Hookpoint(layer, name))
    return [h for h in result if h.layer < model.n_layers]
