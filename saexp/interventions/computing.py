"""Results of many rows: generations, logits, divergences; each row computed once, in batches."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saexp.context import progress
from saexp.interventions import engine
from saexp.interventions.batch import SAEs
from saexp.interventions.cache import ResultCache
from saexp.interventions.ops import Row
from saexp.models.loading import LanguageModel

log = logging.getLogger(__name__)

_CACHE_BYTES = 2 * 2**30
"""Largest KV cache of a batch, where `batch_tokens` is auto."""
_MOST_TOKENS = 65536
_LOGIT_BYTES = 512 * 2**20
"""Largest tensor of logits."""

Reader = Callable[[Row, Float[Tensor, "n V"]], np.ndarray]
"""What is kept of a row's logits at its last `n_last` tokens (float32)."""


def batch_tokens_for(model: LanguageModel, asked: int | str) -> int:
    """`asked`, or for `auto` as many tokens as keep the KV cache within _CACHE_BYTES."""
    if asked != "auto":
        return int(asked)
    about = model.text_config
    n_heads = getattr(about, "num_key_value_heads", None) or about.num_attention_heads
    size = getattr(about, "head_dim", None) or model.d_model // about.num_attention_heads
    per_token = 2 * model.n_layers * int(n_heads) * int(size) * model.dtype.itemsize
    return max(1024, min(_MOST_TOKENS, _CACHE_BYTES // per_token))


def _batches(rows: Sequence[Row], extra: int, batch_tokens: int) -> list[list[Row]]:
    """Rows of one prompt side by side, long prompts first, at most `batch_tokens` a batch."""
    order = sorted(rows, key=lambda r: (-len(r.ids), r.ids))
    batches, start = [], 0
    while start < len(order):
        longest = len(order[start].ids) + extra
        size = max(1, batch_tokens // longest)
        batches.append(order[start : start + size])
        start += size
    return batches


def _computed(
    rows: Sequence[Row],
    what: str,
    kind: str,
    cache: ResultCache | None,
    batches: Callable[[Sequence[Row]], list[list[Row]]],
    compute: Callable[[list[Row]], Sequence[np.ndarray]],
) -> list[np.ndarray]:
    """One result per row: equal rows once, and not at all where the cache has them."""
    distinct = {row.key: row for row in rows}
    done = cache.get(kind, distinct) if cache is not None else {}
    missing = [row for key, row in distinct.items() if key not in done]
    with progress(len(missing), what, "prompt") as bar:
        for batch in batches(missing) if missing else []:
            made = [(r.key, v) for r, v in zip(batch, compute(batch), strict=True)]
            done.update(made)
            if cache is not None:
                cache.put(kind, made)
            bar.update(len(batch))
    log.info(
        "%s: %d rows, %d computed, %d were stored",
        what,
        len(rows),
        len(missing),
        len(distinct) - len(missing),
    )
    return [done[row.key] for row in rows]


def generate(
    model: LanguageModel,
    rows: Sequence[Row],
    saes: SAEs | None = None,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    cache: ResultCache | None = None,
    what: str = "generating",
) -> list[list[int]]:
    """Continuations (new tokens, without the end token), in the order of `rows`.

    Greedy, or sampled where a row says so. Equal rows are computed once, and not at all where the
    cache has them; batches hold prompts of similar length, at most `batch_tokens` tokens with
    padding and what is generated.
    """

    def compute(batch: list[Row]) -> list[np.ndarray]:
        tokens = engine._generate_batch(model, batch, saes or {}, max_new_tokens)
        return [np.asarray(t, dtype=np.float64) for t in tokens]

    found = _computed(
        rows,
        what,
        f"tokens {max_new_tokens}",
        cache,
        lambda some: _batches(some, max_new_tokens, batch_tokens),
        compute,
    )
    return [[int(t) for t in values] for values in found]


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

    The logits are of the row's last `n_last` prompt tokens (1 where not given).
    """

    def cut(some: Sequence[Row]) -> list[list[Row]]:
        most = 1 if n_last is None else max(n_last(r) for r in some)
        vocabulary = int(model.text_config.vocab_size)
        size = max(1, _LOGIT_BYTES // (4 * most * vocabulary))
        batches = _batches(some, 0, batch_tokens)
        return [b[i : i + size] for b in batches for i in range(0, len(b), size)]

    @torch.inference_mode()
    def compute(batch: list[Row]) -> list[np.ndarray]:
        wanted = [1 if n_last is None else n_last(r) for r in batch]
        logits = engine._prefill(model, batch, saes or {}, max(wanted), use_cache=False).logits
        return [
            np.asarray(reader(row, x[-n:].float()), dtype=np.float64)
            for row, x, n in zip(batch, logits, wanted, strict=True)
        ]

    return _computed(rows, what, kind, cache, cut, compute)


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

    def cut(some: Sequence[Row]) -> list[list[Row]]:
        vocabulary = int(model.text_config.vocab_size)
        batches = []
        of_prompt: dict[tuple[int, ...], list[Row]] = {}
        for row in some:
            of_prompt.setdefault(row.ids, []).append(row)
        for ids, same in of_prompt.items():
            most = min(batch_tokens // len(ids), _LOGIT_BYTES // (12 * len(ids) * vocabulary))
            size = max(1, most - 1)
            batches += [same[i : i + size] for i in range(0, len(same), size)]
        return batches

    @torch.inference_mode()
    def compute(batch: list[Row]) -> list[np.ndarray]:
        plain = Row(batch[0].ids)
        n = max(len(plain.ids) - 1, 1)
        logits = engine._prefill(model, [plain, *batch], saes or {}, n, use_cache=False).logits
        logs = logits.float().log_softmax(-1)
        kl = (logs[:1].exp() * (logs[:1] - logs[1:])).sum(-1).mean(-1)
        return [np.asarray([max(float(x), 0.0)]) for x in kl]

    found = _computed(rows, "cost on neutral text", "kl", cache, cut, compute)
    return [float(v[0]) for v in found]
