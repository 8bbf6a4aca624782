"""The training class of each architecture, transcoders included."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import numpy as np
import torch
from jaxtyping import Bool, Float
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
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn
from torch.nn import functional

from saexp.config import SAETrainerConfig
from saexp.errors import ConfigError
from saexp.models.hookpoints import Hookpoint
from saexp.registry import did_you_mean


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


SAES = ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
TRANSCODERS = tuple(
    f"{name}_transcoder" for name in ("standard", "batchtopk", "jumprelu", "matryoshka_batchtopk")
)
ARCHITECTURES = (*SAES, *TRANSCODERS)
_GIVEN = (
    "d_in",
    "d_sae",
    "d_out",
    "dtype",
    "device",
    "metadata",
    "normalize_activations",
    "reshape_activations",
)
"""Fields of sae-lens' configs that follow from the streams, the width and sae_trainer's keys."""


@dataclass(frozen=True)
class Place:
    """What the SAE is trained on, for its metadata; a transcoder has an output too."""

    model_name: str
    hookpoint: Hookpoint
    d_in: int
    context_size: int
    hookpoint_out: Hookpoint | None = None
    d_out: int | None = None
    prepend_bos: bool = True
    """Whether its texts begin with BOS."""


def check_name(name: str) -> None:
    """Raise ConfigError unless `sae_trainer.name` is something that can be trained."""
    if name in ARCHITECTURES:
        return
    if name.removesuffix("_transcoder") in SAES:
        raise ConfigError(
            f"sae_trainer.name={name}: sae-lens has no class that would use such a transcoder; "
            f"choose from {', '.join(TRANSCODERS)}"
        )
    raise ConfigError(f"sae_trainer.name={name}: {did_you_mean(name, ARCHITECTURES)}")


def training_sae(
    cfg: SAETrainerConfig, d_sae: int, place: Place, device: torch.device, n_steps: int
) -> Any:
    """A fresh one, its weights from torch's seed. Raises ConfigError for what cannot be trained."""
    from sae_lens.saes.sae import SAEMetadata

    check_name(cfg.name)
    made, made_config = _classes(cfg.name)
    options = _options(cfg, made_config, d_sae, n_steps)
    output = {}
    if place.hookpoint_out is not None:
        output["hook_name_out"] = place.hookpoint_out.transformer_lens
        options["d_out"] = place.d_out
    elif place.hookpoint.stream == "attn_z":
        # Saved, it is given [.., n_heads, d_head] there.
        options["reshape_activations"] = "hook_z"
    try:
        config = made_config(
            d_in=place.d_in,
            d_sae=d_sae,
            dtype="float32",
            device=str(device),
            normalize_activations=cfg.normalize_activations,
            metadata=SAEMetadata(
                model_name=place.model_name,
                hook_name=place.hookpoint.transformer_lens,
                context_size=place.context_size,
                prepend_bos=place.prepend_bos,
                **output,
            ),
            **options,
        )
        return made(config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"sae_trainer.options of a {_kind(cfg.name)}: {reason}") from error


def _options(cfg: SAETrainerConfig, made_config: Any, d_sae: int, n_steps: int) -> dict[str, Any]:
    """The options given, checked, and those that follow from the width and number of steps."""
    options = dict(cfg.options)
    if cfg.name.startswith("matryoshka_batchtopk"):
        options.setdefault("matryoshka_widths", [d_sae // 4, d_sae // 2, d_sae])
    fields = {f.name: f for f in dataclasses.fields(made_config) if f.name not in _GIVEN}
    for warm_up in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if warm_up in fields:
            options.setdefault(warm_up, int(cfg.sparsity_warm_up * n_steps))
    for name in sorted(options):
        key = f"sae_trainer.options.{name}"
        if name in _GIVEN:
            raise ConfigError(f"{key}: set by layer, task.streams, width and sae_trainer's keys")
        if name not in fields:
            raise ConfigError(
                f"{key}: a {_kind(cfg.name)} has no such option; "
                f"{did_you_mean(name, sorted(fields))}"
            )
        options[name] = _value(key, options[name], fields[name].type)
    k = options.get("k", fields["k"].default if "k" in fields else 1)
    if k <= 0:
        raise ConfigError(f"sae_trainer.options.k={k} leaves no latent active; type a k such as 16")
    if k > d_sae:
        raise ConfigError(f"sae_trainer.options.k={k} is above width={d_sae}")
    if cfg.name not in TRANSCODERS:
        return options
    if options.get("apply_b_dec_to_input"):
        raise ConfigError(
            "sae_trainer.options.apply_b_dec_to_input: a transcoder's b_dec belongs to its "
            "output; leave it out"
        )
    return {n: float(v) if fields[n].type is float else v for n, v in options.items()}


def _value(key: str, value: Any, wanted: Any) -> Any:
    """The value, a whole number as an int where the field is one. Raises ConfigError."""
    if wanted is bool and not isinstance(value, bool):
        raise ConfigError(f"{key}={value} is neither true nor false")
    if get_origin(wanted) is Literal and value not in get_args(wanted):
        raise ConfigError(f"{key}={value}: {did_you_mean(str(value), get_args(wanted))}")
    if wanted not in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value} is not a number")
    if wanted is int and value != int(value):
        raise ConfigError(f"{key}={value} is not a whole number")
    return int(value) if wanted is int else value


def _kind(name: str) -> str:
    return name.replace("_transcoder", " transcoder") if name in TRANSCODERS else f"{name} SAE"


def _classes(name: str) -> tuple[Any, Any]:
    if name in TRANSCODERS:
        pass

        return CLASSES[name]
    from sae_lens.registry import get_sae_training_class

    made, made_config = get_sae_training_class(name)
    if name == "batchtopk":
        pass

        made = QuickBatchTopKTrainingSAE
    return made, made_config
