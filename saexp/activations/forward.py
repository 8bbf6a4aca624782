"""The forward pass over one shard's texts: each computed once, in batches that fit."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saexp.data.positions import Placement
from saexp.errors import ModelError
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)

AUTO_BATCH_TOKENS = {"cuda": 65536, "mps": 8192, "cpu": 1024}
"""Tokens per batch to begin with, by device type; on CUDA it halves until a batch fits."""


class TokenBudget:
    """Tokens per batch, padding included; smaller for good once memory did not suffice."""

    def __init__(self, batch_tokens: int | str, device: torch.device) -> None:
        auto = AUTO_BATCH_TOKENS.get(device.type, AUTO_BATCH_TOKENS["cpu"])
        self.tokens = auto if batch_tokens == "auto" else int(batch_tokens)

    def halve(self, tokens: int) -> None:
        """After `tokens` in one batch did not fit."""
        self.tokens = max(1, min(self.tokens, tokens) // 2)
        log.warning("out of memory at %d tokens a batch; going on with %d", tokens, self.tokens)


@dataclass(frozen=True)
class Unit:
    """Token ids to forward, and the rows that are read from them."""

    ids: tuple[int, ...]
    rows: list[tuple[int, int, int]]
    """(row in the shard's file, token index, text id)."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass gave at the rows wanted."""

    rows: np.ndarray
    text_ids: np.ndarray
    host: dict[Hookpoint, Callable[[], Tensor]]
    """Waits for the copy to the CPU; `[n, width]` in the store's dtype."""
    n_tokens: int
    n_padding: int


def units(placement: Placement, held: Int[np.ndarray, " n"]) -> list[Unit]:
    """What must be forwarded for these rows, the ones that a shard's file holds in this order.

    A causal model's values do not depend on what comes later: a text counts up to its last wanted
    position only, and one that begins another (or equals it) is read from the other's pass.
    """
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    columns = (placement.rows[c].to_numpy()[held].tolist() for c in ("text_id", "token_index"))
    for row, (text_id, token) in enumerate(zip(*columns, strict=True)):
        wanted.setdefault(text_id, []).append((row, token, text_id))
    found = [
        Unit(placement.texts[text_id].ids[: max(t for _, t, _ in rows) + 1], rows)
        for text_id, rows in wanted.items()
    ]
    # In this order all that begins with a sequence follows it directly.
    found.sort(key=lambda unit: unit.ids)
    kept: list[Unit] = []
    for unit in reversed(found):
        if kept and kept[-1].ids[: len(unit.ids)] == unit.ids:
            kept[-1].rows.extend(unit.rows)
        else:
            kept.append(unit)
    return kept


def batches(lengths: Sequence[int], budget: TokenBudget) -> Generator[list[int], bool | None, None]:
    """Indices sorted by length, longest first, in batches of at most the budget with padding.

    A text longer than the budget is a batch of its own. A batch that is answered by `send(False)`
    comes again, cut to what the budget is by then.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, budget.tokens // max(1, lengths[order[start]]))
        done = yield order[start : start + size]
        if done is not False:
            start += size


def forward(
    model: LanguageModel,
    todo: Sequence[Unit],
    hookpoints: Sequence[Hookpoint],
    budget: TokenBudget,
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """One truncated pass over all units, batch by batch.

    Raises ModelError where a single text does not fit into the device's memory.
    """
    copies = HostCopies(model.device, dtype)
    plan = batches([len(unit.ids) for unit in todo], budget)
    chosen = next(plan, None)
    while chosen is not None:
        batch = _run(model, [todo[i] for i in chosen], hookpoints, copies)
        if batch is None:
            longest = len(todo[chosen[0]].ids)
            if len(chosen) == 1:
                raise ModelError(
                    f"a text of {longest} tokens does not fit into the memory of {model.device}; "
                    "try dtype=bfloat16, a smaller dataset.max_length, or model.device_map=auto"
                )
            torch.cuda.empty_cache()
            budget.halve(longest * len(chosen))
            chosen = plan.send(False)
            continue
        yield batch
        chosen = next(plan, None)


def _run(
    model: LanguageModel, chosen: list[Unit], hookpoints: Sequence[Hookpoint], copies: "HostCopies"
) -> Batch | None:
    """One batch; None where memory did not suffice."""
    longest = max(len(unit.ids) for unit in chosen)
    ids = np.full((len(chosen), longest), model.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, unit in enumerate(chosen):
        ids[number, : len(unit.ids)] = unit.ids
        mask[number, : len(unit.ids)] = 1
    flat = np.asarray(
        [(n, token, row, text) for n, u in enumerate(chosen) for row, token, text in u.rows]
    )
    device = model.device
    try:
        values = run_truncated(
            model,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(mask).to(device),
            hookpoints,
            (torch.from_numpy(flat[:, 0].copy()), torch.from_numpy(flat[:, 1].copy())),
        )
        host = {hookpoint: copies.start(v) for hookpoint, v in values.items()}
    except torch.OutOfMemoryError:
        return None
    n_tokens = int(mask.sum())
    return Batch(flat[:, 2], flat[:, 3], host, n_tokens, mask.size - n_tokens)


class HostCopies:
    """Copies to the CPU that, on CUDA, run beside the next batch (pinned memory, own stream)."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin a copy of `[n, width]`; the function returned waits for it and hands it over."""
        narrow = values.to(self.dtype)
        if self.stream is None or narrow.device.type != "cuda":
            on_cpu = narrow.to("cpu")
            return lambda: on_cpu
        pinned = torch.empty(narrow.shape, dtype=self.dtype, pin_memory=True)
        ready = torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(narrow.device))
        with torch.cuda.stream(self.stream):
            pinned.copy_(narrow, non_blocking=True)
            ready.record(self.stream)
        narrow.record_stream(self.stream)

        def wait() -> Tensor:
            ready.synchronize()
            return pinned

        return wait
