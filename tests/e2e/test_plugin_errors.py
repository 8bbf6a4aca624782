"""What goes wrong in code of the user's own is one line that names its file and line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saexp
from saexp import registry
from saexp.registry import PluginError
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import command

SMALL = ["tracker=none", "intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0"]
SMALL += ["analyzer.n_background=200", FEW_NEUTRAL, "cache_dir=cache"]
HINT = " (HYDRA_FULL_ERROR=1 in front of the command shows the traceback)"
MODULE = """
import saexp
import numpy as np

@saexp.register("analyzer", "boom")
class Boom:
    def __init__(self, cfg):
        pass

    def analyze(self, inputs):
        return deeper(inputs)

def deeper(inputs):
    np.linalg.inv(np.zeros((2, 3)))

@saexp.register("analyzer", "empty")
class Empty:
    def __init__(self, cfg):
        pass

@saexp.register("analyzer", "no_config")
class NoConfig:
    pass

@saexp.register("dataset", "unreadable")
def unreadable(cfg):
    raise RuntimeError("cannot read\\nmy data")

@saexp.register("dataset", "listed")
def listed(cfg):
    return []

@saexp.register("task", "nothing")
def nothing(cfg, context):
    return None

@saexp.register("positions", "end")
class End:
    def __init__(self, cfg):
        pass

    def select(self, at):
        return [len(at.tokens) - 1]

@saexp.register("tracker", "half")
class Half:
    def __init__(self, cfg):
        pass
"""


def line_of(text: str) -> int:
    return MODULE.splitlines().index(text) + 1


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of one test are no other's."""
    monkeypatch.setattr(registry, "PLUGINS", registry.Plugins())
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in [n for n in sys.modules if n not in before and n.startswith("plug")]:
        del sys.modules[name]


RUNNING = [
    ("analyzer.name=boom", "plug.py:{}: LinAlgError: ", "    np.linalg.inv(np.zeros((2, 3)))"),
    (
        "analyzer.name=empty",
        "plug.py:{}: AttributeError: 'Empty' object has no attribute 'analyze'",
        '@saexp.register("analyzer", "empty")',
    ),
    (
        "dataset.name=unreadable",
        "plug.py:{}: RuntimeError: cannot read my data",
        '    raise RuntimeError("cannot read\\nmy data")',
    ),
    (
        "tracker.kind=half",
        "plug.py:{}: AttributeError: 'Half' object has no attribute 'start'",
        '@saexp.register("tracker", "half")',
    ),
]


@pytest.mark.parametrize(("word", "message", "at"), RUNNING, ids=[r[0] for r in RUNNING])
def test_an_error_in_a_component_names_its_line(
    tmp_path: Path, word: str, message: str, at: str
) -> None:
    (tmp_path / "plug.py").write_text(MODULE.replace("\\\\n", "\\n"))
    ran = command(tmp_path, *SMALL, "plugins=[plug]", word)
    assert ran.code == 1
    (line,) = [x for x in ran.err.splitlines() if not x.startswith("[")]
    text = at.replace("\n", "\\n")
    assert line.startswith(f"saexp: plugin {message.format(line_of(text))}")
    assert line.endswith(HINT)


WRONG = [
    ("analyzer.name=no_config", "analyzer 'no_config' cannot be built: too many positional arg"),
    ("dataset.name=listed", "dataset=listed gave list; it must give an ExampleSet"),
    ("task.name=nothing", "task 'nothing' gave NoneType; it must give a Result"),
]


@pytest.mark.parametrize(("word", "message"), WRONG)
def test_a_component_of_another_form_is_one_line(tmp_path: Path, word: str, message: str) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    ran = command(tmp_path, *SMALL, "plugins=[plug]", word)
    (line,) = [x for x in ran.err.splitlines() if not x.startswith("[")]
    assert message in line


IMPORTING = [
    ("def f(:", "plug_bad.py:1: SyntaxError: invalid syntax"),
    ("x = 1\nimport not_there", "plug_bad.py:2: ModuleNotFoundError: No module named 'not_there'"),
    ("\n1 / 0", "plug_bad.py:2: ZeroDivisionError: division by zero"),
    ("from plug_helper import y", "plug_helper.py:2: NameError: name 'z' is not defined"),
]


@pytest.mark.parametrize(("source", "message"), IMPORTING)
def test_an_error_while_a_plugin_is_imported_names_its_line(
    tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "plug_bad.py").write_text(source + "\n")
    (tmp_path / "plug_helper.py").write_text("x = 1\ny = z\n")
    ran = command(tmp_path, *SMALL, "plugins=[plug_bad]")
    assert ran.code == 1
    assert ran.err.splitlines() == [f"saexp: plugin {message}{HINT}"]


@pytest.mark.parametrize("name", ["plug.py", "folder/plug.py"])
def test_a_file_name_is_distinguished_from_a_module_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    error = command(tmp_path, *SMALL, f"plugins=[{name}]").err
    assert error.startswith(f"saexp: plugins: '{name}' is a file name, not a module name; ")
    assert "'plugins=[plug]'" in error


def test_the_traceback_is_shown_to_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    words = [*SMALL, "plugins=[plug]", "analyzer.name=boom"]
    assert "Traceback" not in command(tmp_path, *words).err
    # What the command sets for Hydra does not outlive it.
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    error = command(tmp_path, *words).err
    assert "Traceback" in error
    assert "LinAlgError" in error.splitlines()[-1]


def test_a_cell_whose_plugin_fails_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    words = ["plugins=[plug]", "analyzer.name=boom,stats", "hydra.sweep.dir=sweep"]
    result = command(tmp_path, "-m", *SMALL, *words)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "sweep: 2 cells: 1 failed, 1 finished" in result.out.splitlines()
    (error_file,) = result.sweep.glob("*/error.txt")
    assert error_file.read_text("utf-8").startswith(
        "LinAlgError"
    ) or "plug.py:" in error_file.read_text("utf-8")


def test_python_users_see_their_own_error(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    words = [*SMALL, "plugins=[plug]", "dataset.name=unreadable", f"cache_dir={tmp_path}/cache"]
    with pytest.raises(RuntimeError, match="cannot read"):
        saexp.run(saexp.compose(words), tmp_path / "run")
    (tmp_path / "plug_two.py").write_text("1 / 0\n")
    with pytest.raises(PluginError, match=r"plug_two.py:1: ZeroDivisionError"):
        saexp.run(saexp.compose([*SMALL, "plugins=[plug_two]"]), tmp_path / "run")


def test_positions_of_a_plugin_need_no_config_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "plug.py").write_text(MODULE)
    result = command(tmp_path, *SMALL, "plugins=[plug]", "positions.name=end")
    assert result.code == 0, result.err
