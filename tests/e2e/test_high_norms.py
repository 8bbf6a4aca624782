"""Attention sinks change nothing in what is trained, measured and shown of ordinary positions.

A random model in which a few words that begin many texts have a huge norm in the residual stream,
behind <bos>: a rule on the first position alone would miss them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import saexp
from saexp.data.positions import All, Candidate
from saexp.registry import register
from saexp.results import Result
from tests.random_models import random_hf, save, tokenizer

SINKS = ("Once", "Then")
WORDS = ["river", "captain", "old", "song", "city", "harbour", "sang", "second", "game", "well"]
LAYER, WIDTH = 1, 48
TRAIN = ["task=train", f"width={WIDTH}", "sae_trainer=topk", "sae_trainer.options.k=4"]
TRAIN += ["sae_trainer.n_samples=6000", "sae_trainer.batch_size=64", "sae_trainer.log_every=10"]
TRAIN += ["sae_trainer.held_out=0.25"]
pytestmark = pytest.mark.filterwarnings("ignore")


def texts() -> list[str]:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(80):
        words = rng.choice(WORDS, size=6).tolist()
        if number % 3:
            words.insert(0 if number % 2 else 3, SINKS[number % 2])
        lines.append(" ".join(words) + f" {number}")
    return lines


def sink_ids() -> list[int]:
    """The first token of each sink word, at a text's beginning and inside."""
    ids = [tokenizer()(space + w)["input_ids"][1] for w in SINKS for space in ("", " ")]
    others = tokenizer()(" ".join(WORDS) + " 0123456789")["input_ids"]
    return [i for i in ids if i not in others]


@register("positions", "all_without_sinks")
class WithoutSinks(All):
    """Every token but the sinks, named by hand."""

    def choose(self, at: Candidate) -> list[int]:
        return [i for i in super().choose(at) if at.tokens.ids[i] not in sink_ids()]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: the model, texts and cache."""
    folder = tmp_path_factory.mktemp("sinks")
    hf = random_hf("llama")
    hf.get_input_embeddings().weight[sink_ids()] *= 300
    save(hf, folder / "model")
    rows = [{"text": t, "group": "ab"[n % 2], "id": n} for n, t in enumerate(texts())]
    (folder / "texts.txt").write_text("\n".join(texts()), encoding="utf-8")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [
        *("model=hf", f"model.name={folder / 'model'}", f"layer={LAYER}", "device=cpu"),
        *("dataset=text", f"dataset.path={folder / 'texts.txt'}", "tracker=none"),
        *(f"dataset.background={folder / 'texts.txt'}", f"cache_dir={folder / 'cache'}"),
    ]


def run(folder: Path, *words: str) -> Result:
    return saexp.run(saexp.compose(list(words)), folder)


@pytest.fixture(scope="module")
def runs(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Trainings: on everything with the limit, without it, and without the sinks by hand."""
    asked = {
        "limited": ["positions=all"],
        "everything": ["positions=all", "positions.max_norm_ratio=null"],
        "by hand": ["positions=all", "positions.name=all_without_sinks"],
        "by hand, no limit": [
            *("positions=all", "positions.name=all_without_sinks"),
            "positions.max_norm_ratio=null",
        ],
    }
    runs_folder = tmp_path_factory.mktemp("runs")
    return {n: run(runs_folder / n, *words, *TRAIN, *more) for n, more in asked.items()}


def weights(result: Result) -> dict[str, torch.Tensor]:
    assert result.path is not None
    return dict(saexp.load_sae(result.path / "sae").named_buffers())


def stream(words: list[str]) -> tuple[pd.DataFrame, torch.Tensor]:
    """Every token but <bos>, and its stream, from the model's own hidden states."""
    model = saexp.build("model", saexp.compose(words).model)
    rows, parts = [], []
    for number, text in enumerate(texts()):
        ids = tokenizer()(text)["input_ids"]
        with torch.no_grad():
            out = model.hf(torch.tensor([ids]), output_hidden_states=True)
        parts.append(out.hidden_states[LAYER + 1][0, 1:])
        rows += [(number, i, token) for i, token in enumerate(ids) if i]
    return pd.DataFrame(rows, columns=["text", "token_index", "token_id"]), torch.cat(parts)


def test_the_model_has_sinks_behind_its_bos(words: list[str]) -> None:
    rows, x = stream(words)
    norms = x.norm(dim=-1).numpy()
    high = norms > 5 * np.median(norms)
    assert (high == rows["token_id"].isin(sink_ids())).all()
    assert set(rows.loc[high, "token_index"]) > {1}
    assert 0.02 < high.mean() < 0.2


def test_training_with_sinks_gives_the_sae_of_the_same_data_without_them(
    runs: dict[str, Result],
) -> None:
    limited, by_hand = weights(runs["limited"]), weights(runs["by hand"])
    for name, values in limited.items():
        torch.testing.assert_close(values, by_hand[name], rtol=1e-4, atol=1e-5)
    everything = weights(runs["everything"])["W_dec"]
    assert not torch.allclose(everything, limited["W_dec"], atol=1e-2)
    numbers = [runs[n].metrics for n in ("limited", "by hand")]
    for name in numbers[0]:
        if name.startswith(("sparsity/", "train/")) and "seconds" not in name:
            assert numbers[0][name] == pytest.approx(numbers[1][name], rel=1e-3), name
    tables = [runs[n].tables for n in ("limited", "by hand")]
    for name in ("training", "density", "active"):
        pd.testing.assert_frame_equal(tables[0][name], tables[1][name], rtol=1e-3, atol=1e-5)


def test_without_sinks_the_limit_changes_no_number(runs: dict[str, Result]) -> None:
    one, other = runs["by hand"], runs["by hand, no limit"]
    for name, values in weights(one).items():
        assert torch.equal(values, weights(other)[name]), name
    for name, value in one.metrics.items():
        if not name.startswith("collection/") and name != "train/seconds":
            assert value == other.metrics[name], name


def test_a_training_reports_what_it_left_out_and_explains(
    runs: dict[str, Result], words: list[str]
) -> None:
    rows, x = stream(words)
    result = runs["limited"]
    high = rows["token_id"].isin(sink_ids()).to_numpy()
    distances = (x - x.mean(0)).square().sum(-1).double().numpy()
    (note,) = [n for n in result.notes if "times the median" in n]
    assert f"{high.sum()} of {len(x):,} positions ({high.mean():.2%})" in note
    assert f"hold {distances[high].sum() / distances.sum():.1%} of the variance" in note
    assert result.path is not None
    about = json.loads((result.path / "provenance.json").read_text("utf-8"))
    held_out = result.metrics["sparsity/n_positions"]
    assert about["n_measured"] == held_out
    assert about["n_trained_on"] + held_out == (~high).sum()


def test_evaluation_is_of_ordinary_positions(
    runs: dict[str, Result], words: list[str], tmp_path: Path
) -> None:
    folder = runs["everything"].path
    assert folder is not None
    use = ["task=evaluate", "sae=local", f"sae.path={folder / 'sae'}", "task.n_bootstrap=0"]
    metrics = run(tmp_path, *words, *use).metrics
    rows, x = stream(words)
    sae = saexp.load_sae(folder / "sae")
    with torch.no_grad():
        again = sae.decode(sae.encode(x), x).double().numpy()
    a, high = x.double().numpy(), rows["token_id"].isin(sink_ids()).to_numpy()

    def explained(which: np.ndarray) -> tuple[float, float]:
        lost, mean = ((a - again) ** 2).sum(1)[which], a[which].mean(0)
        spread = ((a[which] - mean) ** 2).sum(1)
        return 1 - lost.sum() / spread.sum(), float(np.median(1 - lost / spread))

    mean, median = explained(~high)
    expected = {
        "explained_variance": mean,
        "explained_variance_median": median,
        "explained_variance_all_positions": explained(np.ones(len(x), dtype=bool))[0],
        "n_high_norm": high.sum(),
    }
    for name, value in expected.items():
        assert metrics[f"reconstruction/{name}"] == pytest.approx(value, abs=1e-3), name
    assert mean < 0.2 < 0.5 < expected["explained_variance_all_positions"]


def test_top_features_are_of_ordinary_positions(
    runs: dict[str, Result], words: list[str], tmp_path: Path
) -> None:
    folder = runs["everything"].path
    assert folder is not None
    use = ["analyzer=top_features", "intervention=none", "positions=all", "sae=local"]
    result = run(tmp_path, *words, *use, f"sae.path={folder / 'sae'}", "analyzer.n_bootstrap=0")
    rows, x = stream(words)
    high = rows["token_id"].isin(sink_ids()).to_numpy()
    dense = saexp.load_sae(folder / "sae").encode(x).numpy()
    table = result.tables["top_features"]
    best = dense[~high].max(0)
    np.testing.assert_allclose(table["max"], np.sort(best)[::-1][: len(table)], rtol=1e-3)
    assert dense[high].max() > 2 * best.max()
    assert result.metrics["top_features/n_positions"] == (~high).sum()
    freq = (dense[~high] > 0).mean(0)[table["latent"]]
    np.testing.assert_allclose(table["frequency"], freq, atol=1e-6)
    # The neutral text is the same text, at random positions.
    assert np.corrcoef(table["background_freq"], freq)[0, 1] > 0.8
    assert not set(result.tables["tokens"]["value"]) & set(dense[high].max(1))
    assert [n for n in result.notes if "the analysis leave them out" in n]


def test_dashboards_show_ordinary_positions(
    runs: dict[str, Result], words: list[str], tmp_path: Path
) -> None:
    folder = runs["everything"].path
    assert folder is not None
    rows, x = stream(words)
    high = rows["token_id"].isin(sink_ids()).to_numpy()
    dense = saexp.load_sae(folder / "sae").encode(x).numpy()
    both = np.flatnonzero((dense[high] > 0).any(0) & (dense[~high] > 0).any(0))
    latent = int(both[dense[high].max(0)[both].argmax()])
    use = ["task=dashboard", "sae=local", f"sae.path={folder / 'sae'}", f"task.latents=[{latent}]"]
    run(tmp_path, *words, *use)
    content: dict[str, Any] = json.loads((tmp_path / "dashboard.json").read_text("utf-8"))
    (card,) = content["latents"]
    ordinary_acts = dense[~high, latent]
    assert dense[high, latent].max() > 2 * ordinary_acts.max()
    assert card["max"] == pytest.approx(ordinary_acts.max(), rel=1e-3)
    assert card["n_active"] == (ordinary_acts > 0).sum()
    assert content["n_rows"] == (~high).sum()
    assert card["top"][0]["value"] == pytest.approx(ordinary_acts.max(), rel=1e-3)
    values = [v for e in card["top"] for v in e["values"] if v is not None]
    assert max(values) <= card["max"] * 1.001


def test_the_unit_of_a_coefficient_is_the_median_norm_of_ordinary_positions(
    runs: dict[str, Result], words: list[str], tmp_path: Path
) -> None:
    folder = runs["limited"].path
    assert folder is not None
    path = next(w for w in words if w.startswith("dataset.path=")).replace(
        "texts.txt", "rows.jsonl"
    )
    use = [w for w in words if not w.startswith("dataset.path=") and w != "dataset=text"]
    use += ["dataset=jsonl", path, "analyzer=top_features", "positions=all", "sae=local"]
    use += [f"sae.path={folder / 'sae'}", "intervention.latents=[3]", "intervention.where=last"]
    use += ["intervention.n_prompts=2", "intervention.max_new_tokens=2", "coefficient=1"]
    use += ["intervention.n_controls=1", "intervention.n_choice_prompts=1"]
    use += ["intervention.n_neutral=1", "analyzer.n_bootstrap=0", "sae.check=off"]
    result = run(tmp_path, *use)
    rows, x = stream(words)
    norms = x.double().norm(dim=-1).numpy()
    expected = np.median(norms[~rows["token_id"].isin(sink_ids())])
    assert result.metrics["intervention/resid_norm"] == pytest.approx(expected, rel=1e-5)
    assert norms.mean() > 2 * expected
    assert [n for n in result.notes if f"median norm over ordinary positions: {expected:.4g}" in n]
    summary = result.tables["effects_summary"].set_index("condition")
    raw = summary[summary["coefficient"] == 1].loc["latent_3", "in_raw"]
    length = weights(runs["limited"])["W_dec"][3].norm()
    np.testing.assert_allclose(np.asarray(raw) * float(length), expected, rtol=1e-4)


def test_a_curve_that_held_out_numbers_disagree_with_is_a_note() -> None:
    from saexp.tasks.train import off_curve

    last = {"train/l0": 32.0, "train/explained_variance": 0.998, "train/dead_fraction": 0.06}
    measured = {"sparsity/l0": 33.0, "sparsity/n_positions": 1000}
    measured |= {"reconstruction/explained_variance": 0.47, "sparsity/dead_fraction": 0.74}
    (note,) = off_curve(last, measured, 2000, 500)
    assert "explained variance 0.47, the curve ends at 0.998" in note
    assert "dead fraction 0.74, the curve ends at 0.06" in note
    assert "l0" not in note
    assert "dead_feature_window=500 inactive steps)" in note
    # Before as many steps no latent can be dead on the curve.
    (note,) = off_curve({**last, "train/dead_fraction": 0.0}, measured, 390, 500)
    assert "explained variance" in note
    assert "dead" not in note
    few_dead = {**measured, "reconstruction/explained_variance": 0.95}
    assert off_curve({**last, "train/dead_fraction": 0.0}, few_dead, 500, 500) == []
    agrees = {**measured, "reconstruction/explained_variance": 0.95, "sparsity/dead_fraction": 0.1}
    assert off_curve(last, agrees, 2000, 500) == []
    far = {**agrees, "sparsity/l0": 982.0}
    assert "l0 982, the curve ends at 32" in off_curve(last, far, 2000, 500)[0]
    assert off_curve(last, far, 2000, 500, l0_reported=True) == []


def test_the_check_and_an_estimated_scaling_are_of_ordinary_positions(
    runs: dict[str, Result], words: list[str], tmp_path: Path
) -> None:
    """Every position of the neutral text, for which the background asks for all of them."""
    folder = runs["limited"].path
    assert folder is not None
    use = ["analyzer=top_features", "intervention=none", "positions=all", "sae=local"]
    use += [f"sae.path={folder / 'sae'}", "analyzer.n_background=4000"]
    metrics = run(tmp_path / "checked", *words, *use).metrics
    rows, x = stream(words)
    ordinary = x[torch.from_numpy(~rows["token_id"].isin(sink_ids()).to_numpy())]
    assert metrics["check/mean_norm"] == pytest.approx(
        float(ordinary.norm(dim=-1).mean()), rel=1e-4
    )
    assert metrics["check/n_positions"] == len(ordinary)
    sae = saexp.load_sae(folder / "sae")
    lost = (ordinary - sae.decode(sae.encode(ordinary), ordinary)).square().sum()
    spread = (ordinary - ordinary.mean(0)).square().sum()
    expected = float(1 - lost / spread)
    assert metrics["check/explained_variance"] == pytest.approx(expected, abs=1e-4)
    notes = run(tmp_path / "scaled", *words, *use, "sae.norm_factor=estimate").notes
    factor = ordinary.shape[1] ** 0.5 / float(ordinary.norm(dim=-1).mean())
    (note,) = [n for n in notes if n.startswith("sae.norm_factor=")]
    noted_factor = note.removeprefix("sae.norm_factor=").split()[0]
    assert float(noted_factor) == pytest.approx(factor, rel=1e-4)
    assert [n for n in notes if n.startswith("neutral text: ") and "times the median" in n]
