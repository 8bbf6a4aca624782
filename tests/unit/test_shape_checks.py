"""Functions of a checked package refuse arrays of other shapes and values of other types."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from tests import shape_checks

CODE = """
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float


def add(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " d"]) -> Float[np.ndarray, "n d"]:
    return x + y


def transposed(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x.T


def doubled(x: int) -> int:
    return 2 * x


@contextmanager
def opened(x: int) -> Iterator[int]:
    yield x


@dataclass(frozen=True)
class Rows:
    values: Float[np.ndarray, "n d"]
    labels: Float[np.ndarray, " n"]

    def first(self, n: int) -> list[float]:
        return self.labels[:n].tolist()

    @classmethod
    def empty(cls, d: int) -> "Rows":
        return cls(np.zeros((0, d)), np.zeros(0))

    @property
    def n(self) -> str:
        return len(self.labels)

    @cached_property
    def total(self) -> str:
        return float(self.labels.sum())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The code above as a module of a checked package."""
    (tmp_path / "checked_package").mkdir()
    (tmp_path / "checked_package" / "arrays.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    shape_checks.install(["checked_package"])
    yield importlib.import_module("checked_package.arrays")
    for name in ("checked_package.arrays", "checked_package"):
        sys.modules.pop(name)


def test_right_shapes_and_types_are_accepted(module: ModuleType) -> None:
    assert module.add(np.ones((2, 3)), np.ones(3)).tolist() == [[2.0] * 3] * 2
    assert module.transposed(np.ones((2, 2))).shape == (2, 2)
    assert module.doubled(3) == 6
    with module.opened(3) as value:
        assert value == 3
    assert module.Rows(np.ones((2, 3)), np.ones(2)).first(1) == [1.0]
    assert module.Rows.empty(3).labels.shape == (0,)


def test_shapes_that_do_not_agree_are_refused(module: ModuleType) -> None:
    with pytest.raises(TypeCheckError):
        module.add(np.ones((2, 3)), np.ones(2))
    with pytest.raises(TypeCheckError):
        module.transposed(np.ones((2, 3)))
    with pytest.raises(TypeCheckError):
        module.Rows(np.ones((2, 3)), np.ones(3))


def test_values_of_other_types_are_refused(module: ModuleType) -> None:
    rows = module.Rows(np.ones((2, 3)), np.ones(2))
    for call in (
        lambda: module.doubled("3"),
        lambda: rows.first("1"),
        lambda: module.Rows.empty("3"),
        lambda: rows.n,
        lambda: rows.total,
    ):
        with pytest.raises(BeartypeCallHintViolation):
            call()
