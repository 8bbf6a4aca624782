"""Tasks that read saved runs.

task=report makes the pages of a run or a sweep again from its files. task=workspace saves a view of
a W&B project: the specification is made from the files of a sweep or a run, or from the runs of a
project, so that every panel has a key that is logged; `wandb-workspaces` is needed only to save it.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.config.tasks import ReportConfig, WorkspaceConfig
from saexp.context import RunContext
from saexp.errors import ConfigError, SaexpError, brief, counted
from saexp.files import RUN_FOLDER, write_json
from saexp.pipeline.finished import record_page
from saexp.pipeline.run_folder import (
    METRICS,
    PROVENANCE,
    TRACKED_TABLES,
    effect_series,
    holding,
    note_written,
)
from saexp.registry import load_plugins
from saexp.reports.saved_run import SavedRun, cells_table
from saexp.results import SWEEP_PLAN, Result

PARAMETERS = ("layer", "width", "coefficient")
"""Keys of the config by which the cells of a sweep differ."""
_HIDDEN = ("_p_controls", "_p_controls_holm", "_control_min", "_control_max")
_MAIN = re.compile(r"/(?!baseline_)[^/]*(_(group|top1|splice|patch)|_layers_.*(?<!_control_mean))$")
"""Effects of the main conditions, without their baselines and controls."""
_N_RUNS = 500
"""Runs of a project whose keys are read, the newest first."""


@dataclass(frozen=True)
class Keys:
    """What the runs log."""

    summary: frozenset[str] = frozenset()
    series: frozenset[str] = frozenset()
    """Metrics with a history over `coefficient` or `train/tokens`."""
    tables: frozenset[str] = frozenset()
    """Names of tables, `tables/…` in W&B."""

    def __or__(self, other: "Keys") -> "Keys":
        return Keys(
            self.summary | other.summary, self.series | other.series, self.tables | other.tables
        )


@dataclass(frozen=True)
class Panel:
    """One panel; `x` and `color` are keys of the config where they are in `PARAMETERS`."""

    kind: str
    """line (history), scatter (a point per run), bar, parallel, importance or table."""
    title: str
    y: tuple[str, ...]
    x: str | None = None
    color: str | None = None


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    name: str
    panels: tuple[Panel, ...] = field(default_factory=tuple)


def sections(keys: Keys) -> list[Section]:
    """The sections of a workspace, without panels whose keys no run logs."""
    effects = sorted(k for k in keys.summary if k.startswith("effect/") and not k.endswith(_HIDDEN))
    aurocs = _matching(keys.summary, r"contrast/best_auroc_.+_test")
    objectives = [k for k in aurocs if "_ci_" not in k]
    objectives += [k for k in effects if _MAIN.search(k)]
    candidates = [
        Section("Overview", tuple(_overview(keys.summary))),
        Section("Dose-response", tuple(_dose_response(keys, effects))),
        Section("Grid", tuple(_grid(objectives))),
        Section("SAE quality", tuple(_quality(keys.summary))),
        Section("Training", tuple(_training(keys.series))),
        Section("Tables", tuple(Panel("table", t, (f"tables/{t}",)) for t in sorted(keys.tables))),
    ]
    return [section for section in candidates if section.panels]


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return sorted(name for name in names if re.fullmatch(pattern, name))


def _overview(summary: frozenset[str]) -> Iterable[Panel]:
    """The best latent's held-out AUROC against layer by width, and with its interval."""
    for auroc in _matching(summary, r"contrast/best_auroc_.+(?<!_ci_low)(?<!_ci_high)_test"):
        stem = auroc.removesuffix("_test")
        group = stem.removeprefix("contrast/best_auroc_")
        title = f"held-out AUROC of the best latent for {group}"
        yield Panel("scatter", f"{title}, by width", (auroc,), x="layer", color="width")
        limits = [f"{stem}_ci_low_test", auroc, f"{stem}_ci_high_test"]
        if summary.issuperset(limits):
            yield Panel("bar", f"{title}, with its 95% interval", tuple(limits), color="layer")


def _dose_response(keys: Keys, effects: Sequence[str]) -> Iterable[Panel]:
    """An outcome against the coefficient by layer, beside the range of the condition's controls."""
    for effect in effects:
        outcome, condition = effect.split("/")[1:3]
        if not _MAIN.search(effect):
            continue
        title = f"{outcome.replace('_', ' ')}, {condition}"
        band = [f"{effect}_control_{end}" for end in ("min", "mean", "max")]
        lines = [effect, *(k for k in band if k in keys.series)]
        if effect in keys.series:
            yield Panel("line", title, tuple(lines), x="coefficient", color="layer")
        yield Panel("scatter", f"{title}, a point per run", (effect,), "coefficient", "layer")


def _grid(objectives: Sequence[str]) -> Iterable[Panel]:
    if objectives:
        yield Panel("parallel", "layer, width, coefficient", (*PARAMETERS, *objectives[:6]))
    for objective in objectives[:6]:
        yield Panel("importance", f"importance for {objective}", (objective,))


def _quality(summary: frozenset[str]) -> Iterable[Panel]:
    l0, prefix = "sparsity/l0", "reconstruction/"
    for name in ("ce_loss_score", "explained_variance", "explained_variance_legacy"):
        if summary >= {l0, f"{prefix}{name}"}:
            title = f"{name.replace('_', ' ')} against L0"
            yield Panel("scatter", title, (f"{prefix}{name}",), x=l0, color="layer")
    if "sparsity/dead_fraction" in summary:
        yield Panel("scatter", "dead latents", ("sparsity/dead_fraction",), "layer", "width")


def _training(series: frozenset[str]) -> Iterable[Panel]:
    for name in sorted(k for k in series if k.startswith("train/")):
        if name.rpartition("/")[2] not in ("step", "tokens", "samples_per_second"):
            yield Panel("line", name.removeprefix("train/"), (name,), x="train/tokens")


def keys_of_folder(folder: Path) -> tuple[Keys, list[str]]:
    """The keys that a run or a sweep's cells log, from their files; notes on what is missing.

    Raises ConfigError where the folder is of neither, with those that are below it.
    """
    is_run = (folder / METRICS).is_file()
    cells = [folder] if is_run else [f.parent for f in sorted(folder.glob(f"*/{METRICS}"))]
    if not is_run and not _is_sweep(folder):
        below = sorted({f.parent for f in folder.rglob(SWEEP_PLAN)})
        below = below or sorted({f.parent for f in folder.rglob(METRICS)})
        listed = f"below it: {counted(len(below), 'sweep or run', 'sweeps or runs')}"
        example = f"task.path={below[-1]}" if below else "task.path=outputs/sweeps/…"
        raise ConfigError(
            f"task.path={folder} is neither a sweep nor a run with results; "
            f"{f'{listed}; ' if below else ''}type the folder of one, such as {example}"
        )
    if not cells:
        raise ConfigError(f"task.path={folder}: no cell of the sweep has results; run it again")
    keys = Keys(tables=frozenset({"sweep"} if (folder / "sweep.parquet").is_file() else ()))
    kinds: set[str] = set()
    for cell in cells:
        keys |= _keys_of_run(cell)
        tracker = SavedRun(cell).config.get("tracker") or {}
        kinds |= {tracker.get("kind") or "", *(tracker.get("kinds") or {})}
    if "wandb" in kinds:
        return keys, []
    used = ", ".join(sorted(kinds - {""})) or "none"
    note = f"{folder} was recorded with tracker={used}, so that W&B has no run of it to show"
    return keys, [f"{note}; run it with tracker=wandb"]


def _is_sweep(folder: Path) -> bool:
    """Whether a sweep of saexp wrote the folder."""
    return any((folder / name).is_file() for name in (SWEEP_PLAN, "sweep.parquet"))


def _keys_of_run(folder: Path) -> Keys:
    run = SavedRun(folder)
    names = {name for name in TRACKED_TABLES if (folder / f"{name}.parquet").is_file()}
    summary = run.effects_summary
    curve = effect_series({} if summary is None else {"effects_summary": summary})
    series = {key for point in curve for key in point if key != "coefficient"}
    training = run.table("training")
    if training is not None:
        labels = [f"{label}/" for label in training["sae"].unique()] if "sae" in training else [""]
        columns = [c for c in training if c not in ("sae", "step")]
        series |= {f"train/{label}{column}" for label in labels for column in columns}
    numbers = {key for key, value in run.metrics.items() if value is not None}
    return Keys(frozenset(numbers), frozenset(series), frozenset(names))


def keys_of_project(path: str) -> Keys:
    """The keys of the runs of a project `entity/project` on the server. Raises ConfigError."""
    import wandb

    try:
        runs = list(wandb.Api(timeout=20).runs(path, per_page=100)[:_N_RUNS])
        names = {key for run in runs for key in run.summary.keys()}  # noqa: SIM118
        is_list = any(isinstance(run.config.get("coefficient"), list) for run in runs)
    except Exception as error:
        raise ConfigError(
            f"task.path={path}: neither a folder nor a project that W&B shows "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    numbers = frozenset(n for n in names if not n.startswith(("_", "tables/", "figures/")))
    tables = frozenset(n.split("/")[1] for n in names if n.startswith("tables/"))
    series = {n for n in numbers if n.startswith("train/") or (is_list and n.startswith("effect/"))}
    return Keys(numbers, frozenset(series), tables)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"wandb_workspaces.{module}")
    except ImportError as error:
        raise ConfigError(
            "task=workspace saves a view with wandb-workspaces, which is not installed; type pip "
            "install 'saexp[workspace]', or task.dry_run=true to print what it would hold"
        ) from error


def build(page_sections: Sequence[Section], *, entity: str, project: str, name: str) -> Any:
    """The workspace as an object of wandb-workspaces. Raises ConfigError without it."""
    reports, workspaces = _library("reports.v2"), _library("workspaces")
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.name,
                is_open=True,
                panels=[_built(panel, reports) for panel in section.panels],
            )
            for section in page_sections
        ],
    )


def build_report(page_sections: Sequence[Section], *, entity: str, project: str, name: str) -> Any:
    """A report with the same panels, as an object of wandb-workspaces. Raises ConfigError without
    it."""
    reports = _library("reports.v2")
    blocks = [reports.TableOfContents()]
    for section in page_sections:
        grid = reports.PanelGrid(
            runsets=[reports.Runset(entity=entity, project=project)],
            panels=[_built(panel, reports) for panel in section.panels],
        )
        blocks += [reports.H1(text=section.name), grid]
    return reports.Report(entity=entity, project=project, title=name, blocks=blocks, width="fluid")


def _built(panel: Panel, reports: Any) -> Any:
    def key(name: str) -> Any:
        return reports.Config(name) if name in PARAMETERS else reports.SummaryMetric(name)

    group = None if panel.color is None else reports.Config(panel.color)
    if panel.kind == "line":
        return reports.LinePlot(title=panel.title, x=panel.x, y=list(panel.y), groupby=group)
    if panel.kind == "scatter":
        assert panel.x is not None, "a scatter plot has an x-axis"
        z = None if panel.color is None else key(panel.color)
        return reports.ScatterPlot(title=panel.title, x=key(panel.x), y=key(panel.y[0]), z=z)
    if panel.kind == "bar":
        return reports.BarPlot(title=panel.title, metrics=list(panel.y), groupby=group)
    if panel.kind == "parallel":
        columns = [reports.ParallelCoordinatesPlotColumn(metric=key(name)) for name in panel.y]
        return reports.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    if panel.kind == "importance":
        return reports.ParameterImportancePlot(with_respect_to=panel.y[0])
    return reports.WeavePanelSummaryTable(table_name=panel.y[0])


def workspace(cfg: RunConfig, context: RunContext) -> Result:
    """Write workspace.json; unless `task.dry_run` is true, save the view in the project, and with
    `task.report` a report too."""
    task = cfg.task
    assert isinstance(task, WorkspaceConfig)
    if not task.path:
        raise ConfigError(
            "task=workspace needs the folder of a sweep or run, or a project; type task.path="
            "outputs/sweeps/… or task.path=entity/project"
        )
    path = task.path
    folder = Path(path)
    keys, notes = keys_of_folder(folder) if folder.is_dir() else (keys_of_project(path), [])
    page_sections = sections(keys)
    write_json(
        context.folder / "workspace.json",
        [asdict(section) for section in page_sections],
        option=RUN_FOLDER,
    )
    rows = [
        {"section": section.name, "panel": panel.kind, "title": panel.title, "x": panel.x or ""}
        | {"y": ", ".join(panel.y), "by": panel.color or ""}
        for section in page_sections
        for panel in section.panels
    ]
    result = Result(tables={"workspace": pd.DataFrame(rows)}, notes=notes)
    if not task.dry_run:
        entity, project = cfg.tracker.entity, cfg.tracker.project
        if not folder.is_dir():
            entity, _, project = path.rpartition("/")
        entity = entity or _default_entity()
        for builder in (build, build_report) if task.report else (build,):
            view = builder(
                page_sections, entity=entity, project=project or "saexp", name=task.title
            )
            result.notes.append(f"saved {view.save().url}")
    return result


def _default_entity() -> str:
    """The account of the W&B key. Raises ConfigError without a key or an answer."""
    import wandb

    try:
        return str(wandb.Api().default_entity)
    except Exception as error:
        # No key, no network, or an answer of the server that is none.
        raise ConfigError(
            f"W&B cannot be asked ({brief(str(error), 120)}); run wandb login, or type dry_run=true"
        ) from error


# task=report


def _analysis_page(folder: Path) -> Path:
    from saexp.reports.analysis import write_report

    return write_report(folder)


def _evaluation_page(folder: Path) -> Path:
    from saexp.reports.sae_quality import evaluation_figures, write_evaluation_report

    return write_evaluation_report(folder, evaluation_figures(folder))


def _training_page(folder: Path) -> Path:
    from saexp.reports.training import training_figures, write_training_report

    return write_training_report(folder, training_figures(folder))


def _label_page(folder: Path) -> Path:
    from saexp.reports.label import write_label_report

    return write_label_report(folder)


def _dashboard_page(folder: Path) -> Path:
    from saexp.reports.latents import write_dashboard

    return write_dashboard(folder)


_PAGES: dict[str, Callable[[Path], Path]] = {
    "analyze": _analysis_page,
    "dashboard": _dashboard_page,
    "evaluate": _evaluation_page,
    "label": _label_page,
    "train": _training_page,
}
"""Task -> what writes the page of its run from the files in the run's folder."""


def report(cfg: RunConfig, context: RunContext) -> Result:
    """Write the pages of a run or a sweep again; the table `pages` lists them, the sweep's last.

    Raises ConfigError where the folder is neither, StoreError where a file that a page needs is
    damaged or another process is writing to the folder.
    """
    task = cfg.task
    assert isinstance(task, ReportConfig)
    if not task.path:
        raise ConfigError(
            "task=report needs the folder of a run or sweep; type path=outputs/sweeps/…"
        )
    folder = Path(task.path)
    if (folder / PROVENANCE).is_file():
        page, notes = _write_page(folder, context)
        return Result(tables={"pages": pd.DataFrame({"page": [str(page)]})}, notes=notes)
    if not _is_sweep(folder):
        state = "holds neither a run nor a sweep" if folder.is_dir() else "does not exist"
        state = "is a file" if folder.is_file() else state
        raise ConfigError(
            f"path={folder} {state}; type the folder of a run or a sweep, such as outputs/sweeps/…"
        )
    return _write_sweep_pages(folder, context, with_cells=task.cells)


def _write_page(folder: Path, context: RunContext) -> tuple[Path, list[str]]:
    """(the page of a run, notes on it); the folder is locked meanwhile."""
    with holding(folder):
        run = SavedRun(folder)
        load_plugins(run.config["plugins"])
        task = str(run.config["task"]["name"])
        if task not in _PAGES:
            raise ConfigError(f"{folder}: a run of task={task} has no page")
        if not (folder / METRICS).is_file():
            raise ConfigError(f"{folder}: the run ended before it had results; run it again")
        page = _PAGES[task](folder)
        if run.checksums is not None:
            record_page(folder, page.name)
            return page, []
        # The next run in this folder removes the page.
        unfinished = replace(context, folder=folder, began_writing=True, results=set())
        note_written(unfinished, [page.name])
        return page, [f"{folder}: the run has not finished; its page shows what it had saved"]


def _write_sweep_pages(folder: Path, context: RunContext, *, with_cells: bool) -> Result:
    """sweep.parquet and sweep.html of the cells that there are, after the cells' own pages.

    A cell whose page cannot be written keeps the state that the sweep's table gives it, and a note
    says why.
    """
    from saexp.reports.contrast import MATCHES, MATCHES_NOTES
    from saexp.reports.sweep import write_sweep

    result, pages = Result(), []
    has_ended = (folder / "sweep.parquet").is_file()
    with holding(folder):
        cells = cells_table(folder)
        has_files = cells["status"].isin(["finished", "damaged"])
        for cell in cells.loc[has_files, "folder"] if with_cells else ():
            with context.stage(f"page of {cell}"):
                try:
                    page, notes = _write_page(folder / cell, context)
                except SaexpError as error:
                    result.notes.append(f"no page of {cell}: {error}")
                    continue
            pages.append(str(page))
            result.notes += notes
        write_sweep(folder)
    if not (has_ended or any((folder / name).is_file() for name in (MATCHES, MATCHES_NOTES))):
        result.notes.append(
            "latents of different SAEs are not matched, since the sweep did not finish; its "
            "command, typed again with the same hydra.sweep.dir=, matches them"
        )
    result.tables = {"pages": pd.DataFrame({"page": [*pages, str(folder / "sweep.html")]})}
    return result
