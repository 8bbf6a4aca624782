"""SmolLM2-135M in each tool: the same work, on the same tokens and batches.

Each function returns `Work`: what saexp does, what the others do, and how the results are compared.
TransformerLens has no SmolLM2 among its names, so that its HookedTransformer is made from a config
and the model's weights by its own conversion for Llama.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saexp
from saexp.activations.collection import collect
from saexp.activations.collector import CollectionRequest, HuggingFaceCollector
from saexp.activations.shared_prefixes import units
from saexp.config import CollectorConfig, PositionsConfig, StoreConfig
from saexp.data import Example
from saexp.data.positions import resolve_positions
from saexp.data.tokenization import TokenizedText
from saexp.interventions.cached_generation import batch_tokens_for, generate
from saexp.interventions.stream_edits import Add, Row, Vector
from saexp.models import Hookpoint
from saexp.models.forward import TokenBudget, batches, padded
from saexp.models.loading import LanguageModel
from saexp.registry import build as build_component
from saexp.saes import SparseAutoencoder

N_TEXTS, N_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 8, 12, 20
LATENT, COEFFICIENT = 100, 20.0
"""What is added to every token's stream: the decoder row of a latent, times this."""
Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Work:
    """The same work in several tools."""

    name: str
    unit: str
    amount: int
    """How many of `unit` one run computes."""
    own: Callable[[], Any]
    others: Ways
    difference: Callable[[Any, Any], float]
    """(saexp's result, another tool's) -> how much they differ."""
    tolerance: float


@dataclass(frozen=True)
class RealModel:
    """The model in one dtype, its SAE at one layer, and tokens of the neutral text."""

    model: LanguageModel
    layer: int
    folder: Path
    """For what is written."""

    @property
    def at(self) -> Hookpoint:
        return Hookpoint(self.layer, "resid_post")

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def is_exact(self) -> bool:
        return self.dtype == torch.float32

    @cached_property
    def sae_folder(self) -> Path:
        shipped = saexp.load_sae("smollm2", self.layer, "resid_post")
        return Path(shipped.metadata["path"]).parent

    @cached_property
    def sae(self) -> SparseAutoencoder:
        name = str(self.dtype).removeprefix("torch.")
        return saexp.load_sae(self.sae_folder, self.layer, "resid_post", dtype=name)

    @cached_property
    def lens_sae(self) -> Any:
        from sae_lens import SAE

        name = str(self.dtype).removeprefix("torch.")
        return SAE.load_from_disk(self.sae_folder, device="cpu", dtype=name)

    @cached_property
    def ids(self) -> list[tuple[int, ...]]:
        """Token ids of each line of the neutral text."""
        source = Path(saexp.__file__).parent / "assets" / "background.txt"
        lines = source.read_text(encoding="utf-8").splitlines()
        return [tuple(ids) for ids in self.model.tokenizer(lines)["input_ids"]]

    def contexts(self, size: int) -> Tensor:
        """The lines one after another in contexts `[n, size]`."""
        joined = [i for ids in self.ids for i in ids]
        n = len(joined) // size
        return torch.tensor(joined[: n * size]).view(n, size)

    @cached_property
    def lens(self) -> Any:
        """The model as a HookedTransformer."""
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights

        about = self.model.text_config
        config = HookedTransformerConfig(
            n_layers=about.num_hidden_layers,
            d_model=about.hidden_size,
            n_ctx=512,
            d_head=about.head_dim,
            n_heads=about.num_attention_heads,
            n_key_value_heads=about.num_key_value_heads,
            d_mlp=about.intermediate_size,
            d_vocab=about.vocab_size,
            act_fn="silu",
            gated_mlp=True,
            eps=about.rms_norm_eps,
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=about.head_dim,
            rotary_base=int(about.rope_parameters["rope_theta"]),
            device="cpu",
            dtype=self.dtype,
            init_weights=False,
        )
        lens = HookedTransformer(config, self.model.tokenizer, default_padding_side="right")
        weights = convert_llama_weights(self.model.hf, config)
        lens.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
        return lens.eval()

    @cached_property
    def bridge(self) -> Any:
        """The model as a TransformerBridge."""
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            self.model.source, device="cpu", dtype=self.dtype
        )

    def nnsight(self) -> Any:
        """nnsight's model; None where nnsight is not installed."""
        try:
            library = importlib.import_module("nnsight")
        except ImportError:
            return None
        return library.LanguageModel(self.model.hf, tokenizer=self.model.tokenizer)

    @contextmanager
    def hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        """With a forward hook on the block."""
        handle = self.model.blocks[self.layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def relative(own: Tensor, other: Tensor) -> float:
    """The largest distance of two rows, relative to the norm of the second."""
    a, b = own.double(), other.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-9)).max())


# Collection


class _Stop(Exception):
    pass


def collection(real_model: RealModel) -> Work:
    """The stream at every token of the texts; saexp writes it, with checksums, to a new store."""
    model, at = real_model.model, real_model.at
    texts = []
    for number, line in enumerate(real_model.ids[:N_TEXTS]):
        ids = line[: 6 + number * 7 % 13]
        spans = tuple((i, i + 1) for i in range(len(ids)))
        text = model.tokenizer.decode(ids)
        texts.append(TokenizedText(text, ids, spans, (False,) * len(ids), False))
    examples = [Example(id=str(i), text=t.text) for i, t in enumerate(texts)]
    positions = build_component("positions", PositionsConfig(name="all"))
    placement = resolve_positions(examples, texts, positions, model.tokenizer, 0)
    n_tokens = sum(len(t.ids) for t in texts)
    assert placement.n_rows == n_tokens, "a row for every token"

    def own() -> Tensor:
        request = CollectionRequest(positions=placement, hookpoints=[at], max_length=512)
        cfg = CollectorConfig(name="hf")
        collector = HuggingFaceCollector(cfg, model=model, store=StoreConfig())
        cache_dir = tempfile.mkdtemp(dir=real_model.folder)
        store, _ = collect(collector, request, cache_dir=cache_dir)
        return store.acts(at.layer)

    todo = units(placement, np.arange(placement.n_rows))
    plan = list(batches([len(u.ids) for u in todo], TokenBudget("auto", model.device)))
    inputs = [
        padded([todo[i].ids for i in chosen], model.pad_id, model.device, padding_side="right")
        for chosen in plan
    ]
    assert sum(int(mask.sum()) for _, mask in inputs) == n_tokens, "every text is run once"
    first = np.cumsum([0, *(len(t.ids) for t in texts)])
    by_ids = {t.ids: range(a, b) for t, a, b in zip(texts, first[:-1], first[1:], strict=True)}
    order = torch.tensor([r for chosen in plan for i in chosen for r in by_ids[tuple(todo[i].ids)]])

    def joined(parts: Sequence[Tensor]) -> Tensor:
        unpadded = [p[m.bool()] for p, (_, m) in zip(parts, inputs, strict=True)]
        return torch.cat(unpadded)

    return Work(
        "collection",
        "tokens",
        n_tokens,
        own,
        _collecting(real_model, inputs, joined),
        lambda a, b: relative(a[order], b),
        # Of single rows in bfloat16, where TransformerLens computes attention in other steps.
        1e-4 if real_model.is_exact else 0.2,
    )


def _collecting(
    real_model: RealModel,
    inputs: Sequence[tuple[Tensor, Tensor]],
    joined: Callable[[Sequence[Tensor]], Tensor],
) -> Ways:
    """How the others do it: in memory, on the batches of saexp."""
    model, layer = real_model.model, real_model.layer
    name = real_model.at.transformer_lens
    stream: list[Tensor] = []

    def keep_and_stop(_m: Any, _a: Any, out: Any) -> None:
        stream.append(out if isinstance(out, Tensor) else out[0])
        raise _Stop

    @torch.inference_mode()
    def whole() -> Tensor:
        return joined(
            [
                model.hf(
                    input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
                ).hidden_states[layer + 1]
                for ids, mask in inputs
            ]
        )

    @torch.inference_mode()
    def stopped() -> Tensor:
        stream.clear()
        with real_model.hooked(keep_and_stop):
            for ids, mask in inputs:
                with suppress(_Stop):
                    model.hf(input_ids=ids, attention_mask=mask, use_cache=False)
        return joined(stream)

    def lens_way(lens: Any) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def run() -> Tensor:
            parts = []
            for ids, mask in inputs:
                _, cache = lens.run_with_cache(
                    ids, attention_mask=mask, names_filter=name, stop_at_layer=layer + 1
                )
                parts.append(cache[name])
            return joined(parts)

        return run

    ways: Ways = {
        "transformers, output_hidden_states": whole,
        "transformers, hook that ends the pass": stopped,
        "TransformerLens HookedTransformer": lens_way(real_model.lens),
        "TransformerLens TransformerBridge": lens_way(real_model.bridge),
    }
    traced = real_model.nnsight()
    if traced is None:
        return ways

    @torch.inference_mode()
    def traced_way() -> Tensor:
        parts = []
        for ids, mask in inputs:
            arguments = {"input_ids": ids, "attention_mask": mask}
            with traced.trace(arguments, use_cache=False) as tracer:
                values = traced.model.layers[layer].output.save()
                tracer.stop()
            parts.append(values if isinstance(values, Tensor) else values[0])
        return joined(parts)

    return {**ways, "nnsight trace, stopped": traced_way}


# Encoding


def encoding(real_model: RealModel) -> Work:
    """All latents of the stream of some contexts, as a dense tensor."""
    stream = _stream(real_model, real_model.contexts(64)[:8]).flatten(0, 1)
    sae, lens_sae = real_model.sae, real_model.lens_sae
    W_enc, b_enc, b_dec, threshold = (
        getattr(lens_sae, name).detach() for name in ("W_enc", "b_enc", "b_dec", "threshold")
    )

    @torch.inference_mode()
    def formula() -> Tensor:
        pre = (stream - b_dec) @ W_enc + b_enc
        return torch.where(pre > threshold, pre.relu(), 0.0)

    return Work(
        "encoding",
        "vectors",
        len(stream),
        torch.inference_mode()(lambda: sae.encode(stream)),
        {
            "sae-lens encode": torch.inference_mode()(lambda: lens_sae.encode(stream)),
            "torch, the formula": formula,
        },
        # Rows of latents differ in the few that are near their threshold.
        lambda a, b: float((a.double() - b.double()).norm() / b.double().norm()),
        1e-3 if real_model.is_exact else 0.1,
    )


def _stream(real_model: RealModel, ids: Tensor) -> Tensor:
    """The stream at the hookpoint, by transformers."""
    with torch.inference_mode():
        out = real_model.model.hf(ids, output_hidden_states=True, use_cache=False)
    return out.hidden_states[real_model.layer + 1].clone()


# Generation


def generation(real_model: RealModel) -> Work:
    """Greedy continuations while a latent's decoder row is added at every token."""
    model, layer = real_model.model, real_model.layer
    prompts = [ids[:PROMPT_TOKENS] for ids in real_model.ids if len(ids) > PROMPT_TOKENS][
        :N_PROMPTS
    ]
    vector = real_model.sae.W_dec[LATENT].detach().float()
    vector = vector / vector.norm() * COEFFICIENT
    added = vector.to(real_model.dtype)
    rows = [
        Row(p, (Add(real_model.at, Vector(vector), 1.0),), tuple(range(len(p))), generated=True)
        for p in prompts
    ]
    ids = torch.tensor(prompts)
    ends = set(model.eos_ids)

    def until_end(tokens: Tensor) -> list[list[int]]:
        listed = [row[PROMPT_TOKENS:].tolist() for row in tokens]
        return [r[: next((i for i, t in enumerate(r) if t in ends), len(r))] for r in listed]

    def own() -> list[list[int]]:
        return generate(
            model, rows, max_new_tokens=NEW_TOKENS, batch_tokens=batch_tokens_for(model, "auto")
        )

    def steer(_m: Any, _a: Any, out: Any) -> Any:
        return out + added if isinstance(out, Tensor) else (out[0] + added, *out[1:])

    arguments: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": sorted(ends),
        "pad_token_id": model.pad_id,
    }

    @torch.inference_mode()
    def by_hook() -> list[list[int]]:
        with real_model.hooked(steer):
            mask = torch.ones_like(ids)
            return until_end(model.hf.generate(ids, attention_mask=mask, **arguments))

    @torch.inference_mode()
    def by_lens() -> list[list[int]]:
        name = real_model.at.transformer_lens
        with real_model.lens.hooks(fwd_hooks=[(name, lambda stream, hook: stream + added)]):  # noqa: ARG005
            tokens = real_model.lens.generate(
                ids,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=sorted(ends),
                prepend_bos=False,
                verbose=False,
                return_type="tokens",
            )
        return until_end(tokens)

    others: Ways = {"transformers, hook": by_hook, "TransformerLens HookedTransformer": by_lens}
    traced = real_model.nnsight()
    if traced is not None:

        @torch.inference_mode()
        def by_trace() -> list[list[int]]:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with traced.generate(inputs, **arguments) as tracer:
                for _ in tracer.iter[:NEW_TOKENS]:
                    traced.model.layers[layer].output[:] += added
                tokens = tracer.result.save()
            return until_end(tokens)

        others["nnsight generate"] = by_trace
    return Work(
        "steered generation",
        "new tokens",
        N_PROMPTS * NEW_TOKENS,
        own,
        others,
        lambda a, b: 1 - sum(x == y for x, y in zip(a, b, strict=True)) / len(b),
        # In bfloat16 two tokens may be equally likely but for rounding.
        0.0 if real_model.is_exact else 0.5,
    )
