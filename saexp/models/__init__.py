"""Hookpoints (a block and a stream), and their names in other libraries."""

import re
from dataclasses import dataclass

from saexp.errors import ModelError
from saexp.registry import did_you_mean

STREAMS = (
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "attn_z",
    "mlp_in",
    "mlp_in_normalized",
    "mlp_out",
)
STREAM_ORDER = (
    "embed",
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_in_normalized",
    "mlp_in",
    "mlp_out",
    "resid_post",
)
"""Streams of a block in the order in which they are computed."""
NOT_ADDED = ("attn_z", "mlp_in", "mlp_in_normalized")
"""Streams that are neither the residual stream nor added to it."""

_FROM_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_normalized": "mlp_in_normalized",
    "hook_mlp_out": "mlp_out",
}
_TO_TRANSFORMER_LENS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_in_normalized": "ln2.hook_normalized",
    "mlp_out": "hook_mlp_out",
}
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MIXERS = (*ATTENTION, "linear_attn", "mamba", "conv", "temporal_block")
"""Names of a block's token mixer: attention, linear attention or a state-space model."""
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "mlp_block")


@dataclass(frozen=True, order=True)
class Hookpoint:
    """A stream at a 0-based block.

    `attn_out` and `mlp_out` are what is added to the residual stream (after Gemma's post-norms);
    `mlp_in` is what the MLP reads (after its norm, gain included), `mlp_in_normalized` the same
    before the norm's gain and bias; `attn_z` is what the output projection of the attention (or of
    linear attention) reads, `[.., n_heads * head_dim]`; `embed` is what block 0 reads.
    """

    layer: int
    stream: str

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise ModelError(f"no stream '{self.stream}'; {did_you_mean(self.stream, STREAMS)}")
        if self.layer < 0 or (self.stream == "embed" and self.layer != 0):
            raise ModelError(f"layer={self.layer} has no stream '{self.stream}'")

    @property
    def stored(self) -> "Hookpoint":
        """The hookpoint of the stored values: a block's input is the previous block's output."""
        if self.stream != "resid_pre":
            return self
        return Hookpoint(self.layer - 1, "resid_post") if self.layer else Hookpoint(0, "embed")

    @property
    def name(self) -> str:
        """`layer_12.resid_post`, also the folder in the store."""
        return f"layer_{self.layer}.{self.stream}"

    @property
    def transformer_lens(self) -> str:
        """The name in TransformerLens, such as `blocks.12.hook_resid_post`.

        `mlp_in` has the name of the TransformerBridge, mlp.hook_in. `embed` is
        `blocks.0.hook_resid_pre`, because hook_embed is before the position embeddings of some
        models.
        """
        if self.stream == "embed":
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}.{_TO_TRANSFORMER_LENS[self.stream]}"

    @classmethod
    def parse(cls, name: str) -> "Hookpoint":
        """Parse a name of saexp, TransformerLens or a Hugging Face module.

        Raises ModelError for other names; for hook_mlp_in, which is ambiguous; and for hook_embed,
        which is before the position embeddings that some models add.
        """
        if match := re.fullmatch(r"layer_(\d+)\.(\w+)", name):
            return cls(int(match[1]), match[2])
        if name == "hook_embed":
            raise ModelError(
                "hook_embed is the token embedding before any position embedding (GPT-2, OPT), "
                "which saexp does not collect; what block 0 reads is blocks.0.hook_resid_pre, the "
                "same thing where positions are rotary"
            )
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match and match[2] == "hook_mlp_in":
            n = match[1]
            raise ModelError(
                f"{name} is the MLP's input before its norm in TransformerLens, and after it in "
                f"Gemma Scope 2's configs; type layer_{n}.resid_mid or layer_{n}.mlp_in"
            )
        if match and match[2] in _FROM_TRANSFORMER_LENS:
            return cls(int(match[1]), _FROM_TRANSFORMER_LENS[match[2]])
        if match := re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?", name):
            part = match[2]
            if part is None:
                return cls(int(match[1]), "resid_post")
            if part in MIXERS:
                return cls(int(match[1]), "attn_out")
            if part in MLPS:
                return cls(int(match[1]), "mlp_out")
        raise ModelError(
            f"'{name}' is not a hookpoint; type one such as layer_12.resid_post, "
            "blocks.12.hook_resid_post or model.layers.12"
        )
