"""A run's model, SAEs, latents, analyses and searched texts, each loaded or computed once per
`ObjectCache`."""

import dataclasses
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saexp import registry
from saexp.activations import ActivationStore
from saexp.analysis import AnalysisInputs, Analyzer, UndeclaredAnalyzer
from saexp.config import AnalyzerConfig, DatasetConfig, RunConfig, parse_layers
from saexp.context import ObjectCache
from saexp.data.datasets import SHIPPED_MODELS, background_file
from saexp.digests import code_digest, digest_of
from saexp.errors import ConfigError, counted
from saexp.latents import Latents, encode_store
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.resolution import short_name
from saexp.pipeline.collect import Collected, collect_examples
from saexp.pipeline.finished import model_content, sae_content
from saexp.results import Result
from saexp.saes import SAE, SparseAutoencoder
from saexp.saes.loading import check_fits, sae_identity

StreamMetrics = dict[str, float | None]


def language_model(cfg: RunConfig, objects: ObjectCache) -> LanguageModel:
    """The run's model; weights are read on first use."""
    key = repr((cfg.model, model_content(cfg.model)))
    # Custom loaders take the config alone.
    is_builtin = registry.is_builtin("model", cfg.model.loader)
    runtime = {"cache_dir": cfg.cache_dir} if is_builtin else {}
    return objects.load("model", key, lambda: registry.build("model", cfg.model, **runtime))


def describe_model(model: LanguageModel) -> dict[str, Any]:
    """The model's entry in provenance.json; reads no weights."""
    return {
        "name": model.name,
        "revision": model.cfg.revision,
        "fingerprint": model.known_fingerprint,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "dtype": short_name(model.dtype),
        "dtype_source": model.precision.source,
    }


def describe_sae(sae: SparseAutoencoder) -> dict[str, Any]:
    """The SAE's entry in provenance.json."""
    return {
        **sae.metadata,
        "hookpoint": sae.hookpoint.name,
        "hookpoint_out": sae.hookpoint_out.name if sae.hookpoint_out else None,
        "d_sae": sae.d_sae,
        "architecture": sae.architecture,
    }


def sparse_autoencoder(
    cfg: RunConfig, model: LanguageModel, objects: ObjectCache
) -> SparseAutoencoder:
    """The run's SAE, checked against the model. Raises ConfigError where no layer is given."""
    if cfg.layer is None and cfg.sae.id is None and cfg.sae.loader != "path":
        raise ConfigError(
            f"layer is not set and model={cfg.model.name} has no default; "
            f"type layer=<0 to {model.n_layers - 1}>"
        )
    if isinstance(cfg.layer, list):
        raise ConfigError(
            f"layer={cfg.layer}: task={cfg.task.name} takes one layer; sweep with "
            f"-m layer={','.join(map(str, cfg.layer))}"
        )
    if cfg.layer is not None:
        model.check_layer(int(cfg.layer))
    # The seed does not change an SAE that is read from files.
    is_read = cfg.sae.loader in ("path", "release")
    described = dataclasses.replace(cfg.sae, seed=0) if is_read else cfg.sae
    key = repr((described, model.d_model, sae_content(cfg.sae)))
    build = registry.build
    sae = objects.load("sae", key, lambda: build("sae", cfg.sae, d_in=model.d_model))
    check_fits(sae, model)
    return sae


def per_layer(cfg: RunConfig) -> list[RunConfig]:
    """The run split into one config per layer, in the order given.

    Load the SAEs one after another (`sparse_autoencoder`), so that only a few are in memory.
    """
    if not isinstance(cfg.layer, list):
        return [cfg]
    layers = list(dict.fromkeys(parse_layers(cfg.layer)))
    return [
        dataclasses.replace(cfg, layer=n, sae=dataclasses.replace(cfg.sae, layer=n)) for n in layers
    ]


def encoded(collected: Collected, sae: SAE, objects: ObjectCache) -> tuple[Latents, StreamMetrics]:
    """Latents at all positions, and metrics of the ordinary ones; do not modify the latents.

    The same store, SAE and rows are encoded once.
    """
    store, rows = collected.store, collected.placement.rows
    ordinary = collected.ordinary(streams_of(sae)).mask
    key = _latents_key(store, sae, rows, ordinary)
    result = objects.get(key)
    if result is None:
        latents, metrics = encode_store(store, sae, rows, ordinary)
        result = dataclasses.replace(latents, key=key), metrics
        objects.put(key, result, _latents_bytes(result[0]))
    latents, metrics = result
    return latents, dict(metrics)


def encoded_neutral(neutral: Collected | None, sae: SAE, objects: ObjectCache) -> Latents | None:
    """Latents at the ordinary positions of neutral text; None where there is no such text."""
    if neutral is None:
        return None
    latents, _ = encoded(neutral, sae, objects)
    return latents.where(neutral.ordinary(streams_of(sae)).mask)


def streams_of(sae: SAE) -> list[Hookpoint]:
    """The hookpoint that the SAE reads, and the one that a transcoder predicts."""
    out = getattr(sae, "hookpoint_out", None)
    return [sae.hookpoint] if out is None else [sae.hookpoint, out]


def analyzed(
    analyzer: Analyzer, cfg: AnalyzerConfig, inputs: AnalysisInputs, objects: ObjectCache
) -> Any:
    """`analyzer.analyze(inputs)`, computed once for the same settings and inputs."""
    key = _analysis_key(analyzer, cfg, inputs)
    result = objects.get(key)
    if result is not None:
        return result.copy()
    result = analyzer.analyze(inputs)
    if isinstance(result, Result):
        objects.put(key, result.copy(), sum(map(_table_bytes, result.tables.values())))
    return result


def _latents_bytes(latents: Latents) -> int:
    csr = latents.csr
    return csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes + _table_bytes(latents.rows)


def _table_bytes(table: pd.DataFrame) -> int:
    return int(table.memory_usage(deep=True).sum())


def _latents_key(
    store: ActivationStore, sae: SAE, rows: pd.DataFrame, ordinary: np.ndarray
) -> str | None:
    identity = sae_identity(sae)
    if identity is None:
        return None
    hookpoints = store.manifest["hookpoints"]
    shards = [sorted(_checksums(hookpoints.get(h.stored.name, {}))) for h in streams_of(sae)]
    mask = hashlib.sha256(ordinary.tobytes()).hexdigest()
    return digest_of(store.path.name, shards, identity, _rows_key(rows), mask)


def _checksums(shards: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(index, entry["sha256"]) for index, entry in shards.items()]


def _rows_key(rows: pd.DataFrame) -> str:
    dtypes = [(str(name), str(dtype)) for name, dtype in rows.dtypes.items()]
    try:
        values = pd.util.hash_pandas_object(rows, index=False)
    except TypeError:
        # pandas cannot hash columns of lists.
        values = pd.util.hash_pandas_object(rows.astype(str), index=False)
    digest = hashlib.sha256(np.asarray(values, dtype="<u8").tobytes()).hexdigest()
    return digest_of(dtypes, digest)


def _model_key(model: LanguageModel) -> str:
    """All that determines the model's outputs; the config holds chat, device and dtype."""
    parts = (repr(model.cfg), model.known_fingerprint, str(model.dtype), model.device.type)
    return digest_of(*parts, model.prepend_bos, model.eos_ids)


def _analysis_key(analyzer: Analyzer, cfg: AnalyzerConfig, inputs: AnalysisInputs) -> str | None:
    """None where something that the result depends on has no fingerprint."""
    if isinstance(analyzer, UndeclaredAnalyzer) or inputs.transfer is not None:
        return None
    latents, background = inputs.latents.key, inputs.background
    sae = None if inputs.sae is None else sae_identity(inputs.sae)
    code = code_digest(type(analyzer))
    unnamed = latents is None or (background is not None and background.key is None)
    if unnamed or code is None or (inputs.sae is not None and sae is None):
        return None
    return digest_of(
        code,
        dataclasses.asdict(cfg),
        latents,
        None if background is None else background.key,
        list(inputs.groups),
        inputs.layer,
        inputs.acts is not None,
        bool(inputs.texts),
        hashlib.sha256(repr(list(inputs.examples)).encode()).hexdigest(),
        None if inputs.model is None else _model_key(inputs.model),
        sae,
        inputs.max_length,
        sorted((at.name, limit) for at, limit in inputs.norm_limits.items()),
    )


_NAMES = ("entities", "wikidata")
"""Data sets whose texts are little more than names."""


def searches_background(cfg: RunConfig, texts: str) -> bool:
    """Whether neutral prose is searched, not the data set; `texts` is auto, dataset or background.

    auto: where the data set's texts are names, unless they are the user's own or the model is a
    shipped one, which was trained on such texts.
    """
    if texts != "auto":
        return texts == "background"
    dataset = cfg.dataset
    has_own_texts = dataset.name == "entities" and dataset.path is not None
    return dataset.name in _NAMES and not has_own_texts and cfg.model.name not in SHIPPED_MODELS


def collect_searched(
    cfg: RunConfig,
    texts: str,
    model: LanguageModel,
    hookpoints: list[Hookpoint],
    examples: Collected,
) -> tuple[Collected, str]:
    """(activations of the texts that are searched, a sentence on which these are).

    `examples` are those of the run's data set.
    """
    if not searches_background(cfg, texts):
        n = counted(len(examples.examples.examples), "text")
        if not examples.examples.examples:
            return examples, f"Searched texts: the data set '{cfg.dataset.name}'."
        return examples, f"Searched texts: the data set '{cfg.dataset.name}' ({n})."
    path = background_file(cfg.dataset)
    dataset = DatasetConfig(
        name="text",
        path=str(path),
        max_length=cfg.dataset.max_length,
        model_name=cfg.dataset.model_name,
        seed=cfg.dataset.seed,
    )
    collected = collect_examples(replace(cfg, dataset=dataset), model, hookpoints)
    n = counted(len(collected.examples.examples), "neutral text")
    source = f"of {path}" if cfg.dataset.background else f"that ship with saexp ({Path(path).name})"
    why = f", as the texts of dataset={cfg.dataset.name} are names" if texts == "auto" else ""
    return collected, (
        f"Searched texts: {n} {source}{why}. dataset=text or corpus searches your own, "
        "task.texts=dataset those of the data set."
    )
