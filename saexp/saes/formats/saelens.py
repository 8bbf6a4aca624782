"""SAELens, and formats that sae-lens reads."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saexp.errors import SAEError
from saexp.hub import hub, why_absent
from saexp.models.hookpoints import NOT_ADDED, Hookpoint
from saexp.saes.formats import (
    Config,
    check_matrices,
    drop_unit_scaling,
    lens_hookpoint,
    read_config,
    read_safetensors,
    read_yaml,
)
from saexp.saes.sae import SAESettings, SparseAutoencoder, check_values

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
    """Whether the folder looks like one."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load_saelens(
    folder: Path, metadata: dict[str, Any], overrides: dict[str, Any] | None = None
) -> SparseAutoencoder:
    """Read one; `overrides` are config values its release is known by.

    The hookpoint comes from the config (`hook_name`, before 6.0 `hook_point`).
    """
    cfg = read_config(folder / CONFIG)
    cfg = Config({**cfg.values, **(overrides or {})}, cfg.file)
    about = Config({**cfg.values, **cfg.section("metadata").values}, cfg.file)
    hook_name = about.text("hook_name") or about.text("hook_point")
    if not hook_name:
        raise SAEError(f"{folder / CONFIG} names no hook_name, so where it belongs is unknown")
    label = f"{folder / CONFIG}: hook_name"
    hookpoint = lens_hookpoint(hook_name, label, about.text("hf_hook_name"))
    named, k = _architecture(cfg)
    hookpoint_out = transcoder_output(named, about.text("hook_name_out"), f"{folder / CONFIG}")
    architecture = inference_architecture(named)
    scaling, factor = _scaling(cfg, about)
    parameters = _parameters(folder / WEIGHTS)
    if "skip" in named and "W_skip" not in parameters:
        raise SAEError(f"{folder / WEIGHTS}: a {named} needs 'W_skip', absent here")
    by_mean = expects_centred(
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
            apply_b_dec_to_input=bool(cfg.boolean("apply_b_dec_to_input", hookpoint_out is None)),
            normalize_activations=scaling,
            norm_factor=factor,
            centre=by_mean,
            rescale_acts_by_decoder_norm=bool(cfg.boolean("rescale_acts_by_decoder_norm"))
            and architecture in ("topk", "batchtopk"),
        ),
        metadata={
            "model": about.text("model_name"),
            "neuronpedia_id": about.text("neuronpedia_id"),
            "prepend_bos": _prepend_bos(about),
            "frequencies": _beside(folder),
            **metadata,
            "format": "SAELens",
            "architecture": named,
        },
    )
    cfg.check_sizes({"d_in": sae.d_in, "d_sae": sae.d_sae})
    return sae


def _prepend_bos(about: Config) -> bool | None:
    """Whether it was trained on texts that begin with BOS, None where the config does not say.

    A config before 6.0 that does not say means yes, as SAELens reads it.
    """
    given = about.boolean("prepend_bos")
    if given is None:
        major = (about.text("sae_lens_version") or "0").partition(".")[0]
        return True if major.isdecimal() and int(major) < 6 else None
    return given


def _beside(folder: Path) -> str | None:
    """The file with the latents' recorded frequencies, where there is one."""
    file = folder / SPARSITY
    return str(file) if file.is_file() else None


def recorded_frequencies(file: str | Path) -> Tensor:
    """`[d_sae]`, how often each latent fired in training; the file holds log10(frequency + 1e-10).

    Raises SAEError where the file holds no such list.
    """
    tensors = read_safetensors(Path(file))
    check_values(tensors, str(file))
    found = list(tensors.values())
    if len(found) != 1 or found[0].ndim != 1 or bool((found[0] > _ROUNDING).any()):
        raise SAEError(f"{file} does not hold one log10 frequency per latent")
    return (10 ** found[0].double() - 1e-10).clamp(min=0, max=1)


def _parameters(file: Path) -> dict[str, Tensor]:
    """Tensors under the names SparseAutoencoder knows."""
    parameters = read_safetensors(file)
    check_matrices(parameters, ("W_enc",), str(file))
    d_sae = parameters["W_enc"].shape[-1] if "W_enc" in parameters else 0
    if "log_threshold" in parameters:
        parameters["threshold"] = parameters.pop("log_threshold").exp()
    if "topk_threshold" in parameters:
        parameters["threshold"] = parameters.pop("topk_threshold").repeat(d_sae)
    drop_unit_scaling(parameters)
    return parameters


def inference_architecture(named: str) -> str:
    """saexp's name for how SAELens' architecture computes latents once trained."""
    return "batchtopk" if named == "matryoshka_batchtopk" else TRANSCODERS.get(named, named)


def transcoder_output(named: str, hook_name_out: str | None, label: str) -> Hookpoint | None:
    """What a transcoder predicts, None for an SAE. Raises SAEError where its config lacks it."""
    if named not in TRANSCODERS:
        return None
    if not hook_name_out:
        raise SAEError(
            f"{label} names no hook_name_out, so what the transcoder predicts is unknown"
        )
    return lens_hookpoint(hook_name_out, f"{label}: hook_name_out")


def _scaling(cfg: Config, about: Config) -> tuple[str, float | None]:
    """(scaling, factor); before 6.0 a boolean said whether inputs are scaled by a factor.

    As in SAELens, a factor that a release is known by counts only where the config asks for it.
    """
    if isinstance(cfg.values.get("normalize_activations"), bool):
        scaling = "expected_average_only_in" if cfg.boolean("normalize_activations") else "none"
    else:
        scaling = cfg.text("normalize_activations") or "none"
    holder = cfg if "norm_scaling_factor" in cfg.values else about
    factor = holder.number("norm_scaling_factor", positive=True)
    return scaling, factor if scaling == "expected_average_only_in" else None


def expects_centred(centred: bool | None, hookpoint: Hookpoint) -> bool:
    """Whether it was trained on TransformerLens' centred streams (each vector minus its mean)."""
    return bool(centred) and hookpoint.stream not in NOT_ADDED


def _architecture(cfg: Config) -> tuple[str, int | None]:
    """(architecture, k): configs before 6.0 say topk by their activation function."""
    architecture = cfg.text("architecture") or "standard"
    named = "activation_fn" if "activation_fn_str" not in cfg.values else "activation_fn_str"
    activation = cfg.text(named) or "relu"
    if activation not in ("relu", "topk"):
        raise SAEError(
            f"{cfg.file}: activation_fn '{activation}' is not supported; saexp reads relu, topk"
        )
    options = cfg.section("activation_fn_kwargs")
    if activation == "topk":
        return "topk", cfg.integer("k") or options.integer("k")
    if architecture == "topk":
        return architecture, cfg.integer("k")
    # BatchTopK's is a mean over tokens, and not used once there is a threshold.
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
    named, options = cfg.architecture(), about.get("model_from_pretrained_kwargs") or {}
    hookpoint_out = transcoder_output(named, about.get("hook_name_out"), label)
    return SparseAutoencoder(
        {n: p.detach().float().clone() for n, p in lens.named_parameters()},
        SAESettings(
            architecture=inference_architecture(named),
            hookpoint=hookpoint,
            hookpoint_out=hookpoint_out,
            k=getattr(cfg, "k", None),
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
            normalize_activations=getattr(cfg, "normalize_activations", "none"),
            centre=expects_centred(
                options.get("center_writing_weights"), hookpoint_out or hookpoint
            ),
            rescale_acts_by_decoder_norm=getattr(cfg, "rescale_acts_by_decoder_norm", False),
        ),
        metadata={
            "model": about.get("model_name"),
            "prepend_bos": about.get("prepend_bos"),
            **metadata,
            "format": "sae-lens loader",
            "architecture": named,
        },
    )


CONFIG_BY_LOADER = "config.yaml"


@dataclass(frozen=True)
class Files:
    """Of one layer."""

    config: Path
    encoder: Path
    decoder: Path


def weights(layer: int) -> tuple[str, str]:
    """Names of (encoder file, decoder file)."""
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def load_layer(files: Files, layer: int, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Raises SAEError where a file lacks something."""
    label = str(metadata.get("name", files.encoder))
    cfg = read_yaml(files.config)
    at, out = (_hookpoint(cfg, f"feature_{end}_hook", layer) for end in ("input", "output"))
    tensors = {**read_safetensors(files.encoder), **read_safetensors(files.decoder)}
    found: dict[str, Tensor] = {}
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        if f"{name}_{layer}" in tensors:
            found[name] = tensors[f"{name}_{layer}"].float()
        elif name != "threshold":
            raise SAEError(f"{label}: a cross-layer transcoder needs '{name}_{layer}', absent here")
    if found["W_dec"].ndim != 3:
        shape = list(found["W_dec"].shape)
        raise SAEError(f"{label}: W_dec_{layer} has shape {shape}, not [d_sae, n_layers, d_model]")
    check_matrices(found, ("W_enc",), label)
    found["W_enc"] = found["W_enc"].T.contiguous()
    # Here, before layers are summed.
    check_values(found, str(files.decoder))
    found["W_dec"] = found["W_dec"].sum(dim=1)
    architecture = "jumprelu" if "threshold" in found else "standard"
    return SparseAutoencoder(
        found,
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
