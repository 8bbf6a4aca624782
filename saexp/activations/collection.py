"""Collect the activations that a store lacks; several processes may share the shards."""

import functools
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations import ActivationStore, store_key
from saexp.activations.collector import CollectionRequest, CollectionStats, Collector
from saexp.activations.shard_files import ShardWriter
from saexp.activations.shared_prefixes import Batch, units
from saexp.context import progress
from saexp.errors import DataError, ModelError, StoreError
from saexp.files import free_bytes, is_writable, show_bytes, try_lock
from saexp.models import Hookpoint

log = logging.getLogger(__name__)

_QUEUED_BATCHES = 2
"""Batches that may wait to be written; memory is bounded by them."""

ValueErrorOf = Callable[[Hookpoint, int, bool], StoreError]
"""(hookpoint, text id, whether it is NaN) -> the error for a value that is not finite."""


def collect(
    collector: Collector,
    request: CollectionRequest,
    *,
    cache_dir: str | Path,
    verify: bool = False,
    must_persist: bool = False,
) -> tuple[ActivationStore, CollectionStats]:
    """Return a store that holds the requested activations; only missing ones are computed.

    `verify` hashes shards of any size before they are reused. Where `cache_dir` cannot be written,
    missing activations go to a temporary folder, or, with `must_persist`, are a StoreError.

    Raises ModelError for a layer that the model lacks and a text longer than it takes, StoreError
    for NaN or Inf, a full disk, and a folder that cannot be written.
    """
    started = time.perf_counter()
    collector.check(request)
    store = _open_store(collector, request, Path(cache_dir), verify, must_persist)
    store.verify = verify
    collection = _Collection(collector, request, store)
    collection.run()
    seconds = time.perf_counter() - started
    n_rows, forwarded, padded = store.n_rows, collection.forwarded, collection.padded
    log.info(
        "collected %d rows, %d tokens forwarded, %d skipped, %.1f s (%s)",
        n_rows,
        forwarded,
        request.n_skipped,
        seconds,
        store.path.name,
    )
    padding = padded / (forwarded + padded) if forwarded else 0.0
    return store, CollectionStats(n_rows, request.n_skipped, forwarded, padding, seconds)


def _open_store(
    collector: Collector,
    request: CollectionRequest,
    cache_dir: Path,
    verify: bool,
    must_persist: bool,
) -> ActivationStore:
    """The store in `cache_dir`, or in a temporary folder where that is read-only and incomplete."""
    rows, part = request.positions, request.part
    shard_rows = collector.store.shard_rows
    if part:
        shard_rows = min(shard_rows, -(-rows.n_rows // part.n_shards))
    ingredients = collector.ingredients(request)
    if not must_persist and not is_writable(cache_dir):
        store = _complete_store(cache_dir, ingredients, request, verify)
        if store is not None:
            return store
        cache_dir = temporary_cache(cache_dir)
    store = ActivationStore.create_or_open(
        cache_dir, ingredients, rows, shard_rows=shard_rows, about=request.about
    )
    if store.shard_rows != shard_rows:
        log.info(
            "%s keeps its shards of %d rows (store.shard_rows=%d applies to new stores)",
            *(store.path.name, store.shard_rows, shard_rows),
        )
    return store


def _complete_store(
    cache_dir: Path, ingredients: dict[str, Any], request: CollectionRequest, verify: bool
) -> ActivationStore | None:
    """The store with these ingredients; None where it lacks some of the hookpoints."""
    folder = cache_dir / "activations" / store_key(ingredients)
    try:
        store = ActivationStore.open(folder, verify=verify)
        if store.missing(request.hookpoints):
            return None
    except StoreError:
        return None
    store.show(request.positions)
    return store


def temporary_cache(cache_dir: Path) -> Path:
    """The folder that stands in for `cache_dir` in this process, and is removed when it ends."""
    return _temporary_folder(cache_dir.absolute())


@functools.cache
def _temporary_folder(cache_dir: Path) -> Path:  # noqa: ARG001
    folder = tempfile.mkdtemp(prefix="saexp-cache-")
    # Unlike atexit's functions, these run in workers of a launcher too, and not in forks.
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return Path(folder)


_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""dtype -> (integer type of its size, bits that are all set in NaN and infinities)."""


def finite_rows(acts: Float[Tensor, "n width"]) -> Bool[np.ndarray, " n"]:
    """Which rows hold only finite values.

    In numpy: torch's operators would start threads of their own here, which compete with those of
    the forward pass and slow it by a tenth.
    """
    kind, mask = _EXPONENT[acts.dtype]
    bits = acts.contiguous().view(kind).numpy()
    return ((bits & mask) != mask).all(axis=-1)


@dataclass(frozen=True)
class Lacking:
    """What a collection would compute."""

    n_rows: int
    """Rows of all shards of which a hookpoint is missing."""
    n_tokens: int
    """Tokens to forward for them; a long prefix that texts share may save some."""
    n_bytes: int
    """Bytes of the missing shards."""


def lacking(collector: Collector, request: CollectionRequest, cache_dir: str | Path) -> Lacking:
    """What the store in `cache_dir` lacks of a request; nothing is computed or written.

    Raises as `collect` does for a layer that the model lacks and a text longer than it takes.
    """
    collector.check(request)
    rows, folder = request.positions, store_key(collector.ingredients(request))
    hookpoints = sorted({h.stored for h in request.hookpoints})
    try:
        store = ActivationStore.open(Path(cache_dir) / "activations" / folder)
        bounds, missing = store.shard_bounds, store.missing(hookpoints)
    except StoreError:
        size = collector.store.shard_rows
        bounds = [(n, min(n + size, rows.n_rows)) for n in range(0, rows.n_rows, size)]
        missing = dict.fromkeys(range(len(bounds)), hookpoints)
    n_rows = n_tokens = n_bytes = 0
    for index, absent in missing.items():
        first, end = bounds[index]
        todo = units(rows, np.arange(first, end), collector.model.text_config)
        n_rows += end - first
        n_tokens += sum(len(unit.ids) for unit in todo)
        width = collector.model.d_model * collector.dtype.itemsize
        n_bytes += (end - first) * len(absent) * width
    return Lacking(n_rows, n_tokens, n_bytes)


class Prefetch:
    """Hookpoints stored for other runs in the same pass. One that cannot be stored is dropped with
    a warning; it fails the run that needs it, not this one."""

    def __init__(self, hookpoints: list[Hookpoint]) -> None:
        self.hookpoints = hookpoints
        self.dropped: set[Hookpoint] = set()

    @property
    def remaining(self) -> list[Hookpoint]:
        """Those that were not dropped."""
        return [h for h in self.hookpoints if h not in self.dropped]

    def drop(self, hookpoint: Hookpoint, reason: str) -> None:
        """Stop storing a hookpoint."""
        if hookpoint not in self.dropped:
            log.warning("%s is not prefetched: %s", hookpoint.name, reason)
            self.dropped.add(hookpoint)

    def drop_or_raise(self, hookpoint: Hookpoint, error: StoreError) -> None:
        """Drop a prefetched hookpoint; raise the error for one that this run needs."""
        if hookpoint not in self.hookpoints:
            raise error
        self.drop(hookpoint, str(error))


class ShardJob:
    """Writes one shard; holds the shard's lock until it is finished or aborted."""

    def __init__(
        self,
        store: ActivationStore,
        index: int,
        hookpoints: list[Hookpoint],
        dtype: torch.dtype,
        lock: BaseFileLock,
        prefetch: Prefetch | None = None,
    ) -> None:
        self.store, self.index, self.hookpoints = store, index, hookpoints
        self.dtype, self.lock = dtype, lock
        self.prefetch = prefetch or Prefetch([])
        self.writers: dict[Hookpoint, ShardWriter] = {}

    def write(self, batch: Batch, error_of: ValueErrorOf) -> None:
        """Write a batch's rows; raises `error_of(…)` for NaN and Inf at a hookpoint of this run."""
        if not len(batch.rows):
            return
        for hookpoint, wait in batch.host.items():
            acts = wait()
            finite = finite_rows(acts)
            if not finite.all():
                bad = int(np.flatnonzero(~finite)[0])
                is_nan = bool(torch.isnan(acts[bad]).any())
                error = error_of(hookpoint, int(batch.text_ids[bad]), is_nan)
                self.prefetch.drop_or_raise(hookpoint, error)
            try:
                self._write_rows(hookpoint, batch.rows, acts)
            except StoreError as error:
                self.prefetch.drop_or_raise(hookpoint, error)
            if hookpoint in self.prefetch.dropped and hookpoint in self.writers:
                self.writers.pop(hookpoint).discard()

    def _write_rows(self, hookpoint: Hookpoint, rows: Int[np.ndarray, " n"], acts: Tensor) -> None:
        if hookpoint in self.prefetch.dropped:
            return
        if hookpoint not in self.writers:
            writer = self.store.writer(hookpoint, self.index, acts.shape[1], self.dtype)
            self.writers[hookpoint] = writer
        self.writers[hookpoint].write(rows, acts)

    def finish(self) -> None:
        """Rename the files, list them in the manifest, and release the shard."""
        try:
            entries = {}
            for hookpoint, writer in self.writers.items():
                try:
                    entries[hookpoint] = writer.finish()
                except StoreError as error:
                    self.prefetch.drop_or_raise(hookpoint, error)
            self.store.enter(self.index, entries)
        except BaseException:
            self.abort()
            raise
        self.lock.release()

    def abort(self) -> None:
        """Remove unfinished files and release the shard."""
        for writer in self.writers.values():
            writer.discard()
        self.lock.release()


class _Collection:
    """This process' part of a collection. One thread writes batches, in order, while the next are
    computed."""

    def __init__(
        self, collector: Collector, request: CollectionRequest, store: ActivationStore
    ) -> None:
        self.collector, self.request, self.store = collector, request, store
        self.hookpoints = sorted({h.stored for h in request.hookpoints})
        self.prefetch = Prefetch([])
        self.forwarded = self.padded = 0
        self.writing: deque[Future[None]] = deque()

    def run(self) -> None:
        """Complete the requested shards, or wait until other processes have."""
        n_shards = len(self.store.shard_bounds)
        shards = self.request.part.of(n_shards) if self.request.part else list(range(n_shards))
        todo = list(self.store.missing(self.hookpoints, shards))
        if not todo:
            return
        self._check_space(todo)
        self.prefetch = self._possible_prefetch(todo)
        n_rows = {i: self._n_rows(i) for i in todo}
        with (
            progress(sum(n_rows.values()), "collecting", "row") as bar,
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
                        absent = self._absent(index)
                    except BaseException:
                        lock.release()
                        raise
                    if absent:
                        dtype = self.collector.dtype
                        job = ShardJob(self.store, index, absent, dtype, lock, self.prefetch)
                        self._compute(job, writer, bar)
                    else:
                        lock.release()
                        bar.update(n_rows[index])
                self._wait_for_writes(0)
                if busy:
                    self._wait_for_shard(busy[0])
                todo = busy
        # This process' last read of the manifest may be older than its last change.
        self.store.reload()

    def _n_rows(self, index: int) -> int:
        first, end = self.store.shard_bounds[index]
        return end - first

    def _absent(self, index: int) -> list[Hookpoint]:
        """What to store in this shard now; nothing where another process has completed it."""
        self.store.reload()
        if not self.store.missing(self.hookpoints, [index]):
            return []
        return self.store.missing([*self.hookpoints, *self.prefetch.remaining], [index])[index]

    def _possible_prefetch(self, todo: list[int]) -> Prefetch:
        """The prefetched hookpoints that the collector has, and for which there is space."""
        prefetched = {h.stored for h in self.request.prefetch} - set(self.hookpoints)
        prefetch = Prefetch(sorted(prefetched))
        for hookpoint in prefetch.hookpoints:
            try:
                self.collector.check_hookpoint(hookpoint)
            except (ModelError, DataError) as error:
                prefetch.drop(hookpoint, str(error))
        needed, free = self._space(todo, [*self.hookpoints, *prefetch.remaining])
        if needed > free:
            for hookpoint in prefetch.remaining:
                prefetch.drop(
                    hookpoint, f"all need {show_bytes(needed)}, {show_bytes(free)} are free"
                )
        return prefetch

    def _space(self, todo: list[int], hookpoints: list[Hookpoint]) -> tuple[int, int]:
        """(bytes needed, bytes free)."""
        missing = self.store.missing(hookpoints, todo)
        n_rows = sum(self._n_rows(i) * len(absent) for i, absent in missing.items())
        # Unfinished shards, of this run or a killed one, have their space allocated already.
        allocated = sum(f.stat().st_size for f in self.store.path.glob("*/.tmp-*.safetensors"))
        needed = n_rows * self.collector.model.d_model * self.collector.dtype.itemsize
        return needed, free_bytes(self.store.path) + allocated

    def _check_space(self, todo: list[int]) -> None:
        needed, free = self._space(todo, self.hookpoints)
        if needed > free:
            raise StoreError(
                f"disk full: the activations need {show_bytes(needed)}, and {show_bytes(free)} are "
                f"free at {self.store.path}; finished shards are kept: free some space and run the "
                "command again, or choose another cache_dir="
            )

    def _compute(self, job: ShardJob, writer: ThreadPoolExecutor, bar: Any) -> None:
        try:
            # At most the previous shard is still being written.
            self._wait_for_writes(1)
            rows = np.arange(*self.store.shard_bounds[job.index])
            for batch in self.collector.batches(self.request, rows, job.hookpoints):
                self.forwarded += batch.n_tokens
                self.padded += batch.n_padding
                self.writing.append(writer.submit(job.write, batch, self._not_finite))
                self._wait_for_writes(_QUEUED_BATCHES)
                bar.update(len(batch.rows))
            self.writing.append(writer.submit(job.finish))
        except BaseException:
            # Queued behind pending writes, so that nothing is written after it.
            writer.submit(job.abort).result()
            raise

    def _wait_for_writes(self, n_left: int) -> None:
        """Wait until at most `n_left` writes are pending; raises the error of a failed one."""
        while len(self.writing) > n_left:
            self.writing.popleft().result()

    def _wait_for_shard(self, index: int) -> None:
        log.info("waiting for another process, which is computing shard %05d", index)
        lock = try_lock(self.store.shard_lock(index), timeout=-1.0)
        assert lock is not None
        lock.release()

    def _not_finite(self, hookpoint: Hookpoint, text_id: int, is_nan: bool) -> StoreError:
        text = self.request.positions.text(text_id)
        return self.collector.not_finite(hookpoint, text, is_nan)
