"""sae_trainer.name and its options -> one of sae-lens' training classes, or a transcoder's."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch

from saexp.config.training import SAETrainerConfig
from saexp.errors import ConfigError
from saexp.models.hookpoints import Hookpoint
from saexp.registry import did_you_mean

SAES = ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
TRANSCODERS = tuple(
    f"{name}_transcoder" for name in ("standard", "batchtopk", "jumprelu", "matryoshka_batchtopk")
)
ARCHITECTURES = (*SAES, *TRANSCODERS)
_GIVEN = (
    "d_in",
    "d_sae",
    "d_out",
    "dtype",
    "device",
    "metadata",
    "normalize_activations",
    "reshape_activations",
)
"""Fields of sae-lens' configs that follow from the streams, the width and sae_trainer's keys."""


@dataclass(frozen=True)
class Place:
    """What the SAE is trained on, for its metadata; a transcoder has an output too."""

    model_name: str
    hookpoint: Hookpoint
    d_in: int
    context_size: int
    hookpoint_out: Hookpoint | None = None
    d_out: int | None = None
    prepend_bos: bool = True
    """Whether its texts begin with BOS."""


def check_name(name: str) -> None:
    """Raise ConfigError unless `sae_trainer.name` is something that can be trained."""
    if name in ARCHITECTURES:
        return
    if name.removesuffix("_transcoder") in SAES:
        raise ConfigError(
            f"sae_trainer.name={name}: sae-lens has no class that would use such a transcoder; "
            f"choose from {', '.join(TRANSCODERS)}"
        )
    raise ConfigError(f"sae_trainer.name={name}: {did_you_mean(name, ARCHITECTURES)}")


def training_sae(
    cfg: SAETrainerConfig, d_sae: int, place: Place, device: torch.device, n_steps: int
) -> Any:
    """A fresh one, its weights from torch's seed. Raises ConfigError for what cannot be trained."""
    from sae_lens.saes.sae import SAEMetadata

    check_name(cfg.name)
    made, made_config = _classes(cfg.name)
    options = _options(cfg, made_config, d_sae, n_steps)
    output = {}
    if place.hookpoint_out is not None:
        output["hook_name_out"] = place.hookpoint_out.transformer_lens
        options["d_out"] = place.d_out
    elif place.hookpoint.stream == "attn_z":
        # Saved, it is given [.., n_heads, d_head] there.
        options["reshape_activations"] = "hook_z"
    try:
        config = made_config(
            d_in=place.d_in,
            d_sae=d_sae,
            dtype="float32",
            device=str(device),
            normalize_activations=cfg.normalize_activations,
            metadata=SAEMetadata(
                model_name=place.model_name,
                hook_name=place.hookpoint.transformer_lens,
                context_size=place.context_size,
                prepend_bos=place.prepend_bos,
                **output,
            ),
            **options,
        )
        return made(config)
    except ValueError as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"sae_trainer.options of a {_kind(cfg.name)}: {told}") from error


def _options(cfg: SAETrainerConfig, made_config: Any, d_sae: int, n_steps: int) -> dict[str, Any]:
    """The options given, checked, and those that follow from the width and number of steps."""
    options = dict(cfg.options)
    if cfg.name.startswith("matryoshka_batchtopk"):
        options.setdefault("matryoshka_widths", [d_sae // 4, d_sae // 2, d_sae])
    fields = {f.name: f for f in dataclasses.fields(made_config) if f.name not in _GIVEN}
    for warm_up in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if warm_up in fields:
            options.setdefault(warm_up, int(cfg.sparsity_warm_up * n_steps))
    for name in sorted(options):
        key = f"sae_trainer.options.{name}"
        if name in _GIVEN:
            raise ConfigError(f"{key}: set by layer, task.streams, width and sae_trainer's keys")
        if name not in fields:
            raise ConfigError(
                f"{key}: a {_kind(cfg.name)} has no such option; "
                f"{did_you_mean(name, sorted(fields))}"
            )
        options[name] = _value(key, options[name], fields[name].type)
    k = options.get("k", fields["k"].default if "k" in fields else 1)
    if k <= 0:
        raise ConfigError(f"sae_trainer.options.k={k} leaves no latent active; type a k such as 16")
    if k > d_sae:
        raise ConfigError(f"sae_trainer.options.k={k} is above width={d_sae}")
    if cfg.name not in TRANSCODERS:
        return options
    if options.get("apply_b_dec_to_input"):
        raise ConfigError(
            "sae_trainer.options.apply_b_dec_to_input: a transcoder's b_dec belongs to its "
            "output; leave it out"
        )
    return {n: float(v) if fields[n].type is float else v for n, v in options.items()}


def _value(key: str, value: Any, wanted: Any) -> Any:
    """The value, a whole number as an int where the field is one. Raises ConfigError."""
    if wanted is bool and not isinstance(value, bool):
        raise ConfigError(f"{key}={value} is neither true nor false")
    if get_origin(wanted) is Literal and value not in get_args(wanted):
        raise ConfigError(f"{key}={value}: {did_you_mean(str(value), get_args(wanted))}")
    if wanted not in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value} is no number")
    if wanted is int and value != int(value):
        raise ConfigError(f"{key}={value} is no whole number")
    return int(value) if wanted is int else value


def _kind(name: str) -> str:
    return name.replace("_transcoder", " transcoder") if name in TRANSCODERS else f"{name} SAE"


def _classes(name: str) -> tuple[Any, Any]:
    if name in TRANSCODERS:
        from saexp.saes.training_transcoders import CLASSES

        return CLASSES[name]
    from sae_lens.registry import get_sae_training_class

    made, made_config = get_sae_training_class(name)
    if name == "batchtopk":
        from saexp.saes.training_batchtopk import QuickBatchTopKTrainingSAE

        made = QuickBatchTopKTrainingSAE
    return made, made_config
