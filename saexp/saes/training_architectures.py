"""The training class of each architecture of SAEs and transcoders."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

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

from saexp.config import SAETrainerConfig
from saexp.errors import ConfigError
from saexp.registry import did_you_mean
from saexp.saes.training import TRANSCODERS, TrainingSource, check_name
from saexp.saes.training_step import QuickBatchTopKTrainingSAE, QuickTopKTrainingSAE

if TYPE_CHECKING:
    from sae_lens import SAEConfig

# Any to the type checker: the mix-ins have four base classes without a common typed base.
_Config: Any = object
_Base: Any = object


@dataclass(kw_only=True)
class _Target(_Config):
    """Fields of a transcoder's config that the config of an SAE's training class lacks."""

    d_out: int = 0
    """Width of the predicted stream."""
    skip: bool = False
    """Whether a learned linear map of the input is added to the output."""
    apply_b_dec_to_input: bool = False
    """Always false, because b_dec belongs to the output."""

    @classmethod
    def architecture(cls) -> str:
        return f"{super().architecture()}_transcoder"

    def get_inference_config_class(self) -> "type[SAEConfig]":
        if isinstance(self, StandardTrainingSAEConfig):
            return SkipTranscoderConfig if self.skip else TranscoderConfig
        return JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig


class _Transcoding(_Base):
    """Turns a training class of sae-lens into one of transcoders.

    Its `sae_in` has both streams, `[..., d_in + d_out]`: the first is encoded, the second replaces
    `sae_in` in the losses. With `cfg.skip` there is `W_skip [d_out, d_in]`, initially 0.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.mse_loss_fn = self._squared_error

    def initialize_weights(self) -> None:
        """The encoder as in sae-lens; random decoder rows of norm `cfg.decoder_init_norm`."""
        super().initialize_weights()
        options = {"dtype": self.dtype, "device": self.device}
        decoder = torch.empty(self.cfg.d_sae, self.cfg.d_out, **options)
        nn.init.kaiming_uniform_(decoder)
        if self.cfg.decoder_init_norm is not None:
            decoder *= self.cfg.decoder_init_norm / decoder.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_out, **options))
        if self.cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.cfg.d_out, self.cfg.d_in, **options))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The encoded stream of a batch with both streams; b_dec is not subtracted from it."""
        return self.hook_sae_input(sae_in[..., : self.cfg.d_in].to(self.dtype))

    def _skip_output(self, pair: Tensor) -> Tensor | float:
        return pair[..., : self.cfg.d_in] @ self.W_skip.T if self.cfg.skip else 0.0

    def _target(self, pair: Tensor) -> Tensor:
        """The stream that the latents have to reconstruct, without the skip connection's output."""
        return pair[..., self.cfg.d_in :] - self._skip_output(pair)

    def _squared_error(self, preds: Tensor, pair: Tensor) -> Tensor:
        return functional.mse_loss(preds, self._target(pair), reduction="none")

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Any:
        """The architecture's auxiliary loss; dead latents learn the residual of the target."""
        with_target = replace(step_input, sae_in=self._target(step_input.sae_in))
        return super().calculate_aux_loss(with_target, feature_acts, hidden_pre, sae_out)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step; the output's `sae_in` is the target, as the trainer's metrics need it."""
        output = super().training_forward_pass(step_input)
        output.sae_out = output.sae_out + self._skip_output(step_input.sae_in)
        output.sae_in = step_input.sae_in[..., self.cfg.d_in :]
        return output

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The prediction, including the skip connection."""
        return self.decode(self.encode(x)) + self._skip_output(x)

    @torch.no_grad()
    def fold_scaling(self, factor_in: float, factor_out: float) -> None:
        """Convert weights for `factor_in * x` and `factor_out * y` to weights for x and y."""
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
    """JumpReLU with learned thresholds."""


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
    """Scales the first `d_in` columns by `scaling_factor` and the others by `factor_out`."""

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
        """Save as sae-lens does, with the second factor."""
        super().save(file_path)
        file = Path(file_path)
        content = {**json.loads(file.read_text("utf-8")), "factor_out": self.factor_out}
        file.write_text(json.dumps(content), encoding="utf-8")

    def load(self, file_path: str | Path) -> None:
        """Load both factors."""
        super().load(file_path)
        self.factor_out = json.loads(Path(file_path).read_text("utf-8"))["factor_out"]


_DERIVED = (
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


def training_sae(
    cfg: SAETrainerConfig, d_sae: int, source: TrainingSource, device: torch.device, n_steps: int
) -> Any:
    """A new training SAE, initialized from torch's seed. Raises ConfigError for invalid options."""
    from sae_lens.saes.sae import SAEMetadata

    check_name(cfg.name)
    sae_class, config_class = _classes(cfg.name)
    options = _options(cfg, config_class, d_sae, n_steps)
    output = {}
    if source.hookpoint_out is not None:
        output["hook_name_out"] = source.hookpoint_out.transformer_lens
        options["d_out"] = source.d_out
    elif source.hookpoint.stream == "attn_z":
        # In sae-lens, the saved SAE reads [..., n_heads, d_head].
        options["reshape_activations"] = "hook_z"
    try:
        config = config_class(
            d_in=source.d_in,
            d_sae=d_sae,
            dtype="float32",
            device=str(device),
            normalize_activations=cfg.normalize_activations,
            metadata=SAEMetadata(
                model_name=source.model_name,
                hook_name=source.hookpoint.transformer_lens,
                context_size=source.context_size,
                prepend_bos=source.prepend_bos,
                **output,
            ),
            **options,
        )
        return sae_class(config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"sae_trainer.options of a {_kind(cfg.name)}: {reason}") from error


def _options(cfg: SAETrainerConfig, config_class: Any, d_sae: int, n_steps: int) -> dict[str, Any]:
    """The validated options, and those that follow from the width and number of steps."""
    options = dict(cfg.options)
    if cfg.name.startswith("matryoshka_batchtopk"):
        options.setdefault("matryoshka_widths", [d_sae // 4, d_sae // 2, d_sae])
    if cfg.name == "matching_pursuit":
        # sae-lens takes no other value.
        options.setdefault("decoder_init_norm", 1.0)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.name not in _DERIVED}
    for warm_up in ("l1_warm_up_steps", "l0_warm_up_steps"):
        if warm_up in fields:
            options.setdefault(warm_up, int(cfg.sparsity_warm_up * n_steps))
    for name in sorted(options):
        key = f"sae_trainer.options.{name}"
        if name in _DERIVED:
            raise ConfigError(
                f"{key}: follows from layer, task.streams, width and sae_trainer's keys"
            )
        if name not in fields:
            raise ConfigError(
                f"{key}: a {_kind(cfg.name)} has no such option; "
                f"{did_you_mean(name, sorted(fields))}"
            )
        options[name] = _validated(key, options[name], fields[name].type)
    _check_sizes(options)
    if cfg.name == "matching_pursuit" and options["decoder_init_norm"] != 1:
        raise ConfigError(
            "sae_trainer.options.decoder_init_norm of a matching_pursuit SAE is 1; leave it out"
        )
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


def _check_sizes(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for values of matching pursuit that sae-lens would take silently."""
    at = "sae_trainer.options"
    n, threshold = options.get("max_iterations"), options.get("residual_threshold", 0)
    if n is not None and n < 1:
        raise ConfigError(f"{at}.max_iterations={n} leaves no latent active; type e.g. 16")
    if threshold < 0:
        raise ConfigError(f"{at}.residual_threshold={threshold} is negative; type 0 or more")


def _validated(key: str, value: Any, field_type: Any) -> Any:
    """The value, as an int where the field's type is int. Raises ConfigError for other types."""
    if field_type is bool and not isinstance(value, bool):
        raise ConfigError(f"{key}={value} is neither true nor false")
    if get_origin(field_type) is Literal and value not in get_args(field_type):
        raise ConfigError(f"{key}={value}: {did_you_mean(str(value), get_args(field_type))}")
    if field_type == int | None and value is not None:
        field_type = int
    if field_type not in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value} is not a number")
    if field_type is int and value != int(value):
        raise ConfigError(f"{key}={value} is not a whole number")
    return int(value) if field_type is int else value


def _kind(name: str) -> str:
    return name.replace("_transcoder", " transcoder") if name in TRANSCODERS else f"{name} SAE"


def _classes(name: str) -> tuple[Any, Any]:
    """(training class, its config class) of an architecture."""
    if name in TRANSCODERS:
        return CLASSES[name]
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(name)
    quick = {"topk": QuickTopKTrainingSAE, "batchtopk": QuickBatchTopKTrainingSAE}
    return quick.get(name, sae_class), config_class
