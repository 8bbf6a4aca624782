"""`collector=transformer_lens` and `collector=nnsight`: other libraries' forward passes.

They serve as a check of `collector=hf`, and for models that Hugging Face hooks do not reach. Texts
are padded on the right and forwarded whole, without a shared prefix.
"""

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saexp.activations.collector import CollectionRequest, Collector
from saexp.activations.forward import Batch, PaddedUnits, TokenBudget, batches, pad, units
from saexp.errors import ModelError
from saexp.models.hookpoints import STREAM_ORDER, Hookpoint


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
        for chosen in batches([len(unit.ids) for unit in todo], budget, config):
            padded = pad([todo[i] for i in chosen], self.model.pad_id)
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
        """`[b, t, …]` of each hookpoint, which come in the order in which they are computed."""


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
        found = self._traced
        for name in self._paths[id(module)].split("."):
            found = found[int(name)] if name.isdecimal() else getattr(found, name)
        return found

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
