"""Other libraries as oracles, imported once (sae-lens 9 s); a hub cache of one's own."""

import sys
import warnings
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def other() -> Callable[[str], ModuleType]:
    """Imports a module of a library that need not be installed; skips the test where it is not.

    The libraries import training tools that inference needs nothing of; empty ones stand in.
    """
    unused = {
        "nnsight": "LanguageModel",
        "natsort": "natsorted",
        "schedulefree": "ScheduleFreeWrapper",
    }

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module, member in unused.items():
                if module not in sys.modules:
                    stand_in = ModuleType(module)
                    setattr(stand_in, member, object)
                    patch.setitem(sys.modules, module, stand_in)
            return pytest.importorskip(name, exc_type=ImportError)

    return load


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache that huggingface_hub reads; the network stays off (tests/conftest.py)."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache
