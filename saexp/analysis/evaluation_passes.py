"""Forward passes of an evaluation: clean passes, and passes resumed at a changed stream."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations.reader import norm_limit, ordinary_rows
from saexp.data.tokenization import TokenizedText
from saexp.errors import ModelError
from saexp.models import Hookpoint
from saexp.models.forward import head_input, padded, replaced_blocks
from saexp.models.hooks import EditFunction, capture, edit, position_ids
from saexp.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which tokens are replaced and which predictions are scored; padding never is."""

    splice_special: bool = False
    """Also splice (and measure L0, explained variance and so on) at special tokens."""
    ablate_special: bool = False
    """Also ablate at special tokens."""
    score_special: bool = False
    """Also score predictions at special tokens and of special tokens."""


@dataclass(frozen=True)
class Batch:
    """Padded texts and masks, on the model's device."""

    texts: Int[Tensor, " b"]
    """Indices of the texts, on the CPU."""
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]
    spliced: Bool[Tensor, "b t"]
    ablated: Bool[Tensor, "b t"]
    compared: Bool[Tensor, "b t"]
    """Positions whose predictions are compared with those of the clean pass."""
    targets: Int[Tensor, " n"]
    """The token after each compared position; -1 where the loss is not scored."""

    def first(self) -> "Batch":
        """A batch of its first text only."""
        return Batch(
            texts=self.texts[:1],
            ids=self.ids[:1],
            mask=self.mask[:1],
            spliced=self.spliced[:1],
            ablated=self.ablated[:1],
            compared=self.compared[:1],
            targets=self.targets[: int(self.compared[0].sum())],
        )

    def texts_of(self, where: Bool[Tensor, "b t"]) -> Int[Tensor, " m"]:
        """Text index of each position where the mask is true, row by row, on the CPU."""
        return self.texts[where.nonzero()[:, 0].cpu()]


def make_batch(
    texts: Sequence[TokenizedText],
    chosen: Sequence[int],
    where: Where,
    *,
    pad_id: int,
    device: torch.device,
    padding_side: str = "right",
) -> Batch:
    """Pad the chosen texts into one batch."""
    ids, mask = padded([texts[i].ids for i in chosen], pad_id, padding_side=padding_side)
    is_token = mask.bool()
    ordinary = is_token.clone()
    ordinary[is_token] = ~torch.tensor([flag for i in chosen for flag in texts[i].special])
    compared = is_token if where.score_special else ordinary
    next_compared = torch.zeros_like(compared)
    next_compared[:, :-1] = compared[:, 1:]
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    targets[~next_compared] = -1
    return Batch(
        texts=torch.tensor(list(chosen)),
        ids=ids.to(device),
        mask=mask.to(device),
        spliced=(is_token if where.splice_special else ordinary).to(device),
        ablated=(is_token if where.ablate_special else ordinary).to(device),
        compared=compared.to(device),
        targets=targets[compared].to(device),
    )


@dataclass(frozen=True)
class Clean:
    """Result of the unchanged model on one batch."""

    streams: dict[Hookpoint, Float[Tensor, "b t _"]]
    hidden: Float[Tensor, "n d"]
    """Input of the LM head at the compared positions."""

    @property
    def n_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.nbytes for t in (*self.streams.values(), self.hidden))


def resumes_from(at: Hookpoint) -> Hookpoint | None:
    """The block output at which a pass with an edit of stream `at` can start; None: at the ids."""
    stored = at.stored
    if stored.stream == "resid_post":
        return stored
    below = stored.layer - 1
    return None if below < 0 or stored.stream == "embed" else Hookpoint(below, "resid_post")


class Passes:
    """Forward passes of one model. Raises ModelError where it has no LM head that can be hooked."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        if model.hf.get_output_embeddings() is None:
            raise ModelError(f"{model.name} has no LM head, so it predicts no next token")
        self.can_resume: dict[Hookpoint, bool] = {}
        """Whether resuming there reproduces the whole pass, for the streams compared so far."""
        self._sizes: dict[int, int | None] = {}
        """Length of the tuple that each block returns; None where it returns a tensor."""

    def clean(self, batch: Batch, wanted: Sequence[Hookpoint]) -> Clean:
        """One whole pass; `wanted` streams are captured under their `stored` names."""
        with self._recording_outputs(), capture(self.model, list(wanted)) as streams:
            hidden = self._run(batch)
        return Clean(dict(streams), hidden)

    def changed(
        self, batch: Batch, clean: Clean, at: Hookpoint, function: EditFunction
    ) -> Float[Tensor, "n d"]:
        """Input of the LM head when `function` edits stream `at`.

        Before the first use of a stream, a pass resumed there without an edit is compared with a
        whole pass on one text. Where they differ, because the model passes more than the residual
        stream from block to block, whole passes are run instead, as recorded in `can_resume`.
        """
        at = at.stored
        if at not in self.can_resume:
            self.model.check_streams([at])
            self.can_resume[at] = self._resumes_exactly(batch.first(), at)
        if self.can_resume[at]:
            return self._resumed(batch, clean, at, function)
        with edit(self.model, {at: function}):
            return self._run(batch)

    def _resumes_exactly(self, batch: Batch, at: Hookpoint) -> bool:
        start = resumes_from(at)
        if start is None:
            return False
        clean = self.clean(batch, [start])
        resumed = self._resumed(batch, clean, at, lambda stream: stream)
        difference = (resumed - clean.hidden).float().abs().max()
        return bool(difference <= 1e-3 * clean.hidden.float().abs().max())

    def _resumed(
        self, batch: Batch, clean: Clean, at: Hookpoint, function: EditFunction
    ) -> Float[Tensor, "n d"]:
        start = resumes_from(at)
        assert start is not None, f"nothing to resume from at {at.name}"
        values = clean.streams[start]
        if at == start:
            with self._resuming_after(start.layer, function(values)):
                return self._run(batch)
        with self._resuming_after(start.layer, values), edit(self.model, {at: function}):
            return self._run(batch)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """Logits in float32, including what the model does after its LM head (such as a softcap).

        The model runs on one token, with the input of its LM head replaced by `hidden`.
        """
        device, last = self.model.device, self.model.n_layers - 1
        one = torch.tensor([[self.model.pad_id]], device=device)
        zeros = hidden.new_zeros(1, 1, self.model.d_model)
        with head_input(self.model, lambda _: hidden[None]), self._resuming_after(last, zeros):
            out = self.model.hf(
                input_ids=one,
                attention_mask=torch.ones_like(one),
                position_ids=torch.zeros_like(one),
                use_cache=False,
            )
        return out.logits[0].float()

    def _run(self, batch: Batch) -> Float[Tensor, "n d"]:
        inputs: list[Tensor] = []

        def at_head(hidden: Tensor) -> Tensor:
            inputs.append(hidden[batch.compared.to(hidden.device)])
            # The logits of this pass are not used, so they are computed at one position only.
            return hidden[:1, :1]

        with head_input(self.model, at_head):
            self.model.hf(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=position_ids(batch.mask),
                use_cache=False,
            )
        if not inputs:
            raise ModelError(f"{self.model.name} did not run its LM head, so nothing can be scored")
        return inputs[-1]

    @contextmanager
    def _recording_outputs(self) -> Iterator[None]:
        """Record, once, whether each block returns a tensor or a tuple, and its length."""
        handles = []

        def record(index: int) -> Any:
            def on_output(_module: Any, _args: Any, output: Any) -> None:
                self._sizes[index] = None if isinstance(output, Tensor) else len(output)

            return on_output

        if not self._sizes:
            handles = [b.register_forward_hook(record(i)) for i, b in enumerate(self.model.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _resuming_after(self, layer: int, values: Float[Tensor, "b t d"]) -> Iterator[None]:
        """Forward passes in which blocks up to `layer` do not run and the last returns `values`."""
        functions = []
        for index in range(layer + 1):
            size = self._sizes[index]
            output = values if size is None else (values, *[None] * (size - 1))
            functions.append(lambda *_args, _output=output, **_options: _output)
        with replaced_blocks(self.model, functions):
            yield


Streams = tuple[Hookpoint, ...]
"""Streams that an SAE reads and, for a transcoder, predicts, under their stored names."""


@dataclass(frozen=True)
class Means:
    """Means over positions of the stream that an SAE reconstructs."""

    ordinary: Float[Tensor, " d"]
    of_all: Float[Tensor, " d"] | None
    """Including high-norm positions; None where there are none."""


class HighNorm:
    """High-norm positions among those to be spliced: call `add` for each batch, then `resolve`.

    The median norm is over the positions of all texts, so it does not depend on batches. A position
    with a high norm in one of the streams of an SAE is excluded for this SAE.
    """

    def __init__(
        self, places: Sequence[Streams], max_norm_ratio: float | None, n_tokens: int
    ) -> None:
        """`n_tokens` is the number of tokens of all texts."""
        self.places, self.max_norm_ratio = places, max_norm_ratio
        self.masks: dict[Streams, list[Bool[Tensor, " n"]]] = {}
        """Per streams and batch, which positions to be spliced are ordinary; on the CPU."""
        # One array, because small ones that stay between the tensors of the passes would keep the
        # freed memory around them from being used again.
        self._norms = {h: np.empty(n_tokens) for p in places for h in p}
        self._sizes: list[int] = []
        """Positions of each batch."""
        self._n_positions = 0
        self._totals: dict[Hookpoint, Tensor] = {}

    def add(self, batch: Batch, streams: Mapping[Hookpoint, Tensor]) -> None:
        """Add the streams of one batch."""
        first = self._n_positions
        self._sizes.append(int(batch.spliced.sum()))
        self._n_positions += self._sizes[-1]
        for hookpoint, norms in self._norms.items():
            x = values_at(streams[hookpoint], batch.spliced).cpu().double()
            norms[first : first + len(x)] = x.norm(dim=-1).numpy()
            self._totals[hookpoint] = self._totals.get(hookpoint, 0) + x.sum(0)

    def resolve(self) -> None:
        """Determine the high-norm positions after all batches were added."""
        for hookpoints in self.places:
            norms = {h: self._norms[h][: self._n_positions] for h in hookpoints}
            limits = {h: norm_limit(values, self.max_norm_ratio) for h, values in norms.items()}
            ordinary = torch.from_numpy(ordinary_rows(norms, limits))
            self.masks[hookpoints] = list(ordinary.split(self._sizes))
        self._norms = {}

    def n_excluded(self, hookpoints: Streams) -> int:
        """Number of high-norm positions."""
        return sum(int((~mask).sum()) for mask in self.masks[hookpoints])

    def ordinary(self, hookpoints: Streams, number: int, batch: Batch) -> Bool[Tensor, "b t"]:
        """Mask of the batch's positions to be spliced, without high-norm positions."""
        return batch.spliced.masked_scatter(
            batch.spliced, self.masks[hookpoints][number].to(batch.spliced.device)
        )

    def means(
        self, again: Iterator[tuple[Batch, Mapping[Hookpoint, Tensor]]]
    ) -> dict[Streams, Means]:
        """Means of the reconstructed stream of each place. `again` yields all batches' streams a
        second time; it is consumed only where there are high-norm positions."""
        n = sum(map(len, self.masks[self.places[0]]))
        of_all = {p: self._totals[p[-1]] / n for p in self.places}
        high = [p for p in self.places if self.n_excluded(p)]
        sums = {p: torch.zeros_like(of_all[p]) for p in high}
        for number, (batch, streams) in enumerate(again if high else ()):
            for hookpoints in high:
                x = values_at(streams[hookpoints[-1]], batch.spliced).cpu().double()
                sums[hookpoints] += x[self.masks[hookpoints][number]].sum(0)
        return {
            p: Means(sums[p] / (n - self.n_excluded(p)), of_all[p])
            if p in sums
            else Means(of_all[p], None)
            for p in self.places
        }


def values_at(stream: Float[Tensor, "b t d"], where: Bool[Tensor, "b t"]) -> Float[Tensor, "n d"]:
    """The stream at the positions where the mask is true, row by row."""
    return stream[where.to(stream.device)]
