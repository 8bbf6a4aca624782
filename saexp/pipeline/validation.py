"""Whether the SAE of a run fits its model."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.config import RunConfig
from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline.collect import Gathered
from saexp.results import TaskResult
from saexp.saes.loading import ESTIMATE, estimate_factor
from saexp.saes.sae import SparseAutoencoder
from saexp.saes.validation import Fit, Pair, check_fit

log = logging.getLogger(__name__)


_LITTLE, _FAR_BELOW = 0.2, 0.5
"""Explained variance at the positions is told below this, and this share of neutral text's."""


def neighbours(cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel) -> list[Hookpoint]:
    """The SAE's streams one block down and up, where the check wants them."""
    return [h for shifted in _shifted(cfg, sae, model) for h in shifted]


def _shifted(cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel) -> list[list[Hookpoint]]:
    """Per neighbouring block: the stream, or the two of a transcoder."""
    at = [h.stored for h in sae.hookpoints]
    if cfg.sae.check == "off" or cfg.sae.loader == "random":
        return []
    if any(h.stream == "embed" for h in at):
        return []
    return [
        [Hookpoint(h.layer + step, h.stream) for h in at]
        for step in (-1, 1)
        if all(0 <= h.layer + step < model.n_layers for h in at)
    ]


def settle_factor(cfg: RunConfig, sae: SparseAutoencoder, neutral: Gathered) -> list[str]:
    """Estimate the scaling of the SAE's inputs from neutral text, where the run asks for that.

    Returns the notes that say so; nothing may be encoded before.
    """
    if cfg.sae.norm_factor != ESTIMATE:
        return []
    ordinary = neutral.ordinary(sae.hookpoints).mask
    chunks = (
        acts[torch.from_numpy(ordinary[n : n + len(acts)])]
        for n, acts in neutral.store.chunks(sae.hookpoint, 8192)
    )
    factor = estimate_factor(sae, chunks)
    return [
        f"sae.norm_factor={factor:.6g} was estimated from {int(ordinary.sum())} ordinary positions "
        f"of neutral text at {sae.hookpoint.name}: its files do not give it"
    ]


def with_neighbours(
    cfg: RunConfig, ahead: Sequence[tuple[int, str | None]]
) -> list[tuple[int, str | None]]:
    """What the other cells of a sweep will want of the neutral text: their neighbours too."""
    near = (0,) if cfg.sae.check == "off" or cfg.sae.loader == "random" else (-1, 0, 1)
    wanted = {(n + step, stream) for n, stream in ahead for step in near if n + step >= 0}
    return sorted(wanted, key=str)


def check_sae(
    cfg: RunConfig,
    sae: SparseAutoencoder,
    model: LanguageModel,
    gathered: Gathered,
    neutral: Gathered,
) -> TaskResult:
    """`check/…` metrics, table `check`, and a note per problem; SAEError with sae.check=error.

    Looks at ordinary positions of neutral text (`activations.norms`), and at the special tokens
    among the run's own positions. The table has
    what was measured beside what catalogue and files say (unknown where they say nothing), then
    explained variance under other readings.
    """
    if cfg.sae.check == "off" or cfg.sae.loader == "random":
        return TaskResult()
    own = gathered.placement.rows["token_id"].isin(model.tokenizer.all_special_ids).to_numpy()
    mark = torch.tensor(own)

    def acts(gathered: Gathered, hookpoint: Hookpoint) -> Tensor:
        return gathered.store.acts(hookpoint.layer, hookpoint.stream)

    def ordinary(hookpoints: list[Hookpoint]) -> list[Tensor]:
        rows = torch.from_numpy(np.flatnonzero(neutral.ordinary(hookpoints).mask))
        return [acts(neutral, h)[rows] for h in hookpoints]

    streams = ordinary(sae.hookpoints)
    near: dict[Hookpoint, Tensor | Pair] = {}
    for at in _shifted(cfg, sae, model):
        read, *predicted = ordinary(at)
        near[at[0]] = (read, predicted[0]) if predicted else read
    special = torch.zeros(len(streams[0]), dtype=torch.bool)
    if bool(mark.any()):
        mine = [acts(gathered, h)[mark] for h in sae.hookpoints]
        streams, near = [torch.cat(both) for both in zip(streams, mine, strict=True)], {}
        special = torch.cat([special, torch.ones(len(mine[0]), dtype=torch.bool)])
    x, *target = streams
    fit = check_fit(sae, x, special, near, *target)
    if fit.problems and cfg.sae.check == "error":
        raise SAEError(f"{fit.problems[0]} (sae.check=warn goes on)")
    for problem in fit.problems:
        log.warning("%s", problem)
    metrics: dict[str, float | int | None] = {
        "check/l0": fit.l0,
        "check/explained_variance": fit.explained_variance,
    }
    assert fit.seen is not None, "check_fit measures"
    metrics |= {
        "check/explained_variance_legacy": fit.seen.explained_variance_legacy,
        "check/silent_fraction": fit.seen.silent_fraction,
        "check/mean_norm": fit.seen.mean_norm,
        "check/n_positions": fit.seen.n,
    }
    metrics |= {
        f"check/expected_{c.name}": c.expected for c in fit.compared if c.expected is not None
    }
    left_out = neutral.ordinary(sae.hookpoints).notes("the SAE's check leaves them out")
    notes = [*fit.problems, *(f"neutral text: {note}" for note in left_out)]
    return TaskResult(metrics=metrics, tables={"check": _table(sae, fit)}, notes=notes)


def fits_here(metrics: Mapping[str, float | int | None]) -> list[str]:
    """A note where an SAE that fits neutral text explains nearly nothing where it is analysed.

    Where it does not fit neutral text, `check_sae` has said so.
    """
    here = metrics.get("reconstruction/explained_variance")
    neutral = metrics.get("check/explained_variance")
    if here is None or neutral is None or neutral <= 0:
        return []
    if here >= min(_LITTLE, _FAR_BELOW * neutral):
        return []
    return [
        f"the SAE explains {here:.3f} of the variance at the positions analysed, {neutral:.3f} on "
        "neutral text: most of what the model holds there is in no latent"
    ]


def _table(sae: SparseAutoencoder, fit: Fit) -> pd.DataFrame:
    """A row per quantity, then one per other reading."""
    rows = [(c.quantity, c.here, c.expected, c.tolerance, c.verdict) for c in fit.compared]
    named = [(f"explained variance {name}", value) for name, value in fit.others.items()]
    rows += [(quantity, here, None, "", "other reading") for quantity, here in named]
    columns = ["quantity", "here", "expected", "tolerance", "verdict"]
    table = pd.DataFrame(rows, columns=columns).astype({"here": float, "expected": float})
    table.insert(0, "hookpoint", sae.hookpoint.name)
    table.insert(0, "layer", sae.hookpoint.layer)
    return table
