"""Files of Gemma Scope, Gemma Scope 2 and Llama Scope."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saexp.errors import SAEError, brief
from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.formats import (
    Config,
    Streams,
    check_matrices,
    check_type,
    check_values,
    drop_unit_scaling,
    lens_hookpoint,
    read_config,
    read_safetensors,
)

WEIGHTS = "params.npz"
_UNREADABLE = (
    *(ValueError, OSError, EOFError, TypeError, LookupError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy, zipfile and torch raise for files that are damaged or hold other arrays."""
_STREAMS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def is_gemma_scope_repo(repo: str) -> bool:
    """Whether the repository is one of Gemma Scope, other than Gemma Scope 2."""
    return "gemma-scope" in repo and not re.search(r"gemma-scope-2-\d", repo)


def streams_of(repo: str, path: str) -> Streams:
    """Streams of a repository and path such as gemma-scope-2b-pt-res and layer_12/width_16k/…

    Transcoders were trained with the norm's gain folded into the MLP, so they read the norm's
    output before the gain (Lieberum et al. 2024, section 3.4). Raises SAEError where the names do
    not contain layer and stream.
    """
    location = f"{repo}/{path}"
    stream = re.search(r"gemma-scope-[\w.]+?-(?:pt|it)-(res|mlp|att|transcoders)\b", location)
    layer = re.search(r"(?:^|/)layer_(\d+)(?:/|$)", path)
    if "embedding" in path:
        return Hookpoint(0, "embed"), None
    if not stream or not layer:
        raise SAEError(
            f"{location} does not say its layer and stream; set layer= and sae.stream=resid_post"
        )
    at = int(layer[1])
    if stream[1] == "transcoders":
        return Hookpoint(at, "mlp_in_normalized"), Hookpoint(at, "mlp_out")
    return Hookpoint(at, _STREAMS[stream[1]]), None


def load_gemma_scope(file: Path, streams: Streams, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Load a `params.npz`: a JumpReLU SAE that does not subtract b_dec from its input.

    SAEs of the embedding were trained on rows of the embedding matrix; block 0 reads these times
    sqrt(d_model).
    """
    hookpoint, hookpoint_out = streams
    try:
        with file.open("rb") as binary, np.load(binary, allow_pickle=False) as arrays:
            parameters = {n: torch.from_numpy(np.asarray(arrays[n])) for n in arrays}
    except _UNREADABLE as error:
        reason = brief(str(error), 120)
        raise SAEError(f"{file} is not an npz file of plain arrays ({reason})") from error
    for name, tensor in parameters.items():
        check_type(name, tensor, str(file))
    parameters = {name: tensor.float() for name, tensor in parameters.items()}
    parameters = {f"W_{n[2:]}" if n.startswith("w_") else n: p for n, p in parameters.items()}
    drop_unit_scaling(parameters)
    # A b_dec of another shape than [d_model] is reported by SparseAutoencoder.
    d_model = parameters["b_dec"].numel() if "b_dec" in parameters else 0
    embedding = hookpoint.stream == "embed" and d_model > 0
    return SparseAutoencoder(
        parameters,
        SAESettings(
            architecture="jumprelu",
            hookpoint=hookpoint,
            hookpoint_out=hookpoint_out,
            apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in" if embedding else "none",
            norm_factor=d_model**-0.5 if embedding else None,
        ),
        metadata={**metadata, "format": "Gemma Scope", "architecture": "jumprelu"},
    )


CONFIG_2, WEIGHTS_2 = "config.json", "params.safetensors"
"""Files of a Gemma Scope 2 folder."""
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
_MULTI_LAYER = {"clt": "a cross-layer transcoder", "crosscoder": "a crosscoder"}


def is_gemma_scope2(folder: Path) -> bool:
    """Whether the folder has the weights of a Gemma Scope 2 SAE; some have no config."""
    return (folder / WEIGHTS_2).is_file()


def is_gemma_scope2_repo(repo: str) -> bool:
    """Whether the repository is one of Gemma Scope 2."""
    return re.search(r"gemma-scope-2-\d", repo) is not None


def load_gemma_scope2(
    folder: Path, metadata: dict[str, Any], requested: Hookpoint | None = None
) -> SparseAutoencoder:
    """Load a Gemma Scope 2 folder; `requested` is used where neither path nor config has streams.

    Raises SAEError where path and config contradict each other, and for cross-layer transcoders.
    """
    label = str(metadata.get("name", folder))
    file = folder / CONFIG_2
    cfg = read_config(file) if file.is_file() else Config({}, file)
    refuse_across_layers(" ".join([*folder.parts[-3:], cfg.text("type") or ""]), label)
    architecture = cfg.text("architecture") or "jump_relu"
    if architecture not in ("jump_relu", "jumprelu"):
        raise SAEError(
            f"{file}: architecture '{architecture}' is not supported; Gemma Scope 2 is jump_relu"
        )
    at, out = _streams2(folder, cfg, label, requested)
    parameters = _parameters2(read_safetensors(folder / WEIGHTS_2), label)
    if cfg.boolean("affine_connection") and "W_skip" not in parameters:
        raise SAEError(f"{label}: its config says affine_connection, but '{_SKIP}' is missing")
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
    """Raise SAEError where the names are those of an SAE or transcoder of several layers."""
    for word, what in _MULTI_LAYER.items():
        if re.search(rf"(?:^|[/ _.-]){word}s?(?:$|[/ _.-])", words):
            raise SAEError(
                f"{label} is {what}, which is not supported; "
                "saexp reads SAEs and transcoders of one layer"
            )


def _parameters2(tensors: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    for name in _NAMES:
        if name not in tensors:
            raise SAEError(f"{label}: Gemma Scope 2 needs '{name}', which is missing")
    check_matrices(tensors, ("w_enc", "w_dec", _SKIP), label)
    parameters = {_NAMES.get(name, name): t.float() for name, t in tensors.items() if name != _SKIP}
    if _SKIP in tensors:
        parameters["W_skip"] = tensors[_SKIP].float().T.contiguous()
    return parameters


def _streams2(folder: Path, cfg: Config, label: str, requested: Hookpoint | None) -> Streams:
    in_path = streams2_of(folder.as_posix())
    in_config = _streams_in_config(cfg, label)
    if in_path and in_config and in_path != in_config:
        raise SAEError(
            f"{label}: its path says {_arrow(in_path)}, its config {_arrow(in_config)}; "
            "correct the one that is wrong"
        )
    streams = in_path or in_config or ((requested, None) if requested else None)
    if streams is None:
        raise SAEError(
            f"{label} does not say its layer and stream; set layer= and sae.stream=resid_post"
        )
    return streams


def streams2_of(path: str) -> Streams | None:
    """Streams of a path such as `resid_post/layer_12_width_16k_l0_medium`; None for other paths."""
    site = re.search(rf"(?:^|/)({'|'.join(_SITES)})(?:_all)?/layer_(\d+)(?:_|$)", path)
    if not site:
        return None
    stream, stream_out = _SITES[site[1]]
    layer = int(site[2])
    return Hookpoint(layer, stream), Hookpoint(layer, stream_out) if stream_out else None


def _streams_in_config(cfg: Config, label: str) -> Streams | None:
    name = cfg.text("hf_hook_point_in")
    if not name:
        return None
    at = _stream_of_module(name, label)
    out = _stream_of_module(cfg.text("hf_hook_point_out") or name, label)
    return at, None if out == at else out


def _stream_of_module(name: str, label: str) -> Hookpoint:
    module = re.search(r"(?:^|\.)layers\.(\d+)\.([\w.]+)$", name)
    if not module or module[2] not in _MODULES:
        raise SAEError(
            f"{label}: its config names '{name}', which is not a hookpoint that saexp knows"
        )
    return Hookpoint(int(module[1]), _MODULES[module[2]])


def _arrow(streams: Streams) -> str:
    at, out = streams
    return at.name if out is None else f"{at.name} to {out.name}"


LLAMA_SCOPE_CONFIG = "hyperparams.json"
LLAMA_SCOPE_WEIGHTS = "checkpoints/final.safetensors"
_NEEDED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def is_llama_scope(folder: Path) -> bool:
    """Whether the folder has the files of a Llama Scope SAE."""
    return (folder / LLAMA_SCOPE_CONFIG).is_file() and (folder / LLAMA_SCOPE_WEIGHTS).is_file()


def load_llama_scope(folder: Path, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Load a Llama Scope folder; activations are those of unit-norm decoder rows.

    Scaled as by the authors' loader (OpenMOSS Language-Model-SAEs, October 2024): the weights are
    those of training, on inputs of norm sqrt(d_model), while the threshold applies in the model's
    scale and for unit-norm decoder rows. sae-lens applies the threshold before it multiplies by the
    decoder's norm, which is equivalent only where that norm is 1.
    """
    label = str(metadata.get("name", folder))
    cfg = _config(folder)
    d_model = cfg.needed("d_model", cfg.integer("d_model"))
    threshold = cfg.needed("jump_relu_threshold", cfg.number("jump_relu_threshold"))
    scale_in, scale_out = (_factor(cfg, d_model, end) for end in ("in", "out"))
    name_in = cfg.needed("hook_point_in", cfg.text("hook_point_in"))
    hookpoint = lens_hookpoint(name_in, f"{cfg.file}: hook_point_in")
    if (name_out := cfg.text("hook_point_out") or name_in) != name_in:
        raise SAEError(f"{label} writes to {name_out}: saexp reads no transcoders of this format")
    tensors = {n: t.float() for n, t in read_safetensors(folder / LLAMA_SCOPE_WEIGHTS).items()}
    for name in _NEEDED:
        if name not in tensors:
            raise SAEError(f"{label}: a Llama Scope SAE needs '{name}', which is missing")
    # Before the division by norms, which would spread invalid values.
    check_values(tensors, str(folder / LLAMA_SCOPE_WEIGHTS))
    check_matrices(tensors, ("encoder.weight", "decoder.weight"), label)
    weight_in, weight_out = tensors["encoder.weight"].T, tensors["decoder.weight"].T
    bias_in = tensors["encoder.bias"] / scale_in
    weight_out = weight_out * (scale_in / scale_out)
    if cfg.boolean("sparsity_include_decoder_norm", absent=True):
        norm = weight_out.norm(dim=-1)
        if not norm.shape == bias_in.shape == weight_in.shape[-1:]:
            shapes = ", ".join(f"{n} {list(tensors[n].shape)}" for n in _NEEDED[:3])
            raise SAEError(f"{label}: these shapes do not fit together: {shapes}")
        # A decoder row of zeros is a dead latent's.
        norm = norm.where(norm > 0, 1.0)
        weight_out = weight_out / norm[:, None]
        weight_in, bias_in = weight_in * norm, bias_in * norm
    sae = SparseAutoencoder(
        {
            "W_enc": weight_in.contiguous(),
            "b_enc": bias_in,
            "W_dec": weight_out.contiguous(),
            "b_dec": tensors["decoder.bias"] / scale_out,
            "threshold": torch.full_like(bias_in, threshold),
        },
        SAESettings(
            architecture="jumprelu",
            hookpoint=hookpoint,
            apply_b_dec_to_input=bool(cfg.boolean("apply_decoder_bias_to_pre_encoder")),
        ),
        metadata={
            **metadata,
            "format": "Llama Scope",
            "architecture": "jumprelu",
            "expected_norm": d_model**0.5 / scale_in,
        },
    )
    cfg.check_sizes({"d_model": sae.d_in, "d_sae": sae.d_sae})
    return sae


def _config(folder: Path) -> Config:
    cfg = read_config(folder / LLAMA_SCOPE_CONFIG)
    act_fn = cfg.text("act_fn") or "jumprelu"
    if act_fn not in ("jumprelu", "topk") or cfg.boolean("use_glu_encoder"):
        raise SAEError(f"{cfg.file}: only Llama Scope's JumpReLU SAEs are supported")
    if (cfg.text("norm_activation") or "dataset-wise") != "dataset-wise":
        raise cfg.error("norm_activation", "dataset-wise")
    return cfg


def _factor(cfg: Config, d_model: int, end: str) -> float:
    """The factor by which training multiplied the stream."""
    norms = cfg.section("dataset_average_activation_norm")
    return d_model**0.5 / norms.needed(end, norms.number(end, positive=True))
