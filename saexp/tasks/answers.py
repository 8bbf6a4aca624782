"""Options of task=label, and a model's answers to prompts: greedy and sampled, cached per row."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from saexp.config import RunConfig
from saexp.data.labels import Thresholds
from saexp.data.matchers import Rules, canonical, type_key
from saexp.data.templates import TEMPLATES, Templates
from saexp.errors import ConfigError
from saexp.files import write_text
from saexp.interventions.cache import ResultCache, model_ingredients
from saexp.interventions.computing import generate
from saexp.interventions.ops import Row, Sampling
from saexp.models.loading import LanguageModel
from saexp.registry import did_you_mean

FORMS = ("auto", "question", "begun", "own")
_WHOLE = {
    "n_samples": 0,
    "max_new_tokens": 1,
    "batch_tokens": 1,
    "min_correct": 1,
    "min_known": 1,
    "max_unknown": 0,
    "prompt_tokens": 1,
    "continuation_tokens": 1,
}
_MAY_BE_NULL = ("prompt_tokens", "continuation_tokens")
_SEEDS_APART = 100_000
"""Samples of two seeds share none."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`task.options` of conf/task/label.yaml."""

    form: str = "auto"
    n_samples: int = 10
    temperature: int | float = 1.0
    max_new_tokens: int = 32
    batch_tokens: int = 8192
    cut_at_line: bool | None = None
    min_correct: int = 3
    min_known: int = 2
    max_unknown: int = 0
    rules: Mapping[str, Any] = field(default_factory=dict)
    templates: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""
    prompt_tokens: int | None = None
    continuation_tokens: int | None = None

    @classmethod
    def of(cls, cfg: RunConfig) -> "Options":
        """Checked. Raises ConfigError for a name or a value that is none."""
        given, names = cfg.task.options, [f.name for f in fields(cls)]
        for name, value in given.items():
            key = f"task.options.{name}={value}"
            if name not in names:
                raise ConfigError(f"{key} is no option of label; {did_you_mean(name, names)}")
            if name in _WHOLE and not (value is None and name in _MAY_BE_NULL):
                number = value if isinstance(value, int) and not isinstance(value, bool) else -1
                if number < _WHOLE[name]:
                    raise ConfigError(f"{key} is no whole number of at least {_WHOLE[name]}")
            if name in ("rules", "templates") and not isinstance(value, Mapping):
                raise ConfigError(f"{key}: write {{entity type: {{attribute: …}}}}")
        if given.get("form", "auto") not in FORMS:
            raise ConfigError(
                f"task.options.form={given['form']}: {did_you_mean(given['form'], FORMS)}"
            )
        if not isinstance(given.get("before", ""), str):
            raise ConfigError(f"task.options.before={given['before']} is no text")
        warmth = given.get("temperature", 1.0)
        if isinstance(warmth, bool) or not isinstance(warmth, int | float) or warmth <= 0:
            raise ConfigError(f"task.options.temperature={warmth} is no number above 0")
        if given.get("cut_at_line") not in (None, True, False):
            raise ConfigError(
                f"task.options.cut_at_line={given['cut_at_line']}: type true or false"
            )
        return cls(**given)

    @property
    def thresholds(self) -> Thresholds:
        """When an attribute and an entity is known. Raises ConfigError."""
        if 0 < self.n_samples < self.min_correct:
            raise ConfigError(
                f"task.options.min_correct={self.min_correct} is more than n_samples="
                f"{self.n_samples}, so nothing could be known; type a smaller min_correct"
            )
        return Thresholds(self.min_correct, self.min_known, self.max_unknown)

    @property
    def judged_by(self) -> Rules:
        """The default rules with the changes asked for. Raises ConfigError."""
        return Rules().changed(self.rules)

    @property
    def asked_by(self) -> Templates:
        """The default templates with those asked for. Raises ConfigError."""
        made = {t: dict(kinds) for t, kinds in TEMPLATES.items()}
        for entity_type, kinds in self.templates.items():
            if not isinstance(kinds, Mapping):
                raise ConfigError(f"task.options.templates.{entity_type}: write {{attribute: […]}}")
            for attribute, pair in kinds.items():
                where = f"task.options.templates.{entity_type}.{attribute}"
                texts = [pair] if isinstance(pair, str) else pair
                if not isinstance(texts, Sequence) or not 1 <= len(texts) <= 2:
                    raise ConfigError(
                        f"{where}: write a question, or [question, beginning of an answer]"
                    )
                if not all("{entity}" in str(text) for text in texts):
                    raise ConfigError(f"{where}: every text needs {{entity}} in it")
                question, beginning = (*map(str, texts), "")[:2]
                name = canonical(attribute, entity_type)
                made.setdefault(type_key(entity_type), {})[name] = (question, beginning)
        return made


@dataclass(frozen=True)
class Answers:
    """What a model says after one prompt."""

    greedy: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]


def answers(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    cache_dir: str | Path,
    *,
    n_samples: int,
    temperature: int | float,
    max_new_tokens: int,
    batch_tokens: int,
    seed: int,
) -> list[Answers]:
    """Greedy and sampled continuations of token ids, end token left out.

    Every row is kept as it is made, so that a killed run goes on where it was; equal prompts get
    equal answers.
    """
    ways: list[Sampling | None] = [None]
    ways += [Sampling(float(temperature), seed * _SEEDS_APART + k) for k in range(n_samples)]
    rows = [Row(ids, sample=way) for ids in prompts for way in ways]
    cache = ResultCache(cache_dir, model_ingredients(model))
    try:
        made = generate(
            model,
            rows,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            cache=cache,
            what="answering",
            key="task.options.max_new_tokens",
        )
    finally:
        cache.close()
    of_prompt = [made[i : i + len(ways)] for i in range(0, len(made), len(ways))]
    return [Answers(tuple(some[0]), tuple(map(tuple, some[1:]))) for some in of_prompt]


def labels_folder(cache_dir: str | Path, determined_by: Mapping[str, Any]) -> Path:
    """cache_dir/labels/<key>, made where it is not there; about.json says what the key means."""
    text = json.dumps(determined_by, sort_keys=True, ensure_ascii=False, default=str)
    folder = Path(cache_dir) / "labels" / hashlib.sha256(text.encode()).hexdigest()[:24]
    write_text(folder / "about.json", text + "\n")
    return folder
