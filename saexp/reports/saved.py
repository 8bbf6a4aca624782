"""A finished run as its files tell it; reports render from this alone, never from live objects."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.errors import StoreError


@dataclass(frozen=True)
class SavedRun:
    """The files of one run's folder. Raises StoreError where it holds no run."""

    folder: Path

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.folder} holds no finished run ({name}: {error})") from error

    @cached_property
    def metrics(self) -> dict[str, float | int | None]:
        """metrics.json."""
        return self._json("metrics.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json."""
        return self._json("provenance.json")

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, or None where the run left none of that name."""
        file = self.folder / f"{name}.parquet"
        return pd.read_parquet(file) if file.is_file() else None

    @cached_property
    def latents(self) -> pd.DataFrame | None:
        """latents.parquet."""
        return self.table("latents")

    @cached_property
    def effects_summary(self) -> pd.DataFrame | None:
        """effects_summary.parquet, both splits."""
        return self.table("effects_summary")

    @cached_property
    def summary(self) -> pd.DataFrame | None:
        """Effects on the test split, which claims rest on."""
        table = self.effects_summary
        if table is None or "split" not in table:
            return table
        return table[table["split"] == "test"].reset_index(drop=True)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.provenance["config"]

    @property
    def config_text(self) -> str:
        """The resolved config as JSON for reading."""
        return json.dumps(self.config, indent=1, ensure_ascii=False)

    @property
    def groups(self) -> tuple[str, str]:
        """The two groups contrasted."""
        first, second = self.provenance["groups"]
        return first, second

    @property
    def outcomes(self) -> list[str]:
        """Outcomes with a number per prompt, in the order asked for."""
        columns = [] if self.summary is None else self.summary.columns
        return [o for o in self.config["intervention"]["outcomes"] if o in columns]

    def is_rate(self, outcome: str) -> bool:
        """Whether an outcome is yes or no for each prompt."""
        effects = self.table("effects")
        return effects is not None and str(effects[outcome].dtype) in ("bool", "boolean")

    @property
    def entity_types(self) -> list[str]:
        """Entity types that both groups have on the test split, each with a column of its own."""
        columns = [] if self.latents is None else self.latents.columns
        of_test = [c for c in columns if c.startswith("separation_") and c.endswith("_test")]
        found = [c.removeprefix("separation_").removesuffix("_test") for c in of_test]
        return [t for t in found if t not in ("test", "ci_low", "ci_high")]

    @property
    def unit_word(self) -> str:
        """What one observation is: an entity, or an example where the data has none."""
        rows = self.table("rows")
        named = rows is not None and bool(rows["entity"].notna().any())
        return "entities" if named else "examples"

    def selected(self, direction: str) -> pd.DataFrame:
        """Selected latents of a direction, best first."""
        table = self.latents
        if table is None:
            return pd.DataFrame()
        mine = table[table["selected"] & (table["direction"] == direction)]
        return mine.sort_values("rank", kind="stable")

    @cached_property
    def controls(self) -> pd.DataFrame | None:
        """controls.parquet: how closely each control of a causal test is matched."""
        return self.table("controls")

    def main_conditions(self) -> list[str]:
        """The conditions that sentences are about, in order."""
        summary = self.summary
        if summary is None:
            return []
        return list(summary.loc[summary["main"], "condition"].unique())

    def chosen_coefficient(self, condition: str) -> float | None:
        """The one chosen on train prompts; None where none but 0 was run or measured."""
        summary = self.summary
        assert summary is not None
        chosen = summary[(summary["condition"] == condition) & summary["chosen"]]
        return float(chosen["coefficient"].iloc[0]) if len(chosen) else None
