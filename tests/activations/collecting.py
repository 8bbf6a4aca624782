"""What the tests of this room share: texts placed, collected, and files compared."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saexp import registry
from saexp.activations.collector import CollectionStats, collect
from saexp.activations.store import ActivationStore
from saexp.config import PositionsConfig, StoreConfig
from saexp.data.examples import Example
from saexp.data.positions import Placement, place
from saexp.data.tokens import tokenize
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from tests.random_models import TEXTS, tokenizer

MAX_LENGTH = 48
POSTS = [Hookpoint(n, "resid_post") for n in range(3)]


def placed(
    texts: Sequence[str] = TEXTS, name: str = "all", max_length: int = MAX_LENGTH, **options: Any
) -> Placement:
    """One example per text, in turn of two groups."""
    examples = [
        Example(id=str(n), text=t, group=("known", "unknown")[n % 2]) for n, t in enumerate(texts)
    ]
    tokens = tokenize(texts, tokenizer(), max_length)
    positions = registry.build("positions", PositionsConfig(name=name, **options))
    return place(examples, tokens, positions, tokenizer(), 0)


def run(
    model: LanguageModel,
    cache_dir: Path,
    hookpoints: Sequence[Hookpoint] = POSTS,
    placement: Placement | None = None,
    max_length: int = MAX_LENGTH,
    **store: Any,
) -> tuple[ActivationStore, CollectionStats]:
    """Collect; keyword arguments go into the store's config."""
    return collect(
        model,
        placement if placement is not None else placed(),
        hookpoints,
        cache_dir=cache_dir,
        cfg=StoreConfig(**store),
        max_length=max_length,
    )


def n_tokens(placement: Placement) -> int:
    """Tokens up to the last position wanted in each text: what one pass over all texts forwards."""
    return int((placement.rows.groupby("text_id")["token_index"].max() + 1).sum())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a store but its locks."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".lock"
    }
