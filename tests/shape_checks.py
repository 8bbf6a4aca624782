"""Checks of types and array shapes at run time, for modules that are imported after `install`.

jaxtyping has an import hook for this, which decorates nested functions again at every call of the
function around them, and compiles anew every library that a checked module is the first to import:
the unit tests took twice as long. Here functions and methods are decorated once, when their module
has been imported: those with shapes in their annotations by jaxtyping and beartype, all others by
beartype.
"""

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped


def has_shapes(annotation: Any) -> bool:
    """Whether a jaxtyping array is anywhere in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(has_shapes, typing.get_args(annotation)))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with checks, or as it is where its annotations cannot be resolved."""
    if hasattr(function, "__wrapped__") and inspect.isgeneratorfunction(inspect.unwrap(function)):
        # A context manager's annotation is that of its generator.
        return function
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return function
    if not hints:
        return function
    if any(map(has_shapes, hints.values())):
        return jaxtyped(function, typechecker=beartype)
    return beartype(function)


def check_members(owner: ModuleType | type, module: str) -> None:
    """Replace the functions of a module, or the methods of a class, that `module` defines."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, staticmethod | classmethod):
            # Those that a NamedTuple generates are of another module.
            if value.__func__.__module__ == module:
                setattr(owner, name, type(value)(checked(value.__func__)))
        elif isinstance(value, property) and value.fget is not None:
            setattr(owner, name, property(checked(value.fget), value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            value.func = checked(value.func)
        elif inspect.isfunction(value) and value.__module__ == module:
            generated = name.startswith("__") and dataclasses.is_dataclass(owner)
            if not generated or name == "__init__":
                setattr(owner, name, checked(value))
        elif inspect.isclass(value) and value.__module__ == module and owner is not value:
            check_members(value, module)


class ShapeChecks(MetaPathFinder):
    """Finds modules of some packages as Python does, and checks their members once imported."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run_code = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_code(module)
            check_members(module, module.__name__)

        spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def install(packages: Sequence[str]) -> None:
    """Check the modules of these packages that are imported from now on."""
    sys.meta_path.insert(0, ShapeChecks([f"{package}." for package in packages]))
