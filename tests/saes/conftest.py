"""sae-lens, the oracle, imported once (9 s); a hub cache of one's own."""

import warnings
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def lens() -> ModuleType:
    """The sae_lens package; its own import-time warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
    return sae_lens


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache that huggingface_hub reads; the network stays off (tests/conftest.py)."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache
