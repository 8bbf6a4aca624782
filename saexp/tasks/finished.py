"""Which configs were run to the end, so that `resume` can reuse their results."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from saexp.config import RunConfig
from saexp.tasks.saving import clear

log = logging.getLogger(__name__)

_NO_MATTER = ("resume", "cache_dir", "tracker", "verify")


_plugins: dict[str, list[tuple[str, int, int]]] = {}
"""Plugin -> its files as they were when this process first looked, which is what it imported."""


def fingerprint(cfg: RunConfig) -> str:
    """Hash of the resolved config, of the local files and plugins it names, and of saexp's
    version."""
    config = dataclasses.asdict(cfg)
    for key in _NO_MATTER:
        config.pop(key)
    states = [_state(path) for path in _named(cfg)]
    states += [_plugins.setdefault(module, _state(_source(module))) for module in cfg.plugins]
    content: list[Any] = [metadata.version("saexp"), config, states]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _named(cfg: RunConfig) -> list[str | None]:
    """Local files and folders that a config may name."""
    transfer = cfg.analyzer.options.get("transfer")
    return [cfg.dataset.path, cfg.dataset.background, cfg.sae.path, cfg.model.name, transfer]


def inputs(cfg: RunConfig) -> frozenset[Path]:
    """Those that there are; no run may remove one that it reads."""
    return frozenset(Path(p).resolve() for p in _named(cfg) if p and Path(p).exists())


def _source(module: str) -> str | None:
    """A plugin's file, or the folder of its package; None where it is in no file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    return str(path.parent if path.name == "__init__.py" else path)


def _state(path: str | None) -> list[tuple[str, int, int]]:
    """(name, size, time of last change) of a file, or of all files of a folder."""
    place = Path(path) if path else None
    if place is None or not place.exists():
        return []
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    files = [f for f in files if f.is_file() and f.suffix != ".pyc"]
    stats = [(str(f), f.stat()) for f in files]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def _entry(cfg: RunConfig, key: str) -> Path:
    return Path(cfg.cache_dir) / "finished" / f"{key}.json"


def record(cfg: RunConfig, folder: Path, key: str) -> None:
    """Note that a run ended well, in its provenance and in the cache's index.

    `key` is the fingerprint when the run began; where it is another by now, the run is not reused.
    """
    file = folder / "provenance.json"
    if file.is_file():
        about = {"status": "finished", "fingerprint": key, **json.loads(file.read_text("utf-8"))}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
    if fingerprint(cfg) != key:
        log.warning("a file that the config names changed meanwhile: resume=true will run it anew")
        return
    entry = _entry(cfg, key)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(json.dumps({"folder": str(folder.resolve())}) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("resume=true will not find this run: cannot write %s (%s)", entry, error)


def reuse(earlier: Path, folder: Path, keep: frozenset[Path] = frozenset()) -> None:
    """Copy a finished run's results; what they took was spent by that run, so none is claimed.

    `collection/tokens_forwarded` and every metric `…/seconds` become 0, provenance.json says where
    the copy is from, and all else stays as it is. Nothing is done where `folder` is that run's own.
    """
    if earlier.resolve() == folder.resolve():
        return
    clear(folder, keep)
    shutil.copytree(earlier, folder, dirs_exist_ok=True, ignore=_not_results)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    spent = [k for k in metrics if k.rpartition("/")[2] in ("seconds", "tokens_forwarded")]
    _write(folder / "metrics.json", {**metrics, **dict.fromkeys(spent, 0)})
    about = json.loads((folder / "provenance.json").read_text("utf-8"))
    about["notes"] = [*about["notes"], f"reused from {earlier}"]
    about |= {"reused_from": str(earlier), "seconds": {}}
    if "tokens_forwarded" in about:
        about["tokens_forwarded"] = 0
    _write(folder / "provenance.json", about)


def _not_results(_folder: str, names: list[str]) -> set[str]:
    """What belongs to the earlier run alone; a tracker makes its own again."""
    own = (".hydra", "wandb", "tracker.jsonl", "error.txt")
    return {n for n in names if n in own or n.endswith(".log")}


def _write(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def find(cfg: RunConfig, key: str) -> Path | None:
    """Folder of a finished run of this fingerprint, if it is still there and still that run's."""
    try:
        folder = Path(json.loads(_entry(cfg, key).read_text("utf-8"))["folder"])
        about = json.loads((folder / "provenance.json").read_text("utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    same = about.get("status") == "finished" and about.get("fingerprint") == key
    return folder if same and (folder / "metrics.json").is_file() else None
