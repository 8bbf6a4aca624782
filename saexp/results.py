"""Results: metrics, tables, figures and notes; and phrases that notes and reports share."""

import importlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saexp.config import RunConfig
from saexp.errors import ConfigError, StoreError
from saexp.registry import did_you_mean, is_builtin
from saexp.registry import names as registered

log = logging.getLogger(__name__)

OUTCOME_WORDS = {"dont_know": 'log-probability of "I don\'t know"'}
"""Outcomes whose names are not the words of a report."""


def outcome_words(outcome: str) -> str:
    """An outcome's name in a report."""
    return OUTCOME_WORDS.get(outcome, outcome.replace("_", " "))


CONTROL_WORDS = {
    "frequency": "frequency-matched latents",
    "disruption": "latents scaled to equal KL",
    "random_norm": "random directions of equal norm",
    "random_kl": "random directions of equal KL",
    "own_group": "patches from other prompts of the same group",
}
"""Kind of control of a causal test -> what reports call it; KL is measured on neutral text."""


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """HTML of a title and a table with the columns name and value, for notebooks."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{escape(title)}</b><table>{cells}</table></div>"


def model_words(name: str) -> str:
    """A model's name in sentences: a hub id as it is, a local path as its last component.

    >>> model_words("google/gemma-2-2b"), model_words("/models/SmolLM2-135M/")
    ('google/gemma-2-2b', 'SmolLM2-135M')
    """
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return name.rstrip("/").rpartition("/")[2] or name if is_path else name


def model_title(name: str) -> str:
    """A model's name in titles: the last component of a hub id or path."""
    return name.rstrip("/").rpartition("/")[2] or name


def sae_name(about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """An SAE's name, of sae=local its folder or file; `about` is its entry in provenance.json and
    `config` the run's config of it."""
    name, path = str(about.get("name") or config["name"]), config.get("path")
    return model_title(str(path)) if name == "local" and path else name


def sae_words(about: Any) -> str:
    """ "SAE of 256 latents", with the kind of control it is, if any; `about` is its entry in
    provenance.json."""
    # In a sweep's table the value is missing for a trained SAE.
    control = f"{about['control']} control " if isinstance(about.get("control"), str) else ""
    return f"{control}SAE of {about['d_sae']} latents"


def p_value_words(p_value: float) -> str:
    """ "= 0.012", "< 0.001" for smaller values, "is not defined" for NaN."""
    if p_value != p_value:
        return "is not defined"
    return f"= {p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def is_above_chance(auroc: float, p_value: float, alpha: float) -> bool:
    """Whether an AUROC, in the direction selected on the train split, is significantly above 0.5.

    `p_value` is two-sided and corrected for the number of latents that are reported.
    """
    return auroc > 0.5 and p_value <= alpha


def at_chance_words(auroc: float, p_value: float | None, units: str = "entities") -> str:
    """ " (not above chance on held-out entities)" for an AUROC that is not, at level 0.05.

    `p_value` is as in `is_above_chance`; without it the text is empty.
    """
    if p_value is None or p_value != p_value or is_above_chance(auroc, p_value, 0.05):
        return ""
    return f" (not above chance on held-out {units})"


if TYPE_CHECKING:
    import pandas as pd


SWEEP_PLAN = "plan.json"
"""File in a sweep's folder: its cells, and the hookpoints they need together."""


def read_plan(folder: Path) -> dict[str, Any]:
    """A sweep's plan: `command`, `cells` and `passes`; empty where it is missing or damaged."""
    try:
        plan = json.loads((folder / SWEEP_PLAN).read_text("utf-8"))
        valid = all(isinstance(cell, list) for cell in plan["cells"])
        valid = valid and all(isinstance(word, str) for cell in plan["cells"] for word in cell)
        return plan if valid and isinstance(plan.get("passes", {}), dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


@dataclass(frozen=True)
class Artifact:
    """Files that a run read or wrote, for trackers that record which run used what."""

    name: str
    type: str
    """store, sae, results or sweep."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Name in the artifact -> file; these are uploaded."""
    reference: Path | None = None
    """A folder or file that is recorded by its path alone, however large it is."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_input: bool = False
    """Whether the run read it rather than wrote it."""


class ObjectiveError(ConfigError):
    """`objective=` is not a metric of the run, nor of any other run with such a config."""


_OF_EVERY_ANALYSIS = ("collection", "check", "sparsity", "reconstruction", "power")
_OF_CAUSAL_TESTS = ("effect", "intervention", "baseline", "placebo")
_OF_ANALYZERS = ("contrast", "probe", "stats", "top_features", "capability")
"""Groups of the metrics that runs of task=analyze have, the last named after their analyzers."""


def check_objective(cfg: RunConfig) -> None:
    """Raise ObjectiveError for an `objective` that the run cannot have, as its config shows.

    That is a metric of another analyzer or outcome, of a causal test that is not run, or of groups
    that the data do not have. Other misspelt names are only noticed when the run has its metrics.
    """
    name = cfg.objective
    if name is None:
        return
    group, _, rest = name.partition("/")
    if not rest:
        raise ObjectiveError(f"objective={name} is not the name of a metric; type e.g. {_EXAMPLES}")
    if cfg.task.name != "analyze" or cfg.analyzer.name not in _OF_ANALYZERS:
        return
    about = cfg.intervention
    if about.name == "none" and group in _OF_CAUSAL_TESTS:
        raise ObjectiveError(
            f"objective={name} needs a causal test, and this run has intervention=none; type e.g. "
            "intervention=steer"
        )
    groups = [*_OF_EVERY_ANALYSIS, cfg.analyzer.name, *_OF_CAUSAL_TESTS]
    if group not in groups:
        raise ObjectiveError(
            f"objective={name}: this run has no metrics {group}/…; {did_you_mean(group, groups)}"
        )
    outcome, _, condition = rest.partition("/")
    if group == "effect" and is_builtin("intervention", about.name):
        outcomes = [*about.outcomes, *(about.alternatives or []), "attention"]
        if outcome not in outcomes:
            raise ObjectiveError(
                f"objective={name}: {outcome} is not among the run's outcomes; "
                + (
                    f"type 'intervention.outcomes=[{outcome}]'"
                    if outcome in registered("outcome")
                    else did_you_mean(outcome, outcomes)
                )
            )
        if not condition:
            raise ObjectiveError(f"objective={name} lacks a condition; type e.g. {_EXAMPLES}")
    data = cfg.dataset.groups or (["known", "unknown"] if cfg.dataset.name == "entities" else [])
    of_group = group == "contrast" and re.match(r"(best|strongest|n_selected)_", rest)
    of_group = of_group or (
        group == "effect" and isinstance(about.latents, str) and condition != "control_mean"
    )
    if (
        data
        and of_group
        and not any(re.search(rf"(^|[_/]){re.escape(g)}(_|$)", rest) for g in data)
    ):
        raise ObjectiveError(f"objective={name} names no group of the data ({', '.join(data)})")


_EXAMPLES = "objective=effect/refusal/unknown_group or objective=contrast/best_auroc_unknown_test"


def check_result(value: Any, component: str) -> None:
    """Raise ConfigError where a custom component returned something else."""
    if not isinstance(value, Result):
        raise ConfigError(f"{component} gave {type(value).__name__}; it must give a Result")


@dataclass(repr=False)
class Result:
    """Result of an analyzer, an intervention or a whole task."""

    metrics: dict[str, float | int | None] = field(default_factory=dict)
    """Flat `group/name` -> number; None for one that could not be computed (and is in `notes`)."""
    tables: dict[str, "pd.DataFrame"] = field(default_factory=dict)
    """Name -> table; each is saved as `<name>.parquet`."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Name -> plotly figure."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader: skipped examples, unmet conditions, undefined numbers."""

    path: Path | None = None
    """The run's folder."""

    def objective(self, name: str) -> float:
        """The metric of this name; NaN where it could not be computed, with a warning.

        Without a causal test there are no effects: where no latent was selected, an effect is NaN.
        Raises ObjectiveError for a name that no metric has.
        """
        value = self.metrics.get(name)
        group = name.partition("/")[0]
        is_absent = group == "effect" and not any(n.startswith("effect/") for n in self.metrics)
        if name not in self.metrics and not is_absent:
            of_group = [n for n in self.metrics if n.startswith(f"{group}/")]
            groups = dict.fromkeys(f"{n.partition('/')[0]}/…" for n in self.metrics)
            near = did_you_mean(name, self.metrics)
            hint = (
                near if near.startswith("did") else f"choose from {', '.join(of_group or groups)}"
            )
            raise ObjectiveError(f"objective: no metric '{name}'; {hint}")
        if value is None:
            log.warning("objective: %s could not be computed", name)
            return float("nan")
        return float(value)

    @property
    def store(self) -> Any:
        """The `ActivationStore` that the run read; None for a result without one.

        Raises StoreError where the run's provenance.json is damaged or the store is gone.
        """
        file = None if self.path is None else self.path / "provenance.json"
        if file is None or not file.is_file():
            return None
        try:
            store = json.loads(file.read_text("utf-8")).get("store")
            folder = None if store is None else str(store["path"])
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{file} is damaged; run its command again, or open the store with "
                "saexp.open_store(FOLDER)"
            ) from error
        if folder is None:
            return None
        # Imported by name: results are below the activations, and need no torch before this.
        module = importlib.import_module("saexp.activations")
        return module.ActivationStore.open(folder)

    def __repr__(self) -> str:
        """Sizes of tables and names of figures, which are too long to print."""
        tables = ", ".join(f"{name} ({len(table)} rows)" for name, table in self.tables.items())
        lines = [
            f"Result in {self.path or 'memory'}",
            f"  metrics: {len(self.metrics)}",
            f"  tables: {tables or 'none'}",
            f"  figures: {', '.join(self.figures) or 'none'}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = {
            "metrics": len(self.metrics),
            **{f"tables[{name!r}]": f"{len(table)} rows" for name, table in self.tables.items()},
            "figures": ", ".join(self.figures) or "none",
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }
        return html_table(f"Result in {self.path or 'memory'}", rows)

    def merge(self, other: "Result") -> None:
        """Add another result's content; a metric, table or figure that both have is a bug."""
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (self.metrics, other.metrics),
            (self.tables, other.tables),
            (self.figures, other.figures),
        ]
        for target, added in pairs:
            both = target.keys() & added.keys()
            assert not both, f"two results both have {sorted(both)}"
            target.update(added)
        self.notes.extend(other.notes)

    def copy(self) -> "Result":
        """A copy whose tables can be changed."""
        return Result(
            metrics=dict(self.metrics),
            tables={name: table.copy() for name, table in self.tables.items()},
            figures=dict(self.figures),
            notes=list(self.notes),
            path=self.path,
        )

    def __add__(self, other: "Result") -> "Result":
        """The content of both, as a new result; tables are shared."""
        result = Result(dict(self.metrics), dict(self.tables), dict(self.figures), [*self.notes])
        result.merge(other)
        return result


SAE_CHECK_HEAD = ["hookpoint", "quantity", "measured", "expected", "tolerance", "verdict"]


def sae_check_rows(table: "pd.DataFrame | None") -> list[list[Any]]:
    """Rows of check.parquet for reading; none if the run did not check its SAE."""
    if table is None:
        return []
    rows = []
    for row, is_known in zip(table.to_dict("records"), table["expected"].notna(), strict=True):
        is_alternative = row["verdict"] == "other reading"
        expected = "" if is_alternative else "unknown"
        if is_known:
            expected = row["expected"]
        measured = [row["hookpoint"], row["quantity"], row["here"]]
        rows.append([*measured, expected, row["tolerance"], row["verdict"]])
    return rows


def provenance_rows(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a run was made, from its provenance.json, as (name, value)."""
    model, machine = about["model"], about["machine"]
    rows = [
        ("command", about["command"]),
        ("started", about["started"]),
        ("model", f"{model['name']} (revision {model.get('revision') or 'default'})"),
        ("model weights", model["fingerprint"]),
    ]
    if "dtype" in model:
        rows.append(("model dtype", f"{model['dtype']} ({model['dtype_source']})"))
    if "sae" in about:
        sae = about["sae"]
        rows += [
            ("SAE", f"{sae.get('name')} ({sae.get('architecture')}, d_sae {sae['d_sae']})"),
            ("SAE weights", str(sae.get("fingerprint"))),
        ]
    if "store" in about:
        rows.append(("activation store", about["store"]["key"]))
    if "labels" in about:
        rows.append(("labels", about["labels"]["key"]))
    return [
        *rows,
        ("seed", str(about["seed"])),
        ("machine", f"{machine['system']}, {machine['cores']} cores, {machine['device']}"),
        ("seconds", ", ".join(f"{k} {v:.1f} s" for k, v in about["seconds"].items())),
        ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())),
    ]
