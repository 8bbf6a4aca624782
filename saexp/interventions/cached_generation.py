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
from saexp.interventions.results_cache import Compute, ResultCache, shared
from saexp.interventions.stream_edits import Row, SAEs
from saexp.models.forward import changes_while_generating, check_positions, depends_on_length
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import Original

log = logging.getLogger(__name__)
LOGIT_BYTES = 512 * 2**20
"""Largest tensor of logits."""
_MIN_ACCEPTED = 0.25
"""Drafting ends once a smaller fraction of the verified tokens was accepted."""

Family = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and the first tokens of its continuation."""


@dataclass(frozen=True)
class _Started:
    """A row and the first tokens of its continuation, as far as they are known."""

    row: Row
    known: tuple[int, ...] = ()

    @property
    def family(self) -> Family:
        return self.row.ids, self.known

    def continued(self, draft: Sequence[int] = ()) -> Row:
        """The row with the known tokens and a draft appended to its prompt."""
        return self.row.followed_by((*self.known, *draft))


class SpeculativeDecoding:
    """Greedy continuations of rows, where rows of one prompt serve as each other's drafts.

    Under interventions, the rows of one prompt (conditions, coefficients, controls) often continue
    alike. One row per family (prompt and known tokens) is decoded token by token. Its text is the
    draft of the others, which a single forward pass with their own operations verifies: every draft
    token up to the first one that differs from the row's own argmax is accepted, and that argmax is
    the next known token. Rows that are not finished by then form new families. Tokens are therefore
    those of decoding token by token (as in speculative decoding, Leviathan et al. 2023,
    arXiv 2211.17192, with a draft from another row instead of a smaller model).
    """

    def __init__(
        self, model: LanguageModel, saes: SAEs, max_new_tokens: int, batch_tokens: int
    ) -> None:
        self.model, self.saes = model, saes
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.n_verified = self.n_accepted = 0
        self.depends_on_length = depends_on_length(model.text_config)

    def run(self, rows: Sequence[Row]) -> Iterator[list[tuple[Row, list[int]]]]:
        """Rows and their new tokens, without the end token, batch by batch as they are finished."""
        for batch in self._decode([_Started(row) for row in rows if not self._can_draft(row)]):
            yield [(started.row, tokens) for started, tokens in batch]
        pending = [_Started(row) for row in rows if self._can_draft(row)]
        drafts: dict[Family, list[int]] = {}
        while pending:
            leaders = list({started.family: started for started in reversed(pending)}.values())
            if 2 * len(leaders) > len(pending) or not self._pays():
                leaders = pending
            for batch in self._decode(leaders):
                drafts |= {s.family: tokens[len(s.known) :] for s, tokens in batch}
                yield [(started.row, tokens) for started, tokens in batch]
            leader_ids = set(map(id, leaders))
            followers = [started for started in pending if id(started) not in leader_ids]
            pending = []
            for finished, unfinished in self._verify(followers, drafts):
                yield finished
                pending += unfinished

    def _can_draft(self, row: Row) -> bool:
        """Whether the row is greedy, and one pass over all its tokens has the rotary frequencies
        of every decoding step."""
        if row.sample is not None or not self.depends_on_length:
            return row.sample is None
        config = self.model.text_config
        return not changes_while_generating(config, len(row.ids), self.max_new_tokens)

    def _pays(self) -> bool:
        return self.n_accepted >= _MIN_ACCEPTED * self.n_verified

    def _decode(self, started: Sequence[_Started]) -> Iterator[list[tuple[_Started, list[int]]]]:
        """Continuations, known tokens included, decoded token by token."""
        rows = [s.continued() for s in started]
        n_left = [self.max_new_tokens - len(s.known) for s in started]
        for batch in generation.in_batches(self.model, rows, n_left, self.batch_tokens):
            limits = [n_left[i] for i in batch]
            continuations = generation._generate_batch(
                self.model, [rows[i] for i in batch], self.saes, limits
            )
            yield [
                (started[i], [*started[i].known, *tokens])
                for i, tokens in zip(batch, continuations, strict=True)
            ]

    def _verify(
        self, pending: Sequence[_Started], drafts: Mapping[Family, Sequence[int]]
    ) -> Iterator[tuple[list[tuple[Row, list[int]]], list[_Started]]]:
        """(rows that their draft finishes, the others with the tokens known then), per batch."""
        draft_of = [drafts[s.family][: self.max_new_tokens - len(s.known) - 1] for s in pending]
        rows = [s.continued(draft) for s, draft in zip(pending, draft_of, strict=True)]
        longest = max(map(len, draft_of), default=0) + 1
        row_bytes = self.model.dtype.itemsize * longest * int(self.model.text_config.vocab_size)
        most = LOGIT_BYTES // row_bytes
        for batch in generation.in_batches(self.model, rows, None, self.batch_tokens, most):
            if not self._pays():
                yield [], [pending[i] for i in batch]
                continue
            n_last = [len(draft_of[i]) + 1 for i in batch]
            argmax = generation.greedy_tokens(
                self.model, [rows[i] for i in batch], self.saes, n_last
            )
            finished: list[tuple[Row, list[int]]] = []
            unfinished: list[_Started] = []
            for i, tokens in zip(batch, argmax, strict=True):
                row, draft = pending[i].row, draft_of[i]
                pairs = zip(draft, tokens[:-1], strict=True)
                n_accepted = next((n for n, (a, b) in enumerate(pairs) if a != b), len(draft))
                self.n_verified += len(draft) + 1
                self.n_accepted += n_accepted + 1
                known = (*pending[i].known, *tokens[: n_accepted + 1])
                if known[-1] in self.model.eos_ids:
                    finished.append((row, list(known[:-1])))
                elif len(known) == self.max_new_tokens:
                    finished.append((row, list(known)))
                else:
                    unfinished.append(_Started(row, known))
            yield finished, unfinished


_CACHE_BYTES = 2 * 2**30
"""Largest key-value cache of a batch where `batch_tokens` is auto."""
_MOST_TOKENS = 65536
_MOST_TOKENS_CPU = 16384
"""Larger batches exceed the CPU's own caches and take longer."""

Batches = Generator[list[tuple[Row, np.ndarray]], None, None]


@dataclass(frozen=True)
class LogitReader:
    """What is read from the logits of a row."""

    read: Callable[[Row, Float[Tensor, "n V"]], np.ndarray]
    """(row, float32 logits at its last `n_last` tokens) -> numbers that are cached."""
    kind: str
    """Names the reader in the cache."""
    n_last: Callable[[Row], int] = lambda _: 1
    """Prompt tokens of a row, counted from its end, whose logits are read."""
    label: str = "scoring"
    """What the progress bar and the log call it."""


def batch_tokens_for(model: LanguageModel, batch_tokens: int | str) -> int:
    """`batch_tokens`; for `auto` as many as keep the key-value cache within _CACHE_BYTES, at most
    _MOST_TOKENS."""
    if batch_tokens != "auto":
        return int(batch_tokens)
    config = model.text_config
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or model.d_model // config.num_attention_heads
    bytes_per_token = 2 * model.n_layers * int(n_heads) * int(head_dim) * model.dtype.itemsize
    most = _MOST_TOKENS_CPU if model.device.type == "cpu" else _MOST_TOKENS
    return max(1024, min(most, _CACHE_BYTES // bytes_per_token))


def _computed(
    rows: Sequence[Row],
    label: str,
    kind: str,
    cache: ResultCache | None,
    compute: Compute[Row],
) -> list[np.ndarray]:
    """One result per row. Equal rows are computed once; rows that the cache has, or that another
    process computes, are not computed here."""
    number_of: dict[tuple[Any, ...], int] = {}
    numbers = [number_of.setdefault(row.key, len(number_of)) for row in rows]
    first_row = dict(zip(reversed(numbers), reversed(rows), strict=True))
    keys = [cache.key(kind, key) if cache else repr(i).encode() for key, i in number_of.items()]
    results = cache.get(keys) if cache else {}
    missing = {key: first_row[i] for i, key in enumerate(keys) if key not in results}
    n_missing = n_computed = len(missing)
    with progress(n_missing, label, "prompt") as bar:
        if cache and cache.stores:
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
    if cache:
        cache.n_rows += len(number_of)
        cache.n_computed += n_computed
    n_elsewhere = n_missing - n_computed
    log.info(
        "%s: %d rows, %d computed, %s%d were stored",
        label,
        len(rows),
        n_computed,
        f"{n_elsewhere} by other processes, " if n_elsewhere else "",
        len(number_of) - n_missing,
    )
    return [results[keys[i]] for i in numbers]


def _by_prompt(rows: Mapping[bytes, Row]) -> dict[bytes, Row]:
    """Rows of one prompt next to each other, so that one process computes them together."""
    prompt_numbers: dict[tuple[int, ...], int] = {}
    for row in rows.values():
        prompt_numbers.setdefault(row.ids, len(prompt_numbers))
    return dict(sorted(rows.items(), key=lambda item: prompt_numbers[item[1].ids]))


def generate(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None = None,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    cache: ResultCache | None = None,
    label: str = "generating",
    key: str = "max_new_tokens",
) -> list[list[int]]:
    """Continuations (new tokens, without the end token), in the order of `rows`.

    A row is sampled where it has a `Sampling`, else decoded greedily. Batches hold prompts of
    similar length, at most `batch_tokens` tokens with padding and generated tokens. The greedy text
    of one row of a prompt is the draft of the others (see `SpeculativeDecoding`).
    Raises ModelError where a prompt and `max_new_tokens` exceed the model's positions; `key` is the
    option that sets `max_new_tokens`.
    """

    def compute(missing: list[Row]) -> Batches:
        longest = max((len(row.ids) for row in missing), default=0)
        check_positions(model, longest, max_new_tokens, key)
        for batch in SpeculativeDecoding(model, saes or {}, max_new_tokens, batch_tokens).run(
            missing
        ):
            yield [(row, np.asarray(tokens, dtype=np.float64)) for row, tokens in batch]

    results = _computed(rows, label, f"tokens {max_new_tokens}", cache, compute)
    return [values.astype(np.int64).tolist() for values in results]


def read_logits(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None,
    reader: LogitReader,
    *,
    batch_tokens: int,
    cache: ResultCache | None = None,
) -> list[np.ndarray]:
    """What `reader` reads of every row's logits, in the order of `rows`.

    Raises ModelError for a prompt that is longer than the model has positions.
    """

    def compute(missing: list[Row]) -> Batches:
        check_positions(model, max((len(row.ids) for row in missing), default=0))
        n_last = [reader.n_last(row) for row in missing]
        vocabulary = int(model.text_config.vocab_size)
        most = LOGIT_BYTES // (4 * max(n_last, default=1) * vocabulary)
        for batch in generation.in_batches(model, missing, None, batch_tokens, most):
            batch_rows = [missing[i] for i in batch]
            logits = generation.last_logits(model, batch_rows, saes, max(n_last[i] for i in batch))
            yield [
                (
                    missing[i],
                    np.asarray(reader.read(missing[i], x[-n_last[i] :].float()), dtype=np.float64),
                )
                for i, x in zip(batch, logits, strict=True)
            ]

    return _computed(rows, reader.label, reader.kind, cache, compute)


def divergences(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None,
    *,
    batch_tokens: int,
    cache: ResultCache | None = None,
) -> list[float]:
    """KL(unedited || edited) in nats per row, averaged over the prompt's tokens.

    The first token (BOS, where the tokenizer has one) does not count.
    """

    def compute(missing: list[Row]) -> Batches:
        rows_of_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in missing:
            rows_of_prompt.setdefault(row.ids, []).append(row)
        for ids, prompt_rows in rows_of_prompt.items():
            size = max(1, _n_prompts_in_memory(model, len(ids), batch_tokens) - 1)
            for start in range(0, len(prompt_rows), size):
                batch = prompt_rows[start : start + size]
                n_scored = max(len(ids) - 1, 1)
                logits = generation.last_logits(model, [Row(ids), *batch], saes, n_scored)
                logs = logits.float().log_softmax(-1)
                yield [
                    (row, np.asarray([max(float(x), 0.0)]))
                    for row, x in zip(batch, _kl(logs[:1], logs[1:]).mean(-1), strict=True)
                ]

    results = _computed(rows, "cost on neutral text", "kl", cache, compute)
    return [float(values[0]) for values in results]


def weight_divergences(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    original: Original,
    *,
    batch_tokens: int,
    cache: ResultCache | None = None,
) -> list[float]:
    """As `divergences`, between the weights inside `original()` and the model's present ones."""

    def compute(missing: list[Row]) -> Batches:
        longest = max((len(row.ids) for row in missing), default=1)
        most = _n_prompts_in_memory(model, longest, batch_tokens)
        for numbers in generation.in_batches(model, missing, None, batch_tokens, most):
            batch = [missing[i] for i in numbers]
            n_scored = max(max(len(row.ids) for row in batch) - 1, 1)
            edited = generation.last_logits(model, batch, None, n_scored)
            with original():
                unedited = generation.last_logits(model, batch, None, n_scored)
            results = []
            for row, before, after in zip(batch, unedited, edited, strict=True):
                scored = slice(-max(len(row.ids) - 1, 1), None)
                logs = (x[scored].float().log_softmax(-1) for x in (before, after))
                results.append((row, np.asarray([max(float(_kl(*logs).mean()), 0.0)])))
            yield results

    rows = [Row(tuple(ids)) for ids in prompts]
    results = _computed(rows, "cost of the weights", "kl of weights", cache, compute)
    return [float(values[0]) for values in results]


def _n_prompts_in_memory(model: LanguageModel, n_tokens: int, batch_tokens: int) -> int:
    """Prompts of `n_tokens` whose logits, probabilities and their product fit in LOGIT_BYTES."""
    vocabulary = int(model.text_config.vocab_size)
    return min(batch_tokens // n_tokens, LOGIT_BYTES // (12 * n_tokens * vocabulary))


def _kl(before: Float[Tensor, "... V"], after: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(before || after) of log-probabilities, in nats."""
    return (before.exp() * (before - after)).sum(-1)
