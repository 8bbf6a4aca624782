"""How active a latent may be on neutral text to count as selective, relative to its own SAE."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from saexp.config import AnalyzerConfig

PAPER = 0.02
"""The limit of Ferrando et al. 2024, for SAEs of 16k latents of which about 80 are active."""


@dataclass(frozen=True)
class DensityLimit:
    """Latents of this density on background tokens or a larger one are not selected."""

    value: float | None
    """None without background tokens: every latent passes."""
    how: str
    """The options that made it, for notes."""

    def exceeded(self, densities: pd.Series) -> pd.Series:
        """Which densities are too large; an unknown one is not."""
        return densities >= (np.inf if self.value is None else self.value)


def density_limit(densities: Float[np.ndarray, " d_sae"], cfg: AnalyzerConfig) -> DensityLimit:
    """From the densities of all latents of an SAE on background tokens.

    A fixed density means different things for different SAEs: the mean density is L0 / d_sae, 0.5%
    for 80 of 16 384, 0.8% for 32 of 4096 and 5% for 12 of 256 latents, and densities are heavy-
    tailed: the few densest latents are active on any text. So the limit is the
    `background_quantile` of the densities of the latents that are active at all on background
    tokens (dead ones would lower it), but never below the 2% of the paper, which SAEs of many
    latents would otherwise fall short of. `background_max` is an absolute limit instead.
    """
    live = densities[densities > 0]
    if cfg.background_max is not None:
        return DensityLimit(cfg.background_max, f"analyzer.background_max={cfg.background_max:g}")
    if np.isnan(densities).all():
        return DensityLimit(None, "no background tokens")
    quantile = float(np.quantile(live, cfg.background_quantile)) if len(live) else 0.0
    how = f"analyzer.background_quantile={cfg.background_quantile:g}, at least {PAPER:g}"
    return DensityLimit(max(quantile, PAPER), how)
