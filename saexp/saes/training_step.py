"""A training step that several processes make together.

The batch of a step is divided among the processes. Every loss is a mean over the rows of the batch,
so that the gradient of the whole batch is the mean of the processes' gradients, weighted by their
numbers of rows. What depends on the batch in other ways is combined too: the k n largest
activations of BatchTopK, and which latents were active. All processes then make the same update.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from saexp.distributed import ALONE, Processes


class SharedBatchTopK(BatchTopK):
    """Keeps the k n largest activations of the n rows of all processes, where they are positive.

    Of activations that equal the smallest of these, all are kept.
    """

    def __init__(self, k: float, processes: Processes) -> None:
        super().__init__(k)
        self.processes = processes
        self.least: float | None = None
        """The smallest activation kept in the last batch of all processes; None where none is."""

    def forward(self, x: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The activations, with zeros for those that are not kept."""
        acts = x.relu()
        (n_rows,) = self.processes.totals([x.shape[:-1].numel()])
        n = int(self.k * n_rows)
        # No process has more than all n of them.
        largest = acts.new_zeros(n)
        own = _largest(acts.detach().flatten(), n)
        largest[: len(own)] = own
        candidates = self.processes.joined(largest)
        kept = candidates.topk(n, sorted=False).values
        positive = kept[kept > 0]
        self.least = float(positive.min()) if len(positive) else None
        if self.least is None:
            return acts
        return torch.where(acts >= self.least, acts, torch.zeros_like(acts))


def _largest(values: Float[Tensor, " m"], n: int) -> Float[Tensor, " at_most_n"]:
    """The n largest values, or all where there are fewer, in any order."""
    if n >= len(values):
        return values
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.topk(n, sorted=False).values
    return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[len(values) - n :])


class Trainer(SAETrainer[Any, Any]):
    """sae-lens' trainer, whose batches may be parts of those of several processes."""

    def __init__(self, cfg: SAETrainerConfig, sae: Any, processes: Processes = ALONE) -> None:
        super().__init__(cfg, sae, iter(()))
        self.processes = processes
        self._n_rows = 0
        """Rows of the current batch, of all processes."""
        if processes.are_several and isinstance(sae.activation_fn, BatchTopK):
            sae.activation_fn = SharedBatchTopK(sae.cfg.k, processes)

    def step(self, batch: Float[Tensor, "rows d"]) -> TrainStepOutput:
        """One step with the rows of this process; the losses in its output are those of all."""
        if not self.processes.are_several:
            return super().step(batch)
        (self._n_rows,) = self.processes.totals([len(batch)])
        self.n_training_samples += self._n_rows
        return self._train_step(self.sae, self.activation_scaler(batch.to(self.sae.device)))

    def _train_step(self, sae: Any, sae_in: Float[Tensor, "rows d"]) -> TrainStepOutput:
        if not self.processes.are_several:
            return super()._train_step(sae, sae_in)
        sae.train()
        threshold = getattr(sae, "topk_threshold", None)
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=False,
                )
            )
        if isinstance(sae.activation_fn, SharedBatchTopK) and threshold is not None:
            self._update_threshold(sae, threshold)
        self._count_active(output.feature_acts.detach())
        if len(sae_in):
            (output.loss * (len(sae_in) / self._n_rows)).backward()
        self._add_gradients(sae)
        self._combine_losses(output, len(sae_in))
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def _update_threshold(self, sae: Any, threshold: Tensor) -> None:
        """Move BatchTopK's running threshold as if the batch were that of one process."""
        sae.topk_threshold = threshold
        if sae.activation_fn.least is not None:
            sae.update_topk_threshold(sae.W_dec.new_tensor([sae.activation_fn.least]))

    @torch.no_grad()
    def _count_active(self, feature_acts: Float[Tensor, "rows d_sae"]) -> None:
        if feature_acts.is_sparse:
            latents = feature_acts.indices()[1]
            own = torch.bincount(latents, minlength=feature_acts.shape[1]).float()
        else:
            own = feature_acts.bool().float().sum(0)
        n_active = self.processes.add(own)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[n_active > 0] = 0
        self.act_freq_scores += n_active
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    @torch.no_grad()
    def _add_gradients(self, sae: Any) -> None:
        """Sum the weighted gradients of all processes, in one exchange."""
        parameters = [p for p in sae.parameters() if p.requires_grad]
        for p in parameters:
            # Without rows a process has no gradients.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        parts = self.processes.add(flat).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)

    @torch.no_grad()
    def _combine_losses(self, output: TrainStepOutput, n_rows: int) -> None:
        values = [output.loss, *output.losses.values()]
        listed = [v() if callable(v) else v for v in values]
        own = torch.stack([torch.as_tensor(v, device=output.loss.device).double() for v in listed])
        # Those of no rows are not numbers.
        own = own * n_rows if n_rows else torch.zeros_like(own)
        output.loss, *losses = self.processes.add(own / self._n_rows)
        output.losses = dict(zip(output.losses, losses, strict=True))

    @torch.no_grad()
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        """sae-lens' numbers of the step; of several processes those of the whole batch."""
        if not self.processes.are_several:
            return super().build_train_step_log_dict(output, n_training_samples)
        x = output.sae_in.double()
        error = (output.sae_out.double() - x).pow(2).sum()
        acts = output.feature_acts
        n_active = (acts.values() if acts.is_sparse else acts).bool().sum()
        sums = [error, x.pow(2).sum(), n_active.double()]
        total = self.processes.add(torch.cat([torch.stack(sums), x.sum(0)])) / self._n_rows
        variance = total[1] - total[3:].pow(2).sum()
        return {
            "losses/overall_loss": float(output.loss),
            **{f"losses/{name}": float(loss) for name, loss in output.losses.items()},
            "metrics/l0": float(total[2]),
            "metrics/explained_variance": float(1 - total[0] / variance),
            "sparsity/dead_features": int(self.dead_neurons.sum()),
            "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
        }
