"""Collects missing activations in one pass that processes share."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import BaseFileLock
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations.forward import Batch, TokenBudget, forward, units
from saexp.activations.reader import drop_damaged
from saexp.activations.shards import ShardWriter
from saexp.activations.store import ActivationStore, store_key
from saexp.config import StoreConfig
from saexp.context import progress
from saexp.data.positions import Placement
from saexp.errors import ModelError, StoreError
from saexp.files import free_bytes, is_writable, show_bytes, try_lock
from saexp.models.forward import context_limit
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel, pick_dtype
from saexp.models.rope import depends_on_length

log = logging.getLogger(__name__)


_folders: dict[Path, Path] = {}
"""Cache directory -> the folder of this process that stands in for it."""


def whole_store(
    cache_dir: Path,
    ingredients: Mapping[str, Any],
    rows: pd.DataFrame,
    hookpoints: Sequence[Hookpoint],
    *,
    verify: bool,
) -> ActivationStore | None:
    """The store of these ingredients, with `rows`; None where it lacks some of the hookpoints."""
    try:
        store = ActivationStore.open(
            cache_dir / "activations" / store_key(ingredients), verify=verify
        )
        # Of a damaged rows table the shards cannot be read.
        store.repeats  # noqa: B018
        if store.missing(hookpoints):
            return None
    except StoreError:
        return None
    store.show(rows)
    return store


def temporary_cache(cache_dir: Path) -> Path:
    """A folder in the system's temporary one, which is removed when this process ends."""
    key = cache_dir.absolute()
    if key not in _folders:
        folder = tempfile.mkdtemp(prefix="saexp-cache-")
        # Unlike atexit's, these run in workers of a launcher too, and not in forks.
        Finalize(
            None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0
        )
        _folders[key] = Path(folder)
    return _folders[key]


Complain = Callable[[Hookpoint, int, bool], StoreError]
"""(hookpoint, text id, whether it is NaN) -> the error for a value that is not finite."""


_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""dtype -> (integer type of its size, bits that are all set in NaN and infinities)."""


def finite_rows(acts: Float[Tensor, "n width"]) -> Bool[np.ndarray, " n"]:
    """Which rows hold only finite values.

    In numpy: torch's operators would start threads of their own here, which spin beside those of
    the forward pass and slow it by a tenth.
    """
    kind, mask = _EXPONENT[acts.dtype]
    bits = acts.contiguous().view(kind).numpy()
    return ((bits & mask) != mask).all(axis=-1)


class Ahead:
    """Hookpoints that are stored on the way, for other runs; what stands in their way stops those
    runs and not this one."""

    def __init__(self, hookpoints: list[Hookpoint]) -> None:
        self.hookpoints = hookpoints
        self.dropped: set[Hookpoint] = set()

    @property
    def left(self) -> list[Hookpoint]:
        """Those still stored."""
        return [h for h in self.hookpoints if h not in self.dropped]

    def drop(self, hookpoint: Hookpoint, reason: str) -> None:
        """Store it no more."""
        if hookpoint not in self.dropped:
            log.warning("%s is not stored on the way: %s", hookpoint.name, reason)
            self.dropped.add(hookpoint)


class ShardJob:
    """Holds the shard's lock until it is finished or given up."""

    def __init__(
        self,
        store: ActivationStore,
        index: int,
        hookpoints: list[Hookpoint],
        dtype: torch.dtype,
        lock: BaseFileLock,
        ahead: Ahead | None = None,
    ) -> None:
        self.store, self.index, self.hookpoints = store, index, hookpoints
        self.dtype, self.lock = dtype, lock
        self.ahead = ahead or Ahead([])
        self.writers: dict[Hookpoint, ShardWriter] = {}

    def write(self, batch: Batch, complain: Complain) -> None:
        """Put a batch's rows into the files; raises what `complain` makes of NaN and Inf.

        Where that is at a hookpoint stored ahead, for other runs, it is left to them.
        """
        if not len(batch.rows):
            return
        for hookpoint, wait in batch.host.items():
            acts = wait()
            finite = finite_rows(acts)
            if not finite.all():
                bad = int(np.flatnonzero(~finite)[0])
                nan = bool(torch.isnan(acts[bad]).any())
                error = complain(hookpoint, int(batch.text_ids[bad]), nan)
                if hookpoint not in self.ahead.hookpoints:
                    raise error
                self.ahead.drop(hookpoint, str(error))
            try:
                self._put(hookpoint, batch.rows, acts)
            except StoreError as error:
                if hookpoint not in self.ahead.hookpoints:
                    raise
                self.ahead.drop(hookpoint, str(error))
            if hookpoint in self.ahead.dropped and hookpoint in self.writers:
                self.writers.pop(hookpoint).discard()

    def _put(self, hookpoint: Hookpoint, rows: Int[np.ndarray, " n"], acts: Tensor) -> None:
        if hookpoint in self.ahead.dropped:
            return
        if hookpoint not in self.writers:
            writer = self.store.writer(hookpoint, self.index, acts.shape[1], self.dtype)
            self.writers[hookpoint] = writer
        self.writers[hookpoint].write(rows, acts)

    def finish(self) -> None:
        """Rename the files into place, list them, and let the shard go."""
        try:
            for hookpoint in self.hookpoints:
                if hookpoint not in self.writers and hookpoint not in self.ahead.dropped:
                    # Nothing but repeats: a file without rows.
                    self.writers[hookpoint] = self.store.writer(
                        hookpoint, self.index, 0, self.dtype
                    )
            entries = {}
            for hookpoint, writer in self.writers.items():
                try:
                    entries[hookpoint] = writer.finish()
                except StoreError as error:
                    if hookpoint not in self.ahead.hookpoints:
                        raise
                    self.ahead.drop(hookpoint, str(error))
            self.store.enter(self.index, entries)
        except BaseException:
            self.abort()
            raise
        self.lock.release()

    def abort(self) -> None:
        """Remove what is not finished and let the shard go."""
        for writer in self.writers.values():
            writer.discard()
        self.lock.release()


_QUEUED = 2
"""Batches that may wait to be written; memory is bounded by them."""


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


@dataclass(frozen=True)
class Part:
    """Every `n_shards`-th share of the store's shards: part `shard` of them."""

    shard: int
    n_shards: int

    def of(self, n_files: int) -> list[int]:
        """Indices of the shard files in this part; the parts are disjoint and cover all."""
        first, end = (k * n_files // self.n_shards for k in (self.shard, self.shard + 1))
        return list(range(first, end))


def ingredients(
    model: LanguageModel, placement: Placement, max_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What determines the stored values; the store's key is a hash of this."""
    ids, places = hashlib.sha256(), hashlib.sha256()
    for text in placement.texts:
        ids.update(np.asarray([len(text), *text.ids], dtype="<i8").tobytes())
    for column in ("text_id", "token_index"):
        places.update(placement.rows[column].to_numpy("<i8").tobytes())
    blocks = model.cfg.blocks
    return {
        # Absent where it is not given, so that stores keep their keys.
        **({"blocks": blocks} if blocks else {}),
        "model": model.name,
        "revision": model.cfg.revision,
        "weights": model.fingerprint,
        "tokenizer": model.tokenizer_fingerprint,
        "texts": ids.hexdigest(),
        "positions": places.hexdigest(),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": max_length,
        # Before this was among them, such models' values depended on what else was in a batch.
        **({"rope": "by length"} if depends_on_length(model.text_config) else {}),
    }


def collect(
    model: LanguageModel,
    placement: Placement,
    hookpoints: Sequence[Hookpoint],
    *,
    cache_dir: str | Path,
    cfg: StoreConfig,
    max_length: int,
    n_skipped: int = 0,
    ahead: Sequence[Hookpoint] = (),
    part: Part | None = None,
    about: Mapping[str, Any] | None = None,
    verify: bool = False,
    must_be_kept: bool = False,
) -> tuple[ActivationStore, CollectionStats]:
    """A store with these hookpoints at these positions; the model runs only for what is missing.

    Where it must run, the hookpoints `ahead` that are missing are stored in the same pass; one that
    cannot be (no such place, no room, NaN) is left out with a warning. With `part`, only that part
    of the shards is looked at. `verify` hashes shards of any size.
    Where `cache_dir` cannot be written, what it lacks is collected in a temporary folder, unless it
    `must_be_kept`.
    Raises ModelError for a layer the model lacks and a text it cannot hold, StoreError for NaN or
    Inf, a full disk, and a folder that cannot be written.
    """
    began = time.perf_counter()
    for hookpoint in hookpoints:
        model.check_layer(hookpoint.layer)
    _check_length(model, int(placement.rows["token_index"].max()) + 1)
    dtype = model.dtype if cfg.dtype == "auto" else pick_dtype(cfg.dtype, model.device)
    n_rows = len(placement.rows)
    asked = min(cfg.shard_rows, -(-n_rows // part.n_shards)) if part else cfg.shard_rows
    wanted = sorted({h.stored for h in hookpoints})
    parts, store = ingredients(model, placement, max_length, dtype), None
    if not must_be_kept and not is_writable(cache_dir):
        store = whole_store(Path(cache_dir), parts, placement.rows, wanted, verify=verify)
        cache_dir = cache_dir if store else temporary_cache(Path(cache_dir))
    store = store or ActivationStore.create_or_open(
        cache_dir, parts, placement.rows, shard_rows=asked, about=about
    )
    if store.shard_rows != asked:
        log.info(
            "%s has shards of %d rows since it was made (%d asked for: for new stores)",
            *(store.path.name, store.shard_rows, asked),
        )
    store.verify = verify
    if verify and os.access(store.path, os.W_OK):
        drop_damaged(store.path, store.manifest)
    collection = _Collection(model, placement, store, dtype, cfg)
    mine = part.of(len(store.shard_bounds)) if part else list(range(len(store.shard_bounds)))
    collection.run(mine, wanted, sorted({h.stored for h in ahead} - set(wanted)))
    seconds = time.perf_counter() - began
    forwarded, padded = collection.forwarded, collection.padded
    log.info(
        "collected %d rows, %d tokens forwarded, %d skipped, %.1f s (%s)",
        n_rows,
        forwarded,
        n_skipped,
        seconds,
        store.path.name,
    )
    share = padded / (forwarded + padded) if forwarded else 0.0
    return store, CollectionStats(n_rows, n_skipped, forwarded, share, seconds)


def _check_length(model: LanguageModel, longest: int) -> None:
    limit = context_limit(model)
    if limit is not None and longest > limit:
        short = model.name.rpartition("/")[2]
        raise ModelError(
            f"a text is {longest} tokens long, but {short} takes at most {limit}; "
            f"try dataset.max_length={limit}"
        )


class _Collection:
    """One process' share of the work on a store. Writing runs beside computing, in order."""

    def __init__(
        self,
        model: LanguageModel,
        placement: Placement,
        store: ActivationStore,
        dtype: torch.dtype,
        cfg: StoreConfig,
    ) -> None:
        self.model, self.placement, self.store, self.dtype = model, placement, store, dtype
        self.budget = TokenBudget(cfg.batch_tokens, model.device)
        self.share_prefixes = cfg.share_prefixes
        self.forwarded = self.padded = 0
        self.writing: deque[Future[None]] = deque()
        self.ahead = Ahead([])

    def run(self, mine: Sequence[int], wanted: list[Hookpoint], ahead: list[Hookpoint]) -> None:
        """Complete these shards, or wait until other processes have."""
        todo = list(self.store.missing(wanted, mine))
        if not todo:
            return
        self._check_room(todo, wanted)
        self.ahead = self._possible(todo, wanted, ahead)
        rows = {i: len(self.store.kept(i)) for i in todo}
        with (
            progress(sum(rows.values()), "collecting", "row") as bar,
            ThreadPoolExecutor(1, thread_name_prefix="saexp-write") as writer,
        ):
            while todo:
                busy = []
                for index in todo:
                    lock = try_lock(self.store.shard_lock(index))
                    if lock is None:
                        busy.append(index)
                        continue
                    try:
                        absent = self._absent(index, wanted)
                    except BaseException:
                        lock.release()
                        raise
                    if absent:
                        job = ShardJob(self.store, index, absent, self.dtype, lock, self.ahead)
                        self._compute(job, writer, bar)
                    else:
                        lock.release()
                        bar.update(rows[index])
                self._settle(0)
                if busy:
                    self._wait_for(busy[0])
                todo = busy
        # Read before the last change was written, it may be older than what is there.
        self.store.reload()

    def _absent(self, index: int, wanted: list[Hookpoint]) -> list[Hookpoint]:
        """What to store in this shard now: nothing where another process has done it meanwhile."""
        self.store.reload()
        if not self.store.missing(wanted, [index]):
            return []
        return self.store.missing([*wanted, *self.ahead.left], [index])[index]

    def _possible(self, todo: list[int], wanted: list[Hookpoint], ahead: list[Hookpoint]) -> Ahead:
        """What to store on the way: places that the model has, where there is room for them."""
        found = Ahead(ahead)
        for hookpoint in ahead:
            try:
                self.model.module(hookpoint)
            except ModelError as error:
                found.drop(hookpoint, str(error))
        needs, free = self._room(todo, [*wanted, *found.left])
        if needs > free:
            for hookpoint in found.left:
                found.drop(hookpoint, f"all need {show_bytes(needs)}, {show_bytes(free)} are free")
        return found

    def _room(self, todo: list[int], hookpoints: list[Hookpoint]) -> tuple[int, int]:
        """(bytes needed, bytes free)."""
        absent = self.store.missing(hookpoints, todo)
        n_rows = sum(len(self.store.kept(i)) * len(found) for i, found in absent.items())
        # Shards under way, or left so by a killed run, have their room already.
        held = sum(f.stat().st_size for f in self.store.path.glob("*/.tmp-*.safetensors"))
        needs = n_rows * self.model.d_model * self.dtype.itemsize
        return needs, free_bytes(self.store.path) + held

    def _check_room(self, todo: list[int], hookpoints: list[Hookpoint]) -> None:
        needs, free = self._room(todo, hookpoints)
        if needs > free:
            raise StoreError(
                f"disk full: the activations need {show_bytes(needs)}, and {show_bytes(free)} are "
                f"free at {self.store.path}; what was finished is kept: make room and run the "
                "command again, or choose another cache_dir="
            )

    def _compute(self, job: ShardJob, writer: ThreadPoolExecutor, bar: Any) -> None:
        try:
            # At most the shard before is still being written.
            self._settle(1)
            todo = units(self.placement, self.store.kept(job.index), self.model.text_config)
            passes = forward(
                self.model,
                todo,
                job.hookpoints,
                self.budget,
                self.dtype,
                share_prefixes=self.share_prefixes,
            )
            for batch in passes:
                self.forwarded += batch.n_tokens
                self.padded += batch.n_padding
                self.writing.append(writer.submit(job.write, batch, self._complain))
                self._settle(_QUEUED)
                bar.update(len(batch.rows))
            self.writing.append(writer.submit(job.finish))
        except BaseException:
            # Behind what is queued, so that nothing is written after it.
            writer.submit(job.abort).result()
            raise

    def _settle(self, n_left: int) -> None:
        """Wait until at most `n_left` writes are under way; raises what went wrong in one."""
        while len(self.writing) > n_left:
            self.writing.popleft().result()

    def _wait_for(self, index: int) -> None:
        log.info("waiting for another process, which has shard %05d", index)
        lock = try_lock(self.store.shard_lock(index), timeout=-1.0)
        assert lock is not None
        lock.release()

    def _complain(self, hookpoint: Hookpoint, text_id: int, nan: bool) -> StoreError:
        text = self.placement.texts[text_id].text[:60]
        overflow = not nan and self.dtype == torch.float16 != self.model.dtype
        told = f"NaN or Inf at {hookpoint.name} in the text '{text}'"
        if self.model.dtype == torch.float32 and not overflow:
            return StoreError(f"{told}, in float32: look at the model's weights, or leave it out")
        return StoreError(f"{told}; try {'store.dtype' if overflow else 'dtype'}=float32")
