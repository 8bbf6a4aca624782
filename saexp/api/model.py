"""A language model for notebooks: activations, logits and generated text, with or without edits.

The model object holds the edits that are active (`saexp.steer`, `saexp.ablate`). Each call converts
them into rows of operations for the forward passes and the generation of the pipeline
(`interventions.generation`), so that a notebook and a run compute the same values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from saexp import registry
from saexp.config import InterventionConfig, ModelConfig, PositionsConfig
from saexp.config.environment import at_least
from saexp.data import Example
from saexp.data.positions import Candidate, selected
from saexp.data.tokenization import (
    PositionNotFound,
    TokenizedText,
    as_chat_prompt,
    format_prompts,
    tokenize_prompts,
)
from saexp.errors import ConfigError, DataError, InterventionError, ModelError
from saexp.interventions.cached_generation import (
    LogitReader,
    batch_tokens_for,
    generate,
    read_logits,
)
from saexp.interventions.conditions import edited_positions
from saexp.interventions.generation import in_batches, read_streams
from saexp.interventions.stream_edits import Op, Row, Sampling
from saexp.models import Hookpoint
from saexp.models.forward import position_limit
from saexp.models.loading import LanguageModel
from saexp.saes import SparseAutoencoder

_UNLIMITED = 2**31
"""Maximum length of a text in tokens. Texts are never cut; one that is too long is an error."""


@dataclass(frozen=True)
class Prompt:
    """One text as the model reads it."""

    number: int
    """Index among the texts of one call."""
    example: Example
    tokens: TokenizedText


@dataclass(frozen=True)
class ActiveEdit:
    """Operations, and the tokens that they apply to."""

    ops: tuple[Op, ...]
    where: InterventionConfig
    """Only `where` and `where_options` are used."""
    saes: Mapping[Hookpoint, SparseAutoencoder] = field(default_factory=dict)
    """SAEs whose latents the operations read, by the hookpoint that each encodes."""

    @property
    def generated(self) -> bool:
        """Whether the operations apply to generated tokens."""
        return self.where.where in ("all", "generated")

    def positions(self, prompt: Prompt) -> tuple[int, ...]:
        """Indices of the prompt's tokens that the operations apply to."""
        try:
            return edited_positions(self.where, prompt.example, prompt.tokens, prompt.number)
        except PositionNotFound as reason:
            raise DataError(
                f"where={self.where.where!r}: text {prompt.number}: {reason}; type where='all', "
                "'last' or 'generated'"
            ) from reason


@dataclass
class _ChatModel:
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
    """A `LanguageModel` with methods for notebooks; `saexp.load_model` returns one.

    Texts are tokenized by the model's tokenizer with its defaults, except that no EOS token is
    appended. With `chat=True` the chat template is applied first. While contexts of `saexp.steer`,
    `saexp.ablate` and `saexp.edit` are open, their edits apply to all methods.
    """

    active_edits: tuple[ActiveEdit, ...] = ()
    """In the order in which they are applied."""
    suspended = False
    """Whether the functions of `saexp.edit` are switched off."""

    @cached_property
    def median_norms(self) -> dict[Hookpoint, float]:
        """Median norm over neutral text of each stream where it was measured."""
        return {}

    @cached_property
    def neutral_latents(self) -> WeakKeyDictionary[SparseAutoencoder, sparse.csr_array]:
        """Latents `[n, d_sae]` of neutral text of each SAE with which it was encoded."""
        return WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled.
        return {name: value for name, value in vars(self).items() if name != "neutral_latents"}

    @contextmanager
    def editing(self, edit: ActiveEdit) -> Iterator[None]:
        """Apply an edit while the context is open, after the edits that are already open.

        Raises InterventionError where an open edit uses another SAE at the same stream.
        """
        for at, sae in edit.saes.items():
            if any(e.saes.get(at, sae) is not sae for e in self.active_edits):
                raise InterventionError(
                    f"an open edit uses another SAE at {at.name}; close it first, or use one SAE "
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
        """Tokenize texts. Raises DataError for an empty text and for one that is not a string."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {i} is a {type(text).__name__}; pass strings")
        in_chat = self.cfg.chat if chat is None else chat
        model = _ChatModel(self, replace(self.cfg, chat=in_chat), self.cfg.prepend_bos)
        framed = format_prompts(model, texts)
        prompts = []
        tokenized = tokenize_prompts(model, framed, max_length)
        for i, (text, prompt, tokens) in enumerate(zip(texts, framed, tokenized, strict=True)):
            if not tokens.ids:
                raise DataError(f"text {i} is empty; pass a text with at least one token")
            example = Example(id=str(i), text=text)
            prompts.append(
                Prompt(i, as_chat_prompt(example, prompt) if in_chat else example, tokens)
            )
        return prompts

    def _check_lengths(self, prompts: Sequence[Prompt], n_new: int = 0) -> None:
        """Raise ModelError for a text that is too long for the model's position embeddings."""
        longest = max(prompts, key=lambda p: len(p.tokens), default=None)
        limit = None if longest is None else position_limit(self)
        if longest is None or limit is None or len(longest.tokens) + n_new <= limit:
            return
        n, text = len(longest.tokens), f"text {longest.number}"
        room = f"pass max_new_tokens={limit - n}, or " if limit > n and n_new else ""
        more = f" and {n_new} new ones are" if n_new else " are"
        raise ModelError(
            f"{text}: {n} tokens{more} more than the {limit} positions of {self.name}; "
            f"{room}shorten the text"
        )

    def streams(
        self,
        prompts: Sequence[Prompt],
        hookpoints: Sequence[Hookpoint],
        indices: Sequence[Sequence[int]],
    ) -> list[dict[Hookpoint, Tensor]]:
        """For each prompt, `[n, width]` of each stream at the tokens `indices`, edits applied."""
        self.check_streams([h.stored for h in hookpoints])
        self._check_lengths(prompts)
        rows = [self._row(p) for p in prompts]
        streams: list[dict[Hookpoint, Tensor]] = [{} for _ in rows]
        for batch in in_batches(self, rows, None, batch_tokens_for(self, "auto")):
            batch_rows, batch_indices = [rows[i] for i in batch], [indices[i] for i in batch]
            values = read_streams(self, batch_rows, self._saes(), hookpoints, batch_indices)
            for at, parts in values.items():
                for i, part in zip(batch, parts, strict=True):
                    streams[i][at] = part
        return streams

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
        """Compute the activations of one stream, `[n_tokens, d_model]` for each text.

        Args:
            texts: one text, or several, which run in batches.
            layer: 0-based block index.
            stream: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out` or another of
                `saexp.models.STREAMS`. Later blocks do not run.
            positions: `all` tokens, special tokens included; `last`; another option of the config
                group `positions`; or token indices, where negative indices count from the end.
            chat: whether to apply the chat template; by default the model's setting.

        Returns:
            One tensor for a string, a list of tensors for a list, in the model's dtype and on its
            device.

        Raises:
            ModelError: the model has no such layer or stream, or a text is too long for it.
            DataError: a text is empty, or does not have the requested positions.

        Example:
            >>> model = saexp.load_model("tiny")
            >>> model.activations(["The player scored.", "It rains."], layer=2)[0].shape[1]
            128
        """
        self.check_layer(layer)
        at = Hookpoint(layer, stream)
        prompts = self.prompts(_listed(texts), chat)
        indices = [token_indices(p, positions) for p in prompts]
        acts = [of_text[at] for of_text in self.streams(prompts, [at], indices)]
        return acts[0] if isinstance(texts, str) else acts

    @overload
    def logits(self, texts: str, *, chat: bool | None = ...) -> Tensor: ...

    @overload
    def logits(self, texts: Sequence[str], *, chat: bool | None = ...) -> list[Tensor]: ...

    def logits(
        self, texts: str | Sequence[str], *, chat: bool | None = None
    ) -> Tensor | list[Tensor]:
        """Compute the next-token logits after each token of a text, `[n_tokens, vocabulary]`.

        Returns one float32 tensor on the CPU for a string, a list of them for a list. Special
        tokens that the tokenizer prepends count as tokens.

        Raises:
            ModelError: a text is too long for the model.
            InterventionError: the logits are not finite, for example because of an open edit.
            DataError: a text is empty.

        Example:
            >>> model.logits("My name is")[-1].argmax()  # the most likely next token
        """
        prompts = self.prompts(_listed(texts), chat)
        self._check_lengths(prompts)
        rows = [self._row(p) for p in prompts]
        logits = read_logits(
            self,
            rows,
            self._saes(),
            LogitReader(
                lambda _row, logits: logits.cpu().numpy(), "logits", lambda row: len(row.ids)
            ),
            batch_tokens=batch_tokens_for(self, "auto"),
        )
        tensors = [torch.from_numpy(values).float() for values in logits]
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
        """Generate continuations; the texts themselves and special tokens are not returned.

        `temperature` 0 is greedy decoding. A sample depends on the text, the open edits and `seed`,
        not on the other texts of the call. Generation stops at the model's end-of-text token.

        Raises:
            ConfigError: `max_new_tokens` is below 1, or the temperature is negative.
            ModelError: a text and its continuation are too long for the model.
            InterventionError: an open edit makes the logits NaN or infinite.

        Example:
            >>> model.generate("My name is", max_new_tokens=5)
        """
        at_least("max_new_tokens", max_new_tokens, 1)
        at_least("temperature", temperature, 0)
        sample = Sampling(temperature, seed) if temperature else None
        prompts = self.prompts(_listed(texts), chat)
        self._check_lengths(prompts, max_new_tokens)
        rows = [self._row(p, sample) for p in prompts]
        generated = generate(
            self,
            rows,
            self._saes(),
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens_for(self, "auto"),
        )
        continuations = [self.tokenizer.decode(t, skip_special_tokens=True) for t in generated]
        return continuations[0] if isinstance(texts, str) else continuations

    def _row(self, prompt: Prompt, sample: Sampling | None = None) -> Row:
        """The prompt with the open edits, except those that change nothing in it."""
        chain: Row | None = None
        for edit in reversed(self.active_edits):
            row = Row(
                ids=prompt.tokens.ids,
                ops=edit.ops,
                positions=edit.positions(prompt),
                generated=edit.generated,
                sample=sample,
                then=chain,
            )
            chain = row if row.active else chain
        return chain or Row(prompt.tokens.ids, sample=sample)

    def _saes(self) -> dict[Hookpoint, SparseAutoencoder]:
        return {at: sae for edit in self.active_edits for at, sae in edit.saes.items()}


def token_indices(prompt: Prompt, positions: str | Sequence[int] | PositionsConfig) -> list[int]:
    """Resolve `positions` to token indices. Raises DataError where the prompt has no such token."""
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
    except PositionNotFound as reason:
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
    cache_dir: str | Path = "outputs/cache",
    **options: Any,
) -> InteractiveModel:
    """Load a language model with its tokenizer; the weights are read on first use.

    Args:
        source: a hub id, a folder, a GGUF file (`pip install "saexp[gguf]"`), a model that ships
            with saexp (`tiny`, `tiny_control`), or a Hugging Face model in memory together with its
            `tokenizer`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the own dtype of a checkpoint in
            bfloat16 or float16 where the device computes it natively (CUDA, and CPUs with
            AVX512-BF16 or AMX), else float32. The shipped models are computed in float32.
        device: `cpu`, `cuda`, `mps`, or `auto`.
        chat: whether the chat template is applied to texts by default.
        revision: branch, tag or commit on the hub.
        cache_dir: the folder in which a GGUF file's dequantised copy is stored.
        options: further fields of `saexp.config.ModelConfig`, such as `trust_remote_code`.

    Raises:
        ModelError: there is no such model, or its files cannot be loaded.
        ConfigError: an unknown option.

    Example:
        >>> model = saexp.load_model("gpt2")
        >>> model.generate("My name is")
    """
    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise ConfigError("a model in memory needs its tokenizer; pass tokenizer=")
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
    return InteractiveModel(cfg, cache_dir)
