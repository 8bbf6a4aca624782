"""What analyze and collect begin with: examples, tokens, positions, activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saexp import registry
from saexp.activations.collector import CollectionStats, Part, collect
from saexp.activations.store import ActivationStore
from saexp.config import PositionsConfig, RunConfig
from saexp.data.datasets import background_texts
from saexp.data.examples import Example, ExampleSet
from saexp.data.positions import Placement, place
from saexp.data.tokens import tokenize
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel

Ahead = Sequence[tuple[int, str | None]]


@dataclass
class Gathered:
    """Examples with their stored activations."""

    examples: ExampleSet
    placement: Placement
    store: ActivationStore
    stats: CollectionStats

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
    that part of the store is looked at.
    """
    examples = registry.build("dataset", cfg.dataset)
    positions = registry.build("positions", cfg.positions)
    return _collected(cfg, model, hookpoints, examples, positions, cfg.positions.seed, ahead, part)


def gather_background(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    n_positions: int,
    ahead: Ahead = (),
) -> Gathered:
    """Activations at random positions of neutral text."""
    lines = list(dict.fromkeys(background_texts(cfg.dataset)))
    examples = ExampleSet(
        name="background", examples=[Example(id=str(i), text=t) for i, t in enumerate(lines)]
    )
    n = max(1, -(-n_positions // len(lines)))
    positions = registry.build(
        "positions", PositionsConfig(name="random", n=n, seed=cfg.analyzer.seed)
    )
    return _collected(cfg, model, hookpoints, examples, positions, cfg.analyzer.seed, ahead)


def _collected(
    cfg: RunConfig,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    examples: ExampleSet,
    positions: Any,
    seed: int,
    ahead: Ahead = (),
    part: Part | None = None,
) -> Gathered:
    tokenized = tokenize(
        [e.text for e in examples.examples],
        model.tokenizer,
        cfg.dataset.max_length,
        model.prepend_bos,
    )
    placement = place(examples.examples, tokenized, positions, model.tokenizer, seed)
    store, stats = collect(
        model,
        placement,
        hookpoints,
        cache_dir=cfg.cache_dir,
        cfg=cfg.store,
        max_length=cfg.dataset.max_length,
        n_skipped=len(placement.skips),
        ahead=_planned(model, hookpoints, ahead),
        part=part,
        about={
            "dataset": examples.name,
            "positions": positions.cfg.name,
            "n_texts": len(placement.texts),
            "n_tokens": sum(len(text) for text in placement.texts),
        },
        verify=cfg.verify,
    )
    return Gathered(examples, placement, store, stats)


def _planned(model: LanguageModel, hookpoints: list[Hookpoint], ahead: Ahead) -> list[Hookpoint]:
    """Hookpoints to store on the way; a layer the model lacks is left to the cell that names it.

    A stream of None is that of the run's own SAE, or both of its transcoder.
    """
    at = hookpoints[0].layer
    own = [h.stream for h in hookpoints if h.layer == at]
    there = [
        (layer, stream)
        for layer, named in ahead
        if layer < model.n_layers
        for stream in ([named] if named else own)
    ]
    return [Hookpoint(layer, stream) for layer, stream in there if stream != "embed" or not layer]
