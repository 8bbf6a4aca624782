"""Options of task=label, answers of a model to prompts, and the files with their labels."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.data.examples import Example, Skip, Span, assign_splits, find_mentions
from saexp.data.prompts import Prompt
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, is_writable, write_bytes, write_text
from saexp.interventions.batching import Row, Sampling
from saexp.interventions.computing import generate
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.labeling.matchers import Rules, canonical, type_key
from saexp.labeling.questions import DROPPED, TEMPLATES, Question, Templates, Thresholds, pick
from saexp.models.loading import LanguageModel
from saexp.pipeline.objects import describe_model
from saexp.pipeline.run_folder import save_run
from saexp.registry import did_you_mean
from saexp.reports.label import write_label_report
from saexp.results import TaskResult

FORMS = ("auto", "question", "begun", "own")
_LEAST = {
    "n_samples": 0,
    "max_new_tokens": 1,
    "batch_tokens": 1,
    "min_correct": 1,
    "min_known": 1,
    "max_unknown": 0,
    "prompt_tokens": 1,
    "continuation_tokens": 1,
}
_OPTIONAL = ("prompt_tokens", "continuation_tokens")
_SEEDS_APART = 100_000
"""Distance of the seeds of two runs, so that they share no sample."""


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
        """The options of the config. Raises ConfigError for an unknown name or an invalid value."""
        options, names = cfg.task.options, [f.name for f in fields(cls)]
        for name, value in options.items():
            key = f"task.options.{name}={value}"
            if name not in names:
                raise ConfigError(f"{key} is no option of label; {did_you_mean(name, names)}")
            if name in _LEAST and not (value is None and name in _OPTIONAL):
                number = value if isinstance(value, int) and not isinstance(value, bool) else -1
                if number < _LEAST[name]:
                    raise ConfigError(f"{key} is not an integer of at least {_LEAST[name]}")
            if name in ("rules", "templates") and not isinstance(value, Mapping):
                raise ConfigError(f"{key}: write {{entity type: {{attribute: …}}}}")
        if options.get("form", "auto") not in FORMS:
            raise ConfigError(
                f"task.options.form={options['form']}: {did_you_mean(options['form'], FORMS)}"
            )
        if not isinstance(options.get("before", ""), str):
            raise ConfigError(f"task.options.before={options['before']} is not a string")
        t = options.get("temperature", 1.0)
        if isinstance(t, bool) or not isinstance(t, int | float) or t <= 0:
            raise ConfigError(f"task.options.temperature={t} is not a number above 0")
        if options.get("cut_at_line") not in (None, True, False):
            raise ConfigError(
                f"task.options.cut_at_line={options['cut_at_line']}: type true or false"
            )
        return cls(**options)

    @property
    def thresholds(self) -> Thresholds:
        """Number of correct answers that counts as knowledge. Raises ConfigError."""
        if 0 < self.n_samples < self.min_correct:
            raise ConfigError(
                f"task.options.min_correct={self.min_correct} is more than n_samples="
                f"{self.n_samples}, so nothing could be known; type a smaller min_correct"
            )
        return Thresholds(self.min_correct, self.min_known, self.max_unknown)

    @property
    def judged_by(self) -> Rules:
        """The default matching rules with the configured changes. Raises ConfigError."""
        return Rules().changed(self.rules)

    @property
    def asked_by(self) -> Templates:
        """The default question templates with the configured ones. Raises ConfigError."""
        templates = {t: dict(kinds) for t, kinds in TEMPLATES.items()}
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
                    raise ConfigError(f"{where}: every text must contain {{entity}}")
                question, beginning = (*map(str, texts), "")[:2]
                name = canonical(attribute, entity_type)
                templates.setdefault(type_key(entity_type), {})[name] = (question, beginning)
        return templates


@dataclass(frozen=True)
class Answers:
    """A model's continuations of one prompt."""

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
    """Greedy and sampled continuations of token ids, without the end token.

    Every continuation is cached as soon as it is complete, so that a killed run resumes there;
    equal prompts get equal answers.
    """
    samplings: list[Sampling | None] = [None]
    samplings += [Sampling(float(temperature), seed * _SEEDS_APART + k) for k in range(n_samples)]
    rows = [Row(ids, sample=sampling) for ids in prompts for sampling in samplings]
    cache = ResultCache(cache_dir, model_ingredients(model))
    try:
        continuations = generate(
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
    n = len(samplings)
    per_prompt = [continuations[i : i + n] for i in range(0, len(continuations), n)]
    return [Answers(tuple(some[0]), tuple(map(tuple, some[1:]))) for some in per_prompt]


def labels_folder(cache_dir: str | Path, determined_by: Mapping[str, Any]) -> Path:
    """cache_dir/labels/<key>, created if need be; its about.json lists what the key is made of."""
    text = json.dumps(determined_by, sort_keys=True, ensure_ascii=False, default=str)
    folder = Path(cache_dir) / "labels" / hashlib.sha256(text.encode()).hexdigest()[:24]
    write_text(folder / "about.json", text + "\n")
    return folder


Asked = tuple[Question, str, Prompt]
"""(question, the prompt as text, the prompt as the model reads it)."""

GROUP_OF = {"correct": "correct", "error": "incorrect", "refusal": "refused"}
"""Label of a greedy answer -> group of its row in answers.jsonl."""


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """The files that task=label writes, and how they are reported."""

    determined_by: Mapping[str, Any]
    """All that the labels depend on; hashed into the folder's name."""
    contents: Mapping[str, str | bytes]
    """File name -> content."""
    usage: Mapping[str, str]
    """File name -> note on how to use it, in which `{path}` is the file's path."""
    finding: Sequence[str]
    """Sentences at the top of the report."""


def save_labels(
    cfg: RunConfig,
    context: RunContext,
    model: LanguageModel,
    result: TaskResult,
    skips: Sequence[Skip],
    labels: LabelFiles,
) -> TaskResult:
    """Write the files to the run's folder and to cache_dir/labels/<key>/; metrics, tables, page.

    The key covers the files' content, so that a path, once used by later runs, never holds other
    labels. Where the cache cannot be written, the notes give the paths in the run's folder.
    """
    checksums = {name: sha256(_bytes(c)).hexdigest() for name, c in labels.contents.items()}
    for name, content in labels.contents.items():
        write_bytes(context.folder / name, _bytes(content), option=RUN_FOLDER)
    folder = context.folder
    if is_writable(cfg.cache_dir):
        folder = labels_folder(cfg.cache_dir, {**labels.determined_by, "files": checksums})
        for name, content in labels.contents.items():
            write_bytes(folder / name, _bytes(content))
    context.results.update(labels.contents)
    usage = [note.replace("{path}", str(folder / name)) for name, note in labels.usage.items()]
    about = {
        "device": str(model.device),
        "model": describe_model(model),
        "labels": {
            "key": folder.name,
            "path": str(folder),
            "rules": labels.determined_by.get("rules", []),
        },
        "finding": list(labels.finding),
    }
    result = replace(result, notes=[*result.notes, *usage])
    result = save_run(context, cfg, result, skips, about)
    with context.stage("report"):
        write_label_report(context.folder)
    return result


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def entity_rows(
    examples: Sequence[Example],
    asked: Sequence[Asked],
    entities: pd.DataFrame,
    cfg: RunConfig,
) -> list[dict[str, Any]]:
    """Rows of entities.jsonl: known and unknown entities with a split and one of their prompts.

    Which prompt is a seeded choice that does not depend on the answers.
    """
    of_entity: dict[tuple[Any, ...], list[Asked]] = {}
    for one in asked:
        of_entity.setdefault((one[0].entity_type, one[0].entity), []).append(one)
    first: dict[tuple[Any, ...], Example] = {}
    for example in examples:
        first.setdefault((example.entity_type, example.entity), example)
    chosen = []
    for row in entities.to_dict("records"):
        kind = None if pd.isna(row["entity_type"]) else str(row["entity_type"])
        example = first[kind, row["entity"]]
        if row["group"] != DROPPED:
            prompts = of_entity[kind, row["entity"]]
            one = prompts[pick(cfg.seed, kind, row["entity"], n=len(prompts))]
            chosen.append((replace(example, group=row["group"], split=None), one, row))
    split = assign_splits([e for e, _, _ in chosen], cfg.dataset.split, cfg.dataset.seed)
    return [
        {
            "id": f"{e.entity_type}/{e.entity}",
            "text": e.text,
            "entity": e.entity,
            "entity_type": e.entity_type,
            "group": e.group,
            "split": e.split,
            "prompt": prompt,
            "answer": list(question.truths),
            "attribute": question.attribute,
            "n_known": int(row["n_known"]),
            "n_asked": int(row["n_asked"]),
        }
        for e, (_, (question, prompt, _), row) in zip(split, chosen, strict=True)
    ]


def answer_rows(
    asked: Sequence[Asked], table: pd.DataFrame, cfg: RunConfig, *, every: bool = False
) -> list[dict[str, Any]]:
    """Rows of answers.jsonl: questions, grouped by the label of their greedy answer (`GROUP_OF`).

    `text` is the prompt as the model reads it, chat template included, so that positions=last is
    where the answer begins. Where the chat template contains the entity's name too ("art" in
    "<|start|>"), `span` marks the mention in the question. Questions without a true answer are left
    out. There is one question per entity, a seeded choice, so that rows are independent
    observations; or `every` question. Neither the choice nor the split depends on the answers, so
    the same questions in other words give the same rows. `table` has a row per question, in the
    order of `asked`.
    """
    of_entity: dict[tuple[Any, ...], list[int]] = {}
    for number, (question, _, _) in enumerate(asked):
        if question.truths:
            of_entity.setdefault((question.entity_type, question.entity), []).append(number)
    chosen = [
        numbers if every else [numbers[pick(cfg.seed, *entity, n=len(numbers))]]
        for entity, numbers in of_entity.items()
    ]
    units = [
        Example(id=str(n), text="", entity=entity, entity_type=entity_type)
        for n, (entity_type, entity) in enumerate(of_entity)
    ]
    split = assign_splits(units, cfg.dataset.split, cfg.dataset.seed)
    judged = table.to_dict("records")
    rows = []
    for unit, numbers in zip(split, chosen, strict=True):
        for n in numbers:
            question, prompt, read = asked[n]
            mentions = _mentions(question, prompt, read)
            elsewhere = mentions and mentions != find_mentions(read.text, question.entity)
            rows.append(
                {
                    "id": f"{question.entity_type}/{question.entity}/{question.attribute or n}",
                    "text": read.text,
                    # A prompt of the data set need not name the entity.
                    "entity": question.entity if mentions else None,
                    **({"span": list(mentions[-1])} if elsewhere else {}),
                    "entity_type": question.entity_type,
                    "group": GROUP_OF[judged[n]["greedy_label"]],
                    "split": unit.split,
                    "prompt": prompt,
                    "answer": list(question.truths),
                    "attribute": question.attribute,
                    "greedy": judged[n]["greedy"],
                    "n_correct": int(judged[n]["n_correct"]),
                }
            )
    return rows


def _mentions(question: Question, prompt: str, read: Prompt) -> tuple[Span, ...]:
    """The entity's mentions in the prompt, without those in the chat template."""
    if read.message is None:
        return find_mentions(read.text, question.entity)
    located = [read.located(span) for span in find_mentions(prompt, question.entity)]
    spans = [span for span in located if span is not None]
    start = len(read.text) - len(question.beginning)
    if question.beginning and start >= read.message[1]:
        spans += [
            (start + a, start + b) for a, b in find_mentions(question.beginning, question.entity)
        ]
    return tuple(spans)
