"""What a run reads, known by its content: model, SAEs, data, code. No torch: a run that is found
finished is over before torch could be imported."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from saexp import plugins
from saexp.config import ModelConfig, RunConfig, SAEConfig, parse_layers
from saexp.digests import content_name, contents, file_sha256
from saexp.errors import SaexpError
from saexp.models.snapshots import snapshot
from saexp.saes.catalogue import find
from saexp.saes.places import fill

PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Kinds of weights files, in the order in which one is preferred to the next."""
_NOT_READ = (".md", ".png", ".jpg", ".gitattributes", ".h5", ".msgpack", ".onnx", ".pt", ".pth")
_READS_SAES = ("analyze", "evaluate", "dashboard")
_VERSIONS = ("saexp", "torch", "transformers", "sae-lens", "numpy", "scipy")

Content = list[tuple[str, str]]
"""(name, digest of what is under it)."""


def model_content(cfg: ModelConfig) -> Content | None:
    """Of a model's files; of a hub repository its commit too. None where they are out of reach.

    In a folder those files count that a model is loaded from: no folders, and of several kinds of
    weights the preferred one.
    """
    shipped = ASSETS / cfg.name / "model"
    place = shipped if shipped.is_dir() else Path(cfg.name)
    if place.is_file():
        return contents(place)
    commit: Content = []
    if not place.is_dir():
        cached = snapshot(cfg.name, cfg.revision)
        if cached is None:
            return None if cfg.loader == "hf" else []
        place, commit = cached, [("commit", cached.name)]
    files = [f for f in sorted(place.iterdir()) if f.is_file() and not f.name.startswith(".")]
    kinds = [kind for kind in _WEIGHTS if any(f.suffix == kind for f in files)]
    if not kinds:
        return None if cfg.loader == "hf" else commit
    unread = {*_WEIGHTS, *_NOT_READ} - {kinds[0]}
    if commit:
        # The commit stands for the small files, some of which come only while the run goes on.
        files = [f for f in files if f.suffix == kinds[0]]
    return commit + [(f.name, content_name(f)) for f in files if f.suffix not in unread]


def sae_content(cfg: SAEConfig) -> Content | None:
    """Of an SAE's files; None where they are out of reach. Nothing for one made of its config."""
    if cfg.loader == "release":
        return _of_release(cfg)
    if cfg.loader != "path":
        return contents(Path(cfg.path)) if cfg.path and Path(cfg.path).exists() else []
    try:
        place = fill(cfg)
    except SaexpError:
        return None
    if place.exists():
        return _beside(place) + (contents(place) if place.is_dir() else [])
    if place.is_absolute() or len(place.parts) < 2 or place.parts[0].startswith("."):
        return None
    return _in_repository("/".join(place.parts[:2]), "/".join(place.parts[2:]))


def _beside(place: Path) -> Content:
    """Of a file the small files of its folder that may be its config, and itself; of either a run's
    config above."""
    above = [place.parent / "config.json", place.parent.parent / "config.json"]
    files = [place, *place.parent.glob("*.json")] if place.is_file() else []
    return [(f.name, content_name(f)) for f in sorted({*files, *above}) if f.is_file()]


def _of_release(cfg: SAEConfig) -> Content | None:
    try:
        entry = find(cfg)
    except SaexpError:
        return None
    return _in_repository(entry.repo, entry.path)


def _in_repository(repo: str, path: str) -> Content | None:
    cached = snapshot(repo)
    if cached is None:
        return None
    if path and (cached / path).exists():
        return contents(cached / path)
    # A layout of its own: the commit stands for all of it.
    return [("commit", cached.name)]


def saes_content(cfg: RunConfig) -> list[Content] | None:
    """Of every SAE that a run reads, None where one that it surely reads is out of reach."""
    found = []
    for cell in _cells(cfg):
        content = sae_content(cell)
        if content is None and cfg.task.name in _READS_SAES:
            return None
        found.append(content or [])
    return found


def _cells(cfg: RunConfig) -> Iterator[SAEConfig]:
    """The run's SAE, or those of its layers and widths, and those whose latents are changed too."""
    layers = parse_layers(cfg.layer) if isinstance(cfg.layer, list) else [cfg.sae.layer]
    widths = cfg.task.options.get("widths") or [cfg.sae.width]
    for layer in layers:
        for width in widths if isinstance(widths, list) else [widths]:
            yield dataclasses.replace(cfg.sae, layer=layer, width=width)
    about = cfg.intervention
    if cfg.task.name != "analyze" or about.name == "none" or not about.by_layer:
        return
    cells = (dataclasses.replace(cfg.sae, layer=n) for n in about.latent_layers(_MOST_LAYERS))
    every = about.layers == "all"
    yield from (cell for cell in cells if not every or sae_content(cell) is not None)


_MOST_LAYERS = 256
"""More than any model has; of `all` layers those count that have an SAE."""


def data_content(cfg: RunConfig) -> list[Content] | None:
    """Of the data set, the neutral text, and every file that a setting names; None for a data set
    of the hub that is out of reach."""
    transfer = cfg.analyzer.options.get("transfer")
    found = []
    for path in (cfg.dataset.path, cfg.dataset.background, transfer):
        if path and Path(path).exists():
            found.append([(str(path), ""), *contents(Path(path))])
        elif path and path == cfg.dataset.path and cfg.dataset.name == "hf":
            cached = snapshot(str(path), kind="dataset")
            if cached is None:
                return None
            found.append([("commit", cached.name)])
    config = dataclasses.asdict(cfg)
    for name in ("model", "sae", "tracker", "cache_dir"):
        config.pop(name)
    named = {s for s in _strings(config) if len(s) < 1024 and "\0" not in s and _is_file(s)}
    return [*found, *(contents(Path(s)) for s in sorted(named))]


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
"""Plugin -> content of its files when this process first looked, which is what it imported."""


def plugins_content(cfg: RunConfig) -> list[list[list[str]]]:
    """Of plugins: their modules, and those of the user's own that came with them."""
    for module in (*plugins.entry_point_modules(), *cfg.plugins):
        if module not in _plugins:
            files = plugins.plugin_files(module)
            _plugins[module] = [[str(f), file_sha256(f)] for f in files if f.is_file()]
    return [_plugins[m] for m in (*plugins.entry_point_modules(), *cfg.plugins)]


@cache
def code_content() -> list[list[str]]:
    """Of saexp's own code and shipped texts, and versions of what it computes with."""
    shipped = [f for f in ASSETS.rglob("*") if f.suffix in (".jsonl", ".csv", ".txt")]
    files = sorted([*PACKAGE.rglob("*.py"), *shipped])
    made = [[f.relative_to(PACKAGE).as_posix(), file_sha256(f)] for f in files]
    return made + [[name, _version(name)] for name in _VERSIONS]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
