"""Gemma 2 2B with Gemma Scope: the mission's own command, a sweep, a prompt's features, entity
recognition, labels; offline, against a cache in the hub's own layout."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.real_models.terminal import (
    Run,
    Terminal,
    check_effects,
    check_tokens,
    command_on,
    few,
    forget,
)
from tests.hub_caches import GEMMA_SCOPE, add_gemma_scope, repository, save_gemma_2

pytestmark = pytest.mark.slow

BASE, CHAT = "google/gemma-2-2b", "google/gemma-2-2b-it"
BOS = 2
SWEEP = "python -m saexp -m model=gemma2b sae=gemmascope layer=12 width=16k,32k"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    user = Terminal(tmp_path_factory.mktemp("gemma"))
    for name in (BASE, CHAT):
        with repository(user.home, name) as files:
            save_gemma_2(files, chat=name == CHAT)
    add_gemma_scope(user.home, *((layer, 16) for layer in (5, 12, 13, 20)))
    yield user
    forget()


@pytest.fixture(autouse=True)
def nothing_read(user: Terminal) -> None:
    user.read.clear()


def test_the_missions_own_command(user: Terminal) -> None:
    """In a process of its own, since HF_HOME is read while huggingface_hub is imported."""
    folder = user.folder / "mission"
    folder.mkdir()
    command = [sys.executable, "-m", "saexp", "model=gemma2b", "sae=gemmascope", "layer=12"]
    # The command as it stands; what follows only makes it read and generate less.
    command += ["dataset.n_examples=12", "analyzer.n_background=32", "analyzer.n_bootstrap=50"]
    command += [f"dataset.background={user.folder / 'neutral.txt'}", "intervention.n_neutral=1"]
    command += ["intervention.max_new_tokens=2", "intervention.n_prompts=2"]
    command += ["intervention.n_choice_prompts=2", "intervention.n_controls=2"]
    command += ["intervention.top_k=1"]
    env = {**os.environ, "HF_HOME": str(user.home), "HF_HUB_OFFLINE": "1"}
    env["WANDB_MODE"] = "disabled"
    env.pop("HF_HUB_CACHE", None)
    process = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    run = Run(next((folder / "outputs").glob("2*/*")))
    assert (run.folder / "report.html").is_file()
    assert 20 < run.metrics["sparsity/l0"] < 300
    assert len(run.table("rows")) >= 24
    provenance = (run.folder / "provenance.json").read_text("utf-8")
    assert "layer_12.resid_post" in provenance
    assert f"{GEMMA_SCOPE}/layer_12/width_16k/canonical" in provenance


@pytest.fixture(scope="module")
def sweep(user: Terminal) -> Run:
    """Two SAEs of one layer."""
    add_gemma_scope(user.home, (12, 32))
    user.read.clear()
    sweep = user.run("sweep", SWEEP, *few(), "intervention=none")
    assert user.most(BOS) == 1
    return sweep


def test_a_sweep_of_widths_reads_the_texts_once(user: Terminal, sweep: Run) -> None:
    table = sweep.table("sweep")
    assert table["status"].tolist() == ["finished"] * 2
    first, second = table["collection/tokens_forwarded"]
    assert first > 0 and second == 0
    for cell in table.to_dict("records"):
        run = Run(sweep.folder / cell["folder"])
        sae, thousands = run.about["sae"], cell["width"]
        assert sae["hookpoint"] == f"layer_{cell['layer']}.resid_post"
        assert sae["id"] == f"layer_{cell['layer']}/width_{thousands}/canonical"
        assert sae["d_sae"] == {"16k": 2**14, "32k": 2**15}[thousands]
        assert 10 < run.metrics["sparsity/l0"] < 600
        check_tokens(run, user.tokenizer(BASE), n_bos=1)
    assert (sweep.folder / "sweep.html").is_file()


def test_the_features_of_a_prompt_at_three_layers(user: Terminal) -> None:
    text = "When John and Mary went to the shops, John gave the bag to Mary."
    words = command_on("experiments/prompt_features/README.md", "model=gemma2b")
    run = user.run("features", [w.replace("…", text) for w in words], *few())
    check_tokens(run, user.tokenizer(BASE), n_bos=1)
    assert set(run.table("rows")["text"]) == {text}
    n_tokens = len(user.tokenizer(BASE)(text)["input_ids"])
    assert run.table("rows")["token_index"].tolist() == list(range(1, n_tokens))
    table = run.table("top_features")
    assert table["layer"].unique().tolist() == [5, 12, 20]
    assert (table.groupby("layer").size() == 10).all()
    assert [s["hookpoint"] for s in run.about["saes"]] == [
        f"layer_{layer}.resid_post" for layer in (5, 12, 20)
    ]
    assert user.most(BOS) == 1


def test_entity_recognition_on_the_chat_model(user: Terminal) -> None:
    words = command_on("experiments/entity_recognition/README.md", "MODEL=", "gemma2b_it", "run.sh")
    # One of its four layers, which takes a fourth of the time.
    words = ["LAYERS=13" if word.startswith("LAYERS=") else word for word in words]
    layers = user.script(words, few())[0]
    result = user.type(layers)
    assert result.code == 0, result.err[-2000:]
    table = Run(user.folder / "runs/layers").table("sweep")
    assert table["status"].tolist() == ["finished"]
    cell = table.set_index("layer").loc[13, "folder"]
    latents = Run(user.folder / "runs/layers" / str(cell)).table("latents")
    often = latents.assign(n=latents["freq_known"] + latents["freq_unknown"]).nlargest(2, "n")
    # A random model knows nothing, so nothing is selected.
    latents_option = f"intervention.latents=[{','.join(map(str, often['latent']))}]"
    commands = user.script(words, [*few(), latents_option])[1:]
    # Nothing of the other commands depends on the model; test_experiments runs them.
    (command,) = (c for c in commands if c[-1].rpartition("/")[2] == "steer")
    result = user.type(command)
    assert result.code == 0, f"{command}: {result.err[-2000:]}"
    assert user.most(BOS) == 1
    run = Run(user.folder / "runs/steer")
    assert run.about["sae"]["hookpoint"] == "layer_13.resid_post"
    assert run.about["sae"]["release"] == GEMMA_SCOPE
    assert run.about["model"]["name"] == CHAT
    assert run.metrics["collection/tokens_forwarded"] == 0
    assert (run.folder / "report.html").is_file()
    check_tokens(run, user.tokenizer(CHAT), n_bos=1)
    effects = check_effects(run, [0.0, 0.3, 0.6, 0.9])
    assert effects["prompt"].str.startswith("<bos><start_of_turn>user\n").all()
    assert effects["prompt"].str.endswith("<end_of_turn>\n<start_of_turn>model\n").all()
    assert (effects["prompt"].str.count("<bos>") == 1).all()
    outcomes = ("refusal", "accuracy", "answer_logit")
    assert {f"effect/{o}/baseline_known" for o in outcomes} <= {*run.metrics}
    for name in ("attention", "attribution", "costs", "effects_summary"):
        assert len(run.table(name))


def test_entity_recognition_on_the_base_model(user: Terminal, sweep: Run) -> None:
    words = "python -m saexp experiment=entity_recognition model=gemma2b sae=gemmascope layer=12"
    latents = Run(sweep.folder / sweep.table("sweep")["folder"][0]).table("latents")
    latents_option = f"intervention.latents=[{latents.nlargest(1, 'freq_known')['latent'].item()}]"
    run = user.run("base", words, *few(), latents_option)
    effects = check_effects(run, [0.0, 0.3, 0.6, 0.9])
    assert not effects["prompt"].str.contains("<bos>|<start_of_turn>").any()
    assert user.most(BOS) == 1
    check_tokens(run, user.tokenizer(BASE), n_bos=1)


def test_labels_from_the_chat_model(user: Terminal) -> None:
    words = "python -m saexp task=label model=gemma2b_it"
    fewer = ("dataset.n_examples=1", "task.n_samples=3", "task.max_new_tokens=2")
    run = user.run("label", words, *fewer)
    table = run.table("labels")
    assert set(table["entity_type"]) == {"player", "movie", "city", "song"}
    assert len(table) > 20 and (table["samples"].map(len) == 3).all()
    assert set(table["given_group"]) == {"known", "unknown"}
    assert run.metrics["label/n_questions"] == len(table)
    rows = (run.folder / "entities.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == run.metrics["label/n_known"] + run.metrics["label/n_unknown"]
    assert {"text", "entity", "group", "split", "prompt"} <= {*json.loads(rows[0])}
    assert user.most(BOS) == 1
    user.read.clear()
    again = user.run("label again", words, *fewer)
    assert user.read == []
    assert again.table("labels").equals(table)
