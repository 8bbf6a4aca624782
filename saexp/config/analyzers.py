"""One dataclass per analyzer. No torch here."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.environment import at_least, is_whole, one_of
from saexp.errors import ConfigError


@dataclass(kw_only=True)
class AnalyzerConfig:
    """How latents are compared between groups."""

    name: str = MISSING
    """Registry name."""
    alpha: float = 0.05
    """False discovery rate at which a latent counts as significant."""
    n_bootstrap: int = 1000
    """Resamples of the studentised bootstrap over entities, of means (stats, capability)."""
    background_quantile: float = 0.99
    """A latent is not selected if its density on background tokens is at or above this quantile of
    the densities of all latents that are active there, and at or above 0.02."""
    background_max: float | None = None
    """Absolute limit on that density instead of the quantile (0.02 in Ferrando et al. 2024)."""
    n_background: int = 4000
    """Random background tokens."""
    top_k: int = 10
    """Latents per direction marked `selected`."""
    match_tokens: bool = True
    """Resample entities to equal token counts where those of the groups differ."""
    scores: bool = True
    """Input and output scores of the selected latents (Arad et al. 2025)."""
    attribution: bool = False
    """Effect of each latent on the answer's logit, direct and by gradient."""
    placebo: int = 0
    """Permutations of the group labels, and random latents, with which the contrast is repeated to
    estimate how often its claim would be made by chance. 0: none."""
    seed: int = 0
    """Seed of every random choice: rows, background tokens, folds, resamples, placebo."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"analyzer.alpha={self.alpha} is not a rate; type one such as 0.05")
        at_least("analyzer.n_bootstrap", self.n_bootstrap, 0)
        at_least("analyzer.n_background", self.n_background, 1)
        at_least("analyzer.top_k", self.top_k, 1)
        at_least("analyzer.placebo", self.placebo, 0)
        at_least("analyzer.seed", self.seed, 0)
        for name in ("background_quantile", "background_max"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"analyzer.{name}={value} is not a fraction; type 0 to 1")


@dataclass(kw_only=True)
class CustomAnalyzerConfig(AnalyzerConfig):
    """An analyzer that was registered without a config class."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the analyzer, not validated."""


@dataclass(kw_only=True)
class CapabilityConfig(AnalyzerConfig):
    """Ranks and probabilities of each prompt's answer, without and with the SAE spliced in."""

    n_top: int = 10
    """Most likely next tokens that the report shows."""
    batch_tokens: int = 8192
    """Tokens per batch of prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("analyzer.n_top", self.n_top, 1)
        at_least("analyzer.batch_tokens", self.batch_tokens, 1)


@dataclass(kw_only=True)
class ProbeConfig(AnalyzerConfig):
    """Sparse probes on k latents, beside a dense probe on the activations."""

    k: Any = field(default_factory=lambda: [1, 2, 5, 20])
    """Numbers of latents that the sparse probes use, one or a list."""
    strengths: Any = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0, 10.0])
    """Inverse L2 penalties to choose from, one or a list."""
    max_train: int = 20_000
    """Most rows that the probes are trained on (seeded choice)."""
    transfer: str | None = None
    """File of a second data set of the same two groups, on which the probes are tested too."""
    within: Any = None
    """Columns (one or a list) that define strata: AUROCs over pairs of one stratum are added."""
    unseen: Any = None
    """Column: test rows are also scored by probes trained on rows with other values of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            if not is_whole(size, 1):
                raise ConfigError(
                    f"analyzer.k={size} is not a whole number of at least 1; type e.g. analyzer.k=5"
                )
        strengths = self.strengths if isinstance(self.strengths, list) else [self.strengths]
        if not strengths or not all(
            isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in strengths
        ):
            raise ConfigError(
                f"analyzer.strengths={strengths} must be numbers above 0 (inverse L2 penalties), "
                "such as [0.01,0.1,1]"
            )
        at_least("analyzer.max_train", self.max_train, 4)

    @property
    def sizes(self) -> list[Any]:
        """`k` as a list."""
        return self.k if isinstance(self.k, list) else [self.k]

    @property
    def penalties(self) -> list[float]:
        """`strengths` as a list of floats."""
        return [
            float(c)
            for c in (self.strengths if isinstance(self.strengths, list) else [self.strengths])
        ]


@dataclass(kw_only=True)
class StatsConfig(AnalyzerConfig):
    """Sparsity, activation values and the most frequent latents of each group."""

    top_k: int = 10
    """Most frequent latents that are compared between the groups."""
    n_bins: int = 60
    """Bins of the histogram of activation values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("analyzer.n_bins", self.n_bins, 2)


RANKINGS = ("max", "mean", "frequency")


@dataclass(kw_only=True)
class TopFeaturesConfig(AnalyzerConfig):
    """The latents with the largest activations, layer by layer."""

    top_k: int = 10
    """Latents per layer."""
    by: str = "max"
    """What latents are ranked by: max, mean or frequency."""
    n_texts: int = 3
    """Texts per latent that are shown token by token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("analyzer.by", self.by, RANKINGS)
        at_least("analyzer.n_texts", self.n_texts, 1)
