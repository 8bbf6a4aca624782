"""What `task=train` is told about the SAE and its training."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saexp.config.values import at_least, one_of
from saexp.errors import ConfigError


@dataclass(kw_only=True)
class SAETrainerConfig:
    """An SAE or a transcoder to train; sae-lens' training classes and their own options."""

    name: str = MISSING
    """Architecture: standard, gated, topk, batchtopk, jumprelu, matryoshka_batchtopk; a transcoder:
    standard_transcoder, batchtopk_transcoder, jumprelu_transcoder, matryoshka_batchtopk_transcoder.
    """
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the architecture as sae-lens names them: k, l1_coefficient, l0_coefficient …; a
    transcoder has skip too."""
    normalize_activations: str = "expected_average_only_in"
    """Scaling of the streams while training (folded into the weights at the end), or `none`."""
    n_samples: int = 2_000_000
    """Activation vectors seen in training; the store is read again, shuffled anew, as often as
    needed."""
    batch_size: int = 1024
    """Activation vectors per step."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    lr_warm_up: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    lr_decay: float = 0.2
    """Share of the steps, at the end, in which it falls to 0."""
    sparsity_warm_up: float = 0.1
    """Share of the steps in which the sparsity coefficient rises from 0, where there is one."""
    dead_feature_window: int = 500
    """Steps without firing after which a latent counts as dead."""
    held_out: float = 0.1
    """Share of the texts that is not trained on; every reported number is of these."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed training goes on from the last one."""
    log_every: int = 25
    """Steps between logged numbers."""
    seed: int = 0
    """Seed of the initial weights, the data order and the held-out texts."""

    def __post_init__(self) -> None:
        scalings = ("none", "expected_average_only_in")
        one_of("sae_trainer.normalize_activations", self.normalize_activations, scalings)
        for name in ("n_samples", "batch_size", "checkpoint_every", "log_every"):
            at_least(f"sae_trainer.{name}", getattr(self, name), 1)
        for name in ("lr_warm_up", "lr_decay", "sparsity_warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"sae_trainer.{name}={getattr(self, name)} is no share of steps")
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"sae_trainer.held_out={self.held_out} leaves nothing to train on or to measure; "
                "type a share such as 0.1"
            )
