"""Synthetic entities, latents and effects in which the truth is known."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from saexp.analysis import AnalysisInputs
from saexp.analysis.contrast import ContrastAnalyzer
from saexp.analysis.probe import ProbeAnalyzer
from saexp.config import AnalyzerConfig, ProbeConfig
from saexp.latents import Latents
from saexp.results import Result

GROUPS = ("known", "unknown")
TYPES = ("city", "movie", "player", "song")


def entities(
    split: str, n_first: int, n_second: int, types: Sequence[str] = TYPES[:1]
) -> pd.DataFrame:
    """One row per entity; the types alternate within each group."""
    rows = [
        {
            "unit": f"{split}:{group}:{i}",
            "group": group,
            "split": split,
            "entity_type": types[i % len(types)],
            "n_entity_tokens": 2,
        }
        for group, n in zip(GROUPS, (n_first, n_second), strict=True)
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def both_splits(n_train: int, n_test: int, types: Sequence[str] = TYPES) -> pd.DataFrame:
    """So many entities of each group in each split."""
    parts = [entities(s, n, n, types) for s, n in (("train", n_train), ("test", n_test))]
    return pd.concat(parts, ignore_index=True)


def repeated(rows: pd.DataFrame, times: np.ndarray) -> pd.DataFrame:
    """Each row `times` times, as the prompts of one entity."""
    return rows.loc[rows.index.repeat(times)].reset_index(drop=True)


def mixed_latents(rng: np.random.Generator, n_rows: int, n_latents: int) -> np.ndarray:
    """`[n_rows, n_latents]`: active at rates from 0.02 to 1, with gamma-distributed values."""
    rates = np.exp(rng.uniform(np.log(0.02), 0, n_latents))
    return activated(rng, np.broadcast_to(rates, (n_rows, n_latents)))


def activated(rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
    """Gamma-distributed values where a latent is active, each with its own probability."""
    return np.where(rng.random(rates.shape) < rates, rng.gamma(3.0, 1.0, rates.shape), 0.0)


def contrast(rows: pd.DataFrame, values: np.ndarray, *, intervals: bool = True) -> Result:
    """The contrast with its default settings, or without intervals where nothing reads them."""
    cfg = AnalyzerConfig(name="contrast", n_bootstrap=1000 if intervals else 0)
    return ContrastAnalyzer(cfg).analyze(_inputs(rows, values))


def probe(rows: pd.DataFrame, values: np.ndarray, acts: np.ndarray) -> Result:
    """The probe analyzer with one penalty and one latent, so that a fit takes milliseconds."""
    cfg = ProbeConfig(name="probe", k=[1], strengths=[1.0])
    return ProbeAnalyzer(cfg).analyze(_inputs(rows, values, torch.from_numpy(acts)))


def _inputs(
    rows: pd.DataFrame, values: np.ndarray, acts: torch.Tensor | None = None
) -> AnalysisInputs:
    csr = sparse.csr_array(values.astype(np.float32))
    return AnalysisInputs(latents=Latents(csr, rows), groups=GROUPS, layer=0, acts=acts)


def effect_rows(
    outcomes: dict[str, np.ndarray],
    *,
    unit: np.ndarray,
    condition: str,
    role: str,
    of: str = "",
    coefficient: float = 1.0,
    split: str = "test",
    group: str | np.ndarray = "known",
    control_kind: str = "",
) -> pd.DataFrame:
    """Rows of the table `effects` of one condition, a row per prompt."""
    table = pd.DataFrame({"unit": unit})
    return table.assign(
        example_id=[f"{u}:{i}" for i, u in enumerate(unit)],
        group=group,
        split=split,
        condition=condition,
        role=role,
        of=of,
        direction=of.removesuffix("_group"),
        latent="",
        coefficient=0.0 if role == "baseline" else coefficient,
        control_kind=control_kind,
        **outcomes,
    )
