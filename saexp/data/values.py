"""Cells of data files: which count as missing values, and lists written as text."""

import ast
import io
import json
import math
import numbers
import tokenize
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from saexp.config.components import MISSING_VALUES


class MissingValues:
    """Decides which values of a table are missing, and counts them by column.

    null, NaN and the empty string always are; of other values, the given texts and numbers that
    are equal to one of them (by default the texts that `pandas.read_csv` treats as missing).
    """

    def __init__(self, texts: Sequence[str | int | float] = MISSING_VALUES) -> None:
        self.texts = {"", *map(str, texts)}
        self.numbers = {value for text in self.texts if (value := _finite(text)) is not None}
        self.counts: Counter[str] = Counter()
        """Column -> rows where it is missing, wholly or in part."""
        self.spellings: dict[str, None] = {}
        """Texts, other than the empty one, that were met as missing values."""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self.texts
        if isinstance(value, numbers.Number) and not isinstance(value, bool):
            return value != value or value in self.numbers
        return value is None

    def cleaned(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with None for each missing value, inside lists and mappings too; counts them."""
        done = {}
        for column, value in row.items():
            done[column], n_missing = self._clean(value)
            if n_missing:
                self.counts[column] += 1
        return done

    def _clean(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, Mapping):
            items = {k: self._clean(v) for k, v in value.items()}
            return {k: v for k, (v, _) in items.items()}, sum(n for _, n in items.values())
        if isinstance(value, list | tuple):
            cells = [self._clean(v) for v in value]
            return [v for v, _ in cells], sum(n for _, n in cells)
        if value not in self:
            return value, 0
        if isinstance(value, str) and value:
            self.spellings[value] = None
        return None, 1

    def notes(self, n_rows: int) -> list[str]:
        """One line with the counts by column; nothing where no value is missing."""
        if not self.counts:
            return []
        columns = ", ".join(f"'{column}' {n:,}" for column, n in self.counts.items())
        note = f"missing values in {n_rows:,} rows, by column: {columns}"
        if self.spellings:
            texts = ", ".join(f'"{text}"' for text in self.spellings)
            note += (
                f" (of texts, {texts}; dataset.missing_values sets which texts count as missing)"
            )
        return [note]


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def as_list(text: str, opening: str = "[") -> list[Any] | None:
    """The list that a cell holds in JSON or Python form; None where it holds another text.

    `opening` are the brackets that a list may begin with. Raises ValueError for a printed NumPy
    array, whose items are not separated.

    >>> as_list("['Estia.', 'Estia']")
    ['Estia.', 'Estia']
    """
    text = text.strip()
    if not text or text[0] not in opening:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = _python_value(text)
    return list(value) if isinstance(value, list | tuple) else None


def _python_value(text: str) -> Any:
    """What a Python literal says, `nan` included; None where it is none."""
    try:
        with warnings.catch_warnings():
            # Unknown escapes in a string literal.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(_NaN().visit(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    if any(a == b == tokenize.STRING for a, b in zip(kinds, kinds[1:], strict=False)):
        raise ValueError("holds a printed NumPy array; write its items as a JSON list")
    return value


class _NaN(ast.NodeTransformer):
    """Puts the number in place of the name `nan`, as which Python prints it."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float("nan")) if node.id == "nan" else node
