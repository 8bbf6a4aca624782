"""Which configs were run to the end, so that `resume` can reuse their results."""

import dataclasses
import functools
import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from saexp.checksums import checksum_of, checksums, difference, is_checksums, sealed
from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.digests import digest_of, read_sha256
from saexp.errors import StoreError
from saexp.files import RUN_FOLDER, cannot_write, is_writable, write_atomically, write_json
from saexp.tasks.contents import (
    code_content,
    data_content,
    model_content,
    plugins_content,
    saes_content,
)
from saexp.tasks.holding import LOCK
from saexp.tasks.saving import METRICS, PROVENANCE, WRITTEN, clear

log = logging.getLogger(__name__)

VERSION = 3
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


def _entry(cfg: RunConfig, key: str, copy: Path | None = None) -> Path:
    """Index file of a run; a copy of its results in another folder has one of its own."""
    name = key if copy is None else f"{key}-{digest_of(str(copy.resolve()))[:16]}"
    return Path(cfg.cache_dir) / "finished" / f"{name}.json"


def record(cfg: RunConfig, context: RunContext, key: str | None) -> None:
    """Note that a run ended well: in its provenance, with checksums of the files that it left, and
    in the cache's index, with the checksum of the provenance.

    `key` is the fingerprint when the run began; where it is another by now, the run is not reused.
    None where something was out of reach then: what the run itself fetched counts.
    """
    now = fingerprint(cfg)
    key = key or now
    file = context.folder / PROVENANCE
    if file.is_file():
        about = {"status": "finished", "fingerprint": key, **json.loads(file.read_text("utf-8"))}
        about["files"] = checksums(context.folder, context.results - {PROVENANCE})
        write_json(file, sealed(about), option=RUN_FOLDER)
    if key is None:
        log.info("resume=true will run this anew: the content of what it read is not known")
    elif now != key:
        log.warning("a file that the config names changed meanwhile: resume=true will run it anew")
    elif file.is_file():
        _index(cfg, _entry(cfg, key), context.folder)
        with suppress(OSError):
            _entry(cfg, key, context.folder).unlink(missing_ok=True)


def _index(cfg: RunConfig, entry: Path, folder: Path) -> None:
    """Let later runs find this folder."""
    about = {"folder": str(folder.resolve()), "provenance": read_sha256(folder / PROVENANCE)}
    try:
        if is_writable(cfg.cache_dir):
            write_json(entry, about)
    except StoreError as error:
        log.warning("resume=true will not find this run: %s", error)


class Finished(NamedTuple):
    """A finished run whose files are as it left them."""

    folder: Path
    provenance: dict[str, Any]


class _NotReusableError(Exception):
    """Why a finished run is not reused, naming the file."""


def find(cfg: RunConfig, key: str | None, place: Path | None = None) -> Finished | None:
    """A finished run of this fingerprint, all of whose files are as it left them.

    A copy in the folder `place` comes first, then the run itself, then other copies. One warning
    names what is missing or was changed; a run whose folder was removed is not mentioned.
    """
    if key is None:
        return None
    own = [] if place is None else [_entry(cfg, key, place)]
    copies = sorted(_entry(cfg, key).parent.glob(f"{key}-*.json"))
    reasons: list[str] = []
    for entry in dict.fromkeys([*own, _entry(cfg, key), *copies]):
        try:
            earlier = _verified(cfg, entry, key)
        except _NotReusableError as error:
            reasons.append(str(error))
            continue
        if earlier is not None:
            if reasons:
                log.warning("%s; reusing the one in %s", reasons[0], earlier.folder)
            return earlier
    if reasons:
        log.warning("%s; computing it again", reasons[0])
    return None


def _verified(cfg: RunConfig, entry: Path, key: str) -> Finished | None:
    """The run that an index file names; None where there is no such file, or no folder any more.

    Raises _NotReusableError.
    """
    try:
        index = json.loads(entry.read_text("utf-8"))
        folder, known = Path(index["folder"]), str(index["provenance"])
        exists = folder.is_dir()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _NotReusableError(f"a finished run is not reused: {entry} is damaged") from error
    if not exists:
        return None
    try:
        content = (folder / PROVENANCE).read_bytes()
        about = _provenance(cfg, content, key)
        changed = difference(folder, about["files"])
        if checksum_of(content)["sha256"] != known:
            changed = f"{PROVENANCE} was changed since it was written"
    except FileNotFoundError:
        changed = f"{PROVENANCE} is missing"
    except OSError as error:
        changed = f"{PROVENANCE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        changed = f"{PROVENANCE} is damaged, or of another run"
    else:
        if changed is None:
            return Finished(folder, about)
    raise _NotReusableError(f"the finished run in {folder} is not reused: {changed}")


_PAGE_OF = {
    **dict.fromkeys(("analyze", "evaluate", "label", "train"), "report.html"),
    "dashboard": "dashboard.html",
}
"""Task -> page that it leaves."""


def _provenance(cfg: RunConfig, content: bytes, key: str) -> dict[str, Any]:
    """What a finished run of this fingerprint wrote of itself.

    Raises ValueError, KeyError or TypeError where it is not such a run's, or where it does not list
    the files that every run of the task leaves.
    """
    about = json.loads(content)
    if about["status"] != "finished" or about["fingerprint"] != key:
        raise ValueError("another run")
    needed = {METRICS, _PAGE_OF.get(cfg.task.name, METRICS)}
    if not is_checksums(about["files"]) or not needed <= about["files"].keys():
        raise ValueError("files are not listed")
    return about


def reuse(
    cfg: RunConfig, earlier: Finished, folder: Path, keep: frozenset[Path] = frozenset()
) -> bool:
    """Copy a finished run's results; what they took was spent by that run, so none is claimed.

    `collection/tokens_forwarded` and every metric `…/seconds` become 0, provenance.json says where
    the copy is from, and all else stays as it is. Nothing is done where `folder` is that run's own.
    provenance.json comes last, so that an incomplete copy is never taken for a finished run. False,
    with a warning, where a file changed meanwhile.
    """
    if earlier.folder.resolve() == folder.resolve():
        return True
    clear(folder, keep)
    # The list of files comes first, so that the next run in this folder removes half a copy.
    for name in sorted(_results(earlier.folder), key=lambda name: name != WRITTEN):
        _make_subfolder(folder, name)
        copy = functools.partial(_copy, earlier.folder / name)
        write_atomically(folder / name, copy, option=RUN_FOLDER)
    listed = earlier.provenance["files"]
    if changed := difference(folder, listed):
        log.warning(
            "the finished run in %s is not reused: %s; computing it again",
            *(earlier.folder, changed),
        )
        return False
    metrics = json.loads((folder / METRICS).read_text("utf-8"))
    spent = [k for k in metrics if k.rpartition("/")[2] in ("seconds", "tokens_forwarded")]
    write_json(folder / METRICS, {**metrics, **dict.fromkeys(spent, 0)}, option=RUN_FOLDER)
    about = {**earlier.provenance, "files": listed | checksums(folder, [METRICS])}
    notes = [note for note in about["notes"] if not note.startswith(_REUSED_FROM)]
    about["notes"] = [*notes, f"{_REUSED_FROM}{earlier.folder}"]
    about |= {"reused_from": str(earlier.folder), "seconds": {}}
    if "tokens_forwarded" in about:
        about["tokens_forwarded"] = 0
    write_json(folder / PROVENANCE, sealed(about), option=RUN_FOLDER)
    _index(cfg, _entry(cfg, about["fingerprint"], folder), folder)
    return True


def _make_subfolder(folder: Path, name: str) -> None:
    """The folder of a file such as `sae/cfg.json`, in that of a run."""
    place = (folder / name).parent
    if place == folder or not folder.is_dir():
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(place, error, option=RUN_FOLDER) from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


_REUSED_FROM = "reused from "
"""How the note of a copy begins."""
_OWN = (".hydra", "wandb", "tracker.jsonl", "error.txt", LOCK)
"""What belongs to the earlier run alone; a tracker makes its own again."""


def _results(folder: Path) -> list[str]:
    """Paths of what is copied, without provenance.json."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [
        file.as_posix()
        for file in files
        if file.parts[0] not in (*_OWN, PROVENANCE)
        and file.suffix != ".log"
        and not file.name.startswith(".tmp-")
    ]
