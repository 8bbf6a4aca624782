"""Published entity and query files, and entities fetched from Wikidata."""

import json
import logging
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saexp.config import DatasetConfig, WikidataConfig
from saexp.data import Example, ExampleSet, MissingValues, Skip, find_mentions, skip_notes
from saexp.data.datasets import TEXT_TEMPLATE, fill_template, finish
from saexp.data.tables import check_characters, may_hold_surrogates, open_text
from saexp.errors import ConfigError, DataError, counted
from saexp.files import write_json
from saexp.labeling import (
    DROPPED,
    EntityKey,
    Thresholds,
    choose_queries,
    groups_of_queries,
    read_attributes,
    truths_of,
)
from saexp.labeling.answer_values import year
from saexp.labeling.matchers import Rules, canonical, is_correct
from saexp.registry import did_you_mean

log = logging.getLogger(__name__)


ENDPOINT = "https://query.wikidata.org/sparql"
AGENT = "saexp (sparse-autoencoder experiments; urllib)"

KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "player": (
        "?item wdt:P106 ?kind . VALUES ?kind { wd:Q937857 wd:Q3665646 wd:Q10871364 wd:Q10833314 }",
        {"birthplace": "P19", "birth_year": "P569", "teams": "P54"},
    ),
    "movie": (
        "?item wdt:P31 wd:Q11424 .",
        {
            "director": "P57",
            "screenwriter": "P58",
            "cast": "P161",
            "genre": "P136",
            "release_year": "P577",
            "duration": "P2047",
        },
    ),
    "city": (
        "?item wdt:P31/wdt:P279* wd:Q515 .",
        {"country": "P17", "population": "P1082", "elevation": "P2044", "coordinates": "P625"},
    ),
    "song": (
        "?item wdt:P31 ?kind . VALUES ?kind { wd:Q7366 wd:Q134556 wd:Q105543609 }",
        {"performer": "P175", "album": "P361", "year": "P577", "genre": "P136"},
    ),
}
"""Entity type -> (pattern of its items, attribute -> property)."""

_YEARS = ("birth_year", "release_year", "year")
_NO_LABEL = re.compile(r"Q\d+")


def sparql(entity_type: str, n: int, min_sitelinks: int) -> str:
    """A query for `n` items with at least `min_sitelinks` Wikipedia pages; one row per value."""
    if entity_type not in KINDS:
        raise ConfigError(f"dataset.fetch={entity_type}: {did_you_mean(entity_type, list(KINDS))}")
    pattern, properties = KINDS[entity_type]
    values = " ".join(f'(wdt:{p} "{name}")' for name, p in properties.items())
    return (
        "SELECT ?item ?itemLabel ?attribute ?value ?valueLabel WHERE {\n"
        f"  {{ SELECT DISTINCT ?item WHERE {{ {pattern} ?item wikibase:sitelinks ?links . "
        f"FILTER(?links >= {int(min_sitelinks)}) }} LIMIT {int(n)} }}\n"
        f"  VALUES (?property ?attribute) {{ {values} }}\n"
        "  ?item ?property ?value .\n"
        '  SERVICE wikibase:label { bd:serviceParam wikibase:language "en" . }\n}'
    )


def fetch_entities(
    entity_type: str,
    n: int = 200,
    *,
    endpoint: str = ENDPOINT,
    min_sitelinks: int = 20,
    timeout: int | float = 60,
) -> tuple[list[dict[str, Any]], int]:
    """(entities in the published format, number of items without an English name).

    Raises DataError where the endpoint cannot be reached or its response is not valid.
    """
    response = ask(sparql(entity_type, n, min_sitelinks), endpoint, timeout)
    return to_entities(response, entity_type, endpoint)


def ask(query: str, endpoint: str, timeout: int | float) -> Any:
    """The parsed JSON response of a SPARQL endpoint (to a POST request, for long queries)."""
    if urllib.parse.urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError(f"dataset.endpoint={endpoint} is not an http(s) address")
    request = urllib.request.Request(
        endpoint,
        data=urllib.parse.urlencode({"query": query, "format": "json"}).encode(),
        headers={"Accept": "application/sparql-results+json", "User-Agent": AGENT},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        wait = error.headers.get("Retry-After") if error.headers else None
        error.close()
        retry = f"; try again after {wait} s" if wait else ""
        raise DataError(f"{endpoint}: HTTP {error.code} {error.reason}{retry}") from error
    except TimeoutError as error:
        raise DataError(_timed_out(endpoint, timeout)) from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise DataError(_timed_out(endpoint, timeout)) from error
        raise DataError(f"{endpoint}: cannot be reached ({reason})") from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{endpoint}: the response is not valid JSON ({error})") from error


def _timed_out(endpoint: str, timeout: int | float) -> str:
    return (
        f"{endpoint}: no response within {timeout:g} s; increase dataset.timeout, or "
        "decrease dataset.n_fetched"
    )


def to_entities(response: Any, entity_type: str, where: str) -> tuple[list[dict[str, Any]], int]:
    """(entities of a SPARQL JSON response, number of items without an English name).

    Several values of an attribute become a list.
    """
    try:
        rows = response["results"]["bindings"]
        cells = [
            {name: (cell["type"], cell["value"]) for name, cell in row.items()} for row in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: the response is not SPARQL JSON (no results.bindings)"
        ) from error
    items: dict[str, dict[str, Any]] = {}
    unnamed: set[str] = set()
    for row in cells:
        missing = [v for v in ("item", "itemLabel", "attribute", "value") if v not in row]
        if missing:
            raise DataError(f"{where}: a row of the response has no ?{missing[0]}")
        item, name = row["item"][1], row["itemLabel"][1]
        if _NO_LABEL.fullmatch(name):
            unnamed.add(item)
            continue
        attribute = row["attribute"][1]
        value = _value(attribute, row)
        if value is None:
            continue
        entity = items.setdefault(item, {"name": name, "values": {}})
        values = entity["values"].setdefault(attribute, [])
        if value not in values:
            values.append(value)
    entities = [
        {
            "entity": item["name"],
            "entity_type": entity_type,
            "attributes": [
                {"attribute_type": a, "attribute_value": v[0] if len(v) == 1 else v}
                for a, v in item["values"].items()
            ],
        }
        for item in items.values()
    ]
    if not entities:
        raise DataError(f"{where}: the response has no {entity_type} with an English name")
    return entities, len(unnamed)


def _value(attribute: str, row: Mapping[str, tuple[str, str]]) -> Any:
    """The value of a cell: the label of an item, the year of a date, otherwise the text."""
    kind, text = row["value"]
    if kind == "bnode":
        return None
    if kind == "uri":
        label = row.get("valueLabel", ("", ""))[1]
        return None if not label or _NO_LABEL.fullmatch(label) else label
    if attribute in _YEARS:
        number = year(text)
        return None if number is None else int(number)
    return text


QUERY_FIELDS = ("entity", "entity_type", "prompt_type", "correct_answer", "prompt")

Row = tuple[str, dict[str, Any]]
"""(file and line or index, columns)."""


@dataclass
class _Published:
    """Entities and queries of published files."""

    attributes: dict[EntityKey, list[tuple[str, Any]]] = field(default_factory=dict)
    """Of entity files: (attribute, value) pairs of each entity."""
    queries: list[dict[str, Any]] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def entities(self) -> list[EntityKey]:
        """All entities, in order of appearance, those of entity files first."""
        of_queries = ((q["entity_type"], q["entity"]) for q in self.queries)
        return list(dict.fromkeys([*self.attributes, *of_queries]))

    @classmethod
    def read(cls, cfg: DatasetConfig) -> "_Published":
        """Read `cfg.path`. Raises DataError for rows that are neither entities nor queries."""
        published, missing, n_rows = cls(), MissingValues(cfg.missing_values), 0
        for where, values in read_published(str(cfg.path)):
            n_rows += 1
            published._add(where, missing.cleaned(values))
        skip_lines = skip_notes(published.skips, n_rows, "row")
        published.notes += [*missing.notes(n_rows), *skip_lines]
        return published

    def _add(self, where: str, row: dict[str, Any]) -> None:
        empty_columns = [c for c in ("entity_type", "entity") if c in row and row[c] is None]
        if empty_columns:
            self.skips.append(Skip(where, f"{empty_columns[0]} is empty or a missing value"))
        elif "attributes" in row:
            key = (_text(where, row, "entity_type"), _text(where, row, "entity"))
            pairs = self.attributes.setdefault(key, [])
            try:
                pairs += [p for p in read_attributes(row["attributes"] or []) if p not in pairs]
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
        else:
            self.queries.append(_query(where, row))


def wikidata(cfg: WikidataConfig, **_: Any) -> ExampleSet:
    """One example per entity of a file, or of the .json and .jsonl files in a folder.

    Entity files give the attributes (for task=label). Query files with sampled labels give the
    groups, by the rule of `Thresholds`; an entity's prompt is one of its questions, drawn with the
    seed and independently of the labels. Entities that are neither known nor unknown are dropped
    and counted in a note.
    """
    if cfg.fetch:
        _fetch(cfg)
    if not cfg.path:
        raise ConfigError("dataset=wikidata needs a file or folder: type dataset.path=FILE")
    published = _Published.read(cfg)
    of_query = choose_queries(published.queries, cfg.seed)
    thresholds = Thresholds(cfg.min_correct, cfg.min_known, cfg.max_unknown)
    groups = groups_of_queries(published.queries, thresholds)
    examples = [
        _example(cfg, key, groups.get(key), published.attributes.get(key), of_query.get(key))
        for key in published.entities
        if groups.get(key) != DROPPED
    ]
    if not examples:
        skips = published.skips
        skipped = f" ({skips[0].reason} in {counted(len(skips), 'row')})" if skips else ""
        raise DataError(f"{cfg.path}: no entity is labelled as known or unknown{skipped}")
    example_set = finish(cfg, examples, cfg.path, published.notes)
    n_dropped = sum(group == DROPPED for group in groups.values())
    if n_dropped:
        example_set.notes.append(
            f"{n_dropped} of {len(groups)} labelled entities are left out because they are neither "
            "known nor unknown"
        )
    return example_set


def _example(
    cfg: DatasetConfig,
    key: EntityKey,
    group: str | None,
    attributes: list[tuple[str, Any]] | None,
    query: dict[str, Any] | None,
) -> Example:
    """The example of one entity, with the prompt of its chosen query where there is one."""
    entity_type, entity = key
    values = {"entity": entity, "entity_type": entity_type}
    text = fill_template("dataset.template", cfg.template or TEXT_TEMPLATE, values)
    spans = find_mentions(text, entity)
    if not spans:
        raise ConfigError(
            f"dataset.template={cfg.template} contains no {{entity}}; type e.g. '{TEXT_TEMPLATE}'"
        )
    prompt = query["prompt"] if query else None
    if cfg.prompt_template:
        prompt, query = fill_template("dataset.prompt_template", cfg.prompt_template, values), None
    extra: dict[str, Any] = {}
    if attributes is not None:
        extra["attributes"] = [
            {"attribute_type": name, "attribute_value": value} for name, value in attributes
        ]
    if query:
        extra["attribute"] = query["attribute"]
    return Example(
        id=f"{entity_type}/{entity}",
        text=text,
        group=group,
        spans=spans,
        entity=entity,
        entity_type=entity_type,
        prompt=prompt,
        answers=query["truths"] if query else (),
        extra=extra,
    )


def _fetch(cfg: WikidataConfig) -> None:
    """Fetch entities and write them to `dataset.path`, unless the file exists.

    The query is saved beside the file. Raises ConfigError where an existing file was fetched with
    another query.
    """
    if not cfg.path or Path(cfg.path).is_dir():
        raise ConfigError("dataset.fetch needs a file to write: type dataset.path=FILE")
    file = Path(cfg.path)
    types = cfg.fetch
    types = [types] if isinstance(types, str) else list(types)
    query = {
        "fetch": types,
        **{name: getattr(cfg, name) for name in ("n_fetched", "min_sitelinks", "endpoint")},
        "queries": [sparql(t, cfg.n_fetched, cfg.min_sitelinks) for t in types],
    }
    query_file = file.with_name(f"{file.name}.query")
    if file.exists():
        _check_fetched(file, query_file, query)
        log.info("%s exists, so nothing is fetched", file)
        return
    entities: list[dict[str, Any]] = []
    for entity_type in types:
        of_type, n_unnamed = fetch_entities(
            entity_type,
            cfg.n_fetched,
            endpoint=cfg.endpoint,
            min_sitelinks=cfg.min_sitelinks,
            timeout=cfg.timeout,
        )
        log.info("fetched %d of type %s; %d without a name", len(of_type), entity_type, n_unnamed)
        entities += of_type
    # The query is written first, because a file without a query counts as the user's data.
    for path, content in ((query_file, query), (file, entities)):
        write_json(path, content, option="dataset.path=")


def _check_fetched(file: Path, query_file: Path, query: Mapping[str, Any]) -> None:
    """Raise ConfigError for a file of another query; a file without a saved query is accepted."""
    try:
        saved = json.loads(query_file.read_text("utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        log.warning("%s is damaged, so the query of dataset.path=%s is unknown", query_file, file)
        return
    if saved == query:
        return
    option = next((n for n in query if saved.get(n) != query[n]), "query")
    raise ConfigError(
        f"dataset.path={file} was fetched with {option}={saved.get(option)}, not "
        f"{query.get(option)}; delete the file to fetch again, or type another dataset.path="
    )


def read_published(path: str) -> Iterator[Row]:
    """(location, row) for each row of a .json or .jsonl file, or of those in a folder.

    Raises DataError where there is no such file, and for rows that are not objects.
    """
    root = Path(path)
    if root.is_dir():
        files = sorted(f for f in root.rglob("*") if f.suffix in (".json", ".jsonl"))
    else:
        files = [root]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"dataset.path={path} is neither a file nor a folder with .json files")
    for file in files:
        with open_text(file) as opened:
            text = opened.read()
        check = may_hold_surrogates(text)
        for where, row in _lines(file, text) if _is_lines(file, text) else _list(file, text):
            if check:
                check_characters(where, row)
            yield where, row


def _is_lines(file: Path, text: str) -> bool:
    return file.suffix == ".jsonl" or not text.lstrip().startswith("[")


def _lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON ({error.msg})") from error
            yield where, _object(where, row)


def _list(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", _object(f"{file}[{index}]", row)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, not {type(row).__name__}")
    if "attributes" not in row:
        missing = [f for f in QUERY_FIELDS if f not in row]
        if missing:
            raise DataError(
                f"{where}: is neither an entity (entity, entity_type, attributes) nor a query "
                f"('{missing[0]}' is missing)"
            )
    return row


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: '{name}' must be text that is neither empty nor a missing value")
    return value


def _query(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A query with its true answers and number of correct samples (None without samples).

    Samples without labels are judged by the default rules.
    """
    entity_type, entity = _text(where, row, "entity_type"), _text(where, row, "entity")
    attribute = canonical(_text(where, row, "prompt_type"), entity_type)
    truths = truths_of(row["correct_answer"], attribute)
    prompt = row.get("question") or _text(where, row, "prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: 'question' must be text")
    labels = row.get("string_matching_sampled_labels") or []
    samples = row.get("sampled_completions") or []
    if not isinstance(labels, list) or not isinstance(samples, list):
        raise DataError(f"{where}: sampled completions and their labels must be lists")
    if labels:
        n_correct = sum(str(x).lower() in ("correct", "true", "1") for x in labels)
    elif samples:
        rules = Rules()
        answers = [str(sample) for sample in samples if sample is not None]
        n_correct = sum(
            is_correct(a, truths, entity_type, attribute, rules, question=prompt, entity=entity)
            for a in answers
        )
    else:
        n_correct = None
    return {
        "entity": entity,
        "entity_type": entity_type,
        "attribute": attribute,
        "truths": truths,
        "prompt": prompt,
        "n_correct": n_correct,
    }
