"""Whether the SAE of a run fits its model, and scores of the selected latents."""

import hashlib
import logging
from collections.abc import Callable, Generator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saexp.activations.shard_files import StoredValues
from saexp.analysis.latent_scores import (
    AMPLIFICATION,
    FEWEST_EXAMPLES,
    TOP_EXAMPLES,
    TOP_TOKENS,
    input_scores,
    output_scores,
)
from saexp.analysis.top_latents import attribute
from saexp.config import RunConfig
from saexp.data.datasets import background_texts
from saexp.data.rows import PositionRows
from saexp.data.tokenization import PositionNotFound, answer_token, space_note, tokenize
from saexp.errors import SAEError
from saexp.interventions.conditions import choose_prompts, position_prompts
from saexp.interventions.results_cache import ResultCache, model_ingredients, shared
from saexp.models import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED
from saexp.pipeline import EncodedLayer, RunData, Session, neighbouring_hookpoints, validates
from saexp.pipeline.collect import Collected
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.saes.loading import sae_identity
from saexp.saes.validation import Fit, Pair, check_fit

log = logging.getLogger(__name__)


_LOW_VARIANCE, _LOW_RELATIVE = 0.2, 0.5
"""A note reports explained variance at the run's positions below the first number, and below this
fraction of that on neutral text."""


def validate_sae(session: Session, layer: EncodedLayer, data: RunData) -> Result:
    """`check_sae` of one layer, and a note where the SAE explains little at the run's positions."""
    result = check_sae(session.cfg, layer.sae, session.model, data)
    if not result.notes:
        result.notes += variance_notes({**layer.metrics, **result.metrics})
    return result


def check_sae(
    cfg: RunConfig, sae: SparseAutoencoder, model: LanguageModel, data: RunData
) -> Result:
    """`check/…` metrics, table `check`, and a note per problem; SAEError with sae.check=error.

    Measured at ordinary positions of neutral text (`activations.norms`), and at the special tokens
    among the run's own positions. The table compares measured quantities with those of the
    catalogue and the SAE's files (unknown where they say nothing), then lists explained variance
    under other readings of the files.
    """
    if not validates(cfg) or data.neutral is None:
        return Result()
    neutral = data.neutral

    def acts(collected: Collected, hookpoint: Hookpoint) -> StoredValues:
        return collected.store.values(hookpoint.layer, hookpoint.stream)

    def ordinary(hookpoints: list[Hookpoint]) -> list[Tensor]:
        rows = torch.from_numpy(np.flatnonzero(neutral.ordinary(hookpoints).mask))
        return [acts(neutral, h)[rows] for h in hookpoints]

    streams = ordinary(sae.hookpoints)
    neighbours: dict[Hookpoint, Tensor | Pair] = {}
    for hookpoints in neighbouring_hookpoints(cfg, sae, model):
        read, *predicted = ordinary(hookpoints)
        neighbours[hookpoints[0]] = (read, predicted[0]) if predicted else read
    rows = torch.from_numpy(_special_rows(data.examples.placement, model))
    special = torch.zeros(len(streams[0]), dtype=torch.bool)
    if len(rows):
        at_special = [acts(data.examples, h)[rows] for h in sae.hookpoints]
        streams = [torch.cat(both) for both in zip(streams, at_special, strict=True)]
        special = torch.cat([special, torch.ones(len(at_special[0]), dtype=torch.bool)])
        neighbours = {}
    x, *target = streams
    fit = check_fit(sae, x, special, neighbours, *target)
    if fit.problems and cfg.sae.check == "error":
        raise SAEError(f"{fit.problems[0]} (sae.check=warn goes on)")
    for problem in fit.problems:
        log.warning("%s", problem)
    excluded = neutral.ordinary(sae.hookpoints).notes("the SAE's check leaves them out")
    notes = [*fit.problems, *(f"neutral text: {note}" for note in excluded)]
    return Result(metrics=_fit_metrics(fit), tables={"check": _table(sae, fit)}, notes=notes)


_ROWS_READ, _MOST_SPECIAL = 2**20, 2**16
"""Rows that are looked at together, and special tokens that are read at most: `check_fit` measures
fewer, evenly spaced."""


def _special_rows(positions: PositionRows, model: LanguageModel) -> np.ndarray:
    """Rows of special tokens, evenly spaced where there are more than are read."""
    parts = []
    for first in range(0, positions.n_rows, _ROWS_READ):
        numbers = positions.numbers(first, min(first + _ROWS_READ, positions.n_rows))
        is_special = np.isin(numbers.token_id, model.tokenizer.all_special_ids)
        parts.append(first + np.flatnonzero(is_special))
    rows = np.concatenate(parts)
    return rows[:: max(1, len(rows) // _MOST_SPECIAL)]


def _fit_metrics(fit: Fit) -> dict[str, float | int | None]:
    assert fit.measurements is not None, "check_fit measures"
    return {
        "check/l0": fit.l0,
        "check/explained_variance": fit.explained_variance,
        "check/explained_variance_legacy": fit.measurements.explained_variance_legacy,
        "check/inactive_fraction": fit.measurements.inactive_fraction,
        "check/mean_norm": fit.measurements.mean_norm,
        "check/n_positions": fit.measurements.n,
        **{
            f"check/expected_{c.name}": c.expected
            for c in fit.comparisons
            if c.expected is not None
        },
    }


def variance_notes(metrics: Mapping[str, float | int | None]) -> list[str]:
    """A note where an SAE that fits neutral text explains little variance where it is analysed.

    Where it does not fit neutral text, `check_sae` reports that.
    """
    here = metrics.get("reconstruction/explained_variance")
    neutral = metrics.get("check/explained_variance")
    if here is None or neutral is None or neutral <= 0:
        return []
    if here >= min(_LOW_VARIANCE, _LOW_RELATIVE * neutral):
        return []
    return [
        f"the SAE explains {here:.3f} of the variance at the positions analysed, {neutral:.3f} on "
        "neutral text: the latents miss most of the model's activity there"
    ]


def _table(sae: SparseAutoencoder, fit: Fit) -> pd.DataFrame:
    """A row per quantity, then one per other reading of the SAE's files."""
    rows = [(c.quantity, c.measured, c.expected, c.tolerance, c.verdict) for c in fit.comparisons]
    readings = [(f"explained variance {name}", value) for name, value in fit.others.items()]
    rows += [(quantity, here, None, "", "other reading") for quantity, here in readings]
    columns = ["quantity", "here", "expected", "tolerance", "verdict"]
    table = pd.DataFrame(rows, columns=columns).astype({"here": float, "expected": float})
    table.insert(0, "hookpoint", sae.hookpoint.name)
    table.insert(0, "layer", sae.hookpoint.layer)
    return table


N_NEUTRAL = 8
"""Neutral prompts on which output scores are measured."""
_PROMPT_TOKENS = 12


def score_latents(
    session: Session, layer: EncodedLayer, data: RunData, table: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """The latent table with columns `input_score` and `output_score` (Arad et al. 2025), and notes.

    Scores are those of the selected latents; NaN for others, and for SAEs of streams that are not
    added to the residual stream. Input scores are measured on the neutral text's rows, one example
    per text. Both scores are kept in the cache, so that a second run needs no model. Notes say why
    scores cannot be computed.
    """
    cfg, model, sae = session.cfg, session.model, layer.sae
    table = table.assign(input_score=np.nan, output_score=np.nan)
    selected = table.loc[table["selected"], "latent"].tolist()
    written = sae.hookpoint_out or sae.hookpoint
    if not selected or written.stream not in ADDED:
        return table, []
    if layer.background is None or data.neutral is None or not model.has_local_weights:
        return table, [
            "input and output scores need the model's weights and neutral text; left out"
        ]
    identity = sae_identity(sae)
    cache = None
    if identity is not None:
        cache = ResultCache(cfg.cache_dir, {**model_ingredients(model), "sae": identity})
    store_key = data.neutral.store.path.name
    try:
        scores = {
            "input_score": _input_scores(model, layer, selected, store_key, cache),
            "output_score": _output_scores(cfg, model, sae, selected, cache),
        }
    except SAEError as error:
        return table, [f"input and output scores: {error}"]
    finally:
        if cache is not None:
            cache.close()
    latents = table.set_index("latent").index
    columns = {name: pd.Series(v).reindex(latents).to_numpy() for name, v in scores.items()}
    return table.assign(**columns), []


def _input_scores(
    model: LanguageModel,
    layer: EncodedLayer,
    latents: list[int],
    store_key: str,
    cache: ResultCache | None,
) -> dict[int, float]:
    """Input score by latent.

    Store, rows and SAE determine a latent's values; the store's key is a hash of the token ids of
    every text.
    """
    background = layer.background
    assert background is not None, "scores need neutral text"
    rows = background.rows
    columns = [
        rows[name].to_numpy(dtype=np.int64) for name in ("text_id", "token_index", "token_id")
    ]
    content = hashlib.sha256(np.stack(columns).astype("<i8").tobytes()).hexdigest()
    kind = f"input score {TOP_TOKENS} {TOP_EXAMPLES} {FEWEST_EXAMPLES} {store_key} {content}"

    def compute(missing: list[int]) -> np.ndarray:
        text_ids, _, token_ids = columns
        scores = input_scores(
            layer.sae, model, background.csr, token_ids, missing, text_ids=text_ids
        )
        return scores["input_score"].to_numpy(dtype=np.float64)

    return _cached_scores(latents, kind, cache, compute)


def _output_scores(
    cfg: RunConfig,
    model: LanguageModel,
    sae: SparseAutoencoder,
    latents: list[int],
    cache: ResultCache | None,
) -> dict[int, float]:
    """Output score by latent."""
    prompts = _neutral_prompts(cfg, model)
    kind = f"output score {TOP_TOKENS} {AMPLIFICATION} {prompts!r}"

    def compute(missing: list[int]) -> np.ndarray:
        scores = output_scores(sae, model, missing, prompts)
        return scores["output_score"].to_numpy(dtype=np.float64)

    return _cached_scores(latents, kind, cache, compute)


def _cached_scores(
    latents: list[int],
    kind: str,
    cache: ResultCache | None,
    compute: Callable[[list[int]], np.ndarray],
) -> dict[int, float]:
    """A score by latent, computed where the cache does not have it."""
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


def attribute_latents(session: Session, layer: EncodedLayer, data: RunData) -> Result:
    """Table `attribution`: each latent's effect on the answer's logit, per group of test prompts.

    With intervals over entities, at the tokens that the intervention changes. A note counts the
    prompts without an answer or without those tokens.
    """
    cfg, model = session.cfg, session.model
    test = [e for e in data.examples.examples.examples if e.split == "test"]
    chosen = choose_prompts(test, cfg.intervention.n_prompts, cfg.seed)
    prompts = position_prompts(chosen, model, cfg.intervention, cfg.dataset.max_length)
    usable, answers, n_unusable = [], [], 0
    for placed in prompts.all():
        try:
            if not placed.example.answers:
                raise PositionNotFound("no answer")
            if not placed.positions:
                raise PositionNotFound("no position in the prompt")
            answer = placed.example.answers[0]
            answers.append(answer_token(model.tokenizer, placed.example, answer))
            usable.append(placed)
        except PositionNotFound:
            n_unusable += 1
    notes = prompts.notes("prompts not attributed")
    if n_unusable:
        notes.append(
            f"attribution: {n_unusable} prompts have no answer, or no token that the intervention "
            "changes"
        )
    notes += space_note([p.example for p in usable])
    if not usable:
        return Result(notes=notes)
    attributions = attribute(
        model, layer.sae, [p.tokens.ids for p in usable], [p.positions for p in usable], answers
    )
    table = attributions.table(
        [str(p.example.group) for p in usable], [p.example.unit for p in usable], cfg.seed
    )
    return Result(tables={"attribution": table}, notes=[*notes, *attributions.notes])
