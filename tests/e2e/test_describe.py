"""Runs with the analyzers that describe: their files, pages, several layers, one's own analyzer."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

import saexp
from saexp import registry
from saexp.analysis import AnalysisInputs
from saexp.cli import main
from saexp.context import ObjectCache
from saexp.errors import ConfigError, DataError, ModelError
from saexp.reports.analysis import findings, report_figures, write_report
from saexp.results import Result
from tests.shipped_texts import FEW_NEUTRAL

PROMPT = "When Laura and Irene went to the library, Irene gave the ring to"
OBJECTS = ObjectCache()
"""Shared by the runs of this file, as by the cells of a sweep (see test_shared.py)."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, folder: Path, *words: str) -> Result:
    quick = ["tracker=none", f"cache_dir={cache}", "analyzer.n_bootstrap=50", "device=cpu"]
    quick += ["analyzer.n_background=300", FEW_NEUTRAL]
    return saexp.run(saexp.compose([*quick, *words]), folder, command="a test", objects=OBJECTS)


def page_of(folder: Path) -> str:
    page = (folder / "report.html").read_text("utf-8")
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


WORDS = {
    "capability": ("dataset=ioi", "dataset.n_examples=20"),
    "top_features": ("dataset=text", f'dataset.text="{PROMPT} Laura."'),
    "stats": ("dataset=memorization", "positions=continuation"),
    "probe": ("dataset.n_examples=100",),
}
FIGURES = {
    "capability": {"best_tokens", "answers"},
    "top_features": set(),
    "stats": {"l0", "values", "frequencies"},
    "probe": {"probes", "roc_test"},
}
TABLES = {
    "capability": {"prompts", "top_tokens", "capability", "unanswered"},
    "top_features": {"top_features", "tokens"},
    "stats": {"groups", "counts", "frequent", "l0_histogram", "value_histogram"},
    "probe": {"probes", "probe_latents", "roc"},
}


@pytest.fixture(scope="module", params=list(WORDS))
def done(
    request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Result]:
    name = request.param
    folder = tmp_path_factory.mktemp(name) / "run"
    return name, run(cache, folder, f"analyzer={name}", *WORDS[name])


def test_files_and_metrics(done: tuple[str, Result]) -> None:
    name, result = done
    folder = result.path
    assert folder is not None
    saved = {p.stem for p in folder.glob("*.parquet")}
    assert saved == {"rows", "skips", "check", *TABLES[name]} == set(result.tables)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics == result.metrics
    assert {"sparsity/l0", "reconstruction/explained_variance", "check/l0"} <= set(metrics)
    assert any(key.startswith(f"{name}/") for key in metrics)
    about = json.loads((folder / "provenance.json").read_text("utf-8"))
    assert about["finding"][1:] and about["status"] == "finished"
    assert {"load", "collect", "encode", name} <= set(about["seconds"])


def test_the_page_needs_no_other_file(done: tuple[str, Result]) -> None:
    name, result = done
    assert result.path is not None
    body = page_of(result.path)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", body)
    assert set(result.figures) == FIGURES[name]
    for figure in result.figures:
        assert f'id="fig-{figure}"' in body
    for sentence in findings(result.path):
        assert sentence.split("'")[0][:40] in body


def test_the_page_is_made_from_the_files_alone(done: tuple[str, Result]) -> None:
    _, result = done
    folder = result.path
    assert folder is not None
    before = (folder / "report.html").read_text("utf-8")
    again = report_figures(folder)
    assert {n: f.to_json() for n, f in again.items()} == {
        n: f.to_json() for n, f in result.figures.items()
    }
    write_report(folder)
    assert (folder / "report.html").read_text("utf-8") == before


def test_the_second_run_forwards_nothing_to_collect(cache: Path, tmp_path: Path) -> None:
    words = ("analyzer=stats", *WORDS["stats"])
    run(cache, tmp_path / "first", *words)
    second = run(cache, tmp_path / "second", *words)
    assert second.metrics["collection/tokens_forwarded"] == 0


def test_layers_one_after_another(cache: Path, tmp_path: Path) -> None:
    """The same numbers as run by run, also with more layers than SAEs are kept."""
    words = ("analyzer=top_features", *WORDS["top_features"])
    together = run(cache, tmp_path / "all", *words, "layer=[0,1,2,3,4]")
    table = together.tables["top_features"]
    assert table["layer"].unique().tolist() == [0, 1, 2, 3, 4]
    alone = run(cache, tmp_path / "3", *words, "layer=3")
    of_layer = table[table["layer"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_layer, alone.tables["top_features"])
    for name in ("top_features/best_max", "sparsity/l0", "check/l0"):
        assert together.metrics[f"{name}_layer_3"] == alone.metrics[name]
    body = page_of(tmp_path / "all")
    assert "Layer 4" in body and 'id="fig-by_layer"' in body
    assert "5 layers, layer_0.resid_post to layer_4.resid_post" in body


def test_statistics_of_layers(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "run", "analyzer=stats", *WORDS["stats"], "layer=[1,2]")
    groups = result.tables["groups"]
    assert groups[["layer", "group"]].to_numpy().tolist() == [
        [layer, group] for layer in (1, 2) for group in ("memorized", "not_memorized")
    ]
    assert {"l0_layers", "l0_layer_1", "values_layer_2"} <= set(result.figures)


def test_one_layer_analyzers_say_so(cache: Path, tmp_path: Path) -> None:
    for name in ("probe", "capability"):
        with pytest.raises(ConfigError, match="takes one layer; sweep with -m layer=0,1"):
            run(cache, tmp_path / name, f"analyzer={name}", "layer=[0,1]")


def test_statistics_without_groups(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "run", "analyzer=stats", "positions=all", *WORDS["top_features"])
    assert result.tables["groups"]["group"].tolist() == ["all"]
    assert set(result.figures) == {"l0", "values"}


def test_a_prompt_typed_on_the_command_line(cache: Path, tmp_path: Path) -> None:
    words = ("analyzer=capability", "dataset=prompt", f'dataset.text="{PROMPT}"')
    result = run(cache, tmp_path / "a", *words, 'dataset.answer=" Laura"', 'dataset.foil=" Irene"')
    row = result.tables["prompts"].iloc[0]
    assert row["rank_clean"] == 1
    assert row["logit_difference_clean"] > 0
    unspaced = run(cache, tmp_path / "b", *words, "dataset.answer=Laura", "dataset.foil=Irene")
    pd.testing.assert_frame_equal(result.tables["prompts"], unspaced.tables["prompts"])
    assert result.metrics["capability/logit_clean_ci_low"] is None
    note = next(n for n in result.notes if n.startswith("not defined"))
    assert "reconstruction/explained_variance," in note and "bounds of intervals" in note
    assert "has rank 1 (probability" in page_of(tmp_path / "a")


def test_what_the_data_must_have(cache: Path, tmp_path: Path) -> None:
    for words, message in (
        (("analyzer=capability", *WORDS["top_features"]), "none of 1 examples has a usable answer"),
        (("analyzer=probe", "positions=all", *WORDS["top_features"]), "a probe needs two groups"),
    ):
        with pytest.raises(DataError, match=message):
            run(cache, tmp_path / "data", *words)
    with pytest.raises(ConfigError, match="dataset=prompt needs a prompt, quoted twice"):
        run(cache, tmp_path / "prompt", "analyzer=capability", "dataset=prompt")
    with pytest.raises(ConfigError, match="no key 'analyzer.colour'"):
        run(cache, tmp_path / "options", "analyzer=stats", "+analyzer.colour=red")
    with pytest.raises(ModelError, match="layer=9 is out of range: tiny has layers 0-4"):
        run(cache, tmp_path / "layer", "analyzer=stats", "layer=[1,9]")


def test_transfer_is_collected_too(cache: Path, tmp_path: Path) -> None:
    source = Path(saexp.__file__).parent / "assets/tiny/entities.jsonl"
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    prompts = [{**r, "text": r["prompt"].split(r["entity"])[0] + r["entity"]} for r in rows]
    for row in prompts:
        row.pop("split", None)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in prompts), encoding="utf-8")
    words = ("analyzer=probe", f"analyzer.transfer={path}", "dataset.n_examples=80")
    result = run(cache, tmp_path / "run", *words)
    table = result.tables["probes"]
    assert set(table["data"]) == {"train", "test", "transfer"}
    assert (result.metrics["probe/dense_auroc_transfer"] or 0) > 0.9
    assert "roc_transfer" in result.figures
    trained = result.metrics["probe/n_rows"]
    assert any(f"{trained} rows left out" in note for note in result.notes)
    page = page_of(tmp_path / "run")
    assert "second data set" in page
    assert "with several types the surface baseline has another AUROC there" in page


@pytest.fixture
def custom_analyzer() -> Iterator[None]:
    @saexp.register("analyzer", "mine")
    class MeanNorms:
        """Norms of the activations, and a table of odd cells."""

        def __init__(self, cfg: object) -> None:
            self.cfg = cfg

        def analyze(self, inputs: AnalysisInputs) -> Result:
            assert inputs.acts is not None and inputs.background is not None
            norms = inputs.acts.float().norm(dim=-1).numpy()
            table = pd.DataFrame({"norm": norms, "what": [["<b>", None]] * len(norms)})
            figure = go.Figure(go.Histogram(x=norms))
            return Result(
                metrics={"mine/norm": float(norms.mean()), "mine/none": float("nan")},
                tables={"norms": table},
                figures={"my norms": figure},
                notes=["a note of mine"],
            )

    yield
    registry.PLUGINS.components.pop(("analyzer", "mine"), None)


@pytest.mark.usefixtures("custom_analyzer")
def test_a_custom_analyzer_is_run(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "run", "analyzer.name=mine", "layer=1")
    assert result.metrics["mine/none"] is None
    assert "mine/none could not be computed" in result.notes
    body = page_of(tmp_path / "run")
    assert "a note of mine" in body and 'id="fig-my norms"' in body
    assert "first 200 of 960" in body and "&lt;b&gt;" in body
    again = report_figures(tmp_path / "run")["my norms"]
    original = go.Figure(go.Histogram(x=result.tables["norms"]["norm"].to_numpy()))
    trace = again.data[0].to_plotly_json()
    assert trace == json.loads(original.to_json() or "")["data"][0]


def test_analyzers_that_give_what_cannot_be_kept(cache: Path, tmp_path: Path) -> None:
    results: list[object] = [
        None,
        Result(tables={"rows": pd.DataFrame()}),
        Result(metrics={"sparsity/l0": 1.0}),
    ]
    messages = ("must give a Result", "tables called rows are", "metrics called sparsity/l0")
    for number, (result, message) in enumerate(zip(results, messages, strict=True)):

        class Odd:
            """Gives what it should not."""

            def __init__(self, _: object, result: object = result) -> None:
                self.result = result

            def analyze(self, _: AnalysisInputs) -> object:
                return self.result

        registry.PLUGINS.components["analyzer", "odd"] = registry.Component(Odd)
        with pytest.raises(ConfigError, match=message):
            run(cache, tmp_path / str(number), "analyzer.name=odd", "dataset.n_examples=8")
    registry.PLUGINS.components.pop(("analyzer", "odd"))


def test_the_command_line_tells_the_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=prompt_features", "tracker=none", "analyzer.n_background=200", FEW_NEUTRAL]
    monkeypatch.setattr(sys, "argv", ["saexp", *words])
    main()
    output = capsys.readouterr().out
    assert re.search(r"Layer 0: the leading latents are \d+, \d+", output)
    assert "Layer 4:" in output and "report.html" in output
