"""Room for the tokens to come in a key-value cache."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def is_plain(cache: Any) -> bool:
    """Whether it holds keys and values and nothing else, so that rows of it can be chosen."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(
        isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers
    )


def with_room(cache: Any, n_tokens: int) -> Any:
    """The cache, whose layers write the next `n_tokens` in place instead of copying what they hold.

    transformers' own layers copy all keys and values for every token. Layers of other kinds, and
    sliding windows that would fill up meanwhile, are left as they are.
    """
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            continue
        window = getattr(layer, "sliding_window", None)
        if window is None or layer.get_seq_length() + n_tokens < window:
            cache.layers[i] = _Roomy(layer, n_tokens)
    return cache


class _Roomy(DynamicLayer):
    """Keys and values are the front part of larger tensors."""

    def __init__(self, layer: DynamicLayer, n_tokens: int) -> None:
        super().__init__()
        self.is_sliding, self.is_initialized = layer.is_sliding, True
        self.dtype, self.device = layer.dtype, layer.device
        self.keys, self.values = layer.keys, layer.values
        self.n_tokens = n_tokens
        self.whole: dict[str, Tensor] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """All that is held, `[b, heads, t, d]`, the new ones last."""
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._extended("keys", self.keys, key_states)
        self.values = self._extended("values", self.values, value_states)
        return self.keys, self.values

    def _extended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        whole = self.whole.get(name)
        # Rows that were chosen, or reordered, are no longer the front part of it.
        same = whole is not None and held.data_ptr() == whole.data_ptr()
        if whole is None or not same or end > whole.shape[-2] or len(held) != len(whole):
            whole = held.new_empty((*held.shape[:2], end + self.n_tokens, held.shape[-1]))
            whole[:, :, :start] = held
            self.whole[name] = whole
        whole[:, :, start:end] = new
        return whole[:, :, :end]
