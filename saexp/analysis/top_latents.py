"""The latents that are most active, and those that an answer's logit is attributed to.

Attribution: direct effects, and effects by gradient. Shapes: b prompts of a batch, d the stream's
width, n positions."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from saexp.analysis import AnalysisInputs
from saexp.analysis.group_statistics import CorpusAnalyzer, CorpusInputs
from saexp.config import TopFeaturesConfig
from saexp.context import progress
from saexp.data.rows import CorpusRows
from saexp.data.tokenization import token_pieces
from saexp.errors import DataError, counted
from saexp.latents import CHUNK_BYTES, Latents
from saexp.latents.statistics import Moments, by_unit, moments
from saexp.models.forward import by_regime, check_positions
from saexp.models.loading import LanguageModel
from saexp.models.unembedding import ADDED, LogitGradient, Unembedding, logit_gradient
from saexp.results import Result
from saexp.saes import SparseAutoencoder
from saexp.stats import mean_interval

log = logging.getLogger(__name__)


class TopFeaturesAnalyzer(CorpusAnalyzer):
    """Registry kind `analyzer`, name `top_features`; takes several layers, one after another."""

    several_layers = True
    reads_acts = False
    ordinary_only = True

    def __init__(self, cfg: TopFeaturesConfig) -> None:
        super().__init__(cfg)
        self.top_k, self.n_texts, self.by = cfg.top_k, cfg.n_texts, cfg.by

    def analyze(self, inputs: AnalysisInputs) -> Result:
        """Metrics `top_features/…`, tables `top_features` and `tokens`.

        Statistics are over all ordinary positions, whatever their group: `max`, `mean` (including
        zeros), `frequency` (fraction of positions where a latent is active) and `background_freq`
        (the same on neutral text). Only active latents are ranked, ties by the lower index.
        `tokens` holds all positions of the `n_texts` texts with the largest activation of each top
        latent.
        """
        inputs = dataclasses.replace(inputs, latents=inputs.ordinary_latents, ordinary=None)
        rows = inputs.latents.rows
        csr = inputs.latents.csr
        of_rows = moments(csr, np.ones(len(rows), dtype=bool), threshold=0.0)
        table, top, result = self._ranked(of_rows, inputs.layer, inputs.background)
        columns = sparse.csc_array(csr[:, top])
        strongest, tokens = [], []
        examples = rows["example_id"].to_numpy()
        rows = rows.assign(token=_token_texts(inputs))
        for column, latent in enumerate(top.tolist()):
            values = np.asarray(columns[:, [column]].todense()).ravel()
            strongest.append(int(values.argmax()))
            tokens.append(self._tokens(rows, examples, values, latent, inputs.layer))
        table["example"] = examples[strongest]
        table["token"] = [_token_text(inputs, row) for row in strongest]
        empty = self._tokens(rows.iloc[:0], examples[:0], np.zeros(0), 0, inputs.layer)
        result.tables = {"top_features": table, "tokens": pd.concat(tokens or [empty])}
        return result

    def analyze_corpus(self, inputs: CorpusInputs) -> Result:
        """As `analyze`; the examples are contexts."""
        latents, positions = inputs.latents, inputs.latents.positions
        table, top, result = self._ranked(latents.moments(), inputs.layer, inputs.background)
        tally = latents.tally(top, self.n_texts)
        strongest = [tally.top(i) for i in range(len(top))]
        rows_of = {
            latent: np.concatenate([latents.rows_of(int(text)) for text in of_latent["text"]])
            for latent, of_latent in zip(top.tolist(), strongest, strict=True)
        }
        shown = [_described(positions, at["row"].to_numpy()[:1]) for at in strongest]
        tokens = []
        for latent, values in latents.values(rows_of).items():
            of_latent = {"layer": inputs.layer, "latent": latent}
            part = _described(positions, rows_of[latent]).assign(value=values.astype(np.float64))
            tokens.append(part.assign(**of_latent)[[*of_latent, *part.columns]])
        for column in ("example", "token"):
            table[column] = [one[column].iloc[0] for one in shown]
        empty = pd.DataFrame(
            columns=["layer", "latent", "example", "token", "token_index", "value"]
        )
        result.tables = {"top_features": table, "tokens": pd.concat(tokens or [empty])}
        return result

    def _ranked(
        self, of_rows: Moments, layer: int, background: Latents | None
    ) -> tuple[pd.DataFrame, Int[np.ndarray, " n_top"], Result]:
        """(the table without examples, the top latents, metrics and notes)."""
        rankings = {"max": of_rows.maximum, "mean": of_rows.mean, "frequency": of_rows.frequency}
        key = rankings[self.by]
        active = np.flatnonzero(of_rows.active)
        top = active[np.argsort(-key[active], kind="stable")][: self.top_k]
        table = pd.DataFrame(
            {
                "layer": layer,
                "rank": np.arange(1, len(top) + 1),
                "latent": top,
                "max": of_rows.maximum[top],
                "mean": of_rows.mean[top],
                "frequency": of_rows.frequency[top],
                "n_active": of_rows.active[top],
                "background_freq": _background(background, len(of_rows.active))[top],
            }
        )
        metrics: dict[str, float | int | None] = {
            "top_features/n_positions": of_rows.n,
            "top_features/n_fired": len(active),
            "top_features/best_latent": int(top[0]) if len(top) else None,
            f"top_features/best_{self.by}": float(key[top[0]]) if len(top) else None,
        }
        notes = []
        if len(top) < self.top_k:
            n = counted(len(top), "latent is", "latents are") if len(top) else "no latent is"
            only = "only " if len(top) else ""
            notes.append(f"layer {layer}: {only}{n} active at the analysed positions")
        return table, top, Result(metrics=metrics, notes=notes)

    def _tokens(
        self,
        rows: pd.DataFrame,
        examples: np.ndarray,
        values: np.ndarray,
        latent: int,
        layer: int,
    ) -> pd.DataFrame:
        """Activations of one latent at all positions of the texts with its largest maxima."""
        codes, names = pd.factorize(examples)
        highest = np.zeros(len(names))
        np.maximum.at(highest, codes, values)
        order = np.argsort(-highest, kind="stable")[: self.n_texts]
        texts = order[highest[order] > 0]
        rank = np.full(len(names), -1)
        rank[texts] = np.arange(len(texts))
        chosen = np.flatnonzero(rank[codes] >= 0) if len(names) else np.zeros(0, dtype=int)
        chosen = chosen[np.argsort(rank[codes[chosen]], kind="stable")]
        part: dict[str, Any] = {
            "layer": layer,
            "latent": latent,
            "example": examples[chosen],
            "token": rows["token"].to_numpy()[chosen],
            "token_index": rows["token_index"].to_numpy()[chosen],
            "value": values[chosen].astype(np.float64),
        }
        return pd.DataFrame(part)


def _token_texts(inputs: AnalysisInputs) -> pd.Series:
    """Each position's part of its text; without texts, the token as the vocabulary spells it."""
    rows = inputs.latents.rows
    if inputs.model is None or not inputs.texts:
        return rows["token"]
    texts = np.empty(len(rows), dtype=object)
    indices = rows["token_index"].to_numpy()
    text_ids = rows["text_id"].to_numpy()
    for group in rows.groupby(["text_id", "example_id"], sort=False).indices.values():
        of_text = np.asarray(group)
        chosen, which = np.unique(indices[of_text], return_inverse=True)
        text = inputs.texts[int(text_ids[of_text[0]])]
        parts = token_pieces(text, inputs.model.tokenizer, chosen.tolist())
        texts[of_text] = np.array(parts, dtype=object)[which]
    return pd.Series(texts, index=rows.index)


def _token_text(inputs: AnalysisInputs, row: int) -> str:
    """One position's part of its text; a part of a character is shown as the whole character."""
    position = inputs.latents.rows.iloc[row]
    if inputs.model is None or not inputs.texts:
        return str(position["token"])
    text = inputs.texts[int(position["text_id"])]
    return token_pieces(text, inputs.model.tokenizer, [int(position["token_index"])])[0]


def _described(positions: CorpusRows, rows: Int[np.ndarray, " n"]) -> pd.DataFrame:
    """Context, token and its index of these rows."""
    table = []
    for row in rows.tolist():
        [text], [index], _ = positions.numbers(row, row + 1)
        [token] = positions.pieces(int(text), int(index), int(index) + 1)
        table.append({"example": str(text), "token": token, "token_index": int(index)})
    return pd.DataFrame(table, columns=["example", "token", "token_index"])


def _background(neutral: Latents | None, d_sae: int) -> np.ndarray:
    """Fraction of neutral tokens on which each latent is active; NaN without neutral text."""
    if neutral is None:
        return np.full(d_sae, np.nan)
    return moments(neutral.csr, np.ones(len(neutral), dtype=bool), threshold=0.0).frequency


MIN_ACTIVE = 5
"""Units in which a latent must be active for its mean effect to have an interval."""
_COLUMNS = 4096
"""Latents of one dense chunk."""


@dataclass(frozen=True)
class Attribution:
    """Effects per prompt and active latent, summed over positions, `[n_prompts, d_sae]`.

    All three matrices store the same entries: the latents that are active at a position.
    """

    activation: sparse.csr_array
    direct: sparse.csr_array | None
    """None for streams without a direct path (attn_z, mlp_in)."""
    gradient: sparse.csr_array
    logit: np.ndarray
    """`[n_prompts]`: logit of the answer, minus that of the foil where there is one."""
    notes: list[str]

    def table(
        self, groups: Sequence[str], units: Sequence[object] | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """Means over the units of each group, with 0 for inactive latents.

        `units` are the entities of the prompts, whose prompts are averaged first; without them
        every prompt is a unit. One row per group and latent active in it, in order of |gradient|,
        with columns group, latent, direct, gradient, activation, 95% limits `_ci_low` and
        `_ci_high` of these three (`mean_interval`), n_active (prompts where the latent is active),
        n_prompts and n_units. Latents active in fewer than `MIN_ACTIVE` units have no interval,
        because the coverage of the bootstrap is too low.
        """
        units = range(len(self.logit)) if units is None else units
        for what, prompt_labels in (("groups", groups), ("units", units)):
            if len(prompt_labels) != len(self.logit):
                raise DataError(
                    f"{len(prompt_labels)} {what} for {len(self.logit)} prompts; give each one"
                )
        labels = np.asarray(groups, dtype=object)
        d_sae = cast(tuple[int, int], self.gradient.shape)[1]
        parts = []
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(labels == group)
            on = sparse.csr_array(self.gradient[rows])
            n_active = np.bincount(on.indices, minlength=d_sae)
            latents = np.flatnonzero(n_active)
            columns: dict[str, Any] = {"group": group, "latent": latents}
            of_row = pd.factorize(np.array([units[i] for i in rows.tolist()], dtype=object))[0]
            for name in ("direct", "gradient", "activation"):
                whole: sparse.csr_array | None = getattr(self, name)
                mean = low = high = np.full(len(latents), np.nan)
                if whole is not None:
                    of_unit, _ = by_unit(sparse.csr_array(whole[rows][:, latents]), of_row)
                    mean = np.asarray(of_unit.mean(0))
                    low, high = _intervals(of_unit, seed)
                columns |= {name: mean, f"{name}_ci_low": low, f"{name}_ci_high": high}
            columns |= {"n_active": n_active[latents], "n_prompts": len(rows)}
            columns["n_units"] = len(np.unique(of_row))
            part = pd.DataFrame(columns)
            order = np.argsort(-part["gradient"].abs().to_numpy(), kind="stable")
            parts.append(part.iloc[order])
        return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)


def _intervals(
    of_unit: sparse.csr_array, seed: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Intervals of each latent's mean, `[n_units, k]` -> `[k]`; NaN for rare latents."""
    columns = sparse.csc_array(of_unit)
    n_active = np.diff(columns.indptr)
    low, high = np.full((2, len(n_active)), np.nan)
    some = np.flatnonzero(n_active >= MIN_ACTIVE)
    for start in range(0, len(some), _COLUMNS):
        part = some[start : start + _COLUMNS]
        low[part], high[part] = mean_interval(columns[:, part].toarray(), seed)
    return low, high


@torch.inference_mode(False)
def attribute(
    model: LanguageModel,
    sae: SparseAutoencoder,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    answers: Sequence[int],
    foils: Sequence[int] | None = None,
    *,
    batch_tokens: int = 4096,
) -> Attribution:
    """Effects of active latents on logit(answer) - logit(foil) after each prompt's last token.

    `prompts` are unpadded token ids, `positions` indices into them, `answers` and `foils` one token
    id each. With a a latent's activation, w its direction in the model's own scale (times the row's
    scale where the SAE scales each input by itself), both sum over the positions:

    direct = a * w . C(g * (W_U[answer] - W_U[foil])) / s, where the final norm is g * C x / s + b
    and s is frozen at the position's own value (direct logit attribution: Elhage et al. 2021, and
    the logit lens). At the last token this is the path that skips all later blocks, exactly; at an
    earlier one it is what the latent adds to that token's own prediction, and reaches the last
    token through attention only. It is of the logits before soft-capping.

    gradient = a * w . d(logit difference) / d(stream at the SAE's hookpoint), the first-order
    effect through the whole rest of the model, soft-cap included (attribution patching: Nanda 2023;
    on latents: Marks et al. 2024, arXiv 2403.19647, with a baseline of 0).

    A transcoder's latents are read at its hookpoint and act where it writes. Memory: one forward
    and backward pass of `batch_tokens` padded tokens, and one dense chunk of latents. Raises
    DataError for prompts without a position, positions outside, and lists of unequal length.
    """
    _check(prompts, positions, answers, foils)
    check_positions(model, max(map(len, prompts)))
    unembedding = Unembedding(model)
    writes = sae.hookpoint_out or sae.hookpoint
    is_direct = writes.stream in ADDED
    parts: list[_Entries] = []
    logit = np.zeros(len(prompts))
    with progress(len(prompts), "attributing", "prompt") as bar:
        for batch in _batches(model, prompts, batch_tokens):
            of_answer = torch.tensor([answers[i] for i in batch])
            of_foil = None if foils is None else torch.tensor([foils[i] for i in batch])
            gradients = logit_gradient(
                model,
                [tuple(prompts[i]) for i in batch],
                [positions[i] for i in batch],
                of_answer,
                of_foil,
                reads=sae.hookpoint,
                writes=writes,
                norm=unembedding.norm,
            )
            logit[batch] = gradients.logit.numpy()
            readout = _readouts(unembedding, gradients, of_answer, of_foil) if is_direct else None
            parts += _entries(sae, gradients, readout, np.asarray(batch)[gradients.rows.numpy()])
            bar.update(len(batch))
    notes = []
    if not is_direct:
        notes.append(
            f"{writes.stream} is not added to the residual stream, so no latent has a direct effect"
        )
    elif unembedding.softcap:
        notes.append(
            f"direct effects are of logits before the soft-cap at {unembedding.softcap:g}; "
            "gradients are of those after it"
        )
    shape = (len(prompts), sae.d_sae)
    log.info("attributed %d prompts, %d entries", len(prompts), sum(len(p.latent) for p in parts))
    return Attribution(
        activation=_matrix(parts, "activation", shape),
        direct=_matrix(parts, "direct", shape) if is_direct else None,
        gradient=_matrix(parts, "gradient", shape),
        logit=logit,
        notes=notes,
    )


@dataclass(frozen=True)
class _Entries:
    """Active (position, latent) pairs of a chunk."""

    prompt: np.ndarray
    latent: np.ndarray
    activation: np.ndarray
    gradient: np.ndarray
    direct: np.ndarray


def _readouts(
    unembedding: Unembedding, gradients: LogitGradient, answers: Tensor, foils: Tensor | None
) -> Tensor:
    """`[n, d]`: what a vector at each position is multiplied with to give its direct effect."""
    read = unembedding.readout(answers)
    if foils is not None:
        read = read - unembedding.readout(foils)
    scale = unembedding.scale(gradients.final)
    return read[gradients.rows.to(read.device)] / scale.to(read.device)[:, None]


@torch.no_grad()
def _entries(
    sae: SparseAutoencoder, gradients: LogitGradient, readout: Tensor | None, prompt_of: np.ndarray
) -> list[_Entries]:
    """Chunk by chunk of positions, so that one dense `[n, d_sae]` exists at a time."""
    step = max(1, CHUNK_BYTES // (4 * sae.d_sae))
    parts = []
    for start in range(0, len(prompt_of), step):
        chunk = slice(start, start + step)
        x = gradients.acts[chunk].to(sae.device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        acts = sae.encode(x)
        row, latent = acts.nonzero(as_tuple=True)
        if not len(row):
            continue
        there, column = latent.unique(return_inverse=True)
        directions = sae.directions(there.tolist())
        scale = torch.as_tensor(sae.row_scale(x), device=x.device).expand(len(x), 1)[:, 0]
        scaled = acts[row, latent] * scale[row]

        def along(
            vectors: Tensor,
            directions: Tensor = directions,
            row: Tensor = row,
            column: Tensor = column,
            scaled: Tensor = scaled,
        ) -> np.ndarray:
            wide = torch.promote_types(vectors.dtype, directions.dtype)
            dots = vectors.to(directions.device, wide) @ directions.to(wide).T
            return (scaled.to(wide) * dots[row, column]).double().cpu().numpy()

        parts.append(
            _Entries(
                prompt=prompt_of[chunk][row.cpu().numpy()],
                latent=latent.cpu().numpy(),
                activation=acts[row, latent].double().cpu().numpy(),
                gradient=along(gradients.gradient[chunk]),
                direct=np.zeros(len(row)) if readout is None else along(readout[chunk]),
            )
        )
    return parts


def _matrix(parts: list[_Entries], name: str, shape: tuple[int, int]) -> sparse.csr_array:
    """Summed over the positions of a prompt; entries that add up to 0 stay stored."""
    none = np.zeros(0)
    values = np.concatenate([none, *(getattr(p, name) for p in parts)])
    places = tuple(
        np.concatenate([none.astype(np.int64), *(getattr(p, n) for p in parts)])
        for n in ("prompt", "latent")
    )
    return sparse.csr_array(sparse.coo_array((values, places), shape=shape))


def _batches(
    model: LanguageModel, prompts: Sequence[Sequence[int]], batch_tokens: int
) -> list[list[int]]:
    """Prompts of similar length together, at most `batch_tokens` with padding."""
    lengths = [len(prompt) for prompt in prompts]
    batches: list[list[int]] = []
    for part in by_regime(model.text_config, lengths):
        batches.append([])
        for i in sorted(part, key=lambda i: lengths[i]):
            if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
                batches.append([])
            batches[-1].append(i)
    return batches


def _check(
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    answers: Sequence[int],
    foils: Sequence[int] | None,
) -> None:
    if not prompts:
        raise DataError("attribution needs at least one prompt")
    for what, values in (("positions", positions), ("answers", answers), ("foils", foils)):
        if values is not None and len(values) != len(prompts):
            raise DataError(f"{len(values)} {what} for {len(prompts)} prompts; give each one")
    for number, (prompt, of) in enumerate(zip(prompts, positions, strict=True)):
        if not of or min(of) < 0 or max(of) >= len(prompt):
            raise DataError(
                f"prompt {number} has positions {list(of)}, but needs at least one, all between 0 "
                f"and {len(prompt) - 1}"
            )
