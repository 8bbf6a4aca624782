"""The config of a whole run, its registration with Hydra, and the conversion to dataclasses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from saexp.config import environment
from saexp.config.components import (
    COLUMNS,
    AnalyzerConfig,
    CollectorConfig,
    DatasetConfig,
    ImportedConfig,
    ModelConfig,
    PositionsConfig,
    SAEConfig,
    SAETrainerConfig,
    StoreConfig,
    TaskConfig,
    TrackerConfig,
)
from saexp.config.environment import at_least, parse_coefficients, parse_layers, parse_width
from saexp.config.interventions import InterventionConfig
from saexp.errors import ConfigError
from saexp.registry import did_you_mean

_NOTED = "from_environment"


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
    """Tokens analysed."""
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
    layer: Any = None
    """0-based block index, or a list where a task takes several."""
    width: Any = None
    """SAE width, 16k or a plain integer."""
    coefficient: Any = None
    """Strength of the intervention, a number or a list."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """cuda, mps, cpu, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto."""
    cache_dir: str = "outputs/cache"
    """Activation stores and labels, shared between runs."""
    resume: bool | None = None
    """Reuse a finished run with the same config; true in sweeps where not given."""
    verify: bool = False
    """Hash stored shards of any size before they are used."""
    shard: int | None = None
    """collect: which of `n_shards` parts of the store this process makes."""
    n_shards: int = 1
    """collect: number of parts the work is cut into, one per process."""
    action: str = "list"
    """cache: list, verify, prune or compare."""
    max_size: str | None = None
    """cache: prune down to this size, 20GB."""
    max_age: str | None = None
    """cache: prune what was not used for this long, 30d."""
    stores: list[str] = field(default_factory=list)
    """cache: the two keys, or beginnings of them, to compare."""
    latents: Any = None
    """dashboard: latent indices, or top:20 (the run's own best)."""
    plugins: list[str] = field(default_factory=list)
    """Modules of your own to import first, whose components then can be named."""

    def __getstate__(self) -> dict[str, Any]:
        # In another process, too, values from the environment are stored as they were typed.
        return {**self.__dict__, _NOTED: environment.known()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        environment.add(state.pop(_NOTED))
        self.__dict__.update(state)

    def __post_init__(self) -> None:
        parse_width(self.width)
        if self.layer is not None:
            parse_layers(self.layer)
        if self.coefficient is not None:
            parse_coefficients(self.coefficient)
        at_least("n_shards", self.n_shards, 1)
        if self.shard is not None and not 0 <= self.shard < self.n_shards:
            raise ConfigError(
                f"shard={self.shard} is not below n_shards={self.n_shards}; "
                f"type shard=<0 to {self.n_shards - 1}> or a larger n_shards="
            )


def _refuse_unknown(cfg: DictConfig, schema: type, prefix: str) -> None:
    known = {f.name: f.type for f in fields(schema)}
    for name in map(str, cfg):
        if name not in known:
            near = near_keys(name, prefix)
            raise ConfigError(f"no key '{prefix}{name}', with or without +; {near}")
        # A component's own options are the fields of a subclass.
        kind = OmegaConf.get_type(cfg, name) or known[name]
        if isinstance(kind, type) and is_dataclass(kind) and not OmegaConf.is_missing(cfg, name):
            _refuse_unknown(cfg[name], kind, f"{prefix}{name}.")


def near_keys(name: str, prefix: str = "") -> str:
    """The keys most alike: of the group, and of the top level those of all groups too."""
    every = [key for key in known_keys() if key.startswith(prefix)]
    top = [key for key in every if "." not in key.removeprefix(prefix)]
    found = did_you_mean(f"{prefix}{name}", every)
    return found if found.startswith("did") else did_you_mean(f"{prefix}{name}", top)


_GROUPS = ("experiment", *(f.name for f in fields(RunConfig) if is_dataclass(f.type)))
_ADDED_GROUP = re.compile(rf"\+{{1,2}}(?=(?:{'|'.join(_GROUPS)})=)")


def without_plus(word: str) -> str:
    """`+experiment=name` as `experiment=name`: an option of a group that has one replaces it."""
    return _ADDED_GROUP.sub("", word) if _ADDED_GROUP.match(word) else word


def known_keys() -> list[str]:
    """Every key that can be set: groups, top-level keys, and each group's settings."""
    keys = []
    for field_ in fields(RunConfig):
        keys.append(field_.name)
        if is_dataclass(field_.type):
            kinds = [field_.type, *_COMPONENTS.get(field_.name, {}).values()]
            keys += [f"{field_.name}.{f.name}" for kind in kinds for f in fields(kind)]
    return [*dict.fromkeys(keys), *(f"dataset.columns.{name}" for name in COLUMNS)]


_COMPONENTS: dict[str, dict[str, type]] = {"collector": {"imported": ImportedConfig}}
"""Group -> option -> dataclass of an option with fields of its own."""


def register_schema() -> None:
    """Make the schema known to Hydra as `base_run`, which `conf/config.yaml` starts from.

    The dataclass of an option with fields of its own is `base_<option>` in its group.
    """
    ConfigStore.instance().store(name="base_run", node=RunConfig)
    for group, options in _COMPONENTS.items():
        for name, schema in options.items():
            ConfigStore.instance().store(group=group, name=f"base_{name}", node=schema)


def to_run_config(cfg: DictConfig) -> RunConfig:
    """Resolve and turn into dataclasses; below this nothing sees a raw config.

    Raises ConfigError for a key that no dataclass has: Hydra takes any that `+` is in front of.
    """
    _refuse_unknown(cfg, RunConfig, "")
    environment.remember(cfg)
    # Before the groups, which have it from here.
    at_least("seed", cfg.seed, 0)
    raw = OmegaConf.to_object(cfg)
    assert isinstance(raw, RunConfig)
    return raw


def conf_folder() -> Path:
    """Absolute path of `conf/`."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


_FREE = re.compile(r"\+{0,2}(task\.options\.(rules|templates)\.[^=]+)=(.*)", re.DOTALL)


def with_free_keys(overrides: Sequence[str]) -> list[str]:
    """The overrides, so that Hydra takes new keys of free-form options without a `+`.

    A template that is a plain text is quoted for Hydra, which would refuse its braces:

    >>> with_free_keys(["task.options.templates.book.creator=Who wrote {entity}?"])
    ['++task.options.templates.book.creator="Who wrote {entity}?"']
    """
    return [_with_free_key(override) for override in overrides]


def _with_free_key(override: str) -> str:
    match = _FREE.fullmatch(override)
    if not match:
        return override
    key, group, value = match.groups()
    plain = value.lstrip().startswith("{entity}") or value.lstrip()[:1] not in ("'", '"', "[", "{")
    if group == "templates" and "{" in value and plain:
        value = '"' + value.replace('"', r"\"") + '"'
    return f"++{key}={value}"
