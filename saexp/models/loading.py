"""A Hugging Face causal language model with its tokenizer; weights are read on first use."""

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from saexp.config import ModelConfig
from saexp.digests import content_name, file_sha256, tensors_sha256
from saexp.errors import ModelError, SaexpError, brief
from saexp.hub import hub, snapshot
from saexp.models import Hookpoint
from saexp.models.resolution import (
    HUB_IDS,
    SHIPPED,
    WEIGHTS,
    Precision,
    checkpoint_dtype,
    dequantized,
    dequantizing,
    find_source,
    missing_weights,
    pick_device,
    pick_precision,
    quantization_options,
    require_gguf,
    short_name,
    why_unreadable,
)
from saexp.models.structure import (
    ObservedBehavior,
    Site,
    broken_streams,
    check_depth,
    check_sizes,
    find_blocks,
    find_site,
    make_head_input_contiguous,
    needs_check,
    shards_in,
    token_ids,
)
from saexp.results import html_table

log = logging.getLogger(__name__)


def in_template(tokenizer: Any, message: str, name: str) -> str:
    """Apply the chat template to a user's message, up to the start of the answer.

    Raises ModelError, which begins with the model's `name`, where there is no template or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name} has no chat template; set model.chat=false")
    messages = [{"role": "user", "content": message}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template is a program and may raise any error.
        reason = brief(f"{type(error).__name__}: {error}", 160)
        raise ModelError(
            f"{name}: its chat template fails ({reason}); set model.chat=false"
        ) from error
    if not isinstance(text, str):
        raise ModelError(f"{name}: its chat template gives no text; set model.chat=false")
    return text


class LanguageModel:
    """A causal LM and its tokenizer; `n_layers`, `d_model` and fingerprints need no weights.

    `prepend_bos` says whether texts begin with the BOS token (`data.tokenization.tokenize`); None
    leaves that to the tokenizer. `with_bos` returns the model with another value.
    """

    __slots__ = ("__dict__", "__weakref__", "prepend_bos")

    prepend_bos: bool | None
    gguf_file: Path | None = None
    """The GGUF file of the model, which identifies it; `source` is its dequantised copy, if any."""

    def __init__(self, cfg: ModelConfig, cache_dir: str | Path | None = None) -> None:
        """Find the files and read the config.

        A GGUF file is dequantised into a folder of `cache_dir`, once; without it, in memory, each
        time the weights are read.
        """
        self.cfg = cfg
        self.name = cfg.name
        files = find_source(cfg)
        self.source, self.gguf_file = files.path, files.gguf_file
        self._read_options = {"gguf_file": files.gguf_file.name} if files.gguf_file else {}
        self.device = pick_device(cfg.device)
        if files.gguf_file is not None:
            self._prepare_gguf(files.gguf_file, cache_dir)
        self.in_memory = False
        self.prepend_bos = cfg.prepend_bos
        self.observed = ObservedBehavior()
        self._hf: Any = None
        # The shipped files hold every value and a plain tokenizer. The architecture's own classes
        # give the same but import all of transformers' modelling code, which takes 2 s.
        self.plain = cfg.name in SHIPPED
        if not self._read_options:
            check_depth(Path(self.source) / "config.json", self.name)
        self.config: Any = (
            PreTrainedConfig(**json.loads((Path(self.source) / "config.json").read_text("utf-8")))
            if self.plain
            else self._from_hub("AutoConfig", "config")
        )
        check_sizes(self.text_config, self.name)
        # Files of the shipped models are in bfloat16 to be small; all that is published about them
        # was computed in float32. A GGUF file's values are those of its blocks, in no dtype.
        has_no_dtype = self.plain or self.gguf_file is not None
        checkpoint = None if has_no_dtype else checkpoint_dtype(self.config)
        self.precision = pick_precision(cfg.dtype, self.device, checkpoint)
        self._quantization = quantization_options(cfg.quantization, self.device, self.dtype)

    def _prepare_gguf(self, file: Path, cache_dir: str | Path | None) -> None:
        """Read from the dequantised copy; from the file where there is no `cache_dir` to write."""
        if self.cfg.quantization is not None:
            raise ModelError(
                f"model.name={self.name}: {file.name} is quantised already; leave out "
                "model.quantization"
            )
        if cache_dir is None:
            require_gguf(file)
            return
        dtype = pick_precision(self.cfg.dtype, self.device, None).dtype
        try:
            folder = dequantized(file, cache_dir, dtype)
        except SaexpError:
            raise
        except Exception as error:
            # As of other files: damaged ones, or of another model, raise any error.
            raise self._cannot_load("weights", why_unreadable(error)) from error
        if folder is not None:
            self.source, self._read_options = str(folder), {}

    @classmethod
    def wrap(cls, hf: nn.Module, tokenizer: Any = None, name: str = "in-memory") -> "LanguageModel":
        """Wrap a model that is already in memory (notebooks, tests)."""
        model = cls.__new__(cls)
        parameter = next(hf.parameters())
        model.cfg = ModelConfig(name=name)
        model.name, model.source, model.in_memory, model.plain = name, name, True, False
        model.prepend_bos, model._read_options = None, {}
        model._quantization = {}
        model.observed = ObservedBehavior()
        model.device = parameter.device
        model.precision = Precision(parameter.dtype, "the model in memory")
        model._hf, model.config = hf.eval(), hf.config
        reset_rope_before_passes(hf)
        make_head_input_contiguous(hf)
        if tokenizer is not None:
            model.__dict__["tokenizer"] = tokenizer
        return model

    def with_bos(self, prepend_bos: bool | None) -> "LanguageModel":
        """This model with another `prepend_bos`: a view that shares weights, hooks and caches.

        Everything but `prepend_bos` is shared, also what is loaded or computed later.
        """
        view = object.__new__(type(self))
        view.__dict__ = self.__dict__
        view.prepend_bos = prepend_bos
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prepend_bos" and hasattr(self, name):
            raise AttributeError("a model is immutable; use model.with_bos(...)")
        super().__setattr__(name, value)

    def _from_hub(self, kind: str, what: str, **options: Any) -> Any:
        """Load by transformers' class of this name, which is imported on first use."""
        read = getattr(transformers, kind).from_pretrained
        try:
            with self._files(), warnings.catch_warnings():
                # The pickle is refused below, with one line.
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                return read(
                    self.source,
                    revision=self.cfg.revision,
                    trust_remote_code=self.cfg.trust_remote_code,
                    **self._read_options,
                    **options,
                )
        except Exception as error:
            # Files that are absent, unreachable, damaged or of another model raise any error.
            raise self._cannot_load(what, why_unreadable(error)) from error

    def _files(self) -> AbstractContextManager[None]:
        """Context in which the files are read; a local folder needs no hub."""
        return nullcontext() if Path(self.source).is_dir() else hub()

    def _cannot_load(self, what: str, reason: str) -> ModelError:
        looks_local = "/" in self.source and Path(self.source).parent.is_dir()
        is_absent = looks_local and not Path(self.source).is_dir()
        absent = "no such folder here, and " if is_absent else ""
        advice = "type a hub id that is reachable or cached, or a local folder"
        if self.source in HUB_IDS.values():
            advice = f"make real-model makes it without the hub ({self.source})"
        return ModelError(
            f"model.name={self.name}: {absent}its {what} cannot be loaded ({reason}); {advice}"
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        # Llama 3's config requests a clean-up that transformers warns about and does not do.
        is_dequantized = self.gguf_file is not None and not self._read_options
        kind = "PreTrainedTokenizerFast" if self.plain or is_dequantized else "AutoTokenizer"
        return self._from_hub(kind, "tokenizer", clean_up_tokenization_spaces=False)

    def __repr__(self) -> str:
        """Name, sizes, device and dtype."""
        return (
            f"{type(self).__name__}({self.name!r}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, device='{self.device}', dtype={short_name(self.dtype)})"
        )

    def _repr_html_(self) -> str:
        rows = {
            "layers": self.n_layers,
            "d_model": self.d_model,
            "vocabulary": self.text_config.vocab_size,
            "device": self.device,
            "dtype": short_name(self.dtype),
        }
        return html_table(self.name, rows)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights and activations."""
        return self.precision.dtype

    @property
    def notes(self) -> list[str]:
        """Notes for the results of a run with this model."""
        return [self.precision.note] if self.precision.note else []

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._hf is not None

    @property
    def hf(self) -> Any:
        """The Hugging Face model, in eval mode; read on first use."""
        if self._hf is None:
            if not sys.stderr.isatty():
                hf_logging.disable_progress_bar()
            log.info("loading %s (%s, %s)", self.name, self.device, self.dtype)
            for note in self.notes:
                log.info("%s", note)
            options: dict[str, Any] = dict(self._quantization)
            if self._read_options:
                options |= dequantizing()
            if self.cfg.device_map:
                options["device_map"] = self.cfg.device_map
            is_placed = "device_map" in options
            hf, info = self._from_hub(
                "AutoModelForCausalLM",
                "weights",
                dtype=self.dtype,
                output_loading_info=True,
                **options,
            )
            if absent := missing_weights(info["missing_keys"]):
                raise self._cannot_load("weights", absent)
            placed = hf if is_placed else hf.to(self.device)
            if is_placed:
                # Token ids go to the device of the embedding.
                self.device = placed.get_input_embeddings().weight.device
            self._hf = placed.eval().requires_grad_(False)
            reset_rope_before_passes(placed)
            make_head_input_contiguous(placed)
            if self.plain:
                self.config = placed.config
                self.__dict__.pop("text_config", None)
        return self._hf

    @cached_property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.text_config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config.hidden_size)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return find_blocks(self.hf, self.n_layers, self.cfg.blocks)

    @cached_property
    def broken_streams(self) -> dict[Hookpoint, str]:
        """Hookpoints that this model does not have -> the reason; runs a few tokens."""
        return broken_streams(self.hf, self.blocks, self.text_config)

    def check_layer(self, layer: int) -> None:
        """Raise ModelError unless the model has this block; reads no weights."""
        if not 0 <= layer < self.n_layers:
            last = self.n_layers - 1
            short = self.name.rpartition("/")[2]
            nearest = min(max(layer, 0), last)
            raise ModelError(
                f"layer={layer} is out of range: {short} has layers 0-{last}; try layer={nearest}"
            )

    def module(self, hookpoint: Hookpoint) -> Site:
        """The site to hook for a stream. Raises ModelError where the model has no such stream."""
        self.check_streams([hookpoint])
        return find_site(self.blocks, hookpoint, self.text_config)

    def check_streams(self, hookpoints: Iterable[Hookpoint]) -> None:
        """Raise ModelError where a stream is not what its name says.

        Call this before blocks are replaced: the first check of some streams runs them.
        """
        for at in hookpoints:
            self.check_layer(at.layer)
            if needs_check(self.hf, at.stream) and at in self.broken_streams:
                raise ModelError(self.broken_streams[at])

    @cached_property
    def _generation_file(self) -> Any:
        """generation_config.json; None without one. Raises ModelError where it is damaged."""
        name = "generation_config.json"
        try:
            with self._files():
                return GenerationConfig.from_pretrained(
                    self.source, revision=self.cfg.revision or "main"
                )
        except Exception as error:
            # transformers raises OSError for a file that is absent, and from JSON's own error.
            damaged = isinstance(error.__cause__ or error.__context__, ValueError)
            if isinstance(error, OSError) and not damaged:
                return None
            raise self._cannot_load(name, why_unreadable(error)) from error

    @property
    def _generation_config(self) -> Any:
        """The generation config; None without one. Raises ModelError where its file is damaged."""
        # transformers would ignore a damaged file.
        from_file = None if self.in_memory or self._read_options else self._generation_file
        return from_file if self._hf is None else getattr(self._hf, "generation_config", None)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation, from config, generation config and tokenizer."""
        ids: set[int] = set()
        for source in (self.config, self._generation_config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids.update(token_ids(value, "eos_token_id", self.name))
        return tuple(sorted(ids))

    @property
    def pad_id(self) -> int:
        """A token id to pad with. Padding is always masked, so the choice does not matter."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None else (self.eos_ids[0] if self.eos_ids else 0)

    def _file(self, name: str) -> Path | None:
        folder = Path(self.source)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            with self._files():
                file = cached_file(
                    self.source,
                    name,
                    revision=self.cfg.revision,
                    _raise_exceptions_for_missing_entries=False,
                )
        except Exception as error:
            raise self._cannot_load(name, why_unreadable(error)) from error
        return Path(file) if file else None

    def _weights_files(self) -> list[Path]:
        """The weights files that transformers would read, without others in the same folder."""
        for name in WEIGHTS:
            if file := self._file(name):
                return [file]
            if index := self._file(f"{name}.index.json"):
                try:
                    names = shards_in(index)
                except (OSError, ValueError, RecursionError) as error:
                    raise self._cannot_load("weights", why_unreadable(error)) from error
                shards = {shard: self._file(shard) for shard in names}
                if absent := [shard for shard, file in shards.items() if file is None]:
                    raise self._cannot_load("weights", f"no file named {absent[0]}")
                return [file for file in shards.values() if file is not None]
        raise self._cannot_load("weights", f"no file named {' or '.join(WEIGHTS)}")

    def _code_files(self) -> list[Path]:
        """Modules with the repository's own code, where it may run."""
        auto_map = getattr(self.config, "auto_map", None) if self.cfg.trust_remote_code else None
        values = auto_map.values() if isinstance(auto_map, dict) else ()
        modules = {str(v).rpartition("--")[2].partition(".")[0] for v in values}
        return [file for name in sorted(modules) if (file := self._file(f"{name}.py"))]

    @property
    def fingerprint(self) -> str:
        """sha256 of config and weights, and of the repository's own code where it may run.

        A model in memory is hashed with its current weights. Otherwise the files are hashed, not
        loaded; files in a hub cache are identified by the content hashes in their names.
        """
        return tensors_sha256(self._hf) if self.in_memory else self._files_fingerprint

    @cached_property
    def has_local_weights(self) -> bool:
        """Whether the weights are in memory or in files on this machine; downloads nothing."""
        source = Path(self.source)
        folder = source if source.is_dir() else snapshot(self.source, self.cfg.revision)
        names = [*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS)]
        is_on_disk = folder is not None and any((folder / name).is_file() for name in names)
        return self.in_memory or self.gguf_file is not None or is_on_disk

    @property
    def known_fingerprint(self) -> str | None:
        """`fingerprint`; None where the weights are not on this machine."""
        return self.fingerprint if self.has_local_weights else None

    @cached_property
    def _files_fingerprint(self) -> str:
        if self.gguf_file is not None:
            return content_name(self.gguf_file)
        config = self._file("config.json")
        assert config is not None, "a config was loaded"
        digest = hashlib.sha256(f"config.json:{file_sha256(config)}\n".encode())
        for file in [*self._weights_files(), *self._code_files()]:
            digest.update(f"{file.name}:{content_name(file)}\n".encode())
        if self.cfg.quantization is not None:
            digest.update(f"quantization:{self.cfg.quantization}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of the vocabulary and the special tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        special = sorted(map(str, self.tokenizer.all_special_tokens))
        return hashlib.sha256(repr((vocabulary, special)).encode()).hexdigest()

    def chat_text(self, prompt: str) -> str:
        """The prompt in the chat template, as text that already contains any BOS token."""
        return in_template(self.tokenizer, prompt, self.name)


def load_model(cfg: ModelConfig, *, cache_dir: str | Path | None = None, **_: Any) -> LanguageModel:
    """Registry builder of kind `model`."""
    return LanguageModel(cfg, cache_dir)


def reset_rope_before_passes(hf: nn.Module) -> None:
    """Make the frequencies of a pass depend on its own length only.

    transformers' dynamic NTK keeps the frequencies of the longest sequence so far until a sequence
    within the context comes, so that activations would depend on earlier texts.
    """
    for module in hf.modules():
        if _dynamic_prefixes(module):
            module.register_forward_pre_hook(_reset)


def _dynamic_prefixes(module: nn.Module) -> list[str]:
    """Prefixes of the names of a module's dynamic frequencies, one per type of layer."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len") or kinds is None:
        return []
    of_prefix = {f"{k}_": v for k, v in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    return [prefix for prefix, kind in of_prefix.items() if "dynamic" in str(kind)]


def _reset(module: Any, _args: Any) -> None:
    for prefix in _dynamic_prefixes(module):
        original = getattr(module, f"{prefix}original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", original.to(current.device))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
