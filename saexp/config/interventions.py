"""The config group of causal tests. No torch here."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.values import at_least, one_of, parse_coefficients, parse_layers
from saexp.errors import ConfigError

PLACES = ("all", "entity", "entity_last", "entity_to_end", "last", "prompt", "generated")
UNITS = ("raw", "max_act", "p99_act", "resid_norm")
DIRECTIONS = ("latents", "mean_difference", "probe", "random")
RULES = ("always", "active", "at_least")


@dataclass(kw_only=True)
class InterventionConfig:
    """A causal test: what is changed, where, how strongly, and what is looked at."""

    name: str = MISSING
    """Registry name: `none` runs no causal test."""
    latents: Any = "selected"
    """`selected` by the contrast, or a list of latent indices."""
    top_k: int = 4
    """How many selected latents per direction are tested as a group."""
    min_output_score: float | None = None
    """Test selected latents only that score at least this on output (Arad et al. 2025)."""
    directions: list[str] = field(default_factory=lambda: ["latents"])
    """What is written or removed: latents, mean_difference, probe, random; several at once."""
    layers: Any = None
    """Layers that are changed, a list or all, where an intervention can (steer, patch, …)."""
    rule: str = "always"
    """clamp: move a latent always, only where it is active, or raise it to at_least its target."""
    values: list[float] | None = None
    """clamp: targets of named latents, instead of their mean in the other group."""
    error: bool = False
    """splice: add back what the reconstruction misses."""
    streams: list[str] = field(default_factory=lambda: ["resid_post"])
    """patch: streams that are tried: resid_post, attn_out, mlp_out, attn_z."""
    heads: Any = None
    """patch: heads of attn_z that are tried one by one, a list or all."""
    embedding: bool = False
    """orthogonalize: take the directions out of the embeddings too."""
    unit: str = "resid_norm"
    """Unit of the coefficient: raw, max_act, p99_act or resid_norm (the stream's mean norm)."""
    default_coefficients: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6, 0.9])
    """Coefficients used when `coefficient` is not given."""
    coefficient: Any = None
    """Strength, a number or a list."""
    where: str = "entity_last"
    """Tokens changed: all, entity, entity_last, entity_to_end, last, prompt, generated, or any
    option of the positions group."""
    where_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that positions option, such as {n: 2}."""
    n_controls: int = 10
    """Controls per condition, matched in firing frequency and decoder norm."""
    n_prompts: int = 100
    """Prompts per group, from the test split (seeded choice)."""
    n_choice_prompts: int = 40
    """Prompts per group from the train split, on which the coefficient told first is chosen."""
    max_new_tokens: int = 30
    """Longest generation in tokens."""
    temperature: float = 0.0
    """Sampling temperature, seeded per prompt; 0 takes the likeliest token."""
    outcomes: list[str] = field(default_factory=lambda: ["refusal"])
    """What is scored, registry names of kind `outcome`."""
    n_neutral: int = 10
    """Neutral texts on which the cost is measured (outcome neutral_kl)."""
    batch_tokens: Any = "auto"
    """Tokens per batch of prompts, padding included; auto: what keeps the KV cache in 2 GiB, at
    most 65536."""
    seed: int = 0
    """Seed of the choice of prompts and controls."""

    def __post_init__(self) -> None:
        one_of("intervention.unit", self.unit, UNITS)
        one_of("intervention.rule", self.rule, RULES)
        if not self.directions:
            raise ConfigError(
                "intervention.directions is empty; choose from " + ", ".join(DIRECTIONS)
            )
        for direction in self.directions:
            one_of("intervention.directions", direction, DIRECTIONS)
        for key, least in (("n_controls", 0), ("n_prompts", 1), ("n_choice_prompts", 0)):
            at_least(f"intervention.{key}", getattr(self, key), least)
        for key in ("max_new_tokens", "top_k", "n_neutral"):
            at_least(f"intervention.{key}", getattr(self, key), 1)
        if self.batch_tokens != "auto":
            if not str(self.batch_tokens).isdecimal():
                raise ConfigError(
                    f"intervention.batch_tokens={self.batch_tokens} is no number; type auto, or "
                    "8192"
                )
            at_least("intervention.batch_tokens", int(self.batch_tokens), 1)
        at_least("intervention.temperature", self.temperature, 0)
        if self.coefficient is not None:
            parse_coefficients(self.coefficient)
        if self.layers is not None and self.layers != "all":
            parse_layers(self.layers)
            self.layers = list(self.layers) if isinstance(self.layers, list) else [self.layers]
        self._check_latents()

    def _check_latents(self) -> None:
        if self.latents != "selected":
            wrong = not isinstance(self.latents, list) or not self.latents
            if wrong or not all(isinstance(i, int) and i >= 0 for i in self.latents):
                raise ConfigError(
                    f"intervention.latents={self.latents} names no latents; "
                    "type selected or a list such as '[1234,77]'"
                )
        if self.values is not None:
            n = len(self.latents) if isinstance(self.latents, list) else 0
            if len(self.values) != n:
                raise ConfigError(
                    f"intervention.values has {len(self.values)} targets for {n} named latents; "
                    "name as many in intervention.latents"
                )
