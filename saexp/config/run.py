"""The config of a whole run, and its composition by Hydra.

Hydra composes YAML options and overrides into one tree. Its nodes for the config groups accept any
key; `to_run_config` then replaces each group by the dataclass of the component that the group names
and reports unknown keys itself. So a component that a plugin registers needs no YAML file, and the
former spellings of settings are still read.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf

from saexp import registry
from saexp.config import components, environment, groups, tasks
from saexp.config.components import (
    AnalyzerConfig,
    CollectorConfig,
    ModelConfig,
    PositionsConfig,
    SAEConfig,
    StoreConfig,
    SweepConfig,
    TrackerConfig,
)
from saexp.config.environment import (
    at_least,
    parse_coefficients,
    parse_layers,
    parse_width,
    parse_widths,
)
from saexp.config.groups import COLUMNS, DatasetConfig, InterventionConfig
from saexp.config.tasks import SAETrainerConfig, TaskConfig
from saexp.errors import ConfigError
from saexp.registry import did_you_mean

log = logging.getLogger(__name__)

_FROM_ENVIRONMENT = "from_environment"
WITHOUT_EFFECT = ("resume", "cache_dir", "tracker", "verify", "sweep", "objective")
"""Top-level keys that change no result."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    task: TaskConfig = MISSING
    """What is done."""
    model: ModelConfig = MISSING
    """Language model."""
    sae: SAEConfig = MISSING
    """Sparse autoencoder."""
    dataset: DatasetConfig = MISSING
    """Texts."""
    positions: PositionsConfig = MISSING
    """Tokens that are analysed."""
    collector: CollectorConfig = MISSING
    """Source of the activations."""
    analyzer: AnalyzerConfig = MISSING
    """Comparison of latents."""
    intervention: InterventionConfig = MISSING
    """Causal test."""
    sae_trainer: SAETrainerConfig = MISSING
    """Training of an SAE (task=train)."""
    tracker: TrackerConfig = MISSING
    """Logging."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Activation store."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Sweep that the run is a cell of."""
    layer: Any = None
    """0-based block index, or a list where a task takes several."""
    width: Any = None
    """SAE width, 16k or a plain integer; task=train takes a list, too."""
    coefficient: Any = None
    """Coefficient of the intervention, a number or a list."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cuda, mps, cpu, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto (a 16-bit checkpoint's own where the device computes it
    natively, else float32)."""
    cache_dir: str = "outputs/cache"
    """Activation stores and labels, shared between runs."""
    resume: bool | None = None
    """Reuse a finished run with the same config; true in sweeps where not given."""
    verify: bool = False
    """Verify the checksums of stored shards of any size before they are used."""
    objective: str | None = None
    """Metric that the job returns to a sweeper that searches: effect/refusal/unknown_group."""
    plugins: list[str] = field(default_factory=list)
    """Modules with custom components, imported before the config is composed."""

    def __getstate__(self) -> dict[str, Any]:
        # Another process, too, must store values from the environment as they were typed.
        return {**self.__dict__, _FROM_ENVIRONMENT: environment.known()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        environment.add(state.pop(_FROM_ENVIRONMENT))
        self.__dict__.update(state)

    def __post_init__(self) -> None:
        if isinstance(self.task, tasks.TrainConfig):
            parse_widths(self.width)
        else:
            parse_width(self.width)
        if self.layer is not None:
            parse_layers(self.layer)
        if self.coefficient is not None:
            parse_coefficients(self.coefficient)
        if isinstance(self.dataset, groups.CorpusConfig) and self.task.name == "label":
            raise ConfigError(
                "task=label asks about examples, and dataset=corpus has none; type dataset=jsonl "
                "(or csv) for an example per line, or task=dashboard or task=evaluate"
            )


_BASES: dict[str, type] = {
    f.name: f.type for f in fields(RunConfig) if isinstance(f.type, type) and is_dataclass(f.type)
}
"""Config group -> the dataclass that all its components share."""

_COMPONENTS: dict[str, dict[str, type]] = {
    "task": {
        "cache": tasks.CacheConfig,
        "collect": tasks.CollectConfig,
        "dashboard": tasks.DashboardConfig,
        "evaluate": tasks.EvaluateConfig,
        "label": tasks.LabelConfig,
        "report": tasks.ReportConfig,
        "train": tasks.TrainConfig,
        "workspace": tasks.WorkspaceConfig,
    },
    "collector": {"imported": components.ImportedConfig},
    "dataset": {"corpus": groups.CorpusConfig, "wikidata": groups.WikidataConfig},
    "analyzer": {
        "capability": components.CapabilityConfig,
        "probe": components.ProbeConfig,
        "stats": components.StatsConfig,
        "top_features": components.TopFeaturesConfig,
    },
}
"""Config group -> component -> its dataclass, where it has settings beyond those of its group."""

_CUSTOM: dict[str, type] = {
    "task": tasks.CustomTaskConfig,
    "dataset": groups.CustomDatasetConfig,
    "analyzer": components.CustomAnalyzerConfig,
}
"""Config group -> dataclass of a custom component that was registered without one."""

_FORMER_TASK_KEYS = ("action", "max_size", "max_age", "stores", "latents", "shard", "n_shards")
"""Settings of a single task that used to be top-level keys. Accepted for one release."""


def config_class(group: str, component: str) -> type:
    """The dataclass with the settings of a component, by the name that its group's config holds.

    Raises ConfigError where a plugin's config class does not extend that of the group.
    """
    base, registered = _BASES[group], registry.config_class(group, component)
    if registered is not None:
        if not (is_dataclass(registered) and issubclass(registered, base)):
            raise ConfigError(
                f"{group} '{component}': its config {registered.__name__} must be a dataclass that "
                f"extends saexp.config.{base.__name__}"
            )
        return registered
    if component in _COMPONENTS.get(group, {}):
        return _COMPONENTS[group][component]
    if group in _CUSTOM and not registry.is_builtin(group, component):
        return _CUSTOM[group]
    return base


def _component_classes(group: str) -> dict[str, type]:
    """Component -> dataclass, of those that have settings beyond the group's."""
    registered = [name for kind, name in registry.config_classes() if kind == group]
    return _COMPONENTS.get(group, {}) | {name: config_class(group, name) for name in registered}


def _component_name(cfg: Any, group: str) -> str:
    """Name of the component that a group's config stands for; empty where it is not set."""
    key = registry.name_field(group)
    return "" if key not in cfg or OmegaConf.is_missing(cfg, key) else str(cfg[key])


def known_keys() -> list[str]:
    """Every key that can be set: groups, top-level keys, and each group's settings."""
    keys: list[str] = []
    for field_ in fields(RunConfig):
        keys.append(field_.name)
        if field_.name in _BASES:
            classes = [_BASES[field_.name], *_component_classes(field_.name).values()]
            names = dict.fromkeys(f.name for cls in classes for f in fields(cls))
            keys += [f"{field_.name}.{name}" for name in names]
    return [*keys, *(f"dataset.columns.{name}" for name in COLUMNS)]


def near_keys(name: str, prefix: str = "") -> str:
    """The most similar keys: of the group `prefix`, or of the top level and of all groups."""
    every = [key for key in known_keys() if key.startswith(prefix)]
    top = [key for key in every if "." not in key.removeprefix(prefix)]
    hint = did_you_mean(f"{prefix}{name}", every)
    return hint if hint.startswith("did") else did_you_mean(f"{prefix}{name}", top)


def conf_folder() -> Path:
    """Absolute path of `conf/`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_schema(*, only_names: bool = False) -> None:
    """Make the dataclasses known to Hydra; for --help `only_names` of options suffice.

    `base_run` is what `conf/config.yaml` starts from; `<group>_<component>` is in the defaults list
    of an option with settings of its own, such as `/analyzer_probe@_here_`. A component that a
    plugin registered with a config class becomes an option of its group.
    """
    store = ConfigStore.instance()
    if only_names:
        # To list the options, Hydra copies all that is registered a hundred times.
        schemas = [f"{group}_{name}" for group, names in _COMPONENTS.items() for name in names]
        for name in ("base_run", *schemas):
            store.store(name=name, node={})
    elif (base := store.repo.get("base_run.yaml")) is None or not base.node:
        _register_builtin(store)
    for group, name in registry.config_classes():
        if group in _BASES:
            node = _own_settings(config_class(group, name), _BASES[group])
            node[registry.name_field(group)] = name
            store.store(group=group, name=name, node={} if only_names else node)


def _register_builtin(store: ConfigStore) -> None:
    root = OmegaConf.structured(RunConfig)
    for group, base in _BASES.items():
        root[group] = OmegaConf.structured(base)
        OmegaConf.set_struct(root[group], False)
    OmegaConf.set_struct(root, False)
    store.store(name="base_run", node=root)
    for group, classes in _COMPONENTS.items():
        for name, cls in classes.items():
            store.store(name=f"{group}_{name}", node=_own_settings(cls, _BASES[group]))


def _own_settings(cls: type, base: type) -> DictConfig:
    """A config of this class in which the settings that it inherits are missing.

    Hydra merges it over the group's config, whose values (interpolations of top-level keys among
    them) must stay.
    """
    node = OmegaConf.structured(cls)
    for inherited in fields(base):
        if inherited.name not in cls.__annotations__:
            # OmegaConf expands an interpolation of a list where a missing value is merged over it.
            listed = inherited.name == "coefficient"
            node[inherited.name] = "${coefficient}" if listed else MISSING
    return node


_GROUPS = ("experiment", *_BASES)
_ADDED_GROUP = re.compile(rf"\+{{1,2}}(?=(?:{'|'.join(_GROUPS)})=)")
_LEFT_OUT_GROUP = re.compile(rf"~({'|'.join(_GROUPS)})(?:=[\w-]*)?")
_FORMER_KEY = re.compile(rf"(?:{'|'.join(_FORMER_TASK_KEYS)})=")
_TEMPLATE = re.compile(r"(\+{0,2}task\.(?:options\.)?templates\.[^=]+)=(.*)", re.DOTALL)


def for_hydra(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra reads them; flags and everything else stay as typed.

    `+experiment=name` becomes `experiment=name`, since the option of a group replaces its default,
    and `~group` becomes `group=none` where the group has that option.
    A former top-level key gets the `+` that Hydra wants for a key that is not in the schema.
    task=report and task=workspace take their settings without `task.`. A template that is plain
    text is quoted, because Hydra would parse its braces:

    >>> for_hydra(["task.templates.book.creator=Who wrote {entity}?"])
    ['task.templates.book.creator="Who wrote {entity}?"']
    """
    if any(re.fullmatch(r"\+{0,2}task=(report|workspace)", word) for word in words):
        words = [
            re.sub(r"^(\+{0,2})(?=(path|cells|dry_run|title|report)=)", r"\1task.", word)
            for word in words
        ]
        words = [_with_quoted_path(word) for word in words]
    return [_for_hydra(word) for word in words]


def _with_quoted_path(word: str) -> str:
    """`task.path=` in the quotes that Hydra wants around a cell's folder, whose name has overrides.

    Of a sweep over folders each is quoted: `task.path=a,b`.
    """
    match = re.fullmatch(r"(\+{0,2}task\.path)=([^'\"].*)", word, re.DOTALL)
    if not match:
        return word
    paths, rest = list[str](), match[2]
    while rest:
        # The longest that exists: a cell's name has commas too.
        ends = [*(m.start() for m in re.finditer(",", rest)), len(rest)]
        end = next((end for end in reversed(ends) if Path(rest[:end]).exists()), None)
        if end is None:
            paths = [match[2]] if "=" in match[2] else []
            break
        paths, rest = [*paths, rest[:end]], rest[end + 1 :]
    quoted = ",".join('"' + path.replace('"', r"\"") + '"' for path in paths)
    return f"{match[1]}={quoted}" if paths else word


def _for_hydra(word: str) -> str:
    if _FORMER_KEY.match(word):
        return f"+{word}"
    if match := _TEMPLATE.fullmatch(word):
        key, value = match.groups()
        starts_plain = value.lstrip()[:1] not in ("'", '"', "[", "{")
        if "{" in value and (starts_plain or value.lstrip().startswith("{entity}")):
            value = '"' + value.replace('"', r"\"") + '"'
        return f"{key}={value}"
    if left_out := _LEFT_OUT_GROUP.fullmatch(word):
        if "none" not in group_options(left_out[1]):
            raise _without_option(word, left_out[1])
        return f"{left_out[1]}=none"
    word = _ADDED_GROUP.sub("", word)
    group, _, value = word.partition("=")
    listed = re.fullmatch(r"\[(.*)\]", value.strip())
    if group in _BASES and listed and group not in ("store", "sweep"):
        options = [option.strip() for option in listed[1].split(",") if option.strip()]
        if not options:
            raise _without_option(word, group)
        if len(options) > 1 and group != "tracker":
            raise ConfigError(
                f"{word}: a run has one {group}; type -m {group}={','.join(options)} for a run of "
                "each"
            )
    return word


def group_options(group: str) -> list[str]:
    """Names of a config group's options."""
    plugins = [name for kind, name in registry.config_classes() if kind == group]
    return sorted({*(f.stem for f in (conf_folder() / group).glob("*.yaml")), *plugins})


def _without_option(word: str, group: str) -> ConfigError:
    options = group_options(group)
    if group == "experiment":
        return ConfigError(f"{word}: leave it out; a run without an experiment is the default")
    if "none" in options:
        return ConfigError(f"{word} names no {group}; type {group}=none")
    listed = ", ".join(options)
    return ConfigError(f"{word}: a run needs the group {group}; type {group}=<one of {listed}>")


def plugins_in(words: Sequence[str]) -> list[str]:
    """Modules that the words of a command line list under `plugins`; none where they are swept."""
    modules: list[str] = []
    for word in words:
        if not re.match(r"\+{0,2}plugins=", word):
            continue
        try:
            override = OverridesParser.create().parse_override(word)
            value = None if override.is_sweep_override() else override.value()
        except HydraException:
            # Hydra reports the word when it composes the config.
            continue
        modules += map(str, value) if isinstance(value, list) else []
    return modules


_SIZED_KEY = re.compile(rf"\+{{0,2}}intervention\.({'|'.join(groups.SMALL)})=")


def to_run_config(cfg: DictConfig, *, quiet: bool = False, words: Sequence[str] = ()) -> RunConfig:
    """Resolve a composed config and turn it into dataclasses.

    `words` are those of the command line: a number of the causal test that is among them is kept by
    `intervention.size`, also where it is the default.
    Imports its plugins. Logs a warning for each former spelling of a setting, unless `quiet`.
    Raises ConfigError for a key that the components named in the config do not have.
    """
    registry.load_plugins(cfg.get("plugins") or ())
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    names = {group: _component_name(cfg[group], group) for group in _BASES}
    former = content["tracker"].get("name")
    content["tracker"] = _with_kind(content["tracker"])
    if content["tracker"].get("name") != former:
        names["tracker"] = former
        log.warning("tracker.name=%s is now tracker.kind=%s; name is the run's", former, former)
    classes = {group: config_class(group, name) for group, name in names.items()}
    renamed = [f"{f}= is now {current}=" for f, current in _rename_former_keys(content, classes)]
    if renamed and not quiet:
        log.warning("%s; the next release will not accept the former spelling", ", ".join(renamed))
    top_level = [f.name for f in fields(RunConfig)]
    for key in content:
        if key not in top_level:
            raise ConfigError(f"no key '{key}'; {near_keys(key)}")
    _check_complete(content, top_level)
    # The nodes that are set are new; a copy of each would take a third of the time.
    typed = OmegaConf.structured(RunConfig, flags={"no_deepcopy_set_nodes": True})
    for group, cls in classes.items():
        _check_keys(group, names[group], cls, content[group])
        typed[group] = components.with_defaults(cls)
        # Through the whole config, so that an error has the key with its group.
        for key, value in components.other_than_default(cls, content.pop(group)).items():
            typed[group][key] = value
    for key, value in content.items():
        typed[key] = value
    sized = [match[1] for word in words if (match := _SIZED_KEY.match(word))]
    if sized:
        typed.intervention.keep = list(dict.fromkeys([*typed.intervention.keep, *sized]))
    environment.remember(typed)
    # Before the groups, which take their seeds from it.
    at_least("seed", typed.seed, 0)
    run_config = OmegaConf.to_object(typed)
    assert isinstance(run_config, RunConfig)
    return run_config


def to_tracker_config(settings: Mapping[str, Any]) -> TrackerConfig:
    """The settings of a composed config's tracker as a dataclass."""
    return TrackerConfig(**_with_kind(settings))


def _with_kind(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tracker's settings in which a `name` that is a tracker's, as it used to be, is the kind."""
    if settings.get("name") in registry.names("tracker"):
        return {**settings, "kind": settings["name"], "name": None}
    return dict(settings)


def _rename_former_keys(
    content: dict[str, Any], classes: Mapping[str, type]
) -> Iterator[tuple[str, str]]:
    """Move settings in their former places to the current ones; yields (former, current) keys."""
    for key in _FORMER_TASK_KEYS:
        if key in content:
            content["task"][key] = content.pop(key)
            yield key, f"task.{key}"
    for group in _CUSTOM:
        settings = content[group]
        if "options" in {f.name for f in fields(classes[group])} or not isinstance(
            settings.get("options"), dict
        ):
            continue
        former = settings.pop("options")
        settings.update(_merged(settings, former))
        yield from ((f"{group}.options.{key}", f"{group}.{key}") for key in former)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings; values of the second replace those of the first."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(first.get(key), dict)
        merged[key] = _merged(first[key], value) if both else value
    return merged


def _check_keys(group: str, component: str, cls: type, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that the component does not have, or that was removed."""
    names = [f.name for f in fields(cls)]
    for key in settings:
        if key in names:
            continue
        if group in registry.kinds() and component not in ("", "none"):
            registry.require(group, component)
        owners = [
            name
            for name, other in _component_classes(group).items()
            if key in {f.name for f in fields(other)}
        ]
        if owners:
            raise ConfigError(
                f"{group}.{key} is a setting of {group}={' and '.join(owners)}, and this run has "
                f"{group}={component}"
            )
        own = [f"{group}.{name}" for name in names]
        hint = did_you_mean(f"{group}.{key}", own)
        raise ConfigError(f"no key '{group}.{key}'; {hint}")
    _check_complete(settings, [f.name for f in fields(_BASES[group])], f"{group}.")


def _check_complete(settings: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> None:
    """Raise ConfigError where a setting was removed by `~key`."""
    for name in names:
        if name not in settings:
            raise ConfigError(f"{prefix}{name} cannot be removed; type {prefix}{name}=null")
