"""Builders of data sets, one per registry name of kind `dataset`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saexp import registry
from saexp.config import DatasetConfig, WikidataConfig
from saexp.data import (
    Example,
    ExampleSet,
    MissingValues,
    Skip,
    assign_splits,
    infer_groups,
    skip_notes,
    subsample,
)
from saexp.data.tables import read_rows, text_lines, to_examples
from saexp.errors import ConfigError, DataError, counted
from saexp.hub import hub as reaching_hub
from saexp.hub import is_path, why_absent

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED_MODELS = ("tiny", "tiny_control")
ENTITY_TYPES = ("player", "movie", "city", "song")
_PEOPLE = ("John", "Mary", "Tom", "Anna", "Paul", "Lucy", "Mark", "Jane", "Peter", "Sarah", "James")
TEXT_TEMPLATE = "The {entity_type} {entity}"


def finish(
    cfg: DatasetConfig, examples: list[Example], source: str, notes: Sequence[str] = ()
) -> ExampleSet:
    """Filter examples, resolve the groups and assign splits; notes count the examples left out."""
    notes = list(notes)
    if cfg.entity_types is not None:
        types = {e.entity_type for e in examples}
        missing = [t for t in cfg.entity_types if t not in types]
        if missing:
            raise DataError(
                f"{source}: no rows of entity type '{missing[0]}'; the types are "
                f"{', '.join(sorted(str(t) for t in types))}"
            )
        notes += _exclusion_note("no entity_type", [e.entity_type for e in examples])
        examples = [e for e in examples if e.entity_type in cfg.entity_types]
    groups = infer_groups(examples, cfg.groups, source)
    if groups:
        notes += _exclusion_note("no group", [e.group for e in examples])
        examples = [e for e in examples if e.group in groups]
    examples = subsample(examples, cfg.n_examples, cfg.seed)
    if cfg.answer_space != "auto":
        examples = [replace(e, answer_space=cfg.answer_space) for e in examples]
    return ExampleSet(
        name=cfg.name,
        examples=assign_splits(examples, cfg.split, cfg.seed),
        groups=groups,
        notes=notes,
    )


def _exclusion_note(what: str, values: Sequence[str | None]) -> list[str]:
    n = sum(value is None for value in values)
    if not n:
        return []
    are, be = ("has", "is") if n == 1 else ("have", "are")
    return [f"{n:,} of {counted(len(values), 'row')} {are} {what} and {be} left out"]


def _from_file(cfg: DatasetConfig, path: str | None, kind: str) -> ExampleSet:
    rows = read_rows(path, kind)
    examples, notes = to_examples(rows, cfg, str(path), lists_as_text=kind == "csv")
    return finish(cfg, examples, str(path), notes)


def jsonl(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """A JSONL file, one example a line."""
    return _from_file(cfg, cfg.path, "jsonl")


def csv(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """A CSV file with a header, one example a row."""
    return _from_file(cfg, cfg.path, "csv")


def entities(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """Known and unknown entities: those of the shipped model, else real and invented ones.

    `dataset.path` is a JSONL file with a text per row, or a .json file in the published entity
    format, which is read as by dataset=wikidata.
    """
    if cfg.path is not None and Path(cfg.path).suffix == ".json":
        return registry.resolve("dataset", "wikidata")(WikidataConfig(**vars(cfg)))
    if cfg.path is not None:
        return _from_file(cfg, cfg.path, "jsonl")
    if cfg.model_name in SHIPPED_MODELS:
        return _from_file(cfg, str(ASSETS / "tiny" / "entities.jsonl"), "jsonl")
    rows = []
    for entity_type in ENTITY_TYPES:
        for where, row in read_rows(str(ASSETS / "entities" / f"{entity_type}.jsonl"), "jsonl"):
            names = {"entity": row["entity"], "entity_type": entity_type}
            prompt = cfg.prompt_template or row["question"]
            template = cfg.template or TEXT_TEMPLATE
            rows.append(
                (
                    where,
                    {
                        "id": f"{entity_type}/{row['entity']}",
                        "text": fill_template("dataset.template", template, names),
                        "group": row["group"],
                        "prompt": fill_template("dataset.prompt_template", prompt, names),
                        "answer": row.get("answer", []),
                        "attributes": row["attributes"],
                        **({} if cfg.prompt_template else {"attribute": row["attribute"]}),
                        **names,
                    },
                )
            )
    # dataset.columns applies to the user's files only.
    examples, notes = to_examples(rows, replace(cfg, columns={}), "the shipped entities")
    return finish(cfg, examples, "the shipped entities", notes)


def fill_template(key: str, template: str, names: dict[str, str]) -> str:
    """Replace the names in braces. Raises ConfigError for names that are not among `names`."""
    try:
        return template.format(**names)
    except (AttributeError, LookupError, ValueError) as error:
        raise ConfigError(
            f"{key}={template}: only {{entity}} and {{entity_type}} may be in braces"
        ) from error


def text(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """Plain text: one example per line of a file or of a folder's .txt files, or a string."""
    if cfg.text is not None:
        return ExampleSet(name=cfg.name, examples=[Example(id="1", text=cfg.text, split="test")])
    examples = [
        Example(id=f"{n}", text=line)
        for n, line in enumerate(read_lines(cfg.path, "dataset.path"), 1)
    ]
    return finish(cfg, examples, str(cfg.path))


def prompt(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """One prompt with its answer and, where given, a wrong one (`foil`).

    Hydra drops a leading space of an unquoted word; `dataset.answer_space` decides when one is
    added.
    """
    if not cfg.text:
        raise ConfigError(
            "dataset=prompt needs a prompt, quoted twice: type "
            """'dataset.text="When …, John gave the bag to"' 'dataset.answer=" Mary"'"""
        )
    example = Example(
        id="1",
        text=cfg.text,
        split="test",
        answers=(cfg.answer,) if cfg.answer else (),
        answer_space=cfg.answer_space,
        extra={"foil": cfg.foil} if cfg.foil else {},
    )
    return ExampleSet(name=cfg.name, examples=[example])


def read_lines(path: str | None, key: str) -> list[str]:
    """Non-blank lines of a text file, or of all .txt files of a folder. Raises DataError."""
    if not path:
        raise ConfigError(f"{key} is not set: type {key}=FILE (one text per line) or a folder")
    location = Path(path)
    files = sorted(location.glob("*.txt")) if location.is_dir() else [location]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"{key}={path}: no such text file, nor a folder with .txt files")
    lines = [line for file in files for line in text_lines(file) if line.strip()]
    if not lines:
        raise DataError(f"{path}: is empty; it needs at least one line of text")
    return lines


def background_file(cfg: DatasetConfig) -> Path:
    """The file (or folder) of neutral text: `dataset.background`, else the file that ships."""
    if cfg.background is not None:
        return Path(cfg.background)
    return (ASSETS / "tiny" if cfg.model_name in SHIPPED_MODELS else ASSETS) / "background.txt"


def background_texts(cfg: DatasetConfig) -> list[str]:
    """Neutral text for the background filter: `dataset.background`, else text that ships."""
    return read_lines(str(background_file(cfg)), "dataset.background")


def ioi(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """Indirect-object sentences with the answer, and the other name as `foil`.

    For the shipped models, those of its held-out name pairs; otherwise they are generated from
    names that are one token in most vocabularies.
    """
    if cfg.path is not None or cfg.model_name in SHIPPED_MODELS:
        return _from_file(cfg, cfg.path or str(ASSETS / "tiny" / "ioi.jsonl"), "jsonl")
    places, things = ("shops", "park", "school", "office"), ("bag", "book", "ball", "letter")
    combined = list(itertools.product(itertools.permutations(_PEOPLE, 2), places, things))
    order = np.random.default_rng([cfg.seed, 3]).permutation(len(combined))[: cfg.n_examples or 200]
    examples = []
    for number, index in enumerate(order, 1):
        (a, b), place, thing = combined[index]
        prompt = f"When {a} and {b} went to the {place}, {a} gave the {thing} to"
        examples.append(
            Example(id=str(number), text=prompt, answers=(f" {b}",), extra={"foil": f" {a}"})
        )
    return finish(cfg, examples, "indirect-object sentences")


MEMORIZATION_COLUMNS = (
    "input_text",
    "generated_continuation_text",
    "perfect_match",
    "matching_tokens",
)


def memorization(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """Memorised continuations against continuations without a matching token.

    A row with `perfect_match` true is `memorized`, one with `matching_tokens` 0 `not_memorized`,
    any other is left out; a row without a prompt, a continuation or the number that decides its
    group is skipped. Notes count both. The text is prompt plus continuation, the span is the
    continuation.
    """
    shipped = (
        str(ASSETS / "tiny" / "memorization.csv") if cfg.model_name in SHIPPED_MODELS else None
    )
    path = cfg.path or shipped
    examples, skips, n_partial = [], [], 0
    missing = MissingValues(cfg.missing_values)
    rows = read_rows(path, "csv")
    for where, cells in rows:
        absent = [c for c in MEMORIZATION_COLUMNS if c not in cells]
        if absent:
            raise DataError(
                f"{where}: column '{absent[0]}' is missing; "
                f"the file needs {', '.join(MEMORIZATION_COLUMNS)}"
            )
        row = missing.cleaned(cells)
        line = where.rpartition(":")[2]
        group, missing_column = _memorized(where, row)
        if missing_column:
            skips.append(Skip(line, f"{missing_column} is empty or a missing value"))
        elif group is None:
            n_partial += 1
        else:
            prompt, continuation = row["input_text"], row["generated_continuation_text"]
            examples.append(
                Example(
                    id=line,
                    text=prompt + continuation,
                    group=group,
                    spans=((len(prompt), len(prompt) + len(continuation)),),
                    prompt=prompt,
                    answers=(continuation,),
                    answer_space="never",
                    extra={k: v for k, v in row.items() if k not in MEMORIZATION_COLUMNS[:2]},
                )
            )
    notes = [*missing.notes(len(rows)), *skip_notes(skips, len(rows), "row")]
    if n_partial:
        verb = "matches in part and is" if n_partial == 1 else "match in part and are"
        notes.append(f"{n_partial:,} of {counted(len(rows), 'row')} {verb} left out")
    if not examples:
        raise DataError(f"{path}: no row is a perfect match or has matching_tokens 0")
    return finish(cfg, examples, str(path), notes)


def _memorized(where: str, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(group, column whose missing value leaves the group unknown); None where there is none."""
    for column in MEMORIZATION_COLUMNS[:2]:
        if row[column] is None:
            return None, column
    perfect, matching = row["perfect_match"], row["matching_tokens"]
    if perfect is not None and perfect.strip().lower() in ("true", "1", "1.0"):
        return "memorized", None
    if matching is None:
        return None, "matching_tokens"
    try:
        n_matching = float(matching)
    except ValueError as error:
        raise DataError(f"{where}: matching_tokens '{matching}' is not a number") from error
    if n_matching == 0:
        return "not_memorized", None
    return None, "perfect_match" if perfect is None else None


def hf(cfg: DatasetConfig, **_: Any) -> ExampleSet:
    """A data set of the `datasets` library: a hub id, a folder saved by it, or one it can read."""
    import datasets
    from datasets.exceptions import DatasetsError

    if not cfg.path:
        raise ConfigError("dataset=hf needs a data set: type dataset.path=<hub id or local folder>")
    is_saved = [(Path(cfg.path) / name).is_file() for name in ("state.json", "dataset_dict.json")]
    try:
        if any(is_saved):
            loaded: Any = datasets.load_from_disk(cfg.path)
        elif Path(cfg.path).exists():
            loaded = datasets.load_dataset(cfg.path, split=cfg.hf_split)
        elif is_path(cfg.path):
            raise DataError(f"dataset.path={cfg.path}: no such folder")
        else:
            with reaching_hub():
                loaded = datasets.load_dataset(cfg.path, split=cfg.hf_split)
        if isinstance(loaded, datasets.DatasetDict):
            if cfg.hf_split not in loaded:
                raise ValueError(
                    f"no split {cfg.hf_split}; the splits are {', '.join(map(str, loaded))}"
                )
            loaded = loaded[cfg.hf_split]
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"dataset.path={cfg.path}: cannot be loaded ({why_absent(error)})"
        ) from error
    rows = [(f"{cfg.path}:{n}", dict(row)) for n, row in enumerate(loaded, 1)]
    examples, notes = to_examples(rows, cfg, cfg.path, lists_as_text=True)
    return finish(cfg, examples, cfg.path, notes)
