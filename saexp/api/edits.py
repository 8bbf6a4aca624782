"""Context managers that steer, ablate or edit a model while they are open.

`steer` and `ablate` use the operations of a run's interventions (`interventions.steering`), so that
a coefficient means the same in a notebook and in a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from saexp.activations.reader import norm_limit
from saexp.api.model import ActiveEdit, InteractiveModel, Prompt, token_indices
from saexp.config import DatasetConfig, InterventionConfig, PositionsConfig
from saexp.config.environment import one_of
from saexp.config.interventions import PLACES, UNITS
from saexp.data.datasets import background_texts
from saexp.errors import ConfigError, InterventionError
from saexp.interventions.directions import LatentStatistics
from saexp.interventions.kinds import Ablate, Steer
from saexp.latents.encode import encode_rows
from saexp.latents.statistics import active_quantile
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.models.hooks import edit as edit_streams
from saexp.registry import names
from saexp.saes.loading import check_fits
from saexp.saes.sae import SparseAutoencoder

ABSOLUTE = "absolute"
"""Unit of a coefficient that gives the length of the added vector."""
_N_NEUTRAL_TOKENS = 4000
"""The default of `analyzer.n_background`."""
_MAX_LENGTH = DatasetConfig(name="text").max_length
_MAX_NORM_RATIO = PositionsConfig(name="all").max_norm_ratio

Where = str | Sequence[int]
Stream = Hookpoint | tuple[int, str] | int
"""A hookpoint; a pair (layer, stream); or a layer, which stands for its resid_post."""


def steer(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    coefficient: float,
    unit: str = "resid_norm",
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Add the decoder directions of latents to the stream that the SAE writes to.

    The edit applies to `model.generate`, `model.logits`, `model.activations` and `saexp.encode`
    while the context is open, and ends when the context is left in any way. Contexts can be nested:
    an inner edit reads the streams that the outer edits have changed. With coefficient 0 all
    results are bit-equal to those without the edit.

    Args:
        latents: one latent or several; the directions of several are added up.
        coefficient: the size of the edit, in units of `unit`.
        unit: `resid_norm`, the median norm of the stream over ordinary tokens of neutral text
            (measured once per model and stream); `absolute`, the length of the added vector;
            `raw`, the unnormalized decoder rows; `max_act` or `p99_act`, each latent's maximum or
            99th percentile over the tokens of neutral text at which it is active.
        where: `all` (tokens of the prompt and generated tokens), `prompt`, `last` (of the prompt),
            `generated`, another option of the config group `positions` with its `where_options`,
            or indices of prompt tokens. Special tokens such as BOS are changed only by index.

    Raises:
        ConfigError: an unknown unit or value of `where`.
        SAEError: the SAE does not fit the model.
        InterventionError: the SAE has no such latent, or the unit is not defined for a latent.

    Example:
        >>> with saexp.steer(model, sae, [154], coefficient=0.9):
        ...     model.generate("My name is")
    """
    ids = _latent_ids(model, sae, latents)
    one_of("unit", unit, (*UNITS, ABSOLUTE))
    values = _latent_values(model, sae, ids, unit)
    # With a median norm of 1 the length of the added vector is the coefficient itself.
    intervention = Steer(
        InterventionConfig(name="steer", unit="resid_norm" if unit == ABSOLUTE else unit)
    )
    ops = intervention.edit(ids, ids, "", float(coefficient), values)
    return model.editing(ActiveEdit(ops, _where(where, where_options)))


def ablate(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Set latents to zero: subtract their activation times their decoder direction.

    The SAE's reconstruction error stays in the stream. `where`, scope and errors are those of
    `steer`.

    Example:
        >>> with saexp.ablate(model, sae, [154]):
        ...     model.logits("My name is")
    """
    ids = _latent_ids(model, sae, latents)
    if sae.device.type != model.device.type:
        raise InterventionError(
            f"the SAE is on {sae.device} and the model on {model.device}; load both with the same "
            "device="
        )
    values = _latent_values(model, sae, ids, "raw")
    ops = Ablate(InterventionConfig(name="ablate")).edit(ids, ids, "", 1.0, values)
    return model.editing(ActiveEdit(ops, _where(where, where_options), {sae.hookpoint: sae}))


def edit(
    model: InteractiveModel, edits: Mapping[Stream, EditFunction]
) -> AbstractContextManager[None]:
    """Replace streams by functions of themselves.

    Args:
        edits: a function for each stream. A stream is a layer (its `resid_post`), a pair
            (layer, stream) or a `Hookpoint`. The function receives `[batch, n_tokens, d_model]`,
            padding and special tokens included (one token at a time while generating), and returns
            a tensor of that shape. It must not write to its input.

    Functions apply in the order in which their contexts were opened, and before the edits of
    `steer` and `ablate` at the same stream. The scope is that of `steer`; direct calls of
    `model.hf` are affected as well.

    Raises:
        ModelError: the model has no such layer or stream.

    Example:
        >>> with saexp.edit(model, {2: lambda x: 0.5 * x}):
        ...     model.logits("My name is")
    """
    functions = {_hookpoint(stream): function for stream, function in edits.items()}
    model.check_streams(h.stored for h in functions)
    return _editing(model, functions)


@contextmanager
def _editing(
    model: InteractiveModel, functions: Mapping[Hookpoint, EditFunction]
) -> Iterator[None]:
    def unless_suspended(function: EditFunction) -> EditFunction:
        return lambda stream: stream if model.suspended else function(stream)

    with edit_streams(model, {h: unless_suspended(f) for h, f in functions.items()}):
        yield


def _hookpoint(stream: Stream) -> Hookpoint:
    if isinstance(stream, Hookpoint):
        return stream
    return Hookpoint(stream, "resid_post") if isinstance(stream, int) else Hookpoint(*stream)


def _latent_ids(
    model: InteractiveModel, sae: SparseAutoencoder, latents: int | Sequence[int]
) -> tuple[int, ...]:
    check_fits(sae, model)
    ids = (latents,) if isinstance(latents, int) else tuple(map(int, latents))
    if not ids:
        raise InterventionError("latents=[] is empty; type e.g. latents=[154]")
    for latent in ids:
        if not 0 <= latent < sae.d_sae:
            raise InterventionError(
                f"latent {latent} is out of range: the SAE has latents 0-{sae.d_sae - 1}"
            )
    if len(set(ids)) < len(ids):
        raise InterventionError(f"latents={list(ids)} contains a latent twice")
    return ids


def _where(where: Where, options: Mapping[str, Any]) -> InterventionConfig:
    if not isinstance(where, str):
        options = {"indices": [int(i) for i in where], "include_special": True, **options}
        return InterventionConfig(name="steer", where="indices", where_options=dict(options))
    one_of("where", where, (*PLACES, *(n for n in names("positions") if n not in PLACES)))
    unknown = sorted(options.keys() - PositionsConfig.__dataclass_fields__.keys())
    if unknown:
        raise ConfigError(f"where={where!r} has no option '{unknown[0]}'")
    return InterventionConfig(name="steer", where=where, where_options=dict(options))


def _latent_values(
    model: InteractiveModel, sae: SparseAutoencoder, latents: tuple[int, ...], unit: str
) -> LatentStatistics:
    """Directions of the latents, and the values that the unit of the coefficient needs."""
    written = sae.hookpoint_out or sae.hookpoint
    directions = sae.directions(list(latents)).float()
    table = pd.DataFrame({"latent": latents, "norm": directions.norm(dim=-1).cpu().numpy()})
    if unit in ("max_act", "p99_act"):
        table[unit] = _active_values(model, sae, latents, 1.0 if unit == "max_act" else 0.99)
        for latent, value in zip(latents, table[unit], strict=True):
            if not value > 0:
                raise InterventionError(
                    f"unit={unit}: latent {latent} is never active on neutral text; type "
                    "unit='resid_norm', 'raw' or 'absolute'"
                )
    return LatentStatistics(
        table=table,
        groups=(),
        median_norm=median_norm(model, written) if unit == "resid_norm" else 1.0,
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=written,
        n_layers=model.n_layers,
    )


def median_norm(model: InteractiveModel, at: Hookpoint) -> float:
    """Measure the median norm of a stream over ordinary tokens of neutral text, without edits.

    Texts and tokens are those of a run's background with default settings; tokens with a norm above
    5 times the median (attention sinks) are excluded. The model remembers the value.
    """
    if at not in model.median_norms:
        acts = _neutral(model, [at])[at]
        norms = acts.float().norm(dim=-1).cpu().double().numpy()
        ordinary = norms[norms <= norm_limit(norms, _MAX_NORM_RATIO)]
        model.median_norms[at] = float(np.median(ordinary if len(ordinary) else norms))
    return model.median_norms[at]


def _active_values(
    model: InteractiveModel, sae: SparseAutoencoder, latents: tuple[int, ...], quantile: float
) -> np.ndarray:
    """A quantile of each latent's nonzero activations on neutral text."""
    acts = _neutral(model, sae.hookpoints)
    x = acts[sae.hookpoint].cpu()
    target = None if sae.hookpoint_out is None else acts[sae.hookpoint_out].cpu()
    rows = pd.DataFrame(index=range(len(x)))
    encoded = encode_rows(x, np.arange(len(x)), sae, rows, target)[0]
    return active_quantile(encoded.csr, np.array(latents), quantile)


def _neutral(
    model: InteractiveModel, hookpoints: Sequence[Hookpoint]
) -> dict[Hookpoint, torch.Tensor]:
    """Streams `[n, width]` at random tokens of neutral text."""
    lines = list(dict.fromkeys(background_texts(DatasetConfig(name="text", model_name=model.name))))
    n_each = max(1, -(-_N_NEUTRAL_TOKENS // len(lines)))
    prompts = model.prompts(lines, chat=False, max_length=_MAX_LENGTH)
    indices = [_random_tokens(prompt, n_each) for prompt in prompts]
    with model.unedited():
        streams = model.streams(prompts, hookpoints, indices)
    return {at: torch.cat([of_text[at] for of_text in streams]) for at in hookpoints}


def _random_tokens(prompt: Prompt, n: int) -> list[int]:
    return token_indices(prompt, PositionsConfig(name="random", n=n))
