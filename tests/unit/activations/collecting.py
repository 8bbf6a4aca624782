"""Texts with positions, their collection in shards, and comparisons of the files it leaves."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from saexp import registry
from saexp.activations import ActivationStore
from saexp.activations.collection import collect
from saexp.activations.collector import (
    CollectionRequest,
    CollectionStats,
    HuggingFaceCollector,
    Part,
)
from saexp.config import CollectorConfig, ModelConfig, PositionsConfig, StoreConfig
from saexp.data import Example
from saexp.data.positions import resolve_positions
from saexp.data.rows import PositionTable
from saexp.data.tokenization import tokenize
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, tokenizer

MAX_LENGTH = 48
SHARD_ROWS = 9
REPEATING = [*TEXTS[:2], TEXTS[0], *TEXTS[2:4], TEXTS[1], *TEXTS[4:]]
"""In shards of so many rows: some begin, end or consist of what earlier ones hold."""
POSTS = [Hookpoint(n, "resid_post") for n in range(3)]


def placed(
    texts: Sequence[str] = TEXTS,
    name: str = "all",
    max_length: int = MAX_LENGTH,
    groups: tuple[str, str] = ("known", "unknown"),
    **options: Any,
) -> PositionTable:
    """One example per text, in turn of two groups; shared, so leave it as it is."""
    return _placed(tuple(texts), name, max_length, groups, tuple(options.items()))


@cache
def _placed(
    texts: tuple[str, ...],
    name: str,
    max_length: int,
    groups: tuple[str, str],
    options: tuple[tuple[str, Any], ...],
) -> PositionTable:
    examples = [Example(id=str(n), text=t, group=groups[n % 2]) for n, t in enumerate(texts)]
    tokens = tokenize(texts, tokenizer(), max_length)
    positions = registry.build("positions", PositionsConfig(name=name, **dict(options)))
    return resolve_positions(examples, tokens, positions, tokenizer(), 0)


def run(
    model: LanguageModel,
    cache_dir: Path,
    hookpoints: Sequence[Hookpoint] = POSTS,
    placement: PositionTable | None = None,
    max_length: int = MAX_LENGTH,
    prefetch: Sequence[Hookpoint] = (),
    part: Part | None = None,
    verify: bool = False,
    must_persist: bool = False,
    n_skipped: int = 0,
    **store: Any,
) -> tuple[ActivationStore, CollectionStats]:
    """Collect; other keyword arguments go into the store's config."""
    request = CollectionRequest(
        positions=placement if placement is not None else placed(),
        hookpoints=hookpoints,
        max_length=max_length,
        prefetch=prefetch,
        part=part,
        n_skipped=n_skipped,
    )
    return collect(
        HuggingFaceCollector(CollectorConfig(name="hf"), model=model, store=StoreConfig(**store)),
        request,
        cache_dir=cache_dir,
        verify=verify,
        must_persist=must_persist,
    )


def run_in_shards(
    model: LanguageModel, cache_dir: Path, hookpoints: Sequence[Hookpoint] = POSTS
) -> tuple[ActivationStore, CollectionStats]:
    """Collect many small shards of texts that repeat: what is killed, raced and compared."""
    return run(model, cache_dir, hookpoints, placed(REPEATING), shard_rows=SHARD_ROWS)


def n_tokens(placement: PositionTable) -> int:
    """Tokens up to the last position wanted in each text: what one pass over all texts forwards."""
    return int((placement.rows.groupby("text_id")["token_index"].max() + 1).sum())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a store but its locks."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }


def digests_in(cache_dir: Path) -> dict[str, str]:
    """`digests` of a cache folder's one store, but for what a killed process left half done."""
    (store,) = (cache_dir / "activations").iterdir()
    return {name: digest for name, digest in digests(store).items() if ".tmp-" not in name}


def n_shard_files(expected: dict[str, str]) -> int:
    """Number of shards, of all hookpoints, among digests."""
    return sum(name.endswith(".safetensors") for name in expected)


def n_sound(cache_dir: Path, expected: dict[str, str]) -> int:
    """Number of shard files listed; fails where one that is listed or in place is not whole."""
    n_listed = 0
    for manifest in cache_dir.glob("activations/*/manifest.json"):
        store = ActivationStore.open(manifest.parent, verify=True)
        listed = {(h, int(i)) for h, s in store.manifest["hookpoints"].items() for i in s}
        absent = {(h.name, i) for i, hookpoints in store.missing(POSTS).items() for h in hookpoints}
        every = {(h.name, i) for h in POSTS for i in range(len(store.shard_bounds))}
        assert absent == every - listed
        in_place = {n: d for n, d in digests_in(cache_dir).items() if n.endswith(".safetensors")}
        assert in_place.items() <= expected.items()
        n_listed += len(listed)
    return n_listed


def load(folder: Path) -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel(ModelConfig(name=str(folder), device="cpu"))
