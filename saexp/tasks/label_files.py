"""Options of task=label, answers of a model to prompts, the files with their labels, and what
these can be used for."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from saexp.config import LabelConfig, RunConfig
from saexp.context import RunContext
from saexp.data import Example, Skip, Span, assign_splits, find_mentions
from saexp.data.tokenization import Prompt
from saexp.errors import ConfigError, counted
from saexp.files import RUN_FOLDER, is_writable, write_bytes, write_text
from saexp.interventions.cached_generation import generate
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.interventions.stream_edits import Row, Sampling
from saexp.labeling import DROPPED, TEMPLATES, Question, Templates, Thresholds, pick
from saexp.labeling.matchers import canonical, type_key
from saexp.models.loading import LanguageModel
from saexp.pipeline.objects import describe_model
from saexp.pipeline.run_folder import save_run
from saexp.reports.label import write_label_report
from saexp.results import Result

_SEEDS_APART = 100_000
"""Distance of the seeds of two runs, so that they share no sample."""


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
            label="answering",
            key="task.max_new_tokens",
        )
    finally:
        cache.close()
    n = len(samplings)
    per_prompt = [continuations[i : i + n] for i in range(0, len(continuations), n)]
    return [Answers(tuple(some[0]), tuple(map(tuple, some[1:]))) for some in per_prompt]


def cut_answers(
    model_answers: Sequence[Answers], table: pd.DataFrame, options: LabelConfig, *, to_line: bool
) -> Result:
    """Metrics on answers that reached `task.max_new_tokens`, and a note where greedy ones did.

    `to_line`: answers are judged up to their first line end; one that has it is not cut there.
    `table` has a row per question, in the order of the answers. A cut answer counts as incorrect if
    the true answer would only have followed.
    """

    def is_cut(ids: Sequence[int], text: str) -> bool:
        return len(ids) == options.max_new_tokens and not (to_line and "\n" in text.lstrip())

    greedy = [is_cut(a.greedy, t) for a, t in zip(model_answers, table["greedy"], strict=True)]
    samples = [
        is_cut(ids, text)
        for answer, texts in zip(model_answers, table["samples"], strict=True)
        for ids, text in zip(answer.samples, texts, strict=True)
    ]
    n, n_incorrect = sum(greedy), int((table["greedy_label"][greedy] == "error").sum())
    metrics: dict[str, float | int | None] = {
        "label/greedy_cut_fraction": n / len(greedy),
        "label/sample_cut_fraction": sum(samples) / len(samples) if samples else None,
    }
    if not n:
        return Result(metrics=metrics)
    note = (
        f"{n} of {counted(len(greedy), 'greedy answer')} reached task.max_new_tokens="
        f"{options.max_new_tokens} and were judged as far as they go; {n_incorrect} of them count "
        "as incorrect: a larger number may change that"
    )
    return Result(metrics=metrics, notes=[note])


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
    result: Result,
    skips: Sequence[Skip],
    labels: LabelFiles,
) -> Result:
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
    result = replace(result, notes=[*model.notes, *result.notes, *usage])
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


MIN_OF_GROUP = 4
"""Members of each group that a contrast with train and test split needs at least."""


def label_usage(
    entities: pd.DataFrame, rows: Sequence[Mapping[str, Any]], options: LabelConfig
) -> dict[str, str]:
    """File -> note with the command that uses it, or why it allows no contrast; `{path}` stands for
    its path."""
    groups = entities["group"].value_counts()
    known, unknown = (int(groups.get(g, 0)) for g in ("known", "unknown"))
    of_entities = """use them with: dataset=jsonl 'dataset.path="{path}"'"""
    if min(known, unknown) < MIN_OF_GROUP:
        of_entities = (
            f"{counted(known, 'entity', 'entities')} known and {unknown} unknown are too few for a "
            f"contrast ({MIN_OF_GROUP} of each are needed): {_advice(known, unknown, options)}; "
            "the labels are in {path}"
        )
    n = Counter(row["group"] for row in rows)
    of_answers = (
        "right against wrong answers, at the prompt's end: "
        """experiment=uncertainty 'dataset.path="{path}"'"""
    )
    if min(n["correct"], n["incorrect"]) < MIN_OF_GROUP:
        of_answers = (
            f"{counted(n['correct'], 'right answer')} and {n['incorrect']} wrong ones are too few "
            f"for experiment=uncertainty ({MIN_OF_GROUP} of each are needed); they are in {{path}}"
        )
    return {"entities.jsonl": of_entities, "answers.jsonl": of_answers}


def _advice(known: int, unknown: int, options: LabelConfig) -> str:
    if known <= unknown:
        return (
            f"lower task.min_correct={options.min_correct} or task.min_known={options.min_known}, "
            "or name entities that the model knows better (dataset.path=)"
        )
    return (
        f"raise task.max_unknown={options.max_unknown}, or name rarer or invented entities "
        "(dataset.path=)"
    )


def memorization_usage(table: pd.DataFrame) -> dict[str, str]:
    """As `label_usage`, for texts continued word for word."""
    n_perfect = int(table["perfect_match"].sum())
    n_none = int((table["matching_tokens"] == 0).sum())
    if min(n_perfect, n_none) >= MIN_OF_GROUP:
        note = """use it with: dataset=memorization 'dataset.path="{path}"'"""
        return {"memorization.csv": note}
    advice = (
        "type a smaller task.continuation_tokens=, or give texts that the model has seen often"
        if n_perfect < MIN_OF_GROUP
        else "add texts that the model cannot have seen"
    )
    return {
        "memorization.csv": f"{counted(n_perfect, 'text')} continued exactly and {n_none} without "
        f"a matching token are too few for dataset=memorization ({MIN_OF_GROUP} of each are "
        f"needed): {advice}; the continuations are in {{path}}"
    }
