"""Which configs were run to the end, so that `resume` can reuse their results."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from saexp.config import RunConfig
from saexp.digests import digest_of
from saexp.tasks.contents import (
    code_content,
    data_content,
    model_content,
    plugins_content,
    saes_content,
)
from saexp.tasks.holding import LOCK
from saexp.tasks.saving import clear

log = logging.getLogger(__name__)

VERSION = 2
"""Of what fingerprints are made of; a run of another version is not found."""
_NO_MATTER = ("resume", "cache_dir", "tracker", "verify")


def fingerprint(cfg: RunConfig) -> str | None:
    """Digest of the resolved config and of the content of all that it names: model, SAEs, data,
    plugins, and saexp's own code.

    None where weights or data are out of reach, so that nothing is known of their content.
    """
    model = [] if cfg.task.name == "cache" else model_content(cfg.model)
    saes, data = saes_content(cfg), data_content(cfg)
    if model is None or saes is None or data is None:
        return None
    config = dataclasses.asdict(cfg)
    for key in _NO_MATTER:
        config.pop(key)
    code = [code_content(), plugins_content(cfg)]
    return digest_of(VERSION, config, model, saes, data, code)[:24]


def _named(cfg: RunConfig) -> list[str | None]:
    """Local files and folders that a config may name."""
    transfer = cfg.analyzer.options.get("transfer")
    return [cfg.dataset.path, cfg.dataset.background, cfg.sae.path, cfg.model.name, transfer]


def inputs(cfg: RunConfig) -> frozenset[Path]:
    """Those that there are; no run may remove one that it reads."""
    return frozenset(Path(p).resolve() for p in _named(cfg) if p and Path(p).exists())


def _entry(cfg: RunConfig, key: str) -> Path:
    return Path(cfg.cache_dir) / "finished" / f"{key}.json"


def record(cfg: RunConfig, folder: Path, key: str | None) -> None:
    """Note that a run ended well, in its provenance and in the cache's index.

    `key` is the fingerprint when the run began; where it is another by now, the run is not reused.
    None where something was out of reach then: what the run itself fetched counts.
    """
    now = fingerprint(cfg)
    key = key or now
    if key is None:
        log.info("resume=true will run this anew: the content of what it read is not known")
        return
    file = folder / "provenance.json"
    if file.is_file():
        about = {"status": "finished", "fingerprint": key, **json.loads(file.read_text("utf-8"))}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
    if now != key:
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
    own = (".hydra", "wandb", "tracker.jsonl", "error.txt", LOCK)
    return {n for n in names if n in own or n.endswith(".log")}


def _write(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def find(cfg: RunConfig, key: str | None) -> Path | None:
    """Folder of a finished run of this fingerprint, if it is still there and still that run's."""
    if key is None:
        return None
    try:
        folder = Path(json.loads(_entry(cfg, key).read_text("utf-8"))["folder"])
        about = json.loads((folder / "provenance.json").read_text("utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    same = about.get("status") == "finished" and about.get("fingerprint") == key
    return folder if same and (folder / "metrics.json").is_file() else None
