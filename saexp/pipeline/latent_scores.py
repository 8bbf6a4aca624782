"""Scores and attribution of selected latents."""

import hashlib
from collections.abc import Callable, Generator

import numpy as np
import pandas as pd

from saexp.analysis.attribution import attribute
from saexp.analysis.latent_scores import (
    AMPLIFICATION,
    FEWEST_EXAMPLES,
    TOP_EXAMPLES,
    TOP_TOKENS,
    input_scores,
    output_scores,
)
from saexp.config import RunConfig
from saexp.data.datasets import background_texts
from saexp.data.positions import Unplaced
from saexp.data.prompts import answer_token, space_note
from saexp.data.tokenization import tokenize
from saexp.errors import SAEError
from saexp.interventions.conditions import choose_prompts, placed_prompts
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.interventions.sharing import shared
from saexp.latents.encode import Latents
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED
from saexp.pipeline.collect import Gathered
from saexp.results import TaskResult
from saexp.saes.loading import sae_identity
from saexp.saes.sae import SparseAutoencoder

N_NEUTRAL = 8
"""Neutral prompts on which output scores are measured."""
_PROMPT_TOKENS = 12


def add_scores(
    cfg: RunConfig,
    table: pd.DataFrame,
    model: LanguageModel,
    sae: SparseAutoencoder,
    background: Latents,
    store_key: str,
) -> list[str]:
    """Give the latent table columns `input_score` and `output_score` (Arad et al. 2025).

    Of the selected latents; NaN for others, and for SAEs of streams that are not added.

    Input scores are of the neutral text's rows, one example a text; `store_key` is the key of the
    activation store that holds them. Both scores are kept in the cache, so that a second run needs
    no model. Returns notes on scores that cannot be had.
    """
    table["input_score"] = table["output_score"] = np.nan
    chosen = table.loc[table["selected"], "latent"].tolist()
    written = sae.hookpoint_out or sae.hookpoint
    if not chosen or written.stream not in ADDED:
        return []
    identity = sae_identity(sae)
    cache = None
    if identity is not None:
        cache = ResultCache(cfg.cache_dir, {**model_ingredients(model), "sae": identity})
    try:
        scores = {
            "input_score": _input_scores(model, sae, chosen, background, store_key, cache),
            "output_score": _output_scores(cfg, model, sae, chosen, cache),
        }
    except SAEError as error:
        return [f"input and output scores: {error}"]
    finally:
        if cache is not None:
            cache.close()
    of_latent = table.set_index("latent").index
    for name, values in scores.items():
        table[name] = pd.Series(values).reindex(of_latent).to_numpy()
    return []


def _input_scores(
    model: LanguageModel,
    sae: SparseAutoencoder,
    latents: list[int],
    background: Latents,
    store_key: str,
    cache: ResultCache | None,
) -> dict[int, float]:
    """By latent. A latent's values at the rows are fixed by the store, the rows and the SAE: the
    store's key is made of the token ids of every text, so that another text is another key."""
    rows = background.rows
    columns = [
        rows[name].to_numpy(dtype=np.int64) for name in ("text_id", "token_index", "token_id")
    ]
    content = hashlib.sha256(np.stack(columns).astype("<i8").tobytes()).hexdigest()
    kind = f"input score {TOP_TOKENS} {TOP_EXAMPLES} {FEWEST_EXAMPLES} {store_key} {content}"

    def compute(missing: list[int]) -> np.ndarray:
        text_ids, _, token_ids = columns
        found = input_scores(sae, model, background.csr, token_ids, missing, text_ids=text_ids)
        return found["input_score"].to_numpy(dtype=np.float64)

    return _kept(latents, kind, cache, compute)


def _output_scores(
    cfg: RunConfig,
    model: LanguageModel,
    sae: SparseAutoencoder,
    latents: list[int],
    cache: ResultCache | None,
) -> dict[int, float]:
    prompts = _neutral_prompts(cfg, model)
    kind = f"output score {TOP_TOKENS} {AMPLIFICATION} {prompts!r}"

    def compute(missing: list[int]) -> np.ndarray:
        found = output_scores(sae, model, missing, prompts)
        return found["output_score"].to_numpy(dtype=np.float64)

    return _kept(latents, kind, cache, compute)


def _kept(
    latents: list[int],
    kind: str,
    cache: ResultCache | None,
    compute: Callable[[list[int]], np.ndarray],
) -> dict[int, float]:
    """A score by latent: from the cache, the missing ones computed."""
    if cache is None:
        return dict(zip(latents, compute(latents).tolist(), strict=True))

    def batches(missing: list[int]) -> Generator[list[tuple[int, np.ndarray]], None, None]:
        yield [(latent, np.array([v])) for latent, v in zip(missing, compute(missing), strict=True)]

    keys = {cache.key(kind, (latent,)): latent for latent in latents}
    results = cache.get(keys)
    missing = {key: latent for key, latent in keys.items() if key not in results}
    for batch in shared(cache, missing, batches):
        results.update(batch.results)
    return {latent: float(results[key][0]) for key, latent in keys.items()}


def _neutral_prompts(cfg: RunConfig, model: LanguageModel) -> list[tuple[int, ...]]:
    texts = background_texts(cfg.dataset)[:N_NEUTRAL]
    tokens = tokenize(texts, model.tokenizer, _PROMPT_TOKENS, model.prepend_bos)
    return [t.ids for t in tokens]


def attribution(
    cfg: RunConfig, model: LanguageModel, sae: SparseAutoencoder, gathered: Gathered
) -> TaskResult:
    """Table `attribution`: what each latent does to the answer's logit, per group of test prompts,
    with intervals over entities.

    At the tokens that the causal test changes. Prompts without an answer, or without those tokens,
    are counted in a note.
    """
    test = [e for e in gathered.examples.examples if e.split == "test"]
    chosen = choose_prompts(test, cfg.intervention.n_prompts, cfg.seed)
    prompts = placed_prompts(chosen, model, cfg.intervention, cfg.dataset.max_length)
    usable, answers, lacking = [], [], 0
    for placed in prompts.all():
        try:
            if not placed.example.answers:
                raise Unplaced("no answer")
            if not placed.positions:
                raise Unplaced("no position in the prompt")
            answer = placed.example.answers[0]
            answers.append(answer_token(model.tokenizer, placed.example, answer))
            usable.append(placed)
        except Unplaced:
            lacking += 1
    notes = prompts.notes("prompts not attributed")
    if lacking:
        notes.append(f"attribution: {lacking} prompts have no answer, or no token to look at")
    notes += space_note([p.example for p in usable])
    if not usable:
        return TaskResult(notes=notes)
    found = attribute(
        model, sae, [p.tokens.ids for p in usable], [p.positions for p in usable], answers
    )
    table = found.table(
        [str(p.example.group) for p in usable], [p.example.unit for p in usable], cfg.seed
    )
    return TaskResult(tables={"attribution": table}, notes=[*notes, *found.notes])
