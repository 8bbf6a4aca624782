"""One step of a training: sums over the active latents, and steps that several processes make.

sae-lens multiplies activations `[batch, d_sae]` of which k per row are not 0, five times per step.
Here the pre-activations alone are such a product, s = (x - b_dec) W_enc + b_enc. Of the active
latents A, the reconstruction is sum_{j in A} relu(s_j) W_dec[j] + b_dec: the decoder norms of
`rescale_acts_by_decoder_norm` determine A and the reported activations, and cancel in
(relu(s_j) |W_dec[j]|) (W_dec[j] / |W_dec[j]|). Its gradients are sums over the active latents too.
Results differ from sae-lens' by float32 rounding: the same sums in another order.

Of several processes, each has a part of the batch. Every loss is a mean over the rows of the batch,
so that the gradient of the whole batch is the mean of the processes' gradients, weighted by their
numbers of rows. What depends on the batch in other ways is combined too: the k n largest
activations of BatchTopK, and which latents were active. All processes then make the same update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn import functional

from saexp.context import keep_freed_memory
from saexp.distributed import ALONE, Processes

SPARSE_RATIO = 8
"""Sums over active latents are used where d_sae is at least this times k; where more latents are
active, dense products are about as fast."""


class Active(NamedTuple):
    """The active latents of a batch: those that are selected and positive, row by row."""

    rows: Int[Tensor, " n_active"]
    latents: Int[Tensor, " n_active"]
    starts: Int[Tensor, " batch"]
    """Index of the first active latent of each row."""

    @classmethod
    def of(cls, indices: Int[Tensor, " n_active"], shape: torch.Size) -> "Active":
        """From ascending indices into a flattened `[batch, d_sae]`."""
        batch, d_sae = shape
        rows = indices.div(d_sae, rounding_mode="floor")
        counts = torch.bincount(rows, minlength=batch)
        return cls(rows, indices - rows * d_sae, counts.cumsum(0) - counts)


class SparseReconstruction(torch.autograd.Function):
    """Weights and the active latents of a batch -> the sum of active decoder rows + b_dec."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],  # noqa: ARG004
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        x: Float[Tensor, "batch d_in"],
        active: Active,
        acts: Float[Tensor, " n_active"],
        subtracts: bool,  # noqa: FBT001
    ) -> Float[Tensor, "batch d_in"]:
        """`acts` are the s of the active latents; `subtracts`: the encoder reads x - b_dec."""
        ctx.save_for_backward(x - b_dec if subtracts else x, W_enc, W_dec, acts, *active)
        ctx.subtracts = subtracts
        return _weighted_sums(W_dec, active.latents, active.starts, acts) + b_dec

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights."""
        (grad,) = grads
        read, W_enc, W_dec, acts, *indices = ctx.saved_tensors
        active = Active(*indices)
        weights = acts.detach().requires_grad_()
        with torch.enable_grad():
            out = _weighted_sums(W_dec.detach(), active.latents, active.starts, weights)
        (grad_acts,) = torch.autograd.grad(out, weights, grad)
        order = torch.argsort(active.latents, stable=True)
        rows, counts = active.rows[order], torch.bincount(active.latents, minlength=len(W_dec))
        starts = counts.cumsum(0) - counts
        grad_W_dec = _weighted_sums(grad, rows, starts, acts[order])
        grad_W_enc = _weighted_sums(read, rows, starts, grad_acts[order]).T.contiguous()
        grad_b_enc = grad_acts.new_zeros(len(W_dec)).index_add_(0, active.latents, grad_acts)
        grad_b_dec = grad.sum(0)
        if ctx.subtracts:
            grad_b_dec -= W_enc @ grad_b_enc
        return grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None, None, None


def _weighted_sums(
    vectors: Float[Tensor, "m width"],
    indices: Int[Tensor, " n"],
    starts: Int[Tensor, " bags"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, "bags width"]:
    """For each bag, which begins at `starts`: the sum of weights times vectors."""
    return functional.embedding_bag(
        indices, vectors, starts, mode="sum", per_sample_weights=weights
    )


_PER_GROUP, _GROUPS_PER_K = 16, 4
"""Values of a group at most, and groups for each selected value at least."""


def largest_of_rows(values: Float[np.ndarray, "n width"], k: int) -> Int[np.ndarray, " m"]:
    """Ascending indices into the flattened `values` of each row's k largest, where positive, and of
    all that equal the k-th.

    The k-th largest maximum of groups of columns is at most the k-th largest value, because k
    groups reach it. Only the few values that are not below it are partitioned.
    """
    width = values.shape[1]
    n_groups = width // max(1, min(_PER_GROUP, width // (_GROUPS_PER_K * k)))
    maxima = values[:, :n_groups].copy()
    for start in range(n_groups, width - n_groups + 1, n_groups):
        np.maximum(maxima, values[:, start : start + n_groups], out=maxima)
    maxima.partition(n_groups - k, axis=1)
    bounds = np.maximum(maxima[:, n_groups - k, None], np.nextafter(np.float32(0), 1))
    indices = np.flatnonzero(values >= bounds)
    rows = indices // width
    counts = np.bincount(rows, minlength=len(values))
    if counts.max() <= k:
        return indices
    columns = np.arange(len(indices)) - (counts.cumsum() - counts)[rows]
    candidates = np.full((len(values), counts.max()), -np.inf, dtype=np.float32)
    candidates[rows, columns] = chosen = values.reshape(-1)[indices]
    candidates.partition(candidates.shape[1] - k, axis=1)
    return indices[chosen >= candidates[rows, -k]]


class QuickTopKTrainingSAE(TopKTrainingSAE):
    """TopK with sums over the active latents, where these are few, on the CPU in float32."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step; `feature_acts` of the output are a sparse tensor where the sums are sparse."""
        x: Tensor = step_input.sae_in
        if not self._is_sparse(x):
            return super().training_forward_pass(step_input)
        subtracts = self.cfg.apply_b_dec_to_input
        with torch.no_grad():
            pre = torch.addmm(self.b_enc, x - self.b_dec if subtracts else x, self.W_enc)
            # Of bfloat16 under autocast, the one product that is; the sums stay in float32.
            pre = pre.to(self.dtype)
            scored = pre * self.W_dec.norm(dim=-1) if self._rescales else pre
            indices = self.active_indices(scored)
            active = Active.of(indices, pre.shape)
            acts, reported = pre.flatten()[indices], scored.flatten()[indices]
        out = SparseReconstruction.apply(
            self.W_enc, self.b_enc, self.W_dec, self.b_dec, x, active, acts, subtracts
        )
        mse_loss = self.mse_loss_fn(out, x).sum(dim=-1).mean()
        aux_loss = self.calculate_topk_aux_loss(x, out, scored, step_input.dead_neuron_mask)
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=torch.sparse_coo_tensor(
                torch.stack([active.rows, active.latents]),
                reported,
                pre.shape,
                is_coalesced=True,
                check_invariants=False,
            ),
            hidden_pre=scored,
            loss=mse_loss + aux_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
        )

    @property
    def _rescales(self) -> bool:
        return self.cfg.rescale_acts_by_decoder_norm

    def _is_sparse(self, x: Tensor) -> bool:
        return (
            x.ndim == 2
            and not x.requires_grad
            and x.device.type == "cpu"
            and x.dtype == self.W_enc.dtype == torch.float32
            and self.cfg.k * SPARSE_RATIO <= self.cfg.d_sae
            and not torch.compiler.is_compiling()
        )

    def active_indices(self, scored: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " n"]:
        """Indices into the flattened pre-activations of each row's k largest, where positive."""
        indices = largest_of_rows(scored.numpy(), k := int(self.cfg.k))
        if len(indices) <= k * len(scored):
            return torch.from_numpy(indices)
        # More than k of a row, of which some are equal.
        top = scored.topk(k, dim=-1, sorted=False)
        first = torch.arange(len(scored))[:, None] * scored.shape[1]
        return (top.indices + first)[top.values > 0].sort().values

    def calculate_topk_aux_loss(
        self,
        sae_in: Float[Tensor, "batch d_in"],
        sae_out: Float[Tensor, "batch d_in"],
        hidden_pre: Float[Tensor, "batch d_sae"],
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """As sae-lens'; pre-activations without a gradient are computed again where latents are
        dead."""
        if hidden_pre.requires_grad or not torch.is_grad_enabled():
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        return self.dead_latents_loss(sae_in, sae_out, None, dead_neuron_mask)

    def dead_latents_loss(
        self,
        sae_in: Float[Tensor, "batch d_in"],
        sae_out: Float[Tensor, "batch d_in"],
        hidden_pre: Float[Tensor, "batch d_sae"] | None,
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """Squared error of dead latents that predict the residual (Gao et al. 2024, A.2, B.1)."""
        if dead_neuron_mask is None or not bool(dead_neuron_mask.any()):
            return sae_out.new_tensor(0.0)
        dead = dead_neuron_mask.nonzero().flatten()
        max_dead = sae_in.shape[-1] // 2
        rows: Tensor = self.W_dec.index_select(0, dead)
        norms = rows.norm(dim=-1) if self._rescales else None
        if hidden_pre is not None:
            acts = hidden_pre.index_select(-1, dead)
        else:
            x = sae_in - self.b_dec if self.cfg.apply_b_dec_to_input else sae_in
            acts = torch.addmm(self.b_enc[dead], x, self.W_enc.index_select(1, dead))
            acts = acts if norms is None else acts * norms
        if len(dead) > max_dead:
            top = acts.topk(max_dead, dim=-1, sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        if norms is not None:
            rows = rows / norms[:, None]
        error = (acts @ rows - (sae_in - sae_out).detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / max_dead, 1.0) * error


class QuickBatchTopK(BatchTopK):
    """Keeps the k * n largest activations of a batch of n rows, where positive, and of equal ones
    the first. On devices other than the CPU, sae-lens' implementation is used."""

    least: float | None = None
    """The smallest activation kept in the last batch; None where sae-lens' code selected them."""

    def forward(self, x: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """The activations, with zeros for those that are not kept."""
        self.least, n = None, int(self.k * x.shape[:-1].numel())
        if x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < n < x.numel():
            return super().forward(x)
        values = x.detach().reshape(-1, x.shape[-1])
        top = self.indices(values)
        if self.least is None:
            return x.relu()
        below = np.nextafter(np.float32(self.least), np.float32(0))
        largest = functional.threshold(x, float(below), 0.0)
        equal = (values.flatten() == self.least).nonzero().flatten()
        excess = equal[~torch.isin(equal, top)]
        return largest.flatten().index_fill(0, excess, 0.0).view_as(x) if len(excess) else largest

    def indices(self, x: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " n"]:
        """Indices into the flattened `x` of what is kept and positive; `x` as `forward` takes it,
        on the CPU."""
        n, values = int(self.k * len(x)), x.numpy().reshape(-1)
        self.least = None
        if not 0 < n < len(values):
            return torch.from_numpy(np.flatnonzero(values > 0) if n else np.empty(0, np.int64))
        top = largest_of_rows(values[None], n)
        if len(top) < n:
            return torch.from_numpy(top)
        self.least = float(values[top].min())
        if len(top) > n:
            # Of equal activations, the first are kept.
            equal = np.flatnonzero(values[top] == self.least)
            top = np.delete(top, equal[len(equal) - (len(top) - n) :])
        return torch.from_numpy(top)


class QuickBatchTopKTrainingSAE(BatchTopKTrainingSAE, QuickTopKTrainingSAE):
    """BatchTopK on the CPU; saved as by sae-lens, as a JumpReLU SAE with one threshold."""

    activation_fn: QuickBatchTopK

    def _is_sparse(self, x: Tensor) -> bool:
        # Several processes select together (SharedBatchTopK).
        return isinstance(self.activation_fn, QuickBatchTopK) and super()._is_sparse(x)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """BatchTopK of `cfg.k`."""
        return QuickBatchTopK(self.cfg.k)

    def _norms(self) -> Float[Tensor, " d_sae"] | float:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else 1.0

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_sae"]]:
        """(activations, pre-activations), times the decoder's norms if configured."""
        bias = self.b_enc
        if self.cfg.apply_b_dec_to_input:
            bias = bias - self.b_dec @ self.W_enc
        norms = self._norms()
        hidden_pre = functional.linear(x.to(self.dtype), (self.W_enc * norms).T, bias * norms)
        # Of bfloat16 under autocast.
        hidden_pre = hidden_pre.to(self.dtype)
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

    def active_indices(self, scored: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " n"]:
        """Indices into the flattened pre-activations of the k * batch largest, where positive."""
        return self.activation_fn.indices(scored)

    def calculate_topk_aux_loss(
        self,
        sae_in: Float[Tensor, "batch d_in"],
        sae_out: Float[Tensor, "batch d_in"],
        hidden_pre: Float[Tensor, "batch d_sae"],
        dead_neuron_mask: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """As sae-lens', with products of the dead latents alone."""
        pre = hidden_pre if hidden_pre.requires_grad else None
        return self.dead_latents_loss(sae_in, sae_out, pre, dead_neuron_mask)


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
        top_values = candidates.topk(n, sorted=False).values
        positive = top_values[top_values > 0]
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
    """sae-lens' trainer, whose batches may be parts of those of several processes.

    A step of one process is sae-lens', but that active latents are counted without sums of sparse
    tensors, and that TopK and BatchTopK use Adam's fused update on the CPU.
    """

    def __init__(self, cfg: SAETrainerConfig, sae: Any, processes: Processes = ALONE) -> None:
        super().__init__(cfg, sae, iter(()))
        if sae.device.type == "cpu":
            keep_freed_memory()
            if isinstance(sae, QuickTopKTrainingSAE):
                for group in self.optimizer.param_groups:
                    group["fused"] = True
        self.processes = processes
        self._n_rows = 0
        """Rows of the current batch, of all processes."""
        if processes.are_several and isinstance(sae.activation_fn, BatchTopK):
            sae.activation_fn = SharedBatchTopK(sae.cfg.k, processes)

    def step(self, batch: Float[Tensor, "rows d"]) -> TrainStepOutput:
        """One step with the rows of this process; the losses in its output are those of all."""
        (self._n_rows,) = self.processes.totals([len(batch)])
        self.n_training_samples += self._n_rows
        return self._train_step(self.sae, self.activation_scaler(batch.to(self.sae.device)))

    def _train_step(self, sae: Any, sae_in: Float[Tensor, "rows d"]) -> TrainStepOutput:
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
        if not self.processes.are_several:
            output.loss.backward()
        else:
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
