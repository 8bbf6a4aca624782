"""Forward passes of an evaluation: one clean pass, and passes resumed at a changed stream."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saexp.activations.norms import norm_limit, ordinary_rows
from saexp.data.tokenization import TokenizedText
from saexp.errors import ModelError
from saexp.models.forward import head_input, replaced_blocks
from saexp.models.hookpoints import Hookpoint
from saexp.models.hooks import EditFunction, capture, edit, position_ids
from saexp.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which tokens are changed and which predictions are looked at; padding never is."""

    splice_special: bool = False
    """Put reconstructions (and measure L0, explained variance …) at special tokens too."""
    ablate_special: bool = False
    """Put zeros and means at special tokens too."""
    score_special: bool = False
    """Look at predictions made at special tokens, and of special tokens, too."""


@dataclass(frozen=True)
class Batch:
    """Padded texts, on the model's device; masks are on it too."""

    texts: Int[Tensor, " b"]
    """Which texts, on the CPU."""
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]
    spliced: Bool[Tensor, "b t"]
    ablated: Bool[Tensor, "b t"]
    compared: Bool[Tensor, "b t"]
    """Where a prediction is made that is looked at."""
    targets: Int[Tensor, " n"]
    """The token that follows each compared position; -1 where none is scored."""

    def first(self) -> "Batch":
        """Its first text alone."""
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
        """The text of each true position, row by row, on the CPU."""
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
    """The chosen texts side by side."""
    width = max(len(texts[i]) for i in chosen)
    shape = (len(chosen), width)
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    special = torch.zeros(shape, dtype=torch.bool)
    for row, index in enumerate(chosen):
        text = texts[index]
        start = width - len(text) if padding_side == "left" else 0
        inside = slice(start, start + len(text))
        ids[row, inside] = torch.tensor(text.ids)
        mask[row, inside] = 1
        special[row, inside] = torch.tensor(text.special)
    there = mask.bool()
    ordinary = there & ~special
    counted = there if where.score_special else ordinary
    follows = torch.zeros_like(counted)
    follows[:, :-1] = counted[:, 1:]
    targets = torch.full(shape, -1)
    targets[:, :-1] = ids[:, 1:]
    targets[~follows] = -1
    return Batch(
        texts=torch.tensor(list(chosen)),
        ids=ids.to(device),
        mask=mask.to(device),
        spliced=(there if where.splice_special else ordinary).to(device),
        ablated=(there if where.ablate_special else ordinary).to(device),
        compared=counted.to(device),
        targets=targets[counted].to(device),
    )


@dataclass(frozen=True)
class Clean:
    """What the unchanged model computed for one batch."""

    streams: dict[Hookpoint, Float[Tensor, "b t _"]]
    hidden: Float[Tensor, "n d"]
    """What the LM head reads at the compared positions."""

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return sum(t.nbytes for t in (*self.streams.values(), self.hidden))


def resumes_from(at: Hookpoint) -> Hookpoint | None:
    """The block output from which a pass that changes stream `at` can go on; None: from the ids."""
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
        """Where resuming was tried, whether it gave what the whole pass gives."""
        self._sizes: dict[int, int | None] = {}

    def clean(self, batch: Batch, wanted: Sequence[Hookpoint]) -> Clean:
        """One whole pass; the streams are those wanted, by their `stored` names."""
        with self._watching(), capture(self.model, list(wanted)) as streams:
            hidden = self._run(batch)
        return Clean(dict(streams), hidden)

    def changed(
        self, batch: Batch, clean: Clean, at: Hookpoint, function: EditFunction
    ) -> Float[Tensor, "n d"]:
        """What the LM head reads once `function` has changed stream `at`.

        Before the first use at a stream, a pass resumed there without a change is compared, on one
        text, with a whole one; where they differ (a model that carries more than the residual
        stream from block to block) whole passes are run instead, and `can_resume` says so.
        """
        at = at.stored
        if at not in self.can_resume:
            self.model.check_streams([at])
            self.can_resume[at] = self._try(batch.first(), at)
        if self.can_resume[at]:
            return self._resumed(batch, clean, at, function)
        with edit(self.model, {at: function}):
            return self._run(batch)

    def _try(self, batch: Batch, at: Hookpoint) -> bool:
        start = resumes_from(at)
        if start is None:
            return False
        clean = self.clean(batch, [start])
        again = self._resumed(batch, clean, at, lambda stream: stream)
        difference = (again - clean.hidden).float().abs().max()
        return bool(difference <= 1e-3 * clean.hidden.float().abs().max())

    def _resumed(
        self, batch: Batch, clean: Clean, at: Hookpoint, function: EditFunction
    ) -> Float[Tensor, "n d"]:
        start = resumes_from(at)
        assert start is not None, f"nothing to resume from at {at.name}"
        values = clean.streams[start]
        if at == start:
            with self._handing_on(start.layer, function(values)):
                return self._run(batch)
        with self._handing_on(start.layer, values), edit(self.model, {at: function}):
            return self._run(batch)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """Logits, float32, with all that the model does to them after its LM head."""
        device, last = self.model.device, self.model.n_layers - 1
        one = torch.tensor([[self.model.pad_id]], device=device)
        nothing = hidden.new_zeros(1, 1, self.model.d_model)
        with head_input(self.model, lambda _: hidden[None]), self._handing_on(last, nothing):
            out = self.model.hf(
                input_ids=one,
                attention_mask=torch.ones_like(one),
                position_ids=torch.zeros_like(one),
                use_cache=False,
            )
        return out.logits[0].float()

    def _run(self, batch: Batch) -> Float[Tensor, "n d"]:
        found: list[Tensor] = []

        def at_head(hidden: Tensor) -> Tensor:
            found.append(hidden[batch.compared.to(hidden.device)])
            # The model's own logits are not needed: those of one position are computed and dropped.
            return hidden[:1, :1]

        with head_input(self.model, at_head):
            self.model.hf(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=position_ids(batch.mask),
                use_cache=False,
            )
        if not found:
            raise ModelError(f"{self.model.name} did not run its LM head, so nothing can be scored")
        return found[-1]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Note, once, whether blocks give a tensor or a tuple, and of what length."""
        handles = []

        def note(index: int) -> Any:
            def on_output(_module: Any, _args: Any, output: Any) -> None:
                self._sizes[index] = None if isinstance(output, Tensor) else len(output)

            return on_output

        if not self._sizes:
            handles = [b.register_forward_hook(note(i)) for i, b in enumerate(self.model.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _handing_on(self, last: int, values: Tensor) -> Iterator[None]:
        """Blocks up to `last` compute nothing and give `values`."""
        functions = []
        for index in range(last + 1):
            size = self._sizes[index]
            output = values if size is None else (values, *[None] * (size - 1))
            functions.append(lambda *_args, _output=output, **_options: _output)
        with replaced_blocks(self.model, functions):
            yield


Streams = tuple[Hookpoint, ...]
"""Streams that an SAE reads, and a transcoder predicts, by their stored names."""


@dataclass(frozen=True)
class Means:
    """Means of what an SAE reconstructs, over positions."""

    ordinary: Float[Tensor, " d"]
    of_all: Float[Tensor, " d"] | None
    """With high-norm positions; None where there are none."""


class HighNorm:
    """Which of the positions to be spliced have high norms; `add` each batch, then `resolve`.

    The median is over all positions of all texts that may be spliced, so that it does not depend
    on batches. A position of high norm at any of an SAE's streams is one for that SAE.
    """

    def __init__(self, places: Sequence[Streams], max_norm_ratio: float | None) -> None:
        self.places, self.max_norm_ratio = places, max_norm_ratio
        self.masks: dict[Streams, list[Bool[Tensor, " n"]]] = {}
        """Per SAE's streams and batch, which positions to be spliced are ordinary; on the CPU."""
        self._norms: dict[Hookpoint, list[np.ndarray]] = {h: [] for p in places for h in p}
        self._totals: dict[Hookpoint, Tensor] = {}

    def add(self, batch: Batch, streams: Mapping[Hookpoint, Tensor]) -> None:
        """Take in the streams of one batch."""
        for hookpoint, norms in self._norms.items():
            x = values_at(streams[hookpoint], batch.spliced).cpu().double()
            norms.append(x.norm(dim=-1).numpy())
            self._totals[hookpoint] = self._totals.get(hookpoint, 0) + x.sum(0)

    def resolve(self) -> None:
        """Find the high-norm positions, once every batch was added."""
        for place in self.places:
            norms = {h: np.concatenate(self._norms[h]) for h in place}
            limits = {h: norm_limit(values, self.max_norm_ratio) for h, values in norms.items()}
            sizes = [len(part) for part in self._norms[place[0]]]
            kept = torch.from_numpy(ordinary_rows(norms, limits))
            self.masks[place] = list(kept.split(sizes))

    def n_excluded(self, place: Streams) -> int:
        """Number of high-norm positions."""
        return sum(int((~mask).sum()) for mask in self.masks[place])

    def ordinary(self, place: Streams, number: int, batch: Batch) -> Bool[Tensor, "b t"]:
        """The batch's `spliced` without high-norm positions."""
        return batch.spliced.masked_scatter(
            batch.spliced, self.masks[place][number].to(batch.spliced.device)
        )

    def means(
        self, again: Iterator[tuple[Batch, Mapping[Hookpoint, Tensor]]]
    ) -> dict[Streams, Means]:
        """Means of each place's last stream; `again` gives all batches' streams once more, and is
        read only where there are high-norm positions."""
        n = sum(map(len, next(iter(self._norms.values()))))
        of_all = {p: self._totals[p[-1]] / n for p in self.places}
        high = [p for p in self.places if self.n_excluded(p)]
        sums = {p: torch.zeros_like(of_all[p]) for p in high}
        for number, (batch, streams) in enumerate(again if high else ()):
            for place in high:
                x = values_at(streams[place[-1]], batch.spliced).cpu().double()
                sums[place] += x[self.masks[place][number]].sum(0)
        return {
            p: Means(sums[p] / (n - self.n_excluded(p)), of_all[p])
            if p in sums
            else Means(of_all[p], None)
            for p in self.places
        }


def values_at(stream: Float[Tensor, "b t d"], where: Bool[Tensor, "b t"]) -> Float[Tensor, "n d"]:
    """The stream at the true positions, row by row."""
    return stream[where.to(stream.device)]
