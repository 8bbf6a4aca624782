"""Whether the SAE of a run fits its model, and scores of the selected latents."""

import hashlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

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
from saexp.errors import ConfigError, SAEError
from saexp.interventions.conditions import choose_prompts, placed_prompts
from saexp.interventions.results_cache import ResultCache, model_ingredients
from saexp.interventions.sharing import shared
from saexp.latents.encode import Latents
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.weights import ADDED
from saexp.pipeline.collect import Gathered
from saexp.results import TaskResult
from saexp.saes.loading import ESTIMATE, estimate_factor, sae_identity
from saexp.saes.sae import SparseAutoencoder
from saexp.saes.validation import Fit, Pair, check_fit

log = logging.getLogger(__name__)


_LITTLE, _FAR_BELOW = 0.2, 0.5
"""Explained variance at the positions is told below this, and this share of neutral text's."""


def neighbours(cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel) -> list[Hookpoint]:
    """The SAE's streams one block down and up, where the check wants them."""
    return [h for shifted in _shifted(cfg, sae, model) for h in shifted]


def _shifted(cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel) -> list[list[Hookpoint]]:
    """Per neighbouring block: the stream, or the two of a transcoder."""
    at = [h.stored for h in sae.hookpoints]
    if cfg.sae.check == "off" or cfg.sae.loader == "random" or cfg.collector.name == "imported":
        return []
    if any(h.stream == "embed" for h in at):
        return []
    return [
        [Hookpoint(h.layer + step, h.stream) for h in at]
        for step in (-1, 1)
        if all(0 <= h.layer + step < model.n_layers for h in at)
    ]


def settle_factor(cfg: RunConfig, sae: SparseAutoencoder, neutral: Gathered | None) -> list[str]:
    """Estimate the scaling of the SAE's inputs from neutral text, where the run asks for that.

    Returns the notes that say so; nothing may be encoded before.
    """
    if cfg.sae.norm_factor != ESTIMATE:
        return []
    if neutral is None:
        raise ConfigError(
            "sae.norm_factor=estimate needs activations of neutral text; type "
            "collector.neutral_path=PATH, or a number"
        )
    ordinary = neutral.ordinary(sae.hookpoints).mask
    chunks = (
        acts[torch.from_numpy(ordinary[n : n + len(acts)])]
        for n, acts in neutral.store.chunks(sae.hookpoint, 8192)
    )
    factor = estimate_factor(sae, chunks)
    return [
        f"sae.norm_factor={factor:.6g} was estimated from {int(ordinary.sum())} ordinary positions "
        f"of neutral text at {sae.hookpoint.name}: its files do not give it"
    ]


def with_neighbours(
    cfg: RunConfig, ahead: Sequence[tuple[int, str | None]]
) -> list[tuple[int, str | None]]:
    """What the other cells of a sweep will want of the neutral text: their neighbours too."""
    near = (0,) if cfg.sae.check == "off" or cfg.sae.loader == "random" else (-1, 0, 1)
    wanted = {(n + step, stream) for n, stream in ahead for step in near if n + step >= 0}
    return sorted(wanted, key=str)


def check_sae(
    cfg: RunConfig,
    sae: SparseAutoencoder,
    model: LanguageModel,
    gathered: Gathered,
    neutral: Gathered | None,
) -> TaskResult:
    """`check/…` metrics, table `check`, and a note per problem; SAEError with sae.check=error.

    Looks at ordinary positions of neutral text (`activations.norms`), and at the special tokens
    among the run's own positions. The table has
    what was measured beside what catalogue and files say (unknown where they say nothing), then
    explained variance under other readings.
    """
    if cfg.sae.check == "off" or cfg.sae.loader == "random" or neutral is None:
        return TaskResult()
    own = gathered.placement.rows["token_id"].isin(model.tokenizer.all_special_ids).to_numpy()
    mark = torch.tensor(own)

    def acts(gathered: Gathered, hookpoint: Hookpoint) -> Tensor:
        return gathered.store.acts(hookpoint.layer, hookpoint.stream)

    def ordinary(hookpoints: list[Hookpoint]) -> list[Tensor]:
        rows = torch.from_numpy(np.flatnonzero(neutral.ordinary(hookpoints).mask))
        return [acts(neutral, h)[rows] for h in hookpoints]

    streams = ordinary(sae.hookpoints)
    near: dict[Hookpoint, Tensor | Pair] = {}
    for at in _shifted(cfg, sae, model):
        read, *predicted = ordinary(at)
        near[at[0]] = (read, predicted[0]) if predicted else read
    special = torch.zeros(len(streams[0]), dtype=torch.bool)
    if bool(mark.any()):
        mine = [acts(gathered, h)[mark] for h in sae.hookpoints]
        streams, near = [torch.cat(both) for both in zip(streams, mine, strict=True)], {}
        special = torch.cat([special, torch.ones(len(mine[0]), dtype=torch.bool)])
    x, *target = streams
    fit = check_fit(sae, x, special, near, *target)
    if fit.problems and cfg.sae.check == "error":
        raise SAEError(f"{fit.problems[0]} (sae.check=warn goes on)")
    for problem in fit.problems:
        log.warning("%s", problem)
    metrics: dict[str, float | int | None] = {
        "check/l0": fit.l0,
        "check/explained_variance": fit.explained_variance,
    }
    assert fit.seen is not None, "check_fit measures"
    metrics |= {
        "check/explained_variance_legacy": fit.seen.explained_variance_legacy,
        "check/silent_fraction": fit.seen.silent_fraction,
        "check/mean_norm": fit.seen.mean_norm,
        "check/n_positions": fit.seen.n,
    }
    metrics |= {
        f"check/expected_{c.name}": c.expected for c in fit.compared if c.expected is not None
    }
    left_out = neutral.ordinary(sae.hookpoints).notes("the SAE's check leaves them out")
    notes = [*fit.problems, *(f"neutral text: {note}" for note in left_out)]
    return TaskResult(metrics=metrics, tables={"check": _table(sae, fit)}, notes=notes)


def fits_here(metrics: Mapping[str, float | int | None]) -> list[str]:
    """A note where an SAE that fits neutral text explains nearly nothing where it is analysed.

    Where it does not fit neutral text, `check_sae` has said so.
    """
    here = metrics.get("reconstruction/explained_variance")
    neutral = metrics.get("check/explained_variance")
    if here is None or neutral is None or neutral <= 0:
        return []
    if here >= min(_LITTLE, _FAR_BELOW * neutral):
        return []
    return [
        f"the SAE explains {here:.3f} of the variance at the positions analysed, {neutral:.3f} on "
        "neutral text: most of what the model holds there is in no latent"
    ]


def _table(sae: SparseAutoencoder, fit: Fit) -> pd.DataFrame:
    """A row per quantity, then one per other reading."""
    rows = [(c.quantity, c.here, c.expected, c.tolerance, c.verdict) for c in fit.compared]
    named = [(f"explained variance {name}", value) for name, value in fit.others.items()]
    rows += [(quantity, here, None, "", "other reading") for quantity, here in named]
    columns = ["quantity", "here", "expected", "tolerance", "verdict"]
    table = pd.DataFrame(rows, columns=columns).astype({"here": float, "expected": float})
    table.insert(0, "hookpoint", sae.hookpoint.name)
    table.insert(0, "layer", sae.hookpoint.layer)
    return table


N_NEUTRAL = 8
"""Neutral prompts on which output scores are measured."""
_PROMPT_TOKENS = 12


def add_scores(
    cfg: RunConfig,
    table: pd.DataFrame,
    model: LanguageModel,
    sae: SparseAutoencoder,
    background: Latents | None,
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
    if background is None or not model.has_local_weights:
        return ["input and output scores need the model's weights and neutral text; left out"]
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
