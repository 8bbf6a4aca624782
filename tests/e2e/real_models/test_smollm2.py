"""SmolLM2-135M with its real weights: saexp computes what transformers and plain loops compute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import saexp
from saexp.models.resolution import HUB_IDS, find_source, made_folder
from tests.unit.reports.run_outputs import command, metrics_of

FOLDER = made_folder("smollm2")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file(), reason="make real-model has not been run"
    ),
]
TEXTS = (
    "The Eiffel Tower is a lattice tower in Paris, which was built for the World's Fair of 1889.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower.",
    "def add(a, b):\n    return a + b\n",
    "“Naïve” – 東京 is a city of 14,000,000 people.",
    "Once upon a time there was a small fox who lived at the edge of a dark forest. " * 3,
)
LAYERS = (0, 15, 28)


@pytest.fixture(scope="module")
def hf() -> Any:
    """transformers' own model, in float32."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> list[torch.Tensor]:
    """Token ids of TEXTS by transformers' own tokenizer, each [1, n_tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def model() -> Any:
    return saexp.load_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sae() -> Any:
    """The SAE that ships with the project."""
    return saexp.load_sae("smollm2", layer=15)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_shape_is_that_of_the_published_model(model: Any) -> None:
    assert (model.n_layers, model.d_model, model.text_config.vocab_size) == (30, 576, 49152)
    assert model.source == str(FOLDER)
    assert "assistant named SmolLM" in model.chat_text("Hello")


def test_activations_are_transformers_hidden_states(
    model: Any, hf: Any, ids: list[torch.Tensor]
) -> None:
    states = [hf.model(row, output_hidden_states=True).hidden_states for row in ids]
    for layer in LAYERS:
        computed = model.activations(list(TEXTS), layer=layer)
        for acts, expected in zip(computed, states, strict=True):
            exact = expected[layer + 1][0]
            assert acts.shape == exact.shape
            assert float((acts - exact).norm() / exact.norm()) < 1e-5


def test_greedy_texts_are_those_of_transformers(model: Any, hf: Any) -> None:
    for question, chat in (("What is the capital of France?", True), ("Name three", False)):
        text = model.chat_text(question) if chat else question
        row = torch.tensor([model.tokenizer(text).input_ids])
        output = hf.generate(row, do_sample=False, max_new_tokens=12)[0, row.shape[1] :]
        expected = model.tokenizer.decode(output, skip_special_tokens=True)
        assert model.generate(question, max_new_tokens=12, chat=chat) == expected


def test_steered_texts_are_those_of_a_plain_hook(model: Any, hf: Any, sae: Any) -> None:
    prompt, size = "The capital of France is", 60.0
    row = torch.tensor([model.tokenizer(prompt).input_ids])
    direction = size * sae.W_dec[7] / sae.W_dec[7].norm()

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        return (
            (output[0] + direction, *output[1:])
            if isinstance(output, tuple)
            else output + direction
        )

    handle = hf.model.layers[15].register_forward_hook(add)
    output = hf.generate(row, do_sample=False, max_new_tokens=8)[0, row.shape[1] :]
    handle.remove()
    with saexp.steer(model, sae, [7], coefficient=size, unit="absolute"):
        steered = model.generate(prompt, max_new_tokens=8)
    assert steered == model.tokenizer.decode(output, skip_special_tokens=True)
    assert steered != model.generate(prompt, max_new_tokens=8)


def test_the_loss_clean_and_spliced_is_that_of_a_hand_written_loop(
    hf: Any, ids: list[torch.Tensor], sae: Any, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS[:2]) + "\n", encoding="utf-8")
    words = "task=evaluate model=smollm2 sae=smollm2 layer=15 dtype=float32 device=cpu"
    paths = [f"dataset.path={file}", f"cache_dir={tmp_path}/cache", "tracker=none"]
    cfg = saexp.compose(
        [*words.split(), *paths, "task.n_bootstrap=0", "positions.max_norm_ratio=null"]
    )
    metrics = saexp.run(cfg, tmp_path / "run").metrics

    def splice(_module: Any, _inputs: Any, output: Any) -> Any:
        acts = output[0] if isinstance(output, tuple) else output
        new = sae.decode(sae.encode(acts), acts)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    clean = loss(hf, ids[:2])
    handle = hf.model.layers[15].register_forward_hook(splice)
    spliced = loss(hf, ids[:2])
    handle.remove()
    assert metrics["reconstruction/ce_clean"] == pytest.approx(clean, rel=1e-5)
    assert metrics["reconstruction/ce_sae"] == pytest.approx(spliced, rel=1e-4)
    assert 1.5 < clean < 4 < spliced


def loss(hf: Any, ids: list[torch.Tensor]) -> float:
    """Mean of -log p(next token) in nats, over all predictions of all texts."""
    values = []
    for row in ids:
        log_p = hf(row).logits[0, :-1].double().log_softmax(-1)
        values += [-float(log_p[i, token]) for i, token in enumerate(row[0, 1:].tolist())]
    return float(np.mean(values))


def test_the_command_of_the_readme_runs(tmp_path: Path) -> None:
    words = "model=smollm2 sae=smollm2 intervention=none tracker=none dataset.n_examples=3"
    few = "analyzer.n_bootstrap=0 analyzer.n_background=32 dataset.background=few.txt"
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:2]), encoding="utf-8")
    result = command(tmp_path, *words.split(), *few.split(), "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert metrics_of(tmp_path / "run")["collection/n_rows"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_without_the_folder_it_is_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = saexp.compose(["model=smollm2"]).model
    assert find_source(cfg).path == str(FOLDER)
    monkeypatch.setattr("saexp.models.resolution.PACKAGE", Path("/nowhere/saexp"))
    assert find_source(cfg).path == HUB_IDS["smollm2"]
    with pytest.raises(saexp.errors.ModelError, match="make real-model makes it without the hub"):
        saexp.load_model("smollm2")
