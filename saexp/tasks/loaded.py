"""Models and SAEs that several runs of one process share, by their config and files' content."""

import dataclasses
import gc
from collections import OrderedDict
from typing import Any

from saexp import registry
from saexp.config import ModelConfig, RunConfig, SAEConfig, parse_layers
from saexp.errors import ConfigError
from saexp.models.loading import LanguageModel
from saexp.saes.base import SparseAutoencoder
from saexp.saes.loading import check_fits
from saexp.tasks.contents import model_content, sae_content

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
    model = _shared("model", cfg.model)
    # An earlier run of this process may have settled it by its SAE.
    model.prepend_bos = cfg.model.prepend_bos
    return model


def about_model(model: LanguageModel) -> dict[str, Any]:
    """The model as provenance names it; reads no weights."""
    return {
        "name": model.name,
        "revision": model.cfg.revision,
        "fingerprint": model.fingerprint,
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
