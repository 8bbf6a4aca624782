"""The stages that every task shares, in a Session: open, collect, encode, analyze, save."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saexp.activations.imported import neutral_source
from saexp.analysis import AnalysisInputs, Analyzer
from saexp.analysis.group_statistics import CorpusAnalyzer, CorpusInputs, StreamedLatents
from saexp.config import CorpusConfig, DatasetConfig, RunConfig
from saexp.context import ObjectCache, RunContext
from saexp.data.rows import CorpusRows
from saexp.errors import ConfigError, SAEError
from saexp.latents import Latents, measure_store
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import (
    Collected,
    Prefetch,
    bos_preference,
    check_weights,
    collect_examples,
    collect_neutral,
    resolve_bos,
)
from saexp.pipeline.objects import (
    analyzed,
    describe_model,
    describe_sae,
    encoded,
    encoded_neutral,
    language_model,
    per_layer,
    sparse_autoencoder,
)
from saexp.pipeline.run_folder import RUN_TABLES
from saexp.results import Result, check_result
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import ESTIMATE, estimate_factor

log = logging.getLogger(__name__)


INCLUDED = "sparsity and reconstruction metrics leave them out, the analysis does not"
EXCLUDED = "sparsity and reconstruction metrics and the analysis leave them out"
"""Consequence of high norms, for an analyzer that includes and one that excludes such rows."""


@dataclass(frozen=True)
class RunData:
    """What a run has collected."""

    examples: Collected
    """The run's own data set at its positions."""
    neutral: Collected | None
    """Neutral text at random positions; None for imported activations that lack it."""
    transfer: Collected | None = None
    """The analyzer's second data set."""

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that the model read for all of it."""
        parts = [self.examples, self.neutral, self.transfer]
        return sum(part.stats.tokens_forwarded for part in parts if part is not None)

    @property
    def result(self) -> Result:
        """Metrics `collection/…`, tables `rows` and `skips`, and the notes of the data sets."""
        metrics = self.examples.metrics
        metrics["collection/tokens_forwarded"] = self.tokens_forwarded
        transfer = [] if self.transfer is None else self.transfer.examples.notes
        return Result(
            metrics=metrics,
            tables=self.examples.tables,
            notes=[
                *self.examples.examples.notes,
                *([] if self.neutral is None else self.neutral.examples.notes),
                *(f"transfer: {note}" for note in transfer),
            ],
        )


@dataclass(frozen=True)
class EncodedLayer:
    """One layer of a run: its SAE and the latents at the run's rows."""

    sae: SparseAutoencoder
    row_latents: Latents | None
    """Latents at all rows; None for a corpus, whose latents are not held in memory."""
    background: Latents | None
    """Latents at the ordinary positions of neutral text; None where there is none."""
    metrics: Mapping[str, float | None]
    """`sparsity/…` and `reconstruction/…`."""
    notes: Sequence[str] = ()

    @property
    def latents(self) -> Latents:
        """Latents at all rows, of examples."""
        assert self.row_latents is not None, "those of a corpus are streamed"
        return self.row_latents

    @property
    def layer(self) -> int:
        """Index of the block that the SAE reads."""
        return self.sae.hookpoint.layer

    @property
    def result(self) -> Result:
        """Metrics and notes."""
        return Result(metrics=dict(self.metrics), notes=list(self.notes))


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run's config, model and SAEs; its methods are the stages of the run.

    The model's `prepend_bos` is resolved. Of a run with one layer, `sae` is its SAE; SAEs of
    several layers are loaded one after another (`sae_of`).
    """

    cfg: RunConfig
    context: RunContext
    model: LanguageModel
    bos: Result
    """Metric and notes on how texts begin, and notes on the model."""
    cells: Sequence[RunConfig]
    """One config per layer."""
    sae: SparseAutoencoder | None
    edited_saes: Mapping[int, SparseAutoencoder]
    """SAE by layer, where the intervention names the layers whose latents it changes."""
    analyzer: Analyzer | None

    @classmethod
    def open(
        cls,
        cfg: RunConfig,
        context: RunContext,
        analyzer: Analyzer | None = None,
        *,
        model: LanguageModel | None = None,
        sae: SparseAutoencoder | None = None,
    ) -> "Session":
        """Load model and SAEs and resolve BOS.

        Without an analyzer, the session takes one layer and no intervention. A `model` and an `sae`
        that are loaded already take the place of those that the config names. Raises ConfigError,
        ModelError or SAEError for what does not exist or does not fit.
        """
        _check_reads_corpus(cfg, analyzer)
        model = language_model(cfg, context.objects) if model is None else model
        check_weights(cfg, model, analyzer)
        several = analyzer is not None and analyzer.several_layers
        cells = per_layer(cfg) if several else [cfg]
        edited: dict[int, SparseAutoencoder] = {}
        if len(cells) == 1:
            if sae is None:
                sae = sparse_autoencoder(cells[0], model, context.objects)
            if analyzer is not None:
                edited = saes_to_edit(cells[0], model, sae, context.objects)
            preferences = [bos_preference(one) for one in distinct(sae, edited)]
        else:
            preferences = [
                bos_preference(sparse_autoencoder(cell, model, context.objects)) for cell in cells
            ]
        model, bos = resolve_bos(cfg, model, preferences)
        bos = replace(bos, notes=[*model.notes, *bos.notes])
        return cls(
            cfg=cfg,
            context=context,
            model=model,
            bos=bos,
            cells=cells,
            sae=sae,
            edited_saes=edited,
            analyzer=analyzer,
        )

    @property
    def selects_latents(self) -> bool:
        """Whether the analyzer selects latents that an intervention can change."""
        return self.analyzer is not None and self.analyzer.selects_latents

    @property
    def takes_several_layers(self) -> bool:
        """Whether the analyzer takes a list of layers."""
        return self.analyzer is not None and self.analyzer.several_layers

    def sae_of(self, cell: RunConfig) -> SparseAutoencoder:
        """The SAE of one of `cells`."""
        if self.sae is not None:
            return self.sae
        return sparse_autoencoder(cell, self.model, self.context.objects)

    def saes_of(self, cell: RunConfig) -> list[SparseAutoencoder]:
        """The cell's SAE, then those of the other layers that are edited."""
        return distinct(self.sae_of(cell), self.edited_saes)

    def collect(self) -> RunData:
        """Activations of the data set, neutral text and the analyzer's second data set.

        The hookpoints of all layers are stored in one pass, and those that other cells of a sweep
        need; of neutral text the neighbouring hookpoints too, where the SAE is validated.
        """
        cfg, context, model = self.cfg, self.context, self.model
        hookpoints, neighbours = [], []
        for cell in self.cells:
            for sae in self.saes_of(cell):
                hookpoints += sae.hookpoints
                neighbours += [h for at in neighbouring_hookpoints(cell, sae, model) for h in at]
        examples = collect_examples(cfg, model, hookpoints, context.prefetch)
        source, notes = neutral_source(cfg.collector, model)
        examples, neutral = examples.with_notes(notes), None
        if source is not None or cfg.task.name != "analyze":
            neutral = collect_neutral(
                cfg,
                model,
                [*hookpoints, *(h for h in dict.fromkeys(neighbours) if h not in hookpoints)],
                cfg.analyzer.n_background,
                neutral_prefetch(cfg, context.prefetch),
            )
        examples = replace(examples, neutral=neutral)
        return RunData(examples, neutral, self._collect_transfer(examples, hookpoints))

    def _collect_transfer(
        self, examples: Collected, hookpoints: list[Hookpoint]
    ) -> Collected | None:
        """The analyzer's second data set at the same positions, where it names one."""
        path = None if self.analyzer is None else self.analyzer.transfer
        if path is None:
            return None
        data = self.cfg.dataset
        dataset = DatasetConfig(
            name="csv" if Path(path).suffix == ".csv" else "jsonl",
            path=str(path),
            model_name=data.model_name,
            groups=list(examples.examples.groups) or None,
            missing_values=data.missing_values,
            split=data.split,
            answer_space=data.answer_space,
            max_length=data.max_length,
            truncation=data.truncation,
            seed=data.seed,
        )
        collected = collect_examples(replace(self.cfg, dataset=dataset), self.model, hookpoints)
        return replace(collected, neutral=examples.neutral)

    def encode(self, cell: RunConfig, data: RunData) -> EncodedLayer:
        """Latents of one of `cells` at all positions."""
        return self.encode_with(self.sae_of(cell), data)

    def encode_with(self, sae: SparseAutoencoder, data: RunData) -> EncodedLayer:
        """Latents of an SAE at all positions; the scaling of its inputs is estimated if need be."""
        objects = self.context.objects
        sae, notes = resolve_factor(self.cfg, sae, data.neutral)
        latents, metrics = None, {}
        if data.examples.is_corpus:
            ordinary = data.examples.ordinary(sae.hookpoints).mask
            metrics = measure_store(data.examples.store, sae, ordinary)
        else:
            latents, metrics = encoded(data.examples, sae, objects)
        background = encoded_neutral(data.neutral, sae, objects)
        excludes = self.analyzer is not None and self.analyzer.ordinary_only
        ordinary = data.examples.ordinary(sae.hookpoints)
        notes = [*notes, *ordinary.notes(EXCLUDED if excludes else INCLUDED)]
        return EncodedLayer(sae, latents, background, metrics, notes)

    def analyze(self, layer: EncodedLayer, data: RunData, *, texts: bool = True) -> Result:
        """The analyzer's result for one layer; without `texts` it sees no text.

        Raises ConfigError where the analyzer does not return a result, or uses a name of the run's
        own tables and metrics.
        """
        analyzer, name = self.analyzer, self.cfg.analyzer.name
        assert analyzer is not None, "opened without an analyzer"
        if data.examples.is_corpus:
            return self._analyze_corpus(layer, data)
        inputs = self._inputs(layer, data.examples)
        inputs.background = layer.background
        if data.neutral is not None:
            inputs.neutral_texts = data.neutral.table.texts
        if not texts:
            inputs.texts, inputs.neutral_texts = (), ()
        if data.transfer is not None:
            latents, metrics = encoded(data.transfer, layer.sae, self.context.objects)
            other = replace(layer, row_latents=latents, metrics=metrics)
            inputs.transfer = replace(self._inputs(other, data.transfer), groups=inputs.groups)
        result = analyzed(analyzer, self.cfg.analyzer, inputs, self.context.objects)
        check_result(result, f"analyzer={name}: analyze(inputs)")
        for kind, reserved in (("tables", RUN_TABLES), ("metrics", layer.metrics)):
            both = sorted(getattr(result, kind).keys() & set(reserved))
            if both:
                raise ConfigError(
                    f"analyzer={name}: {kind} called {', '.join(both)} are written by the run "
                    "itself; rename those of the analyzer"
                )
        return result

    def _analyze_corpus(self, layer: EncodedLayer, data: RunData) -> Result:
        analyzer, positions = self.analyzer, data.examples.placement
        assert isinstance(analyzer, CorpusAnalyzer), "checked when it was opened"
        assert isinstance(positions, CorpusRows)
        ordinary = data.examples.ordinary(layer.sae.hookpoints).mask
        latents = StreamedLatents(data.examples.store, layer.sae, positions, ordinary)
        inputs = CorpusInputs(latents=latents, layer=layer.layer, background=layer.background)
        return analyzer.analyze_corpus(inputs)

    def _inputs(self, layer: EncodedLayer, collected: Collected) -> AnalysisInputs:
        at = layer.sae.hookpoint
        ordinary = collected.ordinary(layer.sae.hookpoints)
        reads = self.analyzer is not None and self.analyzer.reads_acts
        return AnalysisInputs(
            latents=layer.latents,
            groups=collected.examples.groups,
            layer=at.layer,
            acts=collected.store.values(at.layer, at.stream) if reads else None,
            texts=collected.table.texts,
            examples=collected.examples.examples,
            model=self.model,
            sae=layer.sae,
            max_length=self.cfg.dataset.max_length,
            ordinary=ordinary.mask,
            norm_limits=ordinary.limits,
            objects=self.context.objects,
        )

    def provenance(self, data: RunData, saes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Model, SAEs and data for provenance.json; `saes` are entries as of `describe_sae`.

        Where the analyzer selects latents, its list of SAEs has those of the edited layers too.
        """
        edited = self.edited_saes.values() if self.selects_latents else ()
        others = [describe_sae(sae) for sae in edited if sae is not self.sae]
        return {
            "device": str(self.model.device),
            "model": describe_model(self.model),
            "sae": joined_entry(saes),
            "saes": [*saes, *others],
            **data.examples.provenance,
            "tokens_forwarded": data.tokens_forwarded,
        }


def _check_reads_corpus(cfg: RunConfig, analyzer: Analyzer | None) -> None:
    """Raise ConfigError for a corpus where examples are needed."""
    if not isinstance(cfg.dataset, CorpusConfig) or analyzer is None:
        return
    if not isinstance(analyzer, CorpusAnalyzer):
        raise ConfigError(
            f"analyzer={cfg.analyzer.name} reads examples, and dataset=corpus has none; type "
            "analyzer=stats or analyzer=top_features, task=dashboard or task=evaluate, or "
            "dataset=text for an example per line"
        )
    if cfg.intervention.name != "none":
        raise ConfigError(
            f"intervention={cfg.intervention.name} changes prompts, and dataset=corpus has none; "
            "type intervention=none"
        )


def joined_entry(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance entry of one SAE, or one with the names and fingerprints of several."""
    if len(entries) == 1:
        return dict(entries[0])
    joined = {
        key: ", ".join(dict.fromkeys(str(entry.get(key)) for entry in entries))
        for key in ("name", "hookpoint", "d_sae", "architecture", "fingerprint")
    }
    controls = dict.fromkeys(entry["control"] for entry in entries if "control" in entry)
    control = {"control": ", ".join(controls)} if controls else {}
    return {**joined, **control, "n_saes": len(entries)}


def distinct(
    sae: SparseAutoencoder, others: Mapping[int, SparseAutoencoder]
) -> list[SparseAutoencoder]:
    """The run's own SAE, then those of other layers."""
    return [sae, *(other for other in others.values() if other is not sae)]


def saes_to_edit(
    cfg: RunConfig, model: LanguageModel, own: SparseAutoencoder, objects: ObjectCache
) -> dict[int, SparseAutoencoder]:
    """The SAE of every layer that `intervention.latents` names; none where it names no layer.

    Each is resolved as a sweep over `layer` would. Raises ConfigError for a layer that the model or
    the SAEs lack, and for a latent beyond its layer's SAE.
    """
    intervention = cfg.intervention
    if intervention.name == "none":
        return {}
    saes: dict[int, SparseAutoencoder] = {}
    for layer in intervention.latent_layers(model.n_layers):
        model.check_layer(layer)
        cell = replace(cfg, layer=layer, sae=replace(cfg.sae, layer=layer))
        try:
            is_own = layer == own.hookpoint.layer
            saes[layer] = own if is_own else sparse_autoencoder(cell, model, objects)
        except SAEError as error:
            raise ConfigError(f"intervention.latents names layer {layer}: {error}") from error
    for layer, sae in (saes or {own.hookpoint.layer: own}).items():
        latents = intervention.latents_at(layer)
        for latent in latents if isinstance(latents, list) else []:
            if latent >= sae.d_sae:
                raise ConfigError(
                    f"intervention.latents: latent {latent}, but the SAE of layer {layer} has "
                    f"latents 0-{sae.d_sae - 1}"
                )
    return saes


def neighbouring_hookpoints(
    cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel
) -> list[list[Hookpoint]]:
    """Per neighbouring block, the stream that the SAE reads (and the one a transcoder predicts).

    None where the SAE is not validated.
    """
    hookpoints = [h.stored for h in sae.hookpoints]
    imported = cfg.collector.name == "imported"
    if imported or not validates(cfg) or any(h.stream == "embed" for h in hookpoints):
        return []
    return [
        [Hookpoint(h.layer + step, h.stream) for h in hookpoints]
        for step in (-1, 1)
        if all(0 <= h.layer + step < model.n_layers for h in hookpoints)
    ]


def validates(cfg: RunConfig) -> bool:
    """Whether the run validates its SAE on neutral text; a random control would fail."""
    return cfg.sae.check != "off" and cfg.sae.loader != "random"


def neutral_prefetch(cfg: RunConfig, prefetch: Prefetch) -> Prefetch:
    """What other cells of a sweep need of neutral text: the neighbouring layers too."""
    steps = (-1, 0, 1) if validates(cfg) else (0,)
    needed = {(n + step, stream) for n, stream in prefetch for step in steps if n + step >= 0}
    return sorted(needed, key=str)


def resolve_factor(
    cfg: RunConfig, sae: SparseAutoencoder, neutral: Collected | None
) -> tuple[SparseAutoencoder, list[str]]:
    """The SAE with the scaling of its inputs estimated from neutral text, and a note about it.

    The SAE itself unless the run has `sae.norm_factor=estimate`.
    """
    if cfg.sae.norm_factor != ESTIMATE:
        return sae, []
    if neutral is None:
        raise ConfigError(
            "sae.norm_factor=estimate needs activations of neutral text; type "
            "collector.neutral_path=PATH, or a number"
        )
    ordinary = neutral.ordinary(sae.hookpoints).mask
    chunks = (
        acts[torch.from_numpy(ordinary[n : n + len(acts)])]
        for n, acts in neutral.store.chunks(sae.hookpoint, 8192)
    )
    factor = estimate_factor(sae, chunks)
    return sae.with_factor(factor), [
        f"sae.norm_factor={factor:.6g} was estimated from {int(ordinary.sum())} ordinary positions "
        f"of neutral text at {sae.hookpoint.name}: its files do not give it"
    ]
