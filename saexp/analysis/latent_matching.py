"""Which latents of two SAEs are alike."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import special
from torch import Tensor

THRESHOLD = 1e-6
"""A latent fires above this, as in the contrast."""
BY_CHANCE = 0.001
"""Probability at which a cosine counts as larger than chance."""
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Nearest:
    """Per direction the k latents with the largest cosine, best first."""

    latents: Int[np.ndarray, "n k"]
    cosines: Float[np.ndarray, "n k"]


@torch.inference_mode()
def nearest_directions(
    directions: Float[Tensor, "n d"],
    decoder: Float[Tensor, "d_sae d"],
    k: int = 1,
    exclude: Int[np.ndarray, " n"] | None = None,
) -> Nearest:
    """Among the rows of `decoder`, chunk by chunk; `exclude[i]` is never told for direction i.

    A row of zeros has cosine 0 with everything.
    """
    unit = torch.nn.functional.normalize(directions.float(), dim=-1).to(decoder.device)
    n, d_sae = len(unit), len(decoder)
    k = min(k, d_sae - (exclude is not None))
    step = max(k + 1, _CHUNK_BYTES // (4 * max(decoder.shape[1], n, 1)))
    values, ids = torch.zeros(n, 0), torch.zeros(n, 0, dtype=torch.long)
    for first in range(0, d_sae, step):
        part = torch.nn.functional.normalize(decoder[first : first + step].float(), dim=-1)
        cosines = (unit @ part.T).cpu()
        if exclude is not None:
            inside = np.flatnonzero((exclude >= first) & (exclude < first + len(part)))
            cosines[inside, exclude[inside] - first] = -torch.inf
        top = cosines.topk(min(k, len(part)), dim=-1)
        values = torch.cat([values, top.values], dim=-1)
        ids = torch.cat([ids, top.indices + first], dim=-1)
        best = values.topk(min(k, values.shape[1]), dim=-1)
        values, ids = best.values, ids.gather(-1, best.indices)
    return Nearest(ids.numpy(), values.double().numpy())


def cosine_by_chance(d: int, d_sae: int) -> float:
    """Cosine that the nearest of d_sae random directions in d dimensions rarely exceeds.

    With probability BY_CHANCE. The square of a random direction's cosine is distributed as
    Beta(1/2, (d - 1)/2).
    """
    if d < 2:
        return 1.0
    of_one = -np.expm1(np.log1p(-BY_CHANCE) / d_sae)
    return float(np.sqrt(special.betainccinv(0.5, (d - 1) / 2, 2 * of_one)))


@dataclass(frozen=True)
class Firing:
    """Which latents fire on which rows; `keys` name the rows, so that two runs' can be joined."""

    keys: pd.Index
    latents: Int[np.ndarray, " n"]
    fires: Bool[np.ndarray, "n_rows n"]


@dataclass(frozen=True)
class Cofiring:
    """Between latents of two SAEs, over the rows both have."""

    n_rows: int
    phi: Float[np.ndarray, "n m"]
    jaccard: Float[np.ndarray, "n m"]


def cofiring(first: Firing, second: Firing) -> Cofiring:
    """Phi (Pearson correlation of two yes-or-no variables) and Jaccard of firing.

    Phi is nan for a latent that fires on all of the shared rows or on none; Jaccard, the share of
    rows where both fire among those where either does, is nan where neither ever fires.
    """
    place = second.keys.get_indexer(first.keys)
    a, b = first.fires[place >= 0], second.fires[place[place >= 0]]
    n = len(a)
    both = a.T.astype(np.float64) @ b.astype(np.float64)
    n_a, n_b = a.sum(axis=0)[:, None].astype(np.float64), b.sum(axis=0)[None, :].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = (n * both - n_a * n_b) / np.sqrt(n_a * (n - n_a) * n_b * (n - n_b))
        jaccard = both / (n_a + n_b - both)
    return Cofiring(n, phi, jaccard)


def firing(activations: pd.DataFrame, rows: pd.DataFrame, split: str = "test") -> Firing:
    """From a run's activations.parquet and rows.parquet, on one split.

    The former has, latent after latent, a value for every row of the latter, in its order.
    """
    latents = activations["latent"].drop_duplicates().to_numpy(dtype=np.int64)
    n_rows = len(rows)
    assert len(activations) == n_rows * len(latents), "a value per latent and row"
    values = activations["value"].to_numpy().reshape(len(latents), n_rows).T
    keys = pd.MultiIndex.from_frame(rows[["example_id", "token_index", "text"]])
    chosen = (rows["split"] == split).fillna(False).to_numpy(dtype=bool) & ~keys.duplicated()
    return Firing(keys[chosen], latents, values[chosen] > THRESHOLD)
