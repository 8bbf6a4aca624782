"""Which latents are worth steering: their scores, and their attribution to answers."""

import numpy as np
import pandas as pd
from scipy import sparse

from saexp.analysis.attribution import attribute
from saexp.analysis.scores import AMPLIFICATION, TOP_TOKENS, input_scores, output_scores
from saexp.config import RunConfig
from saexp.data.answer_tokens import answer_token, space_note
from saexp.data.datasets import background_texts
from saexp.data.positions import Unplaced
from saexp.data.tokens import tokenize
from saexp.errors import SAEError
from saexp.interventions.cache import ResultCache
from saexp.interventions.prompts import choose_prompts, placed_prompts
from saexp.latents.encode import Latents
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED
from saexp.results import TaskResult
from saexp.saes.base import SparseAutoencoder
from saexp.tasks.gathering import Gathered

N_NEUTRAL = 8
"""Neutral prompts on which output scores are measured."""
_PROMPT_TOKENS = 12


def add_scores(
    cfg: RunConfig,
    table: pd.DataFrame,
    model: LanguageModel,
    sae: SparseAutoencoder,
    background: Latents,
) -> list[str]:
    """Give the latent table columns `input_score` and `output_score` (Arad et al. 2025).

    Of the selected latents; NaN for others, and for SAEs of streams that are not added.

    Input scores are of the neutral text's rows, one example a text. Output scores are kept in the
    cache, so that a second run needs no model. Returns notes on scores that cannot be had.
    """
    table["input_score"] = table["output_score"] = np.nan
    chosen = table.loc[table["selected"], "latent"].tolist()
    written = sae.hookpoint_out or sae.hookpoint
    if not chosen or written.stream not in ADDED:
        return []
    rows = background.rows
    try:
        found = _kept(cfg, model, sae, chosen, rows, background.csr)
    except SAEError as error:
        return [f"input and output scores: {error}"]
    of_latent = table.set_index("latent").index
    for name in ("input_score", "output_score"):
        table[name] = found[name].reindex(of_latent).to_numpy()
    return []


def _kept(
    cfg: RunConfig,
    model: LanguageModel,
    sae: SparseAutoencoder,
    latents: list[int],
    rows: pd.DataFrame,
    csr: sparse.csr_array,
) -> pd.DataFrame:
    """Scores by latent: from the cache, the missing ones computed."""
    prompts = _neutral_prompts(cfg, model)
    content = (rows["text_id"].to_numpy().tolist(), rows["token_index"].to_numpy().tolist())
    determined_by = {
        "model": model.fingerprint,
        "dtype": str(model.dtype),
        "sae": sae.metadata.get("fingerprint"),
        "prompts": prompts,
        "rows": hash(tuple(map(tuple, content))),
        "k": TOP_TOKENS,
        "s": AMPLIFICATION,
    }
    usable = sae.metadata.get("fingerprint") is not None
    cache = ResultCache(cfg.cache_dir, determined_by) if usable else None
    keys = {(latent,): latent for latent in latents}
    found = cache.get("scores", keys) if cache else {}
    missing = [latent for key, latent in keys.items() if key not in found]
    if missing:
        reading = input_scores(
            sae,
            model,
            csr,
            rows["token_id"].to_numpy(dtype=np.int64),
            missing,
            text_ids=rows["text_id"].to_numpy(dtype=np.int64),
        )
        writing = output_scores(sae, model, missing, prompts)
        made = [
            ((latent,), np.array([a, b], dtype=np.float64))
            for latent, a, b in zip(
                missing, reading["input_score"], writing["output_score"], strict=True
            )
        ]
        found |= dict(made)
        if cache:
            cache.put("scores", made)
    if cache:
        cache.close()
    values = np.array([found[latent,] for latent in latents])
    return pd.DataFrame(values, index=latents, columns=["input_score", "output_score"])


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
