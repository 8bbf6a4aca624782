"""sae-lens' own trainer, set up for a few steps on batches that are at hand."""

from types import ModuleType
from typing import Any


def lens_trainer(lens: ModuleType, model: Any, n_steps: int, batch_size: int) -> Any:
    """Adam with warm-up and decay; a latent is dead after two steps without firing."""
    from sae_lens.config import SAETrainerConfig

    cfg = SAETrainerConfig(
        total_training_samples=batch_size * n_steps,
        train_batch_size_samples=batch_size,
        lr=3e-3,
        lr_end=0.0,
        lr_warm_up_steps=3,
        lr_decay_steps=5,
        device="cpu",
        dead_feature_window=2,
        feature_sampling_window=1000,
    )
    return lens.training.sae_trainer.SAETrainer(cfg, model, iter(()))
