"""Passes of the language model that the cells of a sweep share, planned before the first cell.

Of `sweep.dry_run=true`, what they and the cells would cost.
"""

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose

from saexp import registry
from saexp.activations.collection import Lacking, lacking
from saexp.activations.collector import CollectionRequest
from saexp.config import (
    COMPOSITION_ERRORS,
    CorpusConfig,
    RunConfig,
    key_of,
    one_line,
    parse_layers,
    to_run_config,
)
from saexp.config.tasks import StreamsConfig
from saexp.context import ObjectCache, RunContext
from saexp.errors import SaexpError, StoreError, counted, duration_words
from saexp.files import free_bytes, is_writable, show_bytes, write_json
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.pipeline import finished, neighbouring_hookpoints, neutral_prefetch
from saexp.pipeline.collect import (
    bos_preference,
    examples_request,
    hookpoints_in_model,
    neutral_request,
    resolve_bos,
)
from saexp.pipeline.objects import language_model, per_layer, sparse_autoencoder
from saexp.results import SWEEP_PLAN, Result, read_plan
from saexp.saes.loading import check_exists, hookpoints_of
from saexp.sweeps import check_before

log = logging.getLogger(__name__)

_IGNORED = frozenset({"coefficient", "width", "latents", "sae_trainer", "tracker"})
"""Keys that never change which hookpoint of which texts a cell needs. Neither does `analyzer.x=`,
but `analyzer=` may, since an analyzer's config can choose positions."""
_OF_LAYERS = ("intervention.latents", "intervention.layers")
"""Settings of an intervention that name layers whose latents it changes."""


def passes(
    cells: Iterable[list[str]], objects: ObjectCache, configs: "CellConfigs | None" = None
) -> dict[str, list[list[Any]]]:
    """Texts' key -> [layer, stream or null] of all cells that read those texts.

    A cell that cannot be composed is left out; it fails with its own error later.
    """
    configs = configs or CellConfigs()
    hookpoints: dict[str, set[tuple[int, str | None]]] = {}
    kinds: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        kinds.setdefault(tuple(_relevant_words(cell)), cell)
    for relevant, first in kinds.items():
        # The first cell's whole config is needed in other places too. If other words of it are
        # wrong, those of the other cells may be right.
        for words in (first, relevant):
            try:
                cfg = configs.of(words)
                needed = _hookpoints(cfg, objects, alone=len(kinds) == 1)
                hookpoints.setdefault(texts_key(cfg), set()).update(needed)
                break
            except (*COMPOSITION_ERRORS, SaexpError) as error:
                log.debug("not planned: %s (%s)", words, error)
    return {key: [list(h) for h in sorted(hs, key=str)] for key, hs in hookpoints.items()}


class CellConfigs:
    """Configs of a sweep's cells, by Hydra's current config folder; each is composed once."""

    def __init__(self) -> None:
        self._configs: dict[tuple[str, ...], RunConfig] = {}

    def of(self, words: Sequence[str]) -> RunConfig:
        """The config of a cell with these overrides. Raises as `to_run_config` and Hydra do."""
        key = tuple(words)
        if key not in self._configs:
            cfg = compose("config", overrides=list(words))
            self._configs[key] = to_run_config(cfg, quiet=True, words=words)
        return self._configs[key]


def _relevant_words(cell: list[str]) -> list[str]:
    """The overrides of a cell that may change which hookpoint of which texts it needs."""
    keys = [key_of(w) for w in cell]
    has_layer_key = any(key in _OF_LAYERS for key in keys)
    return [w for w, key in zip(cell, keys, strict=True) if not _ignored(key, has_layer_key)]


def _ignored(key: str, layers_named: bool) -> bool:
    if key.split(".")[0] == "intervention":
        return not layers_named or key not in (*_OF_LAYERS, "intervention")
    return key.split(".")[0] in _IGNORED or key.startswith(("analyzer.", "task.latents"))


def _hookpoints(
    cfg: RunConfig, objects: ObjectCache, *, alone: bool
) -> set[tuple[int, str | None]]:
    """(layer, stream) that a cell needs.

    With `alone`, all cells of the sweep need the same, so that SAE files need not be read.
    """
    if isinstance(cfg.task, StreamsConfig):
        return {(n, s) for n in parse_layers(cfg.layer) for s in cfg.task.streams}
    layers = [] if cfg.layer is None else parse_layers(cfg.layer)
    if not layers and cfg.sae.release is not None and cfg.sae.id is not None:
        from saexp.saes.catalogue import find_entry

        layer = find_entry(cfg.sae).layer
        layers = [] if layer is None else [layer]
    own = {(n, cfg.sae.stream) for n in layers}
    one = not isinstance(cfg.layer, list)
    if one and not alone and cfg.sae.path and Path(cfg.sae.path).exists():
        # The SAE's files decide what it reads. If they are damaged, the cell reports the error.
        with suppress(SaexpError):
            own = set(hookpoints_of(cfg.sae.path, cfg.layer, cfg.sae.stream))
    return own | {(n, cfg.sae.stream) for n in _layers_changed(cfg, objects)}


def _layers_changed(cfg: RunConfig, objects: ObjectCache) -> list[int]:
    """Layers other than the run's own whose latents the intervention changes."""
    about = cfg.intervention
    if cfg.task.name != "analyze" or about.name == "none":
        return []
    if not about.by_layer or about.layers != "all":
        return about.latent_layers(0)
    return about.latent_layers(language_model(cfg, objects).n_layers)


def texts_key(cfg: RunConfig) -> str:
    """Hash of the settings that determine model, texts and positions: cells that share a store.

    The store's own key is made from the token ids instead.
    """
    parts = [asdict(cfg.model), asdict(cfg.dataset), asdict(cfg.positions), cfg.store.dtype]
    parts.append(asdict(cfg.collector))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def hookpoints_to_prefetch(cfg: RunConfig, sweep: Path | None) -> list[tuple[int, str | None]]:
    """(layer, stream) that cells of the sweep need of this cell's texts; None: the SAE's stream."""
    if sweep is None or not (sweep / SWEEP_PLAN).exists():
        return []
    try:
        hookpoints = read_plan(sweep)["passes"].get(texts_key(cfg), [])
        return [(int(layer), stream) for layer, stream in hookpoints]
    except (KeyError, TypeError, ValueError):
        log.warning(
            "%s is damaged: this cell collects its own hookpoints alone", sweep / SWEEP_PLAN
        )
        return []


RATES = "rates.json"
"""File in the cache: how fast earlier runs on each machine were."""
_N_MEASURED = 5
"""Measured runs that are kept of each kind; estimates are by the slowest."""
_MIN_TOKENS = 1000
"""A pass over fewer tokens measures its overhead rather than its rate."""
_READS_TEXTS = ("analyze", "collect", "dashboard")
"""Tasks whose texts are collected into a store."""


def _rate_keys(cfg: RunConfig) -> tuple[str, str]:
    """Keys of the tokens per second of a pass, and of the seconds of a cell behind its pass."""
    machine = f"{cfg.model.name} on {platform.node()}, device {cfg.device}, dtype {cfg.dtype}"
    parts = [cfg.task.name]
    if cfg.task.name == "analyze":
        parts += [cfg.analyzer.name, cfg.intervention.name]
    return machine, f"{'/'.join(parts)}: {machine}"


def _read_rates(cache_dir: str | Path) -> dict[str, list[float]]:
    """Key -> measured values; empty where the file is missing or damaged."""
    try:
        rates = json.loads((Path(cache_dir) / RATES).read_text("utf-8"))
        measured = {str(key): [float(v) for v in list(values)] for key, values in rates.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    # Only positive numbers can be rates; another program may have written the file.
    usable = {k: [v for v in values if 0 < v < math.inf] for k, values in measured.items()}
    return {k: values for k, values in usable.items() if values}


def record_rates(cfg: RunConfig, result: Result, context: RunContext) -> None:
    """Store in the cache how fast a finished run was, for estimates of later sweeps."""
    rates, (of_pass, of_cell) = _read_rates(cfg.cache_dir), _rate_keys(cfg)
    n_tokens = result.metrics.get("collection/tokens_forwarded") or 0
    seconds = context.seconds.get("collect", 0.0)
    measured = {of_cell: sum(s for name, s in context.seconds.items() if name != "collect")}
    if n_tokens >= _MIN_TOKENS and seconds > 0:
        measured[of_pass] = n_tokens / seconds
    for key, value in measured.items():
        rates[key] = [*rates.get(key, []), round(value, 3)][-_N_MEASURED:]
    try:
        if is_writable(cfg.cache_dir):
            write_json(Path(cfg.cache_dir) / RATES, rates)
    except StoreError as error:
        log.debug("the rate of this run is not stored: %s", error)


@dataclass(frozen=True)
class _PlannedPass:
    """What must be computed of one set of texts; `problem` says why that is not known."""

    label: str
    needed: Lacking = Lacking(0, 0, 0)
    cfg: RunConfig | None = None
    request: CollectionRequest | None = None
    model: LanguageModel | None = None
    problem: str | None = None


def show_plan(
    cells: Sequence[Sequence[str]],
    objects: ObjectCache,
    configs: CellConfigs,
    n_trials: int | None = None,
) -> list[str]:
    """Lines on what a sweep would compute: cells, tokens to forward, disk space and time.

    A search runs at most `n_trials` of the cells. Nothing is written. The model runs only where no
    earlier run has measured its rate: over some of the texts, to measure it.
    """
    lines, todo = [], []
    fixed = [word for word in cells[0] if all(word in cell for cell in cells)]
    for number, typed in enumerate(cells):
        words = [word for word in typed if key_of(word).lstrip("+") != "sweep.dry_run"]
        varying = " ".join(word for word in words if len(cells) == 1 or word not in fixed)
        try:
            cfg = configs.of(words)
            check_before(cfg)
            earlier = _finished(cfg)
            if earlier is None:
                _check_loadable(cfg, objects)
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            state = f"fails: {one_line(error)}"
        else:
            state = "to run" if earlier is None else f"finished in {earlier}, is reused"
            todo += [(words, cfg)] if earlier is None else []
        lines.append(f"  {number} {varying or '(as the others)'}: {state}")
    head = [f"dry run: {counted(len(cells), 'cell')}, {len(todo)} to run; nothing is written"]
    if n_trials is not None:
        head.append(f"a search runs at most {n_trials} of these cells")
    return [*head, *lines, *_costs(todo, objects, configs, n_trials)]


def _check_loadable(cfg: RunConfig, objects: ObjectCache) -> None:
    """Raise the error of a model or SAE that the run could not load; reads no weights.

    A model whose files are not on this machine is not checked.
    """
    task = cfg.task.name
    if task not in _READS_TEXTS and task != "evaluate":
        return
    model = None if finished.model_content(cfg.model) is None else language_model(cfg, objects)
    for cell in per_layer(cfg):
        if model is not None and cell.layer is not None:
            model.check_layer(int(cell.layer))
        if task != "collect":
            check_exists(cell.sae)


def _finished(cfg: RunConfig) -> Path | None:
    """Folder of the finished run that a cell would reuse."""
    if cfg.resume is False or cfg.verify or cfg.task.name in finished.ALWAYS_RUN:
        return None
    earlier = finished.find_finished(cfg, finished.fingerprint(cfg))
    return None if earlier is None else earlier.folder


def _costs(
    todo: Sequence[tuple[list[str], RunConfig]],
    objects: ObjectCache,
    configs: CellConfigs,
    n_trials: int | None,
) -> list[str]:
    if not todo:
        return ["tokens to forward: 0", "disk: 0 B", "time: no model runs"]
    hookpoints = passes([words for words, _ in todo], objects, configs)
    first = {texts_key(cfg): cfg for _, cfg in reversed(todo)}
    planned_passes = [
        one
        for key, cfg in reversed(first.items())
        for one in _planned(cfg, hookpoints[key], objects)
    ]
    lines = []
    for one in planned_passes:
        n = one.needed
        cost = f"{n.n_tokens:,} tokens to forward, {show_bytes(n.n_bytes)} to write"
        lines.append(f"{one.label}: {one.problem or (cost if n.n_tokens else 'stored already')}")
    total = Lacking(
        *(sum(v) for v in zip(*(_values(one.needed) for one in planned_passes), strict=True))
    )
    unknown = " (without the texts above that could not be counted)"
    note = unknown if any(one.problem for one in planned_passes) else ""
    free = free_bytes(Path(todo[0][1].cache_dir).absolute())
    lines += [
        f"tokens to forward: {total.n_tokens:,}{note}",
        f"disk: {show_bytes(total.n_bytes)} of activations{note}, {show_bytes(free)} are free at "
        f"{todo[0][1].cache_dir}",
    ]
    return [*lines, *_times(planned_passes, [cfg for _, cfg in todo], n_trials)]


def _values(needed: Lacking) -> tuple[int, int, int]:
    return needed.n_rows, needed.n_tokens, needed.n_bytes


def _planned(
    cfg: RunConfig, hookpoints: Sequence[Sequence[Any]], objects: ObjectCache
) -> list[_PlannedPass]:
    """The passes over a data set and over neutral text, for the hookpoints of all cells."""
    label = f"{cfg.dataset.name} ({cfg.positions.name})"
    reason = None
    if cfg.task.name not in _READS_TEXTS:
        reason = f"task={cfg.task.name} stores no texts by itself"
    elif isinstance(cfg.dataset, CorpusConfig):
        reason = "a corpus is counted only when it is tokenized"
    elif finished.model_content(cfg.model) is None:
        reason = f"the files of {cfg.model.name} are not on this machine"
    elif cfg.task.name != "collect" and finished.sae_content(cfg.sae) is None:
        # Its files say whether texts begin with BOS, and which stream is read.
        reason = f"the files of sae={cfg.sae.name} are not on this machine"
    if reason is not None:
        return [_PlannedPass(label, problem=f"not counted: {reason}")]
    try:
        return _counted(cfg, label, [(int(n), s) for n, s in hookpoints], objects)
    except SaexpError as error:
        return [_PlannedPass(label, problem=f"not counted: {error}")]


def _counted(
    cfg: RunConfig, label: str, needed: list[tuple[int, str | None]], objects: ObjectCache
) -> list[_PlannedPass]:
    model = language_model(cfg, objects)
    own: list[Hookpoint] = []
    if cfg.task.name != "collect":
        first = parse_layers(cfg.layer)[0] if cfg.layer is not None else None
        cfg = replace(cfg, layer=first, sae=replace(cfg.sae, layer=first))
        sae = sparse_autoencoder(cfg, model, objects)
        model, _ = resolve_bos(cfg, model, [bos_preference(sae)])
        own = [h.stored for h in sae.hookpoints]
        beside = [h for at in neighbouring_hookpoints(cfg, sae, model) for h in at]
    own = own or [Hookpoint(layer, stream or "resid_post") for layer, stream in needed[:1]]
    every = list(dict.fromkeys([*own, *hookpoints_in_model(model, own, needed)]))
    _, request = examples_request(cfg, model, every)
    result = [_lacking(cfg, model, label, request)]
    if cfg.task.name != "collect" and cfg.collector.name != "imported":
        prefetch = neutral_prefetch(cfg, needed)
        read = list(dict.fromkeys([*own, *beside, *hookpoints_in_model(model, own, prefetch)]))
        about, _, _, neutral = neutral_request(cfg, model, read, cfg.analyzer.n_background)
        result.append(_lacking(about, model, "neutral text", neutral))
    return result


def _lacking(
    cfg: RunConfig, model: LanguageModel, label: str, request: CollectionRequest
) -> _PlannedPass:
    collector = registry.build("collector", cfg.collector, model=model, store=cfg.store)
    needed = lacking(collector, request, cfg.cache_dir)
    return _PlannedPass(label, needed, cfg, request, model)


def _times(
    planned_passes: Sequence[_PlannedPass], cfgs: Sequence[RunConfig], n_trials: int | None
) -> list[str]:
    """Lines on the time of the passes and of the cells, and where the rates come from.

    Of a search that of its slowest `n_trials` cells.
    """
    total, lines = 0.0, []
    for one in planned_passes:
        if one.cfg is None or not one.needed.n_tokens:
            continue
        rates = _read_rates(one.cfg.cache_dir).get(_rate_keys(one.cfg)[0], [])
        rate, source = (min(rates), "earlier runs") if rates else (_short_pass(one), "a short pass")
        total += one.needed.n_tokens / rate
        lines.append(
            f"  {one.label}: {duration_words(one.needed.n_tokens / rate)} at {rate:,.0f} tokens/s "
            f"(measured by {source})"
        )
    measured = [(cfg, _read_rates(cfg.cache_dir).get(_rate_keys(cfg)[1], [])) for cfg in cfgs]
    measured.sort(key=lambda pair: max(pair[1], default=math.inf), reverse=True)
    kinds: dict[str, list[list[float]]] = {}
    for cfg, seconds in measured[:n_trials]:
        kinds.setdefault(_rate_keys(cfg)[1], []).append(seconds)
    unknown = 0
    for key, (seconds, *others) in kinds.items():
        n = 1 + len(others)
        what = f"{counted(n, 'cell')} of {key.partition(':')[0]}"
        if seconds:
            total += n * max(seconds)
            each = f"at most {duration_words(max(seconds))} each (the slowest of "
            lines.append(f"  {what}: {each}{counted(len(seconds), 'earlier run')})")
        else:
            unknown += n
            lines.append(f"  {what}: not known, as no such run has finished with this cache")
    note = f" and {counted(unknown, 'cell')} whose time is not known" if unknown else ""
    # Of a cell, parts may be in the cache.
    return [f"time: at most {duration_words(total)}{note}, one cell after another", *lines]


def _short_pass(one: _PlannedPass) -> float:
    """Tokens per second of a pass over the first rows, the second time; nothing is stored."""
    assert one.cfg is not None and one.request is not None
    collector = registry.build("collector", one.cfg.collector, model=one.model, store=one.cfg.store)
    rows = np.arange(min(one.request.positions.n_rows, 200))
    rate = 0.0
    # The first pass loads the weights.
    for _ in range(2):
        began, n_tokens = time.perf_counter(), 0
        for batch in collector.batches(one.request, rows, list(one.request.hookpoints)):
            n_tokens += batch.n_tokens
            for wait in batch.host.values():
                wait()
        rate = n_tokens / (time.perf_counter() - began)
    return rate
