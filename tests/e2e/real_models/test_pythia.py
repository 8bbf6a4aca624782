"""Pythia 70M: SAEs of the MLP's output from nothing, variants side by side, and one put to use."""

import json
import warnings
from collections.abc import Iterator

import pytest

from tests.e2e.real_models.terminal import Run, Terminal, command_on, forget
from tests.hub_caches import repository, save_pythia

pytestmark = pytest.mark.slow

NAME = "EleutherAI/pythia-70m-deduped"
FEW = ("tracker=none", "sae_trainer.n_samples=2048")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with warnings.catch_warnings():
        # Its own import-time warnings are not ours.
        warnings.simplefilter("ignore")
        import sae_lens  # noqa: F401
    user = Terminal(tmp_path_factory.mktemp("pythia"))
    with repository(user.home, NAME) as files:
        save_pythia(files)
    yield user
    forget()


def check_trained(user: Terminal, run: Run) -> None:
    assert run.about["sae"]["hookpoint"] == "layer_5.mlp_out"
    assert run.about["sae"]["d_sae"] == 1024
    texts = (user.folder / "texts.txt").read_text("utf-8").splitlines()
    assert run.about["n_trained_on"] + run.about["n_measured"] == len(texts)
    cfg = json.loads((run.folder / "sae" / "cfg.json").read_text("utf-8"))
    assert (cfg["d_in"], cfg["d_sae"]) == (512, 1024)
    assert cfg["metadata"]["hook_name"] == "blocks.5.hook_mlp_out"
    assert {"reconstruction/explained_variance", "sparsity/l0"} <= {*run.metrics}
    assert run.table("training")["step"].is_monotonic_increasing


def test_variants_on_the_same_activations_and_one_put_to_use(user: Terminal) -> None:
    words = command_on("experiments/train_from_scratch/README.md", "sae_trainer=tutorial,", "-m")
    sweep = user.run("variants", words, *FEW)
    table = sweep.table("sweep")
    assert table["status"].tolist() == ["finished"] * len(table)
    assert table["sae_trainer"].tolist() == ["tutorial", "topk", "gated"]
    first, *others = table["collection/tokens_forwarded"]
    assert first > 0 and others == [0, 0]
    cells = [Run(sweep.folder / str(cell)) for cell in table["folder"]]
    for cell in cells:
        check_trained(user, cell)
    assert cells[0].about["config"]["sae_trainer"]["options"]["l1_coefficient"] == 5e-4
    assert cells[1].metrics["sparsity/l0"] <= 16
    used = user.run(
        "used",
        "python -m saexp model=pythia70m sae=local layer=5 analyzer=top_features",
        f'sae.path="{cells[1].folder / "sae"}"',
        *("dataset=text", "dataset.path=texts.txt", "dataset.background=neutral.txt"),
        *("positions=middle", "intervention=none", "tracker=none"),
    )
    assert used.about["sae"]["hookpoint"] == "layer_5.mlp_out"
    assert used.metrics["collection/tokens_forwarded"] > 0
    assert len(used.table("top_features")) == 10
