"""Results of many rows, each computed once in batches."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saexp.context import progress
from saexp.interventions import generation
from saexp.interventions.operations import Row, SAEs
from saexp.interventions.results_cache import Compute, ResultCache, shared
from saexp.models.forward import check_positions
from saexp.models.loading import LanguageModel
from saexp.models.rope import changes_while_generating, depends_on_length
from saexp.models.weights import Original

log = logging.getLogger(__name__)
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
        self.by_length = depends_on_length(model.text_config)

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
        if row.sample is not None or not self.by_length:
            return row.sample is None
        return not changes_while_generating(config, len(row.ids), n_new)

    def _is_worth_it(self) -> bool:
        return self.n_learned >= _WORTH * self.n_run

    def _generate(self, begun: Sequence[_Begun]) -> Iterator[list[tuple[_Begun, list[int]]]]:
        """Token by token."""
        rows = [b.continued() for b in begun]
        left = [self.most - len(b.known) for b in begun]
        for batch in generation.in_batches(self.model, rows, left, self.batch_tokens):
            limits = [left[i] for i in batch]
            found = generation._generate_batch(
                self.model, [rows[i] for i in batch], self.saes, limits
            )
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
        for batch in generation.in_batches(self.model, rows, None, self.batch_tokens, most):
            if not self._is_worth_it():
                yield [], [pending[i] for i in batch]
                continue
            chosen, n_last = [rows[i] for i in batch], [len(guessed[i]) + 1 for i in batch]
            found = generation.greedy_tokens(self.model, chosen, self.saes, n_last)
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


_CACHE_BYTES = 2 * 2**30
"""Largest KV cache of a batch, where `batch_tokens` is auto."""
_MOST_TOKENS = 65536
_MOST_TOKENS_CPU = 16384
"""Larger batches leave its caches, and take longer."""
Reader = Callable[[Row, Float[Tensor, "n V"]], np.ndarray]
"""What is kept of a row's logits at its last `n_last` tokens (float32)."""
Batches = Generator[list[tuple[Row, np.ndarray]], None, None]


def batch_tokens_for(model: LanguageModel, asked: int | str) -> int:
    """`asked`, or for `auto` as many tokens as keep the KV cache within _CACHE_BYTES, at most
    _MOST_TOKENS."""
    if asked != "auto":
        return int(asked)
    about = model.text_config
    n_heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    size = getattr(about, "head_dim", None) or model.d_model // about.num_attention_heads
    per_token = 2 * model.n_layers * int(n_heads) * int(size) * model.dtype.itemsize
    most = _MOST_TOKENS_CPU if model.device.type == "cpu" else _MOST_TOKENS
    return max(1024, min(most, _CACHE_BYTES // per_token))


def _computed(
    rows: Sequence[Row],
    what: str,
    kind: str,
    cache: ResultCache | None,
    compute: Compute[Row],
) -> list[np.ndarray]:
    """One result per row: equal rows once, and not at all where the cache has them or another
    process computes them."""
    places: dict[tuple[Any, ...], int] = {}
    at = [places.setdefault(row.key, len(places)) for row in rows]
    first = dict(zip(reversed(at), reversed(rows), strict=True))
    keys = [cache.key(kind, key) if cache else repr(i).encode() for key, i in places.items()]
    results = cache.get(keys) if cache else {}
    missing = {key: first[i] for i, key in enumerate(keys) if key not in results}
    n_missing = n_computed = len(missing)
    with progress(n_missing, what, "prompt") as bar:
        if cache:
            n_computed = 0
            with closing(shared(cache, _by_prompt(missing), compute)) as batches:
                for batch, computed_here in batches:
                    results.update(batch)
                    n_computed += len(batch) if computed_here else 0
                    bar.update(len(batch))
        else:
            key_of = {id(row): key for key, row in missing.items()}
            for part in compute(list(missing.values())):
                results.update((key_of[id(row)], values) for row, values in part)
                bar.update(len(part))
    elsewhere = n_missing - n_computed
    log.info(
        "%s: %d rows, %d computed, %s%d were stored",
        what,
        len(rows),
        n_computed,
        f"{elsewhere} by other processes, " if elsewhere else "",
        len(places) - n_missing,
    )
    return [results[keys[i]] for i in at]


def _by_prompt(rows: Mapping[bytes, Row]) -> dict[bytes, Row]:
    """Rows of one prompt side by side, so that they are computed by one process."""
    places: dict[tuple[int, ...], int] = {}
    for row in rows.values():
        places.setdefault(row.ids, len(places))
    return dict(sorted(rows.items(), key=lambda item: places[item[1].ids]))


def generate(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None = None,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    cache: ResultCache | None = None,
    what: str = "generating",
    key: str = "max_new_tokens",
) -> list[list[int]]:
    """Continuations (new tokens, without the end token), in the order of `rows`.

    Greedy, or sampled where a row says so. Equal rows are computed once, and not at all where the
    cache has them; batches hold prompts of similar length, at most `batch_tokens` tokens with
    padding and what is generated. Greedy rows of one prompt guess each other's text.
    Raises ModelError where a row outgrows the model's positions; `key` is the option that sets
    `max_new_tokens`.
    """

    def compute(missing: list[Row]) -> Batches:
        longest = max((len(row.ids) for row in missing), default=0)
        check_positions(model, longest, max_new_tokens, key)
        for batch in Guessing(model, saes or {}, max_new_tokens, batch_tokens).run(missing):
            yield [(row, np.asarray(tokens, dtype=np.float64)) for row, tokens in batch]

    found = _computed(rows, what, f"tokens {max_new_tokens}", cache, compute)
    return [values.astype(np.int64).tolist() for values in found]


def read_logits(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None,
    reader: Reader,
    *,
    kind: str,
    batch_tokens: int,
    n_last: Callable[[Row], int] | None = None,
    cache: ResultCache | None = None,
    what: str = "scoring",
) -> list[np.ndarray]:
    """`reader(row, logits)` of every row, in order; `kind` names the reader in the cache.

    The logits are of the row's last `n_last` prompt tokens (1 where not given). Raises ModelError
    for a prompt that is longer than the model has positions.
    """

    def compute(missing: list[Row]) -> Batches:
        check_positions(model, max((len(row.ids) for row in missing), default=0))
        wanted = [1 if n_last is None else n_last(row) for row in missing]
        vocabulary = int(model.text_config.vocab_size)
        most = LOGIT_BYTES // (4 * max(wanted, default=1) * vocabulary)
        for batch in generation.in_batches(model, missing, None, batch_tokens, most):
            mine, lasts = [missing[i] for i in batch], [wanted[i] for i in batch]
            logits = generation.last_logits(model, mine, saes, max(lasts))
            yield [
                (row, np.asarray(reader(row, x[-n:].float()), dtype=np.float64))
                for row, x, n in zip(mine, logits, lasts, strict=True)
            ]

    return _computed(rows, what, kind, cache, compute)


def divergences(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None,
    *,
    batch_tokens: int,
    cache: ResultCache | None = None,
) -> list[float]:
    """Mean over a prompt's tokens of KL(unedited || edited), nats, per row.

    Every token but the first counts (the first is the BOS where the tokenizer has one).
    """

    def compute(missing: list[Row]) -> Batches:
        of_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in missing:
            of_prompt.setdefault(row.ids, []).append(row)
        for ids, same in of_prompt.items():
            size = max(1, _scored_at_once(model, len(ids), batch_tokens) - 1)
            for start in range(0, len(same), size):
                batch = same[start : start + size]
                n = max(len(ids) - 1, 1)
                logits = generation.last_logits(model, [Row(ids), *batch], saes, n)
                logs = logits.float().log_softmax(-1)
                yield [
                    (row, np.asarray([max(float(x), 0.0)]))
                    for row, x in zip(batch, _kl(logs[:1], logs[1:]).mean(-1), strict=True)
                ]

    found = _computed(rows, "cost on neutral text", "kl", cache, compute)
    return [float(v[0]) for v in found]


def weight_divergences(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    original: Original,
    *,
    batch_tokens: int,
    cache: ResultCache | None = None,
) -> list[float]:
    """As `divergences`, of the model's weights as they are now from those inside `original()`."""

    def compute(missing: list[Row]) -> Batches:
        longest = max((len(row.ids) for row in missing), default=1)
        most = _scored_at_once(model, longest, batch_tokens)
        for numbers in generation.in_batches(model, missing, None, batch_tokens, most):
            batch = [missing[i] for i in numbers]
            n = max(max(len(row.ids) for row in batch) - 1, 1)
            edited = generation.last_logits(model, batch, None, n)
            with original():
                plain = generation.last_logits(model, batch, None, n)
            made = []
            for row, before, after in zip(batch, plain, edited, strict=True):
                mine = slice(-max(len(row.ids) - 1, 1), None)
                logs = (x[mine].float().log_softmax(-1) for x in (before, after))
                made.append((row, np.asarray([max(float(_kl(*logs).mean()), 0.0)])))
            yield made

    rows = [Row(tuple(ids)) for ids in prompts]
    found = _computed(rows, "cost of the weights", "kl of weights", cache, compute)
    return [float(v[0]) for v in found]


def _scored_at_once(model: LanguageModel, n_tokens: int, batch_tokens: int) -> int:
    """Prompts of so many tokens whose logits, probabilities and their product fit in memory."""
    vocabulary = int(model.text_config.vocab_size)
    return min(batch_tokens // n_tokens, LOGIT_BYTES // (12 * n_tokens * vocabulary))


def _kl(before: Float[Tensor, "... V"], after: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(before || after) of log-probabilities, nats."""
    return (before.exp() * (before - after)).sum(-1)
