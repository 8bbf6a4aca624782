"""Rows of JSONL and CSV files, with their line numbers, turned into examples."""

import csv as csv_module
import difflib
import json
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from saexp.config import DatasetConfig
from saexp.config.groups import COLUMNS as FIELDS
from saexp.data import Example, MissingValues, Span, find_mentions, look_alike, parse_list
from saexp.errors import ConfigError, DataError, counted


@contextmanager
def open_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    r"""A UTF-8 file, opened for reading without its byte order mark.

    Iterating gives lines as Python's universal newlines do: only "\n", "\r\n" and "\r" end one,
    not the other characters at which `str.splitlines` cuts (U+2028, NEL, form feed and so on).
    `newline` is passed to `open`. Raises DataError with the position of the first invalid byte
    where the file is not UTF-8.
    """
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as text_file:
            yield text_file
    except UnicodeDecodeError as error:
        # The position in the error is relative to a block of the file.
        raise DataError(f"{file}: is not UTF-8 text (byte {_first_bad_byte(file)})") from error


def _first_bad_byte(file: Path) -> int:
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def text_lines(file: Path) -> list[str]:
    """Lines of a text file without line ends, including blank lines and white space."""
    with open_text(file) as lines:
        return [line.removesuffix("\n") for line in lines]


SPLITS = ("train", "val", "test")

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_MIN_SIMILARITY = 0.8
"""Similarity of a misspelt column name to the known one, at least; 1 means equal."""

Row = tuple[str, dict[str, Any]]
"""(file:line, columns)."""

_MAX_FIELD = 2**31 - 1
"""Maximum characters in a CSV field: the largest limit that every platform accepts."""


def read_rows(path: str | None, kind: str) -> list[Row]:
    """All rows of a file. Raises DataError, with file and line."""
    if not path:
        raise ConfigError(f"dataset={kind} needs a file: type dataset.path=FILE")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"dataset.path={path}: no such file")
    rows = list(_json_lines(file) if kind == "jsonl" else _csv_lines(file))
    if not rows:
        raise DataError(f"{path}: is empty; it needs at least one row with a 'text'")
    return rows


def _json_lines(file: Path) -> Iterator[Row]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: is not JSON ({error.msg}, column {error.colno})"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f'{where}: a row must be an object such as {{"text": "…"}}')
            if may_hold_surrogates(line):
                check_characters(where, row)
            yield where, row


def may_hold_surrogates(text: str) -> bool:
    """Whether JSON text has escaped surrogates, one of which alone is half a character."""
    return "\\ud" in text.lower()


def check_characters(where: str, row: dict[str, Any]) -> None:
    """Raise DataError where a row holds half a character, which cannot be encoded as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = repr(str(error.object)[error.start])
        raise DataError(f"{where}: holds half a character ({half}); remove it") from error


def _csv_lines(file: Path) -> Iterator[Row]:
    # A setting of the whole process: raised once and never lowered, so that threads do not
    # interfere with one another.
    csv_module.field_size_limit(_MAX_FIELD)
    with open_text(file, newline="") as lines:
        reader = csv_module.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: the row does not have the {len(reader.fieldnames or [])} fields "
                        "of the header; quote texts that contain commas"
                    )
                yield where, row
        except csv_module.Error as error:
            # DictReader counts a line only after reading it.
            line = reader.reader.line_num
            raise DataError(f"{file}:{line}: is not CSV ({error})") from error


def parse_rule(text: str, missing: MissingValues | None = None) -> tuple[str, Any]:
    """Parse a rule such as `column == value` into (column, test). Raises ConfigError.

    No code is evaluated. Numbers are compared as numbers, other values as text, ignoring case. The
    test raises ValueError where <, >, <= or >= compares a text with a number.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(==|!=|>=|<=|>|<)\s*(\S.*?)\s*", text)
    if not match:
        raise ConfigError(
            f"dataset.group_rule={text} is not a rule; type e.g. 'matching_tokens == 0' "
            "(column, one of == != >= <= > <, value)"
        )
    column, sign, value = match[1], match[2], match[3].strip("'\"")
    if value in (missing or MissingValues()):
        raise ConfigError(
            f"dataset.group_rule={text} compares with a missing value, and rows without a value "
            "belong to no group; compare with another value, or leave this one out of "
            "dataset.missing_values"
        )

    def test(cell: Any) -> bool:
        left, right = _number(cell), _number(value)
        if left is not None and right is not None:
            return bool(_OPERATORS[sign](left, right))
        if right is not None and sign not in ("==", "!="):
            raise ValueError(f"'{cell}' is not a number")
        return bool(_OPERATORS[sign](str(cell).lower(), value.lower()))

    return column, test


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _string(where: str, row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"{where}: '{name}' must be a string, not {type(value).__name__}")
    return str(value)


def _span(where: str, value: Any, text: str) -> Span:
    if isinstance(value, str):
        value = _parse_cell(where, "span", value, "[(")
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise DataError(f"{where}: 'span' must be [start, end] in characters, such as [4, 11]")
    start, end = value
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: span [{start}, {end}] is outside its text of {len(text)} characters"
        )
    return start, end


def _parse_cell(where: str, column: str, cell: Any, opening: str = "[") -> Any:
    """The list that a cell holds as text; any other cell as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        parsed = parse_list(cell, opening)
    except ValueError as error:
        raise DataError(f"{where}: column '{column}' {error}") from error
    return cell if parsed is None else parsed


def _mentions(where: str, entity: str, text: str) -> tuple[Span, ...]:
    spans = find_mentions(text, entity)
    if not spans:
        message = f"{where}: entity '{entity}' does not occur in its text '{text[:60]}'"
        if look_alike(text, entity):
            message += (
                "; they look alike but differ in characters: "
                f"{ascii(entity)} is not in {ascii(text[:60])}"
            )
        raise DataError(message)
    return spans


def _answers(where: str, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(item is None or isinstance(item, str | int | float) for item in items):
        raise DataError(f"{where}: 'answer' must be a string or a list of strings")
    return tuple(str(item) for item in items if item is not None)


def to_example(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """Validate a row, whose missing values are None, and turn it into an example.

    The id is "" where the row has none. Raises DataError, with file and line.
    """
    name_of = {f: columns.get(f, f) for f in FIELDS}
    values = {f: row[c] for f, c in name_of.items() if c in row}
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        state = "is empty or not a string" if "text" in values else "is missing"
        if "text" in values and text is None:
            state = "has a missing value (empty, null, NaN or one of dataset.missing_values)"
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
        spans = _mentions(where, entity, text)
    split = _string(where, values, "split")
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: split '{split}' is not known; use one of {', '.join(SPLITS)}")
    used = set(name_of.values())
    return Example(
        id=_string(where, values, "id") or "",
        text=text,
        group=_string(where, values, "group"),
        split=split,
        spans=spans,
        entity=entity,
        entity_type=_string(where, values, "entity_type"),
        prompt=_string(where, values, "prompt"),
        answers=_answers(where, values.get("answer")),
        extra={k: v for k, v in row.items() if k not in used},
    )


def misspelling_notes(
    rows: list[Row], columns: Mapping[str, str], rule_column: str | None
) -> list[str]:
    """Notes on unknown columns whose names are similar to known columns that are absent.

    `rule_column` is the column of dataset.group_rule.
    """
    present = dict.fromkeys(column for _, row in rows for column in row)
    used = {*FIELDS, *columns.values(), rule_column}
    absent = [f for f in FIELDS if columns.get(f, f) not in present]
    if rule_column is not None:
        absent = [f for f in absent if f != "group"]
    notes = []
    for column in present:
        word = column.strip().lower()
        # Names of two letters are similar to too many others, such as idx and uid.
        known = [f for f in absent if len(f) > 2 or f == word]
        near = difflib.get_close_matches(word, known, 1, _MIN_SIMILARITY)
        if column not in used and near:
            notes.append(f"column '{column}' is not used by saexp; did you mean {near[0]}?")
    return notes


def to_examples(
    rows: list[Row], cfg: DatasetConfig, source: str, *, lists_as_text: bool = False
) -> tuple[list[Example], list[str]]:
    """Turn all rows into (examples with distinct ids, notes).

    `dataset.group_rule` gives the groups where it is set. With `lists_as_text`, an answer that is a
    list in JSON or Python syntax is parsed.
    """
    columns = {field: column for field, column in cfg.columns.items() if column is not None}
    for field, column in columns.items():
        if not any(column in row for _, row in rows):
            raise DataError(f"{source}: no row has the column '{column}' (dataset.columns.{field})")
    missing = MissingValues(cfg.missing_values)
    lists = (columns.get("answer", "answer"), "attributes") if lists_as_text else ()
    cleaned = []
    for where, row in rows:
        parsed = {c: _parse_cell(where, c, row[c]) for c in lists if c in row}
        cleaned.append((where, missing.cleaned({**row, **parsed})))
    rule_column = None
    if cfg.group_rule:
        rule_column, cleaned = _assign_groups(cleaned, cfg.group_rule, missing, columns, source)
    examples = [to_example(where, row, columns) for where, row in cleaned]
    notes = [*missing.notes(len(rows)), *misspelling_notes(rows, columns, rule_column)]
    notes += _prompt_notes(examples) + (_answer_notes(examples) if lists_as_text else [])
    return _with_ids([where for where, _ in rows], examples), notes


def _prompt_notes(examples: Sequence[Example]) -> list[str]:
    """A note where only some rows have a prompt: for the others, interventions run on the text."""
    n_without = sum(example.prompt is None for example in examples)
    if n_without in (0, len(examples)):
        return []
    return [
        f"{counted(n_without, 'row')} of {len(examples):,} without a prompt: interventions run on "
        "the text instead"
    ]


def _answer_notes(examples: Sequence[Example]) -> list[str]:
    """A note where answers are in brackets but are not a list in JSON or Python syntax."""
    n = sum(
        re.fullmatch(r"\s*\[.*\]\s*", a, re.DOTALL) is not None for e in examples for a in e.answers
    )
    if not n:
        return []
    return [
        f"{counted(n, 'answer')} in brackets read as plain text, not as a list; a list is written "
        'as ["first", "second"]'
    ]


def _assign_groups(
    rows: list[Row],
    group_rule: str,
    missing: MissingValues,
    columns: Mapping[str, str],
    source: str,
) -> tuple[str, list[Row]]:
    """(column of the rule, rows with groups); the group is None where the column is missing."""
    column, test = parse_rule(group_rule, missing)
    if all(row.get(column) is None for _, row in rows):
        raise DataError(f"{source}: no row has a value in column '{column}' ({group_rule})")
    grouped = []
    for where, row in rows:
        label = None
        if row.get(column) is not None:
            try:
                label = group_rule if test(row[column]) else f"not ({group_rule})"
            except ValueError as error:
                raise DataError(f"{where}: column '{column}': {error} ({group_rule})") from error
        grouped.append((where, {**row, columns.get("group", "group"): label}))
    return column, grouped


def _with_ids(locations: Sequence[str], examples: Sequence[Example]) -> list[Example]:
    """Examples with distinct ids: those without one get their line number.

    Where another row has that number as its id, "line " is prepended. Raises DataError for an id
    that occurs twice.
    """
    where_used: dict[str, str] = {}
    for where, example in zip(locations, examples, strict=True):
        if example.id in where_used:
            first = where_used[example.id]
            raise DataError(f"{where}: id '{example.id}' is already used at {first}")
        if example.id:
            where_used[example.id] = where
    result = []
    for where, example in zip(locations, examples, strict=True):
        line = where.rpartition(":")[2]
        while line in where_used:
            line = f"line {line}"
        result.append(example if example.id else replace(example, id=line))
    return result
