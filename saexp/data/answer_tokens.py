"""The first token of an answer: the one definition that outcomes, analyzers and tasks share.

Prompt and answer are tokenised as one text; the token after the prompt's own is the answer's first.
Where the tokenizer merges the prompt's last token with the answer, there is none.
"""

import re
import unicodedata
from typing import Any

from saexp.data.examples import Example
from saexp.data.positions import Unplaced
from saexp.data.prompts import IN_CHAT

_CLOSING = ",.;:?!)]\u201d\u2026"
"""Marks that are followed by a space: quotation marks and brackets that open are not."""
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese: no space between words. (Korean puts
one between words, if not before particles, and answers are words.)"""


def foil_of(example: Example) -> str | None:
    """The wrong answer in the data's column `foil`."""
    foil = example.extra.get("foil")
    return None if foil is None or not str(foil) or foil != foil else str(foil)


def answer_text(example: Example, answer: str) -> str:
    """The answer as it follows `example.text`, by the example's `answer_space`.

    `never`: as given. `always`: after a space, unless there is white space already. `auto`: as
    `always` where a space belongs between the two, by the characters that meet: the prompt ends in
    a letter, a digit or a closing mark, and the answer begins with a letter or digit; but not
    between two digits, nor where either is of a script that is written without spaces. `strip`:
    without white space in front.

    >>> answer_text(Example(id="1", text="The capital of France is"), "Paris")
    ' Paris'
    >>> answer_text(Example(id="2", text="19"), "87")
    '87'
    """
    if example.answer_space == IN_CHAT:
        return answer.lstrip()
    before, after = example.text[-1:], answer[:1]
    if example.answer_space == "never" or not before or not after:
        return answer
    if before.isspace() or after.isspace():
        return answer
    wanted = example.answer_space == "always" or _belongs_between(before, after)
    return f" {answer}" if wanted else answer


def _belongs_between(before: str, after: str) -> bool:
    if _UNSPACED.match(before) or _UNSPACED.match(after):
        return False
    if before.isdecimal() and after.isdecimal():
        return False
    # L, N and M: letters, digits, and the accents of decomposed letters.
    ends = unicodedata.category(before)[0] in "LNM" or before in _CLOSING
    return ends and unicodedata.category(after)[0] in "LN"


def answer_token(tokenizer: Any, example: Example, answer: str, what: str = "answer") -> int:
    """Id of the first token of `answer` (`what` names it in reasons) after `example.text`.

    Raises Unplaced where the answer has no token, or none of its own.
    """
    if not answer.strip():
        raise Unplaced(f"{what} has no token")
    read = {"add_special_tokens": False}
    before = list(tokenizer(example.text, **read)["input_ids"])
    whole = list(tokenizer(example.text + answer_text(example, answer), **read)["input_ids"])
    if whole[: len(before)] != before or len(whole) == len(before):
        raise Unplaced(f"{what} merges with the prompt's last token")
    return int(whole[len(before)])


def space_note(examples: list[Example]) -> list[str]:
    """One line on the answers that got a space in front; nothing where none did."""
    n = sum(answer_text(e, e.answers[0]) == f" {e.answers[0]}" for e in examples if e.answers)
    if not n:
        return []
    return [
        f"{n} answers were given without the space that belongs between them and their prompt: it "
        "was added (dataset.answer_space=never takes them as they are given)"
    ]
