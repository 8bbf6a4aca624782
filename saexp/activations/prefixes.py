"""A beginning that many texts share, computed once: its keys and values, and who shares what.

Shapes: b texts of a batch, p tokens of the beginning, t tokens behind it (padded).
"""

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)

MIN_SHARED = 16
"""Tokens that a beginning has at least; shorter ones cost as much to carry as to compute."""
_HELD_SHARE = 4
"""A token whose keys and values are only held counts as this fraction of one that is computed."""
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""dtype -> how far a value may be from the one without sharing, relative to its norm."""


@dataclass(frozen=True)
class Group:
    """Sequences [first, end) of a sorted list, which begin with the same `n_shared` tokens."""

    n_shared: int
    first: int
    end: int


@dataclass(frozen=True)
class Past:
    """Keys and values of one beginning."""

    ids: tuple[int, ...]
    cache: Any

    def rows(self, n: int) -> Any:
        """A cache of `n` rows that all begin so; what is held is not copied."""
        made = copy.copy(self.cache)
        made.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in made.layers:
            # A block above the deepest stream wanted did not run.
            if layer.keys is not None:
                layer.keys = layer.keys.expand(n, -1, -1, -1)
                layer.values = layer.values.expand(n, -1, -1, -1)
        return made

    def cost(self, length: int) -> float:
        """Tokens that a text of `length` counts for in a batch."""
        return float(max(length - len(self.ids), length / _HELD_SHARE))


def empty_past(model: LanguageModel) -> Any:
    """A cache that a forward pass fills; None for a model whose rows it would not hold alone."""
    about = model.text_config
    if not model.shares_prefixes or getattr(about, "num_kv_shared_layers", 0):
        return None
    if "past_key_values" not in inspect.signature(type(model.hf).forward).parameters:
        return None
    cache = DynamicCache(config=about)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if cache.layers and plain else None


def depth(hookpoints: Sequence[Hookpoint], *, whole: bool) -> int:
    """Blocks that stand behind the deepest of these; `whole` counts no block that ran in part."""
    blocks = [
        0 if h.stream == "embed" else h.layer + (h.stream == "resid_post" or not whole)
        for h in (h.stored for h in hookpoints)
    ]
    return max(blocks, default=0)


def settle(
    model: LanguageModel, hookpoints: Sequence[Hookpoint], pairs: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Whether the model can share beginnings, by values `[n, width]` of a text with a shared one
    and of the same text alone: they must be equal up to rounding. Where not, a warning tells.

    It holds for the blocks that these hookpoints stand behind.
    """
    far = max(_distance(a.double(), b.double()) for a, b in pairs)
    kinds = (model.dtype, pairs[0][0].dtype)
    if far <= max(_TOLERANCE.get(dtype, _TOLERANCE[torch.float32]) for dtype in kinds):
        model.prefixes_compared = max(model.prefixes_compared, depth(hookpoints, whole=True))
    else:
        refuse(model, f"other values (by {far:.1g} of their norm)")


def refuse(model: LanguageModel, gives: str) -> None:
    """Forward every text of the model whole from here on, with a warning."""
    model.shares_prefixes = False
    log.warning(
        "%s gives %s where texts share their beginning; every text is forwarded whole",
        model.name,
        gives,
    )


def _distance(found: Tensor, alone: Tensor) -> float:
    """The rows' largest distance relative to their norm; infinite where one is no number."""
    away = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
    away = torch.where((found == alone).all(dim=-1), 0.0, away)
    return float(away.nan_to_num(nan=float("inf")).max())


def _common(a: Sequence[int], b: Sequence[int], least: int) -> int:
    """Tokens that both begin with; 0 where these are fewer than `least`."""
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
    """Neighbours that begin with the same tokens, while their end is not reached."""

    n_shared: int
    first: int
    saves: int
    groups: tuple[Group, ...]


def groups(
    sequences: Sequence[tuple[int, ...]], worth: int, least: int = MIN_SHARED
) -> list[Group]:
    """Disjoint groups, in order, that save the most tokens over `worth` that each must save.

    `sequences` are sorted, either way, and none begins another, so that each has a token of its
    own. A group of n that shares p tokens, at `least`, saves (n - 1) p. One pass over the intervals
    of common beginnings (Abouelhoda, Kurtz and Ohlebusch 2004, algorithm 4.4): each is taken whole,
    or as the groups in it, whichever saves more.
    """
    stack = [_Open(0, 0, 0, ())]
    for i in range(1, len(sequences) + 1):
        shared = _common(sequences[i - 1], sequences[i], least) if i < len(sequences) else 0
        first, closed = i - 1, None
        while stack[-1].n_shared > shared:
            closed = _close(stack.pop(), i, worth)
            first = closed.first
            if stack[-1].n_shared >= shared:
                stack[-1].saves += closed.saves
                stack[-1].groups += closed.groups
                closed = None
        if shared > stack[-1].n_shared:
            saves, found = (closed.saves, closed.groups) if closed else (0, ())
            stack.append(_Open(shared, first, saves, found))
    return list(stack[0].groups)


def _close(opened: _Open, end: int, worth: int) -> _Open:
    saves = (end - opened.first - 1) * opened.n_shared - worth
    if saves > opened.saves:
        opened.saves = saves
        opened.groups = (Group(opened.n_shared, opened.first, end),)
    return opened
