"""Reuse of finished runs, identified by the content of everything that they read."""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from saexp import registry
from saexp.config import (
    EvaluateConfig,
    ModelConfig,
    ProbeConfig,
    RunConfig,
    SAEConfig,
    parse_layers,
)
from saexp.config.run import WITHOUT_EFFECT
from saexp.context import RunContext
from saexp.digests import (
    checksums,
    content_name,
    contents,
    difference,
    digest_of,
    file_sha256,
    has_intact_seal,
    is_checksums,
    sealed,
)
from saexp.errors import SaexpError, StoreError
from saexp.files import RUN_FOLDER, cannot_write, is_writable, write_atomically, write_json
from saexp.hub import snapshot
from saexp.models.resolution import HUB_IDS, local_folder
from saexp.pipeline.run_folder import LOCK, METRICS, PROVENANCE, WRITTEN, clear
from saexp.saes.catalogue import fill_path, find_entry

log = logging.getLogger(__name__)


PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Suffixes of weights files, in order of preference."""
_NOT_READ = (".md", ".png", ".jpg", ".gitattributes", ".h5", ".msgpack", ".onnx", ".pt", ".pth")
_READS_NO_SAE = ("cache", "collect", "label", "report", "train", "workspace")
"""Shipped tasks for which `sae` does not matter; a custom task may read it."""
_READS_NO_MODEL = ("cache", "report", "workspace")
_VERSIONS = ("saexp", "torch", "transformers", "sae-lens", "numpy", "scipy")

Content = list[tuple[str, str]]
"""(file name, digest of its content)."""


def model_content(cfg: ModelConfig) -> Content | None:
    """Content of a model's files, and the commit of a hub repository; None if out of reach.

    Of a folder, only the files that a model is loaded from: no subfolders, and one kind of weights.
    """
    source = local_folder(cfg.name)
    if source is not None and source.is_file():
        return contents(source)
    commit: Content = []
    if source is None or not source.is_dir():
        cached = snapshot(HUB_IDS.get(cfg.name, cfg.name), cfg.revision)
        if cached is None:
            return None if cfg.loader == "hf" else []
        source, commit = cached, [("commit", cached.name)]
    if cfg.gguf_file is not None:
        gguf_file = source / cfg.gguf_file
        return commit + contents(gguf_file) if gguf_file.is_file() else None
    files = [f for f in sorted(source.iterdir()) if f.is_file() and not f.name.startswith(".")]
    kinds = [kind for kind in _WEIGHTS if any(f.suffix == kind for f in files)]
    if not kinds:
        return None if cfg.loader == "hf" else commit
    unread = {*_WEIGHTS, *_NOT_READ} - {kinds[0]}
    if commit:
        # The commit covers the small files, some of which are downloaded during the run.
        files = [f for f in files if f.suffix == kinds[0]]
    return commit + [(f.name, content_name(f)) for f in files if f.suffix not in unread]


def sae_content(cfg: SAEConfig) -> Content | None:
    """Content of an SAE's files; None if out of reach, empty for one built from config alone."""
    if cfg.loader == "release":
        return _of_release(cfg)
    if cfg.loader != "path":
        return contents(Path(cfg.path)) if cfg.path and Path(cfg.path).exists() else []
    try:
        path = fill_path(cfg)
    except SaexpError:
        return None
    if path.exists():
        return _beside(path) + (contents(path) if path.is_dir() else [])
    if path.is_absolute() or len(path.parts) < 2 or path.parts[0].startswith("."):
        return None
    return _in_repository("/".join(path.parts[:2]), "/".join(path.parts[2:]))


def _beside(path: Path) -> Content:
    """Content of a weights file, of the configs beside it, and of a training run's config above."""
    above = [path.parent / "config.json", path.parent.parent / "config.json"]
    files = [path, *path.parent.glob("*.json")] if path.is_file() else []
    return [(f.name, content_name(f)) for f in sorted({*files, *above}) if f.is_file()]


def _of_release(cfg: SAEConfig) -> Content | None:
    try:
        entry = find_entry(cfg)
    except SaexpError:
        return None
    return _in_repository(entry.repo, entry.path)


def _in_repository(repo: str, path: str) -> Content | None:
    cached = snapshot(repo)
    if cached is None:
        return None
    if path and (cached / path).exists():
        return contents(cached / path)
    # An unknown layout: the commit covers all of it.
    return [("commit", cached.name)]


def saes_content(cfg: RunConfig) -> list[Content] | None:
    """Content of every SAE that a run may read; None if one of them is out of reach."""
    result = []
    for cell in _cells(cfg):
        content = sae_content(cell)
        if content is None and cfg.task.name not in _READS_NO_SAE:
            return None
        result.append(content or [])
    return result


def _cells(cfg: RunConfig) -> Iterator[SAEConfig]:
    """The SAE configs of the run's layers and widths, and of the layers that it edits."""
    layers = parse_layers(cfg.layer) if isinstance(cfg.layer, list) else [cfg.sae.layer]
    several = cfg.task.width_list if isinstance(cfg.task, EvaluateConfig) else None
    widths = several or [cfg.sae.width]
    for layer in layers:
        for width in widths:
            yield dataclasses.replace(cfg.sae, layer=layer, width=width)
    about = cfg.intervention
    if cfg.task.name != "analyze" or about.name == "none" or not about.by_layer:
        return
    cells = (dataclasses.replace(cfg.sae, layer=n) for n in about.latent_layers(_MOST_LAYERS))
    every = about.layers == "all"
    yield from (cell for cell in cells if not every or sae_content(cell) is not None)


_MOST_LAYERS = 256
"""More layers than any model has; of `all` layers, those that have an SAE count."""


def data_content(cfg: RunConfig) -> list[Content] | None:
    """Content of the data set, the neutral text, and every file that a setting names.

    None for a data set of the hub that is out of reach.
    """
    transfer = cfg.analyzer.transfer if isinstance(cfg.analyzer, ProbeConfig) else None
    entries = []
    imported = [getattr(cfg.collector, key, None) for key in ("path", "neutral_path")]
    for path in (cfg.dataset.path, cfg.dataset.background, transfer, *imported):
        if path and Path(path).exists():
            entries.append([(str(path), ""), *contents(Path(path))])
        elif path and path == cfg.dataset.path and cfg.dataset.name == "hf":
            cached = snapshot(str(path), kind="dataset")
            if cached is None:
                return None
            entries.append([("commit", cached.name)])
    config = dataclasses.asdict(cfg)
    for name in ("model", "sae", "tracker", "cache_dir"):
        config.pop(name)
    files = {s for s in _strings(config) if len(s) < 1024 and "\0" not in s and _is_file(s)}
    return [*entries, *(contents(Path(s)) for s in sorted(files))]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


_plugins: dict[str, list[list[str]]] = {}
"""Plugin -> content of its files when this process imported it."""


def plugins_content(cfg: RunConfig) -> list[list[list[str]]]:
    """Content of plugins: their modules, and the custom modules that they import."""
    for module in (*registry.entry_point_modules(), *cfg.plugins):
        if module not in _plugins:
            files = registry.plugin_files(module)
            _plugins[module] = [[str(f), file_sha256(f)] for f in files if f.is_file()]
    return [_plugins[m] for m in (*registry.entry_point_modules(), *cfg.plugins)]


@cache
def code_content() -> list[list[str]]:
    """Content of saexp's code and shipped texts, and versions of the libraries it computes with."""
    shipped = [f for f in ASSETS.rglob("*") if f.suffix in (".jsonl", ".csv", ".txt")]
    files = sorted([*PACKAGE.rglob("*.py"), *shipped])
    code = [[f.relative_to(PACKAGE).as_posix(), file_sha256(f)] for f in files]
    return code + [[name, _version(name)] for name in _VERSIONS]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


ALWAYS_RUN = ("collect", "cache", "report", "workspace")
"""Tasks whose result is the cache; a finished run of them is never reused."""
VERSION = 4
"""Version of the fingerprint's ingredients; runs of another version are not reused."""


def fingerprint(cfg: RunConfig) -> str | None:
    """Digest of the resolved config and the content of all that it names.

    That is model, SAEs, data, plugins, and saexp's own code. None if weights or data are out of
    reach, so that their content is unknown.
    """
    model = [] if cfg.task.name in _READS_NO_MODEL else model_content(cfg.model)
    saes, data = saes_content(cfg), data_content(cfg)
    if model is None or saes is None or data is None:
        return None
    config = dataclasses.asdict(cfg)
    for key in WITHOUT_EFFECT:
        config.pop(key)
    config["intervention"]["keep"] = cfg.intervention.effective_keep()
    code = [code_content(), plugins_content(cfg)]
    return digest_of(VERSION, config, model, saes, data, code)[:24]


def _config_paths(cfg: RunConfig) -> list[str | None]:
    """Values of the settings that may name local files and folders."""
    transfer = cfg.analyzer.transfer if isinstance(cfg.analyzer, ProbeConfig) else None
    return [cfg.dataset.path, cfg.dataset.background, cfg.sae.path, cfg.model.name, transfer]


def inputs(cfg: RunConfig) -> frozenset[Path]:
    """Existing files and folders that the config names; the run must not remove them."""
    return frozenset(Path(p).resolve() for p in _config_paths(cfg) if p and Path(p).exists())


def _entry(cfg: RunConfig, key: str, copy: Path | None = None) -> Path:
    """Index file of a run; a copy of its results in another folder has its own index file."""
    name = key if copy is None else f"{key}-{digest_of(str(copy.resolve()))[:16]}"
    return Path(cfg.cache_dir) / "finished" / f"{name}.json"


def record(cfg: RunConfig, context: RunContext, key: str | None) -> None:
    """Record a successful run, so that `resume` can reuse it.

    Its provenance gets the checksums of its files, and the cache's index the checksum of the
    provenance. `key` is the fingerprint at the start of the run; if it has changed since, the run
    is not reused. If it was None because something was out of reach, the current one counts.
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
    """Add the folder to the index of finished runs."""
    content = json.loads((folder / PROVENANCE).read_text("utf-8"))
    about = {"folder": str(folder.resolve()), "provenance": _without_pages(content)}
    try:
        if is_writable(cfg.cache_dir):
            write_json(entry, about)
    except StoreError as error:
        log.warning("resume=true will not find this run: %s", error)


def _without_pages(about: dict[str, Any]) -> str:
    """Digest of a provenance.json without the checksums of pages, which are written again later."""
    files = {name: sums for name, sums in about["files"].items() if Path(name).suffix != ".html"}
    return digest_of(sealed(about | {"files": files}))


def record_page(folder: Path, name: str) -> None:
    """Record in provenance.json that a finished run's page was written again.

    The run can still be reused: the cache's index does not depend on its pages.
    """
    about = json.loads((folder / PROVENANCE).read_bytes())
    page = checksums(folder, [name])
    if about["files"] | page != about["files"]:
        about["files"] |= page
        write_json(folder / PROVENANCE, sealed(about), option=RUN_FOLDER)


class Finished(NamedTuple):
    """A finished run whose files are unchanged."""

    folder: Path
    provenance: dict[str, Any]


class _NotReusableError(Exception):
    """A finished run is not reused; the message names the file."""


def find_finished(cfg: RunConfig, key: str | None, folder: Path | None = None) -> Finished | None:
    """A finished run with this fingerprint and unchanged files.

    A copy in the folder `folder` is preferred, then the run itself, then other copies. One warning
    names what is missing or changed; removed run folders are not mentioned.
    """
    if key is None:
        return None
    own = [] if folder is None else [_entry(cfg, key, folder)]
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
    """The run that an index file names; None if the file or the folder does not exist.

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
        if _without_pages(about) != known or not has_intact_seal(about):
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
"""Task -> page that it writes."""


def _provenance(cfg: RunConfig, content: bytes, key: str) -> dict[str, Any]:
    """The content of provenance.json of a finished run with this fingerprint.

    Raises ValueError, KeyError or TypeError if it belongs to another run, or does not list the
    files that every run of the task writes.
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
    """Copy a finished run's results to another folder.

    `collection/tokens_forwarded` and every metric `…/seconds` become 0, since that run spent them,
    and provenance.json says where the copy is from. Nothing is done if `folder` is that run's own.
    provenance.json is written last, so that an incomplete copy never counts as a finished run.
    Returns False, with a warning, if a file changed in the meantime.
    """
    if earlier.folder.resolve() == folder.resolve():
        return True
    clear(folder, keep)
    # The list of files comes first, so that the next run in this folder removes an incomplete copy.
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
    """Create the subfolder of a file such as `sae/cfg.json` in a run's folder."""
    parent = (folder / name).parent
    if parent == folder or not folder.is_dir():
        return
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(parent, error, option=RUN_FOLDER) from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


_REUSED_FROM = "reused from "
"""Beginning of a copy's note."""
_NOT_COPIED = (".hydra", "wandb", "tensorboard", "mlruns", "tracker.jsonl", "error.txt", LOCK)
"""Files that belong to the earlier run alone; trackers write new ones."""


def _results(folder: Path) -> list[str]:
    """Relative paths of the files to copy, without provenance.json."""
    files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [
        file.as_posix()
        for file in files
        if file.parts[0] not in (*_NOT_COPIED, PROVENANCE)
        and file.suffix != ".log"
        and not file.name.startswith(".tmp-")
    ]
