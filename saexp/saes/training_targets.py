"""The SAEs of one training run: lists of layers and widths, and variants of the trainer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saexp.config import SAETrainerConfig, parse_layers, parse_widths
from saexp.config.run import conf_folder
from saexp.config.tasks import OF_ONE_SAE
from saexp.errors import ConfigError
from saexp.models import STREAM_ORDER, Hookpoint
from saexp.saes.training_architectures import TRANSCODERS, check_name


@dataclass(frozen=True)
class Target:
    """One SAE that is to be trained."""

    hookpoints: tuple[Hookpoint, ...]
    """The stream that is read, and the one that a transcoder predicts."""
    d_sae: int
    trainer: SAETrainerConfig
    """Its own settings, without variants."""
    label: str = ""
    """Layer, width and settings in which it differs from the others of the run; also its folder."""


def targets(
    layer: Any, width: Any, streams: Sequence[str], trainer: SAETrainerConfig
) -> list[Target]:
    """One target per layer, width and variant; the only one has no label.

    Raises ConfigError for an unusable combination of trainer, layer, streams and width.
    """
    variants = variants_of(trainer)
    layers = [] if layer is None else list(dict.fromkeys(parse_layers(layer)))
    if not layers:
        raise ConfigError("layer is not set; type layer=<block index>, or a list such as [0,1,2]")
    widths = list(dict.fromkeys(parse_widths(width)))
    if not widths:
        raise ConfigError("width is not set; type width=<number of latents>, such as width=2k")
    result = []
    for n in layers:
        for d_sae in widths:
            for name, one in variants.items():
                parts = [f"layer_{n}"] if len(layers) > 1 else []
                parts += [f"width_{d_sae}"] if len(widths) > 1 else []
                label = "_".join([*parts, *([name] if name else [])])
                result.append(Target(_hookpoints(n, streams, one.name), d_sae, one, label))
    return result


def _hookpoints(layer: int, streams: Sequence[str], name: str) -> tuple[Hookpoint, ...]:
    check_name(name)
    is_transcoder = name in TRANSCODERS
    if is_transcoder and len(streams) != 2:
        raise ConfigError(
            f"task.streams={streams}: {name} reads one stream and predicts another of the block; "
            "type 'task.streams=[mlp_in,mlp_out]'"
        )
    if not is_transcoder and len(streams) != 1:
        raise ConfigError(
            f"task.streams={streams}: an SAE reads one stream; sweep with "
            "-m 'task.streams=[resid_post],[mlp_out]' (a transcoder, such as "
            "sae_trainer=batchtopk_transcoder, takes two streams)"
        )
    hookpoints = tuple(Hookpoint(layer, stream) for stream in streams)
    forwards = STREAM_ORDER.index(streams[0]) < STREAM_ORDER.index(streams[-1])
    if is_transcoder and (not forwards or hookpoints[0].stored == hookpoints[1].stored):
        raise ConfigError(
            f"task.streams={streams}: a transcoder predicts a stream that comes after the one it "
            "reads; type 'task.streams=[mlp_in,mlp_out]'"
        )
    return hookpoints


def variants_of(trainer: SAETrainerConfig) -> dict[str, SAETrainerConfig]:
    """Label -> settings of one SAE, for each of `variants`; the only one has no label.

    A variant with another name has the options of the shipped config of that name, not those of the
    run. Raises ConfigError for one that is not a mapping, and for two that are the same.
    """
    base = replace(trainer, variants=[])
    if not trainer.variants:
        return {"": base}
    configs = [_variant(base, given) for given in trainer.variants]
    values = [_settings(one) for one in configs]
    keys = list(dict.fromkeys(["name", *(key for one in values for key in one)]))
    varying = [k for k in keys if len({json.dumps(v[k]) for v in values if k in v}) > 1]
    labels = ["_".join(_words(k, v[k]) for k in varying if k in v) for v in values]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(
            f"sae_trainer.variants: two are the same{f' ({twice})' if twice else ''}; leave one out"
        )
    return dict(zip(labels, configs, strict=True))


def _settings(trainer: SAETrainerConfig) -> dict[str, Any]:
    return {**trainer.options, **{key: getattr(trainer, key) for key in OF_ONE_SAE}}


def _words(key: str, value: Any) -> str:
    text = str(value) if key == "name" else f"{key}_{value}"
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _variant(base: SAETrainerConfig, given: Any) -> SAETrainerConfig:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"sae_trainer.variants: {given} is not a mapping; type e.g. "
            "'sae_trainer.variants=[{k:16},{k:32}]'"
        )
    settings = {str(key): value for key, value in given.items()}
    shared = {f.name for f in fields(SAETrainerConfig)} - {*OF_ONE_SAE, "options"}
    for key in settings:
        if key in shared:
            raise ConfigError(
                f"sae_trainer.variants: {key} is the same for all SAEs of a run; type "
                f"sae_trainer.{key}={settings[key]}"
            )
    name = str(settings.get("name", base.name))
    options = dict(base.options if name == base.name else _shipped_options(name))
    options |= settings.pop("options", {})
    options |= {key: settings.pop(key) for key in list(settings) if key not in OF_ONE_SAE}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(replace(base, options=options)), settings)
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"sae_trainer.variants: {dict(given)}: {reason}") from error
    assert isinstance(made, SAETrainerConfig)
    return made


def _shipped_options(name: str) -> dict[str, Any]:
    """The options in conf/sae_trainer/<name>.yaml; none where there is no such file."""
    check_name(name)
    file = conf_folder() / "sae_trainer" / f"{name}.yaml"
    if not file.is_file():
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return dict(content.get("options", {}))
