"""Answers of a model to prompts, and the label files that task=label writes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import LabelConfig, RunConfig
from saexp.context import RunContext
from saexp.data.examples import Example, Skip, Span, assign_splits, find_mentions
from saexp.data.prompts import Prompt
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, is_writable, write_bytes, write_text
from saexp.interventions.batching import generate
from saexp.interventions.operations import Row, Sampling
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.labeling.matchers import canonical, type_key
from saexp.labeling.questions import DROPPED, TEMPLATES, Question, Templates, Thresholds, pick
from saexp.models.loading import LanguageModel
from saexp.pipeline.objects import about_model
from saexp.pipeline.run_folder import clean_metrics, write_provenance, write_result
from saexp.reports.label import write_label_report
from saexp.results import TaskResult

_SEEDS_APART = 100_000
"""Samples of two seeds share none."""


def thresholds(task: LabelConfig) -> Thresholds:
    """When an attribute and an entity count as known. Raises ConfigError."""
    if 0 < task.n_samples < task.min_correct:
        raise ConfigError(
            f"task.min_correct={task.min_correct} is more than task.n_samples={task.n_samples}, so "
            "no attribute could be known; type a smaller task.min_correct"
        )
    return Thresholds(task.min_correct, task.min_known, task.max_unknown)


def templates(task: LabelConfig) -> Templates:
    """The default templates with those of the config added. Raises ConfigError."""
    merged = {entity_type: dict(kinds) for entity_type, kinds in TEMPLATES.items()}
    for entity_type, kinds in task.templates.items():
        for attribute, template in kinds.items():
            key = f"task.templates.{entity_type}.{attribute}"
            texts = [template] if isinstance(template, str) else template
            if not isinstance(texts, Sequence) or not 1 <= len(texts) <= 2:
                raise ConfigError(
                    f"{key}: write a question, or [question, beginning of the answer]"
                )
            if not all("{entity}" in str(text) for text in texts):
                raise ConfigError(f"{key}: every text needs {{entity}} in it")
            question, beginning = (*map(str, texts), "")[:2]
            name = canonical(attribute, entity_type)
            merged.setdefault(type_key(entity_type), {})[name] = (question, beginning)
    return merged


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
            label="answering",
            key="task.max_new_tokens",
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


Asked = tuple[Question, str, Prompt]
"""(question, the prompt as text, the prompt as the model reads it)."""

GROUP_OF = {"correct": "correct", "error": "incorrect", "refusal": "refused"}
"""Label of a greedy answer -> group of its row in answers.jsonl."""


def save_labels(
    cfg: RunConfig,
    context: RunContext,
    model: LanguageModel,
    result: TaskResult,
    skips: list[Skip],
    *,
    determined_by: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    use: Mapping[str, str],
    finding: list[str],
) -> TaskResult:
    """Files in the run's folder and in cache_dir/labels/<key>/; metrics, tables, page.

    The key is made of `determined_by` and of what is in the files: later runs read them by this
    path, so that other content never takes its place. `use` says per file how it is read;
    `{path}` in it is the file's path in the cache, or in the run's folder where the cache cannot be
    written.
    """
    content = {name: sha256(_bytes(made)).hexdigest() for name, made in files.items()}
    for name, made in files.items():
        write_bytes(context.folder / name, _bytes(made), option=RUN_FOLDER)
    folder = context.folder
    if is_writable(cfg.cache_dir):
        folder = labels_folder(cfg.cache_dir, {**determined_by, "files": content})
        for name, made in files.items():
            write_bytes(folder / name, _bytes(made))
    context.results.update(files)
    result.notes += [told.replace("{path}", str(folder / name)) for name, told in use.items()]
    result.metrics = clean_metrics(result.metrics, result.notes)
    write_result(context, result)
    write_provenance(
        context,
        cfg,
        result.notes,
        skips,
        device=str(model.device),
        model=about_model(model),
        labels={"key": folder.name, "path": str(folder), "rules": determined_by.get("rules", [])},
        finding=finding,
    )
    with context.stage("report"):
        write_label_report(context.folder)
    return result


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
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
            mine = of_entity[kind, row["entity"]]
            one = mine[pick(cfg.seed, kind, row["entity"], n=len(mine))]
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
    """Rows of answers.jsonl: questions by what the greedy answer to them was (`GROUP_OF`).

    `text` is the prompt as the model reads it, chat template included, so that positions=last is
    where the answer begins; a `span` is written where the chat template holds the entity's name
    too ("art" in "<|start|>"), so that the mention in the question is read. Questions without a
    true answer are left out. One question per entity, a seeded choice, so that a row is an
    independent observation; or `every` question. Neither this nor the split depends on the answers,
    so the same questions in other words give the same rows.
    `table` has a row per question, in the order of `asked`.
    """
    of_entity: dict[tuple[Any, ...], list[int]] = {}
    for number, (question, _, _) in enumerate(asked):
        if question.truths:
            of_entity.setdefault((question.entity_type, question.entity), []).append(number)
    chosen = [
        mine if every else [mine[pick(cfg.seed, *who, n=len(mine))]]
        for who, mine in of_entity.items()
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
                    # An own prompt need not name the entity.
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
    """The entity's mentions in what the model reads, without those in the chat template."""
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
