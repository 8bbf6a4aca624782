"""Models, SAEs and results shared by the runs of one process."""

import dataclasses
import gc
import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pandas as pd

from saexp import registry
from saexp.activations.store import ActivationStore
from saexp.analysis.base import AnalysisInputs
from saexp.config import AnalyzerConfig, ModelConfig, RunConfig, SAEConfig, parse_layers
from saexp.digests import code_digest, digest_of
from saexp.errors import ConfigError
from saexp.latents.encode import Latents, encode_store
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered
from saexp.pipeline.finished import model_content, sae_content
from saexp.results import TaskResult
from saexp.saes.loading import check_fits, sae_identity
from saexp.saes.sae import SAE, SparseAutoencoder

_KEPT = {"model": 1, "sae": 4}
_loaded: dict[str, OrderedDict[str, Any]] = {kind: OrderedDict() for kind in _KEPT}


def _shared(kind: str, cfg: ModelConfig | SAEConfig, **runtime: Any) -> Any:
    kept = _loaded[kind]
    content = model_content(cfg) if isinstance(cfg, ModelConfig) else sae_content(cfg)
    key = repr((cfg, runtime, content))
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    while len(kept) >= _KEPT[kind]:
        kept.popitem(last=False)
        # A model's modules refer to each other: only a search for garbage frees its memory.
        gc.collect()
    kept[key] = registry.build(kind, cfg, **runtime)
    return kept[key]


def language_model(cfg: RunConfig) -> LanguageModel:
    """The run's model; weights are read when first needed."""
    return _shared("model", cfg.model)


def about_model(model: LanguageModel) -> dict[str, Any]:
    """The model as provenance names it; reads no weights."""
    return {
        "name": model.name,
        "revision": model.cfg.revision,
        "fingerprint": model.known_fingerprint,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
    }


def sparse_autoencoder(cfg: RunConfig, model: LanguageModel) -> SparseAutoencoder:
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
    sae = _shared("sae", cfg.sae, d_in=model.d_model)
    check_fits(sae, model)
    return sae


def per_layer(cfg: RunConfig) -> list[RunConfig]:
    """The run cut into runs of one layer each, in the order given; itself where it has one.

    Load their SAEs one after another (`sparse_autoencoder`), so that only a few are in memory.
    """
    if not isinstance(cfg.layer, list):
        return [cfg]
    layers = list(dict.fromkeys(parse_layers(cfg.layer)))
    return [
        dataclasses.replace(cfg, layer=n, sae=dataclasses.replace(cfg.sae, layer=n)) for n in layers
    ]


KEPT_BYTES = 2**30
"""Memory of all that is kept, at most."""
StreamNumbers = dict[str, float | None]
ANALYSED = "sparsity and reconstruction metrics leave them out, the analysis does not"
CONTRASTED = "sparsity and reconstruction metrics leave them out, the contrast does not"
DESCRIBED = "sparsity and reconstruction metrics and the analysis leave them out"
"""What follows for positions of high norm."""


class Shelf:
    """A bounded store of results, least recently used out first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str | None) -> Any:
        """What is kept under the key, or None."""
        if key is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: str | None, value: Any, n_bytes: int) -> None:
        """Keep it, unless it is larger than everything that may be kept."""
        if key is None or n_bytes > KEPT_BYTES:
            return
        self._kept[key] = (value, n_bytes)
        while self.n_bytes > KEPT_BYTES:
            self._kept.popitem(last=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(n for _, n in self._kept.values())

    def clear(self) -> None:
        """Let everything go."""
        self._kept.clear()


_shelf = Shelf()


def encoded(gathered: Gathered, sae: SAE) -> tuple[Latents, StreamNumbers]:
    """Latents at the run's positions, and metrics of the ordinary ones, as `encode_store` gives.

    The same store, SAE and rows are encoded once. Not to be written to.
    """
    store, rows = gathered.store, gathered.placement.rows
    ordinary = gathered.ordinary(streams_of(sae)).mask
    key = _latents_key(store, sae, rows, ordinary)
    found = _shelf.get(key)
    if found is None:
        latents, metrics = encode_store(store, sae, rows, ordinary)
        found = dataclasses.replace(latents, key=key), metrics
        _shelf.put(key, found, _size(found[0]))
    latents, metrics = found
    return latents, dict(metrics)


def encoded_neutral(neutral: Gathered | None, sae: SAE) -> Latents | None:
    """Latents at the ordinary positions of neutral text, where there is any."""
    if neutral is None:
        return None
    return encoded(neutral, sae)[0].where(neutral.ordinary(streams_of(sae)).mask)


def high_norm_notes(gathered: Gathered, sae: SAE, consequence: str) -> list[str]:
    """One line where some of the run's positions have high norms, and what follows for them."""
    return gathered.ordinary(streams_of(sae)).notes(consequence)


def streams_of(sae: SAE) -> list[Hookpoint]:
    """What it reads, and a transcoder's output."""
    out = getattr(sae, "hookpoint_out", None)
    return [sae.hookpoint] if out is None else [sae.hookpoint, out]


def analysed(analyzer: Any, cfg: AnalyzerConfig, inputs: AnalysisInputs) -> TaskResult:
    """As `analyzer.analyze(inputs)`; of the same settings and inputs computed once."""
    key = _result_key(analyzer, cfg, inputs)
    found = _shelf.get(key)
    if found is None:
        found = analyzer.analyze(inputs)
        _shelf.put(key, _copied(found), sum(map(_table_size, found.tables.values())))
        return found
    return _copied(found)


def forget() -> None:
    """Let all results go."""
    _shelf.clear()


def _copied(result: TaskResult) -> TaskResult:
    return TaskResult(
        metrics=dict(result.metrics),
        tables={name: table.copy() for name, table in result.tables.items()},
        figures=dict(result.figures),
        notes=list(result.notes),
    )


def _size(latents: Latents) -> int:
    csr = latents.csr
    return csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes + _table_size(latents.rows)


def _table_size(table: pd.DataFrame) -> int:
    return int(table.memory_usage(deep=True).sum())


def _latents_key(
    store: ActivationStore, sae: SAE, rows: pd.DataFrame, ordinary: np.ndarray
) -> str | None:
    about = sae_identity(sae)
    listed = store.manifest["hookpoints"]
    shards = [sorted(_sums(listed.get(h.stored.name, {}))) for h in streams_of(sae)]
    counted = hashlib.sha256(ordinary.tobytes()).hexdigest()
    if about is None:
        return None
    return digest_of(store.path.name, shards, about, _rows_key(rows), counted)


def _sums(shards: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(index, entry["sha256"]) for index, entry in shards.items()]


def _rows_key(rows: pd.DataFrame) -> str:
    kinds = [(str(name), str(dtype)) for name, dtype in rows.dtypes.items()]
    try:
        values = pd.util.hash_pandas_object(rows, index=False)
    except TypeError:
        # Columns of lists, which pandas cannot hash.
        values = pd.util.hash_pandas_object(rows.astype(str), index=False)
    digest = hashlib.sha256(np.asarray(values, dtype="<u8").tobytes()).hexdigest()
    return digest_of(kinds, digest)


def _model_key(model: LanguageModel) -> str:
    """All that decides what a model makes of a text; the config holds chat, device and dtype."""
    parts = (repr(model.cfg), model.known_fingerprint, str(model.dtype), model.device.type)
    return digest_of(*parts, model.prepend_bos, model.eos_ids)


def _result_key(analyzer: Any, cfg: AnalyzerConfig, inputs: AnalysisInputs) -> str | None:
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
        hashlib.sha256(repr(list(inputs.examples)).encode()).hexdigest(),
        None if inputs.model is None else _model_key(inputs.model),
        sae,
        inputs.max_length,
        sorted((at.name, limit) for at, limit in inputs.norm_limits.items()),
    )
