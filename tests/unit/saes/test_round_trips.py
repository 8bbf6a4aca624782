"""What saexp trains and saves, sae-lens loads as the same SAE of the same place, and vice versa."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import saexp
from saexp.config import SAETrainerConfig
from saexp.models import STREAMS, Hookpoint
from saexp.saes.training import ARCHITECTURES, SAES, TRANSCODERS, Training, TrainingSource
from tests.train_alone import train_alone
from tests.unit.saes.make import D_IN, D_SAE, K, parameters, points

D_OUT, BATCH, MODEL = 9, 32, "someone/their-model"
SCALINGS = ("none", "expected_average_only_in")
IN, OUT = Hookpoint(3, "mlp_in"), Hookpoint(3, "mlp_out")


def trained(folder: Path, name: str, source: TrainingSource, scaling: str) -> Path:
    """After a few steps on noise far from mean 0 and norm sqrt(d)."""
    options = {"k": K} if "topk" in name else {}
    if name == "matching_pursuit":
        options = {"max_iterations": K, "residual_threshold": 0.5}
    cfg = SAETrainerConfig(
        name=name,
        n_samples=4 * BATCH,
        batch_size=BATCH,
        normalize_activations=scaling,
        options=options,
    )
    training = Training(cfg, D_SAE, source, folder / "checkpoints", torch.device("cpu"))
    width = D_IN + (source.d_out or 0)

    def batches(step: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(step)
        while True:
            yield 3 + 5 * torch.randn(BATCH, width, generator=generator)

    assert list(train_alone(training, batches))
    return training.save(folder / "sae")


def place_of(
    name: str, hookpoint: Hookpoint | None = None, *, prepend_bos: bool = False
) -> TrainingSource:
    transcoder = name in TRANSCODERS
    return TrainingSource(
        model_name=MODEL,
        hookpoint=hookpoint or (IN if transcoder else Hookpoint(3, "resid_post")),
        d_in=D_IN,
        context_size=77,
        hookpoint_out=OUT if transcoder else None,
        d_out=D_OUT if transcoder else None,
        prepend_bos=prepend_bos,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_by_saexp(lens: ModuleType, tmp_path: Path, name: str, scaling: str) -> None:
    """The scaling of the training is in the weights, so neither library scales again."""
    source = place_of(name, prepend_bos=scaling == "none")
    folder = trained(tmp_path, name, source, scaling)
    ours, theirs = saexp.load_sae(folder), lens.SAE.load_from_disk(folder)
    about = theirs.cfg.metadata
    assert about.hook_name == source.hookpoint.transformer_lens
    assert (about.model_name, about.context_size) == (MODEL, 77)
    assert about.prepend_bos == source.prepend_bos
    assert (theirs.cfg.d_in, theirs.cfg.d_sae, theirs.cfg.dtype) == (D_IN, D_SAE, "float32")
    assert theirs.cfg.normalize_activations == ours.settings.normalize_activations == "none"
    assert (ours.hookpoint, ours.hookpoint_out) == (source.hookpoint, source.hookpoint_out)
    assert (ours.metadata["model"], ours.metadata["prepend_bos"]) == (MODEL, source.prepend_bos)
    x = 3 + 5 * points(40, D_IN)
    with torch.no_grad():
        acts = theirs.encode(x)
        assert (acts != 0).any()
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.decode(acts, x), theirs(x), rtol=1e-4, atol=1e-3)
    if name in TRANSCODERS:
        assert about.hook_name_out == OUT.transformer_lens


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stream", STREAMS)
def test_of_every_stream(lens: ModuleType, tmp_path: Path, stream: str) -> None:
    """Block 0 reads `embed`; both libraries have another name for that as well."""
    at = Hookpoint(0 if stream == "embed" else 3, stream)
    folder = trained(tmp_path, "standard", place_of("standard", at), "none")
    ours, theirs = saexp.load_sae(folder), lens.SAE.load_from_disk(folder)
    assert ours.hookpoint.stored == at.stored
    assert Hookpoint.parse(theirs.cfg.metadata.hook_name).stored == at.stored
    x = points(40, D_IN)
    # sae-lens is given heads apart there, as its models have them.
    inputs = x.reshape(40, 3, D_IN // 3) if stream == "attn_z" else x
    with torch.no_grad():
        acts = theirs.encode(inputs)
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(inputs).reshape(x.shape), ours.decode(acts))


BY_LENS = [n for n in SAES if n not in ("batchtopk", "matryoshka_batchtopk")]


@pytest.mark.parametrize(
    ("name", "stream", "prepend_bos", "dtype"),
    [
        (name, stream, (i + j) % 2 == 0, ("float32", "bfloat16")[(i + j // 2) % 2])
        for i, name in enumerate(BY_LENS)
        for j, stream in enumerate(STREAMS)
    ],
)
def test_saved_by_sae_lens(
    lens: ModuleType, tmp_path: Path, name: str, stream: str, prepend_bos: bool, dtype: str
) -> None:
    at = Hookpoint(0 if stream == "embed" else 3, stream)
    kinds = {"standard": "Standard", "gated": "Gated", "topk": "TopK", "abstopk": "AbsTopK"}
    kind = {**kinds, "jumprelu": "JumpReLU", "matching_pursuit": "MatchingPursuit"}[name]
    options: dict[str, Any] = {"k": K} if "topk" in name else {}
    if stream == "attn_z":
        options["reshape_activations"] = "hook_z"
    about = {"hook_name": at.transformer_lens, "model_name": MODEL, "prepend_bos": prepend_bos}
    cfg = getattr(lens, f"{kind}SAEConfig")(
        d_in=D_IN,
        d_sae=D_SAE,
        dtype=dtype,
        metadata=lens.saes.sae.SAEMetadata(**about),
        normalize_activations="layer_norm" if stream == "mlp_out" else "none",
        **options,
    )
    theirs = getattr(lens, f"{kind}SAE")(cfg)
    own = theirs.state_dict()
    theirs.load_state_dict({n: w for n, w in parameters(name).items() if n in own})
    theirs.save_model(tmp_path)
    ours = saexp.load_sae(tmp_path)
    assert ours.hookpoint.stored == at.stored
    assert ours.settings.normalize_activations == cfg.normalize_activations
    assert (ours.metadata["model"], ours.metadata["prepend_bos"]) == (MODEL, prepend_bos)
    assert ours.W_enc.dtype == torch.float32
    for parameter, value in theirs.named_parameters():
        torch.testing.assert_close(getattr(ours, parameter), value.detach().float())
