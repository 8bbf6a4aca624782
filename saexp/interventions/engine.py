"""Batched greedy generation in which every row has its own edit, strength and positions.

Shapes: b rows of a batch, t padded tokens, d the stream's width, u latents any row sets.
Positions are absolute indices into the unpadded prompt, so they hold under left padding and under
KV-cached decoding.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saexp.context import progress
from saexp.interventions.cache import GenerationCache
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import edit as edit_streams
from saexp.models.hooks import position_ids
from saexp.models.loading import LanguageModel
from saexp.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)

_DROP_SHARE = 0.25
"""Finished rows leave the batch once they are this share of it."""


@dataclass(frozen=True)
class Edit:
    """A change of one stream, in raw units.

    With `read` empty: x + coefficient * sum_i scales[i] * direction(write[i]). Else
    x + coefficient * sum_i (targets[i] - a(read[i])) * direction(write[i]), a a latent's own value:
    the reconstruction error is kept, and coefficient 1 puts each latent at its target.
    """

    write: tuple[int, ...]
    """Latents whose decoder directions are added."""
    coefficient: float
    scales: tuple[float, ...] = ()
    read: tuple[int, ...] = ()
    targets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One generation."""

    ids: tuple[int, ...]
    """Prompt tokens, special ones included."""
    edit: Edit | None = None
    positions: tuple[int, ...] = ()
    """Prompt tokens that are changed."""
    generated: bool = False
    """Whether generated tokens are changed too."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Rows with one key have one result: no edit and coefficient 0 are the same."""
        if self.edit is None or self.edit.coefficient == 0:
            return (self.ids,)
        return (self.ids, self.edit, self.positions, self.generated)


class _BatchEdit:
    """The edits of a batch as one function of the stream."""

    def __init__(self, rows: Sequence[Row], width: int, sae: SparseAutoencoder) -> None:
        self.sae = sae
        device = sae.device
        self.vectors = torch.zeros(len(rows), sae.d_in, device=device)
        self.at_prompt = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
        self.at_generated = torch.zeros(len(rows), dtype=torch.bool, device=device)
        reading = sorted({f for r in rows if r.edit for f in r.edit.read})
        self.reading = reading
        place = {f: i for i, f in enumerate(reading)}
        self.targets = torch.zeros(len(rows), len(reading), device=device)
        self.mixing: dict[int, tuple[Tensor, Tensor]] = {}
        for i, row in enumerate(rows):
            if row.edit is None or row.edit.coefficient == 0:
                continue
            start = width - len(row.ids)
            self.at_prompt[i, [start + p for p in row.positions]] = True
            self.at_generated[i] = row.generated
            directions = sae.directions(row.edit.write).float() * row.edit.coefficient
            if not row.edit.read:
                scales = torch.tensor(row.edit.scales, device=device)
                self.vectors[i] = scales @ directions
                continue
            columns = torch.tensor([place[f] for f in row.edit.read], device=device)
            self.targets[i, columns] = torch.tensor(row.edit.targets, device=device)
            self.mixing[i] = (columns, directions)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these rows only."""
        self.vectors, self.targets = self.vectors[chosen], self.targets[chosen]
        self.at_prompt, self.at_generated = self.at_prompt[chosen], self.at_generated[chosen]
        old = chosen.tolist()
        self.mixing = {i: self.mixing[o] for i, o in enumerate(old) if o in self.mixing}

    def function(self, *, prompt: bool) -> Any:
        """`[b, t, d]` -> `[b, t, d]`; the input itself, bit by bit, wherever nothing is edited."""
        mask = self.at_prompt if prompt else self.at_generated[:, None]
        any_edit = bool(mask.any())

        def change(stream: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
            if not any_edit:
                return stream
            return self._change(stream, mask.to(stream.device))

        return change

    def _change(
        self, stream: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        row_of, token_of = mask.nonzero(as_tuple=True)
        old = stream[row_of, token_of].float()
        added = self.vectors.to(old.device)[row_of]
        if self.mixing:
            acts = self.sae.encode_latents(old, self.reading).float()
            gap = self.targets[row_of] - acts
            for i, (columns, directions) in self.mixing.items():
                mine = row_of == i
                added[mine] = gap[mine][:, columns] @ directions
        new = stream.clone()
        new[row_of, token_of] = (old + added).to(stream.dtype)
        return new


def _left_padded(rows: Sequence[Row], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
        mask[i, width - len(row.ids) :] = 1
    return ids.to(device), mask.to(device)


def _last_only(model: LanguageModel) -> dict[str, int]:
    """Option that keeps the LM head to the last position, where the model has it."""
    known = inspect.signature(model.hf.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


@torch.inference_mode()
def last_logits(
    model: LanguageModel, rows: Sequence[Row], sae: SparseAutoencoder, hookpoint: Hookpoint
) -> Float[Tensor, "b vocab"]:
    """Next-token logits after each prompt, all rows in one batch."""
    ids, mask = _left_padded(rows, model.pad_id, model.device)
    change = _BatchEdit(rows, ids.shape[1], sae)
    with edit_streams(model, {hookpoint: change.function(prompt=True)}):
        out = model.hf(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            **_last_only(model),
        )
    return out.logits[:, -1]


@torch.inference_mode()
def _generate_batch(
    model: LanguageModel,
    rows: Sequence[Row],
    sae: SparseAutoencoder,
    hookpoint: Hookpoint,
    max_new_tokens: int,
) -> list[list[int]]:
    ids, mask = _left_padded(rows, model.pad_id, model.device)
    change = _BatchEdit(rows, ids.shape[1], sae)
    eos = torch.tensor(model.eos_ids, device=model.device)
    results: list[list[int]] = [[] for _ in rows]
    alive = torch.arange(len(rows))
    finished = torch.zeros(len(rows), dtype=torch.bool)
    positions = position_ids(mask)
    cache = None
    inputs = ids
    for step in range(max_new_tokens):
        with edit_streams(model, {hookpoint: change.function(prompt=step == 0)}):
            out = model.hf(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **_last_only(model),
            )
        cache = out.past_key_values
        following = out.logits[:, -1].argmax(-1)
        ended = torch.isin(following, eos).cpu()
        for i, (row, token) in enumerate(zip(alive.tolist(), following.tolist(), strict=True)):
            if not finished[i] and not ended[i]:
                results[row].append(token)
        finished |= ended
        if bool(finished.all()) or step == max_new_tokens - 1:
            break
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        inputs = following[:, None]
        if float(finished.double().mean()) >= _DROP_SHARE:
            chosen = (~finished).nonzero()[:, 0]
            on_device = chosen.to(model.device)
            cache.batch_select_indices(on_device)
            inputs, mask, positions = inputs[on_device], mask[on_device], positions[on_device]
            change.keep(on_device)
            alive, finished = alive[chosen], finished[chosen]
    return results


def generate(
    model: LanguageModel,
    rows: Sequence[Row],
    sae: SparseAutoencoder,
    hookpoint: Hookpoint,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    cache: GenerationCache | None = None,
) -> list[list[int]]:
    """Greedy continuations (new tokens, without the end token), in the order of `rows`.

    Equal rows are computed once, and not at all where the cache has them; batches hold prompts of
    similar length, at most `batch_tokens` tokens with padding and what is generated.
    """
    distinct = {row.key: row for row in rows}
    done = cache.get(distinct) if cache is not None else {}
    order = [row for key, row in distinct.items() if key not in done]
    order.sort(key=lambda r: len(r.ids), reverse=True)
    with progress(len(order), "generating", "prompt") as bar:
        start = 0
        while start < len(order):
            longest = len(order[start].ids) + max_new_tokens
            batch = order[start : start + max(1, batch_tokens // longest)]
            tokens = _generate_batch(model, batch, sae, hookpoint, max_new_tokens)
            made = [(r.key, t) for r, t in zip(batch, tokens, strict=True)]
            done.update(made)
            if cache is not None:
                cache.put(made)
            start += len(batch)
            bar.update(len(batch))
    log.info(
        "generated %d continuations, %d were cached (%d rows asked)",
        len(order),
        len(distinct) - len(order),
        len(rows),
    )
    return [done[row.key] for row in rows]
