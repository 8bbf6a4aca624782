"""The same numbers as sae-lens' `run_evals` on the same tokens of the shipped model.

Where sae-lens does otherwise, saexp is asked for the same: it ablates special tokens too
(`ablate_special`), and says nothing of mean ablation. Both splice at and score predictions made at
all but special tokens; sae-lens also scores a special token that follows an ordinary one, of which
these tokens have none. Its KL is over the same positions, each text's last included.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import saexp
from saexp.analysis.evaluation import EvaluationSettings, densities, evaluate_saes, numbers
from saexp.analysis.evaluation_passes import Where
from saexp.data.tokenization import TokenizedText

ASSETS = Path(saexp.__file__).parent / "assets" / "tiny"
LAYER, N_TEXTS, N_TOKENS = 1, 12, 64
NAMES = {
    "reconstruction/ce_clean": "model_performance_preservation/ce_loss_without_sae",
    "reconstruction/ce_sae": "model_performance_preservation/ce_loss_with_sae",
    "reconstruction/ce_zero": "model_performance_preservation/ce_loss_with_ablation",
    "reconstruction/ce_loss_score": "model_performance_preservation/ce_loss_score",
    "reconstruction/kl_sae": "model_behavior_preservation/kl_div_with_sae",
    "reconstruction/kl_zero": "model_behavior_preservation/kl_div_with_ablation",
    "reconstruction/kl_score": "model_behavior_preservation/kl_div_score",
    "reconstruction/explained_variance": "reconstruction_quality/explained_variance",
    "reconstruction/explained_variance_legacy": "reconstruction_quality/explained_variance_legacy",
    "reconstruction/mse": "reconstruction_quality/mse",
    "reconstruction/cosine": "reconstruction_quality/cossim",
    "reconstruction/l2_ratio": "shrinkage/l2_ratio",
    "reconstruction/relative_bias": "shrinkage/relative_reconstruction_bias",
    "sparsity/l0": "sparsity/l0",
}


class SameTokens:
    """What `run_evals` asks of an activation store: these tokens, as one batch."""

    store_batch_size_prompts, context_size = N_TEXTS, N_TOKENS

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def get_batch_tokens(self, _n: int) -> torch.Tensor:
        return self.tokens

    def reset_input_dataset(self) -> None:
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_same_tokens_same_numbers() -> None:
    from sae_lens import SAE as LensSAE
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    cfg = saexp.compose(["device=cpu"])
    model = saexp.build("model", cfg.model)
    folder = ASSETS / "sae" / f"layer_{LAYER}" / "width_256"
    stream = torch.tensor(
        [
            i
            for line in (ASSETS / "background.txt").read_text("utf-8").splitlines()
            for i in model.tokenizer(line, add_special_tokens=False)["input_ids"]
        ]
    )
    rows = stream[: N_TEXTS * (N_TOKENS - 1)].view(N_TEXTS, N_TOKENS - 1)
    tokens = torch.cat([torch.full((N_TEXTS, 1), model.tokenizer.bos_token_id), rows], dim=1)

    theirs = LensSAE.load_from_disk(folder, device="cpu")
    hook_name = f"model.layers.{LAYER}"
    theirs.cfg.metadata.hook_name = hook_name
    proxy = HookedProxyLM(model.hf, model.tokenizer, hook_names=[hook_name])
    metrics, per_latent = run_evals(
        theirs,
        SameTokens(tokens),
        proxy,
        ActivationScaler(),
        get_eval_everything_config(N_TEXTS, 1, 1),
    )
    for module in model.hf.modules():
        module._forward_hooks.clear()

    spans, special = ((0, 0),) * N_TOKENS, (True, *(False,) * (N_TOKENS - 1))
    texts = [TokenizedText("", tuple(r), spans, special, False) for r in tokens.tolist()]
    settings = EvaluationSettings(where=Where(ablate_special=True))
    (one,) = evaluate_saes(model, [saexp.load_sae(folder)], texts, settings)
    got = numbers(one, 0, 0)
    flat = {f"{group}/{name}": v for group, of in metrics.items() for name, v in of.items()}
    expected = {ours: flat[name] for ours, name in NAMES.items()}
    assert {k: got[k] for k in NAMES} == pytest.approx(expected, rel=2e-4, abs=1e-6)
    frequency = densities(one)["frequency"].to_numpy()
    np.testing.assert_allclose(frequency, per_latent["feature_density"], rtol=1e-5)
    assert got["sparsity/dead_fraction"] == np.mean(np.array(per_latent["feature_density"]) == 0)
