"""Input and output scores are kept by content: an edited neutral text has scores of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import saexp
from saexp.analysis.latent_scores import logit_lens_tokens
from saexp.data.tokenization import tokenize
from saexp.latents import Latents
from saexp.models.loading import LanguageModel
from saexp.pipeline import validation

NEUTRAL = Path(__file__).parents[1] / "neutral_texts.txt"
SMALL = ["tracker=none", "intervention=none", "dataset.n_examples=40", "analyzer.n_bootstrap=0"]
SMALL += ["analyzer.n_background=1000", "sae.check=off", "analyzer.background_max=1"]
COLUMNS = ["input_score", "output_score"]


class Calls:
    """Latents that the real functions were asked for."""

    read = written = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted, reading, writing = Calls(), validation.input_scores, validation.output_scores

    def read(*arguments: object, **options: object) -> pd.DataFrame:
        counted.read += 1
        return reading(*arguments, **options)  # type: ignore[arg-type]

    def write(*arguments: object, **options: object) -> pd.DataFrame:
        counted.written += 1
        return writing(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "input_scores", read)
    monkeypatch.setattr(validation, "output_scores", write)
    return counted


def scores(folder: Path, cache: Path, *words: str) -> pd.DataFrame:
    overrides = [
        *SMALL,
        f"dataset.background={folder}/background.txt",
        f"cache_dir={cache}",
        *words,
    ]
    table = saexp.run(saexp.compose(overrides), folder / "run").tables["latents"]
    return table.set_index("latent").loc[lambda t: t["selected"], COLUMNS]


def shuffle(folder: Path) -> None:
    """The same words in lines of the same numbers of tokens, in another order from line 9 on."""
    lines = (folder / "background.txt").read_text("utf-8").splitlines()
    (folder / "background.txt").write_text("\n".join(lines[:8] + lines[:7:-1]) + "\n")


def same_lengths(folder: Path) -> None:
    """From line 9 on the second and third word of each line swapped, if that is as many tokens."""
    tokenizer = LanguageModel(saexp.compose([]).model).tokenizer
    lines = list(dict.fromkeys((folder / "background.txt").read_text("utf-8").splitlines()))
    words = [line.split(" ") for line in lines]
    turned = [" ".join([*w[:1], *w[2:3], *w[1:2], *w[3:]]) for w in words]
    before, after = (tokenize(texts, tokenizer, 512) for texts in (lines, turned))
    for n in range(8, len(lines)):
        if len(before[n]) == len(after[n]) and turned[n] not in lines:
            lines[n] = turned[n]
    (folder / "background.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(NEUTRAL, tmp_path / "background.txt")
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run with all scores; tests work on copies."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copy(NEUTRAL, folder / "background.txt")
    assert scores(folder, folder / "cache", "layer=2")["input_score"].notna().any()
    return folder / "cache"


def test_neutral_text_edited_at_equal_lengths_has_scores_of_its_own(
    folder: Path, cache: Path, calls: Calls
) -> None:
    shutil.copytree(cache, folder / "cache")
    same_lengths(folder)
    second = scores(folder, folder / "cache")
    assert calls.read == 1
    # Its first lines are the prompts of the output scores, and as they were.
    assert calls.written == 0
    pd.testing.assert_frame_equal(second, scores(folder, folder / "new"))


@pytest.mark.parametrize("differing", ["the store", "the rows"])
def test_the_same_places_of_other_texts_are_other_rows(tmp_path: Path, differing: str) -> None:
    """A latent that is active on its own top tokens scores 1, and 0 on none of them."""
    cfg = saexp.compose([f"cache_dir={tmp_path}/cache", "layer=2"])
    model = LanguageModel(cfg.model)
    sae = saexp.build("sae", cfg.sae, d_in=model.d_model)
    (own,) = logit_lens_tokens(sae, model, [7], validation.TOP_TOKENS).tolist()
    others = [t for t in range(300) if t not in own][: len(own)]
    csr = sparse.lil_array((len(own), sae.d_sae), dtype=np.float32)
    csr[:, [7]] = 1.0
    for ids, score in ((own, 1.0), (others, 0.0)):
        rows = pd.DataFrame({"text_id": range(len(ids)), "token_index": 3, "token_id": ids})
        table = pd.DataFrame({"latent": [7], "selected": [True]})
        key = str(score) if differing == "the store" else "the same store"
        latents = Latents(csr.tocsr(), rows)
        session: Any = SimpleNamespace(cfg=cfg, model=model)
        layer: Any = SimpleNamespace(sae=sae, background=latents)
        store = SimpleNamespace(path=Path(key))
        data: Any = SimpleNamespace(neutral=SimpleNamespace(store=store))
        scored, notes = validation.score_latents(session, layer, data, table)
        assert notes == []
        assert scored["input_score"].tolist() == [score]


CHANGES: list[tuple[str, Callable[[Path], None], list[str], tuple[int, int]]] = [
    ("batches", lambda _: None, ["store.batch_tokens=64", "intervention.batch_tokens=64"], (0, 0)),
    ("order of texts", shuffle, [], (1, 0)),
    ("positions", lambda _: None, ["analyzer.seed=1"], (1, 0)),
    ("SAE", lambda _: None, ["width=512"], (1, 1)),
    ("model", lambda _: None, ["dtype=bfloat16"], (1, 1)),
]


@pytest.mark.parametrize(("what", "do", "words", "computed"), CHANGES, ids=[c[0] for c in CHANGES])
def test_scores_are_computed_again_where_what_decides_them_changed(
    folder: Path,
    cache: Path,
    calls: Calls,
    what: str,
    do: Callable[[Path], None],
    words: list[str],
    computed: tuple[int, int],
) -> None:
    shutil.copytree(cache, folder / "cache")
    do(folder)
    layer = [] if any(w.startswith("layer") for w in words) else ["layer=2"]
    scores(folder, folder / "cache", *layer, *words)
    assert (calls.read, calls.written) == computed, what
