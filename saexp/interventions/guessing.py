"""Generation in which the rows of a prompt guess each other's text.

Many edits of one prompt lead to few texts: the unedited one, a refusal. One row of those that begin
alike is generated token by token; its text is a guess for the others, which one forward pass over
all its tokens checks (blockwise and speculative decoding: Stern et al. 2018, arXiv 1811.03115;
Leviathan et al. 2023, 2211.17192). A row keeps the guess up to the first token that is not its own
likeliest, and that one of its own: a guess decides how long a row takes and not what it says.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from saexp.interventions import engine
from saexp.interventions.batch import SAEs
from saexp.interventions.ops import Row
from saexp.models.loading import LanguageModel
from saexp.models.rope import changes_while_generating

LOGIT_BYTES = 512 * 2**20
"""Largest tensor of logits."""
_WORTH = 0.25
"""Guessing ends once a smaller share of the tokens run for it told what a row says."""

Family = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and how its continuation begins."""


@dataclass(frozen=True)
class _Begun:
    """A row and the tokens that it is known to begin with."""

    row: Row
    known: tuple[int, ...] = ()

    @property
    def family(self) -> Family:
        return self.row.ids, self.known

    def continued(self, guess: Sequence[int] = ()) -> Row:
        """The row with what it is known, and guessed, to say as the end of its prompt."""
        return self.row.followed_by((*self.known, *guess))


class Guessing:
    """Continuations of rows under one model, see the module."""

    def __init__(
        self, model: LanguageModel, saes: SAEs, max_new_tokens: int, batch_tokens: int
    ) -> None:
        self.model, self.saes = model, saes
        self.most, self.batch_tokens = max_new_tokens, batch_tokens
        self.n_run = self.n_learned = 0

    def run(self, rows: Sequence[Row]) -> Iterator[list[tuple[Row, list[int]]]]:
        """Rows and their new tokens, without the end token, batch by batch as they are finished."""
        for batch in self._generate([_Begun(row) for row in rows if not self._guessable(row)]):
            yield [(begun.row, tokens) for begun, tokens in batch]
        pending = [_Begun(row) for row in rows if self._guessable(row)]
        guesses: dict[Family, list[int]] = {}
        while pending:
            leaders = list({begun.family: begun for begun in reversed(pending)}.values())
            if 2 * len(leaders) > len(pending) or not self._is_worth_it():
                leaders = pending
            for batch in self._generate(leaders):
                guesses |= {b.family: tokens[len(b.known) :] for b, tokens in batch}
                yield [(begun.row, tokens) for begun, tokens in batch]
            led = set(map(id, leaders))
            followers = [begun for begun in pending if id(begun) not in led]
            pending = []
            for finished, others in self._check(followers, guesses):
                yield finished
                pending += others

    def _guessable(self, row: Row) -> bool:
        """Whether it is greedy, and rotated in one pass over all its tokens as at each step."""
        config, n_new = self.model.text_config, self.most
        return row.sample is None and not changes_while_generating(config, len(row.ids), n_new)

    def _is_worth_it(self) -> bool:
        return self.n_learned >= _WORTH * self.n_run

    def _generate(self, begun: Sequence[_Begun]) -> Iterator[list[tuple[_Begun, list[int]]]]:
        """Token by token."""
        rows = [b.continued() for b in begun]
        left = [self.most - len(b.known) for b in begun]
        for batch in engine.in_batches(self.model, rows, left, self.batch_tokens):
            limits = [left[i] for i in batch]
            found = engine._generate_batch(self.model, [rows[i] for i in batch], self.saes, limits)
            yield [
                (begun[i], [*begun[i].known, *tokens])
                for i, tokens in zip(batch, found, strict=True)
            ]

    def _check(
        self, pending: Sequence[_Begun], guesses: Mapping[Family, Sequence[int]]
    ) -> Iterator[tuple[list[tuple[Row, list[int]]], list[_Begun]]]:
        """Those that a guess finishes, and the others with what they are then known to say."""
        guessed = [guesses[b.family][: self.most - len(b.known) - 1] for b in pending]
        rows = [b.continued(guess) for b, guess in zip(pending, guessed, strict=True)]
        longest = max(map(len, guessed), default=0) + 1
        of_row = self.model.dtype.itemsize * longest * int(self.model.text_config.vocab_size)
        most = LOGIT_BYTES // of_row
        for batch in engine.in_batches(self.model, rows, None, self.batch_tokens, most):
            if not self._is_worth_it():
                yield [], [pending[i] for i in batch]
                continue
            chosen, n_last = [rows[i] for i in batch], [len(guessed[i]) + 1 for i in batch]
            found = engine.greedy_tokens(self.model, chosen, self.saes, n_last)
            finished: list[tuple[Row, list[int]]] = []
            others: list[_Begun] = []
            for i, own in zip(batch, found, strict=True):
                row, known = pending[i].row, pending[i].known
                pairs = zip(guessed[i], own[:-1], strict=True)
                right = next((n for n, (a, b) in enumerate(pairs) if a != b), len(guessed[i]))
                self.n_run += len(guessed[i]) + 1
                self.n_learned += right + 1
                known = (*known, *own[: right + 1])
                if known[-1] in self.model.eos_ids:
                    finished.append((row, list(known[:-1])))
                elif len(known) == self.most:
                    finished.append((row, list(known)))
                else:
                    others.append(_Begun(row, known))
            yield finished, others
