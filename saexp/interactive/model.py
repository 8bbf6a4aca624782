"""A language model as a notebook uses it: activations, logits and text, under active edits.

The edits are those of `saexp.steer` and `saexp.ablate`. They are held by the model object, and each
call turns them into the rows of operations that the pipeline's own forward passes and generation
take (`interventions.generation`), so that a notebook and a run compute the same thing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from saexp import registry
from saexp.config import InterventionConfig, ModelConfig, PositionsConfig
from saexp.config.environment import at_least
from saexp.data.examples import Example
from saexp.data.positions import Candidate, Unplaced, selected
from saexp.data.prompts import as_read, in_template, tokenize_prompts
from saexp.data.tokenization import TokenizedText
from saexp.errors import ConfigError, DataError, InterventionError
from saexp.interventions.batching import LogitReader, batch_tokens_for, generate, read_logits
from saexp.interventions.conditions import edited_positions
from saexp.interventions.generation import in_batches, read_streams
from saexp.interventions.operations import Op, Row, Sampling
from saexp.models.forward import check_positions
from saexp.models.hookpoints import Hookpoint
from saexp.models.loading import LanguageModel
from saexp.saes.sae import SparseAutoencoder

_UNLIMITED = 2**31
"""Maximum length of a text in tokens: a text is never cut, and one that is too long is an error."""


@dataclass(frozen=True)
class Prompt:
    """One text as the model reads it."""

    number: int
    """Index among the texts of one call."""
    example: Example
    tokens: TokenizedText


@dataclass(frozen=True)
class ActiveEdit:
    """Operations, and the tokens that they change."""

    ops: tuple[Op, ...]
    where: InterventionConfig
    """`where` and `where_options` are used."""
    saes: Mapping[Hookpoint, SparseAutoencoder] = field(default_factory=dict)
    """SAEs that the operations read, by the hookpoint that each reads."""

    @property
    def generated(self) -> bool:
        """Whether generated tokens are changed."""
        return self.where.where in ("all", "generated")

    def positions(self, prompt: Prompt) -> tuple[int, ...]:
        """Indices of the prompt's tokens that are changed."""
        try:
            return edited_positions(self.where, prompt.example, prompt.tokens, prompt.number)
        except Unplaced as reason:
            raise DataError(
                f"where={self.where.where!r}: text {prompt.number}: {reason}; type where='all', "
                "'last' or 'generated'"
            ) from reason


@dataclass
class _Reading:
    """A model for tokenization, with the chat template switched on or off for one call."""

    model: LanguageModel
    cfg: ModelConfig
    prepend_bos: bool | None

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    def chat_text(self, prompt: str) -> str:
        return self.model.chat_text(prompt)


class InteractiveModel(LanguageModel):
    """A `LanguageModel` with methods for notebooks; made by `saexp.load_model`.

    Texts are tokenized as the model's tokenizer does by itself, without an EOS token at the end;
    with `chat=True` the chat template is applied first. All methods are affected by the edits of
    `saexp.steer`, `saexp.ablate` and `saexp.edit` while those are open.
    """

    active_edits: tuple[ActiveEdit, ...] = ()
    """In the order in which they are applied."""
    suspended = False
    """Whether the functions of `saexp.edit` leave their streams as they are."""

    @cached_property
    def median_norms(self) -> dict[Hookpoint, float]:
        """Median norm of a stream over neutral text, for the streams where it was measured."""
        return {}

    @contextmanager
    def editing(self, edit: ActiveEdit) -> Iterator[None]:
        """Apply an edit while the context is open, after the edits that are open already.

        Raises InterventionError for a second SAE at a stream that an open edit reads by another.
        """
        for at, sae in edit.saes.items():
            if any(e.saes.get(at, sae) is not sae for e in self.active_edits):
                raise InterventionError(
                    f"an open edit reads {at.name} by another SAE; close it first, or use one SAE "
                    "for both"
                )
        self.active_edits = (*self.active_edits, edit)
        try:
            yield
        finally:
            self.active_edits = tuple(e for e in self.active_edits if e is not edit)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Suspend all open edits while the context is open."""
        edits, suspended = self.active_edits, self.suspended
        self.active_edits, self.suspended = (), True
        try:
            yield
        finally:
            self.active_edits, self.suspended = edits, suspended

    def prompts(
        self, texts: Sequence[str], chat: bool | None = None, max_length: int = _UNLIMITED
    ) -> list[Prompt]:
        """Tokenize texts. Raises DataError for a text without tokens or that is not a string."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is a {type(text).__name__}; give strings")
        in_chat = self.cfg.chat if chat is None else chat
        values = {**vars(self.cfg), "chat": in_chat}
        reading = _Reading(self, ModelConfig(**values), self.cfg.prepend_bos)
        framed = as_read(reading, texts)
        found = []
        tokenized = tokenize_prompts(reading, framed, max_length)
        for i, (text, prompt, tokens) in enumerate(zip(texts, framed, tokenized, strict=True)):
            if not tokens.ids:
                raise DataError(f"text {i} has no tokens; give a text that is not empty")
            example = Example(id=str(i), text=text)
            found.append(Prompt(i, in_template(example, prompt) if in_chat else example, tokens))
        return found

    def streams(
        self,
        prompts: Sequence[Prompt],
        hookpoints: Sequence[Hookpoint],
        chosen: Sequence[Sequence[int]],
    ) -> list[dict[Hookpoint, Tensor]]:
        """Per prompt, `[n, width]` of each stream at its `chosen` tokens, edits applied."""
        self.check_streams([h.stored for h in hookpoints])
        rows = [self._row(p) for p in prompts]
        check_positions(self, max((len(r.ids) for r in rows), default=0))
        found: list[dict[Hookpoint, Tensor]] = [{} for _ in rows]
        for batch in in_batches(self, rows, None, batch_tokens_for(self, "auto")):
            values = read_streams(
                self, [rows[i] for i in batch], self._saes(), hookpoints, [chosen[i] for i in batch]
            )
            for at, parts in values.items():
                for i, part in zip(batch, parts, strict=True):
                    found[i][at] = part
        return found

    @overload
    def activations(
        self,
        texts: str,
        layer: int,
        *,
        stream: str = ...,
        positions: str | Sequence[int] = ...,
        chat: bool | None = ...,
    ) -> Tensor: ...

    @overload
    def activations(
        self,
        texts: Sequence[str],
        layer: int,
        *,
        stream: str = ...,
        positions: str | Sequence[int] = ...,
        chat: bool | None = ...,
    ) -> list[Tensor]: ...

    def activations(
        self,
        texts: str | Sequence[str],
        layer: int,
        *,
        stream: str = "resid_post",
        positions: str | Sequence[int] = "all",
        chat: bool | None = None,
    ) -> Tensor | list[Tensor]:
        """Activations of one stream, `[n_tokens, d_model]` for each text, on the model's device.

        Args:
            texts: one text, or several, which are run in batches.
            layer: 0-based block index.
            stream: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out` and others
                (`saexp.models.hookpoints.STREAMS`). Blocks after it do not run.
            positions: `all` tokens, special ones included; `last`; another option of the config
                group `positions`; or token indices, negative ones from the end.
            chat: whether to apply the chat template; as the model was loaded where not given.

        Returns:
            One tensor for a string, a list of tensors for a list, in the model's dtype.

        Raises:
            ModelError: the model has no such layer or stream, or a text is too long for it.
            DataError: a text has no tokens, or not the positions asked for.

        Example:
            >>> model = saexp.load_model("tiny")
            >>> model.activations(["The player scored.", "It rains."], layer=2)[0].shape[1]
            128
        """
        self.check_layer(layer)
        at = Hookpoint(layer, stream)
        prompts = self.prompts(_listed(texts), chat)
        chosen = [token_indices(p, positions) for p in prompts]
        found = [of_text[at] for of_text in self.streams(prompts, [at], chosen)]
        return found[0] if isinstance(texts, str) else found

    @overload
    def logits(self, texts: str, *, chat: bool | None = ...) -> Tensor: ...

    @overload
    def logits(self, texts: Sequence[str], *, chat: bool | None = ...) -> list[Tensor]: ...

    def logits(
        self, texts: str | Sequence[str], *, chat: bool | None = None
    ) -> Tensor | list[Tensor]:
        """Logits of the next token after each token of a text, `[n_tokens, vocabulary]`.

        A string gives one float32 tensor on the CPU, a list of strings a list of them. Special
        tokens that the tokenizer puts in front count as tokens.

        Raises:
            ModelError: a text is too long for the model, or its logits are not finite.
            DataError: a text has no tokens.

        Example:
            >>> model.logits("My name is")[-1].argmax()  # the most likely next token
        """
        rows = [self._row(p) for p in self.prompts(_listed(texts), chat)]
        found = read_logits(
            self,
            rows,
            self._saes(),
            LogitReader(
                lambda _row, logits: logits.cpu().numpy(), "logits", lambda row: len(row.ids)
            ),
            batch_tokens=batch_tokens_for(self, "auto"),
        )
        tensors = [torch.from_numpy(values).float() for values in found]
        return tensors[0] if isinstance(texts, str) else tensors

    @overload
    def generate(
        self,
        texts: str,
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
        *,
        chat: bool | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int = ...,
        *,
        chat: bool | None = ...,
    ) -> list[str]: ...

    def generate(
        self,
        texts: str | Sequence[str],
        max_new_tokens: int = 30,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        chat: bool | None = None,
    ) -> str | list[str]:
        """Continue texts; returns the continuations alone, without special tokens.

        `temperature` 0 is greedy. A sample depends on the text, the open edits and `seed`, not on
        the other texts of the call. Generation ends at the model's end token.

        Raises:
            ConfigError: `max_new_tokens` below 1, or a negative temperature.
            ModelError: a text and its continuation are too long for the model.
            InterventionError: an open edit makes the logits NaN or infinite.

        Example:
            >>> model.generate("My name is", max_new_tokens=5)
        """
        at_least("max_new_tokens", max_new_tokens, 1)
        at_least("temperature", temperature, 0)
        sample = Sampling(temperature, seed) if temperature else None
        rows = [self._row(p, sample) for p in self.prompts(_listed(texts), chat)]
        made = generate(
            self,
            rows,
            self._saes(),
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens_for(self, "auto"),
        )
        found = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
        return found[0] if isinstance(texts, str) else found

    def _row(self, prompt: Prompt, sample: Sampling | None = None) -> Row:
        """The prompt with the open edits; one that changes nothing is left out."""
        found: Row | None = None
        for edit in reversed(self.active_edits):
            row = Row(
                ids=prompt.tokens.ids,
                ops=edit.ops,
                positions=edit.positions(prompt),
                generated=edit.generated,
                sample=sample,
                then=found,
            )
            found = row if row.active else found
        return found or Row(prompt.tokens.ids, sample=sample)

    def _saes(self) -> dict[Hookpoint, SparseAutoencoder]:
        return {at: sae for edit in self.active_edits for at, sae in edit.saes.items()}


def token_indices(prompt: Prompt, positions: str | Sequence[int] | PositionsConfig) -> list[int]:
    """Indices of the chosen tokens of a prompt. Raises DataError where it has none of them."""
    if positions == "all":
        return list(range(len(prompt.tokens)))
    if isinstance(positions, PositionsConfig):
        cfg = positions
    elif isinstance(positions, str):
        cfg = PositionsConfig(name=positions)
    else:
        cfg = PositionsConfig(name="indices", indices=list(positions), include_special=True)
    chooser = registry.build("positions", cfg)
    rng = np.random.default_rng(prompt.number)
    try:
        return selected(chooser, Candidate(prompt.example, prompt.tokens, rng))
    except Unplaced as reason:
        raise DataError(f"positions={positions!r}: text {prompt.number}: {reason}") from reason


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def load_model(
    source: str | Path | nn.Module,
    *,
    dtype: str = "auto",
    device: str = "auto",
    chat: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> InteractiveModel:
    """A language model with its tokenizer; its weights are read on first use.

    Args:
        source: a hub id, a folder, a model shipped with saexp (`tiny`, `tiny_control`), or a
            Hugging Face model in memory, with its `tokenizer`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (bfloat16 on CUDA, else float32).
        device: `cpu`, `cuda`, `mps`, or `auto`.
        chat: whether texts are read in the chat template unless a call says otherwise.
        revision: branch, tag or commit on the hub.
        options: further fields of `saexp.config.ModelConfig`, such as `trust_remote_code`.

    Raises:
        ModelError: no such model, or files that cannot be loaded.
        ConfigError: an option that does not exist.

    Example:
        >>> model = saexp.load_model("gpt2")
        >>> model.generate("My name is")
    """
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer; type tokenizer=")
        model = InteractiveModel.wrap(source, tokenizer)
        assert isinstance(model, InteractiveModel)
        return model
    unknown = sorted(options.keys() - ModelConfig.__dataclass_fields__.keys())
    if unknown:
        near = registry.did_you_mean(unknown[0], ModelConfig.__dataclass_fields__)
        raise ConfigError(f"load_model has no option '{unknown[0]}'; {near}")
    cfg = ModelConfig(
        name=str(source), dtype=dtype, device=device, chat=chat, revision=revision, **options
    )
    return InteractiveModel(cfg)
