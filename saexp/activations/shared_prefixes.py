"""Forward passes over one shard's texts, in batches that share prefixes."""

import copy
import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from saexp.data.rows import PositionRows
from saexp.errors import ModelError, brief
from saexp.models import Hookpoint
from saexp.models.forward import (
    TokenBudget,
    batches,
    by_regime,
    depends_on_length,
    padded,
    rope_regime,
)
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)


MIN_SHARED = 16
"""Minimum tokens of a shared prefix; a shorter one costs as much to keep as to compute."""
_CACHED_TOKENS_PER_TOKEN = 4
"""So many tokens with cached keys and values count in a batch as one token that is computed."""
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""dtype -> largest distance from the value without prefix sharing, relative to its norm."""


@dataclass(frozen=True)
class Group:
    """Sequences [first, end) of a sorted list that share their first `n_shared` tokens."""

    n_shared: int
    first: int
    end: int


@dataclass(frozen=True)
class Past:
    """Keys and values of a shared prefix."""

    ids: tuple[int, ...]
    cache: Any

    def rows(self, n: int) -> Any:
        """A cache of `n` rows with this prefix, expanded without a copy."""
        expanded = copy.copy(self.cache)
        expanded.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in expanded.layers:
            # A block above the deepest requested stream did not run.
            if layer.keys is not None:
                layer.keys = layer.keys.expand(n, -1, -1, -1)
                layer.values = layer.values.expand(n, -1, -1, -1)
        return expanded

    def cost(self, length: int) -> float:
        """Number of tokens as which a text of `length` tokens counts in a batch."""
        return float(max(length - len(self.ids), length / _CACHED_TOKENS_PER_TOKEN))


def empty_past(model: LanguageModel) -> Any:
    """An empty cache for a forward pass; None for a model that keeps other state too."""
    about = model.text_config
    if not model.observed.shares_prefixes or getattr(about, "num_kv_shared_layers", 0):
        return None
    if "past_key_values" not in inspect.signature(type(model.hf).forward).parameters:
        return None
    cache = DynamicCache(config=about)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if cache.layers and plain else None


def depth(hookpoints: Sequence[Hookpoint], *, complete: bool) -> int:
    """Number of blocks up to the deepest hookpoint; `complete` leaves out one that runs in part."""
    blocks = [
        0 if h.stream == "embed" else h.layer + (h.stream == "resid_post" or not complete)
        for h in (h.stored for h in hookpoints)
    ]
    return max(blocks, default=0)


def compare_prefixes(
    model: LanguageModel, hookpoints: Sequence[Hookpoint], pairs: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Decide whether the model can share prefixes, and log a warning where it cannot.

    `pairs` are values `[n, width]` of a text behind a shared prefix and of the same text alone,
    which must be equal up to rounding. The decision holds up to the deepest of these hookpoints.
    """
    distance = max(_distance(a.double(), b.double()) for a, b in pairs)
    kinds = (model.dtype, pairs[0][0].dtype)
    if distance <= max(_TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) for dtype in kinds):
        model.observed.n_blocks_compared = max(
            model.observed.n_blocks_compared, depth(hookpoints, complete=True)
        )
    else:
        refuse(model, f"other values (by {distance:.1g} of their norm)")


def refuse(model: LanguageModel, problem: str) -> None:
    """Stop sharing prefixes with this model, with a warning."""
    model.observed.shares_prefixes = False
    log.warning(
        "%s gives %s where texts share a prefix; every text is forwarded whole",
        model.name,
        problem,
    )


def _distance(shared: Tensor, alone: Tensor) -> float:
    """The largest distance of two rows relative to their norm; infinite where one is NaN."""
    away = (shared - alone).norm(dim=-1) / alone.norm(dim=-1)
    away = torch.where((shared == alone).all(dim=-1), 0.0, away)
    return float(away.nan_to_num(nan=float("inf")).max())


def _common(a: Sequence[int], b: Sequence[int], least: int) -> int:
    """Length of the common prefix; 0 where it is shorter than `least`."""
    low, high = least, min(len(a), len(b))
    if high < low or a[:low] != b[:low]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class _Open:
    """An interval of neighbours with a common prefix whose end is not reached yet."""

    n_shared: int
    first: int
    saves: int
    groups: tuple[Group, ...]


def groups(
    sequences: Sequence[tuple[int, ...]], min_saved: int, least: int = MIN_SHARED
) -> list[Group]:
    """Disjoint groups, in order, that save the most tokens beyond `min_saved` for each group.

    `sequences` are sorted in either direction, and none is a prefix of another. A group of n
    sequences with p >= `least` tokens in common saves (n - 1) p tokens. One pass over the intervals
    of common prefixes (Abouelhoda, Kurtz and Ohlebusch 2004, algorithm 4.4): each becomes one group
    or the groups inside it, whichever saves more.
    """
    stack = [_Open(0, 0, 0, ())]
    for i in range(1, len(sequences) + 1):
        shared = _common(sequences[i - 1], sequences[i], least) if i < len(sequences) else 0
        first, closed = i - 1, None
        while stack[-1].n_shared > shared:
            closed = _close(stack.pop(), i, min_saved)
            first = closed.first
            if stack[-1].n_shared >= shared:
                stack[-1].saves += closed.saves
                stack[-1].groups += closed.groups
                closed = None
        if shared > stack[-1].n_shared:
            saves, inner = (closed.saves, closed.groups) if closed else (0, ())
            stack.append(_Open(shared, first, saves, inner))
    return list(stack[0].groups)


def _close(opened: _Open, end: int, min_saved: int) -> _Open:
    saves = (end - opened.first - 1) * opened.n_shared - min_saved
    if saves > opened.saves:
        opened.saves = saves
        opened.groups = (Group(opened.n_shared, opened.first, end),)
    return opened


@dataclass(frozen=True)
class Unit:
    """Token ids to forward, and the rows read from them."""

    ids: tuple[int, ...]
    rows: Int[np.ndarray, "n 3"]
    """(row in the shard's file, token index, text id)."""


@dataclass(frozen=True)
class Batch:
    """Activations of one forward pass at the requested rows."""

    rows: np.ndarray
    text_ids: np.ndarray
    host: dict[Hookpoint, Callable[[], Tensor]]
    """Functions that wait for the copy to the CPU and return `[n, width]` in the store's dtype."""
    n_tokens: int
    n_padding: int


@dataclass(frozen=True)
class PaddedUnits:
    """Units as one right-padded batch."""

    ids: Int[Tensor, "b t"]
    """Without the tokens of a shared prefix."""
    mask: Int[Tensor, "b prefix_and_t"]
    at: Int[Tensor, "2 n"]
    """(row of `ids`, index into it) of each position that is read."""
    rows: np.ndarray
    text_ids: np.ndarray

    def batch(self, host: dict[Hookpoint, Callable[[], Tensor]]) -> Batch:
        """The batch of these positions with its values."""
        n_tokens = int(self.mask[:, -self.ids.shape[1] :].sum())
        return Batch(self.rows, self.text_ids, host, n_tokens, self.ids.numel() - n_tokens)


def pad(sequences: Sequence[Unit], pad_id: int, n_past: int = 0) -> PaddedUnits:
    """Pad units on the right; the first `n_past` tokens, shared by all, are in the mask alone."""
    ids, mask = padded([unit.ids for unit in sequences], pad_id, padding_side="right")
    reads = np.concatenate([unit.rows for unit in sequences])
    number = np.repeat(np.arange(len(sequences)), [len(unit.rows) for unit in sequences])
    behind = reads[:, 1] >= n_past
    number, (row, token, text) = number[behind], reads[behind].T
    at = torch.from_numpy(np.stack([number, token - n_past]))
    return PaddedUnits(ids[:, n_past:], mask, at, row, text)


def units(
    positions: PositionRows, row_numbers: Int[np.ndarray, " n"], config: Any = None
) -> list[Unit]:
    """Token sequences to forward for these rows, which a shard's file stores in this order.

    The activations of a causal model do not depend on later tokens: a text is forwarded up to its
    last requested position only, and a prefix of another text is read from that text's pass. Where
    rotary frequencies depend on the length (by the language model's `config`), this holds among
    lengths with the same frequencies.
    """
    if not len(row_numbers):
        return []
    first = int(row_numbers[0])
    numbers = positions.numbers(first, int(row_numbers[-1]) + 1)
    text_id, token = (column[row_numbers - first] for column in numbers[:2])
    reads = np.stack([np.arange(len(row_numbers)), token, text_id], axis=1)
    order = np.argsort(text_id, kind="stable")
    starts = np.flatnonzero(np.diff(text_id[order], prepend=-1))
    sequences, by_length = [], depends_on_length(config)
    for rows in np.split(reads[order], starts[1:]):
        ids = positions.ids(int(rows[0, 2]))
        n_read = int(rows[:, 1].max()) + 1
        if by_length and rope_regime(config, n_read) != rope_regime(config, len(ids)):
            n_read = len(ids)
        sequences.append(Unit(ids[:n_read], rows))
    # Sorted, sequences follow their prefixes directly.
    sequences.sort(key=lambda unit: unit.ids)
    todo: list[Unit] = []
    for part in by_regime(config, [len(unit.ids) for unit in sequences]):
        merged: list[Unit] = []
        for unit in reversed([sequences[i] for i in part]):
            if merged and merged[-1].ids[: len(unit.ids)] == unit.ids:
                rows = np.concatenate([merged[-1].rows, unit.rows])
                merged[-1] = Unit(merged[-1].ids, rows)
            else:
                merged.append(unit)
        todo += merged
    return todo


def forward(
    model: LanguageModel,
    todo: Sequence[Unit],
    hookpoints: Sequence[Hookpoint],
    budget: TokenBudget,
    dtype: torch.dtype,
    *,
    share_prefixes: bool = True,
) -> Iterator[Batch]:
    """One truncated pass over all units, as `units` orders them, batch by batch.

    Raises ModelError where a single text does not fit into the device's memory.
    """
    run = _Forward(model, hookpoints, budget, HostCopies(dtype))
    if not share_prefixes or not depth(hookpoints, complete=False):
        yield from run.all(todo)
        return
    alone: list[Unit] = []
    for part in by_regime(model.text_config, [len(unit.ids) for unit in todo]):
        alone += yield from run.shared([todo[i] for i in part])
    yield from run.all(alone)


class _Forward:
    """Passes over units of one shard."""

    def __init__(
        self,
        model: LanguageModel,
        hookpoints: Sequence[Hookpoint],
        budget: TokenBudget,
        copies: "HostCopies",
    ) -> None:
        self.model, self.hookpoints = model, hookpoints
        self.budget, self.copies = budget, copies

    def shared(self, todo: Sequence[Unit]) -> Generator[Batch, None, list[Unit]]:
        """Batches of the units that share a long prefix; returns the others.

        All have the same rotary frequencies; a prefix is shared only if it has them too.
        """
        alone = list(range(len(todo)))
        config, longest = self.model.text_config, max(len(unit.ids) for unit in todo)
        # A group must save more than the partly filled batches at its ends cost.
        for group in groups([unit.ids for unit in todo], min_saved=self.budget.tokens):
            if rope_regime(config, group.n_shared) != rope_regime(config, longest):
                continue
            within = range(group.first, group.end)
            prefix = self.begin([todo[i] for i in within], group.n_shared)
            if prefix is not None:
                alone = [i for i in alone if i not in within]
                yield prefix[0]
                yield from self.all([todo[i] for i in within], prefix[1])
        return [todo[i] for i in alone]

    def all(self, todo: Sequence[Unit], past: Past | None = None) -> Iterator[Batch]:
        """Batches of these units, behind `past` where all of them share that prefix."""
        costs = [past.cost(len(u.ids)) if past else len(u.ids) for u in todo]
        plan = batches(costs, self.budget, None if past else self.model.text_config)
        indices = next(plan, None)
        while indices is not None:
            batch = self._run([todo[i] for i in indices], past)
            if batch is None:
                if len(indices) == 1:
                    raise self._too_long(len(todo[indices[0]].ids))
                torch.cuda.empty_cache()
                self.budget.halve(int(costs[indices[0]] * len(indices)))
                indices = plan.send(False)
                continue
            yield batch
            indices = next(plan, None)

    def begin(self, todo: Sequence[Unit], n_shared: int) -> tuple[Batch, Past] | None:
        """Forward the shared prefix: (its rows, its keys and values); None where the model cannot
        share it. The first time, the longest unit is forwarded whole as well, to compare."""
        past = Past(todo[0].ids[:n_shared], empty_past(self.model))
        if past.cache is None:
            return None
        reads = np.concatenate([unit.rows for unit in todo])
        rows = reads[reads[:, 1] < n_shared]
        trusted = depth(self.hookpoints, complete=False) <= self.model.observed.n_blocks_compared
        n_more = 0
        try:
            batch = self._run([Unit(past.ids, rows)], cache=past.cache)
            if batch is None:
                raise self._too_long(n_shared)
            if not trusted:
                n_more = self._compare(max(todo, key=lambda u: len(u.ids)), past)
        except ModelError:
            raise
        except Exception as error:
            if trusted:
                raise
            # Custom model code may take another kind of cache.
            reason = brief(str(error), 120)
            refuse(self.model, f"an error ({type(error).__name__}: {reason})")
            return None
        batch = replace(batch, n_tokens=batch.n_tokens + n_more)
        return (batch, past) if self.model.observed.shares_prefixes else None

    def _compare(self, unit: Unit, past: Past) -> int:
        """Decide whether the model can share prefixes; returns the tokens forwarded for it."""
        shared, alone = (self._run([unit], p) for p in (past, None))
        if shared is None or alone is None:
            raise self._too_long(len(unit.ids))
        at = np.flatnonzero(np.isin(alone.rows, shared.rows))
        pairs = [(wait(), alone.host[h]()[at]) for h, wait in shared.host.items()]
        compare_prefixes(self.model, self.hookpoints, pairs)
        return shared.n_tokens + alone.n_tokens

    def _too_long(self, n_tokens: int) -> ModelError:
        return ModelError(
            f"a text of {n_tokens} tokens does not fit into the memory of {self.model.device}; "
            "try dtype=bfloat16, a smaller dataset.max_length, or model.device_map=auto"
        )

    def _run(
        self, sequences: Sequence[Unit], past: Past | None = None, cache: Any = None
    ) -> Batch | None:
        """Forward one batch, behind `past` or into an empty cache; None where memory runs out."""
        n_past = len(past.ids) if past else 0
        padded = pad(sequences, self.model.pad_id, n_past)
        device = self.model.device
        try:
            # Moved once, because moving at every hook would wait for the device.
            at = padded.at.to(device)
            values = run_truncated(
                self.model,
                padded.ids.to(device),
                padded.mask.to(device),
                self.hookpoints,
                (at[0], at[1]),
                cache=past.rows(len(sequences)) if past else cache,
            )
            host = {hookpoint: self.copies.start(v) for hookpoint, v in values.items()}
        except torch.OutOfMemoryError:
            return None
        return padded.batch(host)


class HostCopies:
    """Copies to the CPU that, on CUDA, overlap with the next batch (pinned memory, own stream).

    Blocks of one model may be on several devices; each has a stream of its own for copies.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.streams: dict[torch.device, Any] = {}

    def start(self, values: Tensor) -> Callable[[], Tensor]:
        """Start copying `[n, width]`; the returned function waits for the copy and returns it."""
        narrow = values.to(self.dtype)
        device = narrow.device
        if device.type != "cuda":
            on_cpu = narrow.to("cpu")
            return lambda: on_cpu
        pinned = torch.empty(narrow.shape, dtype=self.dtype, pin_memory=True)
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream, ready = self.streams[device], torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            pinned.copy_(narrow, non_blocking=True)
            ready.record(stream)
        narrow.record_stream(stream)

        def wait() -> Tensor:
            ready.synchronize()
            return pinned

        return wait
