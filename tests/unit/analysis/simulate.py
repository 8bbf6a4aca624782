"""Latents of made-up entities in which some latents are known to speak for a group."""

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis import AnalysisInputs
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.config import AnalyzerConfig
from saexp.latents import Latents
from saexp.results import Result

D_SAE = 60
GROUPS = ("known", "unknown")
TYPES = ("city", "movie")
KNOWN, UNKNOWN, ONE_TYPE, LOUD, ALWAYS, SILENT = 5, 9, 13, 21, 30, 44
"""Latents: for known; for unknown; for known in one type only; for known, but in any text too;
on everywhere, larger for known; off everywhere."""
PER_CELL = {"train": 30, "val": 6, "test": 20}
"""Entities of each group and type in a split."""


def rows_table() -> pd.DataFrame:
    """Two rows of every entity, in no order."""
    rows = []
    for split, n in PER_CELL.items():
        for group in GROUPS:
            for kind in TYPES:
                for i in range(n):
                    unit = f"{split}-{group}-{kind}-{i}"
                    rows += [(unit, group, split, kind)] * 2
    table = pd.DataFrame(rows, columns=["unit", "group", "split", "entity_type"])
    table = table.assign(n_entity_tokens=pd.array([2] * len(table), dtype="Int64"))
    return table.sample(frac=1, random_state=0).reset_index(drop=True)


def activations(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """`[n_rows, D_SAE]`, dense; rows of an entity agree on which of the planted latents are on, and
    any other is off on a fifth of an entity's rows."""
    rng = np.random.default_rng([seed, 7])
    known = (rows["group"] == "known").to_numpy()
    city = (rows["entity_type"] == "city").to_numpy()
    rates = np.full((len(rows), D_SAE), 0.15)
    rates[:, KNOWN] = np.where(known, 0.9, 0.1)
    rates[:, LOUD] = np.where(known, 0.95, 0.05)
    rates[:, UNKNOWN] = np.where(known, 0.15, 0.85)
    rates[:, ONE_TYPE] = np.where(city, np.where(known, 1.0, 0.0), np.where(known, 0.2, 0.6))
    rates[:, ALWAYS], rates[:, SILENT] = 1, 0
    codes, _ = pd.factorize(rows["unit"])
    drawn = rng.random((codes.max() + 1, D_SAE))[codes]
    values = rng.gamma(3, 1, rates.shape)
    values[known, ALWAYS] += 4
    skipped = rng.random(rates.shape) < 0.2
    skipped[:, [KNOWN, UNKNOWN, ONE_TYPE, LOUD, ALWAYS]] = False
    drawn = np.where(skipped, 1.0, drawn)
    return np.where(drawn < rates, values, 0.0).astype(np.float32)


def background() -> Latents:
    """1000 rows of neutral text; LOUD fires on a tenth of them, LOUD + 1 on just 2 %."""
    rng = np.random.default_rng(3)
    dense = np.zeros((1000, D_SAE), dtype=np.float32)
    dense[rng.permutation(1000)[:100], LOUD] = 1
    dense[:20, LOUD + 1] = 1
    dense[:19, KNOWN] = 1
    return Latents(sparse.csr_array(dense), pd.DataFrame({"row": range(1000)}))


def contrast(
    dense: np.ndarray, rows: pd.DataFrame, *, groups: tuple[str, ...] = GROUPS, **options: object
) -> Result:
    """The analyzer's result."""
    cfg = AnalyzerConfig(name="contrast", **options)  # type: ignore[arg-type]
    return ContrastAnalyzer(cfg).analyze(
        AnalysisInputs(
            latents=Latents(sparse.csr_array(dense), rows),
            groups=groups,
            layer=4,
            background=background(),
        )
    )
