"""sae-lens' training classes with another stream as their target: it has none for transcoders.

A batch is `[batch, d_in + d_out]`: what is read, then what is to be predicted. The encoder, the
sparsity penalties, the loss for dead latents and the trainer are sae-lens' own; saved, they are its
`transcoder`, `jumprelu_transcoder` and the two with a skip connection.

Dunefsky et al. 2024, Transcoders Find Interpretable LLM Feature Circuits; the linear skip
connection of Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoderConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoderConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TranscoderConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from sae_lens import SAEConfig

# To the type checker anything: they are mixed into four classes with nothing typed in common.
_Config: Any = object
_Base: Any = object


@dataclass(kw_only=True)
class _Target(_Config):
    """Fields that a transcoder has beside those of an SAE's training class."""

    d_out: int = 0
    """Width of the stream that is predicted."""
    skip: bool = False
    """Whether a linear map of the input, learned too, is added to the output."""
    apply_b_dec_to_input: bool = False
    """b_dec belongs to the output."""

    @classmethod
    def architecture(cls) -> str:
        return f"{super().architecture()}_transcoder"

    def get_inference_config_class(self) -> "type[SAEConfig]":
        if isinstance(self, StandardTrainingSAEConfig):
            return SkipTranscoderConfig if self.skip else TranscoderConfig
        return JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig


class _Transcoding(_Base):
    """What is read is sae-lens' `sae_in`; wherever it compares with `sae_in`, the target is put.

    `W_skip [d_out, d_in]`, 0 at first, is there where `cfg.skip` says so.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.mse_loss_fn = self._squared_error

    def initialize_weights(self) -> None:
        """The encoder as sae-lens makes it; decoder rows random, of the norm asked for."""
        super().initialize_weights()
        about = {"dtype": self.dtype, "device": self.device}
        decoder = torch.empty(self.cfg.d_sae, self.cfg.d_out, **about)
        nn.init.kaiming_uniform_(decoder)
        if self.cfg.decoder_init_norm is not None:
            decoder *= self.cfg.decoder_init_norm / decoder.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_out, **about))
        if self.cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.cfg.d_out, self.cfg.d_in, **about))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Of a batch of both streams, what is read; b_dec, of the other width, stays out of it."""
        return self.hook_sae_input(sae_in[..., : self.cfg.d_in].to(self.dtype))

    def _skipped(self, pair: Tensor) -> Tensor | float:
        return pair[..., : self.cfg.d_in] @ self.W_skip.T if self.cfg.skip else 0.0

    def _left(self, pair: Tensor) -> Tensor:
        """What the latents have to reconstruct: the target less the skip connection."""
        return pair[..., self.cfg.d_in :] - self._skipped(pair)

    def _squared_error(self, preds: Tensor, pair: Tensor) -> Tensor:
        return functional.mse_loss(preds, self._left(pair), reduction="none")

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Any:
        """The architecture's own; dead latents learn the residual of the target."""
        changed = replace(step_input, sae_in=self._left(step_input.sae_in))
        return super().calculate_aux_loss(changed, feature_acts, hidden_pre, sae_out)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step; the output's `sae_in` is the target, which the trainer's numbers are about."""
        output = super().training_forward_pass(step_input)
        output.sae_out = output.sae_out + self._skipped(step_input.sae_in)
        output.sae_in = step_input.sae_in[..., self.cfg.d_in :]
        return output

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The prediction, skip connection included."""
        return self.decode(self.encode(x)) + self._skipped(x)

    @torch.no_grad()
    def fold_scaling(self, factor_in: float, factor_out: float) -> None:
        """Make weights trained on `factor_in * x` and `factor_out * y` those for x and y."""
        self.fold_activation_norm_scaling_factor(factor_out)
        self.W_enc.data *= factor_in / factor_out
        if self.cfg.skip:
            self.W_skip.data *= factor_in / factor_out


@dataclass(kw_only=True)
class StandardTrainingTranscoderConfig(_Target, StandardTrainingSAEConfig):
    """ReLU with an L1 penalty on activations times decoder norms."""


@dataclass(kw_only=True)
class BatchTopKTrainingTranscoderConfig(_Target, BatchTopKTrainingSAEConfig):
    """BatchTopK, saved with one threshold."""


@dataclass(kw_only=True)
class JumpReLUTrainingTranscoderConfig(_Target, JumpReLUTrainingSAEConfig):
    """JumpReLU with thresholds that are learned."""


@dataclass(kw_only=True)
class MatryoshkaTrainingTranscoderConfig(_Target, MatryoshkaBatchTopKTrainingSAEConfig):
    """Nested BatchTopK dictionaries, each with a loss on the target."""


class StandardTrainingTranscoder(_Transcoding, StandardTrainingSAE):
    """Saved as `transcoder` or `skip_transcoder`."""


class BatchTopKTrainingTranscoder(_Transcoding, BatchTopKTrainingSAE):
    """Saved as `jumprelu_transcoder` or `jumprelu_skip_transcoder`."""


class JumpReLUTrainingTranscoder(_Transcoding, JumpReLUTrainingSAE):
    """Saved as `jumprelu_transcoder` or `jumprelu_skip_transcoder`."""


class MatryoshkaTrainingTranscoder(_Transcoding, MatryoshkaBatchTopKTrainingSAE):
    """Saved as `jumprelu_transcoder` or `jumprelu_skip_transcoder`."""


CLASSES: dict[str, tuple[Any, Any]] = {
    "standard_transcoder": (StandardTrainingTranscoder, StandardTrainingTranscoderConfig),
    "batchtopk_transcoder": (BatchTopKTrainingTranscoder, BatchTopKTrainingTranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTrainingTranscoder, JumpReLUTrainingTranscoderConfig),
    "matryoshka_batchtopk_transcoder": (
        MatryoshkaTrainingTranscoder,
        MatryoshkaTrainingTranscoderConfig,
    ),
}
"""sae_trainer.name -> (training class, its config)."""


@dataclass
class PairScaler(ActivationScaler):
    """Two factors: `scaling_factor` of the first `d_in` columns, `factor_out` of the others."""

    d_in: int = 0
    factor_out: float | None = None

    def scale(self, acts: Tensor) -> Tensor:
        """Each stream times its factor; unchanged where they are None."""
        if self.scaling_factor is None or self.factor_out is None:
            return acts
        factors = acts.new_full((acts.shape[-1],), self.factor_out)
        factors[: self.d_in] = self.scaling_factor
        return acts * factors

    def save(self, file_path: str) -> None:
        """As sae-lens saves its own, with the second factor."""
        super().save(file_path)
        file = Path(file_path)
        content = {**json.loads(file.read_text("utf-8")), "factor_out": self.factor_out}
        file.write_text(json.dumps(content), encoding="utf-8")

    def load(self, file_path: str | Path) -> None:
        """Both factors."""
        super().load(file_path)
        self.factor_out = json.loads(Path(file_path).read_text("utf-8"))["factor_out"]
