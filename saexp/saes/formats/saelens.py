"""Files of SAELens, cross-layer transcoders, and formats that sae-lens loads itself."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saexp.errors import SAEError
from saexp.hub import hub, why_absent
from saexp.models import NOT_ADDED, Hookpoint
from saexp.saes import Pursuit, SAESettings, SparseAutoencoder
from saexp.saes.formats import (
    Config,
    check_matrices,
    check_values,
    drop_unit_scaling,
    lens_hookpoint,
    read_config,
    read_safetensors,
    read_yaml,
)

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_ROUNDING = 1e-3
TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens' architectures that predict another stream -> how their latents are computed."""


def is_saelens(folder: Path) -> bool:
    """Whether the folder has the files of a SAELens SAE."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_saelens(
    folder: Path, metadata: dict[str, Any], overrides: dict[str, Any] | None = None
) -> SparseAutoencoder:
    """Load a SAELens folder; `overrides` are config values that the catalogue has for the release.

    The hookpoint is that of the config (`hook_name`, before version 6.0 `hook_point`).
    """
    cfg = read_config(folder / CONFIG)
    cfg = Config({**cfg.values, **(overrides or {})}, cfg.file)
    about = Config({**cfg.values, **cfg.section("metadata").values}, cfg.file)
    hook_name = about.text("hook_name") or about.text("hook_point")
    if not hook_name:
        raise SAEError(f"{folder / CONFIG} has no hook_name, so the SAE's hookpoint is unknown")
    label = f"{folder / CONFIG}: hook_name"
    hookpoint = lens_hookpoint(hook_name, label, about.text("hf_hook_name"))
    lens_architecture, k = _architecture(cfg)
    hookpoint_out = transcoder_output(
        lens_architecture, about.text("hook_name_out"), f"{folder / CONFIG}"
    )
    architecture = inference_architecture(lens_architecture)
    scaling, factor = _scaling(cfg, about)
    subtracts = bool(cfg.boolean("apply_b_dec_to_input", hookpoint_out is None))
    parameters = _parameters(folder / WEIGHTS)
    if architecture == "matching_pursuit":
        parameters = _tied(parameters, adds_b_dec=subtracts)
    if "skip" in lens_architecture and "W_skip" not in parameters:
        raise SAEError(
            f"{folder / WEIGHTS}: a {lens_architecture} needs 'W_skip', which is missing"
        )
    centre = expects_centred(
        about.section("model_from_pretrained_kwargs").boolean("center_writing_weights"),
        hookpoint_out or hookpoint,
    )
    sae = SparseAutoencoder(
        parameters,
        SAESettings(
            architecture=architecture,
            hookpoint=hookpoint,
            hookpoint_out=hookpoint_out,
            k=k,
            apply_b_dec_to_input=subtracts,
            normalize_activations=scaling,
            norm_factor=factor,
            centre=centre,
            rescale_acts_by_decoder_norm=bool(cfg.boolean("rescale_acts_by_decoder_norm"))
            and architecture in ("topk", "abstopk", "batchtopk"),
            pursuit=_pursuit(cfg),
        ),
        metadata={
            "model": about.text("model_name"),
            "neuronpedia_id": about.text("neuronpedia_id"),
            "prepend_bos": _prepend_bos(about),
            "frequencies": _frequencies_file(folder),
            **metadata,
            "format": "SAELens",
            "architecture": lens_architecture,
        },
    )
    cfg.check_sizes({"d_in": sae.d_in, "d_sae": sae.d_sae})
    return sae


def _prepend_bos(about: Config) -> bool | None:
    """Whether the SAE was trained on texts that begin with BOS; None where that is unknown.

    True is the default of configs before version 6.0, as in SAELens.
    """
    configured = about.boolean("prepend_bos")
    if configured is None:
        major = (about.text("sae_lens_version") or "0").partition(".")[0]
        return True if major.isdecimal() and int(major) < 6 else None
    return configured


def _frequencies_file(folder: Path) -> str | None:
    """The file with the frequencies of the latents in training, where there is one."""
    file = folder / SPARSITY
    return str(file) if file.is_file() else None


def recorded_frequencies(file: str | Path) -> Tensor:
    """Fraction of training tokens on which each latent was active, `[d_sae]`.

    The file holds log10(frequency + 1e-10); raises SAEError where it holds anything else.
    """
    tensors = read_safetensors(Path(file))
    check_values(tensors, str(file))
    values = list(tensors.values())
    if len(values) != 1 or values[0].ndim != 1 or bool((values[0] > _ROUNDING).any()):
        raise SAEError(f"{file} does not hold one log10 frequency per latent")
    return (10 ** values[0].double() - 1e-10).clamp(min=0, max=1)


def _parameters(file: Path) -> dict[str, Tensor]:
    """Tensors under the names of SparseAutoencoder."""
    parameters = read_safetensors(file)
    check_matrices(parameters, ("W_enc",), str(file))
    d_sae = parameters["W_enc"].shape[-1] if "W_enc" in parameters else 0
    if "log_threshold" in parameters:
        parameters["threshold"] = parameters.pop("log_threshold").exp()
    if "topk_threshold" in parameters:
        parameters["threshold"] = parameters.pop("topk_threshold").repeat(d_sae)
    drop_unit_scaling(parameters)
    return parameters


def _tied(parameters: Mapping[str, Tensor], *, adds_b_dec: bool) -> dict[str, Tensor]:
    """Parameters of matching pursuit with its encoder, the transposed decoder.

    As in SAELens, b_dec is added to the output only where it is subtracted from the input.
    """
    tied = dict(parameters)
    if "W_dec" in tied and tied["W_dec"].ndim == 2:
        tied["W_enc"] = tied["W_dec"].T.contiguous()
    if "b_dec" in tied and not adds_b_dec:
        tied["b_dec"] = torch.zeros_like(tied["b_dec"])
    return tied


def _pursuit(cfg: Config) -> Pursuit:
    """When matching pursuit stops; its defaults where the config lacks a value."""
    threshold = cfg.number("residual_threshold")
    repeats = cfg.boolean("stop_on_duplicate_support")
    return Pursuit(
        residual_threshold=1e-2 if threshold is None else threshold,
        max_iterations=cfg.integer("max_iterations"),
        stop_on_duplicate_support=True if repeats is None else repeats,
    )


def inference_architecture(lens_architecture: str) -> str:
    """saexp's name for the computation of latents at inference in an architecture of SAELens."""
    if lens_architecture == "matryoshka_batchtopk":
        return "batchtopk"
    return TRANSCODERS.get(lens_architecture, lens_architecture)


def transcoder_output(
    lens_architecture: str, hook_name_out: str | None, label: str
) -> Hookpoint | None:
    """The stream that a transcoder predicts; None for an SAE.

    Raises SAEError where the config of a transcoder lacks it.
    """
    if lens_architecture not in TRANSCODERS:
        return None
    if not hook_name_out:
        raise SAEError(
            f"{label} has no hook_name_out, so the stream that the transcoder predicts is unknown"
        )
    return lens_hookpoint(hook_name_out, f"{label}: hook_name_out")


def _scaling(cfg: Config, about: Config) -> tuple[str, float | None]:
    """(scaling, factor); before version 6.0, the setting is a boolean.

    As in SAELens, the catalogue's factor counts only where the config has that scaling.
    """
    if isinstance(cfg.values.get("normalize_activations"), bool):
        scaling = "expected_average_only_in" if cfg.boolean("normalize_activations") else "none"
    else:
        scaling = cfg.text("normalize_activations") or "none"
    holder = cfg if "norm_scaling_factor" in cfg.values else about
    factor = holder.number("norm_scaling_factor", positive=True)
    return scaling, factor if scaling == "expected_average_only_in" else None


def expects_centred(centred: bool | None, hookpoint: Hookpoint) -> bool:
    """Whether an SAE of TransformerLens' centred weights reads vectors minus their means."""
    return bool(centred) and hookpoint.stream not in NOT_ADDED


def _architecture(cfg: Config) -> tuple[str, int | None]:
    """(architecture, k); before version 6.0, the activation function of a config may be topk."""
    architecture = cfg.text("architecture") or "standard"
    key = "activation_fn" if "activation_fn_str" not in cfg.values else "activation_fn_str"
    activation = cfg.text(key) or "relu"
    if activation not in ("relu", "topk"):
        raise SAEError(
            f"{cfg.file}: activation_fn '{activation}' is not supported; saexp reads relu, topk"
        )
    options = cfg.section("activation_fn_kwargs")
    if activation == "topk":
        return "topk", cfg.integer("k") or options.integer("k")
    if architecture in ("topk", "abstopk"):
        return architecture, cfg.integer("k")
    # BatchTopK's k is a mean over tokens, and not used at inference, where there is a threshold.
    cfg.number("k", positive=True)
    return architecture, None


def load_by_sae_lens(release: str, id: str, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Load an SAE or transcoder of the catalogue with sae-lens' own loader."""
    from sae_lens import SAE as LensSAE

    label = f"{release}/{id}"
    try:
        with hub(), warnings.catch_warnings():
            # Advice on loading the model with TransformerLens, which saexp does not use.
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pre")
            lens = LensSAE.from_pretrained(release, id, device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SAEError(f"{label} cannot be loaded ({why_absent(error)})") from error
    cfg, about = lens.cfg, lens.cfg.metadata.to_dict()
    hookpoint = lens_hookpoint(str(about.get("hook_name")), label, about.get("hf_hook_name"))
    architecture = cfg.architecture()
    options = about.get("model_from_pretrained_kwargs") or {}
    hookpoint_out = transcoder_output(architecture, about.get("hook_name_out"), label)
    parameters = {n: p.detach().float().clone() for n, p in lens.named_parameters()}
    if architecture == "matching_pursuit":
        parameters = _tied(parameters, adds_b_dec=cfg.apply_b_dec_to_input)
    return SparseAutoencoder(
        parameters,
        SAESettings(
            architecture=inference_architecture(architecture),
            hookpoint=hookpoint,
            hookpoint_out=hookpoint_out,
            k=getattr(cfg, "k", None),
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
            normalize_activations=getattr(cfg, "normalize_activations", "none"),
            centre=expects_centred(
                options.get("center_writing_weights"), hookpoint_out or hookpoint
            ),
            rescale_acts_by_decoder_norm=getattr(cfg, "rescale_acts_by_decoder_norm", False),
            pursuit=_pursuit(Config(vars(cfg), Path(label))),
        ),
        metadata={
            "model": about.get("model_name"),
            "prepend_bos": about.get("prepend_bos"),
            **metadata,
            "format": "sae-lens loader",
            "architecture": architecture,
        },
    )


CONFIG_BY_LOADER = "config.yaml"


@dataclass(frozen=True)
class Files:
    """The files of one layer of a cross-layer transcoder."""

    config: Path
    encoder: Path
    decoder: Path


def weights(layer: int) -> tuple[str, str]:
    """Names of (encoder file, decoder file)."""
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def load_layer(files: Files, layer: int, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Load one layer of a cross-layer transcoder; its decoders to all layers are summed.

    Raises SAEError for missing settings and tensors.
    """
    label = str(metadata.get("name", files.encoder))
    cfg = read_yaml(files.config)
    at, out = (_hookpoint(cfg, f"feature_{end}_hook", layer) for end in ("input", "output"))
    tensors = {**read_safetensors(files.encoder), **read_safetensors(files.decoder)}
    parameters: dict[str, Tensor] = {}
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        if f"{name}_{layer}" in tensors:
            parameters[name] = tensors[f"{name}_{layer}"].float()
        elif name != "threshold":
            raise SAEError(
                f"{label}: a cross-layer transcoder needs '{name}_{layer}', which is missing"
            )
    if parameters["W_dec"].ndim != 3:
        shape = list(parameters["W_dec"].shape)
        raise SAEError(f"{label}: W_dec_{layer} has shape {shape}, not [d_sae, n_layers, d_model]")
    check_matrices(parameters, ("W_enc",), label)
    parameters["W_enc"] = parameters["W_enc"].T.contiguous()
    # Before the sum over layers, which would spread invalid values.
    check_values(parameters, str(files.decoder))
    parameters["W_dec"] = parameters["W_dec"].sum(dim=1)
    architecture = "jumprelu" if "threshold" in parameters else "standard"
    return SparseAutoencoder(
        parameters,
        SAESettings(architecture=architecture, hookpoint=at, hookpoint_out=out),
        metadata={
            "model": cfg.text("model_name"),
            **metadata,
            "format": "cross-layer transcoder, one layer",
            "architecture": architecture,
            "reconstructs": False,
        },
    )


def _hookpoint(cfg: Config, key: str, layer: int) -> Hookpoint:
    name = cfg.needed(key, cfg.text(key))
    return lens_hookpoint(f"blocks.{layer}.{name}", f"{cfg.file}: {key}")
