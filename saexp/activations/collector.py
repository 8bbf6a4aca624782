"""The registry kind `collector`: where activations come from.

`hf` runs the Hugging Face model, `transformer_lens` and `nnsight` run the same model by these
libraries. A collector computes, or reads, the activations of one shard's rows.
`activations.collection` asks it for the shards that a store lacks, and writes them.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saexp.activations.shared_prefixes import Batch, PaddedUnits, forward, pad, units
from saexp.config import StoreConfig
from saexp.config.components import CollectorConfig
from saexp.data.rows import PositionRows
from saexp.errors import ModelError, StoreError
from saexp.models import STREAM_ORDER, Hookpoint
from saexp.models.forward import TokenBudget, batches, context_limit, depends_on_length
from saexp.models.loading import LanguageModel


@dataclass(frozen=True)
class Part:
    """Part number `shard` of `n_shards` parts of a store's shards, each computed by one process."""

    shard: int
    n_shards: int

    def of(self, n_files: int) -> list[int]:
        """Indices of the shard files in this part; the parts are disjoint and cover all files."""
        first, end = (k * n_files // self.n_shards for k in (self.shard, self.shard + 1))
        return list(range(first, end))


@dataclass(frozen=True, kw_only=True)
class CollectionRequest:
    """Which activations a store must hold."""

    positions: PositionRows
    hookpoints: Sequence[Hookpoint]
    max_length: int
    """Length in tokens at which texts were truncated; part of the store's key."""
    prefetch: Sequence[Hookpoint] = ()
    """Further hookpoints, for other runs, that are stored in the same pass where one is needed. One
    that cannot be stored (no such stream, full disk, NaN) is left out with a warning."""
    part: Part | None = None
    """Complete only this part of the shards."""
    n_skipped: int = 0
    """Examples without the requested positions, for the statistics."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Readable names, saved in the manifest beside the hashes."""


@dataclass(frozen=True)
class CollectionStats:
    """What a collection did."""

    n_rows: int
    n_skipped: int
    tokens_forwarded: int
    """Tokens that went through the model, without padding; 0 when everything was stored."""
    padding_fraction: float
    """Fraction of padding among the tokens that went through the model."""
    seconds: float


def ingredients(
    model: LanguageModel, positions: PositionRows, max_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What determines the activations that `collector=hf` stores; hashed, it is the store's key."""
    blocks = model.cfg.blocks
    return {
        # Absent where it is not set, so that existing stores keep their keys.
        **({"blocks": blocks} if blocks else {}),
        "model": model.name,
        "revision": model.cfg.revision,
        "weights": model.fingerprint,
        **row_ingredients(model, positions, max_length, dtype),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        # In stores written before this key existed, values depended on the other texts of a batch.
        **({"rope": "by length"} if depends_on_length(model.text_config) else {}),
    }


def row_ingredients(
    model: LanguageModel, positions: PositionRows, max_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The ingredients that determine which rows a store has, whatever computes their values."""
    return {
        "tokenizer": model.tokenizer_fingerprint,
        **positions.digests(),
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": max_length,
    }


class Collector(ABC):
    """Base class of the registry kind `collector`.

    `registry.build("collector", cfg.collector, model=model, store=cfg.store)` builds one. A
    subclass defines `batches`, and overrides the other methods where it does not run the model.
    """

    def __init__(self, cfg: CollectorConfig, *, model: LanguageModel, store: StoreConfig) -> None:
        self.cfg, self.model, self.store = cfg, model, store

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored activations: that of `store.dtype`, the model's own for `auto`."""
        if self.store.dtype == "auto":
            return self.model.dtype
        return getattr(torch, self.store.dtype)

    def ingredients(self, request: CollectionRequest) -> dict[str, Any]:
        """What determines the stored values; the collector's name is part of it."""
        of_model = ingredients(self.model, request.positions, request.max_length, self.dtype)
        return {**of_model, "collector": self.cfg.name}

    def check(self, request: CollectionRequest) -> None:
        """Raise ModelError for a layer that the model lacks or a text longer than it takes."""
        for hookpoint in request.hookpoints:
            self.model.check_layer(hookpoint.layer)
        longest = request.positions.longest
        limit = context_limit(self.model)
        if limit is not None and longest > limit:
            short = self.model.name.rpartition("/")[2]
            raise ModelError(
                f"a text is {longest} tokens long, but {short} takes at most {limit}; "
                f"try dataset.max_length={limit}"
            )

    def check_hookpoint(self, hookpoint: Hookpoint) -> None:
        """Raise ModelError or DataError where there is no such stream; may read the weights."""
        self.model.module(hookpoint)

    @abstractmethod
    def batches(
        self, request: CollectionRequest, rows: Int[np.ndarray, " n"], hookpoints: list[Hookpoint]
    ) -> Iterator[Batch]:
        """Activations of these rows of `request.positions`, in any order, batch by batch.

        `Batch.rows` are indices into `rows`.
        """

    def not_finite(self, hookpoint: Hookpoint, text: str, is_nan: bool) -> StoreError:
        """The error for a NaN or an infinite value in a text."""
        overflow = not is_nan and self.dtype == torch.float16 != self.model.dtype
        problem = f"NaN or Inf at {hookpoint.name} in the text '{text[:60]}'"
        if self.model.dtype == torch.float32 and not overflow:
            return StoreError(
                f"{problem}, in float32: check the model's weights, or leave the text out"
            )
        return StoreError(f"{problem}; try {'store.dtype' if overflow else 'dtype'}=float32")


class HuggingFaceCollector(Collector):
    """`collector=hf`: one truncated forward pass of the Hugging Face model, read with hooks."""

    def __init__(self, cfg: CollectorConfig, *, model: LanguageModel, store: StoreConfig) -> None:
        super().__init__(cfg, model=model, store=store)
        self.budget = TokenBudget(store.batch_tokens, model.device)

    def ingredients(self, request: CollectionRequest) -> dict[str, Any]:
        """Without the collector's name: these are the keys of stores of earlier versions."""
        return ingredients(self.model, request.positions, request.max_length, self.dtype)

    def batches(
        self, request: CollectionRequest, rows: Int[np.ndarray, " n"], hookpoints: list[Hookpoint]
    ) -> Iterator[Batch]:
        todo = units(request.positions, rows, self.model.text_config)
        yield from forward(
            self.model,
            todo,
            hookpoints,
            self.budget,
            self.dtype,
            share_prefixes=self.store.share_prefixes,
        )


def _import(package: str, collector: str) -> Any:
    """The module of an optional dependency; ModelError with the extra to install without it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModelError(
            f"collector={collector} needs a package that is not installed ({error}); type "
            f"pip install 'saexp[{collector}]'"
        ) from error


class _LibraryCollector(Collector):
    """Base class: batches of whole texts, whose streams another library records."""

    def batches(
        self, request: CollectionRequest, rows: Int[np.ndarray, " n"], hookpoints: list[Hookpoint]
    ) -> Iterator[Batch]:
        config = self.model.text_config
        todo = units(request.positions, rows, config)
        budget = TokenBudget(self.store.batch_tokens, self.model.device)
        for indices in batches([len(unit.ids) for unit in todo], budget, config):
            padded = pad([todo[i] for i in indices], self.model.pad_id)
            try:
                streams = self.streams(padded, sorted(hookpoints, key=_computed))
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"out of memory at {padded.ids.numel()} tokens in a batch; type a smaller "
                    f"store.batch_tokens={padded.ids.numel() // 2}"
                ) from error
            row, token = padded.at
            values = {
                h: s.flatten(2)[row.to(s.device), token.to(s.device)].to("cpu", self.dtype)
                for h, s in streams.items()
            }
            yield padded.batch({h: (lambda v=v: v) for h, v in values.items()})

    @abstractmethod
    def streams(
        self, padded: PaddedUnits, hookpoints: Sequence[Hookpoint]
    ) -> dict[Hookpoint, Tensor]:
        """`[b, t, …]` of each hookpoint; `hookpoints` are in the order of the forward pass."""


def _computed(hookpoint: Hookpoint) -> tuple[int, int]:
    return hookpoint.layer, STREAM_ORDER.index(hookpoint.stream)


class TransformerLensCollector(_LibraryCollector):
    """`collector=transformer_lens`: a `TransformerBridge` with unprocessed weights.

    The library loads the model from its name or folder; a model in memory is a ModelError.
    """

    @cached_property
    def _bridge(self) -> Any:
        library = _import("transformer_lens.model_bridge", "transformer_lens")
        model = self.model
        if model.in_memory:
            raise ModelError(
                "collector=transformer_lens loads a model from its files, and this one is in "
                "memory; use collector=hf"
            )
        return library.TransformerBridge.boot_transformers(
            model.source,
            device=model.device,
            dtype=model.dtype,
            revision=model.cfg.revision,
            trust_remote_code=model.cfg.trust_remote_code,
        )

    def check_hookpoint(self, hookpoint: Hookpoint) -> None:
        """Raise ModelError where the model has no such layer."""
        self.model.check_layer(hookpoint.layer)

    def streams(
        self, padded: PaddedUnits, hookpoints: Sequence[Hookpoint]
    ) -> dict[Hookpoint, Tensor]:
        names = {h: h.transformer_lens for h in hookpoints}
        with torch.inference_mode():
            _, cache = self._bridge.run_with_cache(
                padded.ids.to(self.model.device),
                names_filter=list(names.values()),
                stop_at_layer=max(h.layer for h in hookpoints) + 1,
            )
        lacking = [name for name in names.values() if name not in cache]
        if lacking:
            raise ModelError(f"TransformerLens has no {lacking[0]} in {self.model.name}")
        return {h: cache[name] for h, name in names.items()}


class NnsightCollector(_LibraryCollector):
    """`collector=nnsight`: streams saved in a trace of the Hugging Face model."""

    @cached_property
    def _traced(self) -> Any:
        return _import("nnsight", "nnsight").NNsight(self.model.hf)

    @cached_property
    def _paths(self) -> dict[int, str]:
        """id of a module -> its path in the model."""
        return {id(module): name for name, module in self.model.hf.named_modules()}

    def _envoy(self, module: torch.nn.Module) -> Any:
        """nnsight's object that stands for a module."""
        envoy = self._traced
        for name in self._paths[id(module)].split("."):
            envoy = envoy[int(name)] if name.isdecimal() else getattr(envoy, name)
        return envoy

    def streams(
        self, padded: PaddedUnits, hookpoints: Sequence[Hookpoint]
    ) -> dict[Hookpoint, Tensor]:
        sites = {h: self.model.module(h) for h in hookpoints}
        envoys = {h: self._envoy(site.module) for h, site in sites.items()}
        device = self.model.device
        saved: dict[Hookpoint, Any] = {}
        inputs = {"input_ids": padded.ids.to(device), "attention_mask": padded.mask.to(device)}
        with torch.inference_mode(), self._traced.trace(**inputs, use_cache=False) as tracer:
            for hookpoint, site in sites.items():
                envoy = envoys[hookpoint]
                values = envoy.input if site.side == "input" else envoy.output
                saved[hookpoint] = (values if isinstance(values, Tensor) else values[0]).save()  # type: ignore[attr-defined]
            tracer.stop()
        return {h: sites[h].read(values) for h, values in saved.items()}
