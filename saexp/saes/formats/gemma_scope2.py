"""Gemma Scope 2 folders: `config.json` and `params.safetensors`; SAEs and transcoders, JumpReLU.

The layer and the stream are in the folder's name, `resid_post/layer_12_width_16k_l0_medium`, and
as a rule in the config too.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.saes.formats.files import Config, check_matrices, read_config, read_safetensors
from saexp.saes.sae import SAESettings, SparseAutoencoder

CONFIG, WEIGHTS = "config.json", "params.safetensors"
_NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
}
_SKIP = "affine_skip_connection"
_SITES = {
    "resid_post": ("resid_post", None),
    "attn_out": ("attn_z", None),
    "mlp_out": ("mlp_out", None),
    "transcoder": ("mlp_in", "mlp_out"),
}
_MODULES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
_ACROSS = {"clt": "a cross-layer transcoder", "crosscoder": "a crosscoder"}

Ends = tuple[Hookpoint, Hookpoint | None]
"""(what it reads, what a transcoder predicts)."""


def is_gemma_scope2(folder: Path) -> bool:
    """Whether the folder looks like one; some on the hub have no config."""
    return (folder / WEIGHTS).is_file()


def is_in(repo: str) -> bool:
    """Whether the repository is one of Google's."""
    return re.search(r"gemma-scope-2-\d", repo) is not None


def load_gemma_scope2(
    folder: Path, metadata: dict[str, Any], given: Hookpoint | None = None
) -> SparseAutoencoder:
    """Read one; `given` is what the user says where neither the path nor the config does.

    Raises SAEError where path and config contradict each other, and for cross-layer transcoders.
    """
    label = str(metadata.get("name", folder))
    file = folder / CONFIG
    cfg = read_config(file) if file.is_file() else Config({}, file)
    refuse_across_layers(" ".join([*folder.parts[-3:], cfg.text("type") or ""]), label)
    architecture = cfg.text("architecture") or "jump_relu"
    if architecture not in ("jump_relu", "jumprelu"):
        raise SAEError(
            f"{file}: architecture '{architecture}' is not supported; Gemma Scope 2 is jump_relu"
        )
    at, out = _ends(folder, cfg, label, given)
    parameters = _parameters(read_safetensors(folder / WEIGHTS), label)
    if cfg.boolean("affine_connection") and "W_skip" not in parameters:
        raise SAEError(f"{label}: its config says affine_connection, but '{_SKIP}' is absent")
    l0 = cfg.number("l0")
    expected_l0 = {"expected_l0": l0} if l0 else {}
    return SparseAutoencoder(
        parameters,
        SAESettings(
            architecture="jumprelu", hookpoint=at, hookpoint_out=out, apply_b_dec_to_input=False
        ),
        metadata={
            "model": cfg.text("model_name"),
            **metadata,
            **expected_l0,
            "format": "Gemma Scope 2",
            "architecture": "jumprelu",
        },
    )


def refuse_across_layers(words: str, label: str) -> None:
    """Raise SAEError for a folder or type of a coder that spans layers."""
    for word, what in _ACROSS.items():
        if re.search(rf"(?:^|[/ _.-]){word}s?(?:$|[/ _.-])", words):
            raise SAEError(
                f"{label} is {what}, which is not supported; "
                "saexp reads SAEs and transcoders of one layer"
            )


def _parameters(tensors: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    for name in _NAMES:
        if name not in tensors:
            raise SAEError(f"{label}: Gemma Scope 2 needs '{name}', absent here")
    check_matrices(tensors, ("w_enc", "w_dec", _SKIP), label)
    found = {_NAMES.get(name, name): t.float() for name, t in tensors.items() if name != _SKIP}
    if _SKIP in tensors:
        found["W_skip"] = tensors[_SKIP].float().T.contiguous()
    return found


def _ends(folder: Path, cfg: Config, label: str, given: Hookpoint | None) -> Ends:
    by_path = ends_by_path(folder.as_posix())
    by_config = _by_config(cfg, label)
    if by_path and by_config and by_path != by_config:
        raise SAEError(
            f"{label}: its path says {_show(by_path)}, its config {_show(by_config)}; "
            "which of them is right?"
        )
    found = by_path or by_config or ((given, None) if given else None)
    if found is None:
        raise SAEError(
            f"{label} does not say its layer and stream; set layer= and sae.stream=resid_post"
        )
    return found


def ends_by_path(path: str) -> Ends | None:
    """From `resid_post/layer_12_width_16k_l0_medium`; None where it says nothing."""
    site = re.search(rf"(?:^|/)({'|'.join(_SITES)})(?:_all)?/layer_(\d+)(?:_|$)", path)
    if not site:
        return None
    stream, stream_out = _SITES[site[1]]
    layer = int(site[2])
    return Hookpoint(layer, stream), Hookpoint(layer, stream_out) if stream_out else None


def _by_config(cfg: Config, label: str) -> Ends | None:
    name = cfg.text("hf_hook_point_in")
    if not name:
        return None
    at = _by_module(name, label)
    out = _by_module(cfg.text("hf_hook_point_out") or name, label)
    return at, None if out == at else out


def _by_module(name: str, label: str) -> Hookpoint:
    module = re.search(r"(?:^|\.)layers\.(\d+)\.([\w.]+)$", name)
    if not module or module[2] not in _MODULES:
        raise SAEError(f"{label}: its config names '{name}', which is no hookpoint saexp knows")
    return Hookpoint(int(module[1]), _MODULES[module[2]])


def _show(ends: Ends) -> str:
    at, out = ends
    return at.name if out is None else f"{at.name} to {out.name}"
