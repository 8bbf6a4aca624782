"""Whether the run's SAE fits the run's model, looked at before anything is concluded from it."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from saexp.config import RunConfig
from saexp.errors import SAEError
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.saes.check import check_fit
from saexp.tasks.gathering import Gathered

log = logging.getLogger(__name__)


def neighbours(cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel) -> list[Hookpoint]:
    """The SAE's stream one block down and up, where the check wants them."""
    at = sae.hookpoint.stored
    if cfg.sae.check == "off" or cfg.sae.loader == "random" or at.stream == "embed":
        return []
    layers = [at.layer - 1, at.layer + 1]
    return [Hookpoint(n, at.stream) for n in layers if 0 <= n < model.n_layers]


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
    """`check/…` metrics, and a note per problem; SAEError instead with sae.check=error.

    Looks at neutral text, and at the special tokens among the run's own positions.
    """
    if cfg.sae.check == "off" or cfg.sae.loader == "random":
        return TaskResult()
    own = gathered.placement.rows["token_id"].isin(model.tokenizer.all_special_ids).to_numpy()
    mark = torch.tensor(own)

    def acts(hookpoint: Hookpoint) -> Tensor:
        return neutral.store.acts(hookpoint.layer, hookpoint.stream)

    x = acts(sae.hookpoint)
    near = {h: acts(h) for h in neighbours(cfg, sae, model)}
    special = torch.zeros(len(x), dtype=torch.bool)
    if bool(mark.any()):
        mine = gathered.store.acts(sae.hookpoint.layer, sae.hookpoint.stream)[mark]
        x, near = torch.cat([x, mine]), {}
        special = torch.cat([special, torch.ones(len(mine), dtype=torch.bool)])
    fit = check_fit(sae, x, special, near)
    if fit.problems and cfg.sae.check == "error":
        raise SAEError(f"{fit.problems[0]} (sae.check=warn goes on)")
    for problem in fit.problems:
        log.warning("%s", problem)
    metrics: dict[str, float | int | None] = {
        "check/l0": fit.l0,
        "check/explained_variance": fit.explained_variance,
    }
    return TaskResult(metrics=metrics, notes=list(fit.problems))
