"""What a run can be asked: a dataclass per component, validated when it is built.

Errors of Hydra and OmegaConf become one line: what, where, what to type instead.
"""

import re
from collections.abc import Iterable

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from saexp.config.components import (
    AnalyzerConfig,
    CapabilityConfig,
    CollectorConfig,
    ImportedConfig,
    ModelConfig,
    PositionsConfig,
    ProbeConfig,
    SAEConfig,
    StatsConfig,
    StoreConfig,
    TopFeaturesConfig,
    TrackerConfig,
)
from saexp.config.environment import (
    parse_coefficients,
    parse_layers,
    parse_width,
    parse_widths,
)
from saexp.config.groups import CorpusConfig, DatasetConfig, InterventionConfig, WikidataConfig
from saexp.config.run import (
    RunConfig,
    group_options,
    known_keys,
    near_keys,
    register_schema,
    to_run_config,
    to_tracker_config,
)
from saexp.config.tasks import (
    CacheConfig,
    CollectConfig,
    DashboardConfig,
    EvaluateConfig,
    LabelConfig,
    SAETrainerConfig,
    TaskConfig,
    TrainConfig,
)
from saexp.errors import ConfigError, SaexpError
from saexp.registry import did_you_mean

__all__ = [
    "AnalyzerConfig",
    "COMPOSITION_ERRORS",
    "CacheConfig",
    "CapabilityConfig",
    "CollectConfig",
    "CollectorConfig",
    "CorpusConfig",
    "DashboardConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "ImportedConfig",
    "InterventionConfig",
    "LabelConfig",
    "ModelConfig",
    "PositionsConfig",
    "ProbeConfig",
    "RunConfig",
    "SAEConfig",
    "SAETrainerConfig",
    "StatsConfig",
    "StoreConfig",
    "TaskConfig",
    "TopFeaturesConfig",
    "TrackerConfig",
    "TrainConfig",
    "WikidataConfig",
    "is_composition_error",
    "one_line",
    "parse_coefficients",
    "parse_layers",
    "parse_width",
    "parse_widths",
    "register_schema",
    "to_run_config",
    "to_tracker_config",
]

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
_COMPOSERS = ("hydra", "omegaconf")


def is_composition_error(error: BaseException) -> bool:
    """Whether a config could not be composed; Hydra raises some of Python's own errors too."""
    if isinstance(error, COMPOSITION_ERRORS):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
    return isinstance(error, ValueError | TypeError | AttributeError | AssertionError) and (
        module.partition(".")[0] in _COMPOSERS
    )


def one_line(error: Exception) -> SaexpError:
    """The error as a SaexpError with a message of one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SaexpError):
            return cause
        cause = cause.__cause__
    return ConfigError(_explain(error))


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group and error.options:
            line = f"{group}={option}: no such option; {did_you_mean(option, error.options)}"
            return line + (_launchers(error.options) if group == "hydra/launcher" else "")
        if options := group_options(group):
            return f"{group}={option}: no such option; {did_you_mean(option, options)}"
        return f"no config file {error.missing_cfg_file}; see python -m saexp --help"
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        key = _full_key(error) or text.rpartition(":")[2].strip()
        return f"{key} is not set; type {key}=<value> (see python -m saexp --help)"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as key=value; "
            f"{_quoted_twice(str(error.override)) or _HOW_TO_QUOTE}"
        )
    if match := _NOT_A_MAPPING.search(text):
        key = _full_key(error) or match[1]
        usage = _MAPPINGS.get(key, "{key}.<name>=<value>, or '{key}={{<name>: <value>}}'")
        return f"{key} takes names with values; type {usage.format(key=key)}"
    if isinstance(error, ValidationError) and (key := _full_key(error)):
        if "is not a ListConfig" in text:
            return f"{key}: takes a list; type '{key}=[…]'"
        if "is not Optional" in text:
            return f"{key} needs a value; type {key}=<value>"
        if match := _OF_TYPE.search(text):
            return f"{key}={match[1]} is not {_TYPES[match[2]]}"
        return f"{key}: {text.partition(' full_key')[0]}"
    if text.startswith("Config group override must be"):
        return (
            "a group takes the name of one of its options, such as model=gpt2; leave a group out "
            "to get its default (see python -m saexp --help)"
        )
    if match := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        key = match[1].partition("=")[0]
        return f"~{key}: " + (
            f"it cannot be removed; type {key}=null"
            if key in known_keys()
            else f"no key '{key}'; {near_keys(key)}"
        )
    if "does not support deletion" in text or "Interpolation key" in text:
        match = re.search(r"Interpolation key '([^']+)'", text)
        key = match[1] if match else _full_key(error)
        if key in known_keys():
            return f"{key} cannot be removed; type {key}=null"
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException):
        unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", text)
        if unknown:
            key = unknown[1] or _full_key(error) or unknown[2]
            if key.startswith("hydra."):
                return f"Hydra has no setting '{key}'; python -m saexp --info lists them"
            return f"no key '{key}'; {near_keys(key)}"
        group = re.search(r"Could not override '([^'=]+)'.*No match in the defaults list", text)
        if group:
            return f"no group '{group[1]}'; {did_you_mean(group[1], known_keys())}"
        inner = error.__cause__
        if isinstance(inner, Exception):
            return _explain(inner)
    return text


_NOT_A_MAPPING = re.compile(
    r"Cannot assign \w+ to Dict\[|Cannot merge DictConfig with ListConfig full_key: (\S+)"
)
_MAPPINGS = {
    "task.rules": "{key}.<entity type>.<attribute>.<setting>=<value>, such as "
    "{key}.player.birth_year.tolerance=5",
    "task.templates": "{key}.<entity type>.<attribute>=<question>, such as "
    "\"{key}.book.creator='Who wrote the book {{entity}}?'\"",
}
"""Key of a mapping with several levels -> what to type."""
_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
_OF_TYPE = re.compile(
    r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (Integer|Float|bool)"
)
_HOW_TO_QUOTE = (
    "quote lists for the shell, 'layer=[0,1,2]', and values with braces, commas or spaces twice, "
    "'sae.path=\"saes/{layer}\"'"
)


def _quoted_twice(override: str) -> str | None:
    """What to type instead; None if more than quotes may be missing."""
    match = re.fullmatch(r"""([+~]*[\w./@-]+)=([^'"\\\[\]]+)""", override)
    if not match or match[2].lstrip().startswith("{") or not match[2].strip():
        return None
    key, value = match[1], match[2].strip()
    # In double quotes the shell would expand them.
    outer, inner = ("'", '"') if re.search(r"[$`!]", value) else ('"', "'")
    typed = f"{outer}{key}={inner}{value}{inner}{outer}"
    return f"quote such a value twice, for the shell and for Hydra: {typed}"


def _launchers(options: Iterable[str]) -> str:
    """How to install the launchers that are missing."""
    installed = " ".join(options)
    if all(name in installed for name in ("joblib", "submitit", "ray")):
        return ""
    return "; joblib and submitit come with pip install 'saexp[launchers]', ray with 'saexp[ray]'"


def _full_key(error: Exception) -> str | None:
    key = getattr(error, "full_key", None)
    return str(key) if key else None


def key_of(override: str) -> str:
    """Key of an override as typed, without the signs that Hydra allows before it."""
    return override.lstrip("+~").partition("=")[0]
