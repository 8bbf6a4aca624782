"""Forward passes and generation in which each row of a batch has its own operations.

Two mechanisms avoid repeated work. Rows that differ only at the end of their prompts share the
keys and values of the beginning (`_prefill`). Blocks below the lowest edit run once per distinct
prompt (`_lower_blocks`). Both are exact: the shared part does not depend on the operations.
"""

import copy
import hashlib
import logging
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saexp.errors import InterventionError, ModelError
from saexp.interventions.stream_edits import BatchEdit, Row, SAEs
from saexp.models import Hookpoint
from saexp.models.forward import (
    after_blocks,
    alike,
    can_skip,
    changes_while_generating,
    depends_on_length,
    generation_regime,
    is_plain,
    keep_last_logits,
    may_skip,
    padded,
    recomputes_beyond,
    rope_regime,
    shares_keys_between_blocks,
    skipping,
)
from saexp.models.hooks import edit as edit_streams
from saexp.models.hooks import position_ids, run_truncated
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)


_DROP_FRACTION = 0.25
"""Finished rows leave the batch once they are this fraction of it."""
_MIN_SAVED = 0.15
"""Prompts are shared where that saves this fraction of a batch's tokens."""


def in_batches(
    model: LanguageModel,
    rows: Sequence[Row],
    extra: Sequence[int] | None,
    batch_tokens: int,
    most: int = 2**31,
) -> list[list[int]]:
    """Batches of row indices, longest prompts first, rows of one prompt next to each other.

    A batch has at most `batch_tokens` tokens, counting padding and `extra` new tokens per row, and
    at most `most` rows, but at least one. Its rows have the same rotary frequencies at every step.
    """
    new = [1] * len(rows) if extra is None else extra
    config = model.text_config
    keys: list[Hashable] = [()] * len(rows)
    if depends_on_length(config):
        keys = [generation_regime(config, len(r.ids), n) for r, n in zip(rows, new, strict=True)]
    batches = []
    for part in alike(keys):
        order = sorted(part, key=lambda i: (-len(rows[i].ids), rows[i].ids))
        room, start = max((extra[i] for i in part), default=0) if extra else 0, 0
        while start < len(order):
            longest = len(rows[order[start]].ids) + room
            size = max(1, min(batch_tokens // longest, most))
            batches.append(order[start : start + size])
            start += size
    return batches


@dataclass
class _Pass:
    """Results of a pass over the prompts of a batch."""

    logits: Float[Tensor, "b n V"]
    cache: Any
    mask: Int[Tensor, "b t"]
    positions: Int[Tensor, "b w"]
    change: BatchEdit


def _window(rows: Sequence[Row], width: int, n_last: int) -> int:
    """Number of last tokens that must be run for each row separately."""
    changed = max(len(r.ids) - r.first_changed for r in rows)
    return min(width, max(1, n_last, changed))


@dataclass
class _Inputs:
    """Prompts of a batch from token `start` on; earlier tokens, if any, are in a cache."""

    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    start: int

    def of(self, rows: Any) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[rows, self.start :],
            "attention_mask": self.mask[rows],
            "position_ids": self.positions[rows, self.start :],
        }


def _lower_blocks(
    model: LanguageModel,
    rows: Sequence[Row],
    run: _Inputs,
    change: BatchEdit,
    cache: Any,
    of_prefix: Sequence[int],
) -> AbstractContextManager[None] | None:
    """Run the blocks below the lowest edit once per distinct prompt.

    Returns a context in which the model continues from their output, with `cache` per prefix below
    and per row above; None where this would save too little.
    """
    n_blocks = change.n_untouched(model.n_layers) if may_skip(model) else 0
    prompt_numbers: dict[tuple[int, ...], int] = {}
    of_row = [prompt_numbers.setdefault(row.ids, len(prompt_numbers)) for row in rows]
    saved_fraction = (1 - len(prompt_numbers) / len(rows)) * n_blocks / model.n_layers
    if saved_fraction <= _MIN_SAVED or shares_keys_between_blocks(model):
        return None
    first_row: dict[int, int] = {}
    for i, number in enumerate(of_row):
        first_row.setdefault(number, i)
    firsts = torch.tensor(list(first_row.values()), device=model.device)
    below = None
    if cache is not None:
        below = copy.copy(cache)
        below.layers = [copy.copy(layer) for layer in cache.layers]
        prefixes = torch.tensor([of_prefix[i] for i in first_row.values()])
        _choose(below.layers[:n_blocks], prefixes)
    output = after_blocks(
        model,
        n_blocks,
        **run.of(firsts),
        past_key_values=below,
        use_cache=below is not None,
        **keep_last_logits(model, 1),
    )
    if not can_skip(model, output):
        return None
    if cache is not None:
        _choose(cache.layers[n_blocks:], torch.tensor(list(of_prefix)))
    return skipping(model, n_blocks, output, torch.tensor(of_row))


def _choose(layers: Sequence[Any], chosen: Int[Tensor, " n"]) -> None:
    for layer in layers:
        layer.reorder_cache(chosen)


def _same_frequencies(model: LanguageModel, rows: Sequence[Row], window: int) -> bool:
    """Whether prompts without their last `window` tokens have the frequencies of whole ones."""
    config = model.text_config
    return all(
        rope_regime(config, n - window) == rope_regime(config, n)
        for n in {len(row.ids) for row in rows}
    )


def _prefill(
    model: LanguageModel, rows: Sequence[Row], saes: SAEs, n_last: int, *, use_cache: bool
) -> _Pass:
    """Run prompts with their operations; logits at each row's last `n_last` tokens."""
    ids, mask = padded([r.ids for r in rows], model.pad_id, model.device, padding_side="left")
    width = ids.shape[1]
    change = BatchEdit(rows, width, saes, model.device)
    model.check_streams(change.streams)
    positions = position_ids(mask)
    window = _window(rows, width, n_last)
    numbers: dict[tuple[int, ...], int] = {}
    of_row = [numbers.setdefault(r.ids[:-window], len(numbers)) for r in rows]
    saved = (len(rows) - len(numbers)) * (width - window)
    cache = None
    if saved > _MIN_SAVED * len(rows) * width and _same_frequencies(model, rows, window):
        firsts = torch.tensor([of_row.index(n) for n in range(len(numbers))], device=model.device)
        shared = model.hf(
            input_ids=ids[firsts, :-window],
            attention_mask=mask[firsts, :-window],
            position_ids=positions[firsts, :-window],
            use_cache=True,
            **keep_last_logits(model, 1),
        )
        cache = shared.past_key_values if is_plain(shared.past_key_values) else None
    if cache is None:
        window = width
    run = _Inputs(ids, mask, positions, width - window)
    lower = None if use_cache else _lower_blocks(model, rows, run, change, cache, of_row)
    if lower is None and cache is not None:
        cache.reorder_cache(torch.tensor(of_row))
    with lower or nullcontext(), edit_streams(model, change.functions(window)):
        out = model.hf(
            **run.of(slice(None)),
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
            **keep_last_logits(model, n_last),
        )
    # NaN is the largest to amax; a model may give some tokens -inf.
    _check_finite(model, rows, out.logits[:, -1].amax(-1), generating=use_cache)
    return _Pass(
        out.logits[:, -n_last:], out.past_key_values, mask, positions[:, width - window :], change
    )


def _check_finite(
    model: LanguageModel, rows: Sequence[Row], highest: Float[Tensor, " b"], *, generating: bool
) -> None:
    """Raise ModelError where a row without operations has a NaN or infinite highest logit, and
    InterventionError where operations cause that while generating (the argmax would hide it)."""
    bad = (~highest.isfinite()).nonzero()[:, 0].tolist()
    for row in (rows[i] for i in bad):
        text = model.tokenizer.decode(row.ids)[-60:]
        problem = f"NaN or Inf in the logits of {model.name} after the prompt that ends '{text}'"
        problem = " ".join(f"{problem}, in {str(model.dtype).removeprefix('torch.')}".split())
        wider = "" if model.dtype == torch.float32 else "try dtype=float32, or "
        if not row.active:
            raise ModelError(f"{problem}: {wider}check the model's weights")
        if generating:
            raise InterventionError(f"{problem}, under intervention: {wider}a smaller coefficient")


@torch.inference_mode()
def last_logits(
    model: LanguageModel, rows: Sequence[Row], saes: SAEs | None = None, n_last: int = 1
) -> Float[Tensor, "b n V"]:
    """Logits after each prompt's last `n_last` tokens, all rows in one batch.

    n is `n_last`, or the longest prompt's length if that is smaller. Rows are aligned at their end:
    `logits[i, -k]` follows the k-th last token of row i. Entries left of a shorter row's first
    token belong to padding and have no meaning.
    """
    return _prefill(model, rows, saes or {}, n_last, use_cache=False).logits


@torch.inference_mode()
def read_streams(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs,
    hookpoints: Sequence[Hookpoint],
    positions: Sequence[Sequence[int]],
) -> dict[Hookpoint, list[Float[Tensor, "n d"]]]:
    """Streams at prompt tokens `positions[i]` of row i, with its operations; all rows in one batch.

    No block after the deepest hookpoint runs.
    """
    ids, mask = padded([r.ids for r in rows], model.pad_id, model.device, padding_side="left")
    width = ids.shape[1]
    change = BatchEdit(rows, width, saes, model.device)
    model.check_streams(change.streams)
    row_of = [i for i, chosen in enumerate(positions) for _ in chosen]
    tokens = [
        width - len(row.ids) + p
        for row, chosen in zip(rows, positions, strict=True)
        for p in chosen
    ]
    where = (torch.tensor(row_of, dtype=torch.long), torch.tensor(tokens, dtype=torch.long))
    with edit_streams(model, change.functions(width)):
        values = run_truncated(model, ids, mask, hookpoints, where)
    sizes = [len(chosen) for chosen in positions]
    return {at: list(tensor.split(sizes)) for at, tensor in values.items()}


class _Drawing:
    """Next tokens from logits: the argmax, or a sample that depends on the row alone."""

    def __init__(self, rows: Sequence[Row], steps: int, device: torch.device) -> None:
        self.device = device
        self.temperature = torch.tensor(
            [r.sample.temperature if r.sample else 1.0 for r in rows], device=device
        )
        self.sampled = torch.tensor([r.sample is not None for r in rows], device=device)
        uniform = np.zeros((len(rows), steps))
        for i, row in enumerate(rows):
            if row.sample is not None:
                digest = hashlib.sha256(repr(row.key).encode()).digest()
                generator = np.random.default_rng(list(digest))
                uniform[i] = generator.random(steps)
        self.uniform = torch.from_numpy(uniform).to(device)

    def rest(self, rows: Sequence[int], first_step: int) -> "_Drawing":
        """For these rows only, from that step on."""
        rest, chosen = copy.copy(self), torch.tensor(rows, device=self.device)
        rest.temperature, rest.sampled = self.temperature[chosen], self.sampled[chosen]
        rest.uniform = self.uniform[chosen, first_step:]
        return rest

    def draw(self, logits: Float[Tensor, "b V"], step: int, alive: Tensor) -> Int[Tensor, " b"]:
        """One token for each row that is not finished."""
        alive = alive.to(self.device)
        tokens = logits.argmax(-1)
        sampled = self.sampled[alive]
        if not bool(sampled.any()):
            return tokens
        scaled = logits[sampled].float() / self.temperature[alive][sampled, None]
        cumulative = scaled.softmax(-1).double().cumsum(-1)
        level = self.uniform[alive, step][sampled, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, level)[:, 0].clamp(max=logits.shape[-1] - 1)
        tokens[sampled] = drawn
        return tokens


@torch.inference_mode()
def greedy_tokens(
    model: LanguageModel, rows: Sequence[Row], saes: SAEs, n_last: Sequence[int]
) -> list[list[int]]:
    """The greedy token after each of row i's last `n_last[i]` tokens, in order.

    `n_last[i]` is at most the row's number of tokens.
    """
    for row, n in zip(rows, n_last, strict=True):
        assert 1 <= n <= len(row.ids), f"{n} tokens requested from a row of {len(row.ids)}"
    highest, argmax = last_logits(model, rows, saes, max(n_last)).max(-1)
    for row, values, n in zip(rows, highest, n_last, strict=True):
        _check_finite(model, [row] * n, values[-n:], generating=True)
    return [tokens[-n:] for tokens, n in zip(argmax.tolist(), n_last, strict=True)]


@torch.inference_mode()
def _generate_batch(
    model: LanguageModel, rows: Sequence[Row], saes: SAEs, limits: Sequence[int]
) -> list[list[int]]:
    """New tokens per row, at most its limit, without the end token; all rows in one batch."""
    drawing = _Drawing(rows, max(limits), model.device)
    continuations: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for stop in _stops(model, rows, max(limits)):
        left = [min(limits[i], stop) - len(continuations[i]) for i in alive]
        tokens_of_row = _decode(
            model, [rows[i].followed_by(continuations[i]) for i in alive], saes, left, drawing
        )
        for i, tokens in zip(alive, tokens_of_row, strict=True):
            continuations[i] += tokens
        # A row with fewer tokens has ended.
        going_on = [k for k, i in enumerate(alive) if len(continuations[i]) == stop < limits[i]]
        if not going_on:
            break
        drawing = drawing.rest(going_on, max(left))
        alive = [alive[k] for k in going_on]
    return continuations


def _stops(model: LanguageModel, rows: Sequence[Row], n_steps: int) -> list[int]:
    """Numbers of new tokens after which all keys are recomputed, and finally `n_steps`.

    Rows whose rotary frequencies change while generating have equal lengths (`in_batches`).
    """
    n = len(rows[0].ids)
    if not changes_while_generating(model.text_config, n, n_steps):
        return [n_steps]
    context = recomputes_beyond(model.hf, model.text_config)
    if context is None or not n <= context < n + n_steps - 1:
        return [n_steps]
    return [context - n + 1, n_steps]


def _decode(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs,
    limits: Sequence[int],
    drawing: _Drawing,
) -> list[list[int]]:
    """Decode token by token with a key-value cache."""
    eos = torch.tensor(model.eos_ids, device=model.device)
    n_steps = max(limits)
    generated = np.full((len(rows), n_steps), -1)
    alive, most = torch.arange(len(rows)), torch.tensor(limits)
    finished = most < 1
    state = _prefill(model, rows, saes, 1, use_cache=True)
    cache, mask, positions = state.cache, state.mask, state.positions
    logits = state.logits[:, -1]
    keep_one = keep_last_logits(model, 1)
    # A finished row that stayed in the batch would grow, and its length would set the frequencies.
    drop_fraction = 0.0 if depends_on_length(model.text_config) else _DROP_FRACTION
    for step in range(n_steps):
        following = drawing.draw(logits, step, alive)
        finished |= torch.isin(following, eos).cpu()
        generated[alive[~finished].numpy(), step] = following.cpu()[~finished].numpy()
        finished |= most[alive] <= step + 1
        if bool(finished.all()):
            break
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        inputs = following[:, None]
        if bool(finished.any()) and float(finished.double().mean()) >= drop_fraction:
            chosen = (~finished).nonzero()[:, 0]
            on_device = chosen.to(model.device)
            cache.reorder_cache(chosen)
            inputs, mask, positions = inputs[on_device], mask[on_device], positions[on_device]
            state.change.keep(on_device)
            alive, finished = alive[chosen], finished[chosen]
        with edit_streams(model, state.change.functions(None)):
            out = model.hf(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **keep_one,
            )
        cache, logits = out.past_key_values, out.logits[:, -1]
        unfinished = [rows[i] for i in alive[~finished].tolist()]
        highest = logits.amax(-1)[(~finished).to(model.device)]
        _check_finite(model, unfinished, highest, generating=True)
    return [row[row >= 0].tolist() for row in generated]
