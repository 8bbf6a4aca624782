"""Context managers that steer, ablate or edit a model while they are open.

`steer` and `ablate` make the operations that the interventions of a run make
(`interventions.steering`), so the same coefficient means the same in a notebook and in a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from saexp.activations.norms import norm_limit
from saexp.config import DatasetConfig, InterventionConfig, PositionsConfig
from saexp.config.environment import one_of
from saexp.config.interventions import PLACES, UNITS
from saexp.data.datasets import background_texts
from saexp.errors import ConfigError, InterventionError
from saexp.interactive.model import ActiveEdit, InteractiveModel, Prompt, token_indices
from saexp.interventions.directions import LatentFacts
from saexp.interventions.steering import Ablate, Steer
from saexp.latents.encode import encode_rows
from saexp.latents.statistics import active_quantile
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction
from saexp.models.hooks import edit as edit_streams
from saexp.registry import names
from saexp.saes.loading import check_fits
from saexp.saes.sae import SparseAutoencoder

ABSOLUTE = "absolute"
"""Unit of a coefficient that is the length of the vector that is added."""
_N_NEUTRAL_TOKENS = 4000
"""As `analyzer.n_background`."""
_MAX_LENGTH = DatasetConfig(name="text").max_length
_MAX_NORM_RATIO = PositionsConfig(name="all").max_norm_ratio

Where = str | Sequence[int]
Place = Hookpoint | tuple[int, str] | int
"""A hookpoint; (layer, stream); or a layer, whose resid_post is meant."""


def steer(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    coefficient: float,
    unit: str = "resid_norm",
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Add the decoder directions of latents to the stream that the SAE writes.

    While the context is open, `model.generate`, `model.logits`, `model.activations` and
    `saexp.encode` are affected. Contexts nest, an inner edit reads the streams as the outer ones
    leave them, and any exit removes the edit. Coefficient 0 changes no bit.

    Args:
        latents: one latent, or several, whose directions are added up.
        coefficient: in units of `unit`.
        unit: `resid_norm`, the median norm of the stream over ordinary tokens of neutral text
            (measured once per model and stream); `absolute`, the length of the added vector;
            `raw`, the decoder rows as they are; `max_act` or `p99_act`, times each latent's
            maximum or 99th percentile where it is active on that neutral text.
        where: `all` tokens of the prompt and generated ones, `prompt`, `last` (of the prompt),
            `generated`, another option of the config group `positions` with its `where_options`,
            or indices of prompt tokens. Special tokens such as BOS are changed only by index.

    Raises:
        ConfigError: an unknown unit or value of `where`.
        SAEError: the SAE does not fit the model.
        InterventionError: a latent that the SAE does not have, or one without the unit asked for.

    Example:
        >>> with saexp.steer(model, sae, [154], coefficient=0.9):
        ...     model.generate("My name is")
    """
    chosen = _checked(model, sae, latents)
    one_of("unit", unit, (*UNITS, ABSOLUTE))
    facts = _facts(model, sae, chosen, unit)
    written = "resid_norm" if unit == ABSOLUTE else unit
    intervention = Steer(InterventionConfig(name="steer", unit=written))
    ops = intervention.edit(chosen, chosen, "", float(coefficient), facts)
    return model.editing(ActiveEdit(ops, _where(where, where_options)))


def ablate(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    latents: int | Sequence[int],
    where: Where = "all",
    **where_options: Any,
) -> AbstractContextManager[None]:
    """Set latents to zero: subtract their activation times their decoder direction.

    What the SAE does not reconstruct is left as it is. `where`, scope and errors as in `steer`.

    Example:
        >>> with saexp.ablate(model, sae, [154]):
        ...     model.logits("My name is")
    """
    chosen = _checked(model, sae, latents)
    if sae.device.type != model.device.type:
        raise InterventionError(
            f"the SAE is on {sae.device} and the model on {model.device}; load both with the same "
            "device="
        )
    facts = _facts(model, sae, chosen, "raw")
    ops = Ablate(InterventionConfig(name="ablate")).edit(chosen, chosen, "", 1.0, facts)
    return model.editing(ActiveEdit(ops, _where(where, where_options), {sae.hookpoint: sae}))


def edit(
    model: InteractiveModel, edits: Mapping[Place, EditFunction]
) -> AbstractContextManager[None]:
    """Replace streams by functions of themselves.

    Args:
        edits: where -> function. Where is a layer (its `resid_post`), a pair (layer, stream) or a
            `Hookpoint`. The function gets `[batch, n_tokens, d_model]`, padding and special tokens
            included (one token at a time while generating), and returns a tensor of that shape; it
            must not write to its input, and one that returns its input changes no bit.

    Functions are applied in the order in which their contexts were opened, and before the edits of
    `steer` and `ablate` at the same stream. Scope as in `steer`; `model.hf` is affected too.

    Raises:
        ModelError: a layer or stream that the model does not have.

    Example:
        >>> with saexp.edit(model, {2: lambda x: 0.5 * x}):
        ...     model.logits("My name is")
    """
    at = {_hookpoint(place): function for place, function in edits.items()}
    model.check_streams(h.stored for h in at)
    return _editing(model, at)


@contextmanager
def _editing(model: InteractiveModel, at: Mapping[Hookpoint, EditFunction]) -> Iterator[None]:
    def unless_suspended(function: EditFunction) -> EditFunction:
        return lambda stream: stream if model.suspended else function(stream)

    with edit_streams(model, {h: unless_suspended(f) for h, f in at.items()}):
        yield


def _hookpoint(place: Place) -> Hookpoint:
    if isinstance(place, Hookpoint):
        return place
    return Hookpoint(place, "resid_post") if isinstance(place, int) else Hookpoint(*place)


def _checked(
    model: InteractiveModel, sae: SparseAutoencoder, latents: int | Sequence[int]
) -> tuple[int, ...]:
    check_fits(sae, model)
    chosen = (latents,) if isinstance(latents, int) else tuple(map(int, latents))
    if not chosen:
        raise InterventionError("latents=[] names no latent; type e.g. latents=[154]")
    for latent in chosen:
        if not 0 <= latent < sae.d_sae:
            raise InterventionError(f"latent {latent}, but the SAE has latents 0-{sae.d_sae - 1}")
    if len(set(chosen)) < len(chosen):
        raise InterventionError(f"latents={list(chosen)} names a latent twice")
    return chosen


def _where(where: Where, options: Mapping[str, Any]) -> InterventionConfig:
    if not isinstance(where, str):
        options = {"indices": [int(i) for i in where], "include_special": True, **options}
        return InterventionConfig(name="steer", where="indices", where_options=dict(options))
    one_of("where", where, (*PLACES, *(n for n in names("positions") if n not in PLACES)))
    unknown = sorted(options.keys() - PositionsConfig.__dataclass_fields__.keys())
    if unknown:
        raise ConfigError(f"where={where!r} has no option '{unknown[0]}'")
    return InterventionConfig(name="steer", where=where, where_options=dict(options))


def _facts(
    model: InteractiveModel, sae: SparseAutoencoder, latents: tuple[int, ...], unit: str
) -> LatentFacts:
    """What an intervention needs to know of these latents, for this unit."""
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
    return LatentFacts(
        table=table,
        groups=(),
        median_norm=median_norm(model, written) if unit == "resid_norm" else 1.0,
        directions=sae.directions,
        hookpoint=sae.hookpoint,
        written=written,
        n_layers=model.n_layers,
    )


def median_norm(model: InteractiveModel, at: Hookpoint) -> float:
    """Median norm of a stream over ordinary tokens of neutral text, without edits.

    The texts and tokens are those of a run's background with default settings; tokens with a norm
    above 5 times the median (attention sinks) do not count. Measured once and kept by the model.
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
    """A quantile of each latent's activations where it is active on neutral text."""
    acts = _neutral(model, sae.hookpoints)
    x = acts[sae.hookpoint].cpu()
    target = None if sae.hookpoint_out is None else acts[sae.hookpoint_out].cpu()
    rows = pd.DataFrame(index=range(len(x)))
    found = encode_rows(x, np.arange(len(x)), sae, rows, target)[0]
    return active_quantile(found.csr, np.array(latents), quantile)


def _neutral(
    model: InteractiveModel, hookpoints: Sequence[Hookpoint]
) -> dict[Hookpoint, torch.Tensor]:
    """Streams `[n, width]` at random tokens of neutral text."""
    lines = list(dict.fromkeys(background_texts(DatasetConfig(name="text", model_name=model.name))))
    n_each = max(1, -(-_N_NEUTRAL_TOKENS // len(lines)))
    prompts = model.prompts(lines, chat=False, max_length=_MAX_LENGTH)
    chosen = [_some(prompt, n_each) for prompt in prompts]
    with model.unedited():
        found = model.streams(prompts, hookpoints, chosen)
    return {at: torch.cat([of_text[at] for of_text in found]) for at in hookpoints}


def _some(prompt: Prompt, n: int) -> list[int]:
    return token_indices(prompt, PositionsConfig(name="random", n=n))
