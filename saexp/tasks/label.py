"""task=label: groups of entities or texts from what a model answers or continues."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from saexp import registry
from saexp.config import LabelConfig, RunConfig
from saexp.context import RunContext
from saexp.data import Example, Skip, skip_notes
from saexp.data.datasets import ASSETS, MEMORIZATION_COLUMNS, SHIPPED_MODELS, read_lines
from saexp.data.tables import read_rows
from saexp.data.tokenization import TokenizedText, format_prompts, tokenize, tokenize_prompts
from saexp.errors import DataError, counted
from saexp.interventions.outcomes import Refusal
from saexp.labeling import Question, entity_groups, label_answer, questions, repeats_question
from saexp.labeling.matchers import Rules
from saexp.models.forward import check_positions
from saexp.models.loading import LanguageModel
from saexp.pipeline.objects import language_model
from saexp.pipeline.run_folder import skips_table
from saexp.reports.label import (
    attribute_table,
    label_sentences,
    memorized_sentences,
    rule_records,
    rules_table,
)
from saexp.results import Result, model_words
from saexp.tasks.label_files import (
    GROUP_OF,
    Answers,
    Asked,
    LabelFiles,
    answer_rows,
    answers,
    cut_answers,
    entity_rows,
    json_lines,
    label_usage,
    memorization_usage,
    save_labels,
    templates,
    thresholds,
)

_LENGTHS, _SHIPPED_LENGTHS = (50, 50), (20, 18)
"""(prompt, continuation) in tokens: the default, and that of the shorter shipped passages."""


def memorized(
    cfg: RunConfig, context: RunContext, model: LanguageModel, options: LabelConfig
) -> Result:
    """Continue the first tokens of each text greedily, and compare with the text's next tokens.

    Texts are lines of `dataset.path` (a file or a folder of .txt files), else the shipped model's
    passages. The table `memorization`, and the CSV that dataset=memorization reads, have the number
    of leading tokens that agree (`matching_tokens`) and whether all do (`perfect_match`). No chat
    template is applied.
    """
    shipped = cfg.dataset.path is None and model.name in SHIPPED_MODELS
    n_prompt, n_next = _SHIPPED_LENGTHS if shipped else _LENGTHS
    n_prompt, n_next = options.prompt_tokens or n_prompt, options.continuation_tokens or n_next
    texts = _passages() if shipped else read_lines(cfg.dataset.path, "dataset.path")
    longest = max(n_prompt + n_next + 8, 512)
    tokens = tokenize(list(dict.fromkeys(texts)), model.tokenizer, longest, model.prepend_bos)
    prompts, skips = _memorization_prompts(tokens, n_prompt, n_next)
    if not prompts:
        raise DataError(
            f"{cfg.dataset.path or 'the shipped passages'}: no text has {n_prompt} + {n_next} "
            "tokens; type smaller task.prompt_tokens= and continuation_tokens="
        )
    longest = max(len(p.ids) for p, _, _ in prompts)
    check_positions(model, longest, n_next, "task.continuation_tokens")
    with context.stage("answer"):
        model_answers = answers(
            model,
            [p.ids for p, _, _ in prompts],
            cfg.cache_dir,
            n_samples=0,
            temperature=options.temperature,
            max_new_tokens=n_next,
            batch_tokens=options.batch_tokens,
            seed=cfg.seed,
        )
    rows = [
        _compared(prompt, start, truth, answer.greedy, model)
        for (prompt, start, truth), answer in zip(prompts, model_answers, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(MEMORIZATION_COLUMNS))
    notes = skip_notes(skips, len(tokens), "text")
    notes += _empty_notes(table)
    result = Result(metrics=_memorization_metrics(table), notes=notes)
    result.tables = {"memorization": table, "skips": skips_table(skips)}
    return save_labels(
        cfg,
        context,
        model,
        result,
        skips,
        LabelFiles(
            determined_by={
                "model": model.name,
                "fingerprint": model.fingerprint,
                "dtype": str(model.dtype),
                "device": model.device.type,
                "lengths": [n_prompt, n_next],
                "prompts": [p.ids for p, _, _ in prompts],
            },
            contents={"memorization.csv": _as_csv(table)},
            usage=memorization_usage(table),
            finding=memorized_sentences(model_words(model.name), table, n_prompt, n_next),
        ),
    )


def _empty_notes(table: pd.DataFrame) -> list[str]:
    """A note on texts after which the model ends at once."""
    n_empty = int((table["generated_continuation_text"] == "").sum())
    if not n_empty:
        return []
    verb = "is ended at once, so its" if n_empty == 1 else "are ended at once, so their"
    return [
        f"{counted(n_empty, 'text')} {verb} continuation is empty; dataset=memorization skips and "
        "counts such rows"
    ]


def _passages() -> list[str]:
    rows = read_rows(str(ASSETS / "tiny" / "memorization.csv"), "csv")
    return [r["input_text"] + r["generated_continuation_text"] for _, r in rows]


def _memorization_prompts(
    tokens: Sequence[TokenizedText], n_prompt: int, n_next: int
) -> tuple[list[tuple[TokenizedText, int, tuple[int, ...]]], list[Skip]]:
    """(the prompt's tokens, index of its first ordinary one, the tokens that should follow)."""
    prompts, skips = [], []
    for number, text in enumerate(tokens, 1):
        ordinary = [i for i, special in enumerate(text.special) if not special]
        if len(ordinary) < n_prompt + n_next:
            skips.append(Skip(str(number), f"fewer than {n_prompt + n_next} tokens"))
            continue
        first, end = ordinary[0], ordinary[n_prompt - 1] + 1
        if ordinary[: n_prompt + n_next] != list(range(first, first + n_prompt + n_next)):
            skips.append(Skip(str(number), "a special token within the text"))
            continue
        prompt = replace(
            text,
            text=text.text[: text.offsets[end - 1][1]],
            ids=text.ids[:end],
            offsets=text.offsets[:end],
            special=text.special[:end],
        )
        prompts.append((prompt, first, text.ids[end : end + n_next]))
    return prompts, skips


def _compared(
    prompt: TokenizedText,
    start: int,
    truth: Sequence[int],
    continuation: Sequence[int],
    model: LanguageModel,
) -> dict[str, Any]:
    """A row of the table `memorization`."""
    n_same = 0
    while n_same < min(len(continuation), len(truth)) and continuation[n_same] == truth[n_same]:
        n_same += 1
    plain = list(prompt.ids[start:])
    before, whole = (
        model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (plain, [*plain, *continuation])
    )
    after = (
        whole[len(before) :]
        if whole.startswith(before)
        else model.tokenizer.decode(list(continuation))
    )
    values = (prompt.text, after, n_same == len(truth), n_same)
    return dict(zip(MEMORIZATION_COLUMNS, values, strict=True))


def _memorization_metrics(table: pd.DataFrame) -> dict[str, float | int | None]:
    perfect = table["perfect_match"]
    return {
        "memorized/n_texts": len(table),
        "memorized/n_perfect": int(perfect.sum()),
        "memorized/n_none": int((table["matching_tokens"] == 0).sum()),
        "memorized/n_empty": int((table["generated_continuation_text"] == "").sum()),
        "memorized/perfect_fraction": float(perfect.mean()),
        "memorized/matching_tokens_mean": float(table["matching_tokens"].mean()),
    }


def _as_csv(table: pd.DataFrame) -> str:
    out = io.StringIO(newline="")
    # With "\n" as the line end, a carriage return in a text is not quoted and would end its row.
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(table.columns)
    writer.writerows(table.to_numpy().tolist())
    return out.getvalue()


def label(cfg: RunConfig, context: RunContext) -> Result:
    """Ask, answer, judge, group, split and save; for dataset=memorization see `memorized`."""
    options = cfg.task
    assert isinstance(options, LabelConfig)
    model = language_model(cfg, context.objects)
    if cfg.dataset.name == "memorization":
        return memorized(cfg, context, model, options)
    criteria, rules = thresholds(options), Rules().changed(options.rules)
    data = registry.build("dataset", cfg.dataset)
    examples = data.examples
    asked_questions, not_asked = questions(examples, templates(options))
    if not asked_questions:
        raise DataError(_nothing_asked(not_asked))
    notes = list(data.notes)
    notes += [f"{n} not asked: {reason}" for reason, n in sorted(not_asked.items())]
    asked_questions, n_refusals = _without_refusals(asked_questions)
    if n_refusals:
        notes.append(
            f"{n_refusals} questions whose answer in the data is a refusal have no right answer"
        )
    asked, ids, skips = _prompts(asked_questions, model, options, cfg.dataset.max_length)
    notes += skip_notes(skips, len(asked) + len(skips), "question")
    with context.stage("answer"):
        model_answers = answers(
            model,
            ids,
            cfg.cache_dir,
            n_samples=options.n_samples,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            batch_tokens=options.batch_tokens,
            seed=cfg.seed,
        )
    with context.stage("judge"):
        table = _judged(asked, model_answers, model, options, rules)
    entities = entity_groups(table, criteria)
    notes += _few_questions_notes(entities, options.min_known)
    notes += _repetition_notes(table)
    cut = cut_answers(model_answers, table, options, to_line=_to_line(model, options))
    rows = answer_rows(asked, table, cfg)
    metrics = _metrics(entities, table, rows) | cut.metrics
    result = Result(metrics=metrics, notes=notes + cut.notes)
    result.tables = {
        "labels": table,
        "entities": entities,
        "attributes": attribute_table(table, options.min_correct),
        "rules": rules_table(table, rules),
        "skips": skips_table(skips),
    }
    files = LabelFiles(
        determined_by={
            **_determined_by(cfg, model, options, asked, ids),
            "rules": rule_records(result.tables["rules"]),
        },
        contents={
            "entities.jsonl": json_lines(entity_rows(examples, asked, entities, cfg)),
            "answers.jsonl": json_lines(rows),
            "answers_all.jsonl": json_lines(answer_rows(asked, table, cfg, every=True)),
            "labels.parquet": table.to_parquet(index=False),
        },
        usage=label_usage(entities, rows, options),
        finding=[
            *label_sentences(model_words(model.name), entities, table),
            *_answer_sentences(rows),
        ],
    )
    return save_labels(cfg, context, model, result, skips, files)


def _few_questions_notes(entities: pd.DataFrame, min_known: int) -> list[str]:
    """A note on entities with fewer questions than are needed to be known."""
    few = int((entities["n_asked"] < min_known).sum())
    if not few:
        return []
    return [
        f"{few} entities were asked fewer than min_known={min_known} questions; such an entity is "
        "known where the model knows all that it was asked"
    ]


def _repetition_notes(table: pd.DataFrame) -> list[str]:
    """A note on questions that contain their own true answer."""
    some = table[table["answer_in_question"]]
    if some.empty:
        return []
    first = some.iloc[0]
    n_right = int((some["greedy_label"] == "correct").sum())
    return [
        f"{len(some)} questions contain their own true answer (the {first['attribute']} of "
        f"{first['entity']}): repeating it is not enough, an answer must state it; {n_right} "
        "greedy answers do"
    ]


def _answer_sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on answers.jsonl; none where no question has a true answer."""
    if not rows:
        return []
    n = Counter(row["group"] for row in rows)
    return [
        f"Of one question per entity that has an answer, {n['correct']} are answered right, "
        f"{n['incorrect']} wrong, {n['refused']} not at all (answers.jsonl)."
    ]


def _without_refusals(asked: Sequence[Question]) -> tuple[list[Question], int]:
    """(questions without true answers that are refusals, number of questions changed).

    A refusal never counts as knowledge.
    """
    refusal, result = Refusal(), []
    for question in asked:
        entity = _entity_example(question)
        truths = tuple(t for t in question.truths if not refusal.score(t, entity))
        result.append(replace(question, truths=truths))
    return result, sum(a.truths != b.truths for a, b in zip(asked, result, strict=True))


def _entity_example(question: Question) -> Example:
    return Example(id="", text="", entity=question.entity)


def _prompts(
    asked_questions: Sequence[Question], model: LanguageModel, options: LabelConfig, max_length: int
) -> tuple[list[Asked], list[tuple[int, ...]], list[Skip]]:
    """(prompts in the configured form, their token ids, skips for prompts that are too long).

    The form `question` is the question alone. `begun` lets the answer begin as the template says:
    after the chat template, or after the question for a model without one. `auto` is `question` for
    chat models, else `begun`. The data set's own prompts (`own`) are not changed. Each prompt is
    preceded by the option `before`, and put into the chat template where there is one.
    """
    chat = model.cfg.chat
    form = options.form
    if form == "auto":
        form = "question" if chat else "begun"
    if form == "own" and any(q.beginning for q in asked_questions):
        raise DataError(
            "task.form=own, but the data set has attributes to ask for; type form=question"
        )
    texts, begun = [], []
    for question in asked_questions:
        begin = question.beginning if form == "begun" else ""
        text = f"{question.text} {begin}".rstrip() if begin and not chat else question.text
        texts.append(options.before + text)
        begun.append(begin)
    prompts = [
        replace(prompt, text=prompt.text + begin) if chat else prompt
        for prompt, begin in zip(format_prompts(model, texts), begun, strict=True)
    ]
    tokens = tokenize_prompts(model, prompts, max_length)
    prepared: list[Asked] = [
        (replace(question, beginning=begin), text, prompt)
        for question, begin, text, prompt in zip(
            asked_questions, begun, texts, prompts, strict=True
        )
    ]
    fits = [not t.truncated for t in tokens]
    skips = [
        Skip(f"{q.entity_type}/{q.entity}/{q.attribute}", "prompt longer than dataset.max_length")
        for (q, _, _), fit in zip(prepared, fits, strict=True)
        if not fit
    ]
    asked = [a for a, fit in zip(prepared, fits, strict=True) if fit]
    if not asked:
        raise DataError(
            f"nothing can be asked: every prompt is longer than dataset.max_length={max_length}"
        )
    return asked, [t.ids for t, fit in zip(tokens, fits, strict=True) if fit], skips


def _nothing_asked(not_asked: Mapping[str, int]) -> str:
    """The error for a data set without questions, with the most frequent reason."""
    if not not_asked:
        return "nothing can be asked: the data set has no entities with a known attribute"
    reason = max(not_asked, key=lambda r: (not_asked[r], r.startswith("no template")))
    more = len(not_asked) - 1
    return f"nothing can be asked: {reason}" + (f" (and {more} more)" if more else "")


def _to_line(model: LanguageModel, options: LabelConfig) -> bool:
    """Whether answers are judged up to their first line end; by default for a base model."""
    return not model.cfg.chat if options.cut_at_line is None else options.cut_at_line


def _judged(
    asked: Sequence[Asked],
    model_answers: Sequence[Answers],
    model: LanguageModel,
    options: LabelConfig,
    rules: Any,
) -> pd.DataFrame:
    """One row per question: texts and labels of its answers, and `n_correct`.

    Without samples (n_samples=0) a correct greedy answer counts as `min_correct` correct ones.
    """
    refusal = Refusal()
    to_line = _to_line(model, options)
    rows = []
    for (question, text, _), answer in zip(asked, model_answers, strict=True):
        entity = _entity_example(question)
        texts = [
            model.tokenizer.decode(list(ids), skip_special_tokens=True)
            for ids in (answer.greedy, *answer.samples)
        ]
        judged = [t.strip().partition("\n")[0] if to_line else t for t in texts]
        labels = [
            label_answer(t, question, rules, lambda x, e=entity: bool(refusal.score(x, e)))
            for t in judged
        ]
        n_correct = labels[1:].count("correct")
        if not answer.samples:
            n_correct = options.min_correct if labels[0] == "correct" else 0
        rows.append(
            {
                "entity_type": question.entity_type,
                "entity": question.entity,
                "attribute": question.attribute,
                "given_group": question.given_group,
                "prompt": text,
                "truths": list(question.truths),
                "greedy": texts[0],
                "greedy_label": labels[0],
                "samples": texts[1:],
                "sample_labels": labels[1:],
                "answer_in_question": repeats_question(question),
                "n_correct": n_correct,
                "n_refusal": labels[1:].count("refusal"),
                "known": n_correct >= options.min_correct,
            }
        )
    table = pd.DataFrame(rows)
    for column in ("entity_type", "attribute", "given_group"):
        table[column] = table[column].astype("string")
    return table


def _metrics(
    entities: pd.DataFrame, table: pd.DataFrame, rows: Sequence[dict[str, Any]]
) -> dict[str, float | int | None]:
    metrics: dict[str, float | int | None] = {
        "label/n_entities": len(entities),
        "label/n_questions": len(table),
    }
    for group in ("known", "unknown", "dropped"):
        of_group = entities[entities["group"] == group]
        metrics[f"label/n_{group}"] = len(of_group)
        for kind, n in of_group["entity_type"].value_counts().items():
            metrics[f"label/n_{group}_{kind}"] = int(n)
    for group in GROUP_OF.values():
        metrics[f"label/n_{group}"] = sum(row["group"] == group for row in rows)
    with_truth = table[table["truths"].map(len) > 0]
    sampled = [x for labels in with_truth["sample_labels"] for x in labels]
    metrics["label/greedy_accuracy"] = (
        float((with_truth["greedy_label"] == "correct").mean()) if len(with_truth) else None
    )
    metrics["label/sample_accuracy"] = sampled.count("correct") / len(sampled) if sampled else None
    metrics["label/n_answer_in_question"] = int(table["answer_in_question"].sum())
    metrics["label/refusal_rate"] = float((table["greedy_label"] == "refusal").mean())
    return metrics


def _determined_by(
    cfg: RunConfig,
    model: LanguageModel,
    options: LabelConfig,
    asked: Sequence[Asked],
    ids: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """All that the labels depend on."""
    content = [(repr(q), text, i) for (q, text, _), i in zip(asked, ids, strict=True)]
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "tokenizer": model.tokenizer_fingerprint,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "questions": hashlib.sha256(repr(content).encode()).hexdigest(),
        "options": options.settings,
        "split": cfg.dataset.split,
        "seeds": [cfg.seed, cfg.dataset.seed],
        "template": cfg.dataset.template,
    }
