"""Results of tasks and analyzers: metrics, tables, figures and notes."""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saexp.errors import ConfigError, StoreError
from saexp.wording import html_table

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
        module = importlib.import_module("saexp.activations.store")
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
