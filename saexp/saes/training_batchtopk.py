"""sae-lens' BatchTopK for training, arranged to take less time on a CPU.

The same latents are kept; losses and gradients agree to rounding. Decoder norms and b_dec are
brought to the weights instead of the batch, and only dead latents' columns enter their loss.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch import Tensor
from torch.nn import functional

__all__ = ["QuickBatchTopK", "QuickBatchTopKTrainingSAE"]


class QuickBatchTopK(BatchTopK):
    """The `k` largest activations per row of a batch, where they are positive.

    A partition finds the smallest one kept; of equal ones the first are. On other devices than a
    CPU sae-lens' own.
    """

    least: float | None = None
    """The smallest activation kept in the last batch; None where sae-lens' own looked for it."""

    def forward(self, x: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The activations, zero where not kept."""
        n = int(self.k * x.shape[:-1].numel())
        self.least = None
        if x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < n < x.numel():
            return super().forward(x)
        values = x.detach().numpy()
        ordered = np.partition(values, x.numel() - n, axis=None)
        least = ordered[-n]
        if not least > 0:
            return x.relu()
        self.least = float(least)
        kept = functional.threshold(x, float(np.nextafter(least, np.float32(0))), 0.0)
        if ordered[:-n].max() < least:
            return kept
        equal = np.flatnonzero(values == least)
        spare = torch.from_numpy(equal[np.count_nonzero(ordered[-n:] == least) :])
        return kept.flatten().index_fill(0, spare, 0.0).view_as(x)


class QuickBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """Saved as sae-lens saves it: JumpReLU with one threshold."""

    activation_fn: QuickBatchTopK

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """BatchTopK of `cfg.k`."""
        return QuickBatchTopK(self.cfg.k)

    def _norms(self) -> Float[Tensor, " d_sae"] | float:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else 1.0

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_sae"]]:
        """(activations, pre-activations), both times the decoder's norms where so configured."""
        bias = self.b_enc
        if self.cfg.apply_b_dec_to_input:
            bias = bias - self.b_dec @ self.W_enc
        norms = self._norms()
        hidden_pre = functional.linear(x.to(self.dtype), (self.W_enc * norms).T, bias * norms)
        return self.activation_fn(hidden_pre), hidden_pre

    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """The reconstruction."""
        norms = self._norms()
        rows = self.W_dec / norms[:, None] if isinstance(norms, Tensor) else self.W_dec
        return feature_acts @ rows + self.b_dec

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "... d_sae"]) -> None:
        """Move the running threshold towards the smallest positive activation."""
        if self.activation_fn.least is None:
            super().update_topk_threshold(acts_topk)
            return
        lr = self.cfg.topk_threshold_lr
        self.topk_threshold = (1 - lr) * self.topk_threshold + lr * self.activation_fn.least

    def calculate_topk_aux_loss(
        self,
        sae_in: Float[Tensor, "batch d_in"],
        sae_out: Float[Tensor, "batch d_in"],
        hidden_pre: Float[Tensor, "batch d_sae"],
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """Squared error of the dead latents' guess at the residual (Gao et al. 2024, A.2, B.1)."""
        if dead_neuron_mask is None or not bool(dead_neuron_mask.any()):
            return sae_out.new_tensor(0.0)
        dead = dead_neuron_mask.nonzero().flatten()
        most = sae_in.shape[-1] // 2
        acts = hidden_pre.index_select(-1, dead)
        if len(dead) > most:
            top = acts.topk(most, dim=-1, sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        rows: Any = self.W_dec.index_select(0, dead)
        if self.cfg.rescale_acts_by_decoder_norm:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        error = (acts @ rows - (sae_in - sae_out).detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / most, 1.0) * error
