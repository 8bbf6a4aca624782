"""The code of the notebooks in docs runs, and their saved outputs hold no path of a machine."""

import ast
import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

import saexp
from tests.shipped_texts import FEW_NEUTRAL

SMALL = ["analyzer.n_bootstrap=10", "analyzer.n_background=200", FEW_NEUTRAL]
NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


class _Anything:
    """Stands in for matplotlib where that is not installed: every call and attribute works."""

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __call__(self, *_args: object, **_options: object) -> "_Anything":
        return self

    def __iter__(self):
        return iter((self, self))


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("matplotlib"):
        monkeypatch.setenv("MPLBACKEND", "agg")
        return
    package, pyplot = types.ModuleType("matplotlib"), types.ModuleType("matplotlib.pyplot")
    pyplot.__dict__.update(subplots=_Anything(), show=_Anything())
    package.__dict__["pyplot"] = pyplot
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)


def test_there_are_three() -> None:
    assert [n.stem for n in NOTEBOOKS] == ["quickstart", "steering", "your_own_data"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
@pytest.mark.usefixtures("plots")
def test_the_code_of_a_notebook_runs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compose, contrast = saexp.compose, saexp.contrast
    monkeypatch.setattr(saexp, "compose", lambda words: compose([*words, *SMALL]))
    monkeypatch.setattr(saexp, "contrast", functools.partial(contrast, overrides=SMALL))
    namespace: dict[str, object] = {}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(ast.parse(source), notebook.name, "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_outputs_are_saved_and_portable(notebook: Path) -> None:
    text = notebook.read_text("utf-8")
    cells = json.loads(text)["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/"))
    assert len(text) < 300_000
