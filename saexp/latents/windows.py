"""Tokens around a row, for reading: as pieces of the text, with the row of each that has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from saexp.data.token_text import pieces
from saexp.data.tokens import TokenizedText


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text."""

    tokens: list[str]
    rows: list[int | None]
    """Row of each token; None where the run did not look, and at high-norm positions."""
    peak: int
    """Which of them the window was made around."""
    cut: tuple[bool, bool]
    """Whether the text goes on at its left and right."""


class Windows:
    """Makes windows of a run's rows; `rows` and `texts` are those of its Placement."""

    def __init__(
        self,
        rows: pd.DataFrame,
        texts: Sequence[TokenizedText],
        tokenizer: Any,
        *,
        before: int,
        after: int,
        shown: Bool[np.ndarray, " n_rows"] | None = None,
    ) -> None:
        """Tokens whose row is not `shown` get none in a window."""
        self.texts, self.tokenizer, self.before, self.after = texts, tokenizer, before, after
        self._shown = shown
        self._example, _ = pd.factorize(rows["example_id"])
        self._token = rows["token_index"].to_numpy(dtype=np.int64)
        self._text = rows["text_id"].to_numpy(dtype=np.int64)

    def around(self, row: int) -> Window:
        """The tokens from `before` the row's own to `after` it."""
        text = self.texts[int(self._text[row])]
        token = int(self._token[row])
        first, end = max(0, token - self.before), min(len(text), token + self.after + 1)
        # Rows of one example stand together.
        near = np.arange(max(0, row - self.before), min(len(self._token), row + self.after + 1))
        mine = near[self._example[near] == self._example[row]]
        mine = mine if self._shown is None else mine[self._shown[mine]]
        of_token = {int(self._token[r]): int(r) for r in mine}
        return Window(
            tokens=pieces(text, self.tokenizer)[first:end],
            rows=[of_token.get(i) for i in range(first, end)],
            peak=token - first,
            cut=(first > 0, end < len(text)),
        )
