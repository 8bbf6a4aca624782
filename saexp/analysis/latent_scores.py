"""Input and output scores of latents, and which latents of two SAEs are alike."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse, special
from torch import Tensor

from saexp.context import progress
from saexp.errors import SAEError
from saexp.models.forward import only_at, padded
from saexp.models.hooks import EditFunction, edit, position_ids, run_truncated
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED, Unembedding
from saexp.saes import SparseAutoencoder

log = logging.getLogger(__name__)


THRESHOLD = 1e-6
"""A latent is active above this value, as in the contrast."""
BY_CHANCE = 0.001
"""Probability with which random directions exceed the cosine of `cosine_by_chance`."""
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Nearest:
    """The k latents with the largest cosine to each direction, best first."""

    latents: Int[np.ndarray, "n k"]
    cosines: Float[np.ndarray, "n k"]


@torch.inference_mode()
def nearest_directions(
    directions: Float[Tensor, "n d"],
    decoder: Float[Tensor, "d_sae d"],
    k: int = 1,
    exclude: Int[np.ndarray, " n"] | None = None,
) -> Nearest:
    """The rows of `decoder` nearest to each direction; `exclude[i]` is skipped for direction i.

    A row of zeros has cosine 0 with every direction.
    """
    unit = torch.nn.functional.normalize(directions.float(), dim=-1).to(decoder.device)
    n, d_sae = len(unit), len(decoder)
    k = min(k, d_sae - (exclude is not None))
    step = max(k + 1, _CHUNK_BYTES // (4 * max(decoder.shape[1], n, 1)))
    values, ids = torch.zeros(n, 0), torch.zeros(n, 0, dtype=torch.long)
    for first in range(0, d_sae, step):
        part = torch.nn.functional.normalize(decoder[first : first + step].float(), dim=-1)
        cosines = (unit @ part.T).cpu()
        if exclude is not None:
            inside = np.flatnonzero((exclude >= first) & (exclude < first + len(part)))
            cosines[inside, exclude[inside] - first] = -torch.inf
        top = cosines.topk(min(k, len(part)), dim=-1)
        values = torch.cat([values, top.values], dim=-1)
        ids = torch.cat([ids, top.indices + first], dim=-1)
        best = values.topk(min(k, values.shape[1]), dim=-1)
        values, ids = best.values, ids.gather(-1, best.indices)
    return Nearest(ids.numpy(), values.double().numpy())


def cosine_by_chance(d: int, d_sae: int) -> float:
    """Cosine that the nearest of d_sae random directions exceeds with probability BY_CHANCE.

    The squared cosine of random directions in d dimensions follows Beta(1/2, (d - 1)/2).
    """
    if d < 2:
        return 1.0
    of_one = -np.expm1(np.log1p(-BY_CHANCE) / d_sae)
    return float(np.sqrt(special.betainccinv(0.5, (d - 1) / 2, 2 * of_one)))


@dataclass(frozen=True)
class Firing:
    """Activity of latents by row; `keys` identify rows, so that those of two runs can be joined."""

    keys: pd.Index
    latents: Int[np.ndarray, " n"]
    fires: Bool[np.ndarray, "n_rows n"]


@dataclass(frozen=True)
class Cofiring:
    """Association of the latents of two SAEs, over the rows that both have."""

    n_rows: int
    phi: Float[np.ndarray, "n m"]
    jaccard: Float[np.ndarray, "n m"]


def cofiring(first: Firing, second: Firing) -> Cofiring:
    """Phi (Pearson correlation of binary variables) and Jaccard index of latents' activity.

    Phi is NaN for a latent that is active on all of the shared rows or on none. The Jaccard index,
    the fraction of rows where both are active among those where either is, is NaN where neither is
    ever active.
    """
    index = second.keys.get_indexer(first.keys)
    a, b = first.fires[index >= 0], second.fires[index[index >= 0]]
    n = len(a)
    both = a.T.astype(np.float64) @ b.astype(np.float64)
    n_a, n_b = a.sum(axis=0)[:, None].astype(np.float64), b.sum(axis=0)[None, :].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = (n * both - n_a * n_b) / np.sqrt(n_a * (n - n_a) * n_b * (n - n_b))
        jaccard = both / (n_a + n_b - both)
    return Cofiring(n, phi, jaccard)


def firing(activations: pd.DataFrame, rows: pd.DataFrame, split: str = "test") -> Firing:
    """Activity on one split, from the tables activations.parquet and rows.parquet of a run.

    `activations` holds, latent by latent, a value for every row of `rows` in the same order.
    """
    latents = activations["latent"].drop_duplicates().to_numpy(dtype=np.int64)
    n_rows = len(rows)
    assert len(activations) == n_rows * len(latents), "a value per latent and row"
    values = activations["value"].to_numpy().reshape(len(latents), n_rows).T
    keys = pd.MultiIndex.from_frame(rows[["example_id", "token_index", "text"]])
    chosen = (rows["split"] == split).fillna(False).to_numpy(dtype=bool) & ~keys.duplicated()
    return Firing(keys[chosen], latents, values[chosen] > THRESHOLD)


TOP_TOKENS = 20
"""Number of logit-lens tokens of a latent (k in the paper)."""
TOP_EXAMPLES = 100
"""Number of maximally activating examples of a latent that are scored."""
FEWEST_EXAMPLES = 10
"""Smallest number of active examples with which a latent has an input score."""
AMPLIFICATION = 10.0
"""Coefficient in units of the largest activation of any latent at the position, the paper's s."""
_CHUNK_VALUES = 32 * 2**20


def logit_lens_tokens(
    sae: SparseAutoencoder, model: LanguageModel, latents: Sequence[int], k: int = TOP_TOKENS
) -> Int[Tensor, "n k"]:
    """Tokens whose logits each latent's decoder direction w increases most, best first.

    The logits are W_U (gain * C w), with the gain and centring C of the final norm. The bias of the
    norm is left out: it does not depend on the latent, and with LayerNorm would put the same tokens
    first for all latents. Raises SAEError for SAEs that write to a stream which is not added to the
    residual stream.
    """
    _check(sae, latents)
    lens = Unembedding(model)
    step = max(1, _CHUNK_VALUES // max(len(lens.weight), sae.d_out))
    parts = [
        lens.top_tokens(sae.directions(latents[start : start + step]), k)
        for start in range(0, len(latents), step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, k, dtype=torch.long)


def input_scores(
    sae: SparseAutoencoder,
    model: LanguageModel,
    csr: sparse.csr_array,
    token_ids: Int[np.ndarray, " n_rows"],
    latents: Sequence[int],
    k: int = TOP_TOKENS,
    *,
    text_ids: Int[np.ndarray, " n_rows"] | None = None,
    n_examples: int = TOP_EXAMPLES,
) -> pd.DataFrame:
    """Input scores: columns latent, input_score, n_examples, one row per latent in the given order.

    S_in is the fraction of a latent's maximally activating examples whose token is among its top k
    logit-lens tokens. An example is the token with the largest activation in a text, identified by
    `text_ids`; without them every row of `csr` (`[n_rows, d_sae]`) is an example. The `n_examples`
    strongest are scored, ties in order of rows. Tokens are compared by id; the published code
    re-encodes and compares strings. The score is NaN for latents with fewer than FEWEST_EXAMPLES
    active examples. Raises SAEError as `logit_lens_tokens` does.
    """
    tokens = logit_lens_tokens(sae, model, latents, k).numpy()
    columns = sparse.csc_array(csr[:, np.asarray(latents, dtype=np.int64)])
    scores = np.full(len(latents), np.nan)
    counts = np.zeros(len(latents), dtype=np.int64)
    for i in range(len(latents)):
        of = slice(columns.indptr[i], columns.indptr[i + 1])
        on = columns.data[of] > 0
        rows = columns.indices[of][on]
        rows = rows[np.lexsort((rows, np.negative(columns.data[of][on])))]
        if text_ids is not None:
            rows = rows[np.sort(np.unique(text_ids[rows], return_index=True)[1])]
        rows = rows[:n_examples]
        counts[i] = len(rows)
        if len(rows) >= FEWEST_EXAMPLES:
            scores[i] = np.isin(token_ids[rows], tokens[i]).mean()
    few = int(np.isnan(scores).sum())
    if few:
        log.info(
            "%d of %d latents have no input score because they have fewer than %d active examples",
            few,
            len(latents),
            FEWEST_EXAMPLES,
        )
    return pd.DataFrame({"latent": list(latents), "input_score": scores, "n_examples": counts})


@torch.inference_mode()
def output_scores(
    sae: SparseAutoencoder,
    model: LanguageModel,
    latents: Sequence[int],
    prompts: Sequence[Sequence[int]],
    coefficient: float | int = AMPLIFICATION,
    k: int = TOP_TOKENS,
    *,
    batch_tokens: int = 2048,
) -> pd.DataFrame:
    """Output scores: columns latent, output_score, output_score_clean, top_token, top_rank,
    top_probability.

    Each latent is amplified at the last token of neutral prompts (lists of token ids; the paper
    uses the single prompt "From my experience,"): its activation is increased by coefficient * m,
    where m is the largest activation of any latent there, and the reconstruction error is kept, so
    the stream becomes x + coefficient * m * w. Over the latent's top k logit-lens tokens v,

    S_out = (1 - min_v rank(v) / |V|) * max_v P(v),

    with the rank (from 0) and probability of v as the next token. S_out is between 0 and 1, and
    near 0 where the latent does not make its own tokens probable. Scores are means over prompts.
    `output_score` is of the amplified pass, as published; `output_score_clean` is of the unchanged
    pass, so that the difference is the effect of the intervention. `top_token` is the most probable
    of the latent's tokens in the amplified pass of the first prompt, with its rank and probability.

    One forward pass per latent and prompt, in batches of `batch_tokens` tokens. Raises SAEError as
    `logit_lens_tokens` does, and where no latent is active at the last token of a prompt (m = 0).
    """
    lens = logit_lens_tokens(sae, model, latents, k).to(model.device)
    if not prompts or not all(prompts):
        raise SAEError("output scores need one or more neutral prompts that are not empty")
    writes = sae.hookpoint_out or sae.hookpoint
    total = torch.zeros(len(latents), 2, dtype=torch.float64)
    of_first: list[Tensor] = []
    with progress(len(latents) * len(prompts), "output scores", "pass") as bar:
        for number, prompt in enumerate(prompts):
            ids, mask = padded([prompt], model.pad_id, model.device, padding_side="right")
            last = torch.tensor([len(prompt) - 1])
            x = run_truncated(model, ids, mask, [sae.hookpoint], (torch.zeros_like(last), last))[
                sae.hookpoint
            ]
            largest, scale = _largest(sae, x, number), float(sae.row_scale(x.to(sae.device)))
            clean = _next_token(model, ids, mask, last)
            total[:, 1] += _score(clean.expand(len(latents), -1), lens)[0]
            step = max(1, batch_tokens // len(prompt))
            for start in range(0, len(latents), step):
                chosen = latents[start : start + step]
                n = len(chosen)
                added = coefficient * largest * scale * sae.directions(chosen)
                with edit(model, {writes: _adding_at(last, added)}):
                    logits = _next_token(
                        model, ids.expand(n, -1), mask.expand(n, -1), last.expand(n)
                    )
                scores, token, rank, p = _score(logits, lens[start : start + step])
                total[start : start + step, 0] += scores
                if number == 0:
                    of_first.append(torch.stack([token.double(), rank.double(), p], dim=1))
                bar.update(n)
    mean = (total / len(prompts)).numpy()
    first = torch.cat(of_first).numpy() if of_first else np.zeros((0, 3))
    return pd.DataFrame(
        {
            "latent": list(latents),
            "output_score": mean[:, 0],
            "output_score_clean": mean[:, 1],
            "top_token": first[:, 0].astype(np.int64),
            "top_rank": first[:, 1].astype(np.int64),
            "top_probability": first[:, 2],
        }
    )


def _adding_at(token: Int[Tensor, " 1"], vectors: Float[Tensor, "n d"]) -> EditFunction:
    """An edit that adds one vector per row of the batch at this token."""

    def add(stream: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        new = stream.clone()
        at = token.to(stream.device)
        changed = new[:, at].float() + vectors[:, None].to(stream.device)
        new[:, at] = changed.to(stream.dtype)
        return new

    return add


def _check(sae: SparseAutoencoder, latents: Sequence[int]) -> None:
    """Raise SAEError where the SAE has no logit lens or a latent does not exist."""
    name = sae.metadata.get("name", "the SAE")
    stream = (sae.hookpoint_out or sae.hookpoint).stream
    if stream not in ADDED:
        raise SAEError(
            f"{name} writes to {stream}, which is not added to the residual stream, so its latents "
            "have no logit lens; use an SAE of a residual, attention or MLP output"
        )
    invalid = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if invalid:
        raise SAEError(f"latent={invalid[0]} is out of range: {name} has latents 0-{sae.d_sae - 1}")


def _largest(sae: SparseAutoencoder, x: Tensor, number: int) -> float:
    largest = float(sae.encode(x.to(sae.device)).max())
    if largest <= 0:
        raise SAEError(
            f"no latent is active at the last token of neutral prompt {number}, so there is no "
            "activation to amplify by; choose another prompt"
        )
    return largest


def _next_token(model: LanguageModel, ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
    """Logits after each row's last token, `[n, v]`."""
    with only_at(model, last):
        out = model.hf(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        )
    return out.logits[:, 0]


def _score(
    logits: Float[Tensor, "n v"], tokens: Int[Tensor, "n k"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_out, and the token, rank and probability of the most probable token, per row on the CPU.

    The most probable token is also the one with the best rank.
    """
    wide = logits.float()
    best, which = wide.gather(1, tokens).max(dim=1)
    rank = (wide > best[:, None]).sum(1)
    probability = (best - wide.logsumexp(1)).exp().double().cpu()
    rank, token = rank.cpu(), tokens.gather(1, which[:, None])[:, 0].cpu()
    return (1 - rank.double() / wide.shape[1]) * probability, token, rank, probability
