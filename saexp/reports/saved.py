"""A finished run as its files tell it; reports render from this alone, never from live objects."""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import ArrowException

from saexp.checksums import checksum_of, difference, has_intact_seal, is_checksums, is_sealed
from saexp.digests import file_sha256
from saexp.errors import StoreError
from saexp.wording import brief

PROVENANCE = "provenance.json"
_AGAIN = "run its command again, which computes what is damaged anew"


class _Content(dict[str, Any]):
    """An object of a JSON file, which reports a missing key in one line."""

    def __init__(self, content: dict[str, Any], file: Path) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.file} is damaged (it has no '{key}'); {_AGAIN}")


@dataclass(frozen=True)
class SavedRun:
    """The files of one run's folder, each compared with its checksum where the run was finished.

    Raises StoreError where the folder holds no run, or a file that is read is damaged.
    """

    folder: Path

    def _content(self, name: str) -> bytes | None:
        """A file's content; None where the run left none of that name."""
        file = self.folder / name
        listed = None if name == PROVENANCE else self.listed
        expected = listed.get(name) if listed else None
        if expected is None and not file.is_file():
            return None
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror}); {_AGAIN}") from error
        if expected is not None and checksum_of(content) != expected:
            raise StoreError(f"{file} was changed since the run wrote it; {_AGAIN}")
        return content

    def object(self, name: str) -> dict[str, Any] | None:
        """What a JSON file holds; None where the run left none of that name."""
        content = self._content(name)
        if content is None:
            return None
        file = self.folder / name
        try:
            found = json.loads(content, object_hook=lambda found: _Content(found, file))
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{file} is damaged ({error}); {_AGAIN}") from error
        if not isinstance(found, dict):
            raise StoreError(f"{file} is damaged (it is not an object); {_AGAIN}")
        return found

    def _needed(self, name: str) -> dict[str, Any]:
        found = self.object(name)
        if found is None:
            raise StoreError(f"{self.folder} holds no finished run ({name} is missing)")
        return found

    @cached_property
    def metrics(self) -> dict[str, float | int | None]:
        """metrics.json."""
        found = self._needed("metrics.json")
        for name, value in found.items():
            if not isinstance(value, float | int | None):
                file = self.folder / "metrics.json"
                raise StoreError(f"{file} is damaged ({name} is not a number); {_AGAIN}")
        return found

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json."""
        found = self._needed(PROVENANCE)
        if is_sealed(found) and not has_intact_seal(found):
            raise StoreError(
                f"{self.folder / PROVENANCE} was changed since the run wrote it; {_AGAIN}"
            )
        return found

    @cached_property
    def listed(self) -> dict[str, Any] | None:
        """Checksums of the run's files; None of a run that is not finished."""
        files = self.provenance.get("files")
        if files is not None and not is_checksums(files):
            raise StoreError(f"{self.folder / PROVENANCE} is damaged ('files'); {_AGAIN}")
        return files

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, or None where the run left none of that name."""
        content = self._content(f"{name}.parquet")
        if content is None:
            return None
        try:
            return pd.read_parquet(io.BytesIO(content))
        except (OSError, ValueError, ArrowException) as error:
            file = self.folder / f"{name}.parquet"
            raise StoreError(f"{file} is damaged ({brief(str(error), 200)}); {_AGAIN}") from error

    def check(self) -> None:
        """Compare every file that the run left with its checksum."""
        changed = difference(self.folder, self.listed or {}, file_sha256)
        if changed is not None:
            raise StoreError(f"{self.folder}: {changed}; {_AGAIN}")

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables that the run left, by name."""
        names = self.listed or [file.name for file in sorted(self.folder.glob("*.parquet"))]
        stems = [Path(n).stem for n in names if Path(n).suffix == ".parquet"]
        tables = {stem: self.table(stem) for stem in stems}
        return {stem: table for stem, table in tables.items() if table is not None}

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
        config = self.provenance["config"]
        if not isinstance(config, dict):
            raise StoreError(f"{self.folder / PROVENANCE} is damaged ('config'); {_AGAIN}")
        return config

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
