"""task=label dataset=memorization: texts that a model continues verbatim."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from saexp.config import RunConfig
from saexp.context import RunContext
from saexp.data.datasets import ASSETS, MEMORIZATION_COLUMNS, SHIPPED_MODELS, read_lines
from saexp.data.examples import Skip, skip_notes
from saexp.data.tables import read_rows
from saexp.data.tokenization import TokenizedText, tokenize
from saexp.errors import DataError
from saexp.models.forward import check_positions
from saexp.models.loading import LanguageModel
from saexp.pipeline.saving import skips_table
from saexp.reports.label import memorized_sentences
from saexp.results import TaskResult
from saexp.tasks.label_files import Options, answers, save_labels
from saexp.wording import counted

_LENGTHS, _SHIPPED_LENGTHS = (50, 50), (20, 18)
"""(prompt, continuation) in tokens, as in the study; and what the shipped passages allow."""


def memorized(
    cfg: RunConfig, context: RunContext, model: LanguageModel, options: Options
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
    prompts, skips = _prompts(tokens, n_prompt, n_next)
    if not prompts:
        raise DataError(
            f"{cfg.dataset.path or 'the shipped passages'}: no text has {n_prompt} + {n_next} "
            "tokens; type smaller task.options.prompt_tokens= and continuation_tokens="
        )
    longest = max(len(p.ids) for p, _, _ in prompts)
    check_positions(model, longest, n_next, "task.options.continuation_tokens")
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
    result = TaskResult(metrics=_metrics(table), notes=notes)
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


def _prompts(
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


def _metrics(table: pd.DataFrame) -> dict[str, float | int | None]:
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
