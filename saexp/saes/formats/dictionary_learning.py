"""Files of the training libraries dictionary_learning and sparsify."""

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saexp.errors import ModelError, SAEError, brief
from saexp.models import Hookpoint
from saexp.saes import SAESettings, SparseAutoencoder
from saexp.saes.formats import (
    Config,
    check_matrices,
    check_raw_output,
    check_type,
    check_values,
    read_config,
    read_safetensors,
)

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_MATRICES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}


@dataclass(frozen=True)
class _Class:
    """Parameter names and computation of one of dictionary_learning's classes."""

    architecture: str
    names: dict[str, str]
    """The class's names -> saexp's; `encoder.weight` and `decoder.weight` are transposed."""
    subtracts: bool = True
    """Whether b_dec is subtracted from the input."""


_CLASSES = {
    "AutoEncoder": _Class("standard", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": _Class("standard", {**_LINEAR, "decoder.bias": "b_dec"}, subtracts=False),
    "GatedAutoEncoder": _Class("gated", _GATED),
    "AutoEncoderTopK": _Class("topk", {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": _Class("batchtopk", {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Class("batchtopk", {**_MATRICES, "threshold": "threshold"}),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", {**_MATRICES, "threshold": "threshold"}, subtracts=False
    ),
}
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What torch raises for damaged files and files of other objects."""
_NOT_WEIGHTS = ("k", "threshold", "group_sizes")
_STREAMS = {
    "resid_post": "resid_post",
    "resid_out": "resid_post",
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "mlp_out": "mlp_out",
    "mlp": "mlp_out",
    "attention_out": "attn_out",
    "attn_out": "attn_out",
    "attention": "attn_out",
    "attn": "attn_out",
}
_FOLDER_NAME = re.compile(rf"({'|'.join(_STREAMS)})(?:_layer_?(\d+))?(?:_checkpoints)?")


def is_dictionary_learning(folder: Path) -> bool:
    """Whether the folder has the files of a dictionary_learning SAE."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_dictionary_learning(
    folder: Path, metadata: dict[str, Any], stream: str | None = None
) -> SparseAutoencoder:
    """Load a dictionary_learning folder; `stream` is used where the files do not give it.

    As in the library, the decoder rows of an AutoEncoder are scaled to norm 1 and its encoder by
    the inverse, which changes activations but not reconstructions.
    """
    label = str(metadata.get("name", folder))
    cfg = read_config(folder / CONFIG)
    trainer, buffer = cfg.section("trainer"), cfg.section("buffer")
    if not trainer.values:
        raise SAEError(f"{folder / CONFIG} has no 'trainer', which gives the class of the SAE")
    kind = trainer.text("dict_class")
    if kind is None or kind not in _CLASSES:
        raise SAEError(
            f"{folder / CONFIG}: dict_class '{kind}' is not supported; "
            f"saexp reads {', '.join(_CLASSES)}"
        )
    about = _CLASSES[kind]
    hookpoint = _hookpoint(folder, trainer, stream, label)
    if (io := buffer.text("io") or "out") != "out":
        raise SAEError(f"{label} was trained on io='{io}' of its module; saexp reads 'out'")
    model = trainer.text("lm_name")
    check_raw_output(hookpoint, model, label)
    tensors = _tensors(folder / WEIGHTS)
    k = _k(trainer, tensors, label)
    parameters = _parameters(tensors, about, kind, label)
    if kind == "AutoEncoder":
        # Before the division by norms, which would spread invalid values.
        check_values(parameters, str(folder / WEIGHTS))
        _to_unit_norm(parameters)
    sae = SparseAutoencoder(
        parameters,
        SAESettings(
            architecture=about.architecture,
            hookpoint=hookpoint,
            k=k,
            apply_b_dec_to_input=about.subtracts,
        ),
        metadata={
            "model": model,
            **metadata,
            "format": f"dictionary_learning {kind}",
            "architecture": about.architecture,
        },
    )
    trainer.check_sizes({"activation_dim": sae.d_in, "dict_size": sae.d_sae})
    return sae


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # The pickle is then refused, with an error of one line.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = brief(str(error), 120)
        raise SAEError(f"{file} is not a plain file of tensors ({reason})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise SAEError(f"{file} is not a plain file of tensors; it holds other objects too")
    for name, tensor in tensors.items():
        check_type(name, tensor, str(file))
    return tensors


def _parameters(
    tensors: dict[str, Tensor], about: _Class, kind: str, label: str
) -> dict[str, Tensor]:
    for name in about.names:
        if name not in tensors:
            raise SAEError(f"{label}: a {kind} needs '{name}', which is missing")
    check_matrices(tensors, [n for n in about.names if n.endswith("coder.weight")], label)
    parameters = {}
    for name, tensor in tensors.items():
        if name in about.names:
            value = tensor.float().T if name.endswith("coder.weight") else tensor.float()
            parameters[about.names[name]] = value.contiguous()
        elif name not in _NOT_WEIGHTS:
            parameters[name] = tensor
    threshold = parameters.get("threshold")
    if threshold is not None and threshold.ndim == 0:
        parameters["threshold"] = threshold.repeat(parameters["b_enc"].numel())
    return parameters


def _to_unit_norm(parameters: dict[str, Tensor]) -> None:
    norm = parameters["W_dec"].norm(dim=-1)
    if not norm.shape == parameters["b_enc"].shape == parameters["W_enc"].shape[-1:]:
        return
    norm = norm.where(norm > 0, 1.0)
    parameters["W_dec"] = parameters["W_dec"] / norm[:, None]
    parameters["W_enc"] = parameters["W_enc"] * norm
    parameters["b_enc"] = parameters["b_enc"] * norm


def _k(trainer: Config, tensors: dict[str, Tensor], label: str) -> int | None:
    in_config, in_weights = trainer.integer("k"), None
    if "k" in tensors and tensors["k"].numel() == 1:
        number = float(tensors["k"])
        if not (number >= 1 and number.is_integer()):
            raise SAEError(f"{label}: k in its weights is {number:g}, not a positive integer")
        in_weights = int(number)
    if in_config is not None and in_weights is not None and in_config != in_weights:
        raise SAEError(f"{label}: its config says k={in_config}, its weights k={in_weights}")
    return in_weights if in_config is None else in_config


def _layer(trainer: Config) -> int | None:
    """The layer of the config, which may be an integer or a string of digits."""
    if isinstance(trainer.values.get("layer"), str):
        digits = trainer.text("layer") or ""
        if not re.fullmatch(r"[0-9]{1,9}", digits):
            raise trainer.error("layer", "an integer of at least 0")
        return int(digits)
    return trainer.integer("layer", least=0)


def _hookpoint(folder: Path, trainer: Config, stream: str | None, label: str) -> Hookpoint:
    """The hookpoint by submodule_name and layer, else by a folder such as resid_post_layer_12.

    Raises SAEError where they contradict each other, or where none gives the stream.
    """
    layer = _layer(trainer)
    name = trainer.text("submodule_name")
    by_name = _stream_and_layer(name) if name else None
    folders = (_stream_and_layer(part) for part in reversed(folder.parts[-3:]))
    by_folder = next((p for p in folders if p and p[1] is not None), None)
    if name and by_name is None and stream is None:
        raise SAEError(
            f"{label}: its config has submodule_name '{name}', which is not a stream that "
            "saexp knows; set sae.stream=resid_post, mlp_out …"
        )
    candidates = [p for p in (by_name, by_folder) if p]
    streams = {s for s, _ in candidates} or ({stream} if stream else set())
    layers = {n for n in (layer, *(n for _, n in candidates)) if n is not None}
    if len(streams) > 1 or len(layers) > 1:
        raise SAEError(
            f"{label}: its config says layer={layer}, submodule_name={name}, its folder "
            f"{folder.parent.name}/{folder.name}; correct the one that is wrong"
        )
    if not streams:
        raise SAEError(
            f"{label}: neither its config nor its folder's name contains a stream; "
            "set sae.stream=resid_post, mlp_out …"
        )
    if not layers:
        raise SAEError(f"{folder / CONFIG}: 'layer' is missing, so the hookpoint is unknown")
    return Hookpoint(layers.pop(), streams.pop())


def _stream_and_layer(name: str) -> tuple[str, int | None] | None:
    """(stream, layer where the name contains it); None for a name without a stream."""
    if match := _FOLDER_NAME.fullmatch(name):
        return _STREAMS[match[1]], int(match[2]) if match[2] else None
    try:
        hookpoint = Hookpoint.parse(name)
    except ModelError:
        return None
    return hookpoint.stream, hookpoint.layer


SPARSIFY_CONFIG, SPARSIFY_WEIGHTS = "cfg.json", "sae.safetensors"
RUN_CONFIG = "config.json"
"""The file with the model's name, beside the folders of a run."""
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_EMBEDDINGS = ("embed_tokens", "embed_in")
_INPUT_OF = {"mlp_out": "mlp_in", "resid_post": "resid_pre"}


def is_sparsify(folder: Path) -> bool:
    """Whether the folder has the files of a sparsify SAE."""
    return (folder / SPARSIFY_CONFIG).is_file() and (folder / SPARSIFY_WEIGHTS).is_file()


def load_sparsify(
    folder: Path, metadata: dict[str, Any], requested: Hookpoint | None = None
) -> SparseAutoencoder:
    """Load a sparsify folder: top-k or groupmax.

    The folder is named after a module: `layers.5` is the output of block 5, `layers.5.mlp` that of
    its MLP; a transcoder predicts the module's output from its input. `requested` is used for other
    names.
    """
    label = str(metadata.get("name", folder))
    cfg = read_config(folder / SPARSIFY_CONFIG)
    if cfg.boolean("signed"):
        raise SAEError(
            f"{folder / SPARSIFY_CONFIG}: signed=true keeps negative latents; not supported"
        )
    activation = cfg.text("activation") or "topk"
    if activation not in ("topk", "groupmax"):
        raise SAEError(
            f"{folder / SPARSIFY_CONFIG}: activation '{activation}' is not supported; "
            "saexp reads topk, groupmax"
        )
    hookpoint = _module_output(folder) or requested
    if hookpoint is None:
        raise SAEError(
            f"{label}: the folder's name '{_module_folder(folder).name}' is not a module such as "
            "layers.5 or layers.5.mlp; set layer= and sae.stream=resid_post"
        )
    model = _model(folder)
    check_raw_output(hookpoint, model, label)
    out = hookpoint if cfg.boolean("transcode") else None
    if out is not None:
        hookpoint = _input_of(out, label)
    sae = SparseAutoencoder(
        _sparsify_parameters(
            folder / SPARSIFY_WEIGHTS, label, skip=bool(cfg.boolean("skip_connection"))
        ),
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
    # 0 means d_in times expansion_factor.
    if cfg.integer("num_latents", least=0):
        cfg.check_sizes({"num_latents": sae.d_sae})
    return sae


def _sparsify_parameters(file: Path, label: str, *, skip: bool) -> dict[str, Tensor]:
    tensors = read_safetensors(file)
    for name in (*_NAMES, *(("W_skip",) if skip else ())):
        if name not in tensors:
            raise SAEError(f"{label}: a sparsify SAE needs '{name}', which is missing")
    check_matrices(tensors, ("encoder.weight",), label)
    parameters = {_NAMES.get(name, name): t.float() for name, t in tensors.items()}
    parameters["W_enc"] = parameters["W_enc"].T.contiguous()
    return parameters


def _module_folder(folder: Path) -> Path:
    """The folder with the module's name; with several seeds, it has a folder for each."""
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _module_output(folder: Path) -> Hookpoint | None:
    name = _module_folder(folder).name
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
    file = _module_folder(folder).parent / RUN_CONFIG
    return read_config(file).text("model") if file.is_file() else None
