"""`hydra/sweeper=saexp_optuna`: Optuna chooses the cells of a sweep by the metric `objective=`.

The study is the file study.db in the sweep's folder, so that the same command continues it after
the process ended, however that was. Imported at every start of Hydra: it imports Optuna late.
"""

import itertools
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from saexp.errors import ConfigError, StoreError, brief
from saexp.results import ObjectiveError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

STUDY = "study.db"
"""SQLite file of the study in the sweep's folder."""
SAMPLERS = ("tpe", "random")
_STUDY_NAME = "saexp"
_WORDS, _CELL, _SEARCH = "overrides", "cell", "search"
"""Attributes of a trial (overrides, number of the cell) and of the study (what is searched)."""
_N_REPEATS = 20
"""Proposals in a row of cells that were run already, after which an unvisited cell is chosen."""
_MOST_REPEATS = 500
"""As many end the search: an interval of one value has no other."""
_MOST_WORDS = 10_000
"""A shorter interval of whole numbers is a list of them."""


@dataclass
class OptunaConfig:
    """Settings of the sweeper (`hydra.sweeper.…`)."""

    _target_: str = "hydra_plugins.saexp_optuna.OptunaSweeper"
    n_trials: int = 20
    """Cells that are run, those of an earlier start of the same command included."""
    direction: str = "maximize"
    """maximize or minimize the objective."""
    sampler: str = "tpe"
    """tpe or random."""
    n_jobs: int = 1
    """Cells that are chosen and launched at once, for launchers with several processes."""
    seed: int = 0
    """Seed of the sampler."""
    params: dict[str, Any] = field(default_factory=dict)
    """Further overrides, as on the command line: {layer: "range(0,26)"}."""


def is_search(sweeper: Any) -> bool:
    """Whether the config of a sweeper is of this one."""
    return str(sweeper.get("_target_")) == OptunaConfig._target_


def visitable(words: Sequence[str]) -> list[list[str]]:
    """Overrides of every cell that a search may visit; of an interval, only its two ends.

    Raises ConfigError for an interval that holds nothing.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides(list(words))
    return [list(cell) for cell in itertools.product(*map(_values, parsed))]


def between(words: Sequence[str]) -> Iterator[tuple[str, tuple[float, float], list[str]]]:
    """(key, ends, overrides of a cell inside) of every interval that is searched in fractions."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides(list(words))
    first = [_values(override)[0] for override in parsed]
    for i, override in enumerate(parsed):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            start, end = _ends(override)
            if isinstance(start, float) and start < end:
                inside = f"{override.get_key_element()}={start + 0.382 * (end - start)}"
                yield (
                    override.get_key_element(),
                    (start, end),
                    [*first[:i], inside, *first[i + 1 :]],
                )


def _ends(override: Override) -> tuple[float, float]:
    """The ends of an interval. Raises ConfigError where nothing is between them."""
    about, key = override.value(), override.get_key_element()
    assert isinstance(about, IntervalSweep) and about.start is not None and about.end is not None
    if about.start > about.end:
        raise ConfigError(
            f"{key}: the interval from {about.start:g} to {about.end:g} is empty; type "
            f"{key}=interval({about.end:g},{about.start:g})"
        )
    if "log" in about.tags and about.start <= 0:
        raise ConfigError(
            f"{key}: a logarithmic interval begins above 0, not at {about.start:g}; type e.g. "
            f"'{key}=tag(log,interval(0.01,{about.end:g}))'"
        )
    return about.start, about.end


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={end}" for end in _ends(override)]


@dataclass(frozen=True)
class _Axis:
    """A swept override: its distribution, and the words for a value of it."""

    key: str
    distribution: Any
    words: tuple[str, ...] | None
    """Overrides by index; None for an interval."""

    def word(self, value: Any) -> str:
        return f"{self.key}={value}" if self.words is None else self.words[int(value)]


def _axis(override: Override) -> _Axis:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    key = override.get_key_element()
    if not override.is_discrete_sweep():
        ends: Any = _ends(override)
        tags = override.value().tags  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        whole = all(isinstance(end, int) for end in ends)
        kind = IntDistribution if whole else FloatDistribution
        if whole and not tags and ends[1] - ends[0] < _MOST_WORDS:
            # As `range`: the search ends when all values have been visited.
            words = tuple(f"{key}={value}" for value in range(ends[0], ends[1] + 1))
            return _Axis(key, IntDistribution(0, len(words) - 1), words)
        return _Axis(key, kind(*ends, log="log" in tags), None)
    # Indices of numbers in their order, so that the sampler learns from neighbours.
    words = _values(override)
    try:
        words.sort(key=lambda word: float(word.partition("=")[2].strip("'\"")))
    except ValueError:
        return _Axis(key, CategoricalDistribution(list(range(len(words)))), tuple(words))
    return _Axis(key, IntDistribution(0, len(words) - 1), tuple(words))


class OptunaSweeper(Sweeper):
    """Runs `n_trials` cells, each chosen by Optuna from the results of the earlier ones.

    The search space is that of the command: `layer=0,1,2`, `layer=range(0,26)`,
    `coefficient=interval(0,4)`. No cell is run twice. A cell that fails, or whose objective could
    not be computed, counts as a failed trial, and the search goes on.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("_target_", None)
        self.settings = OptunaConfig(**settings)
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Any = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Check the settings. Raises ConfigError."""
        from saexp.config.environment import at_least, one_of

        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                f"hydra/sweeper=saexp_optuna needs a package that is not installed ({error}); type "
                "pip install 'saexp[optuna]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        about = self.settings
        one_of("hydra.sweeper.sampler", about.sampler, SAMPLERS)
        one_of("hydra.sweeper.direction", about.direction, ("maximize", "minimize"))
        for name in ("n_trials", "n_jobs"):
            at_least(f"hydra.sweeper.{name}", getattr(about, name), 1)
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the cells that the study still lacks; raises the error of the first that failed."""
        assert self.config is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        words = [*(f"{k}={v}" for k, v in self.settings.params.items()), *arguments]
        parsed = OverridesParser.create().parse_overrides(words)
        if not any(o.get_key_element() == "objective" and o.value() for o in parsed):
            raise ConfigError(
                "hydra/sweeper=saexp_optuna needs a metric to optimise; type e.g. "
                "objective=effect/refusal/unknown_group"
            )
        search = _Search(self.settings, parsed, folder)
        errors = []
        while batch := search.next_batch():
            cells = [cell for _, cell in batch]
            self.validate_batch_is_legal(cells)
            # Numbers of a batch follow one another, as Hydra counts them.
            results = self.launcher.launch(cells, initial_job_idx=search.number(batch[0][0]))
            for (trial, _), result in zip(batch, results, strict=True):
                error = search.tell(trial, result)
                if isinstance(error, ObjectiveError):
                    # No other cell has that metric either.
                    raise error
                errors += [error] if error is not None else []
        if search.best is None:
            log.warning("no cell has a value of the objective")
        if errors:
            raise errors[0]
        return search.best


class _Search:
    """The study of a sweep."""

    def __init__(self, settings: OptunaConfig, parsed: Sequence[Override], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        last = {o.get_key_element(): o for o in parsed}
        self.fixed = [w for o in last.values() if not o.is_sweep_override() for w in _values(o)]
        # Of a key that is typed twice the last word counts, as in a single run.
        self.axes = [_axis(o) for o in last.values() if o.is_sweep_override()]
        self.objective = next(
            o.get_value_element_as_str() for o in parsed if o.get_key_element() == "objective"
        )
        if not self.axes:
            raise ConfigError("a search needs a swept key; type e.g. layer=0,1,2")
        self.study = self._opened()
        self._failed = self._failed_before()

    def _opened(self) -> Any:
        """The study in the folder, or a new one. Raises ConfigError, or StoreError if damaged."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return self._checked()
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            path = self.folder / STUDY
            raise StoreError(
                f"{path} cannot be read ({brief(str(error), 100)}); remove the file, and the same "
                "command starts the search again, which reuses what is finished"
            ) from error

    def _failed_before(self) -> "list[FrozenTrial]":
        """The trials of an earlier start whose cells ended with an error, as their folders show."""
        from optuna.trial import TrialState

        def has_error(trial: "FrozenTrial") -> bool:
            number = trial.user_attrs[_CELL]
            folders = [*self.folder.glob(f"{number}_*"), self.folder / str(number)]
            return any((folder / "error.txt").is_file() for folder in folders)

        launched = self.launched.values()
        return [t for t in launched if t.state == TrialState.FAIL and has_error(t)]

    def _checked(self) -> Any:
        import optuna

        study = optuna.create_study(
            storage=f"sqlite:///{(self.folder / STUDY).resolve()}",
            study_name=_STUDY_NAME,
            direction=optuna.study.StudyDirection[self.settings.direction.upper()],
            load_if_exists=True,
        )
        objective = [w for w in self.fixed if w.startswith("objective=")]
        space = [[axis.key, str(axis.distribution), axis.words] for axis in self.axes]
        about = json.dumps([objective, self.settings.direction, space])
        if study.user_attrs.get(_SEARCH, about) != about:
            raise ConfigError(
                f"{self.folder / STUDY} is the study of another search (other swept values, "
                "direction or objective); type another hydra.sweep.dir="
            )
        study.set_user_attr(_SEARCH, about)
        # Samplers start from their seed again: another one continues rather than repeats.
        seed = self.settings.seed + len(study.trials)
        n_startup = max(1, min(10, self.settings.n_trials // 3))
        study.sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if self.settings.sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup)
        )
        return study

    @property
    def launched(self) -> dict[str, Any]:
        """Overrides of each cell -> its last trial, in order; a repeated proposal has no cell."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if _CELL in t.user_attrs]
        trials.sort(key=lambda trial: trial.user_attrs[_CELL])
        return {" ".join(trial.user_attrs[_WORDS]): trial for trial in trials}

    def number(self, trial: int) -> int:
        """The cell of a trial."""
        return self.study.trials[trial].user_attrs[_CELL]

    def next_batch(self) -> list[tuple[int, list[str]]]:
        """(trial, overrides) of the cells to run next; empty at the end of the search.

        First those that were running when an earlier process ended, and those that failed then, one
        by one.
        """
        from optuna.trial import TrialState

        self._write_plan()
        for words, trial in self.launched.items():
            if trial.state == TrialState.RUNNING:
                log.info("running again: %s", words)
                return [(trial.number, list(trial.user_attrs[_WORDS]))]
        if self._failed:
            return [self._again(self._failed.pop(0))]
        batch: list[tuple[int, list[str]]] = []
        while len(batch) < self.settings.n_jobs:
            cell = self._proposed()
            if cell is None:
                break
            batch.append(cell)
        self._write_plan()
        return batch

    def _again(self, failed: "FrozenTrial") -> tuple[int, list[str]]:
        """A new trial of a failed one's cell, as Optuna's trials end once."""
        self.study.enqueue_trial(failed.params)
        trial = self.study.ask({axis.key: axis.distribution for axis in self.axes})
        for name in (_WORDS, _CELL):
            trial.set_user_attr(name, failed.user_attrs[name])
        log.info("running again: %s", " ".join(failed.user_attrs[_WORDS]))
        return trial.number, list(failed.user_attrs[_WORDS])

    def _proposed(self) -> tuple[int, list[str]] | None:
        """A new cell; a proposal that was run already gets its result without running again."""
        from optuna.trial import TrialState

        launched = self.launched
        if len(launched) >= self.settings.n_trials:
            return None
        for attempt in range(_MOST_REPEATS):
            if attempt == _N_REPEATS and not self._enqueue_unvisited(set(launched)):
                log.info("all %d cells of the search have been run", len(launched))
                return None
            trial = self.study.ask({axis.key: axis.distribution for axis in self.axes})
            words = [*self.fixed, *(axis.word(trial.params[axis.key]) for axis in self.axes)]
            earlier = launched.get(" ".join(words))
            if earlier is None:
                trial.set_user_attr(_WORDS, words)
                trial.set_user_attr(_CELL, len(launched))
                return trial.number, words
            value = earlier.value if earlier.state == TrialState.COMPLETE else None
            self.study.tell(trial, value, None if value is not None else TrialState.FAIL)
        log.info("the search ends: %d proposals in a row have been run already", _MOST_REPEATS)
        return None

    def _enqueue_unvisited(self, launched: set[str]) -> bool:
        """Make the next proposal the first cell that was not run; False where there is none."""
        if any(axis.words is None for axis in self.axes):
            # The sampler will leave the repeated value of an interval, if there is another.
            return True
        for indices in itertools.product(*(range(len(axis.words or ())) for axis in self.axes)):
            words = [axis.word(i) for axis, i in zip(self.axes, indices, strict=True)]
            if " ".join([*self.fixed, *words]) not in launched:
                keys = (axis.key for axis in self.axes)
                self.study.enqueue_trial(dict(zip(keys, indices, strict=True)))
                return True
        return False

    def _write_plan(self) -> None:
        """List the cells so far in the sweep's plan, which the table and the page read."""
        from saexp.files import SWEEP_FOLDER, write_json
        from saexp.results import SWEEP_PLAN, read_plan

        cells = [trial.user_attrs[_WORDS] for trial in self.launched.values()]
        swept = [axis.key for axis in self.axes]
        about: dict[str, Any] = {"objective": self.objective, "direction": self.settings.direction}
        if self.best is not None:
            values = [trial.value for trial in self.launched.values()]
            cell = values.index(self.best)
            about["best"] = {"cell": cell, "value": self.best, "overrides": cells[cell]}
        plan = {**read_plan(self.folder), "cells": cells, "swept": swept, "search": about}
        write_json(self.folder / SWEEP_PLAN, plan, option=SWEEP_FOLDER)

    def tell(self, trial: int, result: Any) -> Exception | None:
        """Enter a cell's result in the study; returns the error of a cell that failed."""
        from optuna.trial import TrialState

        error = None
        try:
            value = result.return_value
        except Exception as raised:
            value, error = None, raised
        if value is None or math.isnan(value):
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.study.tell(trial, float(value))
        return error

    @property
    def best(self) -> float | None:
        """The best value of the objective; None where no cell has one."""
        from optuna.trial import TrialState

        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return float(self.study.best_value) if complete else None
