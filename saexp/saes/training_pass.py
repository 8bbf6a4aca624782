"""A pass over the data: which SAEs it trains, and the steps that they make together.

A run trains lists of layers and widths, and variants of the trainer; the first cell of a sweep also
trains the SAEs of later cells on its corpus. Each SAE is trained as if it were alone.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from saexp.config import COMPOSITION_ERRORS, RunConfig, SAETrainerConfig, TrainConfig
from saexp.config.environment import as_typed, parse_layers, parse_widths, resolved
from saexp.config.groups import CorpusConfig
from saexp.config.run import conf_folder
from saexp.config.tasks import OF_ONE_SAE
from saexp.context import progress
from saexp.distributed import ALONE, Processes
from saexp.errors import ConfigError, SAEError, SaexpError, counted, duration_words
from saexp.models import STREAM_ORDER, Hookpoint
from saexp.results import read_plan
from saexp.saes.training import TRANSCODERS, Record, Streams, Training, Widths, check_name, summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One SAE that is to be trained."""

    hookpoints: tuple[Hookpoint, ...]
    """The stream that is read, and the one that a transcoder predicts."""
    d_sae: int
    trainer: SAETrainerConfig
    """Its own settings, without variants."""
    label: str = ""
    """Layer, width and settings in which it differs from the others of the run; also its folder."""


def targets(
    layer: Any, width: Any, streams: Sequence[str], trainer: SAETrainerConfig
) -> list[Target]:
    """One target per layer, width and variant; the only one has no label.

    Raises ConfigError for an unusable combination of trainer, layer, streams and width.
    """
    variants = variants_of(trainer)
    layers = [] if layer is None else list(dict.fromkeys(parse_layers(layer)))
    if not layers:
        raise ConfigError("layer is not set; type layer=<block index>, or a list such as [0,1,2]")
    widths = list(dict.fromkeys(parse_widths(width)))
    if not widths:
        raise ConfigError("width is not set; type width=<number of latents>, such as width=2k")
    result = []
    for n in layers:
        for d_sae in widths:
            for name, one in variants.items():
                parts = [f"layer_{n}"] if len(layers) > 1 else []
                parts += [f"width_{d_sae}"] if len(widths) > 1 else []
                label = "_".join([*parts, *([name] if name else [])])
                result.append(Target(_hookpoints(n, streams, one.name), d_sae, one, label))
    return result


def _hookpoints(layer: int, streams: Sequence[str], name: str) -> tuple[Hookpoint, ...]:
    check_name(name)
    is_transcoder = name in TRANSCODERS
    if is_transcoder and len(streams) != 2:
        raise ConfigError(
            f"task.streams={streams}: {name} reads one stream and predicts another of the block; "
            "type 'task.streams=[mlp_in,mlp_out]'"
        )
    if not is_transcoder and len(streams) != 1:
        raise ConfigError(
            f"task.streams={streams}: an SAE reads one stream; sweep with "
            "-m 'task.streams=[resid_post],[mlp_out]' (a transcoder, such as "
            "sae_trainer=batchtopk_transcoder, takes two streams)"
        )
    hookpoints = tuple(Hookpoint(layer, stream) for stream in streams)
    forwards = STREAM_ORDER.index(streams[0]) < STREAM_ORDER.index(streams[-1])
    if is_transcoder and (not forwards or hookpoints[0].stored == hookpoints[1].stored):
        raise ConfigError(
            f"task.streams={streams}: a transcoder predicts a stream that comes after the one it "
            "reads; type 'task.streams=[mlp_in,mlp_out]'"
        )
    return hookpoints


def variants_of(trainer: SAETrainerConfig) -> dict[str, SAETrainerConfig]:
    """Label -> settings of one SAE, for each of `variants`; the only one has no label.

    A variant with another name has the options of the shipped config of that name, not those of the
    run. Raises ConfigError for one that is not a mapping, and for two that are the same.
    """
    base = replace(trainer, variants=[])
    if not trainer.variants:
        return {"": base}
    configs = [_variant(base, variant) for variant in trainer.variants]
    values = [_settings(one) for one in configs]
    keys = list(dict.fromkeys(["name", *(key for one in values for key in one)]))
    varying = [k for k in keys if len({json.dumps(v[k]) for v in values if k in v}) > 1]
    labels = ["_".join(_words(k, v[k]) for k in varying if k in v) for v in values]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(
            f"sae_trainer.variants: two are the same{f' ({twice})' if twice else ''}; leave one out"
        )
    return dict(zip(labels, configs, strict=True))


def _settings(trainer: SAETrainerConfig) -> dict[str, Any]:
    return {**trainer.options, **{key: getattr(trainer, key) for key in OF_ONE_SAE}}


def _words(key: str, value: Any) -> str:
    text = str(value) if key == "name" else f"{key}_{value}"
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _variant(base: SAETrainerConfig, variant: Any) -> SAETrainerConfig:
    if not isinstance(variant, Mapping) or not variant:
        raise ConfigError(
            f"sae_trainer.variants: {variant} is not a mapping; type e.g. "
            "'sae_trainer.variants=[{k:16},{k:32}]'"
        )
    settings = {str(key): value for key, value in variant.items()}
    shared = {f.name for f in fields(SAETrainerConfig)} - {*OF_ONE_SAE, "options"}
    for key in settings:
        if key in shared:
            raise ConfigError(
                f"sae_trainer.variants: {key} is the same for all SAEs of a run; type "
                f"sae_trainer.{key}={settings[key]}"
            )
    name = str(settings.get("name", base.name))
    options = dict(base.options if name == base.name else _shipped_options(name))
    options |= settings.pop("options", {})
    options |= {key: settings.pop(key) for key in list(settings) if key not in OF_ONE_SAE}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(replace(base, options=options)), settings)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"sae_trainer.variants: {dict(variant)}: {reason}") from error
    assert isinstance(config, SAETrainerConfig)
    return config


def _shipped_options(name: str) -> dict[str, Any]:
    """The options in conf/sae_trainer/<name>.yaml; none where there is no such file."""
    check_name(name)
    file = conf_folder() / "sae_trainer" / f"{name}.yaml"
    if not file.is_file():
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return dict(content.get("options", {}))


TRAININGS = "trainings"
"""Entry of plan.json: key of the data -> the trainings of all cells that stream them."""


def is_streamed(cfg: RunConfig) -> bool:
    """Whether a run trains on activations that it computes from a corpus."""
    if not isinstance(cfg.task, TrainConfig):
        return False
    source = cfg.sae_trainer.source
    return source == "stream" or (source is None and isinstance(cfg.dataset, CorpusConfig))


def planned_trainings(
    launcher: str,
    cells: Sequence[Sequence[str]],
    composed: Callable[[Sequence[str]], RunConfig],
) -> dict[str, list[dict[str, Any]]]:
    """Key of the data -> layer, width, streams and trainer of each cell, in the cells' order.

    Empty where the class `launcher` runs cells in several processes, and where the first cell
    streams nothing. A cell that cannot be composed is left out; it fails with its own error later.
    """
    trainings: dict[str, list[dict[str, Any]]] = {}
    if not launcher.endswith("BasicLauncher"):
        return trainings
    for words in cells:
        try:
            cfg = composed(words)
        except (*COMPOSITION_ERRORS, SaexpError) as error:
            log.debug("not planned: %s (%s)", words, error)
            continue
        if is_streamed(cfg):
            trainings.setdefault(_pass_key(cfg), []).append(_plan_entry(cfg))
        elif not trainings:
            return {}
    return {key: entries for key, entries in trainings.items() if len(entries) > 1}


def _plan_entry(cfg: RunConfig) -> dict[str, Any]:
    assert isinstance(cfg.task, TrainConfig)
    entry = {
        "layer": cfg.layer,
        "width": cfg.width,
        "streams": list(cfg.task.streams),
        "sae_trainer": asdict(cfg.sae_trainer),
    }
    return as_typed(json.loads(json.dumps(entry)))


def _pass_key(cfg: RunConfig) -> str:
    """Hash of all settings in which the trainings of one pass agree."""
    own = {*OF_ONE_SAE, "options", "variants"} - {"seed"}
    trainer = {k: v for k, v in asdict(cfg.sae_trainer).items() if k not in own}
    data = [asdict(part) for part in (cfg.model, cfg.dataset, cfg.positions, cfg.store)]
    parts = [data, trainer, cfg.seed, cfg.cache_dir]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def trainings_to_share(cfg: RunConfig, sweep: Path | None) -> list[dict[str, Any]]:
    """Trainings of the sweep's later cells on the same data: layer, width, streams, sae_trainer.

    Earlier cells are done; those of a damaged plan are trained by their own cells.
    """
    if sweep is None or not is_streamed(cfg):
        return []
    try:
        entries = read_plan(sweep).get(TRAININGS, {}).get(_pass_key(cfg), [])
        own = _plan_entry(cfg)
        if own not in entries:
            return []
        later = entries[entries.index(own) + 1 :]
        return [
            {**entry, "sae_trainer": SAETrainerConfig(**entry["sae_trainer"])}
            for entry in map(resolved, later)
            if entry != own
        ]
    except (AttributeError, KeyError, TypeError, ValueError, SaexpError):
        log.warning("the plan of %s is damaged: this cell trains its own SAEs alone", sweep)
        return []


N_TIMED_STEPS = 10
"""Steps after which the duration of a training is estimated."""
N_SCALE_BATCHES = 50
"""Number of batches from which the inputs' mean norm is estimated."""
Reader = Callable[[int], Iterator[Tensor]]
"""Step -> batches from that step on: `[batch, d_in]`, a transcoder's `[batch, d_in + d_out]`."""


@runtime_checkable
class Batches(Protocol):
    """The data of one pass: at each step a batch for every SAE."""

    def seek(self, step: int, streams: Sequence[Streams]) -> int:
        """Continue at this step, or at an earlier one; returns it. Batches are for `streams`."""
        ...

    def next(self) -> Mapping[Streams, Tensor]:
        """The batches of the next step, `[batch, d_in]` or `[batch, d_in + d_out]`, float32."""
        ...

    def mean_norms(self, widths: Widths) -> dict[Hookpoint, float]:
        """Estimated mean norm of the activations at each stream of an SAE."""
        ...

    @property
    def seconds_per_step(self) -> float | None:
        """Average time per step of what is done for many steps at once, such as a refill; None
        before it was measured."""
        ...

    def seen(self, streams: Streams, step: int) -> dict[str, float | int]:
        """`train/tokens`, the activation vectors of the batches up to this step, which is the
        current one; `train/epoch`, how many times that is those of the training data."""
        ...

    def checkpoint(self, step: int) -> None:
        """Store what `seek` needs to continue at this step."""
        ...

    def describe(self, streams: Streams) -> dict[str, Any]:
        """What was read for these streams so far; stored with each checkpoint of their SAEs."""
        ...


class ReaderBatches:
    """Batches of readers that can begin at any step, such as those of an activation store."""

    def __init__(
        self,
        readers: Mapping[Streams, Reader],
        processes: Processes = ALONE,
        *,
        batch_size: int = 0,
        n_rows: Mapping[Streams, int] | None = None,
    ) -> None:
        """`n_rows` are those that each reader reads in turn; without them, `seen` is empty."""
        self._readers, self._processes = readers, processes
        self._batch_size, self._n_rows = batch_size, n_rows or {}
        self._batches: dict[Streams, Iterator[Tensor]] = {}

    def seek(self, step: int, streams: Sequence[Streams]) -> int:
        """Continue at exactly this step."""
        self._batches = {one: self._readers[one](step) for one in streams}
        return step

    def next(self) -> Mapping[Streams, Tensor]:
        """The next batch of each reader."""
        return {one: next(batches) for one, batches in self._batches.items()}

    def mean_norms(self, widths: Widths) -> dict[Hookpoint, float]:
        """Means over the first `N_SCALE_BATCHES` batches."""
        batches = self._readers[tuple(widths)](0)
        norms = [
            [
                self._processes.mean(part.norm(dim=-1))
                for part in next(batches).split(list(widths.values()), dim=-1)
            ]
            for _ in range(N_SCALE_BATCHES)
        ]
        means = [sum(values) / len(values) for values in zip(*norms, strict=True)]
        return dict(zip(widths, means, strict=True))

    @property
    def seconds_per_step(self) -> float | None:
        """Nothing is done for many steps at once."""
        return 0.0

    def seen(self, streams: Streams, step: int) -> dict[str, float | int]:
        """Vectors, and their ratio to the rows that are read in turn."""
        if streams not in self._n_rows:
            return {}
        n = step * self._batch_size
        return {"train/tokens": n, "train/epoch": n / self._n_rows[streams]}

    def checkpoint(self, step: int) -> None:
        """Nothing: the step says where to continue."""

    def describe(self, streams: Streams) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: what is read follows from the step."""
        return {}


Evaluate = Callable[[Sequence[Training]], Sequence[Mapping[str, float]]]
"""Trainings -> `train/…` numbers of each on held-out text."""


def train_together(
    trainings: Sequence[Training],
    batches: Batches,
    evaluate: Evaluate | None = None,
) -> Iterator[tuple[Training, Record]]:
    """Train SAEs of equally many steps on the same data, each from the step where it is.

    Yields (training, record) every `log_every` steps, and after each evaluation: every
    `evaluate_every` steps, and at the end. An SAE whose loss is not a number is left out from there
    on, with its `error` set; raises the SAEError where that leaves none.
    """
    active = [one for one in trainings if not one.is_finished]
    if not active:
        return
    n_steps, cfg = active[0].n_steps, active[0].cfg
    begin = min(t.step for t in active)
    step = batches.seek(begin, list(dict.fromkeys(t.streams for t in active)))
    for one in active:
        if one.needs_scale:
            one.set_scale(batches.mean_norms(one.widths))
    clock = _Clock(active, step)
    with ExitStack() as stack:
        bar = None
        while step < n_steps:
            clock.start(step)
            if bar is None and step >= begin:
                # Not while data are read again that were trained on before.
                bar = stack.enter_context(progress(n_steps, "training", "step", begin))
            outputs = _steps(active, batches.next(), step)
            active = [t for t in active if t.error is None]
            step += 1
            clock.count(step, batches.seconds_per_step)
            records = {}
            for one, numbers in _evaluated(outputs, evaluate, step).items():
                if numbers or step % cfg.log_every == 0 or step == n_steps:
                    seen = batches.seen(one.streams, step)
                    records[one] = record = one.record(outputs[one], {**seen, **numbers})
                    yield one, {**record, "train/samples_per_second": clock.rate(step)}
            # The last step has one too, so that a failure to save the SAE loses no training.
            if step % cfg.checkpoint_every == 0 or step == n_steps:
                batches.checkpoint(step)
                for one in outputs:
                    one.checkpoint(batches.describe(one.streams))
            if bar is not None:
                if records:
                    bar.set_postfix_str(summary(list(records.values())), refresh=False)
                bar.update(1)


def _steps(
    active: Sequence[Training], batch: Mapping[Streams, Tensor], step: int
) -> dict[Training, Any]:
    """Make a step with each SAE that has made this many; SAE -> output.

    Those that have made more wait for the data to arrive where they are.
    """
    outputs = {}
    for one in active:
        if one.step != step:
            continue
        try:
            outputs[one] = one.make_step(batch[one.streams])
        except SAEError as error:
            one.error = error
            if all(t.error is not None for t in active):
                raise
            log.warning("%s; the others go on", error)
    return outputs


def _evaluated(
    outputs: Mapping[Training, Any], evaluate: Evaluate | None, step: int
) -> dict[Training, Mapping[str, float]]:
    """Training -> its numbers on held-out text, where it is evaluated at this step."""
    trainings = list(outputs)
    if evaluate is None or not trainings:
        return dict.fromkeys(trainings, {})
    every, n_steps = trainings[0].cfg.evaluate_every, trainings[0].n_steps
    if step != n_steps and not (every and step % every == 0):
        return dict.fromkeys(trainings, {})
    return dict(zip(trainings, evaluate(trainings), strict=True))


class _Clock:
    """The rate of a pass, and an estimate of its duration after the first steps."""

    def __init__(self, trainings: Sequence[Training], step: int) -> None:
        one, steps = trainings[0], [t.step for t in trainings]
        self.n_saes, self.n_steps, self.batch_size = len(steps), one.n_steps, one.cfg.batch_size
        self._starts = min(steps), max(steps)
        """Step from which the first SAE is trained, and from which all are."""
        self.seconds: float | None = None
        """Duration of a step of all SAEs."""
        self._is_reported = False
        self._restart(step)

    def _restart(self, step: int) -> None:
        self.first, self.began = step, time.perf_counter()
        self.timed = self.began

    def start(self, step: int) -> None:
        """Begin anew where the first SAE is trained and where all are; before each step."""
        if step in self._starts:
            self._restart(step)

    def rate(self, step: int) -> float:
        """Activation vectors per second since the first step."""
        return (step - self.first) * self.batch_size / (time.perf_counter() - self.began)

    def count(self, step: int, seconds_per_step: float | None) -> None:
        """Log the estimate once, after `N_TIMED_STEPS` steps; the first one is not timed.

        `seconds_per_step` is what is not part of every step; None where it is not known yet.
        Evaluations are not counted.
        """
        n_made = step - self.first
        if n_made == 1:
            self.timed = time.perf_counter()
        if n_made == N_TIMED_STEPS + 1 and self.first == self._starts[1]:
            self.seconds = (time.perf_counter() - self.timed) / N_TIMED_STEPS
        if self.seconds is None or seconds_per_step is None:
            return
        if self._is_reported or step == self.n_steps:
            return
        self._is_reported = True
        seconds = self.seconds + seconds_per_step
        log.info(
            "training %s: about %s for the remaining %s of %d activation vectors (%d a second)",
            counted(self.n_saes, "SAE"),
            duration_words(seconds * (self.n_steps - step)),
            counted(self.n_steps - step, "step"),
            self.batch_size,
            self.batch_size / seconds,
        )
