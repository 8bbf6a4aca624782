"""Components by kind and name: the built-in ones, those of plugins, and how plugins are imported.

A built-in component is listed as "module:attribute", and its module is imported when the component
is built, so that `--help` does not import torch.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from saexp.digests import in_library
from saexp.errors import ConfigError, SaexpError

_F = TypeVar("_F", bound=Callable[..., Any])

_KEY_FIELD = {"model": "loader", "sae": "loader", "tracker": "kind"}
"""Kinds whose `name` says something else: which weights are used, or what a tracked run is called.
"""

_BUILTIN: dict[str, dict[str, str]] = {
    "task": {
        "analyze": "saexp.tasks.analyze:analyze",
        "collect": "saexp.tasks.collect:collect",
        "train": "saexp.tasks.train:train",
        "cache": "saexp.tasks.collect:manage",
        "evaluate": "saexp.tasks.evaluate:evaluate",
        "dashboard": "saexp.tasks.dashboard:dashboard",
        "label": "saexp.tasks.label:label",
        "report": "saexp.tasks.saved_runs:report",
        "workspace": "saexp.tasks.saved_runs:workspace",
    },
    "model": {
        "hf": "saexp.models.loading:load_model",
    },
    "sae": {
        "release": "saexp.saes.loading:load_release",
        "path": "saexp.saes.loading:load_path",
        "random": "saexp.saes.loading:random_sae",
    },
    "dataset": {
        "entities": "saexp.data.datasets:entities",
        "jsonl": "saexp.data.datasets:jsonl",
        "csv": "saexp.data.datasets:csv",
        "text": "saexp.data.datasets:text",
        "ioi": "saexp.data.datasets:ioi",
        "memorization": "saexp.data.datasets:memorization",
        "hf": "saexp.data.datasets:hf",
        "prompt": "saexp.data.datasets:prompt",
        "corpus": "saexp.data.documents:corpus",
        "wikidata": "saexp.labeling.wikidata:wikidata",
    },
    "positions": {
        "entity_last": "saexp.data.positions:EntityLast",
        "entity_all": "saexp.data.positions:EntityAll",
        "entity_last_n": "saexp.data.positions:EntityLastN",
        "after_entity": "saexp.data.positions:AfterEntity",
        "last": "saexp.data.positions:Last",
        "all": "saexp.data.positions:All",
        "random": "saexp.data.positions:Random",
        "middle": "saexp.data.positions:Middle",
        "indices": "saexp.data.positions:Indices",
        "substring": "saexp.data.positions:Substring",
        "continuation": "saexp.data.positions:Continuation",
    },
    "collector": {
        "hf": "saexp.activations.collector:HuggingFaceCollector",
        "imported": "saexp.activations.imported:ImportedCollector",
        "transformer_lens": "saexp.activations.collector:TransformerLensCollector",
        "nnsight": "saexp.activations.collector:NnsightCollector",
    },
    "analyzer": {
        "contrast": "saexp.analysis.contrast:ContrastAnalyzer",
        "stats": "saexp.analysis.group_statistics:StatsAnalyzer",
        "top_features": "saexp.analysis.top_latents:TopFeaturesAnalyzer",
        "probe": "saexp.analysis.probe:ProbeAnalyzer",
        "capability": "saexp.analysis.capability:CapabilityAnalyzer",
    },
    "intervention": {
        "steer": "saexp.interventions:Steer",
        "clamp": "saexp.interventions:Clamp",
        "scale": "saexp.interventions:Scale",
        "ablate": "saexp.interventions:Ablate",
        "project_out": "saexp.interventions:ProjectOut",
        "orthogonalize": "saexp.interventions:Orthogonalize",
        "splice": "saexp.interventions:SpliceReconstruction",
        "patch": "saexp.interventions:PatchActivations",
    },
    "outcome": {
        "refusal": "saexp.interventions.outcomes:Refusal",
        "hedging": "saexp.interventions.outcomes:Hedging",
        "dont_know": "saexp.interventions.outcomes:DontKnow",
        "accuracy": "saexp.interventions.outcomes:Accuracy",
        "exact_match": "saexp.interventions.outcomes:ExactMatch",
        "matching_tokens": "saexp.interventions.outcomes:MatchingTokens",
        "yes_no": "saexp.interventions.outcomes:YesNo",
        "answer_probability": "saexp.interventions.outcomes:AnswerProbability",
        "answer_rank": "saexp.interventions.outcomes:AnswerRank",
        "answer_logit": "saexp.interventions.outcomes:AnswerLogit",
        "logit_difference": "saexp.interventions.outcomes:LogitDifference",
        "neutral_kl": "saexp.interventions.outcomes:NeutralKL",
        "perplexity": "saexp.interventions.outcomes:Perplexity",
        "repetition": "saexp.interventions.outcomes:Repetition",
        "length": "saexp.interventions.outcomes:Length",
        "attention": "saexp.interventions.outcomes:Attention",
    },
    "tracker": {
        "wandb": "saexp.tracking.wandb:WandbTracker",
        "jsonl": "saexp.tracking:JsonlTracker",
        "tensorboard": "saexp.tracking:TensorboardTracker",
        "mlflow": "saexp.tracking:MlflowTracker",
        "none": "saexp.tracking:NullTracker",
    },
}


@dataclass(frozen=True)
class Component:
    """What was registered under a kind and a name."""

    target: Callable[..., Any]
    config: type | None = None
    """Dataclass of its settings; None where it was registered without one."""
    report_section: Callable[[Any], Any] | None = None
    """What an analyzer adds to report.html, see `register`."""


@dataclass
class Plugins:
    """Custom components, and the files of the modules that they come from."""

    components: dict[tuple[str, str], Component] = field(default_factory=dict)
    """(kind, name) -> component."""
    files: dict[str, list[Path]] = field(default_factory=dict)
    """Plugin -> its files, and those of the user's other modules that were imported with it."""


PLUGINS = Plugins()
"""The one mutable global of saexp: a decorator in an imported module has nothing else to add to,
and Python imports a module once per process."""


def register(
    kind: str,
    name: str,
    *,
    config: type | None = None,
    report_section: Callable[[Any], Any] | None = None,
) -> Callable[[_F], _F]:
    """Class or function decorator that makes `name` buildable under `kind`.

    `config` is a dataclass that extends the one of the kind, such as
    `saexp.config.AnalyzerConfig`, with the component's settings as fields; they are validated
    like those of built-in components, and `kind=name` selects the component without a YAML file:

        @dataclass(kw_only=True)
        class LoudestConfig(AnalyzerConfig):
            n: int = 1

        @saexp.register("analyzer", "loudest", config=LoudestConfig)
        class Loudest: ...

    `report_section` is for analyzers: a function of the files that the run saved
    (`saexp.reports.saved_run.SavedRun`: `.folder`, `.metrics`, `.tables()`, `.config`) that returns
    HTML, or a list of `saexp.reports.Section`; report.html shows it below the
    analyzer's tables.

    Raises ConfigError when the kind does not exist or the name belongs to another object.
    """
    _require_kind(kind)

    def add(target: _F) -> _F:
        other = PLUGINS.components.get((kind, name))
        same = other is not None and _path_of(other.target) == _path_of(target)
        if is_builtin(kind, name) or (other is not None and not same):
            raise ConfigError(f"{kind} '{name}' is registered already; choose another name")
        PLUGINS.components[kind, name] = Component(target, config, report_section)
        return target

    return add


def _path_of(target: Callable[..., Any]) -> tuple[str, str]:
    return target.__module__, target.__qualname__


def _require_kind(kind: str) -> None:
    if kind not in _BUILTIN:
        raise ConfigError(f"no component kind '{kind}'; the kinds are {', '.join(_BUILTIN)}")


def kinds() -> list[str]:
    """Kinds of components."""
    return list(_BUILTIN)


def name_field(kind: str) -> str:
    """Field of a kind's config that holds the component's name."""
    return _KEY_FIELD.get(kind, "name")


def is_builtin(kind: str, name: str) -> bool:
    """Whether saexp has a component of that name itself."""
    return name in _BUILTIN.get(kind, {})


def names(kind: str) -> list[str]:
    """Names buildable under `kind`, sorted."""
    return sorted({*_BUILTIN[kind], *(n for k, n in PLUGINS.components if k == kind)})


def registered() -> list[Callable[..., Any]]:
    """Every class and function that was registered by a plugin."""
    return [component.target for component in PLUGINS.components.values()]


def config_class(kind: str, name: str) -> type | None:
    """The config class that a custom component was registered with."""
    component = PLUGINS.components.get((kind, name))
    return None if component is None else component.config


def config_classes() -> list[tuple[str, str]]:
    """(kind, name) of every custom component that was registered with a config class."""
    return [key for key, component in PLUGINS.components.items() if component.config]


def report_section(kind: str, name: str) -> Callable[[Any], Any] | None:
    """The function that a custom component adds to report.html with."""
    component = PLUGINS.components.get((kind, name))
    return None if component is None else component.report_section


def require(kind: str, name: str) -> None:
    """Raise ConfigError with the most similar names if (kind, name) is unknown; imports nothing."""
    _require_kind(kind)
    if (kind, name) not in PLUGINS.components and not is_builtin(kind, name):
        raise ConfigError(f"no {kind} is called '{name}'; {did_you_mean(name, names(kind))}")


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The class or function behind (kind, name). Raises ConfigError with the nearest names."""
    require(kind, name)
    if (kind, name) in PLUGINS.components:
        return PLUGINS.components[kind, name].target
    module, _, attribute = _BUILTIN[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """Build the component that a typed config specifies; `runtime` holds what no config can."""
    name = getattr(cfg, name_field(kind), None)
    if name is None:
        raise ConfigError(
            f"the {kind} config has no '{name_field(kind)}', so nothing can be built from it"
        )
    target = resolve(kind, str(name))
    if (kind, str(name)) in PLUGINS.components:
        _check_call(kind, str(name), target, cfg, runtime)
    return target(cfg, **runtime)


def _check_call(
    kind: str, name: str, target: Callable[..., Any], cfg: Any, runtime: dict[str, Any]
) -> None:
    """Raise ConfigError for a custom component that does not take these arguments."""
    try:
        inspect.signature(target).bind(cfg, **runtime)
    except TypeError as error:
        arguments = ", ".join(["its config", *(f"{key}=" for key in runtime)])
        where = inspect.getsourcefile(target) or target.__module__
        raise ConfigError(
            f"{where}: {kind} '{name}' cannot be built: {error}; it is called with {arguments}"
        ) from error
    except ValueError:
        # Written in C, without a signature.
        return


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """'did you mean a, b?' for near misses, else 'choose from …'."""
    options = list(known)
    near = difflib.get_close_matches(str(word), options, n=n, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(options)}"


FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that asks for tracebacks, as everywhere in Hydra."""
_SAEXP = Path(__file__).parent
_ENTRY_POINTS = ("saexp.plugins", "saexp.registry")
"""Groups of entry points through which installed packages announce plugins; the second is the
former name, accepted for one release."""


class PluginError(SaexpError):
    """An error in a plugin; its message starts with the plugin's file and line."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import plugin modules and the entry points of installed packages, so that they register.

    Raises ConfigError for a module that cannot be found, PluginError for one that fails.
    """
    for entry in _entry_points():
        _load(entry.module, entry.load)
    for module in modules:
        # `python -m saexp` has the working folder on its path; the console script does not.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        _load(module, lambda name=module: importlib.import_module(name))


@cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    # Read once, because the metadata of every installed package is searched; a package that is
    # installed meanwhile is seen by new processes.
    return tuple(e for group in _ENTRY_POINTS for e in importlib.metadata.entry_points(group=group))


def entry_point_modules() -> list[str]:
    """Modules of the entry points of installed packages."""
    return sorted({entry.module for entry in _entry_points()})


def _load(module: str, load: Callable[[], Any]) -> None:
    before = set(sys.modules)
    try:
        load()
    except SaexpError:
        raise
    except Exception as error:
        _forget(before)
        if isinstance(error, ModuleNotFoundError) and _is_itself(module, error):
            raise _not_found(module) from error
        raise explained(error, importing=True) or _failed(module, error) from error
    if module not in PLUGINS.files:
        files = (getattr(sys.modules[m], "__file__", None) for m in {*sys.modules} - before)
        imported = {Path(f).resolve() for f in files if f and f.endswith(".py")}
        imported = {file for file in imported if _is_user_file(file)}
        PLUGINS.files[module] = sorted(imported | set(_source(module)))


def _forget(before: set[str]) -> None:
    """Remove the user's modules of a failed import, so that the next import reads them again."""
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and _is_user_file(Path(file)):
            del sys.modules[name]


def _is_itself(module: str, error: ModuleNotFoundError) -> bool:
    """Whether the missing module is the plugin itself, or a package that contains it."""
    parts = module.split(".")
    return error.name in {".".join(parts[: n + 1]) for n in range(len(parts))}


def _not_found(module: str) -> ConfigError:
    if module.endswith(".py") or "/" in module:
        name = Path(module).stem
        return ConfigError(
            f"plugins: '{module}' is a file name, not a module name; type 'plugins=[{name}]' with "
            "the file's folder on PYTHONPATH"
        )
    return ConfigError(
        f"plugins: no module '{module}' can be imported; is its folder on PYTHONPATH?"
    )


def _failed(module: str, error: Exception) -> PluginError:
    return PluginError(f"plugins: {module}: {_description(error)}{_HINT}")


def _is_user_file(file: Path) -> bool:
    """Whether a file belongs neither to an installed package nor to saexp."""
    return not in_library(file) and _SAEXP not in file.resolve().parents


def _source(module: str) -> list[Path]:
    """A plugin's file, or all files of its package; none where it has no file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return []
    path = Path(file).resolve()
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]


def plugin_files(module: str) -> list[Path]:
    """Files of a plugin, and of the user's other modules that it imported."""
    return PLUGINS.files.get(module) or _source(module)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get(FULL_ERROR, "0") not in ("", "0")


_HINT = f" ({FULL_ERROR}=1 in front of the command shows the traceback)"


def explained(error: BaseException, *, importing: bool = False) -> PluginError | None:
    """An error from a plugin's code as one line with file and line number; None for other errors.

    The line is the innermost one in the user's code: the functions that it called may be a
    library's or saexp's. While a plugin is being imported, all code outside libraries is the
    user's.
    """
    user_files, frames = _user_files(), traceback.extract_tb(error.__traceback__)
    if importing:
        files = {f.filename for f in frames if Path(f.filename).is_file()}
        user_files |= {str(Path(f).resolve()) for f in files if _is_user_file(Path(f))}
    user_frames = (f for f in reversed(frames) if _in(f.filename, user_files))
    location = next(((f.filename, f.lineno) for f in user_frames), None)
    if isinstance(error, SyntaxError) and error.filename:
        location = (error.filename, error.lineno)
    if location is None and isinstance(error, AttributeError) and error.obj is not None:
        location = _definition(type(error.obj), user_files)
    if location is None:
        return None
    file, line = location
    return PluginError(f"plugin {_relative(file)}:{line}: {_description(error)}{_HINT}")


def _user_files() -> set[str]:
    """Files of plugins, and of every component that was registered from outside saexp."""
    files = {str(file) for listed in PLUGINS.files.values() for file in listed}
    for target in registered():
        file = getattr(sys.modules.get(target.__module__), "__file__", None)
        if file and _SAEXP not in Path(file).resolve().parents:
            files.add(str(Path(file).resolve()))
    return files


def _in(file: str, files: set[str]) -> bool:
    return str(Path(file).resolve()) in files


def _definition(kind: type, user_files: set[str]) -> tuple[str, int] | None:
    """File and line at which a class is defined, if that is in the user's code."""
    try:
        file, line = inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
    except (TypeError, OSError):
        return None
    return (file, line) if file and _in(file, user_files) else None


def _relative(file: str) -> str:
    """Relative to the working folder if the file is in it."""
    path, folder = Path(file).resolve(), Path.cwd()
    return str(path.relative_to(folder)) if folder in path.parents else str(path)


def _description(error: BaseException) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
