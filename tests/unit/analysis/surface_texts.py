"""Made-up names in a template, tokenised two characters at a time."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from saexp.data.tokenization import TokenizedText

BOS = 1


def tokenized(text: str) -> TokenizedText:
    """A BOS token, then tokens of two characters each; an id is the code of its characters."""
    spans = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
    ids = [sum(ord(c) * 256**k for k, c in enumerate(text[a:b])) + 2 for a, b in spans]
    n = len(ids)
    return TokenizedText(text, (BOS, *ids), ((0, 0), *spans), (True, *[False] * n), False)


def names(n: int, letters: str, seed: int, length: int = 8) -> list[str]:
    """Random words of equal length."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(letters), length)) for _ in range(n)]


def placed(
    entities: Sequence[str], template: str | Sequence[str] = "In a word: {} is"
) -> pd.DataFrame:
    """Rows at the last token of each name, with their `tokens` in a column; a template for all, or
    one for each."""
    templates = [template] * len(entities) if isinstance(template, str) else template
    rows = []
    for i, (name, around) in enumerate(zip(entities, templates, strict=True)):
        tokens = tokenized(around.format(name))
        end = tokens.text.index(name) + len(name)
        last = max(j for j, (a, _) in enumerate(tokens.offsets) if a < end)
        rows.append((i, last, name, name, tokens))
    columns = ["text_id", "token_index", "entity", "unit", "tokens"]
    return pd.DataFrame(rows, columns=columns)
