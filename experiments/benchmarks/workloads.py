"""Workloads of `mechanisms.py`. Each returns tables that must not depend on any mechanism."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Tables = dict[str, pd.DataFrame]
UNSTABLE = ("seconds", "wall_seconds", "path", "folder")
"""Columns and metrics that differ between two runs of the same thing."""


def run(folder: Path, *overrides: str, objects: Any = None) -> Tables:
    """One run with its cache in `folder`; `objects` is the object cache it shares with others."""
    import saexp

    words = ["tracker=none", f"cache_dir={folder / 'cache'}", *overrides]
    result = saexp.run(
        saexp.compose(words), tempfile.mkdtemp(prefix="run_", dir=folder), objects=objects
    )
    stable = {
        name: value
        for name, value in result.metrics.items()
        if not any(word in name for word in (*UNSTABLE, "forwarded", "padding"))
    }
    metrics = pd.DataFrame({"name": list(stable), "value": list(stable.values())})
    return {**result.tables, "metrics": metrics}


def default_run(folder: Path) -> Tables:
    """`python -m saexp`."""
    return run(folder)


def grid_all_tokens(folder: Path) -> Tables:
    """Five coefficients with 99 controls, prompts and generated tokens edited, two outcomes."""
    return run(
        folder,
        "coefficient=[0,0.3,0.6,0.9,1.2]",
        "intervention.where=all",
        "intervention.outcomes=[refusal,answer_logit]",
        "intervention.n_prompts=20",
        "intervention.n_choice_prompts=8",
    )


def few_shot_prompts(folder: Path) -> Path:
    """2 000 prompts: 12 solved questions, the same in all, then a question of their own."""
    import saexp

    examples = saexp.build("dataset", saexp.compose(["model=tiny"]).dataset).examples
    solved = [e for e in examples if e.answers][:12]
    prefix = " ".join(f"{e.as_prompt().text} {e.answers[0]}" for e in solved)
    file = folder / "few_shot.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(2000):
            example = examples[number % len(examples)]
            question = example.as_prompt().text
            content = {
                "id": f"p{number}",
                "text": f"{prefix} {number} {question}",
                "group": example.group,
                "entity": example.entity,
                "entity_type": example.entity_type,
                "answer": list(example.answers) or ["no"],
            }
            lines.write(json.dumps(content) + "\n")
    return file


def few_shot(folder: Path) -> Tables:
    """2 000 few-shot prompts with one long prefix: collection, and an ablation with an outcome."""
    return run(
        folder,
        "dataset=jsonl",
        f"dataset.path={few_shot_prompts(folder)}",
        "positions=last",
        "intervention=ablate",
        "intervention.latents=[12,154]",
        "intervention.where=last",
        "intervention.outcomes=[answer_logit]",
        "intervention.n_prompts=300",
        "intervention.n_controls=0",
        "analyzer.n_bootstrap=0",
    )


def entity_prompts_file(folder: Path) -> Path:
    """A prompt for each shipped entity and each attribute that `task=label` asks for."""
    from saexp.data.datasets import ASSETS
    from saexp.labeling import TEMPLATES

    file = folder / "entity_prompts.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for entity_type, templates in TEMPLATES.items():
            source = ASSETS / "entities" / f"{entity_type}.jsonl"
            for line in source.read_text(encoding="utf-8").splitlines():
                entity = json.loads(line)
                content = {k: entity[k] for k in ("entity", "entity_type", "group")}
                for attribute, (_, answer_prefix) in templates.items():
                    content["id"] = f"{entity_type}/{entity['entity']}/{attribute}"
                    content["text"] = answer_prefix.format(entity=entity["entity"])
                    lines.write(json.dumps(content) + "\n")
    return file


def entity_prompts(folder: Path) -> Tables:
    """Collection at every token of the entity, several prompts an entity, in several shards."""
    tables = run(
        folder,
        "task=collect",
        "dataset=jsonl",
        f"dataset.path={entity_prompts_file(folder)}",
        "positions=entity_all",
        "store.shard_rows=10000",
    )
    return {**tables, **stored_norms(folder)}


def corpus_texts(folder: Path, n_texts: int) -> Path:
    """Texts of about 60 tokens, none like another: shuffled sentences of the neutral text."""
    import saexp

    source = Path(saexp.__file__).parent / "assets" / "tiny" / "background.txt"
    words = source.read_text(encoding="utf-8").split()
    rng = np.random.default_rng(0)
    file = folder / "corpus.txt"
    texts = [" ".join(rng.choice(words, rng.integers(20, 60))) for _ in range(n_texts)]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def corpus(folder: Path) -> Tables:
    """Collection of every token of 3 000 plain texts into several shards."""
    result = run(
        folder,
        "task=collect",
        "dataset=text",
        f"dataset.path={corpus_texts(folder, 3000)}",
        "positions=all",
        "store.shard_rows=40000",
    )
    return {**result, **stored_norms(folder)}


def stored_norms(folder: Path) -> Tables:
    """The norm of each row of the only store in the workload's cache."""
    import saexp

    (path,) = (folder / "cache" / "activations").iterdir()
    acts = saexp.open_store(path).acts(2).float()
    return {"acts": pd.DataFrame({"norm": acts.norm(dim=-1).numpy()})}


def train(folder: Path) -> Tables:
    """Two SAEs trained one after another on the activations of a corpus in several shards."""
    texts = corpus_texts(folder, 1500)
    words = ["task=train", "dataset=text", f"dataset.path={texts}", "positions=all"]
    words += ["layer=2", "store.shard_rows=10000"]
    tables = {}
    for width in (256, 512):
        run_tables = run(folder, *words, f"width={width}", "sae_trainer.n_samples=150000")
        tables |= {f"{name} {width}": table for name, table in run_tables.items()}
    return tables


def sweep_cells(folder: Path) -> Tables:
    """Four runs of one process that differ in the intervention alone."""
    from saexp.context import ObjectCache

    tables, objects = {}, ObjectCache()
    for coefficient in (0.3, 0.6, 0.9, 1.2):
        cell = run(
            folder,
            f"coefficient={coefficient}",
            "intervention.n_controls=0",
            "intervention.n_prompts=20",
            objects=objects,
        )
        tables |= {f"{name} {coefficient}": table for name, table in cell.items()}
    return tables


def evaluation(folder: Path) -> Tables:
    """`task=evaluate` at every layer."""
    return run(folder, "task=evaluate", "layer=[0,1,2,3,4]")


def layers(folder: Path) -> Tables:
    """An analysis at five layers without an intervention."""
    tables = {}
    for layer in range(5):
        cell = run(folder, f"layer={layer}", "intervention=none", "analyzer.n_bootstrap=0")
        tables |= {f"{name} {layer}": table for name, table in cell.items()}
    return tables


def small_grid(folder: Path) -> Tables:
    """A grid with 19 controls."""
    return run(
        folder,
        "intervention.n_controls=19",
        "intervention.n_curve_controls=3",
        "intervention.n_prompts=60",
    )


def command_line(folder: Path, *overrides: str, without: bool) -> None:
    """The program of `python -m saexp`."""
    from saexp import cli

    words = ["tracker=none", f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}"]
    sys.argv[1:] = [*words, *overrides]
    (cli.main if without else cli.program)()


WORKLOADS: dict[str, Callable[[Path], Tables]] = {
    f.__name__: f
    for f in (
        default_run,
        grid_all_tokens,
        few_shot,
        entity_prompts,
        corpus,
        train,
        sweep_cells,
        evaluation,
        layers,
        small_grid,
    )
}
COMMANDS = {
    "command_small": ["intervention=none", "dataset.n_examples=20", "analyzer.n_bootstrap=0"],
    "command_default": [],
}
"""Workloads whose whole process is measured, imports and exit included."""
