"""Examples, tokens, positions and activations of a run."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from saexp import registry
from saexp.activations.collection import collect
from saexp.activations.collector import CollectionRequest, CollectionStats, Part
from saexp.activations.imported import neutral_source
from saexp.activations.norms import OrdinaryRows, norm_limits
from saexp.activations.store import ActivationStore
from saexp.config import DatasetConfig, ImportedConfig, PositionsConfig, RunConfig
from saexp.config.environment import as_typed
from saexp.data.datasets import background_texts
from saexp.data.examples import Example, ExampleSet, skip_notes
from saexp.data.positions import Placement, place
from saexp.data.prompts import as_read, tokenize_prompts, tokenize_texts
from saexp.data.tokenization import adds_bos
from saexp.errors import ConfigError, DataError, ModelError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.saes.sae import SparseAutoencoder
from saexp.wording import counted

BOS = "check/begins_with_bos"
"""Metric: 1 where texts begin with BOS, else 0."""
Wish = tuple[str, bool | None]
"""(SAE, whether it was trained on texts that begin with BOS; None where its files do not say)."""


def wish(sae: SparseAutoencoder) -> Wish:
    """What an SAE's files say."""
    said = sae.metadata.get("prepend_bos")
    name = f"{sae.metadata.get('name', 'the SAE')} at {sae.hookpoint.name}"
    return name, None if said is None else bool(said)


def begins_with_bos(model: LanguageModel) -> bool:
    """Whether the run's texts do."""
    return adds_bos(model.tokenizer) if model.prepend_bos is None else model.prepend_bos


def settle_bos(
    cfg: RunConfig,
    model: LanguageModel,
    saes: Iterable[SparseAutoencoder | Wish],
    asked: bool | None = None,
    key: str = "model.prepend_bos",
) -> tuple[LanguageModel, TaskResult]:
    """The model with the `prepend_bos` of the run, and metric and notes.

    `asked`, typed as `key`, or else `model.prepend_bos` decides; without either the SAEs do, and
    the tokenizer for those that do not say. Raises ConfigError where they disagree, and where the
    tokenizer has no BOS token to put there.
    """
    own, has = adds_bos(model.tokenizer), getattr(model.tokenizer, "bos_token_id", None) is not None
    if asked is None:
        asked, key = cfg.model.prepend_bos, "model.prepend_bos"
    if asked and not has:
        raise ConfigError(f"{key}=true, but the tokenizer of {model.name} has no BOS token")
    wishes = [one if isinstance(one, tuple) else wish(one) for one in saes]
    means = [own if said is None or (said and not has) else said for _, said in wishes]
    if asked is None and len(set(means)) > 1:
        raise _disagreement(wishes, means)
    begins = asked if asked is not None else next(iter(means), own)
    model = model.with_bos(asked if asked is not None else (None if begins == own else begins))
    result = TaskResult(metrics={BOS: int(begins)})
    result.notes = _notes(model, wishes, asked, key, own, has) + _of_chat(model, begins)
    return model, result


def _of_chat(model: LanguageModel, begins: bool) -> list[str]:
    """A note where prompts in chat begin otherwise than the run's texts."""
    tokenizer = model.tokenizer
    if not model.cfg.chat or not getattr(tokenizer, "chat_template", None):
        return []
    [tokens] = tokenize_prompts(model, as_read(model, ["a"]), 1)
    if (tokens.ids[:1] == (tokenizer.bos_token_id,)) == begins:
        return []
    note = (
        f"prompts in chat begin {'without' if begins else 'with'} BOS, as the chat template of "
        f"{model.name} has them, and texts {'with' if begins else 'without'}"
    )
    # A BOS of the template may mark a role, as in ChatML, so removing it is not suggested.
    return [f"{note}; model.prepend_bos=true makes prompts begin like texts" if begins else note]


def _disagreement(wishes: Sequence[Wish], means: Sequence[bool]) -> ConfigError:
    wants, lacks = wishes[means.index(True)][0], wishes[means.index(False)][0]
    return ConfigError(
        f"{wants} reads texts that begin with BOS and {lacks} texts that do not (as they were "
        "trained, or as the tokenizer has it), so one run cannot read both; run them apart, or "
        "type model.prepend_bos=true (or false) for all"
    )


def _notes(
    model: LanguageModel,
    wishes: Sequence[Wish],
    asked: bool | None,
    key: str,
    own: bool,
    has: bool,
) -> list[str]:
    """What a reader must know: BOS put there or left out, and SAEs trained another way."""
    of = {said: [name for name, n in wishes if n is said] for said in (True, False)}
    if asked is not None:
        told = []
        if others := of[not asked]:
            told.append(
                f"{key}={str(asked).lower()} was typed, though {others[0]} was trained "
                f"{'without' if asked else 'with'} BOS in front of its texts"
            )
        return told
    if of[True] and not has:
        return [
            f"{of[True][0]} was trained on texts that begin with BOS, and the tokenizer of "
            f"{model.name} has none: texts are read without"
        ]
    if model.prepend_bos is None:
        return []
    name = of[not own][0]
    if model.prepend_bos:
        return [
            f"texts begin with BOS, as {name} was trained (prepend_bos in its config); the "
            "tokenizer puts none there by itself; model.prepend_bos=false leaves it out"
        ]
    return [
        f"texts are read without the BOS that the tokenizer puts in front, as {name} was trained "
        "(prepend_bos=false in its config); model.prepend_bos=true keeps it"
    ]


Ahead = Sequence[tuple[int, str | None]]

_OF_TEXTS = (
    "path",
    "text",
    "template",
    "groups",
    "group_rule",
    "entity_types",
    "missing_values",
    "n_examples",
    "hf_split",
    "options",
    "truncation",
    "seed",
)
"""Settings of a data set that decide which texts there are."""
_OF_POSITIONS = ("n", "indices", "substring", "include_special", "seed")


def cut_notes(placement: Placement, of: str, max_length: int) -> list[str]:
    """One line on the texts that are read only up to the maximum length; nothing without one."""
    n = placement.n_cut
    if not n:
        return []
    return [
        f"{of}: {n:,} of {counted(len(placement.texts), 'text')} {'was' if n == 1 else 'were'} cut "
        f"at dataset.max_length={max_length} tokens; nothing beyond the cut is read"
    ]


@dataclass
class Gathered:
    """Examples with their stored activations."""

    examples: ExampleSet
    placement: Placement
    store: ActivationStore
    stats: CollectionStats
    max_norm_ratio: float | None = None
    """Norm of an ordinary position over the median norm, at most; None: all are ordinary."""
    neutral: "Gathered | None" = None
    """Neutral text whose median norm counts; the median of these positions where there is none."""

    def ordinary(self, hookpoints: Sequence[Hookpoint]) -> OrdinaryRows:
        """Which positions are ordinary at all of these hookpoints."""
        reference = self.store if self.neutral is None else self.neutral.store
        limits = norm_limits(reference, hookpoints, self.max_norm_ratio)
        return OrdinaryRows(self.store, limits, self.max_norm_ratio)

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """`collection/…`."""
        return {
            "collection/n_rows": self.stats.n_rows,
            "collection/n_skipped": self.stats.n_skipped,
            "collection/tokens_forwarded": self.stats.tokens_forwarded,
            "collection/padding_share": self.stats.padding_share,
            "collection/seconds": self.stats.seconds,
        }


def gather(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    ahead: Ahead = (),
    part: Part | None = None,
) -> Gathered:
    """Activations of the data set at the positions asked for; forwarded only where not stored.

    Where the model must run, the hookpoints `ahead` are stored in the same pass; with `part`, only
    that part of the store is looked at. The examples' notes say how many were skipped.
    """
    examples = registry.build("dataset", cfg.dataset)
    if not isinstance(examples, ExampleSet):
        kind = type(examples).__name__
        raise DataError(f"dataset={cfg.dataset.name} gave {kind}; it must give an ExampleSet")
    check_weights(cfg, model)
    settings = _changed(cfg.dataset, DatasetConfig(), _OF_TEXTS)
    found = _collected(
        cfg, model, hookpoints, examples, cfg.positions, settings=settings, ahead=ahead, part=part
    )
    left = skip_notes(found.placement.skips, len(examples))
    notes = [*found.examples.notes, *left, *neutral_source(cfg.collector, model)[1]]
    return replace(found, examples=replace(found.examples, notes=notes))


def check_weights(cfg: RunConfig, model: LanguageModel) -> None:
    """Raise ConfigError where an intervention needs weights that imported activations lack."""
    if not isinstance(cfg.collector, ImportedConfig) or cfg.intervention.name == "none":
        return
    if cfg.task.name == "analyze" and not model.has_local_weights:
        raise ConfigError(
            f"intervention={cfg.intervention.name} runs the model, but the weights of "
            f"{model.name} are not on this machine; type intervention=none, or download them"
        )


def has_neutral(cfg: RunConfig, model: LanguageModel) -> bool:
    """Whether there are activations of neutral text: not with imported activations of the data set
    alone, where the model's weights are not on this machine either."""
    return neutral_source(cfg.collector, model)[0] is not None


def gather_background(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    n_positions: int,
    ahead: Ahead = (),
) -> Gathered:
    """Activations at random positions of neutral text; the examples' notes say what was cut.

    Raises ConfigError where there is no source of them (`has_neutral`).
    """
    collector, notes = neutral_source(cfg.collector, model)
    if collector is None:
        raise ConfigError(f"{notes[0]}; type collector.neutral_path=PATH")
    lines = list(dict.fromkeys(background_texts(cfg.dataset)))
    examples = ExampleSet(
        name="background", examples=[Example(id=str(i), text=t) for i, t in enumerate(lines)]
    )
    n = max(1, -(-n_positions // len(lines)))
    where = PositionsConfig(name="random", n=n, seed=cfg.analyzer.seed)
    path = cfg.dataset.background
    settings = {} if path is None else {"background": path}
    return _collected(
        replace(cfg, collector=collector),
        model,
        hookpoints,
        examples,
        where,
        settings=settings,
        ahead=ahead,
    )


def _collected(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    examples: ExampleSet,
    where: PositionsConfig,
    *,
    settings: Mapping[str, Any],
    ahead: Ahead = (),
    part: Part | None = None,
) -> Gathered:
    data = cfg.dataset
    positions = registry.build("positions", where)
    tokenized = tokenize_texts(model, [e.text for e in examples.examples], data.max_length)
    placement = place(
        examples.examples, tokenized, positions, model.tokenizer, where.seed, data.truncation
    )
    notes = [*examples.notes, *cut_notes(placement, examples.name, data.max_length)]
    examples = replace(examples, notes=notes)
    request = CollectionRequest(
        positions=placement,
        hookpoints=hookpoints,
        max_length=data.max_length,
        n_skipped=len(placement.skips),
        prefetch=_planned(model, hookpoints, ahead),
        part=part,
        about={
            "dataset": examples.name,
            "positions": where.name,
            "n_texts": len(placement.texts),
            "n_tokens": sum(len(text) for text in placement.texts),
            "dataset_settings": as_typed(settings, "dataset."),
            "positions_settings": as_typed(
                _changed(where, PositionsConfig(), _OF_POSITIONS), "positions."
            ),
            "begins_with_bos": begins_with_bos(model),
        },
    )
    store, stats = collect(
        registry.build("collector", cfg.collector, model=model, store=cfg.store),
        request,
        cache_dir=cfg.cache_dir,
        verify=cfg.verify,
        must_persist=cfg.task.name == "collect",
    )
    return Gathered(examples, placement, store, stats, cfg.positions.max_norm_ratio)


def _changed(cfg: Any, default: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Those of the settings that are not as they come."""
    given = {key: getattr(cfg, key) for key in keys}
    return {k: v for k, v in given.items() if v != getattr(default, k)}


def _planned(model: LanguageModel, hookpoints: list[Hookpoint], ahead: Ahead) -> list[Hookpoint]:
    """Hookpoints to store on the way; what the model lacks is left to the cell that names it.

    A stream of None is that of the run's own SAE, or both of its transcoder.
    """
    at = hookpoints[0].layer
    own = [h.stream for h in hookpoints if h.layer == at]
    found = []
    for layer, named in ahead:
        for stream in [named] if named else own:
            # A stream that there is not, or none of this layer.
            with suppress(ModelError):
                found.append(Hookpoint(layer, stream))
    return [h for h in found if h.layer < model.n_layers]
