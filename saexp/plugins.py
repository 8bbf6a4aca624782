"""Modules of the user's own: importing them, which files they are, and what went wrong in them."""

import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from saexp.digests import in_library
from saexp.errors import ConfigError, SaexpError
from saexp.registry import registered

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that asks for tracebacks, as everywhere in Hydra."""
_SAEXP = Path(__file__).parent
_files: dict[str, list[Path]] = {}
"""Plugin -> its files, and those of the user's own modules that were imported with it."""


class PluginError(SaexpError):
    """An error in a module of the user's own; names its file and line."""


def load_plugins(modules: Iterable[str]) -> None:
    """Import plugin modules and `saexp.plugins` entry points, so that they register.

    Raises ConfigError for a module that cannot be found, PluginError for one that fails.
    """
    for entry in importlib.metadata.entry_points(group="saexp.plugins"):
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
    """Modules of the `saexp.plugins` entry points."""
    return sorted({e.module for e in importlib.metadata.entry_points(group="saexp.plugins")})


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
