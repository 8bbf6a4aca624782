"""Rows of JSONL and CSV files, with the line each came from, turned into examples."""

import csv as csv_module
import difflib
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saexp.config.components import COLUMNS as FIELDS
from saexp.data.examples import Example, Span
from saexp.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_NEAR = 0.8
"""Likeness from which a column's name counts as misspelt: 1 for the same letters."""

Row = tuple[str, dict[str, Any]]
"""(file:line, columns)."""


def read_rows(path: str | None, kind: str) -> list[Row]:
    """All rows of a file. Raises DataError naming file and line."""
    if not path:
        raise ConfigError(f"dataset={kind} needs a file: type dataset.path=FILE")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"dataset.path={path}: no such file")
    try:
        rows = list(_json_lines(file) if kind == "jsonl" else _csv_lines(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not rows:
        raise DataError(f"{path}: is empty; it needs at least one row with a 'text'")
    return rows


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: is no JSON ({error.msg}, column {error.colno})"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f'{where}: a row must be an object such as {{"text": "…"}}')
            if "\\ud" in line.lower():
                _check_characters(where, row)
            yield where, row


def _check_characters(where: str, row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = repr(str(error.object)[error.start])
        raise DataError(f"{where}: holds half a character ({half}); remove it") from error


def _csv_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv_module.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: has another number of fields than the header's "
                        f"{len(reader.fieldnames or [])}; quote texts that hold commas"
                    )
                yield where, {k: v for k, v in row.items() if v != ""}
        except csv_module.Error as error:
            # DictReader counts a line only once it was read.
            line = reader.reader.line_num
            raise DataError(f"{file}:{line}: is no CSV ({error})") from error


def rule(text: str) -> tuple[str, Any]:
    """`column == value` -> (column, test). Raises ConfigError; nothing is evaluated as code.

    Numbers are compared as numbers, else text without regard to case. The test raises ValueError
    where a column that is no number would have to be smaller or larger than one.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(==|!=|>=|<=|>|<)\s*(\S.*?)\s*", text)
    if not match:
        raise ConfigError(
            f"dataset.group_rule={text} is no rule; type e.g. 'matching_tokens == 0' "
            "(column, one of == != >= <= > <, value)"
        )
    column, sign, value = match[1], match[2], match[3].strip("'\"")

    def test(found: Any) -> bool:
        left, right = _number(found), _number(value)
        if left is not None and right is not None:
            return bool(_OPERATORS[sign](left, right))
        if right is not None and sign not in ("==", "!="):
            raise ValueError(f"'{found}' is no number")
        return bool(_OPERATORS[sign](str(found).lower(), value.lower()))

    return column, test


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _string(where: str, row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"{where}: '{name}' must be a string, not {type(value).__name__}")
    return str(value)


def _span(where: str, value: Any, text: str) -> Span:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise DataError(f"{where}: 'span' must be [start, end] in characters, such as [4, 11]")
    start, end = value
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: span [{start}, {end}] is outside its text of {len(text)} characters"
        )
    return start, end


def to_example(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """One checked example. Raises DataError naming file and line."""
    name_of = {f: columns.get(f, f) for f in FIELDS}
    values = {f: row[c] for f, c in name_of.items() if c in row}
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        state = "is empty or no string" if "text" in values else "is missing"
        raise DataError(
            f"{where}: column '{name_of['text']}' {state}; "
            "give the text there or map it with dataset.columns.text=<column>"
        )
    entity = _string(where, values, "entity")
    spans: tuple[Span, ...] = ()
    if values.get("span") is not None:
        spans = (_span(where, values["span"], text),)
        entity = entity or text[slice(*spans[0])]
    elif entity is not None:
        found = text.rfind(entity)
        if found < 0 or not entity:
            raise DataError(f"{where}: entity '{entity}' does not occur in its text '{text[:60]}'")
        spans = ((found, found + len(entity)),)
    split = _string(where, values, "split")
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: split '{split}' is not known; use one of {', '.join(SPLITS)}")
    answers = [] if values.get("answer") is None else values["answer"]
    answers = [answers] if isinstance(answers, str | int | float) else answers
    if not isinstance(answers, list):
        raise DataError(f"{where}: 'answer' must be a string or a list of strings")
    used = set(name_of.values())
    return Example(
        id=_string(where, values, "id") or where.rpartition(":")[2],
        text=text,
        group=_string(where, values, "group"),
        split=split,
        spans=spans,
        entity=entity,
        entity_type=_string(where, values, "entity_type"),
        prompt=_string(where, values, "prompt"),
        answers=tuple(map(str, answers)),
        extra={k: v for k, v in row.items() if k not in used},
    )


def misspelt(rows: list[Row], columns: Mapping[str, str], ruled: str | None) -> list[str]:
    """A line per column that is kept as it is, but is nearly called as one that is lacking.

    `ruled` is the column that a rule makes the groups of.
    """
    there = dict.fromkeys(column for _, row in rows for column in row)
    used = {*FIELDS, *columns.values(), ruled}
    lacking = [f for f in FIELDS if columns.get(f, f) not in there]
    if ruled is not None:
        lacking = [f for f in lacking if f != "group"]
    notes = []
    for column in there:
        word = column.strip().lower()
        # Two letters are near to too much: idx, uid.
        known = [f for f in lacking if len(f) > 2 or f == word]
        near = difflib.get_close_matches(word, known, 1, _NEAR)
        if column not in used and near:
            notes.append(f"column '{column}' means nothing to saexp; did you mean {near[0]}?")
    return notes


def to_examples(
    rows: list[Row], columns: Mapping[str, str | None], group_rule: str | None, source: str
) -> tuple[list[Example], list[str]]:
    """All rows as examples with distinct ids, groups made by the rule where there is one; notes."""
    columns = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            raise ConfigError(
                f"dataset.columns.{ours}: unknown; the columns are {', '.join(FIELDS)}"
            )
        if not any(theirs in row for _, row in rows):
            raise DataError(f"{source}: no row has the column '{theirs}' (dataset.columns.{ours})")
    column, test = rule(group_rule) if group_rule else (None, None)
    examples, seen = [], {}
    for where, row in rows:
        if column is not None and test is not None:
            if row.get(column) is None:
                raise DataError(f"{where}: has no column '{column}', which group_rule asks for")
            try:
                label = group_rule if test(row[column]) else f"not ({group_rule})"
            except ValueError as error:
                raise DataError(f"{where}: column '{column}': {error} ({group_rule})") from error
            row = {**row, columns.get("group", "group"): label}
        example = to_example(where, row, columns)
        if example.id in seen:
            raise DataError(f"{where}: id '{example.id}' stands already at {seen[example.id]}")
        seen[example.id] = where
        examples.append(example)
    return examples, misspelt(rows, columns, column)
