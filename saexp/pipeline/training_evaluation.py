"""The loss of the language model with SAEs spliced in, while they are trained."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saexp.analysis.evaluation import EvaluationSettings, can_be_scored, evaluate_saes, numbers
from saexp.config import RunConfig
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
