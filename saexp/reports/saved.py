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
    def summary(self) -> pd.DataFrame | None:
        """effects_summary.parquet."""
        return self.table("effects_summary")

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
        """What the causal test looked at."""
        return list(self.config["intervention"]["outcomes"])

    @property
    def entity_types(self) -> list[str]:
        """Entity types with numbers of their own in the latent table."""
        columns = [] if self.latents is None else self.latents.columns
        found = [c.removeprefix("separation_") for c in columns if c.startswith("separation_")]
        of_split = ("test", "ci_low", "ci_high", "ci_low_test", "ci_high_test")
        return [t for t in found if t not in of_split and not t.endswith("_test")]

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
        return mine.sort_values("rank")

    def main_conditions(self) -> list[str]:
        """Per direction the condition that is told first: the group of latents, else the single."""
        summary = self.summary
        if summary is None:
            return []
        names = []
        for direction in self.groups:
            mine = summary[summary["direction"] == direction]
            for role in ("group", "single"):
                found = mine.loc[mine["role"] == role, "condition"]
                if len(found):
                    names.append(str(found.iloc[0]))
                    break
        return names

    def told_coefficient(self, condition: str, outcome: str) -> float | None:
        """Where a condition differs most from its controls' most similar one (else from baseline).

        A rule for what to tell first, not a selection that a claim rests on: every coefficient is
        in the table.
        """
        summary = self.summary
        assert summary is not None
        rows = summary[(summary["condition"] == condition) & (summary["coefficient"] != 0)]
        if rows.empty:
            return None
        controls = summary[(summary["of"] == condition) & (summary["role"] == "control")]
        best, margin = None, -float("inf")
        for row in rows.to_dict("records"):
            change = row[f"{outcome}_change"]
            others = controls.loc[
                controls["coefficient"] == row["coefficient"], f"{outcome}_change"
            ]
            rival = 0.0
            if len(others):
                rival = others.max() if change >= 0 else -others.min()
            gap = abs(change) - max(float(rival), 0.0)
            if gap > margin:
                best, margin = float(row["coefficient"]), gap
        return best
