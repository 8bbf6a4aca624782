"""The loss of the language model with SAEs spliced in, while they are trained, and notes where the
numbers on held-out positions are not those that the training ended with."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saexp.analysis.evaluation import EvaluationSettings, can_be_scored, evaluate_saes, numbers
from saexp.config import RunConfig, SAETrainerConfig
from saexp.models.loading import LanguageModel
from saexp.pipeline.training_data import TrainingData
from saexp.saes.loading import load_sae
from saexp.saes.training import Training

N_EVALUATED = 8192
"""Largest number of held-out tokens of one evaluation."""
NAMES = {
    "train/ce_loss_score": "reconstruction/ce_loss_score",
    "train/held_out_l0": "sparsity/l0",
}
"""Number of a training record -> metric of task=evaluate."""
_FAR = 1.5
"""A note reports a held-out L0 that differs from k, or from the curve's L0, by this factor."""
_DIFFERENT = 0.15
"""A note reports a difference of explained variances or dead fractions above this."""
_CURVE = {
    "l0": "sparsity/l0",
    "explained_variance": "reconstruction/explained_variance",
    "dead_fraction": "sparsity/dead_fraction",
}
"""Name of a training curve -> metric of the same quantity on held-out positions."""


class HeldOutEvaluation:
    """Evaluates SAEs of a pass as they are, on held-out text that is the same each time."""

    def __init__(self, cfg: RunConfig, model: LanguageModel, data: TrainingData) -> None:
        self.cfg, self.model, self.data = cfg, model, data
        self.settings = EvaluationSettings(
            batch_tokens=cfg.store.batch_tokens,
            ablations=("zero",),
            max_norm_ratio=cfg.positions.max_norm_ratio,
        )
        texts = [t for t in data.evaluation_texts() if can_be_scored(t, self.settings.where)]
        order = np.random.default_rng(cfg.seed).permutation(len(texts))
        n_tokens = np.cumsum([len(texts[i]) for i in order])
        n = max(1, int(np.searchsorted(n_tokens, N_EVALUATED, side="right")))
        self.texts = [texts[i] for i in order[:n]]

    @property
    def is_possible(self) -> bool:
        """Whether there is text, and the model predicts tokens."""
        return bool(self.texts) and self.model.hf.get_output_embeddings() is not None

    def __call__(self, trainings: Sequence[Training]) -> list[dict[str, float]]:
        """`train/…` numbers of each; one that is not defined is left out."""
        with tempfile.TemporaryDirectory(prefix="saexp-") as folder:
            saes = []
            for number, training in enumerate(trainings):
                place = Path(folder) / str(number)
                place.mkdir()
                training.snapshot(place)
                saes.append(load_sae(place).to(self.model.device))
        evaluations = evaluate_saes(self.model, saes, self.texts, self.settings)
        self.data.n_evaluated += sum(map(len, self.texts))
        results = []
        for evaluation in evaluations:
            measured = numbers(evaluation, 0, self.cfg.seed)
            values = {name: measured[metric] for name, metric in NAMES.items()}
            results.append(
                {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
            )
        return results


def off_target(trainer: SAETrainerConfig, l0: float | int | None) -> list[str]:
    """A note where a BatchTopK SAE has a held-out L0 far from its k."""
    k = trainer.options.get("k")
    if not k or not l0 or "batchtopk" not in trainer.name or k / _FAR <= l0 <= k * _FAR:
        return []
    return [
        f"L0 is {l0:.1f} on held-out positions, where k is {k:g}: the threshold that stands in for "
        "the k largest of a batch is an average over the training and has not converged; train "
        "longer (sae_trainer.n_samples)"
    ]


def off_curve(
    last: Mapping[str, float | int],
    measured: Mapping[str, float | None],
    n_steps: int,
    dead_window: int,
    *,
    l0_reported: bool = False,
) -> list[str]:
    """A note where held-out numbers differ from the end of the training curve.

    `last` is the curve's last record; L0 is left out where another note reports it
    (`l0_reported`). The curve's dead fraction is 0 during the first `dead_window` steps.
    """
    differences = []
    for name, key in _CURVE.items():
        here, there = measured[key], last[f"train/{name}"]
        if here is None:
            continue
        if name == "l0":
            differs = not l0_reported and not there / _FAR <= here <= there * _FAR
        else:
            differs = abs(here - there) > _DIFFERENT
        if differs:
            differences.append(
                f"{name.replace('_', ' ')} {here:.3g}, the curve ends at {there:.3g}"
            )
    if not differences:
        return []
    short = f", more than the {n_steps} of this training" if n_steps <= dead_window else ""
    return [
        f"{measured['sparsity/n_positions']:,} held-out positions disagree with the training "
        f"curve: {'; '.join(differences)} (of the last batch; there a latent is dead after "
        f"sae_trainer.dead_feature_window={dead_window} inactive steps{short}); the held-out "
        "numbers count, and more or more varied texts bring them closer"
    ]
