"""One truncated forward pass over the texts, for the hookpoints and shards that are missing."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saexp.activations.store import ActivationStore, locked
from saexp.config import StoreConfig
from saexp.context import progress
from saexp.data.positions import Placement
from saexp.errors import ModelError, StoreError
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import run_truncated
from saexp.models.loading import LanguageModel, pick_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectionStats:
    """What a collection did."""

    n_rows: int
    n_skipped: int
    tokens_forwarded: int
    """Tokens that went through the model, without padding; 0 when everything was stored."""
    padding_share: float
    """Share of padding among what was forwarded."""
    seconds: float


def ingredients(
    model: LanguageModel, placement: Placement, max_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What determines the stored values; the store's key is a hash of this."""
    ids, places = hashlib.sha256(), hashlib.sha256()
    for text in placement.texts:
        ids.update(np.asarray([len(text), *text.ids], dtype="<i8").tobytes())
    for column in ("text_id", "token_index"):
        places.update(placement.rows[column].to_numpy("<i8").tobytes())
    return {
        "model": model.name,
        "revision": model.cfg.revision,
        "weights": model.fingerprint,
        "tokenizer": model.tokenizer_fingerprint,
        "texts": ids.hexdigest(),
        "positions": places.hexdigest(),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": max_length,
    }


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices sorted by length, longest first, in batches of at most `batch_tokens` with padding.

    A text longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def collect(
    model: LanguageModel,
    placement: Placement,
    hookpoints: Sequence[Hookpoint],
    *,
    cache_dir: str | Path,
    cfg: StoreConfig,
    max_length: int,
    n_skipped: int = 0,
) -> tuple[ActivationStore, CollectionStats]:
    """A store with these hookpoints at these positions; the model runs only for what is missing.

    Raises ModelError for a layer the model lacks and a text it cannot hold, StoreError for NaN or
    Inf and for a folder that cannot be written.
    """
    began = time.perf_counter()
    for hookpoint in hookpoints:
        model.check_layer(hookpoint.layer)
    _check_length(model, int(placement.rows["token_index"].max()) + 1)
    wanted = sorted({h.stored for h in hookpoints})
    dtype = model.dtype if cfg.dtype == "auto" else pick_dtype(cfg.dtype, model.device)
    store = ActivationStore.create_or_open(
        cache_dir,
        ingredients(model, placement, max_length, dtype),
        placement.rows,
        shard_rows=cfg.shard_rows,
    )
    forwarded = padded = 0
    if store.missing(wanted):
        with locked(store.path / ".collect.lock"):
            # Another process may have computed it while this one waited.
            store.reload()
            todo = store.missing(wanted)
            rows = sum(store.shard_bounds[i][1] - store.shard_bounds[i][0] for i in todo)
            with progress(rows, "collecting", "row") as bar:
                for index, absent in todo.items():
                    first, end = store.shard_bounds[index]
                    shard = _Shard(model, placement, absent, first, end, dtype)
                    for used, filled, done in shard.run(cfg.batch_tokens):
                        forwarded, padded = forwarded + used, padded + filled
                        bar.update(done)
                    for hookpoint, acts in shard.out.items():
                        store.write_shard(hookpoint, index, acts)
    seconds = time.perf_counter() - began
    log.info(
        "collected %d rows, %d tokens forwarded, %d skipped, %.1f s (%s)",
        store.n_rows,
        forwarded,
        n_skipped,
        seconds,
        store.path.name,
    )
    share = padded / (forwarded + padded) if forwarded else 0.0
    return store, CollectionStats(store.n_rows, n_skipped, forwarded, share, seconds)


def _check_length(model: LanguageModel, longest: int) -> None:
    limit = getattr(model.text_config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        short = model.name.rpartition("/")[2]
        raise ModelError(
            f"a text is {longest} tokens long, but {short} takes at most {limit}; "
            f"try dataset.max_length={limit}"
        )


class _Shard:
    """The rows of one shard, filled batch by batch whatever the batch order."""

    def __init__(
        self,
        model: LanguageModel,
        placement: Placement,
        hookpoints: list[Hookpoint],
        first: int,
        end: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.texts, self.hookpoints, self.dtype = (
            model,
            placement.texts,
            hookpoints,
            dtype,
        )
        self.out: dict[Hookpoint, Tensor] = {}
        self.n_rows = end - first
        columns = placement.rows.iloc[first:end][["text_id", "token_index"]]
        self.of_text: dict[int, list[tuple[int, int]]] = {}
        for row, (text_id, token) in enumerate(columns.itertuples(index=False)):
            self.of_text.setdefault(int(text_id), []).append((row, int(token)))

    def run(self, batch_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Yields (tokens, padding, rows done) per batch.

        A causal model's values do not depend on what comes later, so each text is forwarded up to
        its last wanted position only.
        """
        text_ids = list(self.of_text)
        lengths = [max(t for _, t in self.of_text[i]) + 1 for i in text_ids]
        for batch in batches(lengths, batch_tokens):
            longest = lengths[batch[0]]
            ids = torch.full((len(batch), longest), self.model.pad_id)
            mask = torch.zeros_like(ids)
            in_batch, in_text, rows = [], [], []
            for number, index in enumerate(batch):
                n = lengths[index]
                ids[number, :n] = torch.tensor(self.texts[text_ids[index]].ids[:n])
                mask[number, :n] = 1
                for row, token in self.of_text[text_ids[index]]:
                    in_batch.append(number)
                    in_text.append(token)
                    rows.append(row)
            device = self.model.device
            record = run_truncated(
                self.model,
                ids.to(device),
                mask.to(device),
                self.hookpoints,
                (torch.tensor(in_batch, device=device), torch.tensor(in_text, device=device)),
            )
            for hookpoint, values in record.items():
                self._keep(hookpoint, values, rows, [text_ids[i] for i in batch], in_batch)
            n_tokens = int(mask.sum())
            yield n_tokens, mask.numel() - n_tokens, len(rows)

    def _keep(
        self,
        hookpoint: Hookpoint,
        values: Tensor,
        rows: list[int],
        text_ids: list[int],
        in_batch: list[int],
    ) -> None:
        stored = values.to("cpu", self.dtype)
        finite = torch.isfinite(stored).all(dim=-1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            text = self.texts[text_ids[in_batch[bad]]].text[:60]
            key = "store.dtype" if bool(torch.isfinite(values[bad]).all()) else "dtype"
            raise StoreError(
                f"NaN or Inf at {hookpoint.name} in the text '{text}'; try {key}=float32"
            )
        if hookpoint not in self.out:
            self.out[hookpoint] = torch.empty((self.n_rows, values.shape[-1]), dtype=self.dtype)
        self.out[hookpoint][torch.tensor(rows)] = stored
