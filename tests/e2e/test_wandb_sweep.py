"""What W&B gets of a sweep over layer and width, read back from its own files; the
saved view that is drawn from it; and the command line of `wandb agent`."""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from saexp.tasks import saved_runs
from saexp.tasks.saved_runs import PARAMETERS, Panel, keys_of_folder, sections
from tests import interpreters
from tests.shipped_texts import FEW_NEUTRAL
from tests.unit.reports.run_outputs import CommandResult, command, metrics_of, table_of, wandb_runs

SWEEPS = Path(__file__).parents[2] / "conf/wandb_sweeps"
SMALL = ["tracker=wandb", "intervention.n_prompts=4", "intervention.n_controls=2"]
SMALL += ["intervention.n_curve_controls=1", "intervention.n_choice_prompts=4"]
SMALL += ["intervention.max_new_tokens=6", "analyzer.n_bootstrap=10", "analyzer.scores=false"]
SMALL += ["analyzer.n_background=300", "dataset.n_examples=40", "hydra.sweep.dir=sweep"]
SMALL += ["intervention.n_neutral=2", FEW_NEUTRAL]
GRID = list(itertools.product((1, 2), (256, 512), (0.3,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wandb")


@pytest.fixture(scope="module")
def swept(folder: Path) -> CommandResult:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        result = command(folder, "-m", "layer=1,2", "width=256,512", "coefficient=0.3", *SMALL)
    assert result.code == 0, result.err[-3000:]
    return result


@pytest.fixture(scope="module")
def runs(swept: CommandResult) -> list[dict[str, Any]]:
    return [r for r in wandb_runs(swept.sweep) if r["job_type"] == "analyze"]


@pytest.fixture(scope="module")
def with_list(swept: CommandResult, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """A run with a list of coefficients, from the same cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        words = [w for w in SMALL if not w.startswith("hydra")]
        result = command(folder, "coefficient=[0,0.3,0.6]", *words, "hydra.run.dir=listed")
    assert result.code == 0, result.err[-3000:]
    (run,) = wandb_runs(folder / "listed")
    return run


def test_every_cell_is_a_run_with_a_name_of_its_own_in_one_group(
    swept: CommandResult, runs: list[dict[str, Any]]
) -> None:
    # A name has what is swept, also the coefficient: see unit/test_run_names.py.
    names = {f"tiny · layer {n} · width {w}" for n, w, _ in GRID}
    assert {run["name"] for run in runs} == names
    assert len(runs) == len({run["id"] for run in runs}) == len(GRID)
    assert {run["exit_code"] for run in runs} == {0}
    (group,) = {run["group"] for run in wandb_runs(swept.sweep)}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d · sweep", group)
    assert (swept.out + swept.err).count("wandb sync") == 1
    assert "wandb sync" in swept.out.strip().splitlines()[-1]


def test_layer_width_and_coefficient_are_plain_numbers_of_the_config(
    runs: list[dict[str, Any]],
) -> None:
    keys = ("layer", "width", "coefficient")
    assert sorted(tuple(run["config"][key] for key in keys) for run in runs) == sorted(GRID)
    for run in runs:
        plain = {key: run["config"][key] for key in ("seed", "model.name", "sae.release")}
        assert plain == {"seed": 0, "model.name": "tiny", "sae.release": "tiny"}


def test_the_cells_share_their_keys_which_hold_no_coefficient_and_no_latent(
    swept: CommandResult, runs: list[dict[str, Any]]
) -> None:
    common = set.intersection(*({*run["summary"]} for run in runs))
    assert common > {
        "contrast/best_auroc_unknown_test",
        "contrast/best_latent_unknown",
        "effect/refusal/baseline_known",
        "effect/refusal/control_mean",
        "effect/refusal/unknown_top1",
        "effect/refusal/unknown_top1_control_mean",
        "sparsity/l0",
    }
    for key in set().union(*(run["summary"] for run in runs)):
        if key.startswith("effect/"):
            assert re.fullmatch(r"effect/[a-z_]+/[a-z_]+(top\d+)?(_[a-z_]+)?", key), key
    # The summary has the numbers of metrics.json.
    for row in table_of(swept.sweep).to_dict("records"):
        metrics = metrics_of(swept.sweep / row["folder"])
        keys = ("layer", "width")
        (run,) = (r for r in runs if all(r["config"][key] == row[key] for key in keys))
        numbers = {k: v for k, v in metrics.items() if v is not None}
        assert {k: run["summary"][k] for k in numbers} == pytest.approx(numbers)


def test_no_number_of_a_scalar_run_has_a_history(runs: list[dict[str, Any]]) -> None:
    keys = {key for run in runs for row in run["history"] for key in row}
    assert keys
    assert all(key.startswith(("_", "tables/", "figures/")) for key in keys)


def test_a_list_of_coefficients_is_a_series_with_the_selected_value_in_the_summary(
    with_list: dict[str, Any], folder: Path
) -> None:
    assert with_list["axes"] == {"effect/*": "coefficient"}
    points = [row for row in with_list["history"] if "coefficient" in row]
    assert [point["coefficient"] for point in points] == [0, 0.3, 0.6]
    metrics = metrics_of(folder / "listed")
    key = "effect/refusal/unknown_top1"
    selected = metrics["intervention/coefficient_unknown_top1"]
    value_at = {point["coefficient"]: point[key] for point in points}
    assert value_at[selected] == metrics[key] == with_list["summary"][key]
    assert metrics["intervention/latent_unknown_top1"] == metrics["contrast/best_latent_unknown"]


def test_artifacts_say_what_was_read_and_what_was_written(
    swept: CommandResult, runs: list[dict[str, Any]]
) -> None:
    stores = [a for run in runs for a in run["artifacts"] if a.type == "store"]
    assert len(stores) == len(runs)
    assert len({a.name for a in stores}) == 1
    assert [a.use_after_commit for a in stores].count(False) == 1
    for artifact in stores:
        entries = {e.path: e.ref for e in artifact.manifest.contents}
        assert "manifest.json" in entries
        assert all(r.startswith("file://") for p, r in entries.items() if p != "manifest.json")
    saes = [a for run in runs for a in run["artifacts"] if a.type == "sae"]
    assert all(a.use_after_commit for a in saes)
    assert len({a.name for a in saes}) == 4
    assert {json.loads(a.metadata)["d_sae"] for a in saes} == {256, 512}
    for run in runs:
        (results,) = (a for a in run["artifacts"] if a.type == "results")
        names = {e.path for e in results.manifest.contents}
        assert names >= {"latents.parquet", "effects.parquet", "report.html", "metrics.json"}
    (own,) = (r for r in wandb_runs(swept.sweep) if r["job_type"] == "sweep")
    (table,) = (a for a in own["artifacts"] if a.type == "sweep")
    assert {e.path for e in table.manifest.contents} == {"sweep.parquet", "sweep.html"}


def test_rows_and_generations_are_tables(swept: CommandResult, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert {k.split("/")[1] for k in run["keys"] if k.startswith("tables/")} == {
            *("latents", "rows", "effects", "effects_summary", "baselines")
        }
    tables = list(swept.sweep.glob("wandb/*/files/media/table/tables/effects_[0-9]*.json"))
    assert len(tables) == len(GRID)
    columns = json.loads(tables[0].read_text("utf-8"))["columns"]
    assert {"prompt", "generated_text", "refusal", "condition", "coefficient"} <= {*columns}


def shown(panels: list[Panel]) -> set[str]:
    return {key for p in panels for key in (*p.y, p.x, p.color) if key} - {*PARAMETERS}


def test_every_panel_of_the_workspace_has_keys_that_the_runs_log(
    swept: CommandResult, folder: Path, runs: list[dict[str, Any]], with_list: dict[str, Any]
) -> None:
    view_sections = sections(keys_of_folder(swept.sweep)[0])
    names = ["Overview", "Dose-response", "Grid", "SAE quality", "Tables"]
    assert [section.name for section in view_sections] == names
    logged = set().union(*(run["summary"] for run in [*runs, with_list]))
    logged |= {"/".join(key.split("/")[:2]) for key in logged if key.startswith("tables/")}
    panels = [
        panel
        for section in view_sections
        for panel in section.panels
        if panel.y != ("tables/sweep",)
    ]
    assert {p.kind for p in panels} == {"scatter", "bar", "parallel", "importance", "table"}
    assert shown(panels) <= logged
    listed = sections(keys_of_folder(folder / "listed")[0])
    lines = [p for section in listed for p in section.panels if p.kind == "line"]
    history = {key for row in with_list["history"] for key in row}
    assert lines
    assert shown(lines) <= history


def test_a_dry_run_prints_the_panels_and_needs_no_library(
    swept: CommandResult, folder: Path
) -> None:
    words = ["task=workspace", f"path={swept.sweep}", "dry_run=true", "hydra.run.dir=view"]
    result = command(folder, *words)
    assert result.code == 0, result.err[-2000:]
    line = "Overview: scatter of contrast/best_auroc_unknown_test over layer by width"
    assert line in result.out.splitlines()
    saved = json.loads((folder / "view/workspace.json").read_text("utf-8"))
    assert [section["name"] for section in saved][0] == "Overview"
    missing = command(folder, "task=workspace", "path=nowhere/x", "dry_run=true")
    assert missing.code == 1
    assert "neither a folder nor a project that W&B shows" in missing.err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pydantic")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
def test_the_view_is_built_of_the_same_panels(swept: CommandResult) -> None:
    pytest.importorskip("wandb_workspaces")
    from saexp.tasks.saved_runs import build, build_report

    view_sections = sections(keys_of_folder(swept.sweep)[0])
    view = build(view_sections, entity="e", project="p", name="n")
    assert [(s.name, len(s.panels)) for s in view.sections] == [
        (s.name, len(s.panels)) for s in view_sections
    ]
    first = view.sections[0].panels[0]
    assert (first.x.name, first.y.name, first.z.name) == (
        "layer",
        view_sections[0].panels[0].y[0],
        "width",
    )
    report = build_report(view_sections, entity="e", project="p", name="n")
    headings = [block.text for block in report.blocks if type(block).__name__ == "H1"]
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert headings == [section.name for section in view_sections]
    assert [[type(p) for p in grid.panels] for grid in grids] == [
        [type(p) for p in section.panels] for section in view.sections
    ]
    assert {(r.entity, r.project) for grid in grids for r in grid.runsets} == {("e", "p")}


def test_a_view_and_with_it_a_report_are_saved_in_the_project(
    swept: CommandResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    class View:
        url = "https://host/view"

        def save(self) -> "View":
            return self

    def builder(kind: str) -> Any:
        def build(view_sections: list[Any], **about: str) -> View:
            saved.append((kind, len(view_sections), about))
            return View()

        return build

    monkeypatch.setattr(saved_runs, "build", builder("view"))
    monkeypatch.setattr(saved_runs, "build_report", builder("report"))
    words = [f"path={swept.sweep}", "tracker.entity=e", "title=t"]
    for at, word in enumerate(("report=false", "report=true")):
        result = command(folder, "task=workspace", *words, word, f"hydra.run.dir=saved{at}")
        assert result.code == 0, result.err[-2000:]
        assert result.out.count("saved https://host/view") == at + 1
    about = {"entity": "e", "project": "saexp", "name": "t"}
    assert saved == [(kind, 5, about) for kind in ("view", "view", "report")]


def agents_command(name: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a sweep, and the command that `wandb agent` types for a run."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text("utf-8"))
    values = {"layer": 2, "width": 256, "coefficient": 0.6}
    assert set(sweep["parameters"]) == set(values)
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    parts = create_sweep_command(sweep["command"])
    words = [w for part in parts for w in (args.get(str(part)[2:-1]) or [part])]
    assert words[-3:] == ["layer=2", "width=256", "coefficient=0.6"]
    return sweep, words[words.index("-m") :]


def test_the_sweeps_differ_in_their_method_alone_and_runs_log_their_objective(
    runs: list[dict[str, Any]],
) -> None:
    (grid, typed), (bayes, same) = map(agents_command, ("grid", "bayes"))
    assert typed == same
    assert (grid["method"], bayes["method"]) == ("grid", "bayes")
    for sweep in (grid, bayes):
        assert all(sweep["metric"]["name"] in run["summary"] for run in runs)


@pytest.mark.usefixtures("swept")
def test_the_agents_command_runs_and_logs_the_objective(folder: Path) -> None:
    sweep, words = agents_command("bayes")
    env = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "faked", "WANDB_RUN_ID": "ofbayes"}
    small = [w for w in SMALL if not w.startswith("hydra")]
    process = interpreters.run(
        [*words, *small, "hydra.run.dir=bayes"], folder, {**os.environ, **env}
    )
    assert process.returncode == 0, process.stderr[-2000:]
    (run,) = wandb_runs(folder / "bayes")
    assert run["id"] == "ofbayes"
    assert run["name"] == "tiny · tiny · layer 2 · width 256 · coefficient 0.6"
    assert sweep["metric"]["name"] in run["summary"]
