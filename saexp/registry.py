"""(kind, name) -> "module:attribute": what a config's name stands for, imported when it is built.

No module named here is imported before something of it is wanted, so that `--help` needs no torch.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from saexp.digests import in_library
from saexp.errors import ConfigError, SaexpError

_F = TypeVar("_F", bound=Callable[..., Any])

_KEY_FIELD = {"model": "loader", "sae": "loader"}
"""Kinds whose `name` says *which* weights; another field says *how* they are loaded."""

_BUILTIN: dict[str, dict[str, str]] = {
    "task": {
        "analyze": "saexp.tasks.analyze:analyze",
        "collect": "saexp.tasks.collect:collect",
        "train": "saexp.tasks.train:train",
        "cache": "saexp.tasks.cache:manage",
        "evaluate": "saexp.tasks.evaluate:evaluate",
        "dashboard": "saexp.tasks.dashboard:dashboard",
        "label": "saexp.tasks.label:label",
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
        "transformer_lens": "saexp.activations.backends:TransformerLensCollector",
        "nnsight": "saexp.activations.backends:NnsightCollector",
    },
    "analyzer": {
        "contrast": "saexp.analysis.contrast:ContrastAnalyzer",
        "stats": "saexp.analysis.group_statistics:StatsAnalyzer",
        "top_features": "saexp.analysis.group_statistics:TopFeaturesAnalyzer",
        "probe": "saexp.analysis.probe:ProbeAnalyzer",
        "capability": "saexp.analysis.capability:CapabilityAnalyzer",
    },
    "intervention": {
        "steer": "saexp.interventions.steering:Steer",
        "clamp": "saexp.interventions.steering:Clamp",
        "scale": "saexp.interventions.steering:Scale",
        "ablate": "saexp.interventions.steering:Ablate",
        "project_out": "saexp.interventions.steering:ProjectOut",
        "orthogonalize": "saexp.interventions.steering:Orthogonalize",
        "splice": "saexp.interventions.steering:SpliceIn",
        "patch": "saexp.interventions.steering:PatchFrom",
    },
    "outcome": {
        "refusal": "saexp.interventions.outcomes:Refusal",
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
        "none": "saexp.tracking:NullTracker",
    },
}

_registered: dict[tuple[str, str], Callable[..., Any]] = {}


def register(kind: str, name: str) -> Callable[[_F], _F]:
    """Class or function decorator that makes `name` buildable under `kind`.

    Raises ConfigError when the kind does not exist or the name is taken by another object.
    """
    if kind not in _BUILTIN:
        raise ConfigError(f"no component kind '{kind}'; the kinds are {', '.join(_BUILTIN)}")

    def add(target: _F) -> _F:
        known = _registered.get((kind, name))
        same = known is not None and (known.__module__, known.__qualname__) == (
            target.__module__,
            target.__qualname__,
        )
        if name in _BUILTIN[kind] or (known is not None and not same):
            raise ConfigError(f"{kind} '{name}' is registered already; choose another name")
        _registered[kind, name] = target
        return target

    return add


def names(kind: str) -> list[str]:
    """Names buildable under `kind`, sorted."""
    return sorted({*_BUILTIN[kind], *(n for k, n in _registered if k == kind)})


def registered() -> list[Callable[..., Any]]:
    """Every class and function that was registered from outside this table."""
    return list(_registered.values())


def require(kind: str, name: str) -> None:
    """Raise ConfigError naming the nearest names where (kind, name) is unknown; imports nothing."""
    if kind not in _BUILTIN:
        raise ConfigError(f"no component kind '{kind}'; the kinds are {', '.join(_BUILTIN)}")
    if (kind, name) not in _registered and name not in _BUILTIN[kind]:
        raise ConfigError(f"no {kind} is called '{name}'; {did_you_mean(name, names(kind))}")


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The class or function behind (kind, name). Raises ConfigError naming the nearest names."""
    require(kind, name)
    if (kind, name) in _registered:
        return _registered[kind, name]
    module, _, attribute = _BUILTIN[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(kind: str, cfg: Any, **runtime: Any) -> Any:
    """Build the object that a typed config stands for; `runtime` holds what no config can."""
    key_field = _KEY_FIELD.get(kind, "name")
    name = getattr(cfg, key_field, None)
    if name is None:
        raise ConfigError(
            f"the {kind} config has no '{key_field}', so nothing can be built from it"
        )
    target = resolve(kind, str(name))
    if (kind, str(name)) in _registered:
        _check_call(kind, str(name), target, cfg, runtime)
    return target(cfg, **runtime)


def _check_call(
    kind: str, name: str, target: Callable[..., Any], cfg: Any, runtime: dict[str, Any]
) -> None:
    """Raise ConfigError for a component of the user's own that cannot be called so."""
    try:
        inspect.signature(target).bind(cfg, **runtime)
    except TypeError as error:
        given = ", ".join(["its config", *(f"{key}=" for key in runtime)])
        where = inspect.getsourcefile(target) or target.__module__
        raise ConfigError(
            f"{where}: {kind} '{name}' cannot be built: {error}; it is called with {given}"
        ) from error
    except ValueError:
        # Written in C, so that its signature is not known.
        return


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """'did you mean a, b?' for near misses, else 'choose from …'."""
    options = list(known)
    near = difflib.get_close_matches(str(word), options, n=n, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(options)}"


FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that asks for tracebacks, as everywhere in Hydra."""
_SAEXP = Path(__file__).parent
_files: dict[str, list[Path]] = {}
"""Plugin -> its files, and those of the user's own modules that were imported with it."""


class PluginError(SaexpError):
    """An error in a module of the user's own; names its file and line."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import plugin modules and `saexp.registry` entry points, so that they register.

    Raises ConfigError for a module that cannot be found, PluginError for one that fails.
    """
    for entry in importlib.metadata.entry_points(group="saexp.registry"):
        _load(entry.module, entry.load)
    for module in modules:
        # As `python -m saexp` has it; the console script has its own folder in its place.
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        _load(module, lambda name=module: importlib.import_module(name))


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
    if module not in _files:
        files = (getattr(sys.modules[m], "__file__", None) for m in {*sys.modules} - before)
        mine = {Path(f).resolve() for f in files if f and f.endswith(".py") and _is_own(Path(f))}
        _files[module] = sorted(mine | set(_source(module)))


def _forget(before: set[str]) -> None:
    """Drop the user's modules of an import that failed, so that the next one reads them again."""
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and _is_own(Path(file)):
            del sys.modules[name]


def _is_itself(module: str, error: ModuleNotFoundError) -> bool:
    """Whether the plugin is what is missing, or a package that it would be in."""
    parts = module.split(".")
    return error.name in {".".join(parts[: n + 1]) for n in range(len(parts))}


def _not_found(module: str) -> ConfigError:
    if module.endswith(".py") or "/" in module:
        name = Path(module).stem
        return ConfigError(
            f"plugins: '{module}' is a file's name, and a module's is wanted; type "
            f"'plugins=[{name}]' with the file's folder on PYTHONPATH"
        )
    return ConfigError(
        f"plugins: no module '{module}' can be imported; is its folder on PYTHONPATH?"
    )


def _failed(module: str, error: Exception) -> PluginError:
    return PluginError(f"plugins: {module}: {_said(error)}{_HINT}")


def _is_own(file: Path) -> bool:
    return not in_library(file) and _SAEXP not in file.resolve().parents


def _source(module: str) -> list[Path]:
    """A plugin's file, or all of its package's; none where it is in no file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return []
    path = Path(file).resolve()
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]


def entry_point_modules() -> list[str]:
    """Modules of the `saexp.registry` entry points."""
    return sorted({e.module for e in importlib.metadata.entry_points(group="saexp.registry")})


def plugin_files(module: str) -> list[Path]:
    """Files of a plugin, with those of the user's own modules that it imported."""
    return _files.get(module) or _source(module)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get(FULL_ERROR, "0") not in ("", "0")


_HINT = f" ({FULL_ERROR}=1 in front of the command shows the traceback)"


def explained(error: BaseException, *, importing: bool = False) -> PluginError | None:
    """The same error in one line where it came from code of the user's own; None where it did not.

    Named is the innermost line of the user's: what it called may be a library's, or saexp's. While
    a plugin is being imported, all code that is in no library is the user's.
    """
    own, frames = _own_files(), traceback.extract_tb(error.__traceback__)
    if importing:
        files = {f.filename for f in frames if Path(f.filename).is_file()}
        own |= {str(Path(f).resolve()) for f in files if _is_own(Path(f))}
    at = next(((f.filename, f.lineno) for f in reversed(frames) if _in(f.filename, own)), None)
    if isinstance(error, SyntaxError) and error.filename:
        at = (error.filename, error.lineno)
    if at is None and isinstance(error, AttributeError) and error.obj is not None:
        at = _defined(type(error.obj), own)
    if at is None:
        return None
    file, line = at
    return PluginError(f"plugin {_shown(file)}:{line}: {_said(error)}{_HINT}")


def _own_files() -> set[str]:
    """Files of plugins, and of whatever is registered from outside saexp."""
    found = {str(f) for files in _files.values() for f in files}
    for target in registered():
        file = getattr(sys.modules.get(target.__module__), "__file__", None)
        if file and _SAEXP not in Path(file).resolve().parents:
            found.add(str(Path(file).resolve()))
    return found


def _in(file: str, own: set[str]) -> bool:
    return str(Path(file).resolve()) in own


def _defined(kind: type, own: set[str]) -> tuple[str, int] | None:
    """Where a class is defined, if that is in code of the user's own."""
    try:
        file, line = inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
    except (TypeError, OSError):
        return None
    return (file, line) if file and _in(file, own) else None


def _shown(file: str) -> str:
    """Relative to the working folder where the file is in it."""
    path = Path(file).resolve()
    here = Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(path)


def _said(error: BaseException) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
