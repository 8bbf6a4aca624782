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
from saexp.data.datasets import ASSETS, MEMORIZATION_COLUMNS, SHIPPED_MODELS, read_lines
from saexp.data.examples import Example, Skip, skip_notes
from saexp.data.prompts import as_read, tokenize_prompts
from saexp.data.tables import read_rows
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.errors import DataError
from saexp.interventions.outcomes import Refusal
from saexp.labeling.matchers import Rules
from saexp.labeling.questions import (
    Question,
    entity_groups,
    label_answer,
    questions,
    repeats_question,
)
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
from saexp.results import TaskResult
from saexp.tasks.label_files import (
    GROUP_OF,
    Answers,
    Asked,
    answer_rows,
    answers,
    entity_rows,
    json_lines,
    save_labels,
    templates,
    thresholds,
)
from saexp.wording import counted

_LENGTHS, _SHIPPED_LENGTHS = (50, 50), (20, 18)
"""(prompt, continuation) in tokens, as in the study; and what the shipped passages allow."""


def memorized(
    cfg: RunConfig, context: RunContext, model: LanguageModel, options: LabelConfig
) -> TaskResult:
    """Prompt with a text's first tokens, go on greedily, compare with the text's next tokens.

    Texts are lines of `dataset.path` (a file or a folder of .txt files), else the shipped model's
    passages. Table `memorization`, and the CSV that dataset=memorization reads, in the run's folder
    and in cache_dir/labels/<key>/: `matching_tokens` leading tokens agree, `perfect_match` where
    all do. Nothing is put in a chat template.
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
        said = answers(
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
        for (prompt, start, truth), answer in zip(prompts, said, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(MEMORIZATION_COLUMNS))
    notes = skip_notes(skips, len(tokens), "text")
    n_empty = int((table["generated_continuation_text"] == "").sum())
    if n_empty:
        verb = "is ended at once, so its" if n_empty == 1 else "are ended at once, so their"
        notes.append(
            f"{counted(n_empty, 'text')} {verb} continuation is empty; "
            "dataset=memorization skips and counts such rows"
        )
    result = TaskResult(metrics=_memorization_metrics(table), notes=notes)
    result.tables = {"memorization": table, "skips": skips_table(skips)}
    return save_labels(
        cfg,
        context,
        model,
        result,
        skips,
        determined_by={
            "model": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "lengths": [n_prompt, n_next],
            "prompts": [p.ids for p, _, _ in prompts],
        },
        files={"memorization.csv": _as_csv(table)},
        use={
            "memorization.csv": "use it with: dataset=memorization "
            """'dataset.path="{path}"'"""
        },
        finding=memorized_sentences(model.name, table, n_prompt, n_next),
    )


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
    made: Sequence[int],
    model: LanguageModel,
) -> dict[str, Any]:
    same = 0
    while same < min(len(made), len(truth)) and made[same] == truth[same]:
        same += 1
    plain = list(prompt.ids[start:])
    before, whole = (
        model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (plain, [*plain, *made])
    )
    after = whole[len(before) :] if whole.startswith(before) else model.tokenizer.decode(list(made))
    return dict(
        zip(MEMORIZATION_COLUMNS, (prompt.text, after, same == len(truth), same), strict=True)
    )


def _memorization_metrics(table: pd.DataFrame) -> dict[str, float | int | None]:
    perfect = table["perfect_match"]
    return {
        "memorized/n_texts": len(table),
        "memorized/n_perfect": int(perfect.sum()),
        "memorized/n_none": int((table["matching_tokens"] == 0).sum()),
        "memorized/n_empty": int((table["generated_continuation_text"] == "").sum()),
        "memorized/perfect_share": float(perfect.mean()),
        "memorized/matching_tokens_mean": float(table["matching_tokens"].mean()),
    }


def _as_csv(table: pd.DataFrame) -> str:
    out = io.StringIO(newline="")
    # With "\n" for an end, a carriage return in a text is not quoted and would end its row.
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(table.columns)
    writer.writerows(table.to_numpy().tolist())
    return out.getvalue()


def label(cfg: RunConfig, context: RunContext) -> TaskResult:
    """Ask, answer, judge, group, split, save; with dataset=memorization see `memorized`."""
    options = cfg.task
    assert isinstance(options, LabelConfig)
    model = language_model(cfg)
    if cfg.dataset.name == "memorization":
        return memorized(cfg, context, model, options)
    criteria, rules = thresholds(options), Rules().changed(options.rules)
    data = registry.build("dataset", cfg.dataset)
    examples = data.examples
    made, not_asked = questions(examples, templates(options))
    if not made:
        raise DataError(_nothing_asked(not_asked))
    notes = list(data.notes)
    notes += [f"{n} not asked: {reason}" for reason, n in sorted(not_asked.items())]
    made = _without_refusals(made, notes)
    asked, ids, skips = _prompts(made, model, options, cfg.dataset.max_length)
    notes += skip_notes(skips, len(asked) + len(skips), "question")
    with context.stage("answer"):
        said = answers(
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
        table = _judged(asked, said, model, options, rules)
    entities = entity_groups(table, criteria)
    few = int((entities["n_asked"] < options.min_known).sum())
    if few:
        notes.append(
            f"{few} entities were asked fewer than min_known={options.min_known} questions; such "
            "an entity is known where all it was asked is"
        )
    notes += _repetition_notes(table)
    said_of = answer_rows(asked, table, cfg)
    result = TaskResult(metrics=_metrics(entities, table, said_of), notes=notes)
    result.tables = {
        "labels": table,
        "entities": entities,
        "attributes": attribute_table(table, options.min_correct),
        "rules": rules_table(table, rules),
        "skips": skips_table(skips),
    }
    return save_labels(
        cfg,
        context,
        model,
        result,
        skips,
        determined_by=_determined_by(cfg, model, options, asked, ids)
        | {"rules": rule_records(result.tables["rules"])},
        files={
            "entities.jsonl": json_lines(entity_rows(examples, asked, entities, cfg)),
            "answers.jsonl": json_lines(said_of),
            "answers_all.jsonl": json_lines(answer_rows(asked, table, cfg, every=True)),
            "labels.parquet": table.to_parquet(index=False),
        },
        use={
            "entities.jsonl": """use them with: dataset=jsonl 'dataset.path="{path}"'""",
            "answers.jsonl": "right against wrong answers, at the prompt's end: "
            """experiment=uncertainty 'dataset.path="{path}"'""",
        },
        finding=[*label_sentences(model.name, entities, table), *_answers_told(said_of)],
    )


def _repetition_notes(table: pd.DataFrame) -> list[str]:
    """How many true answers stand in their question, and how many answers state one of them."""
    some = table[table["answer_in_question"]]
    if some.empty:
        return []
    first = some.iloc[0]
    n_right = int((some["greedy_label"] == "correct").sum())
    return [
        f"{len(some)} questions hold their own true answer (the {first['attribute']} of "
        f"{first['entity']}): to repeat it is not enough, an answer must state it; {n_right} "
        "greedy answers do"
    ]


def _answers_told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What answers.jsonl holds; nothing where no question has a true answer."""
    if not rows:
        return []
    n = Counter(row["group"] for row in rows)
    return [
        f"Of one question per entity that has an answer, {n['correct']} are answered right, "
        f"{n['incorrect']} wrong, {n['refused']} not at all (answers.jsonl)."
    ]


def _without_refusals(made: list[Question], notes: list[str]) -> list[Question]:
    """Questions without true answers that are refusals: not to know is never known."""
    refusal, kept, n = Refusal(), [], 0
    for question in made:
        truths = tuple(t for t in question.truths if not refusal.score(t, _named(question)))
        n += truths != question.truths
        kept.append(replace(question, truths=truths))
    if n:
        notes.append(f"{n} questions whose answer in the data is a refusal have no right answer")
    return kept


def _named(question: Question) -> Example:
    return Example(id="", text="", entity=question.entity)


def _prompts(
    made: Sequence[Question], model: LanguageModel, options: LabelConfig, max_length: int
) -> tuple[list[Asked], list[tuple[int, ...]], list[Skip]]:
    """Prompts in the form asked for, and their tokens; too long ones are skips.

    `question` is the question alone. `begun` lets the model's own answer begin as the template
    says: after the chat template, or after the question for a model that is not a chat model.
    `auto` is `question` in chat, else `begun`. A data set's own prompts stay as they are, in the
    chat template where there is one. Before each stands the option `before`.
    """
    chat = model.cfg.chat
    form = options.form
    if form == "auto":
        form = "question" if chat else "begun"
    if form == "own" and any(q.beginning for q in made):
        raise DataError(
            "task.form=own, but the data set has attributes to ask for; type form=question"
        )
    texts, begun = [], []
    for question in made:
        begin = question.beginning if form == "begun" else ""
        text = f"{question.text} {begin}".rstrip() if begin and not chat else question.text
        texts.append(options.before + text)
        begun.append(begin)
    prompts = [
        replace(prompt, text=prompt.text + begin) if chat else prompt
        for prompt, begin in zip(as_read(model, texts), begun, strict=True)
    ]
    tokens = tokenize_prompts(model, prompts, max_length)
    prepared: list[Asked] = [
        (replace(question, beginning=begin), text, prompt)
        for question, begin, text, prompt in zip(made, begun, texts, prompts, strict=True)
    ]
    fits = [not t.truncated for t in tokens]
    skips = [
        Skip(f"{q.entity_type}/{q.entity}/{q.attribute}", "prompt longer than dataset.max_length")
        for (q, _, _), good in zip(prepared, fits, strict=True)
        if not good
    ]
    asked = [a for a, good in zip(prepared, fits, strict=True) if good]
    if not asked:
        raise DataError(
            f"nothing can be asked: every prompt is longer than dataset.max_length={max_length}"
        )
    return asked, [t.ids for t, good in zip(tokens, fits, strict=True) if good], skips


def _nothing_asked(not_asked: Mapping[str, int]) -> str:
    """Why there is no question, for the most frequent reason."""
    if not not_asked:
        return "nothing can be asked: the data set has no entities with a known attribute"
    reason = max(not_asked, key=lambda r: (not_asked[r], r.startswith("no template")))
    more = len(not_asked) - 1
    return f"nothing can be asked: {reason}" + (f" (and {more} more)" if more else "")


def _judged(
    asked: Sequence[Asked],
    said: Sequence[Answers],
    model: LanguageModel,
    options: LabelConfig,
    rules: Any,
) -> pd.DataFrame:
    """One row per question: texts and labels of its answers, and `n_correct`.

    Without samples (n_samples=0) a right greedy answer counts as `min_correct` right ones.
    """
    refusal = Refusal()
    cut = not model.cfg.chat if options.cut_at_line is None else options.cut_at_line
    rows = []
    for (question, text, _), answer in zip(asked, said, strict=True):
        named = _named(question)
        texts = [
            model.tokenizer.decode(list(ids), skip_special_tokens=True)
            for ids in (answer.greedy, *answer.samples)
        ]
        heard = [t.strip().partition("\n")[0] if cut else t for t in texts]
        found = [
            label_answer(t, question, rules, lambda x, e=named: bool(refusal.score(x, e)))
            for t in heard
        ]
        n_correct = found[1:].count("correct")
        if not answer.samples:
            n_correct = options.min_correct if found[0] == "correct" else 0
        rows.append(
            {
                "entity_type": question.entity_type,
                "entity": question.entity,
                "attribute": question.attribute,
                "given_group": question.given_group,
                "prompt": text,
                "truths": list(question.truths),
                "greedy": texts[0],
                "greedy_label": found[0],
                "samples": texts[1:],
                "sample_labels": found[1:],
                "answer_in_question": repeats_question(question),
                "n_correct": n_correct,
                "n_refusal": found[1:].count("refusal"),
                "known": n_correct >= options.min_correct,
            }
        )
    table = pd.DataFrame(rows)
    for column in ("entity_type", "attribute", "given_group"):
        table[column] = table[column].astype("string")
    return table


def _metrics(
    entities: pd.DataFrame, table: pd.DataFrame, said_of: Sequence[dict[str, Any]]
) -> dict[str, float | int | None]:
    metrics: dict[str, float | int | None] = {
        "label/n_entities": len(entities),
        "label/n_questions": len(table),
    }
    for group in ("known", "unknown", "dropped"):
        mine = entities[entities["group"] == group]
        metrics[f"label/n_{group}"] = len(mine)
        for kind, n in mine["entity_type"].value_counts().items():
            metrics[f"label/n_{group}_{kind}"] = int(n)
    for group in GROUP_OF.values():
        metrics[f"label/n_{group}"] = sum(row["group"] == group for row in said_of)
    real = table[table["truths"].map(len) > 0]
    sampled = [x for labels in real["sample_labels"] for x in labels]
    metrics["label/greedy_accuracy"] = (
        float((real["greedy_label"] == "correct").mean()) if len(real) else None
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
    """What fixes the labels."""
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
