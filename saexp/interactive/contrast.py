"""The contrast of a run on two lists of texts."""

import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from saexp.api import compose
from saexp.config import RunConfig, SAEConfig
from saexp.context import RunContext
from saexp.digests import remember_in
from saexp.errors import ConfigError
from saexp.files import RUN_FOLDER, write_text
from saexp.interactive.model import InteractiveModel
from saexp.pipeline.run_folder import holding
from saexp.results import TaskResult
from saexp.saes.loading import check_fits
from saexp.saes.sae import SparseAutoencoder
from saexp.tasks.analyze import contrast_with
from saexp.tracking.trackers import NullTracker

_FILE = "texts.jsonl"


def contrast(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    *,
    model: InteractiveModel,
    sae: SparseAutoencoder,
    positions: str | Sequence[int] = "last",
    names: tuple[str, str] = ("a", "b"),
    folder: str | Path | None = None,
    cache_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> TaskResult:
    """Latents that differ between two lists of texts: chosen on one half, judged on the other.

    It is the contrast of `saexp.run` without a causal test, with the same split, statistics,
    background filter and report. Open edits are suspended. Texts begin with BOS as the SAE was
    trained, as in a run.

    Args:
        positions: which token of a text is analysed: an option of the config group `positions`, or
            token indices, negative ones from the end.
        names: what the two groups are called in tables and the report.
        folder: where the report and the tables go; a temporary folder where not given.
        cache_dir: activation stores; `outputs/cache` where not given, as in a run.
        overrides: further settings as on the command line, such as `analyzer.alpha=0.1`.

    Returns:
        The result: `.tables["latents"]` has one row per latent, `.path` is the folder with
        `report.html`.

    Raises:
        ConfigError: an unknown setting. DataError: texts that cannot be contrasted.
        SAEError: the SAE does not fit the model.

    Example:
        >>> result = saexp.contrast(known, unknown, model=model, sae=sae)
        >>> result.tables["latents"].query("selected")
    """
    check_fits(sae, model)
    for texts in (texts_a, texts_b):
        if isinstance(texts, str):
            raise ConfigError("contrast compares two lists of texts; give lists of strings")
    if len(set(names)) != 2:
        raise ConfigError(f"names={names}: the two groups need different names")
    place = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="saexp-contrast-"))
    cfg = _config(model, sae, place / _FILE, names, [*_words(positions), *overrides])
    if cache_dir is not None:
        cfg = replace(cfg, cache_dir=str(cache_dir))
    began, prepend_bos = datetime.datetime.now().isoformat(timespec="seconds"), model.prepend_bos
    with holding(place):
        _write_texts(place / _FILE, dict(zip(names, (texts_a, texts_b), strict=True)))
        remember_in(cfg.cache_dir)
        context = RunContext(
            folder=place,
            tracker=NullTracker(cfg.tracker),
            command="saexp.contrast",
            started=began,
            inputs=frozenset({(place / _FILE).resolve()}),
        )
        try:
            with model.unedited():
                result = contrast_with(cfg, context, model, sae)
        finally:
            # A run reads texts as the SAE was trained; other calls, as the tokenizer has it.
            model.prepend_bos = prepend_bos
    result.path = place
    return result


def _words(positions: str | Sequence[int]) -> list[str]:
    if isinstance(positions, str):
        return [f"positions={positions}"]
    listed = ",".join(str(int(i)) for i in positions)
    return ["positions=indices", f"positions.indices=[{listed}]", "positions.include_special=true"]


def _config(
    model: InteractiveModel,
    sae: SparseAutoencoder,
    file: Path,
    names: tuple[str, str],
    overrides: Sequence[str],
) -> RunConfig:
    """The config of the run, which says of the loaded objects what is known."""
    layer = sae.hookpoint.layer
    words = ["dataset=jsonl", "dataset.path=file", "intervention=none", "tracker=none"]
    cfg = compose([*words, f"layer={layer}", *overrides])
    about_sae = SAEConfig(
        name=str(sae.metadata.get("name", "in-memory")),
        loader="path",
        path=sae.metadata.get("path"),
        layer=layer,
        model_name=model.name,
    )
    data = replace(cfg.dataset, path=str(file), groups=list(names), model_name=model.name)
    return replace(cfg, model=model.cfg, sae=about_sae, dataset=data, width=None)


def _write_texts(file: Path, groups: dict[str, Sequence[str]]) -> None:
    lines = [
        json.dumps({"text": text, "group": name, "id": f"{name}_{i}"}, ensure_ascii=False)
        for name, texts in groups.items()
        for i, text in enumerate(texts)
    ]
    write_text(file, "\n".join(lines) + "\n", option=RUN_FOLDER)
