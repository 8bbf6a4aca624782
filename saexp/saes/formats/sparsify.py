"""sparsify folders: `cfg.json` and `sae.safetensors`, named after the module they belong to.

`layers.5` is the output of block 5, `layers.5.mlp` that of its MLP; a transcoder predicts the
module's output from its input. Activations are top-k or groupmax.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saexp.errors import ModelError, SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.formats.files import check_matrices, check_raw_output, read_config, read_safetensors
from saexp.saes.sae import SAESettings, SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
RUN_CONFIG = "config.json"
"""Beside the folders of a run; says the model."""
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_EMBEDDINGS = ("embed_tokens", "embed_in")
_INPUT_OF = {"mlp_out": "mlp_in", "resid_post": "resid_pre"}


def is_sparsify(folder: Path) -> bool:
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_sparsify(
    folder: Path, metadata: dict[str, Any], given: Hookpoint | None = None
) -> SparseAutoencoder:
    """Read one; `given` is what the user says where the folder's name names no module."""
    label = str(metadata.get("name", folder))
    cfg = read_config(folder / CONFIG)
    if cfg.boolean("signed"):
        raise SAEError(f"{folder / CONFIG}: signed=true keeps negative latents; not supported")
    activation = cfg.text("activation") or "topk"
    if activation not in ("topk", "groupmax"):
        raise SAEError(
            f"{folder / CONFIG}: activation '{activation}' is not supported; "
            "saexp reads topk, groupmax"
        )
    hookpoint = _module(folder) or given
    if hookpoint is None:
        raise SAEError(
            f"{label}: the folder's name '{_named(folder).name}' names no module such as layers.5 "
            "or layers.5.mlp; set layer= and sae.stream=resid_post"
        )
    model = _model(folder)
    check_raw_output(hookpoint, model, label)
    out = hookpoint if cfg.boolean("transcode") else None
    if out is not None:
        hookpoint = _input_of(out, label)
    sae = SparseAutoencoder(
        _parameters(folder / WEIGHTS, label, skip=bool(cfg.boolean("skip_connection"))),
        SAESettings(
            architecture=activation,
            hookpoint=hookpoint,
            hookpoint_out=out,
            k=cfg.integer("k"),
            apply_b_dec_to_input=out is None,
        ),
        metadata={"model": model, **metadata, "format": "sparsify", "architecture": activation},
    )
    cfg.check_sizes({"d_in": sae.d_in})
    # 0 stands for d_in times expansion_factor.
    if cfg.integer("num_latents", least=0):
        cfg.check_sizes({"num_latents": sae.d_sae})
    return sae


def _parameters(file: Path, label: str, *, skip: bool) -> dict[str, Tensor]:
    tensors = read_safetensors(file)
    for name in (*_NAMES, *(("W_skip",) if skip else ())):
        if name not in tensors:
            raise SAEError(f"{label}: a sparsify SAE needs '{name}', absent here")
    check_matrices(tensors, ("encoder.weight",), label)
    found = {_NAMES.get(name, name): t.float() for name, t in tensors.items()}
    found["W_enc"] = found["W_enc"].T.contiguous()
    return found


def _named(folder: Path) -> Path:
    """The folder that has the module's name; several seeds each have one below it."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _module(folder: Path) -> Hookpoint | None:
    name = _named(folder).name
    if name.rpartition(".")[2] in _EMBEDDINGS:
        return Hookpoint(0, "embed")
    try:
        return Hookpoint.parse(name)
    except ModelError:
        return None


def _input_of(out: Hookpoint, label: str) -> Hookpoint:
    if out.stream not in _INPUT_OF:
        raise SAEError(
            f"{label} is a transcoder of {out.name}, whose input is not a stream that saexp knows; "
            "it reads those of MLPs and of whole blocks"
        )
    return Hookpoint(out.layer, _INPUT_OF[out.stream])


def _model(folder: Path) -> str | None:
    file = _named(folder).parent / RUN_CONFIG
    return read_config(file).text("model") if file.is_file() else None
